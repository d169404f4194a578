"""Which device work runs on."""

import os


def resolve_device(device: str) -> str:
    import torch

    from stores.errors import BadInput

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("cpu", *["cuda"][:n_gpus], *(f"cuda:{number}" for number in range(n_gpus))):
        raise BadInput(f"device must be auto, cpu or an available cuda device; found {device!r}")
    return device
