"""Reads an untrusted weights file: plain tensors, or an error in one line.

A `.safetensors` file is a list of names, shapes and numbers; there is nothing in it that could be executed. Checked
before PyTorch opens a `.pth` file: the archive has the layout that torch.save writes (stores/torch_archive.py), the
pickle refers to nothing but plain tensors, and every record has its checksum (PyTorch maps the file without checking
it). So loading takes no more memory than the file, and nothing in it is executed.
"""

import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stores.errors import BadInput
from stores.torch_archive import Refused, one_line, open_archive

MAX_PICKLE_BYTES = 1 << 20  # tens of kilobytes in the small model
MAX_TUPLES = 20_000  # hashing 100,000 nested tuples overflows C's stack; the giant model has below 5,000
_STORAGES = {  # bytes per number
    **{f"torch {kind}Storage": 1 for kind in ("Byte", "Char", "Bool")},
    **{f"torch {kind}Storage": 2 for kind in ("Half", "BFloat16", "Short")},
    **{f"torch {kind}Storage": 4 for kind in ("Float", "Int")},
    **{f"torch {kind}Storage": 8 for kind in ("Double", "Long")},
}
_PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", *_STORAGES}


def read_weights(path: Path, *, max_bytes: int, expected: str) -> Any:
    """The content of a file: of `.safetensors` its tensors by name, else what `torch.save` wrote. Mapped from the file.

    Memory: a few times `MAX_PICKLE_BYTES`; tensors are read as they are used.

    Raises
    ------
    BadInput
        Its message ends with `expected`.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path, max_bytes=max_bytes, expected=expected)
    try:
        with open_archive(path, max_bytes=max_bytes, max_pickle_bytes=MAX_PICKLE_BYTES, what="this model") as archive:
            archive.check_sums()
            for key, n_bytes in _storages(archive.pickled):
                archive.check_storage(key, n_bytes)
    except Refused as refused:
        raise BadInput(f"{path} {refused}; {expected}") from None
    except Exception as error:  # zipfile and pickletools raise almost anything
        raise BadInput(f"{path} is no whole archive of torch.save ({one_line(error)}); {expected}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # not torch's message: it advises to load the file unsafely
        raise BadInput(f"{path} is refused: it holds more than plain tensors; {expected}") from None
    except Exception as error:  # a malicious file can raise almost any error
        raise BadInput(f"{path} cannot be loaded as weights ({one_line(error)}); {expected}") from None


def _read_safetensors(path: Path, *, max_bytes: int, expected: str) -> dict[str, torch.Tensor]:
    """Name -> tensor. The library checks that every tensor lies inside the file, and that no two overlap."""
    from safetensors.torch import load_file

    if (size := path.stat().st_size) > max_bytes:
        raise BadInput(f"{path} has {size:,} bytes, more than the {max_bytes:,} that this model can need; {expected}")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path, device="cpu")
    except Exception as error:  # a malicious file can raise almost any error
        raise BadInput(f"{path} is no whole safetensors file ({one_line(error)}); {expected}") from None
    return tensors


def _storages(pickled: bytes) -> Iterator[tuple[str, int]]:
    """(record, bytes) of every storage that the pickle refers to; a pickle that refers to anything else is refused.

    Follows names and numbers through the pickle as PyTorch's unpickler does. A storage is a tuple of "storage", its
    type, its record, its device and its length, each given in place or taken from the memo.
    """
    n_tuples, memo, last = 0, dict[Any, Any](), None
    pushed: list[Any] = []  # since the last mark; None for anything but a name or number
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        if code.name == "GLOBAL" and argument not in _PLAIN:
            wanted = str(argument).replace(" ", ".")
            raise Refused(f"is refused: it asks for {wanted!r:.80}, which is no plain tensor and may execute code")
        if code.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID"):
            raise Refused(f"is refused: its pickle asks for more than plain tensors ({code.name})")
        n_tuples += code.name.startswith("TUPLE")
        if n_tuples > MAX_TUPLES:
            raise Refused("has far more tuples in its pickle than a model needs")
        if code.name == "BINPERSID":
            match pushed:
                case ["storage", str(kind), str(key), str(), int(length), None] if kind in _STORAGES and last is None:
                    yield key, length * _STORAGES[kind]
                case _:
                    raise Refused("is refused: its pickle asks for more than plain tensors")
        last = memo.get(argument) if code.name in ("BINGET", "LONG_BINGET") else argument
        pushed = [] if code.name in ("MARK", "BINPERSID") else [*pushed[-6:], last]
