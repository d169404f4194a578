"""Make sparse rows from dense pre-activations, on the device where they are, without a dense copy or mask.

One pass finds the values above 0, rounds them to the mantissa bits that are kept, drops those below a threshold, and
detects NaN and infinity. Positive floats are ordered as their bits are, so all of this is arithmetic on int32.
Shapes: B tokens, L latents.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import Active
from stores.errors import BadInput

from .device_rows import DeviceCompactor
from .sparse_rows import INFINITY, NOT_FINITE, Rounding, SparseRows

_CHUNK = 64  # latents that are tested together: most chunks have no active latent
_MIN_ENTRIES = 1 << 18  # size of a thread's scratch arrays, at least


class Compactor:
    """Makes sparse rows of micro-batches. Memory per thread: 1.5 MiB, or 6 bytes per latent if that is more."""

    def __init__(self, n_latents: int, rounding: Rounding) -> None:
        self.rounding = rounding
        self._indices = _index_type(n_latents)
        self._n_entries = max(n_latents, _MIN_ENTRIES)
        self._n_threads = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self._n_threads, thread_name_prefix="compact")
        self._scratch: list[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]] = []

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    def rows(self, p_BL: torch.Tensor) -> list[SparseRows]:
        """The values above 0 of float32 `p_BL` (B, L), in row order, in one or more pieces.

        Raises
        ------
        BadInput
            If a value is NaN, or a value above 0 is infinite, also after rounding.
        """
        if not len(p_BL):
            return [SparseRows(np.empty(0, self._indices), np.empty(0, np.float32), np.empty(0, np.int64), 0)]
        if p_BL.device.type != "cpu":
            return [_on_device(p_BL, self.rounding)]
        bits = p_BL.contiguous().numpy().view(np.int32)
        cuts = np.linspace(0, len(bits), self._n_threads + 1).astype(int)
        while len(self._scratch) < self._n_threads:
            self._scratch.append((np.empty(self._n_entries, self._indices), np.empty(self._n_entries, np.int32)))
        parts = self._threads.map(
            lambda part: list(
                _rows_between(bits, int(cuts[part]), int(cuts[part + 1]), self.rounding, *self._scratch[part])
            ),
            range(self._n_threads),
        )
        return [rows for part in parts for rows in part]


def rows_of_active(active: Active, rounding: Rounding) -> SparseRows:
    """The rows of active latents that were found without dense ones: as `Compactor.rows` makes them.

    Raises
    ------
    BadInput
        If a value is infinite after rounding.
    """
    starts, latents, values = active.by_token()
    values = round_mantissa(values.astype(np.float32, copy=False), rounding.value_bits)
    if not np.isfinite(values).all():
        raise BadInput(NOT_FINITE)
    indices, lengths, n_dropped = latents.astype(_index_type(len(active.starts) - 1)), np.diff(starts), 0
    is_kept = values >= np.float32(rounding.min_activation)
    if not is_kept.all():
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
        n_dropped = int(len(values) - before[-1])
        indices, values, lengths = indices[is_kept], values[is_kept], np.diff(before[starts])
    return SparseRows(indices, values, lengths, n_dropped)


def _index_type(n_latents: int) -> Any:
    return np.uint16 if n_latents <= 1 << 16 else np.uint32


def round_mantissa(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Positive float32 values, of any shape, rounded to `bits` mantissa bits (1 to 23), ties to even.

    A value that would round to 0 becomes the smallest rounded value above 0. The same rounding as `Compactor`'s, for
    arrays in the host's memory. Relative error at most 2^-(bits + 1).
    """
    drop = 23 - bits
    if drop == 0:
        return values
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half, least = np.uint32((1 << (drop - 1)) - 1), np.uint32(1 << drop)
    rounded = (raw + half + ((raw >> np.uint32(drop)) & np.uint32(1))) & ~np.uint32((1 << drop) - 1)
    return np.maximum(rounded, least).view(np.float32)


def _rows_between(
    bits: npt.NDArray[np.int32],
    first: int,
    stop: int,
    rounding: Rounding,
    indices: npt.NDArray[Any],
    values: npt.NDArray[np.int32],
) -> Iterator[SparseRows]:
    """Rows first..stop, in several pieces if they do not fit into the scratch arrays."""
    drop, at = rounding.drop, first
    while at < stop:
        lengths = np.empty(stop - at, np.int64)
        end, n, n_dropped = _compact(
            *(
                bits,
                at,
                stop,
                drop,
                (1 << drop >> 1) - 1 if drop else 0,
                int(drop > 0),
                rounding.least,
                rounding.smallest,
            ),
            *(indices, values, lengths),
        )
        if end < 0:
            raise BadInput(NOT_FINITE)
        yield SparseRows(indices[:n].copy(), values[:n].view(np.float32).copy(), lengths[: end - at], n_dropped)
        at = end


@numba.njit(nogil=True, cache=True)
def _compact(
    bits: Any,
    first: int,
    stop: int,
    drop: int,
    half: int,
    tie: int,
    least: int,
    smallest: int,
    indices: Any,
    values: Any,
    lengths: Any,
) -> Any:
    """(first row that did not fit, or -1 if a value is not finite; entries written; values dropped)."""
    n_latents, n, n_dropped = bits.shape[1], 0, 0
    n_chunks = n_latents // _CHUNK
    for b in range(first, stop):
        if n + n_latents > len(indices):
            return b, n, n_dropped
        row, before = bits[b], n
        chunks = row[: n_chunks * _CHUNK].reshape(n_chunks, _CHUNK)
        for chunk in range(n_chunks):
            top, largest = np.int32(0), np.int32(0)
            for k in range(_CHUNK):  # int32 throughout and of fixed length: a few vector instructions (docs/log.md)
                bit = chunks[chunk, k]
                top, largest = max(top, bit), max(largest, np.int32(bit & 0x7FFFFFFF))
            if top > 0 or largest > INFINITY:
                start = chunk * _CHUNK
                n, more = _take(row, start, start + _CHUNK, drop, half, tie, least, smallest, indices, values, n)
                n_dropped += more
                if n < 0:
                    return -1, 0, 0
        n, more = _take(row, n_chunks * _CHUNK, n_latents, drop, half, tie, least, smallest, indices, values, n)
        n_dropped += more
        if n < 0:
            return -1, 0, 0
        lengths[b - first] = n - before
    return stop, n, n_dropped


@numba.njit(nogil=True, cache=True)
def _take(
    row: Any,
    start: int,
    stop: int,
    drop: int,
    half: int,
    tie: int,
    least: int,
    smallest: int,
    indices: Any,
    values: Any,
    n: int,
) -> Any:
    """(entries written so far, or -1: not finite; values dropped), after the latents start..stop of a row."""
    n_dropped, keep = 0, ~((1 << drop) - 1)
    for k in range(start, stop):
        bit = row[k]
        if bit > 0:
            rounded = max((bit + half + (bit >> drop & tie)) & keep, least)
            if rounded >= INFINITY:
                return -1, 0
            if rounded < smallest:
                n_dropped += 1
            else:
                indices[n] = k
                values[n] = rounded
                n += 1
        elif bit & 0x7FFFFFFF > INFINITY:
            return -1, 0
    return n, n_dropped


def _on_device(p_BL: torch.Tensor, rounding: Rounding) -> SparseRows:
    """The same on a GPU; only indices, values and row lengths go to the host."""
    return DeviceCompactor(rounding, p_BL.device).count(p_BL)().rows()
