"""A vision transformer of timm: made, checked, cut after a block, and its token groups named.

Which models are taken is decided by what they do and not by a list of names: on the meta device, without weights, a
picture must come out of every block as a row of tokens, CLS and registers first and then a square of patches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stores.errors import BadInput
from stores.token_layout import TokenLayout

from .model_options import timm_arguments
from .torchvision_guard import declare_missing_operators

_MOST_PARAMETERS = 8_000_000_000  # DINOv3's largest has 6.7


def create_vit(architecture: str, options: Mapping[str, Any], *, img_size: int, on: str, name: str) -> Any:
    """timm's model without a head, its weights not set (on `meta`) or drawn anew; torch's random state is as before.

    Raises
    ------
    BadInput
        If timm cannot make it with these settings.
    """
    declare_missing_operators()
    import timm

    arguments = timm_arguments(options)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(on):
            return timm.create_model(
                architecture, pretrained=False, img_size=img_size, num_classes=0, **arguments
            ).eval()
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{name} at {img_size} pixels cannot be made by timm: {said}") from None


def require_vit(model: Any, name: str, size: int) -> TokenLayout:
    """The token groups of a model on the meta device, which gets a picture of `size` pixels.

    Raises
    ------
    BadInput
        If it is no plain vision transformer, or the patches do not divide the picture evenly.
    """
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    if n_parameters > _MOST_PARAMETERS:
        raise BadInput(
            f"{name} would have {n_parameters:,} parameters, more than the {_MOST_PARAMETERS:,} of any known"
        )
    wanted = ("blocks", "norm", "embed_dim", "num_prefix_tokens", "patch_embed", "forward_features")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not all(hasattr(model, each) for each in wanted) or grid is None or not len(model.blocks):
        raise BadInput(
            f"{name} is no plain vision transformer ({type(model).__name__}): its blocks have no rows of tokens"
        )
    patch = patch_pixels(model)
    if grid[0] != grid[1] or len(set(patch)) > 1:
        raise BadInput(f"{name} has {grid[0]} x {grid[1]} patches of {patch} pixels; expected a square of squares")
    if size % patch[0]:
        sizes = [n * patch[0] for n in (size // patch[0], size // patch[0] + 1) if n]
        raise BadInput(
            f"{size} pixels are no multiple of the patches of {name}, which have {patch[0]}; take --image-size "
            f"{' or '.join(map(str, sizes))}"
        )
    layout = layout_of(model, name)
    shape = (1, layout.tokens_per_image, model.embed_dim)
    seen: list[Any] = []
    hooks = [block.register_forward_hook(lambda module, given, out: seen.append(out)) for block in model.blocks]
    try:
        with torch.inference_mode(), torch.device("meta"):
            seen.append(model.forward_features(torch.zeros(1, 3, size, size)))
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{name} does not take pictures of {size} pixels: {said}") from None
    finally:
        for hook in hooks:
            hook.remove()
    for out in seen:
        found = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        if found != shape:
            raise BadInput(f"{name} is no plain vision transformer: a block gives {found}, expected tokens {shape}")
    return layout


def layout_of(model: Any, name: str) -> TokenLayout:
    """The token groups of a model, by the names of its parameters."""
    n_cls = int(getattr(model, "cls_token", None) is not None)
    n_distillation = int(getattr(model, "dist_token", None) is not None)
    registers = getattr(model, "reg_token", None)
    n_registers = 0 if registers is None else registers.shape[1]
    grid = model.patch_embed.grid_size
    layout = TokenLayout(
        n_cls=n_cls, n_distillation=n_distillation, n_registers=n_registers, n_patches=grid[0] * grid[1]
    )
    if layout.first_patch != model.num_prefix_tokens:
        raise BadInput(
            f"{name} has {model.num_prefix_tokens} tokens before its patches, of which {layout.first_patch} are CLS "
            f"and registers: the others are not known here"
        )
    return layout


def position_grid(model: Any, n_positions: int) -> int | None:
    """Patches along each side of the pictures that learned positions, `n_positions` in all, were trained on."""
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = round(max(0, n_positions - prefix) ** 0.5)
    return side if side and side * side == n_positions - prefix else None


def set_image_size(model: Any, size: int, name: str) -> None:
    """Make a model with weights take pictures of `size` pixels: learned positions are interpolated, as timm does it.

    Raises
    ------
    BadInput
        If this kind of model has its size built in.
    """
    if not hasattr(model, "set_input_size"):
        raise BadInput(f"{name} cannot take other pictures than it was trained on; leave out --image-size")
    try:
        with torch.no_grad():
            model.set_input_size(img_size=(size, size))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{name} cannot take pictures of {size} pixels: {said}") from None
    model.requires_grad_(False)


def cut(model: Any, block: int) -> Any:
    """Drop the blocks after `block` and the final norm, so that the model returns the output of `block`."""
    model.blocks = model.blocks[: block + 1]
    model.norm = nn.Identity()
    model.forward = model.forward_features
    return model


class Tail(nn.Module):
    """The blocks after one of them, and the final norm: tokens there -> final tokens, both (B, T, width).

    The whole model runs on an empty picture, and the tokens take the place of what the first blocks would give. So
    whatever a family hands to its blocks beside the tokens (positions of RoPE, shared biases) is as in the model
    itself.
    """

    def __init__(self, model: Any, block: int, size: int) -> None:
        """`model`: whole, with its weights; its modules are shared, not copied. `size`: pixels of a picture."""
        super().__init__()
        self._size, self._entry = size, _Entry()
        first = [_Skip() for _ in range(block)]
        whole = _shallow_copy(model)
        whole.blocks = type(model.blocks)(
            *_as_arguments(model.blocks, [*first, self._entry, *model.blocks[block + 1 :]])
        )
        self._whole = whole

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T, width) after the block -> (B, T, width) after the final norm."""
        self._entry.tokens = tokens
        empty = torch.zeros(1, 3, self._size, self._size, device=tokens.device).expand(len(tokens), -1, -1, -1)
        try:
            final: torch.Tensor = self._whole.forward_features(empty)
        finally:
            self._entry.tokens = None
        return final


class _Skip(nn.Module):
    """A block that is not run."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


class _Entry(nn.Module):
    """A block whose output is given from outside."""

    tokens: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.tokens is not None
        return self.tokens


def _shallow_copy(module: Any) -> Any:
    """The same module with a list of parts of its own, so that exchanging one leaves the original as it is."""
    import copy

    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _as_arguments(blocks: Any, parts: list[nn.Module]) -> list[Any]:
    return parts if isinstance(blocks, nn.Sequential) else [parts]


def patch_pixels(model: Any) -> tuple[int, int]:
    """Height and width of a patch, in pixels of the input."""
    ratio = getattr(model.patch_embed, "feat_ratio", None)
    found = ratio(as_scalar=False) if ratio is not None else model.patch_embed.patch_size
    return int(found[0]), int(found[1])
