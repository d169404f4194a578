"""What test_backbones.py and other tests share."""

from typing import Any

import torch
from torch import nn

from cytocache.backbones import ARCHITECTURES
from cytocache.torchvision_guard import declare_missing_operators

State = dict[str, Any]


def _timm(name: str) -> Any:
    """timm's model as it comes, with weights that are not set."""
    declare_missing_operators()
    import timm

    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        return timm.create_model(architecture.timm_name, img_size=224, num_classes=0, **architecture.options).eval()


def _lively_state(model: nn.Module) -> State:
    """Random weights under which every block matters: with DINOv2's first LayerScale, 1e-5, no two taps differ much."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for key, value in model.state_dict().items():
        noise = torch.empty(value.shape).normal_(0, 0.05, generator=generator)
        state[key] = noise + (1 if key.endswith("gamma") or ("norm" in key and key.endswith("weight")) else 0)
    return state


def _published(state: State) -> State:
    """The layout of DinoBloom's published files."""
    width = state["cls_token"].shape[2]
    return {
        "teacher": {
            **{f"backbone.{key}": value for key, value in state.items()},
            "backbone.mask_token": torch.zeros(1, width),
            "dino_head.mlp.0.weight": torch.ones(2, width),
            "dino_head.last_layer.weight_g": torch.ones(2, 1),
            "ibot_head.mlp.0.weight": torch.ones(2, width),
        }
    }
