"""An existing or imported SAE that a run goes on from, on new tokens.

The run takes its weights; Adam's moments, the learning rate's warm-up and the counts of dead latents begin anew. What
it was trained on counts as trained on: `trained_on.parquet` of the new SAE holds the images of both.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytosae.sae import SaeRun, SparseAutoencoder, TrainConfig, load_sae, require_same_shape
from stores.content_hashes import find_trained_on, read_trained_on
from stores.errors import BadInput
from stores.spec import SAE, read_header

from .data import TrainingData


def init_settings(run: Path) -> dict[str, Any]:
    """activation, k and expansion of the SAE in the folder `run`, for `make_config(start=...)`.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch
        If there is no finished SAE of a version that this program reads.
    BadInput
        If its number of latents is no multiple of the width of its tokens.
    """
    spec = read_header(run, SAE).spec
    if spec["n_latents"] % spec["width"]:
        raise BadInput(
            f"{run} has {spec['n_latents']:,} latents on tokens of width {spec['width']}; to go on from it, expected a "
            f"multiple of the width"
        )
    found = {"activation": spec.get("activation", "relu"), "expansion": spec["n_latents"] // spec["width"]}
    return found | ({"k": spec["k"]} if spec.get("k") is not None else {})


def open_init_sae(run: Path, data: TrainingData, config: TrainConfig, *, assume_compatible: bool = False) -> SaeRun:
    """The SAE in the folder `run`, if it fits the tokens and the settings.

    Raises
    ------
    SpecMismatch
        If it was trained on another kind of tokens, or does not say on which and it is not to be assumed.
    BadInput
        If the settings ask for another activation or number of latents.
    StoreNotFound, IncompleteStore, DamagedStore
        If there is no finished SAE, or it is damaged.
    """
    settings = init_settings(run)
    sae = load_sae(run)
    sae.require_tokens(data.stores[0].spec, f"the cache {data.stores[0].root}", assume_compatible=assume_compatible)
    require_same_shape({"activation": config.activation, "expansion": config.expansion}, settings)
    return sae


def init_spec(sae: SaeRun) -> dict[str, Any]:
    """What `sae.json` says of the SAE that a run began from."""
    return {"identity": sae.header.identity, "sae_sha256": sae.sha256}


@torch.no_grad()
def take_weights_(model: SparseAutoencoder, sae: SaeRun, token_scale: float) -> None:
    """Copy the weights of `sae` into `model`, with decoder rows of norm 1, for tokens multiplied by `token_scale`.

    The norms of imported decoder rows go into the encoder, so that reconstructions stay (not with topk and batchtopk).
    """
    model.load_state_dict(sae.model.state_dict())
    model.fold_decoder_norm()
    if token_scale != 1:
        model.fold_token_scale(1 / token_scale)


def trained_on_before(sae: SaeRun) -> frozenset[str] | None:
    """Hashes of the images that `sae` was trained on; None if not all of them are known."""
    found = read_trained_on(sae.root, sae.header)
    said = (sae.header.summary or {}).get("trained_on") or {}
    return None if said.get("n_without_hash") or said.get("before_unknown") else found


def seen_before(sae: SaeRun, data: TrainingData) -> int:
    """Number of held-out images that `sae` is known to have been trained on."""
    n_seen = 0
    for store, held_out in zip(data.stores, data.chosen.held_out, strict=True):
        known = find_trained_on(sae.root, sae.header, store.images, cache_sha256=store.content_sha256)
        n_seen += int((known.is_trained_on & np.asarray(held_out)).sum())
    return n_seen
