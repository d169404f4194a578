"""Paths that lead into archives: `cells.zip::a/b.tif`, or `cells.zip/a/b.tif` if the archive is the images' root.

`locate` turns such a path into a `Member`, with the archive listed once and kept; `read_member` reads its bytes, also
in another process. Quick to import: zip and tar are imported when they are met.
"""

import os
import re
import threading
from collections import OrderedDict
from pathlib import Path

from .archive_member import BadArchive, Bytes, Listing, Member, OpenFile, stamp_of

SEPARATOR = "::"
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_INTO = re.compile(r"(\.zip|\.tar|\.tar\.gz|\.tgz)(?:::|/|$)", re.IGNORECASE)
_KEPT_MEMBERS = 1_000_000  # in listings that are kept
_KEPT_FILES = 64  # open archives


def is_archive_name(name: str) -> bool:
    """Is this the name of an archive that is read?"""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def without_suffix(name: str) -> str:
    """`cells.tar.gz` -> `cells`."""
    folded = name.lower()
    suffix = max((each for each in ARCHIVE_SUFFIXES if folded.endswith(each)), key=len, default="")
    return name[: len(name) - len(suffix)] if suffix else name


def as_unpacked(path: str) -> str:
    """`a/class.zip::b/c.tif` -> `a/class/b/c.tif`: the path as if each archive were a folder without its suffix."""
    return _INTO.sub(lambda found: "/" if found[0].endswith(SEPARATOR) else found[0], path)


def split_path(path: Path | str) -> tuple[Path, str] | None:
    """(archive, path inside it, "" for all of it) for a path into an archive that is there; None for any other path.

    A file or folder that is really called so comes first.
    """
    text = os.fspath(path)
    found = [*_INTO.finditer(text)]
    if not found or (not _INTO.fullmatch(text, found[-1].start()) and os.path.lexists(text)):
        return None
    for each in found:
        archive = Path(text[: each.end(1)])
        if archive.is_file():
            return archive, text[each.end() :].strip("/")
    return None


def locate(path: Path) -> Member | None:
    """Where the file `path` lies, if it lies inside an archive; None if not.

    Raises
    ------
    BadArchive
        If the archive cannot be read, or does not hold the file, or it is refused.
    """
    parts = split_path(path)
    if parts is None or not parts[1]:
        return None
    archive, name = parts
    listing = list_archive(archive)
    member = listing.members.get(name)
    if member is not None:
        return member
    if name in listing.refused:
        raise BadArchive(f"not read from its archive: {listing.refused[name]}")
    raise BadArchive(f"no such file in {archive.name}")


class _Listings:
    """Listings by archive, the last used ones, as long as the archive file is the same."""

    def __init__(self) -> None:
        self._lock, self._kept = threading.Lock(), OrderedDict[str, tuple[tuple[int, int, int], Listing]]()

    def get(self, archive: Path) -> Listing:
        name = os.fspath(archive)
        try:
            stamp = stamp_of(archive.stat())
            with self._lock:  # also while listing: threads that want the same archive wait for it
                kept = self._kept.get(name)
                if kept is not None and kept[0] == stamp:
                    self._kept.move_to_end(name)
                    return kept[1]
                listing = _list(archive)
                self._kept[name] = (stamp, listing)
                self._kept.move_to_end(name)
                while len(self._kept) > 1 and sum(_weight(each) for _, each in self._kept.values()) > _KEPT_MEMBERS:
                    self._kept.popitem(last=False)
                return listing
        except OSError as error:
            raise BadArchive(f"cannot be read: {error.strerror or error}") from None


_listings = _Listings()


def list_archive(archive: Path) -> Listing:
    """What an archive holds. It is listed once, and again if its file has changed.

    Raises
    ------
    BadArchive
        If it cannot be read; the text is the end of a sentence.
    """
    return _listings.get(archive)


def _weight(listing: Listing) -> int:
    return len(listing.members) + len(listing.refused) + 100


def _list(archive: Path) -> Listing:
    if archive.name.lower().endswith(".zip"):
        from .zip_archive import list_zip

        return list_zip(os.fspath(archive))
    from .tar_archive import list_tar

    return list_tar(os.fspath(archive))


class _OpenArchives:
    """Archives that are open for reading, the last used ones."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), OrderedDict[tuple[str, str], tuple[OpenFile, Bytes]]()

    def get(self, member: Member) -> tuple[OpenFile, Bytes]:
        """(the archive file, its content: the same or unpacked)."""
        with self._lock:
            key = (member.archive, member.kind)
            found = self._open.pop(key, None)
            if found is None or found[0].stamp != member.stamp:
                file = OpenFile(member.archive)
                if file.stamp != member.stamp:
                    raise BadArchive("its archive has changed since it was listed; run the command again")
                found = (file, _content(file, member.kind))
            self._open[key] = found
            while len(self._open) > _KEPT_FILES:
                self._open.popitem(last=False)
            return found


_open_archives = _OpenArchives()


def _content(file: OpenFile, kind: str) -> Bytes:
    if kind != "gzip":
        return file
    from .tar_archive import Unpacked

    return Unpacked(file)


def read_member(member: Member, most: int) -> bytes:
    """The bytes of a file inside an archive, at most `most`. Memory: twice that.

    Raises
    ------
    BadArchive
        If the archive has changed since it was listed or is damaged there, or the file is larger.
    """
    try:
        file, content = _open_archives.get(member)
        if member.kind == "zip":
            from .zip_archive import read_zip

            return read_zip(file, member, most)
        from .tar_archive import read_tar

        return read_tar(content, member, most)
    except OSError as error:
        raise BadArchive(f"its archive cannot be read: {error.strerror or error}") from None
