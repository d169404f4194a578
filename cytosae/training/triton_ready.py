"""Can Triton build and run its kernels here? Asked before a run on a GPU writes anything.

For the first kernel of a process Triton compiles a small C program, with the compiler of the machine and the headers of
Python, unless its cache has it (docs/howto/gpu.md).
"""

import os
import subprocess

import torch

from stores.devices import is_out_of_memory
from stores.errors import BadInput, CytoError

_ready: set[str] = set()  # devices that were asked


def require_triton(device: str) -> None:
    """Run one small kernel on the GPU; once per process.

    Raises
    ------
    BadInput
        If triton is not installed, or cannot build or run a kernel: one line that says what is missing.
    """
    if device in _ready:
        return
    from . import kernels_gpu  # raises BadInput without triton

    try:
        kernels_gpu.mark_active(torch.zeros(1, 32, device=device))
    except Exception as error:  # a compiler, a driver, a disk and Triton itself raise almost anything
        if isinstance(error, CytoError) or is_out_of_memory(error):
            raise
        raise BadInput(
            f"training on a GPU needs triton to build its kernels: {_what_is_missing(error)}. docs/howto/gpu.md lists "
            f"what triton needs; --device cpu trains without it"
        ) from None
    _ready.add(device)


def _what_is_missing(error: Exception) -> str:
    """What to install, as far as Triton's error says it."""
    text = " ".join(str(error).split())[:200]
    compiler = os.environ.get("CC")
    if isinstance(error, FileNotFoundError) and compiler:
        return f"the C compiler that CC names, {compiler!r}, is not there; unset CC, or name one that is"
    if "C compiler" in text:
        return "no C compiler is there; install gcc or clang (apt install gcc), or name one in CC"
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        return (
            f"the C compiler {command} failed (its message stands above); mostly the headers of Python are missing "
            f"(apt install python3-dev)"
        )
    if "libcuda" in text:
        return "libcuda.so of the GPU's driver is not found; in a container, pass the GPU on (--gpus all, --nv)"
    if isinstance(error, OSError):
        return f"its cache cannot be written ({text}); name a folder in TRITON_CACHE_DIR"
    return f"{type(error).__name__}: {text}"
