"""From an image to the backbone's input, recorded in every cache.

DinoBloom's: RGB (alpha dropped), resize to exactly `size` x `size` whatever the aspect ratio, bilinear with
antialiasing as Pillow does it, [0, 1], ImageNet mean and standard deviation (docs/reference/paper.md 3). Other models
bring their own; what timm calls `crop_mode` and `crop_pct` may cut off a border, and `Preprocess.view` says what is
left.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stores.errors import BadInput

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_WHOLE = {"crop_mode": "squash", "crop_pct": 1.0}  # left out of a cache's identity, as before there were others
MAX_SIZE = 4096  # pixels along each side of the input
_MOST_PIXELS = 1 << 26  # of an image that is resized before its middle is taken
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the image


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How pixels become the backbone's input. Images are resized on the CPU in uint8; the rest is on the device.

    Raises BadInput for a value that is out of its range.
    """

    size: int = 224
    interpolation: str = "bilinear"  # nearest, bilinear, bicubic or lanczos
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # squash: the image becomes a square; center: its shorter side does, and what is left at both ends is cut off
    crop_mode: str = "squash"
    crop_pct: float = 1.0  # the image is resized to size / crop_pct, and the middle is taken

    def __post_init__(self) -> None:
        for name, is_good, expected in (
            ("size", type(self.size) is int and 1 <= self.size <= MAX_SIZE, f"1 to {MAX_SIZE:,} pixels"),
            ("interpolation", self.interpolation in [*_FILTERS], f"one of {', '.join(_FILTERS)}"),
            ("crop_mode", self.crop_mode in ("squash", "center"), "squash or center"),
            ("crop_pct", _is_number(self.crop_pct) and 0.5 <= self.crop_pct <= 1, "0.5 to 1"),
            ("mean", _are_three(self.mean), "three numbers"),
            ("std", _are_three(self.std) and min(self.std) > 0, "three numbers above 0"),
        ):
            if not is_good:
                raise BadInput(f"preprocessing: {name} must be {expected}; found {getattr(self, name)!r:.60}")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for a cache's identity."""
        said = {**vars(self), "mean": list(self.mean), "std": list(self.std), "color": "RGB, alpha dropped"}
        return {name: value for name, value in said.items() if name not in _WHOLE or self._is_cropped}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`; what is missing has its default.

        Raises
        ------
        BadInput
            If a value is none that this version knows.
        """
        known = {name: said[name] for name in vars(cls()) if name in said}
        for name in ("mean", "std"):
            if isinstance(known.get(name), list):
                known[name] = tuple(known[name])
        return cls(**known)

    @classmethod
    def seen_in(cls, transform: Mapping[str, Any] | None) -> "Preprocess":
        """For a cache's `transform`, also one that this version does not know: what is needed for `view`."""
        said = transform or {}
        return cls.from_dict({name: said[name] for name in ("size", *_WHOLE) if name in said and "crop_mode" in said})

    @property
    def cropped_text(self) -> str:
        """What of an image the backbone does not see, in words; "" if it sees all of it."""
        if not self._is_cropped:
            return ""
        border = f"{1 - self.crop_pct:.1%} of the height and width" if self.crop_pct < 1 else ""
        ends = "the ends of images that are no squares" if self.crop_mode == "center" else ""
        return (
            f"the model's own preprocessing cuts off {' and '.join(filter(None, (border, ends)))}; --crop none keeps "
            f"whole images, squeezed to a square"
        )

    @property
    def _is_cropped(self) -> bool:
        return (self.crop_mode, self.crop_pct) != ("squash", 1.0)

    def view(self, width: int, height: int) -> Box:
        """The part of an image of this size that the backbone sees; patches divide it evenly."""
        if not self._is_cropped:
            return 0.0, 0.0, float(width), float(height)
        across, down, left, top = self._scaled(width, height)
        x, y = width / across, height / down
        return left * x, top * y, (left + self.size) * x, (top + self.size) * y

    def _scaled(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Width and height after resizing, and the left and top of what is taken of it, rounded as torchvision does."""
        scaled = math.floor(self.size / self.crop_pct)
        across, down = scaled, scaled
        if self.crop_mode == "center":
            across = scaled if width <= height else int(scaled * width / height)
            down = scaled if height <= width else int(scaled * height / width)
        return across, down, round((across - self.size) / 2.0), round((down - self.size) / 2.0)

    def resize(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        """(size, size, 3) uint8 of an RGB picture. Memory: at most `_MOST_PIXELS`, whatever the aspect ratio."""
        method = _FILTERS[self.interpolation]
        if not self._is_cropped:
            return np.asarray(picture.resize((self.size, self.size), method), np.uint8)
        across, down, left, top = self._scaled(*picture.size)
        if across * down <= _MOST_PIXELS:
            resized = picture.resize((across, down), method)
            return np.asarray(resized.crop((left, top, left + self.size, top + self.size)), np.uint8)
        # a long strip: only what is taken of it; may differ in the last bits
        return np.asarray(picture.resize((self.size, self.size), method, box=self.view(*picture.size)), np.uint8)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _are_three(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))
