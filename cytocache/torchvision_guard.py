"""Lets timm import torchvision where its compiled operators cannot be loaded.

timm imports torchvision, and torchvision declares shapes for its operators `nms` and `qnms` when it is imported. With a
CPU-only torch beside a CUDA-built torchvision, the library that defines them does not load, and the import ends
with "operator torchvision::nms does not exist". It is enough to declare the two schemas first: they are never called.
"""

import importlib.util
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # kept: a Library removes its schemas when it is garbage-collected


def declare_missing_operators() -> None:
    """Declare `nms` and `qnms`, only if torchvision's own compiled library cannot be loaded; call before timm."""
    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or spec.origin is None:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
    schemas = {"nms": "float iou_threshold", "qnms": "float iou_threshold"}
    missing = [name for name in schemas if not _is_declared(name)]
    if missing:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            declared.define(f"{name}(Tensor dets, Tensor scores, {schemas[name]}) -> Tensor")
        _declared.append(declared)


def _is_declared(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel(f"torchvision::{name}"))
