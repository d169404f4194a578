"""The vision transformers: their architectures, how weights are loaded, and the output of each transformer block.

DinoBloom's are built in (docs/reference/paper.md 3); any other one of timm comes by `other_models.py`. A checkpoint is
an untrusted file from the internet: nothing in it is executed (weights_file.py). It is loaded strictly: every weight of
the model must be in the file, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stores.errors import BadInput
from stores.files import sha256_file
from stores.progress import Progress
from stores.spec import check_choice
from stores.token_layout import TokenLayout, cls_first

from .checkpoint_state import load_strictly
from .download import PUBLISHED_AT, fetch_from_hub, fetch_published
from .model_names import FORMS, parse_model_name
from .other_models import LoadedModel, load_model
from .preprocess import MAX_SIZE, Preprocess
from .random_weights import set_random, sha256_state
from .torchvision_guard import declare_missing_operators
from .vit import Tail, cut, layout_of, set_image_size
from .weights_file import read_weights

TOKENS_PER_IMAGE = 257  # of the published models, at their own picture size
CROPS = ("own", "none")
_SIZE, _PATCH = 224, 14  # pixels, of the published models
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
    model: nn.Module  # pixels (B, 3, size, size) float, normalised -> tokens (B, T, width)
    weights_sha256: str
    trained: bool
    blocks: tuple[int, ...]  # whose output is returned: indices from 0, ascending
    n_blocks: int
    width: int
    preprocess: Preprocess
    weights_source: str = ""  # of a download: the value of --weights that gives the same file again
    tail: nn.Module | None = None  # the blocks after the last of `blocks`, and the final norm
    layout: TokenLayout = field(default_factory=lambda: cls_first(TOKENS_PER_IMAGE))  # which token is what
    # mean and std on each device that pixels came from: making them there anew would wait for the device every time
    _constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def tokens(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, size, size, 3) uint8 on the model's device -> the residual stream after each of `blocks`, (B, T, width).

        Pixels are normalised here, in float32 on the device, so that only uint8 is copied to it. T tokens of an image:
        `layout` says which is what.
        """
        mean, std = self._mean_and_std(pixels.device)
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

    def _mean_and_std(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the preprocessing, (3, 1, 1) float32 each on `device`; made once."""
        if device not in self._constants:
            with torch.inference_mode(False):  # else they could not be used outside of it later
                mean, std = (
                    torch.tensor(values, device=device).view(3, 1, 1)
                    for values in (self.preprocess.mean, self.preprocess.std)
                )
            self._constants[device] = mean, std
        return self._constants[device]

    def final_cls(self, tokens: torch.Tensor) -> torch.Tensor:
        """Runs the later blocks and the final norm: tokens after the last of `blocks`, (B, T, width) -> (B, width).

        For the tokens that `tokens` gives, this is the CLS embedding of the whole model. Needs a backbone that was
        loaded with `keep_tail`.

        Raises
        ------
        BadInput
            If the model has no CLS token.
        """
        assert self.tail is not None, "loaded without its tail"
        require_cls(self.layout, self.name)
        embedding: torch.Tensor = self.tail(tokens)[:, 0]
        return embedding


def require_cls(layout: TokenLayout, name: str) -> None:
    """Raise BadInput if a backbone has no CLS token."""
    if not layout.n_cls:
        raise BadInput(
            f"the backbone {name} has no CLS token ({layout.text}), so there is no final CLS embedding; "
            f"leave out --images"
        )


def load_backbone(
    name: str,
    *,
    weights: str | None = None,
    blocks: tuple[int, ...] = (-2,),
    keep_tail: bool = False,
    image_size: int | None = None,
    crop: str = "own",
    progress: Progress = lambda done, total, state: None,
) -> Backbone:
    """A backbone that gives the tokens after some of its blocks; blocks after the last of these are not run.

    Parameters
    ----------
    name : a key of `ARCHITECTURES`; `timm:NAME`; `hf-hub:OWNER/NAME[@REVISION]`, which is downloaded once; a folder
        with config.json and weights; or a file of weights of a DINOv2-like model, also as training writes it. Behind a
        question mark settings of the architecture, `timm:vit_base_patch16_224?reg_tokens=4`
    weights : path of a DinoBloom `.pth` file; `auto`, the published file, downloaded once and checked (download.py);
        `hf:OWNER/NAME[/FILE][@REVISION]`, from Hugging Face in the same way; or `random` (seeded, untrained);
        `random-vit-tiny` needs none. For other models a file or folder; models that bring theirs need none
    blocks : indices of transformer blocks from 0, or from the end if negative; -2 is the second last
    keep_tail : keep the later blocks and the final norm, for `Backbone.final_cls`
    image_size : pixels along each side of the model's input, a multiple of its patches; None: what it was trained on
    crop : `own`: what the model's own preprocessing cuts off is cut off; `none`: the whole image, as a square
    progress : bytes downloaded, bytes in all

    Raises
    ------
    BadInput
        For an unknown name, an unknown or repeated block, missing weights, a file that is not this checkpoint, or
        a download that fails.
    """
    check_choice("crop", crop, CROPS)
    if image_size is not None and not 1 <= image_size <= MAX_SIZE:
        raise BadInput(f"the image size must be 1 to {MAX_SIZE:,} pixels; found {image_size:,}")
    asked = None if name in ARCHITECTURES else parse_model_name(name)

    def check_blocks(called: str, n_blocks: int) -> tuple[int, ...]:
        return _tapped(called, blocks, n_blocks)

    if asked is not None:
        loaded = load_model(
            asked,
            name,
            weights=weights,
            image_size=image_size,
            check_blocks=check_blocks,
            progress=progress,
        )
    elif name in ARCHITECTURES:
        loaded = _load_published(name, weights, image_size, check_blocks, progress)
    else:
        raise BadInput(f"no backbone {name!r}; there are {', '.join(ARCHITECTURES)}; and {FORMS}")
    preprocess = loaded.preprocess
    if crop == "none":
        preprocess = replace(preprocess, crop_mode="squash", crop_pct=1.0)
    model, tapped = loaded.model, check_blocks(name, len(loaded.model.blocks))
    n_blocks = len(model.blocks)
    tail = Tail(model, tapped[-1], preprocess.size) if keep_tail else None
    return Backbone(
        name=loaded.name,
        model=cut(model, tapped[-1]),
        weights_sha256=loaded.weights_sha256,
        trained=loaded.trained,
        blocks=tapped,
        n_blocks=n_blocks,
        width=model.embed_dim,
        preprocess=preprocess,
        weights_source=loaded.weights_source,
        tail=tail,
        layout=loaded.layout,
    )


def _load_published(
    name: str,
    weights: str | None,
    image_size: int | None,
    check_blocks: Callable[[str, int], object],
    progress: Progress,
) -> LoadedModel:
    """One of `ARCHITECTURES`: DinoBloom's file of this size, or seeded weights."""
    architecture = ARCHITECTURES[name]
    if weights is None and architecture.weights_file:
        raise BadInput(
            f"{name} needs weights: get {architecture.weights_file} from {PUBLISHED_AT} and give it with "
            f"--weights {architecture.weights_file}, or let --weights auto download it "
            f"(or --weights random for an untrained model)"
        )
    if weights not in (None, "random") and not architecture.weights_file:
        raise BadInput(f"{name} is untrained and takes no --weights; found {weights!r}")
    size = image_size or _SIZE
    if size % _PATCH:
        lower = size - size % _PATCH
        raise BadInput(
            f"{size} pixels are no multiple of the patches of {name}, which have {_PATCH}; take --image-size "
            f"{lower + _PATCH}"
        )
    model = _create(architecture, on="meta")
    check_blocks(name, len(model.blocks))  # before gigabytes are downloaded
    source = ""
    if weights in (None, "random"):
        model = set_random(model)
        digest = sha256_state(model)  # of the whole model, so that it does not depend on the block
    else:
        if weights == "auto" or str(weights).startswith(("hf:", "hf-hub:")):
            name_there = str(architecture.weights_file)
            file = (
                fetch_published(name_there, progress=progress)
                if weights == "auto"
                else fetch_from_hub(str(weights), name_there, progress=progress)
            )
            path, digest, source = file.path, file.sha256, file.source
        else:
            path, digest = Path(str(weights)), ""
        _load_checkpoint(model, path, name)
        digest = digest or sha256_file(path)
    if size != _SIZE:
        set_image_size(model, size, name)
    return LoadedModel(
        name=name,
        model=model,
        layout=layout_of(model, name),
        preprocess=Preprocess(size=size),
        weights_sha256=digest,
        trained=weights not in (None, "random"),
        weights_source=source,
    )


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


def _load_checkpoint(model: Any, path: Path, name: str) -> None:
    state = _read_checkpoint(path, model)
    width = state["pos_embed"].shape[2]
    if width != model.embed_dim:
        raise BadInput(
            f"{path} holds a model of width {width}, {name} has width {model.embed_dim}; "
            f"give the matching --backbone (s 384, b 768, l 1024, g 1536)"
        )
    load_strictly(model, state, path, name)
