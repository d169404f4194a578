"""Lists and reads a .tar, also one that is compressed as a whole (.tar.gz).

Python's `tarfile` is not used: it reads extended headers whole, whatever size they state, and a small .tar.gz can hold
one of gigabytes. Format: POSIX.1-2017, pax, section EXTENDED DESCRIPTION, and GNU's long names and large sizes.
"""

import threading
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from .archive_member import (
    FREE_BYTES,
    LINK,
    MAX_RATIO,
    BadArchive,
    Bytes,
    Listing,
    Member,
    NamesSoFar,
    OpenFile,
    check_size,
)

_BLOCK = 512
_MAX_HEADER_BYTES = 1 << 20  # of a pax header or a long name
_PIECE = 1 << 18  # packed bytes that are unpacked at once
_STEP = 1 << 20  # unpacked bytes at once, while passing over them
_MOST_POINTS = 512  # states of the unpacker that are kept, about 45 KB each
_LEAST_APART = 1 << 20  # packed bytes between two of them
_REGULAR, _FOLDER, _LINKS = (b"0", b"\0", b"7"), b"5", (b"1", b"2")
_SPECIAL = (b"3", b"4", b"6")
_WITHOUT_BYTES = (*_LINKS, *_SPECIAL, _FOLDER)
_CUT = "it is cut off: a member ends after the end of the archive; get it again"


def list_tar(path: str) -> Listing:
    """The members of a tar archive. Memory: the listing, and for .tar.gz the states of `Unpacked`.

    Only headers are read; of a .tar.gz everything is unpacked once, and dropped. Refused are links, devices, sparse
    files, and members called like another one or out of the archive.

    Raises
    ------
    BadArchive
        If a header is damaged, the archive is cut off, or it unpacks to far more than it has.
    """
    file = OpenFile(path)
    is_packed = file.read_at(0, 2) == b"\x1f\x8b"
    content: Bytes = Unpacked(file) if is_packed else file
    found, at, said = NamesSoFar(), 0, dict[str, bytes]()
    while True:
        block = content.read_at(at, _BLOCK)
        if len(block) < _BLOCK and (block or at == 0):
            raise BadArchive("it is no tar archive, or cut off; get it again")
        if not block.strip(b"\0"):
            break  # the end, by a block of zeros or without
        kind, size = block[156:157], _checked_number(block)
        at += _BLOCK
        if kind in (b"x", b"g", b"X", b"L", b"K"):
            if size > _MAX_HEADER_BYTES:
                raise BadArchive(f"a header of it has {size:,} bytes, more than the {_MAX_HEADER_BYTES:,} allowed")
            body = content.read_at(at, size)
            if len(body) < size:
                raise BadArchive(_CUT)
            if kind in (b"x", b"X"):
                said |= _pax(body)
            elif kind == b"L":
                said["path"] = body.split(b"\0")[0]
            at += _padded(size)
            continue
        name = said.get("path") or _name(block)
        size = _whole(said["size"]) if "size" in said else size
        is_sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in said)
        said = {}
        is_folder = kind == _FOLDER or (kind in _REGULAR and name.endswith(b"/"))
        if not is_folder:
            place = Member(path, file.stamp, "gzip" if is_packed else "tar", at, size)
            found.add(name, _why_not(kind, is_sparse) or place)
        if kind not in _WITHOUT_BYTES:
            if size and not content.read_at(at + size - 1, 1):
                raise BadArchive(_CUT)
            at += _padded(size)
    return found.listing()


def read_tar(content: Bytes, member: Member, most: int) -> bytes:
    """The bytes of a member, at most `most`; `content`: of the archive, unpacked.

    Raises
    ------
    BadArchive
        If it is larger, or the archive is cut off.
    """
    check_size(member.size, member.size, most)
    raw = content.read_at(member.offset, member.size)
    if len(raw) != member.size:
        raise BadArchive("the archive is cut off at this member")
    return raw


@dataclass(frozen=True, slots=True)
class _Point:
    """A state of the unpacker from which it can go on."""

    unpacked: int  # bytes before it
    packed: int
    unpacker: Any  # zlib's decompression object; never used itself, only copies


