"""Which device does the work, and what is said when its memory is not enough."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # torch, CUDA, cuBLAS, Triton
_ASKED = re.compile(r"[Tt]ried to allocate (\d[\d.]* ?\w+)|Unable to allocate (\d[\d.]* ?\w+)")
_FREE = re.compile(r"total capacity of (\d[\d.]* \w+) of which (\d[\d.]* \w+) is free")


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
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if 0 < n_gpus <= int(os.environ["LOCAL_RANK"]):
            raise BadInput(
                f"each process of torchrun takes a GPU of its own; found {n_gpus} for "
                f"{os.environ.get('LOCAL_WORLD_SIZE', 'more')} processes. Give --nproc-per-node {n_gpus}"
            )
    if device not in ("cpu", *["cuda"][:n_gpus], *(f"cuda:{number}" for number in range(n_gpus))):
        raise BadInput(f"device must be auto, cpu or an available cuda device; found {device!r}")
    return device


def device_name(device: str) -> str:
    """What the run log says of it: the card's name, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def float32_stays_float32() -> None:
    """From now on a GPU computes with float32 numbers as they are, not as TF32, in this process.

    Torch's convolutions take TF32 unless they are told not to. Matrix products do where the environment says so, as
    images of containers do (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1).
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def memory_told(lower: str) -> Iterator[None]:
    """Where memory is not enough in the block, or the function that this decorates, raise OutOfMemory: one line.

    lower : a sentence that says what to lower
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        from stores.errors import OutOfMemory

        raise OutOfMemory(f"{_what_was_asked(error)}. {lower}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Is it an error of torch, CUDA, Triton, numpy or Python that says that memory is not enough?"""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def _what_was_asked(error: BaseException) -> str:
    """For instance: out of memory: 2.00 GiB more were asked for, of 79.11 GiB of the GPU 512.00 MiB are free."""
    text = str(error)
    asked, free = _ASKED.search(text), _FREE.search(text)
    more = f": {_in_words(asked[1] or asked[2])} more were asked for" if asked else ""
    left = f", of {free[1]} of the GPU {free[2]} are free" if free else ""
    where = " on the GPU" if not free and "CUDA" in text else ""
    return f"out of memory{where}{more}{left}"


def _in_words(size: str) -> str:
    """PyTorch counts on the CPU in bytes: `14745600000000 bytes` is 13,732.91 GiB."""
    number, unit = size.split(" ") if size.endswith(" bytes") else (size, "")
    return f"{int(number) / 2**30:,.2f} GiB" if unit and int(number) >= 2**27 else size


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
