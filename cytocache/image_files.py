"""The bytes of an image file, which lies in a folder or inside an archive, or why they cannot be had.

Quick to import: the processes that read images import this.
"""

import hashlib
import stat
from pathlib import Path

from .archive_member import BadArchive, Member
from .archives import locate, read_member

MAX_FILE_BYTES = 1 << 30


class UnreadableImage(ValueError):
    """An image file cannot be read or decoded; the text says why."""


def read_file(place: Path | Member) -> bytes:
    """The content of an image file. Memory: twice the file, at most `MAX_FILE_BYTES`.

    Raises
    ------
    UnreadableImage
        If there is none, or it is too large or cannot be read.
    """
    try:
        member = place if isinstance(place, Member) else locate(place)
        if member is not None:
            return read_member(member, MAX_FILE_BYTES)
    except BadArchive as error:
        raise UnreadableImage(str(error)) from None
    assert isinstance(place, Path)
    try:
        if not place.is_file():  # a pipe or a device would block
            raise UnreadableImage("not a file" if place.exists() else "no such file")
        size = place.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{size:,} bytes, more than the {MAX_FILE_BYTES:,} that are allowed")
        with place.open("rb") as file:
            raw = file.read(size + 1)
        if len(raw) > size:
            raise UnreadableImage("grew while it was read")
        return raw
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from None


def is_there(path: Path) -> bool:
    """Is there such an image file, in a folder or an archive?"""
    try:
        return locate(path) is not None or path.is_file()
    except BadArchive:
        return False


def size_of(path: Path) -> int | None:
    """Bytes of an image file; None if there is no regular file."""
    try:
        member = locate(path)
        if member is not None:
            return member.size
        found = path.stat()
    except (BadArchive, OSError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def hash_of(path: Path) -> str | None:
    """SHA-256 (hex) of an image file; None if it is missing, too large or cannot be read."""
    from stores.files import sha256_file

    try:
        member = locate(path)
        if member is not None:
            return hashlib.sha256(read_member(member, MAX_FILE_BYTES)).hexdigest()
        return sha256_file(path) if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES else None
    except (BadArchive, OSError):
        return None
