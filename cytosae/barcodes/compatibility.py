"""Checks that latent stores may be counted together, and exactly; and how the stores differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stores.activation_spec import SAME_TOKENS
from stores.errors import BadInput, SpecMismatch
from stores.latent_store import LatentStore
from stores.runlog import read_runs
from stores.spec import describe_difference
from stores.token_sets import chosen_tokens

from .patients import Groups

# columns of the tables of barcodes that say which images belong to which patient
IMAGE_COLUMNS = ("patient", "dataset", "status", "content_hash")
PATIENT_COLUMNS = ("patient_id", "dataset", "disease", "n_images")
_EXACT = 1 << 24  # integers up to here are exact in float32


def check_one_sae(stores: Sequence[LatentStore]) -> None:
    """Raise SpecMismatch unless all stores hold latents of the same SAE and kind of tokens."""
    first = stores[0]
    for store in stores:
        for name in ("sae_sha256", "n_latents", "tokens_per_image"):
            if getattr(store.spec, name) != getattr(first.spec, name):
                theirs, ours = (str(getattr(each.spec, name))[:12] for each in (store, first))
                raise SpecMismatch(
                    f"{store.root} and {first.root} hold latents of different SAEs ({name} {theirs} against {ours}): "
                    f"they cannot be compared; encode both with one SAE"
                )
        tokens, others = ({name: each.spec.cache.get(name) for name in SAME_TOKENS} for each in (store, first))
        if tokens != others:
            raise SpecMismatch(
                f"{store.root} and {first.root} hold latents of different kinds of tokens "
                f"({describe_difference(tokens, others)}): they cannot be compared; extract both caches alike"
            )


def check_tau(stores: Sequence[LatentStore], least_tau: float) -> None:
    """Raise BadInput if `least_tau` lies below what a store was pruned at."""
    for store in stores:
        if least_tau < store.spec.min_activation:
            raise BadInput(
                f"{store.root} was pruned below {store.spec.min_activation:g}: tau {least_tau:g} would count "
                f"too few; choose a larger --tau, or encode without pruning"
            )


def check_token_set(stores: Sequence[LatentStore], token_set: str) -> None:
    """Raise BadInput if the backbone of these tokens has none of the set: no CLS, or no registers."""
    chosen_tokens(token_set, stores[0].layout, f"the tokens of {stores[0].root}")


def differences(stores: Sequence[LatentStore]) -> str:
    """What may make equal images differ a little from store to store, in words: precision, versions, device."""
    said: list[dict[str, Any]] = []
    for store in stores:
        runs = read_runs(store.root) if isinstance(store.root, Path) else []
        last = runs[-1] if runs else {}
        said.append(
            {
                "precision of the cache": store.spec.cache.get("precision"),
                "precision of the encoder": store.spec.precision,
                "value bits": store.spec.value_bits,
                "values below dropped": store.spec.min_activation,
                "cyto": store.header.created_by.removeprefix("cyto "),
                "torch": last.get("versions", {}).get("torch"),
                "device": last.get("device"),
            }
        )
    values = {name: list(dict.fromkeys(str(each[name]) for each in said if each[name] is not None)) for name in said[0]}
    return "; ".join(f"{name} {' against '.join(them)}" for name, them in values.items() if len(them) > 1)


def check_exact(stores: list[LatentStore], groups: Groups) -> None:
    """Counts are stored as float32, column numbers as int32: refuse numbers that would not be exact."""
    most = {"tokens per image": stores[0].spec.tokens_per_image, "images of a patient": groups.n_images.max(initial=0)}
    for what, number in most.items():
        if number > _EXACT:
            raise BadInput(f"{number:,} {what}: counts above {_EXACT:,} are not exact in float32 barcodes")
    if stores[0].spec.n_latents > np.iinfo(np.int32).max:
        raise BadInput(f"{stores[0].spec.n_latents:,} latents do not fit the int32 indices of barcodes")
