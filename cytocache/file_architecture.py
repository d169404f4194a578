"""The architecture of a file that holds weights and nothing else, by their names and shapes.

For plain vision transformers of 192, 384, 768, 1024 or 1536 channels, with or without DINOv2's scaling of layers: all
of them have heads of 64 channels. The number of heads leaves no trace in the weights, so for another width it must be
said.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch

from stores.errors import BadInput

from .checkpoint_state import State
from .model_config import ModelConfig
from .model_options import checked_options
from .preprocess import MAX_SIZE, Preprocess

_HEAD = 64  # channels of an attention head
_SIZES = {192: ("tiny", 12), 384: ("small", 12), 768: ("base", 12), 1024: ("large", 24), 1536: ("giant", 40)}


def describe_file(state: State, path: Path, asked: dict[str, Any]) -> ModelConfig:
    """The architecture of these weights, with DinoBloom's preprocessing; `asked`: settings that the user gives.

    Raises
    ------
    BadInput
        If the weights are not those of a plain vision transformer, or of one that is far too large, or the number of
        heads is not known.
    """
    embedding, positions = state["patch_embed.proj.weight"], state.get("pos_embed")
    blocks = {int(block[1]) for key in state if (block := re.match(r"blocks\.(\d{1,6})\.", key))}
    first, second, is_gated = _mlp(state)
    is_plain = (
        embedding.ndim == 4
        and embedding.shape[1] == 3
        and embedding.shape[2] == embedding.shape[3]
        and positions is not None
        and positions.ndim == 3
        and "blocks.0.attn.qkv.weight" in state
    )
    if not is_plain or positions is None or first is None or second is None or not blocks:
        raise BadInput(
            f"{path}: the architecture does not follow from its weights; say what it is: --backbone timm:NAME "
            f"--weights {path}"
        )
    width, patch = embedding.shape[0], embedding.shape[2]
    if width not in _SIZES and "num_heads" not in asked:
        raise BadInput(
            f"{path} is a model of {width:,} channels, and its number of attention heads is not in the file; add it: "
            f"'{path}?num_heads=N'"
        )
    registers = next((state[key] for key in ("register_tokens", "reg_token") if key in state), None)
    n_registers = registers.shape[1] if registers is not None and registers.ndim == 3 else 0
    n_cls = int("cls_token" in state)
    prefix, side = _positions(positions.shape[1], (0, n_cls, n_cls + n_registers))
    if not side or side * patch > MAX_SIZE:
        raise BadInput(f"{path} has {positions.shape[1]:,} positions, which are no square of patches of {patch} pixels")

    architecture, usual = _nearest(state, width, n_registers, is_gated)
    found = {"embed_dim": width, "depth": max(blocks) + 1, "num_heads": max(1, width // _HEAD), "patch_size": patch}
    options: dict[str, Any] = {**found, "reg_tokens": n_registers}
    options = {key: value for key, value in options.items() if value != usual[key]}
    if first.shape[0] != int(width * usual["mlp_ratio"]):
        options["mlp_ratio"] = first.shape[0] / width
    if not n_cls:
        pooling = "map" if "attn_pool.latent" in state else "avg"
        options |= {"class_token": False, "global_pool": pooling, "fc_norm": "fc_norm.weight" in state}
    if n_registers and not usual["reg_tokens"] and not prefix:
        options["no_embed_class"] = True
    if "norm_pre.weight" in state:
        options["pre_norm"] = True
    if "blocks.0.attn.qkv.bias" not in state:
        options["qkv_bias"] = False
    if "blocks.0.attn.q_norm.weight" in state:
        options["qk_norm"] = True
    options = checked_options({**options, **asked}, path)  # a name like blocks.999999. is not yet a million blocks
    return ModelConfig(architecture=architecture, options=options, preprocess=Preprocess(size=side * patch))


def _mlp(state: State) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """First and second matrix of the first MLP, and whether it is gated (SwiGLU)."""
    for names in (("w12", "w3"), ("fc1", "fc2")):
        first, second = (state.get(f"blocks.0.mlp.{name}.weight") for name in names)
        if first is not None and second is not None and first.ndim == second.ndim == 2:
            return first, second, first.shape[0] == 2 * second.shape[1]
    return None, None, False


def _positions(n: int, prefixes: tuple[int, ...]) -> tuple[int, int]:
    """(positions before those of patches, patches along each side); (0, 0) if there is no square."""
    for prefix in prefixes:
        side = math.isqrt(max(0, n - prefix))
        if side and side * side == n - prefix:
            return prefix, side
    return 0, 0


def _nearest(state: State, width: int, n_registers: int, is_gated: bool) -> tuple[str, dict[str, Any]]:
    """The architecture of timm that is most like it, and what it has by itself."""
    usual: dict[str, Any] = {"reg_tokens": 0, "patch_size": 14, "mlp_ratio": 4.0}
    if "blocks.0.ls1.gamma" in state:
        fitting = [1536] if is_gated else [384, 768, 1024]
        registers = "_reg4" if n_registers else ""
        usual |= {"reg_tokens": 4} if n_registers else {}
        usual |= {"mlp_ratio": 2.66667 * 2} if is_gated else {}
        pattern = f"vit_{{}}_patch14{registers}_dinov2"
    else:
        fitting, pattern = [768, 192, 384, 1024], "vit_{}_patch16_224"
        usual |= {"patch_size": 16}
    nearest = width if width in fitting else fitting[0]
    size, depth = _SIZES[nearest]
    return pattern.format(size), {**usual, "embed_dim": nearest, "depth": depth, "num_heads": nearest // _HEAD}
