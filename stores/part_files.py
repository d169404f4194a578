"""Part files: named arrays that one task writes for a later one, with a CRC and the tag of their job.

A part is one file: a line of JSON (tag, names, types, shapes), the bytes of the arrays, 4 bytes of CRC32C. It is
renamed into place, but not synced: a part that was truncated by a power failure is found by its CRC and made again,
which costs less than waiting for the disk. Parts are read through memory maps, so a slice reads only its own pages.
"""

import json
import math
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from .checksum import CRC_BYTES
from .errors import DamagedStore
from .files import PARTIAL_SUFFIX, canonical_json, named

_ALIGNMENT = 64  # bytes; of the first array
_KINDS = "iuf"  # integers and floats; no objects


Arrays = dict[str, npt.NDArray[Any]]
Keep = Callable[[str, Callable[[], Arrays]], Arrays]  # (name, what computes them) -> the arrays, kept or computed now


def computed(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """A `Keep` that keeps nothing."""
    return compute()


@dataclass(frozen=True)
class KeptParts:
    """The part files of a job that may be interrupted, in a folder of their own until it has ended."""

    folder: Path
    tag: str  # of the job: parts of another one are not read

    def __call__(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of an earlier try; else they are computed and kept."""
        found = self.read(name)
        if found is None:
            found = compute()
            self.write(name, found)
        return found

    def read(self, name: str) -> Arrays | None:
        """The arrays that were kept under this name, whole and of this job; None if there are none."""
        try:
            part = open_part(self.folder / f"{name}.part", self.tag, verify=True)
        except DamagedStore:
            return None
        return {key: np.array(values) for key, values in part.arrays.items()}

    def write(self, name: str, arrays: Arrays) -> None:
        """Keep the arrays, in the place of those of before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_part(self.folder / f"{name}.part", self.tag, arrays)

    def remove(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class KeptState:
    """Where a loop has come to: kept every few seconds, so that an interrupted one goes on from there."""

    parts: KeptParts | None = None  # None: nothing is kept
    name: str = "state"
    seconds: float = 10.0
    _last: float = field(default_factory=time.monotonic)

    def read(self) -> Arrays | None:
        """The state of an earlier try."""
        return self.parts.read(self.name) if self.parts is not None else None

    @property
    def is_due(self) -> bool:
        """The last one is old enough."""
        return self.parts is not None and time.monotonic() - self._last >= self.seconds

    def write(self, state: Arrays) -> None:
        """Keep this state in the place of the one before."""
        if self.parts is not None:
            self.parts.write(self.name, state)
        self._last = time.monotonic()


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
        with named(path), partial.open("xb") as file:
            for piece in pieces:
                checksum = google_crc32c.extend(checksum, piece)
                file.write(piece)
            file.write(checksum.to_bytes(CRC_BYTES, "little"))
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
        if at + CRC_BYTES != len(raw) or stated["tag"] != tag:
            raise ValueError("torn, or of another job")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStore(f"{path} is missing or damaged ({error}); run the same command again") from None
    if verify and google_crc32c.value(raw[:-CRC_BYTES]) != int.from_bytes(bytes(raw[-CRC_BYTES:]), "little"):
        raise DamagedStore(f"{path} is damaged: its checksum does not fit; run the same command again")
    return Part(stated["tag"], arrays)
