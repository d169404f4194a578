"""Part files: named arrays that one task writes for a later one, with a CRC and the tag of their job.

A part is one file: a line of JSON (tag, names, types, shapes), the bytes of the arrays, 4 bytes of CRC32C. It is
renamed into place, but not synced: a part that was truncated by a power failure is found by its CRC and made again,
which costs less than waiting for the disk. Parts are read through memory maps, so a slice reads only its own pages.
"""

import json
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from .errors import DamagedStore
from .files import PARTIAL_SUFFIX, canonical_json

_ALIGNMENT = 64  # bytes; of the first array
_CRC_BYTES = 4
_KINDS = "iuf"  # integers and floats; no objects


@dataclass(frozen=True)
class Part:
    """The arrays of one part, as copy-on-write memory maps: writing to them does not change the file."""

    tag: str
    arrays: dict[str, npt.NDArray[Any]]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]


def write_part(path: Path, tag: str, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write the arrays to `path`, atomically; several processes may write the same part at once."""
    layout = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    head = canonical_json({"tag": tag, "arrays": layout}) + b"\n"
    pieces: list[Any] = [head + b"\0" * (-len(head) % _ALIGNMENT)]
    for array in arrays.values():
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        pieces += [raw, b"\0" * (-len(raw) % _ALIGNMENT)]
    checksum = 0
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            for piece in pieces:
                checksum = google_crc32c.extend(checksum, piece)
                file.write(piece)
            file.write(checksum.to_bytes(_CRC_BYTES, "little"))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def open_part(path: Path, tag: str, *, verify: bool = False) -> Part:
    """Map a part; `verify` reads all of it and compares the CRC.

    Raises
    ------
    DamagedStore
        If it is missing, truncated, or belongs to another job (`tag`).
    """
    try:
        # "c": copy-on-write, since compiled code expects a writable array
        raw = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        head = bytes(raw[: 1 << 16])
        head = head[: head.index(b"\n") + 1]
        stated = json.loads(head)
        at = len(head) + -len(head) % _ALIGNMENT
        arrays = {}
        for name, dtype, shape in stated["arrays"]:
            kind, size = np.dtype(dtype), math.prod(shape)
            if kind.kind not in _KINDS or min(shape, default=0) < 0:
                raise ValueError("an array that no part holds")
            arrays[name] = raw[at : at + size * kind.itemsize].view(kind).reshape(shape)
            at += size * kind.itemsize + -size * kind.itemsize % _ALIGNMENT
        if at + _CRC_BYTES != len(raw) or stated["tag"] != tag:
            raise ValueError("torn, or of another job")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStore(f"{path} is missing or damaged ({error}); run the same command again") from None
    if verify and google_crc32c.value(raw[:-_CRC_BYTES]) != int.from_bytes(bytes(raw[-_CRC_BYTES:]), "little"):
        raise DamagedStore(f"{path} is damaged: its checksum does not fit; run the same command again")
    return Part(stated["tag"], arrays)
