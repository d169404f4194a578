"""The vision transformers: their architectures, how weights are loaded, and the output of each transformer block.

A DinoBloom checkpoint is an untrusted file from the internet: nothing in it is executed (weights_file.py). It is loaded
strictly: every weight of the model must be in the file, and nothing else (docs/reference/paper.md 3).
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stores.errors import BadInput
from stores.files import sha256_file
from stores.progress import Progress
from stores.tables import listed

from .download import PUBLISHED_AT, fetch_from_hub, fetch_published
from .preprocess import Preprocess
from .torchvision_guard import declare_missing_operators
from .weights_file import read_weights

TOKEN_LAYOUT = "1 CLS + 16x16 patches, row-major"
TOKENS_PER_IMAGE = 257
_RANDOM_SEED = 0
_MAX_HEADS_BYTES = 2 << 30  # the training heads, which a published file also holds


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One transformer of the DINOv2 family at 224 x 224 pixels, patch 14."""

    timm_name: str
    options: dict[str, Any]  # for timm.create_model
    weights_file: str | None = None  # as published; None: there are no published weights


ARCHITECTURES = {
    "dinobloom-s": Architecture(timm_name="vit_small_patch14_dinov2", options={}, weights_file="DinoBloom-S.pth"),
    "dinobloom-b": Architecture(timm_name="vit_base_patch14_dinov2", options={}, weights_file="DinoBloom-B.pth"),
    "dinobloom-l": Architecture(timm_name="vit_large_patch14_dinov2", options={}, weights_file="DinoBloom-L.pth"),
    "dinobloom-g": Architecture(timm_name="vit_giant_patch14_dinov2", options={}, weights_file="DinoBloom-G.pth"),
    "random-vit-tiny": Architecture(
        timm_name="vit_small_patch14_dinov2", options={"embed_dim": 192, "num_heads": 3, "depth": 4}
    ),  # DINOv2's small model, with the width of ViT-Ti and four blocks
}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A loaded model, cut after the last block that is cached; later blocks are kept in `tail`, or dropped."""

    name: str
    model: nn.Module  # pixels (B, 3, 224, 224) float, normalised -> tokens (B, 257, width)
    weights_sha256: str
    trained: bool
    blocks: tuple[int, ...]  # whose output is returned: indices from 0, ascending
    n_blocks: int
    width: int
    preprocess: Preprocess
    weights_source: str = ""  # of a download: the value of --weights that gives the same file again
    tail: nn.Module | None = None  # the blocks after the last of `blocks`, and the final norm

    def tokens(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, 224, 224, 3) uint8 on the model's device -> the residual stream after each of `blocks`, (B, 257, width).

        Pixels are normalised here, in float32 on the device, so that only uint8 is copied to it.
        """
        mean = torch.tensor(self.preprocess.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.preprocess.std, device=pixels.device).view(3, 1, 1)
        images = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        tapped: list[torch.Tensor] = []
        hooks = [
            self.model.blocks[block].register_forward_hook(lambda module, given, out: tapped.append(out))  # type: ignore[union-attr,index]
            for block in self.blocks[:-1]
        ]
        try:
            last = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [*tapped, last]

    def final_cls(self, tokens: torch.Tensor) -> torch.Tensor:
        """Runs the later blocks and the final norm: tokens after the last of `blocks`, (B, 257, width) -> (B, width).

        For the tokens that `tokens` gives, this is the CLS embedding of the whole model. Needs a backbone that was
        loaded with `keep_tail`.
        """
        assert self.tail is not None, "loaded without its tail"
        embedding: torch.Tensor = self.tail(tokens)[:, 0]
        return embedding


