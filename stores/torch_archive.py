"""Checks the zip archive of a file that `torch.save` wrote: one pickle, and one raw record per storage.

The file is untrusted. Refused are archives whose reading could take more memory than their size: compressed,
overlapping or repeated records, or a second, hidden directory. The pickle is checked by the caller. Nothing is executed
here, and PyTorch is not needed.
"""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_ENTRIES = 10_000  # records: the giant model has below 1,000
MAX_DIRECTORY_BYTES = 4 << 20
_END_OF_ARCHIVE = struct.Struct("<4s4H2IH")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END_OF_ARCHIVE_64 = struct.Struct("<4sQ2H2I4Q")
_NOT_OURS = "is cut off, or was not written by torch.save of PyTorch 1.6 or newer"


class Refused(Exception):
    """The reason why a file is refused, as the end of a sentence that begins with its path."""


@dataclass(frozen=True)
class TorchArchive:
    """An open archive: its pickle, and the record of each storage by its key."""

    zip: zipfile.ZipFile
    pickled: bytes
    storages: dict[str, zipfile.ZipInfo]

    def check_storage(self, key: str, n_bytes: int) -> zipfile.ZipInfo:
        """The record `key`; refused unless it has exactly the size that the pickle states."""
        record = self.storages.get(key)
        if record is None or record.file_size != n_bytes:
            found = "nothing" if record is None else f"{record.file_size:,} bytes"
            raise Refused(f"should have {n_bytes:,} bytes in its record {key!r:.40}; found {found}")
        return record

    def check_sums(self) -> None:
        """Read every record once; raises zipfile.BadZipFile if a checksum is wrong."""
        for entry in self.zip.infolist():
            with self.zip.open(entry) as record:
                while record.read(1 << 20):  # raises at the end
                    pass


@contextmanager
def open_archive(path: Path, *, max_bytes: int, max_pickle_bytes: int, what: str) -> Iterator[TorchArchive]:
    """Open the archive at `path` and check everything except the content of its records.

    what : "a model" or "an SAE", for errors about sizes

    Raises
    ------
    Refused
        If it is larger, or has another layout than torch.save writes.
    zipfile.BadZipFile, OSError, ...
        If it is damaged: zipfile can raise almost any error.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise Refused(f"has {size:,} bytes, more than the {max_bytes:,} that {what} can need")
    _check_end(path, size)
    with zipfile.ZipFile(path) as archive:
        pickled = _check_entries(archive, max_pickle_bytes, what)
        if any(entry.file_size > size for entry in archive.infolist()):
            raise Refused("lists a record that is larger than the whole file")
        folder = pickled.filename.partition("/")[0]
        prefix = f"{folder}/data/"
        storages = {
            entry.filename.removeprefix(prefix): entry
            for entry in archive.infolist()
            if entry.filename.startswith(prefix)
        }
        yield TorchArchive(archive, archive.read(pickled), storages)


def one_line(error: Exception) -> str:
    """The message of an error about an untrusted file: short, printable, in one line."""
    text = " ".join(str(error).split())[:120] or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _check_end(path: Path, size: int) -> None:
    """The archive must end as torch.save ends it, without a comment, which could hide a second directory."""
    with path.open("rb") as file:
        file.seek(max(0, size - _END_OF_ARCHIVE.size - _LOCATOR_64.size))
        tail = file.read()
        end = tail[-_END_OF_ARCHIVE.size :]
        if len(end) < _END_OF_ARCHIVE.size or not end.startswith(b"PK\x05\x06") or not end.endswith(b"\0\0"):
            raise Refused(_NOT_OURS)
        _, _, _, _, n_entries, n_bytes, _, _ = _END_OF_ARCHIVE.unpack(end)
        if tail.startswith(b"PK\x06\x07") and len(tail) == _END_OF_ARCHIVE.size + _LOCATOR_64.size:
            _, _, at, _ = _LOCATOR_64.unpack_from(tail)
            file.seek(min(at, size))
            end_64 = file.read(_END_OF_ARCHIVE_64.size)
            if len(end_64) < _END_OF_ARCHIVE_64.size:
                raise Refused(_NOT_OURS)
            *_, n_entries_64, n_bytes_64, _ = _END_OF_ARCHIVE_64.unpack(end_64)
            n_entries, n_bytes = max(n_entries, n_entries_64), max(n_bytes, n_bytes_64)
    if n_entries > MAX_ENTRIES or n_bytes > MAX_DIRECTORY_BYTES:
        raise Refused(f"lists {n_entries:,} records in {n_bytes:,} bytes, far more than a model has")


def _check_entries(archive: zipfile.ZipFile, max_pickle_bytes: int, what: str) -> zipfile.ZipInfo:
    """The entry of the one pickle."""
    entries = archive.infolist()
    names = [entry.filename.lower() for entry in entries]  # PyTorch ignores case in names
    pickles = [entry for entry in entries if entry.filename.lower().endswith("/data.pkl")]
    if len({*names}) < len(names) or len(entries) > MAX_ENTRIES:
        raise Refused("lists the same record twice")
    if len(pickles) != 1 or len({name.partition("/")[0] for name in names}) != 1:
        raise Refused("has not the one data.pkl of a file that torch.save wrote")
    if any(name.endswith("/constants.pkl") for name in names):
        raise Refused("is a TorchScript program, which is not loaded")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused(f"has a compressed record ({entry.filename!r:.60}), which torch.save never writes")
    if pickles[0].file_size > max_pickle_bytes:
        raise Refused(f"has a pickle of {pickles[0].file_size:,} bytes, far more than {what} needs")
    return pickles[0]
