"""What a zip or tar archive holds, and what of it is refused. Archives are untrusted: nothing of them is ever written.

An archive is listed once, into a `Listing`: names cleaned, links, devices and ambiguous names refused with a reason.
A `Member` says where the bytes of one file lie, so that another process can read it without listing the archive again.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

MAX_MEMBERS = 1_000_000  # of an archive; a listing takes about 300 bytes for each
MAX_NAMES_BYTES = 256 << 20  # of all names of an archive together
MAX_NAME_BYTES = 4_096  # of one name: the longest path of Linux
MAX_RATIO = 200  # unpacked to packed; JPEG and PNG hardly shrink, an uncompressed image of one colour does
FREE_BYTES = 16 << 20  # up to this size, any ratio is allowed

_UNPACKED_PER_SECOND = 20e6  # bytes, on a slow machine whose cores are all busy
TWICE = "a name that the archive holds twice"
LINK = "a link"


class BadArchive(ValueError):
    """An archive, or a member of it, cannot be read; the text says why, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of a file inside an archive lie.

    `kind`: zip, tar or gzip (a tar that is compressed as a whole; `offset` counts unpacked bytes there).
    """

    archive: str
    stamp: tuple[int, int, int]  # of the archive file: see `stamp_of`
    kind: str
    offset: int  # zip: of the local header; else of the first byte
    size: int  # in bytes, unpacked
    packed: int = 0  # zip: bytes in the archive
    crc: int = 0  # zip
    is_deflated: bool = False  # zip

    @property
    def seconds_to_reach(self) -> float:
        """How long it may take at most to come to its bytes, which in a compressed tar means to unpack all before."""
        return self.offset / _UNPACKED_PER_SECOND if self.kind == "gzip" else 0.0


@dataclass(frozen=True)
class Listing:
    """The regular files of an archive by their cleaned names (`a/b.tif`), and what is refused, with the reason."""

    members: dict[str, Member]
    refused: dict[str, str] = field(default_factory=dict)  # name -> why


class NamesSoFar:
    """Collects the members of an archive while it is listed; bounded, and without double names."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._refused: dict[str, str] = {}
        self._n_bytes = self._n_seen = 0

    def add(self, raw: str | bytes, member: Member | str) -> str:
        """Note a member, or the reason why it is refused; returns its name. Raises BadArchive if there are too many."""
        self._n_seen += 1
        self._n_bytes += len(raw)
        if self._n_seen > MAX_MEMBERS or self._n_bytes > MAX_NAMES_BYTES:
            raise BadArchive(f"lists more than {MAX_MEMBERS:,} files, or names of more than {MAX_NAMES_BYTES:,} bytes")
        shown = raw if isinstance(raw, str) else raw.decode(errors="replace")
        try:
            name = clean_name(raw)
        except BadArchive as error:
            self._refused[shown[:MAX_NAME_BYTES]] = str(error)
            return shown
        if name in self._members or name in self._refused:
            self._members.pop(name, None)
            self._refused[name] = TWICE
        elif isinstance(member, str):
            self._refused[name] = member
        else:
            self._members[name] = member
        return name

    def refuse(self, name: str, reason: str) -> None:
        """Refuse a member after it was noted."""
        if self._members.pop(name, None) is not None:
            self._refused[name] = reason

    def listing(self) -> Listing:
        """All that was noted."""
        return Listing(self._members, self._refused)


def clean_name(raw: str | bytes) -> str:
    """A member's name as a relative path with `/`: `./a//b.tif` is `a/b.tif`.

    Raises
    ------
    BadArchive
        If it is no name in UTF-8, or leads out of the archive on some system.
    """
    if len(raw) > MAX_NAME_BYTES:
        raise BadArchive("a name that is too long")
    try:
        name = raw if isinstance(raw, str) else raw.decode()
        name.encode()
    except UnicodeError:
        raise BadArchive("a name that is not UTF-8") from None
    if "\0" in name:
        raise BadArchive("a name with a zero byte")
    as_windows = name.replace("\\", "/")
    pieces = as_windows.split("/")
    if pieces[0] == "" or any(piece == ".." or piece[1:2] == ":" for piece in pieces):
        raise BadArchive("a name that leads out of the archive")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts:
        raise BadArchive("no name")
    return "/".join(parts)


def check_size(unpacked: int, packed: int, most: int) -> None:
    """Raise BadArchive for a member that would unpack to more than `most` bytes, or to far more than is packed."""
    if unpacked > most:
        raise BadArchive(f"{unpacked:,} bytes, more than the {most:,} that are allowed")
    if unpacked > FREE_BYTES and unpacked > MAX_RATIO * max(1, packed):
        raise BadArchive(
            f"it would unpack to {unpacked:,} bytes from {packed:,}, more than {MAX_RATIO} times as much: a bomb"
        )


def stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    """What changes when another file takes the place of an archive: time, size, inode."""
    return found.st_mtime_ns, found.st_size, found.st_ino


class Bytes(Protocol):
    """A file, or the unpacked content of one, that is read at any place."""

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` from `offset`; fewer only at the end."""


class OpenFile:
    """A file that several threads read at any place. It is closed with its last reference."""

    def __init__(self, path: Path | str) -> None:
        self._descriptor = -1
        # NONBLOCK: a pipe, put in the file's place, would block
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(self._descriptor)
        self.stamp, self.size = stamp_of(found), found.st_size

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` from `offset`; fewer only at the end of the file."""
        if offset >= self.size:  # a header may state any number, also one that no file can have
            return b""
        piece = os.pread(self._descriptor, n_bytes, offset)
        if len(piece) == n_bytes or not piece:
            return piece
        pieces = [piece]
        n_read = len(piece)
        while n_read < n_bytes and (piece := os.pread(self._descriptor, n_bytes - n_read, offset + n_read)):
            pieces.append(piece)
            n_read += len(piece)
        return b"".join(pieces)
