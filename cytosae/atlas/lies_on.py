"""What a latent lies on: nucleus, cell or background, by the patches of its reference images in which it is strongest.

What each patch shows is told from the picture alone: ground.py, nucleus.py. On the background or on the nucleus is a
latent of whose strongest patches three quarters are. As a cell may be nucleus almost everywhere, the nucleus must
also be commoner there than in all patches of these images that show cells: at most half as many may be off it. Of fewer
than three images it is not told: one strong patch lies on something by chance.
Cytoplasm is not told: what is neither ground nor nucleus may be a red cell or a platelet.
Twin: test_lies_on.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cytosae.maps import Pixels

from .ground import Bools, Points, ground_of, ground_threshold, light_of, points_of, sampled
from .nucleus import Chromatin, chromatin_of, nucleus_of

_STRONG = 128  # of 255: patches with at least half of the largest value
_MOSTLY = 0.75  # of the strongest patches
_LEAST_IMAGES = 3  # in which the latent is active
_OFF = 0.5  # times as many of the strongest patches off the nucleus as of all cells' patches
ON = ("", "the nucleus", "the cell", "both", "the background", "one place")  # as in gallery.js
ONE_PLACE = 5  # in `ON`: at the same patch of every image, whatever is there
TURN = (1, 0, 0, 1, 2, 3)  # of each in `ON`: which are shown first
Maps8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Share:
    """How much of a latent lies on background and on nuclei, means over its reference images."""

    strongest: float  # background of the patches with at least half of the image's largest value
    all: float  # background of all patches of these images: what chance gives
    nucleus: float | None = None  # nucleus of the strongest patches; None: not told
    nucleus_of_cells: float = 0.0  # nucleus of all patches of these images that are no background


@dataclass(frozen=True)
class Rules:
    """What tells the patches of these pictures; None: it does not."""

    ground: float | None = None  # of `ground_threshold`
    chromatin: Chromatin | None = None


class PatchKinds:
    """Ground and nucleus of images, filled image by image; two bits for each patch."""

    def __init__(self, n_images: int, side: int, rules: Rules | None = None) -> None:
        self.rules, self._side = rules or Rules(), side
        self._is_seen = np.zeros(n_images, bool)
        self._bits = np.zeros((2, n_images, (side**2 + 7) // 8), np.uint8)

    def fill(self, number: int, picture: Pixels) -> None:
        """Look at one picture."""
        if self.rules.ground is None:
            return
        self._is_seen[number] = True
        points, chromatin = points_of(picture, self._side), self.rules.chromatin
        self._bits[0, number] = np.packbits(ground_of(light_of(points), self.rules.ground))
        if chromatin is not None:
            self._bits[1, number] = np.packbits(nucleus_of(points, _size(picture), self.rules.ground, chromatin))

    def of(self, number: int) -> tuple[Bools, Bools] | None:
        """(patches,) is it ground, is it nucleus? None: not told, or not seen."""
        if number < 0 or not self._is_seen[number]:
            return None
        ground, nucleus = (np.unpackbits(bits[number], count=self._side**2).astype(bool) for bits in self._bits)
        return ground, nucleus

    def share(self, numbers: Iterable[int], maps: Maps8) -> Share | None:
        """Of a latent from the maps (images, patches) of its reference images; None: not told, or of too few of them.

        numbers : of each image, as of `fill`; -1: it has none
        """
        found = []
        for number, steps in zip(numbers, maps, strict=True):
            kinds = self.of(number)
            if kinds is not None and steps.any():
                (is_ground, is_nucleus), is_strong = kinds, steps >= _STRONG
                of_cells = float(is_nucleus[~is_ground].mean()) if not is_ground.all() else 0.0
                strongest = [float(is_kind[is_strong].mean()) for is_kind in kinds]
                found.append((strongest[0], float(is_ground.mean()), strongest[1], of_cells))
        if len(found) < _LEAST_IMAGES:
            return None
        strongest, of_all, nucleus, of_cells = np.mean(found, axis=0).tolist()
        return Share(strongest, of_all, None if self.rules.chromatin is None else nucleus, of_cells)


def on(share: Share | None) -> int:
    """Number in `ON` of where a latent lies; 0: not told."""
    if share is None:
        return 0
    if share.strongest >= _MOSTLY:
        return 4
    if share.nucleus is not None and 1 - share.nucleus <= min(1 - _MOSTLY, _OFF * (1 - share.nucleus_of_cells)):
        return 1
    return 2 if share.strongest <= 1 - _MOSTLY else 3


def rules_of(images: npt.NDArray[np.int64], find: Callable[[int], Pixels | str], side: int) -> Rules:
    """From a sample of the images, each read once."""
    points: list[Points] = []
    sizes = []
    for picture in sampled(images, find):
        points.append(points_of(picture, side))
        sizes.append(_size(picture))
    ground = ground_threshold(points, side)
    return Rules(ground, chromatin_of(points, sizes, ground))


def _size(picture: Pixels) -> int:
    """Pixels."""
    return int(picture.shape[0] * picture.shape[1])
