"""What a weights file of somebody else holds, without trusting it: plain tensors, or one line why not.

Before PyTorch sees a `.pth` file, all that makes it cost more than its own size is ruled out: an archive that is not
laid out as torch.save does (stores/torch_archive.py), a pickle that asks for anything but plain tensors, a record that
fails its checksum (PyTorch maps the file and checks none). Nothing in it is executed.
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
MAX_TUPLES = 20_000  # nested some 100,000 deep, hashing them overflows C's stack; the giant model has below 5,000
_STORAGES = {  # bytes per number
    **{f"torch {kind}Storage": 1 for kind in ("Byte", "Char", "Bool")},
    **{f"torch {kind}Storage": 2 for kind in ("Half", "BFloat16", "Short")},
    **{f"torch {kind}Storage": 4 for kind in ("Float", "Int")},
    **{f"torch {kind}Storage": 8 for kind in ("Double", "Long")},
}
_PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", *_STORAGES}


def read_weights(path: Path, *, max_bytes: int, expected: str) -> Any:
    """The content of a file that `torch.save` wrote: containers and plain tensors, mapped from the file.

    Memory: a few times `MAX_PICKLE_BYTES`; tensors are read as they are used.

    Raises
    ------
    BadInput
        With `expected` as its last words.
    """
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
    except pickle.UnpicklingError:  # torch's own words advise to load the file unsafely
        raise BadInput(f"{path} is refused: it holds more than plain tensors; {expected}") from None
    except Exception as error:  # a hostile file raises almost anything
        raise BadInput(f"{path} cannot be loaded as weights ({one_line(error)}); {expected}") from None


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
