"""Seeded weights of an untrained model, equal on every machine and with every torch version."""

import hashlib
import math
from typing import Any

import numpy as np
import torch

_RANDOM_SEED = 0


def set_random(model: Any) -> Any:
    """Seeded weights with the spread of timm's initialisation.

    Uniform numbers from numpy: torch's normal numbers depend on the processor.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model = model.to_empty(device="cpu")
    rng = np.random.default_rng(_RANDOM_SEED)
    fan_in = math.prod(model.patch_embed.proj.weight.shape[1:]) if hasattr(model.patch_embed, "proj") else 1
    for name, parameter in model.named_parameters():
        constant, std = _initial_spread(name, fan_in)
        values = np.full(parameter.shape, constant, np.float32)
        if std:
            half_width = np.float32(std * math.sqrt(3))
            values += half_width * (2 * rng.random(parameter.shape, np.float32) - 1)
        parameter.data = torch.from_numpy(values)
    return model


def _initial_spread(name: str, fan_in: int) -> tuple[float, float]:
    """(constant, standard deviation) of one parameter before training; `fan_in`: inputs of the patch embedding."""
    last = name.rpartition(".")[2]
    if last.startswith("gamma"):  # LayerScale, with DINOv2's initial value
        return 1e-5, 0
    if "norm" in name and last == "weight":
        return 1, 0
    if name.startswith("patch_embed"):  # PyTorch's default for a convolution
        return 0, 1 / math.sqrt(3 * fan_in)
    if last.endswith("bias"):
        return 0, 0
    return 0, 1e-6 if name == "cls_token" else 0.02


def sha256_state(model: Any) -> str:
    """Hash of names and values, for weights that were not read from a file."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
