"""batchtopk in training: the k x N largest pre-activations of a batch of N tokens, with one product of the encoder.

Which values are the largest is known only after the whole batch, whose pre-activations do not fit into memory. So of
each micro-batch a little more is kept than is needed: the values above a bound, which is estimated from a sample of the
first micro-batch. If the bound turns out too high, the batch is encoded again with half of it, at last with 0: the
result does not depend on the bound. Twin: tests/cytosae/training/test_batch_top_k.py.

Memory: at most 2 k x N values with their places, and those of one micro-batch.
Shapes: B tokens of a micro-batch, N of the batch, L latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from cytosae.sae import Active, use_kernels_with_torch_threads

from . import kernels_cpu
from .distributed import Ranks
from .latent_matrix import Latents, latents_of_active, latents_of_found, parts_of

_SAMPLE = 1 << 17  # pre-activations from which the bound is estimated
_MARGIN = 1.25  # values above the bound, over those that are needed


class _Piece(Protocol):
    """The values of one micro-batch above the bound, with their places."""

    values: torch.Tensor  # (n,)

    def at_least(self, least: float) -> "_Piece":
        """Those of at least `least`."""

    def latents(self, edges: Sequence[int], sparse_below: float | None) -> list[Latents]:
        """As latents of the micro-batch, for each range of latents between two edges."""


@dataclass(frozen=True)
class BatchTopK:
    """The chosen values of a batch."""

    threshold: float  # the smallest one
    _pieces: list[_Piece]

    def latents(self, number: int, edges: Sequence[int], sparse_below: float | None) -> list[Latents]:
        """The latents of micro-batch `number`, from 0: a matrix for each range of latents between two edges."""
        return self._pieces[number].at_least(self.threshold).latents(edges, sparse_below)


def choose_largest(
    encode: Callable[[int], torch.Tensor], n_micro_batches: int, *, k: int, n: int, ranks: Ranks
) -> BatchTopK | None:
    """The k x n largest positive pre-activations of a batch, or all positive ones if there are fewer; ties are kept.

    encode : the pre-activations (B, L) of this rank's micro-batch, from 0; the next one may overwrite them
    n_micro_batches : of this rank, at least one
    n : tokens of all ranks

    Returns
    -------
    None if a pre-activation is NaN.
    """
    wanted = k * n
    for attempt in (0.0, 1.0, 2.0):
        pieces, bound = _above_bound(encode, n_micro_batches, k, wanted, attempt)
        mine = _largest(torch.cat([piece.values for piece in pieces]), wanted)
        kept, bound = _of_all_ranks(mine, bound, wanted, ranks)
        threshold = float(kept.min()) if len(kept) else 0.0
        if math.isnan(threshold):  # a NaN on any rank: then no rank goes on
            return None
        if bound == 0 or (len(kept) == wanted and threshold > bound):
            break
    return BatchTopK(threshold, pieces)


def _of_all_ranks(mine: torch.Tensor, bound: float, wanted: int, ranks: Ranks) -> tuple[torch.Tensor, float]:
    """(the largest values of all ranks, NaN among them if one has it; the largest bound): one exchange.

    mine : (n,) values above 0 or NaN, the largest of this rank, n <= wanted; n may differ between ranks
    bound : 0 or more, which the type of `mine` can hold
    """
    if ranks.size == 1:
        return mine, bound
    sent = torch.zeros(wanted + 1, dtype=mine.dtype, device=mine.device)  # 0 for values that this rank does not have
    sent[0] = bound
    sent[1 : len(mine) + 1] = mine
    of_all = torch.stack(ranks.all_gather(sent))
    values = of_all[:, 1:].flatten()
    return _largest(values[~(values <= 0)], wanted), float(of_all[:, 0].max())


def _above_bound(
    encode: Callable[[int], torch.Tensor], n_micro_batches: int, k: int, wanted: int, attempt: float
) -> tuple[list[_Piece], float]:
    """(pieces with all values above a bound that could be among the largest, the bound); the third attempt has 0."""
    pieces: list[_Piece] = []
    bound = least = 0.0
    for number in range(n_micro_batches):
        p_BL = encode(number)
        if not number and attempt < 2:
            bound = least = _estimated_bound(p_BL, k) / (1 + attempt)
        pieces.append(_piece_above(p_BL, least))
        if bool(torch.isnan(pieces[-1].values).any()):
            break
        if sum(len(piece.values) for piece in pieces) > 2 * wanted:  # what is smaller than k x n others is not needed
            so_far = float(_largest(torch.cat([piece.values for piece in pieces]), wanted).min())
            pieces = [piece.at_least(so_far) for piece in pieces]
            least = max(least, _next_below(so_far, p_BL.dtype))  # ties are kept
    return pieces, bound


def _estimated_bound(p_BL: torch.Tensor, k: int) -> float:
    """A bound that a few more than k values per token exceed, so likely that it need not be tried again."""
    values = p_BL.reshape(-1)
    sample = values[:: max(1, len(values) // _SAMPLE) | 1].float()  # an odd stride meets all latents in turn
    expected = len(sample) * k / p_BL.shape[1]
    rank = round(_MARGIN * expected + 3 * expected**0.5) + 3
    if rank >= len(sample):
        return 0.0
    found = float(_largest(sample, rank).min())
    return found if found > 0 else 0.0  # also for NaN


def _largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """The n largest, in any order; NaN counts as the largest."""
    if len(values) <= n:
        return values
    if values.device.type == "cpu" and values.dtype.itemsize > 2:
        return torch.from_numpy(np.partition(values.numpy(), len(values) - n)[len(values) - n :])
    return values.topk(n, sorted=False).values


def _next_below(value: float, dtype: torch.dtype) -> float:
    """The largest number of this type below `value` > 0; a nearer one would be rounded to `value` when compared."""
    return float(torch.nextafter(torch.tensor(value, dtype=dtype), torch.zeros((), dtype=dtype)))


def _piece_above(p_BL: torch.Tensor, bound: float) -> _Piece:
    if p_BL.device.type == "cpu" and p_BL.dtype.itemsize > 2:
        use_kernels_with_torch_threads()
        _, active = kernels_cpu.find_active(p_BL.numpy(), bound)
        assert active is not None
        return _CpuPiece(active)
    if p_BL.is_cuda:
        from . import kernels_gpu  # needs triton

        found = kernels_gpu.take_by_token(p_BL, kernels_gpu.mark_active(p_BL, bound))
        return _GpuPiece(found, p_BL.shape[1])
    places = (~(p_BL <= bound)).view(-1).nonzero().squeeze(1)
    return _TorchPiece(p_BL.reshape(-1)[places], places, p_BL.shape)


class _CpuPiece:
    """In compressed sparse columns."""

    def __init__(self, active: Active) -> None:
        self._active = active
        self.values = torch.from_numpy(active.values)

    def at_least(self, least: float) -> "_CpuPiece":
        return _CpuPiece(self._active.at_least(least))

    def latents(self, edges: Sequence[int], sparse_below: float | None) -> list[Latents]:
        return [latents_of_active(self._active.part(*ends), sparse_below) for ends in pairwise(edges)]


class _GpuPiece:
    """By token, as the GPU's kernels find them: the matrix is read once and never filled again."""

    def __init__(self, found: Any, n_latents: int) -> None:
        self._found, self._n_latents = found, n_latents  # kernels_gpu.ByToken
        self.values: torch.Tensor = found.values

    def at_least(self, least: float) -> "_GpuPiece":
        return _GpuPiece(self._found.kept(~(self.values < least)), self._n_latents)

    def latents(self, edges: Sequence[int], sparse_below: float | None) -> list[Latents]:
        if len(edges) == 2:
            return [latents_of_found(self._found, self._n_latents, sparse_below)]
        return [latents_of_found(self._found.part(*ends), ends[1] - ends[0], sparse_below) for ends in pairwise(edges)]


class _TorchPiece:
    """By places in the matrix, for types and devices that no kernel here knows."""

    def __init__(self, values: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> None:
        self.values, self._places, self._shape = values, places, shape

    def at_least(self, least: float) -> "_TorchPiece":
        is_kept = ~(self.values < least)
        return _TorchPiece(self.values[is_kept], self._places[is_kept], self._shape)

    def latents(self, edges: Sequence[int], sparse_below: float | None) -> list[Latents]:
        dense_BL = self.values.new_zeros(self._shape)
        dense_BL.view(-1)[self._places] = self.values
        return parts_of(dense_BL, edges, sparse_below)
