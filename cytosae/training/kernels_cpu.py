"""Kernels of a training step that work on active latents only, for the CPU (numba). Twin: tests/support/reference.py.

The active latents of a micro-batch come as sae/active_latents.py keeps them: by latent, of one latent by token. Every
sum runs in that order, so results do not depend on the number of threads.
Shapes: B tokens, D width, L latents, A active (token, latent) pairs.
"""

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cytosae.sae import Active, by_latent, equal_work

Floats = npt.NDArray[Any]  # float32, or float64 in tests
_CHUNK = 16  # latents that are tested together: most chunks have no active latent
_PARTS = 16  # of a matrix, each searched by one thread: more than threads, so that all have about as much to do
_MIN_COLUMNS = 64  # columns of the reconstruction per thread, at least


def find_active(matrix_BL: Floats, above: float = 0.0, most: float = math.inf) -> tuple[int, Active | None]:
    """(number of entries above `above`, these entries by latent; None in their place if they are more than `most`).

    NaN counts as active, so that it reaches the loss. The matrix is read once: it is far larger than any cache.

    Parameters
    ----------
    matrix_BL : pre-activations; or, as uint16, the bits of bfloat16 numbers, a type that numpy does not know: then
        `above` must be 0, and the values become float32, exactly

    Memory: about 30 bytes per active entry, at most 8 bytes per entry of the matrix and 16 per active one.
    """
    n_tokens, n_latents = matrix_BL.shape
    n_parts = max(1, min(_PARTS, n_tokens))
    is_bits = matrix_BL.dtype == np.uint16
    some = matrix_BL[:: max(1, n_tokens // _PARTS)]  # a guess of the room that is needed
    counts_of_some = ((some.view(np.int16) > 0) if is_bits else ~(some <= above)).sum(1)
    room = 3 * int(counts_of_some.max(initial=0)) * -(-n_tokens // n_parts) // 2 + _CHUNK
    if n_parts * room > 3 * most:
        room = _CHUNK  # these are too many: they will only be counted
    starts, counts = np.empty(n_tokens, np.int64), np.empty(n_tokens, np.int64)
    while True:
        latents = np.empty(n_parts * room, np.int32)
        values = np.empty(n_parts * room, np.uint32 if is_bits else matrix_BL.dtype)
        if is_bits:
            _find_in_bits(matrix_BL, room, starts, counts, latents, values)
        else:
            _find(matrix_BL, matrix_BL.dtype.type(above), room, starts, counts, latents, values)
        n_active = int(counts.sum())
        if n_active > most:
            return n_active, None
        if (starts >= 0).all():
            found = values.view(np.float32) if is_bits else values
            return n_active, Active(n_tokens, *by_latent(starts, counts, latents, found, n_latents))
        first = np.arange(n_parts) * n_tokens // n_parts
        room = int(np.add.reduceat(counts, first).max()) + _CHUNK


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
        *(active.starts, active.tokens, active.values, equal_work(active)),
        *(W_dec_LD, d_x_hat_BD, centred_BD, scalar(penalty)),
        *(grad_W_enc_LD, grad_b_enc_L, grad_W_dec_LD),
    )


def sum_products(active: Active, W_dec_LD: Floats, d_x_hat_BD: Floats) -> Floats:
    """(L,): sum over the tokens on which a latent is active of <d_x_hat, its W_dec row>."""
    out = np.zeros(len(W_dec_LD), active.values.dtype)
    _sum_products(active.starts, active.tokens, equal_work(active), W_dec_LD, d_x_hat_BD, out)
    return out


# Both: the active entries of token b come to starts[b] and behind, counts[b] many; tokens are cut into parts of `room`
# places each. Where these did not suffice, starts[b] is -1, and counts[b] is right all the same.
# A chunk with an active entry is copied without branches: an entry that is not active is overwritten by the next.
@numba.njit(parallel=True, cache=True)
def _find(p: Any, above: Any, room: int, starts: Any, counts: Any, latents: Any, values: Any) -> None:
    n_parts, n_chunked = len(latents) // room, p.shape[1] - p.shape[1] % _CHUNK
    for part in numba.prange(n_parts):
        at, end = part * room, (part + 1) * room
        for b in range(part * p.shape[0] // n_parts, (part + 1) * p.shape[0] // n_parts):
            starts[b], n_lost = at, 0
            for first in range(0, n_chunked, _CHUNK):
                is_any = False
                for j in range(_CHUNK):  # a constant number, so that the compiler tests all at once
                    is_any |= not p[b, first + j] <= above
                if is_any and at + _CHUNK <= end:
                    for j in range(_CHUNK):
                        latents[at] = first + j
                        values[at] = p[b, first + j]
                        at += not p[b, first + j] <= above
                elif is_any:
                    for j in range(_CHUNK):
                        n_lost += not p[b, first + j] <= above
            for latent in range(n_chunked, p.shape[1]):
                if not p[b, latent] <= above:
                    if at < end:
                        latents[at] = latent
                        values[at] = p[b, latent]
                        at += 1
                    else:
                        n_lost += 1
            counts[b] = at - starts[b] + n_lost
            if n_lost > 0:
                starts[b] = -1


# Bits of a bfloat16 number above 0, infinity and NaN included: 1 to 0x7fff, and 0xff81 and more for NaN with a sign,
# which is what an Intel processor makes of infinity - infinity. float32 begins with these bits.
@numba.njit(parallel=True, cache=True)
def _find_in_bits(bits: Any, room: int, starts: Any, counts: Any, latents: Any, values: Any) -> None:
    n_parts, n_chunked = len(latents) // room, bits.shape[1] - bits.shape[1] % _CHUNK
    for part in numba.prange(n_parts):
        at, end = part * room, (part + 1) * room
        for b in range(part * bits.shape[0] // n_parts, (part + 1) * bits.shape[0] // n_parts):
            starts[b], n_lost = at, 0
            for first in range(0, n_chunked, _CHUNK):
                is_any = False
                for j in range(_CHUNK):
                    is_any |= (0 < bits[b, first + j] < 0x8000) | (bits[b, first + j] > 0xFF80)
                if is_any and at + _CHUNK <= end:
                    for j in range(_CHUNK):
                        latents[at] = first + j
                        values[at] = np.uint32(bits[b, first + j]) << np.uint32(16)
                        at += (0 < bits[b, first + j] < 0x8000) | (bits[b, first + j] > 0xFF80)
                elif is_any:
                    for j in range(_CHUNK):
                        n_lost += (0 < bits[b, first + j] < 0x8000) | (bits[b, first + j] > 0xFF80)
            for latent in range(n_chunked, bits.shape[1]):
                if (0 < bits[b, latent] < 0x8000) | (bits[b, latent] > 0xFF80):
                    if at < end:
                        latents[at] = latent
                        values[at] = np.uint32(bits[b, latent]) << np.uint32(16)
                        at += 1
                    else:
                        n_lost += 1
            counts[b] = at - starts[b] + n_lost
            if n_lost > 0:
                starts[b] = -1


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
