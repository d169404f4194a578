"""Resolves the name of a device, and says in one line that its memory, or that of the host, is too small."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# how torch and the libraries below it say it, where the error has no type of its own
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "_ALLOC_FAILED", "ALLOC_FAILED")

# how much was asked for, as torch's two allocators and numpy say it
_ASKED = re.compile(r"(?:ried to allocate|Unable to allocate) ([\d.]+ ?(?:bytes|[KMGT]?i?B))")


def resolve_device(device: str) -> str:
    """The torch device that `device` means here: cpu, cuda or cuda:N.

    `auto` is a GPU if there is one, else cpu. Under torchrun, `cuda` (also from `auto`) is the GPU of the local rank.

    Raises
    ------
    BadInput
        If there is no such device.
    """
    import torch

    from stores.errors import BadInput

    if device == "auto":
        device = "cuda" if _has_gpu() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("cpu", *["cuda"][:n_gpus], *(f"cuda:{number}" for number in range(n_gpus))):
        raise BadInput(f"device must be auto, cpu or an available cuda device; found {device!r}")
    return device


@contextmanager
def memory_errors(device: str, advice: str) -> Iterator[None]:
    """While open, memory that runs out becomes BadInput: one line with what was asked for, and `advice`.

    For memory of the device (torch, cuBLAS, cuDNN), pinned memory, and memory of the host. Other errors pass as they
    are.

    advice : what to lower, and what to type next
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        from stores.errors import BadInput

        asked = _ASKED.search(str(error))
        wanted = f", where {asked[1]} were asked for" if asked else ""
        is_host = isinstance(error, MemoryError) or "CPUAllocator" in str(error)
        where = "the memory of this machine" if is_host else f"the memory of {device}"
        raise BadInput(f"{where} is not enough{wanted}: {advice}") from None


def is_memory_error(error: BaseException) -> bool:
    """Does this error of torch, a library below it, or Python say that memory ran out?"""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
