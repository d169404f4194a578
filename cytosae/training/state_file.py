"""A safetensors file written in pieces from wherever the tensors lie, so that no tensor is held a second time.

`safetensors.save_file` wants all tensors whole, contiguous and on the host: for the state of an SAE of 49,152 latents
on a GPU that is 0.9 GB of host memory, and on a CPU another copy of all that is stored by latent. Here a few MiB are on
their way at a time. The checksum of all values stands in the header, in the place that was kept for it.
Twin: `safetensors.torch.save_file` (tests/cytosae/training/test_saving.py).
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from stores.checksum import crc32c
from stores.files import PARTIAL_SUFFIX, sync_folder

_PIECE = 4 << 20  # bytes on their way at a time
_NO_CRC = "0" * 8
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}
Bytes = npt.NDArray[np.uint8]
Fetch = Callable[[torch.Tensor], torch.Tensor]


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any], ready: Any = None) -> None:
    """Write tensors and facts (JSON, under `cyto` in the metadata, with `crc32c`) atomically and durably.

    crc32c : CRC32C (hex) over the values of all tensors, sorted by name
    ready : the torch.cuda.Event behind which tensors on a GPU may be read; None: they may be read now

    Raises
    ------
    OSError
        If it cannot be written, for instance because the disk is full.
    """
    header, starts = _header(tensors, {**facts, "crc32c": _NO_CRC})
    fetches: dict[torch.device, Fetch] = {}
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            file.write(header)
            crc = 0
            for name in sorted(tensors):
                value = tensors[name].detach()
                if value.device not in fetches:
                    fetches[value.device] = _FromGpu(value.device, ready) if value.is_cuda else torch.Tensor.contiguous
                file.seek(len(header) + starts[name])
                crc = _write_values(file, value, fetches[value.device], crc)
            whole, _ = _header(tensors, {**facts, "crc32c": f"{crc:08x}"})
            assert len(whole) == len(header)
            file.seek(0)
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def n_bytes_of(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of all values."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def crc_of(tensors: dict[str, torch.Tensor]) -> str:
    """CRC32C (hex) over all values, by name."""
    crc = 0
    for name in sorted(tensors):
        crc = crc32c(tensors[name].numpy(), crc)
    return f"{crc:08x}"


def _header(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> tuple[bytes, dict[str, int]]:
    """(the first bytes of the file, where the values of each tensor begin behind them).

    As in safetensors, the largest types come first, so that all values are aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"cyto": json.dumps(facts)}}
    starts, end = dict[str, int](), 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        value = tensors[name]
        starts[name], end = end, end + value.numel() * value.element_size()
        entries[name] = {
            "dtype": _TYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _write_values(file: BinaryIO, value: torch.Tensor, fetch: Fetch, crc: int) -> int:
    """Write the values row by row of the first axis, and return the checksum with them."""
    for piece in _pieces(value, fetch):
        crc = crc32c(piece, crc)
        file.write(piece.data)
    return crc


def _pieces(value: torch.Tensor, fetch: Fetch) -> Iterator[Bytes]:
    """The bytes of a tensor, a few rows at a time; the next piece may overwrite the one before."""
    rows = value if value.dim() else value[None]
    if not rows.numel():
        return
    n_together = max(1, _PIECE // (rows[0].numel() * rows.element_size()))
    for first in range(0, len(rows), n_together):
        yield fetch(rows[first : first + n_together]).view(-1).view(torch.uint8).numpy()


class _FromGpu:
    """Copies to the host through one pinned buffer, on a stream of its own, so that training goes on meanwhile."""

    def __init__(self, device: torch.device, ready: Any) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_event(ready or torch.cuda.current_stream(device).record_event())
        self._arrived = torch.cuda.Event()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        n_bytes = rows.numel() * rows.element_size()
        with torch.cuda.stream(self._stream):  # also makes its GPU the thread's current one
            if len(self._buffer) < n_bytes:
                self._buffer = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
            here = self._buffer[:n_bytes].view(rows.dtype)
            here.copy_(rows.contiguous().view(-1), non_blocking=True)
            self._arrived.record(self._stream)
        self._arrived.synchronize()  # the interpreter is free meanwhile
        return here
