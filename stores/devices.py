"""Resolves the name of a device."""

import os


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


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