def load_backbone(
    name: str,
    *,
    weights: str | None = None,
    blocks: tuple[int, ...] = (-2,),
    keep_tail: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Backbone:
    """A backbone that gives the tokens after some of its blocks; blocks after the last of these are not run.

    Parameters
    ----------
    name : a key of `ARCHITECTURES`
    weights : path of a DinoBloom `.pth` file; `auto`, the published file, downloaded once and checked (download.py);
        `hf:OWNER/NAME[/FILE][@REVISION]`, from Hugging Face in the same way; or `random` (seeded, untrained);
        `random-vit-tiny` needs none
    blocks : indices of transformer blocks from 0, or from the end if negative; -2 is the second last
    keep_tail : keep the later blocks and the final norm, for `Backbone.final_cls`
    progress : bytes downloaded, bytes in all

    Raises
    ------
    BadInput
        For an unknown name, an unknown or repeated block, missing weights, a file that is not this checkpoint, or
        a download that fails.
    """
    if name not in ARCHITECTURES:
        raise BadInput(f"no backbone {name!r}; there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    if weights is None and architecture.weights_file:
        raise BadInput(
            f"{name} needs weights: get {architecture.weights_file} from {PUBLISHED_AT} and give it with "
            f"--weights {architecture.weights_file}, or let --weights auto download it "
            f"(or --weights random for an untrained model)"
        )
    if weights not in (None, "random") and not architecture.weights_file:
        raise BadInput(f"{name} is untrained and takes no --weights; found {weights!r}")
    model = _create(architecture, on="meta")
    n_blocks = len(model.blocks)
    tapped = _tapped(name, blocks, n_blocks)  # checked before gigabytes are downloaded
    source = ""
    if weights in (None, "random"):
        model = _set_random(model)
        digest = _sha256_state(model)  # of the whole model, so that it does not depend on the block
    else:
        if weights == "auto" or str(weights).startswith("hf:"):
            name_there = str(architecture.weights_file)
            file = (
                fetch_published(name_there, progress=progress)
                if weights == "auto"
                else fetch_from_hub(str(weights), name_there, progress=progress)
            )
            path, digest, source = file.path, file.sha256, file.source
        else:
            path, digest = Path(str(weights)), ""
        _load_strictly(model, _read_checkpoint(path, model), path, name)
        digest = digest or sha256_file(path)
    tail = nn.Sequential(*model.blocks[tapped[-1] + 1 :], model.norm) if keep_tail else None
    backbone = Backbone(
        name=name,
        model=_cut(model, tapped[-1]),
        weights_sha256=digest,
        trained=weights not in (None, "random"),
        blocks=tapped,
        n_blocks=n_blocks,
        width=model.embed_dim,
        preprocess=Preprocess(),
        weights_source=source,
        tail=tail,
    )
    return backbone


def _tapped(name: str, blocks: tuple[int, ...], n_blocks: int) -> tuple[int, ...]:
    """The blocks as indices from 0, ascending."""
    for block in blocks:
        if not -n_blocks <= block < n_blocks:
            raise BadInput(
                f"{name} has {n_blocks} blocks: --block must be {-n_blocks} to {n_blocks - 1}; found {block}"
            )
    tapped = tuple(sorted({block % n_blocks for block in blocks}))
    if len(tapped) < len(blocks):
        raise BadInput(f"the same --block is given twice; found {', '.join(map(str, blocks))} of {n_blocks} blocks")
    return tapped


def _create(architecture: Architecture, *, on: str) -> Any:
    declare_missing_operators()
    import timm

    with torch.device(on):
        return timm.create_model(
            architecture.timm_name, pretrained=False, img_size=224, num_classes=0, **architecture.options
        ).eval()


def _set_random(model: Any) -> Any:
    """Seeded weights with the spread of timm's initialisation, equal on every machine and with every torch version.

    Uniform numbers from numpy: torch's normal numbers depend on the processor.
    """
    model = model.to_empty(device="cpu")
    rng = np.random.default_rng(_RANDOM_SEED)
    for name, parameter in model.named_parameters():
        constant, std = _initial_spread(name)
        values = np.full(parameter.shape, constant, np.float32)
        if std:
            half_width = np.float32(std * math.sqrt(3))
            values += half_width * (2 * rng.random(parameter.shape, np.float32) - 1)
        parameter.data = torch.from_numpy(values)
    return model


def _initial_spread(name: str) -> tuple[float, float]:
    """(constant, standard deviation) of one parameter before training."""
    if name.endswith("gamma"):  # LayerScale, with DINOv2's initial value
        return 1e-5, 0
    if "norm" in name and name.endswith("weight"):
        return 1, 0
    if name.startswith("patch_embed"):  # PyTorch's default for a convolution of 3 x 14 x 14
        return 0, 1 / math.sqrt(3 * 3 * 14 * 14)
    if name.endswith("bias"):
        return 0, 0
    return 0, 1e-6 if name == "cls_token" else 0.02


def _cut(model: Any, block: int) -> Any:
    """Drop the blocks after `block` and the final norm, so that the model returns the output of `block`."""
    model.blocks = model.blocks[: block + 1]
    model.norm = nn.Identity()
    model.forward = model.forward_features
    return model


def _read_checkpoint(path: Path, model: Any) -> dict[str, torch.Tensor]:
    """The teacher's backbone of a DinoBloom file: heads and mask token dropped, prefixes stripped."""
    layout = "expected a DinoBloom checkpoint: a dict with the one key 'teacher', its keys beginning with 'backbone.'"
    if not path.is_file():
        raise BadInput(f"no weights at {path}. The DinoBloom files are published at {PUBLISHED_AT}")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    content = read_weights(path, max_bytes=8 * n_parameters + _MAX_HEADS_BYTES, expected=layout)
    if not isinstance(content, dict) or not isinstance(content.get("teacher"), dict):
        found = type(content).__name__
        if isinstance(content, dict):
            found = ", ".join(repr(key)[:60] for key in content if isinstance(key, str)) or "an empty dict"
        raise BadInput(f"{path}: {layout}; found {found[:200]}")
    state = {
        key.removeprefix("backbone."): value.detach()
        for key, value in content["teacher"].items()
        if isinstance(key, str) and key.startswith("backbone.") and isinstance(value, torch.Tensor)
    }
    state.pop("mask_token", None)
    if "pos_embed" not in state or state["pos_embed"].ndim != 3 or state["pos_embed"].shape[1] != TOKENS_PER_IMAGE:
        shape = f"{tuple(state['pos_embed'].shape)!s:.60}" if "pos_embed" in state else "nothing"
        raise BadInput(f"{path}: {layout}, with backbone.pos_embed of shape (1, 257, width); found {shape}")
    # the giant model's gated MLP has other names in timm; the order of its two halves is the same
    return {key.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): state[key] for key in state}


def _load_strictly(model: Any, state: dict[str, torch.Tensor], path: Path, name: str) -> None:
    width = state["pos_embed"].shape[2]
    if width != model.embed_dim:
        raise BadInput(
            f"{path} holds a model of width {width}, {name} has width {model.embed_dim}; "
            f"give the matching --backbone (s 384, b 768, l 1024, g 1536)"
        )
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    mistyped = [key for key in state if not _is_plain(state[key])]
    for what, keys in {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "that are no plain floating-point tensors": mistyped,
    }.items():
        if keys:
            raise BadInput(f"{path} does not fit {name}: {len(keys)} weights {what} ({_listed(keys)})")
    state = {key: value.float() for key, value in state.items()}
    not_finite = [key for key in state if not torch.isfinite(state[key]).all()]
    if not_finite:
        raise BadInput(f"{path} does not fit {name}: {len(not_finite)} weights not finite ({_listed(not_finite)})")
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)


def _listed(keys: list[Any]) -> str:
    """Some keys of an untrusted file, safe to print in one line."""
    return listed(
        [(key if key.isprintable() else repr(key))[:60] if isinstance(key, str) else type(key).__name__ for key in keys]
    )


def _is_plain(value: torch.Tensor) -> bool:
    return value.dtype.is_floating_point and value.layout == torch.strided and value.device.type == "cpu"


def _sha256_state(model: Any) -> str:
    """Hash of names and values, for weights that were not read from a file."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
