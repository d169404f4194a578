"""From an image to the backbone's input: the released preprocessing, recorded in every cache.

RGB (alpha dropped), resize to exactly `size` x `size` whatever the aspect ratio, bilinear with antialiasing as Pillow
does it, [0, 1], ImageNet mean and standard deviation (docs/reference/paper.md 3).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How pixels become the backbone's input. Images are resized on the CPU in uint8; the rest is on the device."""

    size: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for a cache's identity."""
        return {**vars(self), "mean": list(self.mean), "std": list(self.std), "color": "RGB, alpha dropped"}

    def resize(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        """(size, size, 3) uint8 of an RGB picture."""
        resized = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(resized, np.uint8)
