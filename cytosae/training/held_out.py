"""The held-out images of a training run: their tokens piece by piece, and how well the SAE does on them.

Shapes: N images and B tokens of a micro-batch, T chosen tokens of an image, D width.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import SparseAutoencoder, TrainConfig
from stores.activation_store import ActivationStore
from stores.errors import BadInput
from stores.progress import Progress
from stores.token_sets import chosen_tokens

from .data import TrainingData
from .device_prefetch import one_ahead
from .distributed import ALONE, Ranks
from .evaluation import plain_values
from .finite_tokens import check_finite
from .measured_sums import MeasuredSums, explained_share

_STATE = "the error on held-out images"  # in words, of progress
_MICRO_BATCH_BYTES = 128 << 20  # of one dense (tokens, latents) float32 matrix; topk holds two
_MICRO_BATCH_BYTES_ON_GPU = 1 << 30  # small ones leave a GPU idle


def tokens_at_a_time(model: SparseAutoencoder) -> int:
    """Tokens of one micro-batch of a measurement: 128 MiB of dense latents, on a GPU 1 GiB."""
    n_bytes = _MICRO_BATCH_BYTES_ON_GPU if model.W_enc.device.type == "cuda" else _MICRO_BATCH_BYTES
    return max(1, n_bytes // (4 * model.n_latents))


@torch.no_grad()
def measure_held_out(
    model: SparseAutoencoder,
    data: TrainingData,
    config: TrainConfig,
    *,
    device: str,
    ranks: Ranks = ALONE,
    progress: Progress = lambda done, total, state: None,
) -> dict[str, float | int | None]:
    """Metrics on the held-out images, by the names of metrics.parquet, of unscaled tokens; None for NaN.

    Called on all ranks: each measures on its share of the chunks, and gets the metrics of all.

    progress : images of this rank that are measured
    """
    part = (ranks.rank, ranks.size)
    sums = MeasuredSums(model, loss=config.loss, step=tokens_at_a_time(model), window_begins=0)
    total = sum(each.n_images for each in _held_out_chunks(data, part))
    for x_NTD in held_out_pieces(data, config, device, step=tokens_at_a_time(model), part=part):
        sums.add(x_NTD.to(device).float())
        progress(sums.n_images, total, _STATE)
    progress(total, total, _STATE)  # images that are all background are passed over
    sums.add_other_ranks(ranks)
    if not sums.n_tokens:
        raise BadInput("the held-out images are all background: hold out more, or leave --background out")
    found: dict[str, float | int | None] = plain_values(
        {
            "n_images": sums.n_images,
            "n_tokens": sums.n_tokens,
            "mse": sums.scaled_error / (sums.n_tokens * model.width),
            "explained_variance": sums.explained_variance,
            "explained_variance_uncentered": explained_share(sums.error, sums.square),
            "l0": sums.l0,
            "n_meaningful": sums.n_meaningful(),
        }
    )
    return found


def held_out_pieces(
    data: TrainingData, config: TrainConfig, device: str, *, step: int, part: tuple[int, int] = (0, 1)
) -> Iterator[torch.Tensor]:
    """Tokens of held-out images, (N, T, D) float16, about `step` tokens at a time; without background.

    On a CPU a piece is of one chunk. For a GPU those of several chunks are taken together, and a thread reads ahead.

    part : (rank, size): of all chunks with a held-out image, only every `size`-th from number `rank` on
    """

    def pieces() -> Iterator[torch.Tensor]:
        for each in _held_out_chunks(data, part):
            for images, x_NTD in images_of(each.store, each.mask, config.token_set, [each.chunk], step=step):
                if each.keep is None:
                    yield x_NTD
                else:
                    yield from _without_background(x_NTD, each.keep[images], each.store, config)

    if not device.startswith("cuda"):
        return pieces()
    return one_ahead(_together(pieces(), step), lambda x_NTD: lambda: x_NTD)


class _Chunk(NamedTuple):
    """A chunk with held-out images."""

    store: ActivationStore
    chunk: int
    mask: npt.NDArray[np.bool_]  # (images of the store,) held out
    keep: npt.NDArray[np.bool_] | None  # (images of the store, tokens of an image) no background; None: all of them
    n_images: int  # held out, of this chunk


def _held_out_chunks(data: TrainingData, part: tuple[int, int]) -> list[_Chunk]:
    """Those of `part`, as `held_out_pieces` says."""
    keep: Sequence[npt.NDArray[np.bool_] | None] = (
        data.background.keep if data.background else [None] * len(data.stores)
    )
    chunks = [
        _Chunk(store, chunk, mask, kept, int(mask[rows.start : rows.stop].sum()))
        for store, mask, kept in zip(data.stores, data.chosen.held_out, keep, strict=True)
        for chunk, rows in enumerate(map(store.spec.chunk_rows, range(store.spec.n_chunks)))
    ]
    return [each for each in chunks if each.n_images][part[0] :: part[1]]


def _without_background(
    x_NTD: torch.Tensor, kept_NT: npt.NDArray[np.bool_], store: ActivationStore, config: TrainConfig
) -> Iterator[torch.Tensor]:
    """The images one by one, (1, T, D) with a T of their own; none of an image that is all background."""
    positions = chosen_tokens(config.token_set, store.spec.layout)
    for x_TD, is_kept in zip(x_NTD, kept_NT[:, positions.start : positions.stop], strict=True):
        if is_kept.any():
            yield x_TD[torch.from_numpy(is_kept)][None]


def _together(pieces: Iterable[torch.Tensor], step: int) -> Iterator[torch.Tensor]:
    """Images with the same number of tokens that follow each other, together, as long as they have `step` tokens."""
    waiting: list[torch.Tensor] = []
    for x_NTD in pieces:
        n_tokens = sum(piece.shape[0] * piece.shape[1] for piece in (*waiting, x_NTD))
        if waiting and (n_tokens > step or waiting[0].shape[1] != x_NTD.shape[1]):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(x_NTD)
    if waiting:
        yield torch.cat(waiting)


def images_of(
    store: ActivationStore, mask: npt.NDArray[np.bool_], token_set: str, chunks: Iterable[int], *, step: int
) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
    """Images in `mask` (n_images,) chunk by chunk, about `step` tokens each: (N,) their indices in the store, and their
    chosen tokens (N, T, D) float16.

    Raises
    ------
    DamagedStore
        If a token is NaN or infinite.
    """
    positions = chosen_tokens(token_set, store.spec.layout)
    per_image, chosen = len(positions), slice(positions.start, positions.stop)
    for chunk in chunks:
        rows = store.spec.chunk_rows(chunk)
        images = np.flatnonzero(mask[rows.start : rows.stop])
        if not len(images):
            continue
        tokens = store.read_chunk(chunk)
        for some in np.array_split(images, -(-len(images) * per_image // step)):
            x_NTD = tokens[some][:, chosen]
            check_finite(store, x_NTD, some + rows.start, first_token=chosen.start)
            yield some + rows.start, torch.from_numpy(x_NTD)
