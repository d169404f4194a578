"""A tiny vision transformer of each family, as a folder in timm's layout with weights that are made here."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import State, _lively_state
from safetensors.torch import save_file

from cytocache.torchvision_guard import declare_missing_operators
from stores.token_layout import TokenLayout

_TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
INCEPTION = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of timm with its own preprocessing, and what its tokens must be."""

    architecture: str
    size: int  # pixels of the input
    layout: TokenLayout
    options: dict[str, Any] = field(default_factory=lambda: dict(_TINY))
    cfg: dict[str, Any] = field(default_factory=dict)  # of the preprocessing

    @property
    def config(self) -> dict[str, Any]:
        """The config.json that timm would write."""
        return {
            "architecture": self.architecture,
            "num_classes": 0,
            "num_features": self.options["embed_dim"],
            "model_args": {**self.options, "img_size": self.size},
            "pretrained_cfg": {
                "tag": "tiny",
                "input_size": [3, self.size, self.size],
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center",
                **IMAGENET,
                **self.cfg,
            },
        }

    def timm(self, size: int | None = None) -> Any:
        """timm's own model, with weights of its own."""
        declare_missing_operators()
        import timm

        return timm.create_model(
            self.architecture, pretrained=False, num_classes=0, img_size=size or self.size, **self.options
        ).eval()

    def state(self) -> State:
        """The weights of the tests, under which every block matters (EVA's scale of layers is called gamma_1)."""
        state = _lively_state(self.timm())
        return {key: value.contiguous() + float(".gamma_" in key) for key, value in state.items()}

    def hooked(
        self, pixels: torch.Tensor, *, size: int | None = None, state: State | None = None
    ) -> list[torch.Tensor]:
        """What leaves each block of timm's unmodified model, and then the final tokens; pixels (B, 3, S, S)."""
        model, seen = self.timm(size), list[torch.Tensor]()
        model.load_state_dict(state or self.state(), strict=True)
        for block in model.blocks:
            block.register_forward_hook(lambda module, given, out: seen.append(out))
        with torch.inference_mode():
            final = model.forward_features(pixels)
        return [*seen, final]

    def write(self, folder: Path) -> Path:
        """config.json and model.safetensors in a new folder."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.state(), folder / "model.safetensors")
        return folder

    def pixels(self, paths: list[Path], size: int | None = None) -> torch.Tensor:
        """(B, 3, S, S) by timm's own evaluation transform."""
        declare_missing_operators()
        from PIL import Image
        from timm.data.transforms_factory import create_transform

        cfg = self.config["pretrained_cfg"]
        transform = create_transform(
            input_size=size or self.size,
            **{name: cfg[name] for name in ("interpolation", "crop_pct", "crop_mode", "mean", "std")},
        )
        return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


FAMILIES = {
    "ViT/16, 197 tokens": Family(
        architecture="vit_tiny_patch16_224",
        size=224,
        layout=TokenLayout(n_patches=196),
        cfg={"crop_pct": 0.9, **INCEPTION},
    ),
    "ViT/16, 448 pixels": Family(
        architecture="vit_tiny_patch16_224",
        size=448,
        layout=TokenLayout(n_patches=784),
        options={**_TINY, "depth": 2},
        cfg={"crop_mode": "squash"},
    ),
    "DINOv2 with registers": Family(
        architecture="vit_small_patch14_reg4_dinov2", size=56, layout=TokenLayout(n_registers=4, n_patches=16)
    ),
    "DINOv3": Family(architecture="vit_small_patch16_dinov3", size=64, layout=TokenLayout(n_registers=4, n_patches=16)),
    "SigLIP, no CLS": Family(
        architecture="vit_base_patch16_siglip_224",
        size=64,
        layout=TokenLayout(n_cls=0, n_patches=16),
        cfg={"crop_pct": 0.95, **INCEPTION},
    ),
    "registers, no CLS": Family(
        architecture="vit_medium_patch16_reg4_gap_256",
        size=64,
        layout=TokenLayout(n_cls=0, n_registers=4, n_patches=16),
        cfg={"interpolation": "bilinear"},
    ),
    "DeiT, distilled": Family(
        architecture="deit_tiny_distilled_patch16_224", size=64, layout=TokenLayout(n_distillation=1, n_patches=16)
    ),
}
