"""The data of a training run: caches, order of the tokens, held-out images, and estimates before step 0."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from cytosae.sae import TrainConfig, geometric_median
from stores.activation_store import ActivationStore, open_caches
from stores.errors import BadInput
from stores.holdout import Chosen, chosen_images
from stores.token_mix import TokenMix
from stores.token_stream import TokenStream

from .background import Background, find_background

# settings that `choose_data` reads: SAEs of a sweep that agree in these share their data
OF_DATA = ("order_seed", "token_set", "order", "pool_chunks", "mix", "holdout", "holdout_by", "background")
_SAMPLE = 65_536  # tokens from which the initial b_dec and the scale of the tokens are computed


@dataclass(frozen=True)
class TrainingData:
    """Opened caches, and their tokens in training order."""

    stores: list[ActivationStore]
    stream: TokenStream | TokenMix
    chosen: Chosen
    excluded_sha256: str | None  # of the sorted ids, one per line; None: no image is excluded
    background: Background | None = None  # None: all tokens are used
    # initial b_dec by setting, computed once for all SAEs of a sweep that start from the same one
    starts: dict[tuple[str, int, str], torch.Tensor] = field(default_factory=dict)
    # tokens of held-out images by token set, read once in the same way (budget.py)
    watched: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.stores[0].spec.width

    def held_out_table(self) -> pa.Table:
        """`dataset` and `image_id` of the held-out images."""
        tables = [
            store.images.select(["dataset", "image_id"]).filter(pa.array(mask))
            for store, mask in zip(self.stores, self.chosen.held_out, strict=True)
        ]
        return pa.concat_tables(tables)

    def trained_on(self) -> list[pa.Table]:
        """The rows of the image tables that the SAE is trained on, one table per cache."""
        return [store.images.filter(pa.array(mask)) for store, mask in zip(self.stores, self.chosen.train, strict=True)]

    def to_spec(self) -> dict[str, Any]:
        """The fields of `sae.json` that describe the data."""
        return {
            "tokens": self.stores[0].spec.same_tokens,
            "trained_backbone": self.stores[0].spec.trained,
            "caches": [
                {"identity": store.identity, "sha256": store.content_sha256, "precision": store.spec.precision}
                for store in self.stores
            ],
            "tokens_per_epoch": self.stream.tokens_per_epoch,
            "images": {
                "trained_on": sum(int(mask.sum()) for mask in self.chosen.train),
                "held_out": sum(int(mask.sum()) for mask in self.chosen.held_out),
                "excluded": self.chosen.n_excluded,
                "excluded_sha256": self.excluded_sha256,
            },
            **({"background": self.background.to_spec()} if self.background else {}),
        }


def open_data(
    caches: Sequence[Path | str] | Path | str, config: TrainConfig, *, exclude: Collection[str] = ()
) -> TrainingData:
    """Open `caches` (paths or URLs), without the images whose ids are in `exclude`.

    Raises
    ------
    SpecMismatch
        If the caches do not fit together.
    IncompleteStore, DamagedStore, StoreUnreachable
        If one cannot be read.
    BadInput
        If no image is left, or an excluded id is in no cache.
    """
    return choose_data(open_caches(caches), config, exclude=exclude)


def choose_data(stores: list[ActivationStore], config: TrainConfig, *, exclude: Collection[str] = ()) -> TrainingData:
    """The tokens of opened caches that `config` selects. Raises BadInput as `open_data` does."""
    seed = config.seed if config.order_seed is None else config.order_seed
    if config.mix is not None and len(config.mix) != len(stores):
        raise BadInput(f"mix must have a share for each of the {len(stores)} caches; found {len(config.mix)}")
    chosen = chosen_images(stores, holdout=config.holdout, by=config.holdout_by, seed=seed, exclude=frozenset(exclude))
    background = None if config.background == "keep" else find_background(stores, config.background)
    keep = background.keep if background else None
    stream: TokenStream | TokenMix
    if config.mix is None:
        stream = TokenStream(
            stores,
            token_set=config.token_set,
            order=config.order,
            pool_chunks=config.pool_chunks,
            seed=seed,
            images=chosen.train,
            keep=keep,
        )
    else:
        stream = TokenMix(
            stores,
            config.mix,
            token_set=config.token_set,
            order=config.order,
            pool_chunks=config.pool_chunks,
            seed=seed,
            images=chosen.train,
            keep=keep,
        )
    excluded = (
        hashlib.sha256("".join(f"{name}\n" for name in sorted(exclude)).encode()).hexdigest() if exclude else None
    )
    return TrainingData(stores, stream, chosen, excluded, background)


def first_position(config: TrainConfig) -> int:
    """The position in the token stream at which step 0 begins.

    After the first batch for `geometric-median-per-position`: the released code has used that batch for the median.
    """
    return config.batch_tokens if config.b_dec_init == "geometric-median-per-position" else 0


def require_start(data: TrainingData, config: TrainConfig) -> None:
    """Raise BadInput if `data` is too small for the batches of `config`, or a batch for the initial b_dec."""
    data.stream.batches(config.batch_tokens)
    is_per_position = config.b_dec_init == "geometric-median-per-position"
    if is_per_position and config.batch_tokens < data.stream.tokens_per_image:
        raise BadInput(f"b_dec_init {config.b_dec_init!r} needs batches of at least one image")


def token_scale(data: TrainingData, config: TrainConfig) -> float:
    """The factor of the tokens, above 0: for `sqrt-width`, sqrt(width) / mean norm of the first tokens.

    Raises BadInput if that mean norm is 0.
    """
    if config.token_scale == "none":
        return 1.0
    norm = float(first_tokens(data, config).norm(dim=1).double().mean())
    if norm == 0:
        raise BadInput("token_scale 'sqrt-width' divides by the tokens' mean norm, which is 0")
    return data.width**0.5 / norm


def initial_b_dec(data: TrainingData, config: TrainConfig, device: str = "cpu") -> torch.Tensor:
    """(D,) on the CPU: the initial b_dec, of unscaled tokens.

    The paper has the geometric median of tokens; the released code takes it per position over one batch. A hundred
    rounds over 65,536 tokens of width 768 take 15 core-seconds: a GPU computes them itself, to rounding.

    device : where it is computed. Memory there: the tokens twice, in float32 (0.4 GB)
    """
    asked = (config.b_dec_init, config.batch_tokens, device)
    if asked not in data.starts:
        data.starts[asked] = _initial_b_dec(data, config, device).cpu()
    return data.starts[asked]


def _initial_b_dec(data: TrainingData, config: TrainConfig, device: str) -> torch.Tensor:
    if config.b_dec_init == "zeros":
        return torch.zeros(data.width)
    if config.b_dec_init == "geometric-median-per-position":
        sample = _first(data, config.batch_tokens, device)
        per_image = data.stream.tokens_per_image
        whole = len(sample) - len(sample) % per_image
        return geometric_median(sample[:whole].reshape(-1, per_image, data.width)).mean(0)
    sample = first_tokens(data, config, device)
    return sample.mean(0) if config.b_dec_init == "mean" else geometric_median(sample)


def first_tokens(data: TrainingData, config: TrainConfig, device: str = "cpu") -> torch.Tensor:
    """(N, D) float32 on `device`: the first tokens of the stream, from which is estimated what a run starts with."""
    n_tokens = min(_SAMPLE, data.stream.tokens_per_epoch)
    return _first(data, config.batch_tokens if config.order == "images" else n_tokens, device)


def _first(data: TrainingData, n_tokens: int, device: str) -> torch.Tensor:
    """(n_tokens, D) float32 on `device`: the first tokens of the stream."""
    batch: npt.NDArray[np.float16] = next(data.stream.batches(n_tokens))
    return torch.from_numpy(batch).to(device).float()
