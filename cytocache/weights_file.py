"""What a weights file of somebody else holds, without trusting it: plain tensors, or one line why not.

A `.pth` file is a zip archive with a pickle and one raw record per storage. Before PyTorch sees it, all that makes
it cost more than its own size is ruled out: compressed or overlapping names, a pickle that asks for anything but plain
tensors, a record that fails its checksum (PyTorch maps the file and checks none). Nothing in it is executed.
"""

import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stores.errors import BadInput

MAX_ENTRIES = 10_000  # records: the giant model has below 1,000
MAX_DIRECTORY_BYTES = 4 << 20
MAX_PICKLE_BYTES = 1 << 20  # tens of kilobytes in the small model
MAX_TUPLES = 20_000  # nested some 100,000 deep, hashing them overflows C's stack; the giant model has below 5,000
_STORAGES = {  # bytes per number
    **{f"torch {kind}Storage": 1 for kind in ("Byte", "Char", "Bool")},
    **{f"torch {kind}Storage": 2 for kind in ("Half", "BFloat16", "Short")},
    **{f"torch {kind}Storage": 4 for kind in ("Float", "Int")},
    **{f"torch {kind}Storage": 8 for kind in ("Double", "Long")},
}
_PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", *_STORAGES}
_END_OF_ARCHIVE = struct.Struct("<4s4H2IH")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END_OF_ARCHIVE_64 = struct.Struct("<4sQ2H2I4Q")


def read_weights(path: Path, *, max_bytes: int, expected: str) -> Any:
    """The content of a file that `torch.save` wrote: containers and plain tensors, mapped from the file.

    Memory: a few times `MAX_PICKLE_BYTES`; tensors are read as they are used.

    Raises
    ------
    BadInput
        With `expected` as its last words.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise _Refused(f"has {size:,} bytes, more than the {max_bytes:,} that this model can need")
        _check_end(path, size)
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive)
    except _Refused as refused:
        raise BadInput(f"{path} {refused}; {expected}") from None
    except Exception as error:  # zipfile and pickletools raise almost anything
        raise BadInput(f"{path} is no whole archive of torch.save ({_one_line(error)}); {expected}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # torch's own words advise to load the file unsafely
        raise BadInput(f"{path} is refused: it holds more than plain tensors; {expected}") from None
    except Exception as error:  # a hostile file raises almost anything
        raise BadInput(f"{path} cannot be loaded as weights ({_one_line(error)}); {expected}") from None


class _Refused(Exception):
    """Why a file is not loaded, as the rest of a sentence that begins with its path."""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:120] or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _check_end(path: Path, size: int) -> None:
    """The archive must end as torch.save ends it: no comment in which a second, different directory could hide."""
    with path.open("rb") as file:
        file.seek(max(0, size - _END_OF_ARCHIVE.size - _LOCATOR_64.size))
        tail = file.read()
        end = tail[-_END_OF_ARCHIVE.size :]
        if len(end) < _END_OF_ARCHIVE.size or not end.startswith(b"PK\x05\x06") or not end.endswith(b"\0\0"):
            raise _Refused("is cut off, or was not written by torch.save of PyTorch 1.6 or newer")
        _, _, _, _, n_entries, n_bytes, _, _ = _END_OF_ARCHIVE.unpack(end)
        if tail.startswith(b"PK\x06\x07") and len(tail) == _END_OF_ARCHIVE.size + _LOCATOR_64.size:
            _, _, at, _ = _LOCATOR_64.unpack_from(tail)
            file.seek(min(at, size))
            end_64 = file.read(_END_OF_ARCHIVE_64.size)
            if len(end_64) < _END_OF_ARCHIVE_64.size:
                raise _Refused("is cut off, or was not written by torch.save of PyTorch 1.6 or newer")
            *_, n_entries_64, n_bytes_64, _ = _END_OF_ARCHIVE_64.unpack(end_64)
            n_entries, n_bytes = max(n_entries, n_entries_64), max(n_bytes, n_bytes_64)
    if n_entries > MAX_ENTRIES or n_bytes > MAX_DIRECTORY_BYTES:
        raise _Refused(f"lists {n_entries:,} records in {n_bytes:,} bytes, far more than a model has")


def _check_entries(archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    names = [entry.filename.lower() for entry in entries]  # PyTorch looks names up without regard to case
    pickles = [entry for entry in entries if entry.filename.lower().endswith("/data.pkl")]
    if len({*names}) < len(names) or len(entries) > MAX_ENTRIES:
        raise _Refused("lists the same record twice")
    if len(pickles) != 1 or len({name.partition("/")[0] for name in names}) != 1:
        raise _Refused("has not the one data.pkl of a file that torch.save wrote")
    if any(name.endswith("/constants.pkl") for name in names):
        raise _Refused("is a TorchScript program, which is not loaded")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _Refused(f"has a compressed record ({entry.filename!r:.60}), which torch.save never writes")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise _Refused(f"has a pickle of {pickles[0].file_size:,} bytes, far more than a model needs")
    for entry in entries:
        with archive.open(entry) as record:
            while record.read(1 << 20):  # raises at the end if the checksum does not fit
                pass
    folder = pickles[0].filename.partition("/")[0]
    sizes = {entry.filename.removeprefix(f"{folder}/data/"): entry.file_size for entry in entries}
    for key, n_bytes in _storages(archive.read(pickles[0])):
        if sizes.get(key) != n_bytes:
            found = "nothing" if key not in sizes else f"{sizes[key]:,} bytes"
            raise _Refused(f"should have {n_bytes:,} bytes in its record {key!r:.40}; found {found}")


def _storages(pickled: bytes) -> Iterator[tuple[str, int]]:
    """(record, bytes) of every storage that the pickle asks for; refuses a pickle that asks for anything else.

    Follows the pickle as PyTorch's unpickler will, as far as names and numbers go: a storage is a tuple of
    "storage", its type, its record, its device and its length, all given in place or taken from the memo.
    """
    n_tuples, memo, last = 0, dict[Any, Any](), None
    pushed: list[Any] = []  # since the last mark; None for what is no name or number
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        if code.name == "GLOBAL" and argument not in _PLAIN:
            wanted = str(argument).replace(" ", ".")
            raise _Refused(f"is refused: it asks for {wanted!r:.80}, which is no plain tensor and may execute code")
        if code.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID"):
            raise _Refused(f"is refused: its pickle asks for more than plain tensors ({code.name})")
        n_tuples += code.name.startswith("TUPLE")
        if n_tuples > MAX_TUPLES:
            raise _Refused("has far more tuples in its pickle than a model needs")
        if code.name == "BINPERSID":
            match pushed:
                case ["storage", str(kind), str(key), str(), int(length), None] if kind in _STORAGES and last is None:
                    yield key, length * _STORAGES[kind]
                case _:
                    raise _Refused("is refused: its pickle asks for more than plain tensors")
        last = memo.get(argument) if code.name in ("BINGET", "LONG_BINGET") else argument
        pushed = [] if code.name in ("MARK", "BINPERSID") else [*pushed[-6:], last]
