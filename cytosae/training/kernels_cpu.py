"""Kernels of a training step that work on active latents only, for the CPU (numba). Twin: tests/support/reference.py.

The active latents of a micro-batch are stored in compressed sparse columns: latent l is active on the tokens
tokens[starts[l] : starts[l + 1]], ascending, with the values at the same places. Every sum runs in that order, so
results do not depend on the number of threads.
Shapes: B tokens, D width, L latents, A active (token, latent) pairs.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]  # float32, or float64 in tests
_CHUNK = 16  # latents that are tested together: most chunks have no active latent
_MIN_COLUMNS = 64  # columns of the reconstruction per thread, at least


@dataclass(frozen=True)
class Active:
    """The active latents of a micro-batch, in compressed sparse columns."""

    n_tokens: int
    starts: npt.NDArray[np.int64]  # (L + 1,)
    tokens: npt.NDArray[np.int32]  # (A,)
    values: Floats  # (A,)

    @property
    def fired(self) -> npt.NDArray[np.bool_]:
        """(L,): True if active on at least one token."""
        return self.starts[1:] > self.starts[:-1]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(L,): number of tokens on which each is active."""
        return np.diff(self.starts)

    def part(self, low: int, high: int) -> "Active":
        """Those of the latents from `low` to before `high`, which are counted from 0 on then."""
        first, last = self.starts[low], self.starts[high]
        return Active(
            self.n_tokens, self.starts[low : high + 1] - first, self.tokens[first:last], self.values[first:last]
        )

    def at_least(self, bound: float) -> "Active":
        """Those with a value of at least `bound`, or NaN."""
        is_kept = ~(self.values < bound)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
        return Active(self.n_tokens, before[self.starts], self.tokens[is_kept], self.values[is_kept])

    def to_dense(self) -> Floats:
        """(B, L), 0 where a latent is not active."""
        dense = np.zeros((self.n_tokens, len(self.starts) - 1), self.values.dtype)
        dense[self.tokens, np.repeat(np.arange(len(self.counts)), self.counts)] = self.values
        return dense


def count_active(pre_activations_BL: Floats, above: float = 0.0) -> npt.NDArray[np.int64]:
    """(B,): number of entries above `above` of each token. NaN counts as active, so that it reaches the loss."""
    counts = np.empty(len(pre_activations_BL), np.int64)
    _count(pre_activations_BL, pre_activations_BL.dtype.type(above), counts)
    return counts


def take_active(pre_activations_BL: Floats, counts_B: npt.NDArray[np.int64], above: float = 0.0) -> Active:
    """The entries above `above`, by latent; `counts_B` from `count_active`. Memory: 16 bytes per active entry."""
    starts = np.concatenate([np.zeros(1, np.int64), counts_B.cumsum()])
    latents = np.empty(starts[-1], np.int32)
    values = np.empty(starts[-1], pre_activations_BL.dtype)
    _fill(pre_activations_BL, pre_activations_BL.dtype.type(above), starts, latents, values)
    return Active(len(counts_B), *_by_latent(starts, latents, values, pre_activations_BL.shape[1]))


