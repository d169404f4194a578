"""Sparse rows of dense latents on a GPU: what is active is found and rounded there, and only that comes to the host.

Three steps, so that the GPU never waits for the host: `count` enqueues how many latents each token keeps; `select`
waits for these numbers, then enqueues the gathering of just so many; `rows` waits for the copy, in the thread that
writes. A caller that counts one micro-batch before it selects the one before keeps the GPU busy. Copies run on a stream
of their own, through pinned buffers that are reused.

The twin on the CPU is sparsify.py. Shapes: B tokens, L latents.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stores.errors import BadInput, DamagedStore

from .sparse_rows import INFINITY, NOT_FINITE, Rounding, SparseRows

TOKEN_NOT_FINITE = "a token of a readable image is NaN or infinite. cyto cache verify names it"
_ALIGNMENT = 64  # bytes, of what lies in one pinned buffer
_BFLOAT16_STEP = 1 << 16  # in the bits of a float32
Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class SelectedRows:
    """Rows that are on their way to the host."""

    nnz: int
    n_rows: int
    rows: Callable[[], SparseRows]  # waits for them; to be called once, from any thread


class DeviceCompactor:
    """Makes sparse rows of micro-batches on one GPU (or, for tests, of tensors on the CPU).

    Memory of the device: a byte per dense latent until `select` (two if small values are dropped), then 14 bytes per
    nonzero. Of the host: the pinned buffers of the micro-batches that are on their way, 6 to 8 bytes per nonzero.
    """

    def __init__(self, rounding: Rounding, device: torch.device) -> None:
        self._rounding, self._copies = rounding, HostCopies(device)

    def count(self, p_BL: torch.Tensor, tokens: torch.Tensor | None = None) -> Callable[[], SelectedRows]:
        """Begin with float32 or bfloat16 `p_BL` (B, L); nothing is waited for. The returned function is `select`.

        tokens : the tokens that `p_BL` was made of, to be checked, too

        Raises (when `select` is called)
        ------
        DamagedStore
            If a value of `tokens` is NaN or infinite.
        BadInput
            If a latent is NaN, or one above 0 is infinite, also after rounding.
        """
        is_kept, numbers = count_kept(p_BL, self._rounding, tokens)
        arrive = self._copies.begin(numbers)

        def select() -> SelectedRows:
            (found,) = arrive()
            return self._select(p_BL, is_kept, found)

        return select

    @torch.inference_mode()
    def _select(self, p_BL: torch.Tensor, is_kept: torch.Tensor, found: npt.NDArray[np.int32]) -> SelectedRows:
        n_rows = len(p_BL)
        lengths, (n_active, top, is_finite) = found[:n_rows].astype(np.int64), found[n_rows:].view(np.int64).tolist()
        if not is_finite:
            raise DamagedStore(TOKEN_NOT_FINITE)
        # NaN, of either sign, lies above infinity; it is not above 0, so it would look like an inactive latent
        if top & 0x7FFFFFFF > INFINITY or (top > 0 and self._rounding.rounded(top) >= INFINITY):
            raise BadInput(NOT_FINITE)
        nnz = int(lengths.sum())
        arrive = self._copies.begin(*select_kept(p_BL, is_kept, nnz, self._rounding))

        def rows() -> SparseRows:
            columns, bits = arrive()
            # the same bits: unsigned 16 or 32
            indices = columns.view(np.uint16 if columns.dtype == np.int16 else np.uint32)
            return SparseRows(indices, bits.view(np.float32), lengths, n_active - nnz)

        return SelectedRows(nnz, n_rows, rows)


def count_kept(
    p_BL: torch.Tensor, rounding: Rounding, tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of `p_BL` (B, L) bool; and in one int32 tensor (B + 6,), to be copied at once, the numbers.

    These are the entries kept of each row, then as int64: the values above 0, the bits of the largest value as a
    float32 (NaN if there is one), and 1 if `tokens` are finite, else 0.
    """
    is_active = p_BL > 0
    first = rounding.first_kept
    is_kept = is_active
    if first > 1:
        # a number of a smaller type is compared with a number that this type has
        bits = first if p_BL.dtype == torch.float32 else -(-first // _BFLOAT16_STEP) * _BFLOAT16_STEP
        is_kept = p_BL >= float(np.uint32(bits).view(np.float32))
    kept = is_kept.sum(1, dtype=torch.int32)
    active = (kept if is_kept is is_active else is_active.sum(1, dtype=torch.int32)).sum(dtype=torch.int64)
    top = p_BL.amax().float().view(torch.int32).to(torch.int64)
    is_finite = torch.ones_like(top) if tokens is None else torch.isfinite(tokens).all().to(torch.int64)
    return is_kept, torch.cat([kept, torch.stack([active, top, is_finite]).view(torch.int32)])


def select_kept(
    p_BL: torch.Tensor, is_kept: torch.Tensor, nnz: int, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (nnz,) int16 or int32, whose bits are unsigned; and the bits of the rounded values (nnz,) int32."""
    n_latents = p_BL.shape[1]
    where = _positions(is_kept.reshape(-1), nnz)
    bits = p_BL.reshape(-1).index_select(0, where).float().view(torch.int32)
    if rounding.drop:
        half, tie = (1 << rounding.drop - 1) - 1, bits.bitwise_right_shift(rounding.drop).bitwise_and(1)
        bits = (bits + half + tie).bitwise_and(~((1 << rounding.drop) - 1)).clamp_min(rounding.least)
    columns = where.remainder(n_latents)
    return columns.to(torch.int16 if n_latents <= 1 << 16 else torch.int32), bits


def _positions(is_kept: torch.Tensor, n: int) -> torch.Tensor:
    """(n,) int64, ascending: where a flat mask with `n` true entries is true."""
    try:
        return torch.nonzero_static(is_kept, size=n).squeeze(1)
    except NotImplementedError:  # on a GPU before torch 2.7: this one waits for the GPU to count them again
        return is_kept.nonzero().squeeze(1)


class HostCopies:
    """Copies from one device to the host, on a stream of their own; pinned buffers are reused. For several threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)
        self._lock, self._free = threading.Lock(), list[torch.Tensor]()

    def begin(self, *tensors: torch.Tensor) -> Callable[[], Arrays]:
        """Copy tensors when the current stream has made them.

        The returned function waits for the copies and gives arrays of their own; it is to be called once.
        """
        if self._stream is None:
            return lambda: [tensor.numpy() for tensor in tensors]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
        buffer = self._take(starts[-1])
        computed, copied = torch.cuda.Event(), torch.cuda.Event(blocking=True)  # a thread that waits uses no core
        computed.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(computed)
        here = [
            buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
            for start, size, tensor in zip(starts, sizes, tensors, strict=False)
        ]
        with torch.cuda.stream(self._stream):
            for target, source in zip(here, tensors, strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)  # its memory is reused only after the copy
            copied.record(self._stream)

        def arrive() -> Arrays:
            copied.synchronize()
            arrays = [target.numpy().copy() for target in here]
            with self._lock:
                self._free.append(buffer)
            return arrays

        return arrive

    def _take(self, n_bytes: int) -> torch.Tensor:
        """The smallest free buffer of at least so many bytes; else a new one, with room for larger ones to come."""
        with self._lock:
            fitting = [number for number, each in enumerate(self._free) if len(each) >= n_bytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))
            if self._free:  # too small for what comes now
                self._free.pop(max(range(len(self._free)), key=lambda number: len(self._free[number])))
        with torch.inference_mode(False):  # else it could be written to in that mode only
            return torch.empty(n_bytes + n_bytes // 4 + _ALIGNMENT, dtype=torch.uint8, pin_memory=True)