class Unpacked:
    """The unpacked content of a gzip file, at any place: unpacked from the nearest state that was kept.

    Reading forward costs one pass over the file. Memory: at most `_MOST_POINTS` states and a few pieces.
    """

    def __init__(self, file: OpenFile) -> None:
        self._file, self._lock = file, threading.Lock()
        self._apart = max(_LEAST_APART, file.size // _MOST_POINTS)
        self._points = [_Point(0, 0, zlib.decompressobj(31))]
        self._go_to(self._points[0])

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` of the unpacked content from `offset`; fewer only at its end.

        Raises
        ------
        BadArchive
            If the file is damaged or cut off before, or unpacks to far more than it has.
        """
        with self._lock:
            nearest = self._points[bisect_right(self._points, offset, key=lambda point: point.unpacked) - 1]
            if not nearest.unpacked <= self._unpacked <= offset:
                self._go_to(nearest)
            while self._unpacked < offset:
                if not self._next(min(_STEP, offset - self._unpacked)):
                    return b""
            pieces: list[bytes] = []
            while n_bytes and (piece := self._next(min(_STEP, n_bytes))):
                pieces.append(piece)
                n_bytes -= len(piece)
            return b"".join(pieces)

    def _go_to(self, point: _Point) -> None:
        self._unpacked, self._packed, self._rest = point.unpacked, point.packed, b""
        self._unpacker = point.unpacker.copy()

    def _next(self, most: int) -> bytes:
        """The next unpacked bytes, at most `most`; none at the end."""
        while True:
            if self._unpacker.eof:  # several gzip files may follow each other, then zeros
                self._rest = self._unpacker.unused_data.lstrip(b"\0")
                if not self._rest:
                    self._rest = self._file.read_at(self._packed, _PIECE).lstrip(b"\0")
                    self._packed = min(self._file.size, self._packed + _PIECE)
                if not self._rest:
                    return b""
                self._unpacker = zlib.decompressobj(31)
            if not self._rest:
                self._keep_point()
                self._rest = self._file.read_at(self._packed, _PIECE)
                self._packed += len(self._rest)
                is_end = not self._rest
            else:
                is_end = False
            try:
                piece: bytes = self._unpacker.decompress(self._rest, most)
            except zlib.error:
                raise BadArchive("it is damaged: it cannot be unpacked; get it again") from None
            self._rest = b"" if self._unpacker.eof else self._unpacker.unconsumed_tail
            self._unpacked += len(piece)
            if self._unpacked > FREE_BYTES + MAX_RATIO * self._packed:
                raise BadArchive(f"it unpacks to more than {MAX_RATIO} times its size: a bomb")
            if piece:
                return piece
            if is_end and not self._unpacker.eof:
                raise BadArchive("it is cut off: it cannot be unpacked to its end; get it again")

    def _keep_point(self) -> None:
        """Keep the state, if it is far enough behind the last one. All packed bytes that were read are unpacked."""
        last = self._points[-1]
        if self._packed - last.packed >= self._apart and self._unpacked > last.unpacked:
            self._points.append(_Point(self._unpacked, self._packed, self._unpacker.copy()))


def _checked_number(block: bytes) -> int:
    """The size in a header, after a check of the header's sum."""
    stated = _whole(block[148:156].strip(b"\0 ") or b"0", 8)
    blank = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(blank)
    if stated != unsigned and stated != unsigned - 256 * sum(byte > 127 for byte in blank):  # of signed bytes, as once
        raise BadArchive("it is no tar archive, or damaged: the checksum of a header is wrong; get it again")
    field = block[124:136]
    if field[0] == 0x80:  # GNU: a number in base 256
        return int.from_bytes(field[1:], "big")
    return _whole(field.strip(b"\0 ") or b"0", 8)


def _whole(text: bytes, base: int = 10) -> int:
    if not text.isdigit() or len(text) > 20:
        raise BadArchive("it is no tar archive, or damaged: a number of a header cannot be read; get it again")
    try:
        return int(text, base)
    except ValueError:
        raise BadArchive("it is no tar archive, or damaged: a number of a header cannot be read") from None


def _name(block: bytes) -> bytes:
    """The name in a header; in the POSIX form with the folder before it."""
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _pax(body: bytes) -> dict[str, bytes]:
    """The records `LENGTH KEY=VALUE` of an extended header that matter here."""
    found, at = dict[str, bytes](), 0
    while at < len(body) and body[at : at + 1] != b"\0":
        blank = body.find(b" ", at, at + 20)
        length = _whole(body[at:blank]) if blank > at else 0
        record = body[blank + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if length <= blank + 1 - at or at + length > len(body) or not equals or not value.endswith(b"\n"):
            raise BadArchive("it is damaged: an extended header cannot be read; get it again")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            found[key.decode(errors="replace")] = value[:-1]
        at += length
    return found


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _why_not(kind: bytes, is_sparse: bool) -> str:
    if kind in _LINKS:
        return LINK
    if is_sparse:
        return "a sparse file"
    return "" if kind in _REGULAR else "no regular file"