def count_active_bfloat16(bits_BL: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """`count_active` of bfloat16 numbers, whose bits are given: numpy has no such type."""
    counts = np.empty(len(bits_BL), np.int64)
    _count_bits(bits_BL, counts)
    return counts


def take_active_bfloat16(bits_BL: npt.NDArray[np.uint16], counts_B: npt.NDArray[np.int64]) -> Active:
    """`take_active` of bfloat16 numbers, whose bits are given; the values become float32, exactly."""
    starts = np.concatenate([np.zeros(1, np.int64), counts_B.cumsum()])
    latents = np.empty(starts[-1], np.int32)
    bits = np.empty(starts[-1], np.uint32)
    _fill_bits(bits_BL, starts, latents, bits)
    return Active(len(counts_B), *_by_latent(starts, latents, bits.view(np.float32), bits_BL.shape[1]))


def add_decoded(active: Active, W_dec_LD: Floats, out_BD: Floats) -> None:
    """out += z W_dec."""
    n_parts = max(1, min(numba.get_num_threads(), W_dec_LD.shape[1] // _MIN_COLUMNS))
    _add_decoded(active.starts, active.tokens, active.values, W_dec_LD, out_BD, n_parts)


def add_gradients(
    active: Active,
    *,
    W_dec_LD: Floats,
    d_x_hat_BD: Floats,
    centred_BD: Floats,
    penalty: float,
    grad_W_enc_LD: Floats,
    grad_b_enc_L: Floats,
    grad_W_dec_LD: Floats,
) -> None:
    """Add the gradients of encoder and decoder in one pass over the active latents.

    d_z = <d_x_hat, W_dec row> + penalty;  W_dec row += z d_x_hat;  W_enc column += d_z (x - b_dec);  b_enc += d_z

    Parameters
    ----------
    d_x_hat_BD : gradient of the loss with respect to the reconstruction
    centred_BD : x - b_dec
    penalty : the L1 term's gradient with respect to an active latent
    grad_W_enc_LD : of W_enc, transposed
    """
    scalar = active.values.dtype.type
    _add_gradients(
        *(active.starts, active.tokens, active.values, _equal_work(active)),
        *(W_dec_LD, d_x_hat_BD, centred_BD, scalar(penalty)),
        *(grad_W_enc_LD, grad_b_enc_L, grad_W_dec_LD),
    )


def sum_products(active: Active, W_dec_LD: Floats, d_x_hat_BD: Floats) -> Floats:
    """(L,): sum over the tokens on which a latent is active of <d_x_hat, its W_dec row>."""
    out = np.zeros(len(W_dec_LD), active.values.dtype)
    _sum_products(active.starts, active.tokens, _equal_work(active), W_dec_LD, d_x_hat_BD, out)
    return out


def _equal_work(active: Active) -> npt.NDArray[np.int64]:
    """(threads + 1,): first latent of each thread, so that all threads get about as many active entries."""
    shares = np.linspace(0, active.starts[-1], numba.get_num_threads() + 1)
    cuts = np.searchsorted(active.starts, shares).astype(np.int64)
    cuts[0], cuts[-1] = 0, len(active.starts) - 1
    return cuts


@numba.njit(parallel=True, cache=True)
def _count(p: Any, above: Any, counts: Any) -> None:
    for b in numba.prange(p.shape[0]):
        n = 0
        for latent in range(p.shape[1]):
            n += not p[b, latent] <= above
        counts[b] = n


@numba.njit(parallel=True, cache=True)
def _fill(p: Any, above: Any, starts: Any, latents: Any, values: Any) -> None:
    for b in numba.prange(p.shape[0]):
        at = starts[b]
        for first in range(0, p.shape[1], _CHUNK):
            stop = min(first + _CHUNK, p.shape[1])
            n = 0
            for latent in range(first, stop):
                n += not p[b, latent] <= above
            if n > 0:
                for latent in range(first, stop):
                    if not p[b, latent] <= above:
                        latents[at] = latent
                        values[at] = p[b, latent]
                        at += 1


# Bits of a bfloat16 number above 0, infinity and NaN included: 1 to 0x7fff, and 0xff81 and more for NaN with a sign,
# which is what an Intel processor makes of infinity - infinity.
@numba.njit(parallel=True, cache=True)
def _count_bits(bits: Any, counts: Any) -> None:
    for b in numba.prange(bits.shape[0]):
        n = 0
        for latent in range(bits.shape[1]):
            n += (0 < bits[b, latent] < 0x8000) | (bits[b, latent] > 0xFF80)
        counts[b] = n


@numba.njit(parallel=True, cache=True)
def _fill_bits(bits: Any, starts: Any, latents: Any, out: Any) -> None:
    for b in numba.prange(bits.shape[0]):
        at = starts[b]
        for first in range(0, bits.shape[1], _CHUNK):
            stop = min(first + _CHUNK, bits.shape[1])
            n = 0
            for latent in range(first, stop):
                n += (0 < bits[b, latent] < 0x8000) | (bits[b, latent] > 0xFF80)
            if n > 0:
                for latent in range(first, stop):
                    if (0 < bits[b, latent] < 0x8000) | (bits[b, latent] > 0xFF80):
                        latents[at] = latent
                        out[at] = np.uint32(bits[b, latent]) << np.uint32(16)  # float32 begins with these bits
                        at += 1


@numba.njit(cache=True)
def _by_latent(starts_B: Any, latents: Any, values: Any, n_latents: int) -> Any:
    """Stable counting sort by latent."""
    starts = np.zeros(n_latents + 1, np.int64)
    for k in range(len(latents)):
        starts[latents[k] + 1] += 1
    for latent in range(n_latents):
        starts[latent + 1] += starts[latent]
    at = starts[:-1].copy()
    tokens = np.empty(len(latents), np.int32)
    sorted_values = np.empty_like(values)
    for b in range(len(starts_B) - 1):
        for k in range(starts_B[b], starts_B[b + 1]):
            to = at[latents[k]]
            tokens[to] = b
            sorted_values[to] = values[k]
            at[latents[k]] = to + 1
    return starts, tokens, sorted_values


@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def _add_decoded(starts: Any, tokens: Any, values: Any, W_dec: Any, out: Any, n_parts: int) -> None:
    """Each thread computes some columns of the reconstruction: a decoder row is read once for all its tokens."""
    width = W_dec.shape[1]
    for part in numba.prange(n_parts):
        low, high = part * width // n_parts, (part + 1) * width // n_parts
        for latent in range(len(starts) - 1):
            row = W_dec[latent, low:high]
            for k in range(starts[latent], starts[latent + 1]):
                to = out[tokens[k], low:high]
                value = values[k]
                for d in range(high - low):
                    to[d] += value * row[d]


@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def _add_gradients(
    starts: Any,
    tokens: Any,
    values: Any,
    cuts: Any,
    W_dec: Any,
    d_x_hat: Any,
    centred: Any,
    penalty: Any,
    grad_W_enc: Any,
    grad_b_enc: Any,
    grad_W_dec: Any,
) -> None:
    width = W_dec.shape[1]
    for part in numba.prange(len(cuts) - 1):
        for latent in range(cuts[part], cuts[part + 1]):
            row, grad_dec, grad_enc = W_dec[latent], grad_W_dec[latent], grad_W_enc[latent]
            bias = values.dtype.type(0)
            for k in range(starts[latent], starts[latent + 1]):
                d_out, x, value = d_x_hat[tokens[k]], centred[tokens[k]], values[k]
                d_z = values.dtype.type(0)
                for d in range(width):
                    d_z += d_out[d] * row[d]
                d_z += penalty
                bias += d_z
                for d in range(width):
                    grad_dec[d] += value * d_out[d]
                for d in range(width):
                    grad_enc[d] += d_z * x[d]
            grad_b_enc[latent] += bias


@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def _sum_products(starts: Any, tokens: Any, cuts: Any, W_dec: Any, d_x_hat: Any, out: Any) -> None:
    for part in numba.prange(len(cuts) - 1):
        for latent in range(cuts[part], cuts[part + 1]):
            row = W_dec[latent]
            total = out.dtype.type(0)
            for k in range(starts[latent], starts[latent + 1]):
                d_out = d_x_hat[tokens[k]]
                for d in range(len(row)):
                    total += d_out[d] * row[d]
            out[latent] = total
