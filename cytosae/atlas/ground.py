"""Which patches of an image show background, told from the picture alone: is a latent on the cell, or beside it?

The rule: a stained cell takes light away from at least one of red, green and blue, and the ground does not. A picture
is averaged to 4 x 4 points a patch; of each point the darkest of the three, as a share of its 95% quantile in the
picture, which is the light of the ground. Of these shares in a sample of the pictures Otsu's threshold (1979) parts
what is dark (nuclei, red cells) from the rest, and a second one, of the rest, parts pale matter from ground. Ground
that matter encloses, as the pale middle of a red cell, is cell. A patch is ground if at least half of its points are.

As in `cyto sae train --background`, ground must be commoner in the corners of the pictures (the tenth of the patches
that are farthest from the middle) than in the rest, by a tenth: of dark pictures, or of other objects, it is not told.
Known are pixels, and no segmentation: matter is any cell, also a neighbour. Beside masks: `cyto concept masks`.
Twin: test_ground.py; measured: bench/background.py has the same rule with masks of each pixel.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from cytosae.maps import Pixels

SAMPLE = 256  # pictures that the threshold is taken from
_LEAST_SIDE = 3  # patches
_POINTS = 4  # of a patch, on each side
_BINS = 256
_LEAST_DIFFERENCE = 0.1  # of the shares of ground in the corners and elsewhere
_STRONG = 128  # of 255: patches with at least half of the largest value
_MOSTLY = 0.75  # of the strongest patches
ON = ("", "the cell", "both", "the background", "one place")  # as in gallery.js
ONE_PLACE = 4  # in `ON`: at the same patch of every image, whatever is there
TURN = (1, 0, 1, 2, 3)  # of each in `ON`: which are shown first
Maps8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Share:
    """How much of a latent lies on background, means over its reference images."""

    strongest: float  # of the patches with at least half of the image's largest value
    all: float  # of all patches of these images: what chance gives


class Ground:
    """The ground of images, filled image by image; a bit for each patch."""

    def __init__(self, n_images: int, side: int, threshold: float | None) -> None:
        """threshold : of `ground_threshold`; None: it is not told"""
        self.threshold, self._side = threshold, side
        self._is_seen = np.zeros(n_images, bool)
        self._bits = np.zeros((n_images, (side**2 + 7) // 8), np.uint8)

    def fill(self, number: int, picture: Pixels) -> None:
        """Look at one picture."""
        if self.threshold is not None:
            self._is_seen[number] = True
            self._bits[number] = np.packbits(ground_of(light_of(picture, self._side), self.threshold))

    def of(self, number: int) -> Bools | None:
        """(patches,) is it ground? None: not told, or not seen."""
        if number < 0 or not self._is_seen[number]:
            return None
        return np.unpackbits(self._bits[number], count=self._side**2).astype(bool)

    def share(self, numbers: Iterable[int], maps: Maps8) -> Share | None:
        """Of a latent from the maps (images, patches) of its reference images; None: not told of any of them.

        numbers : of each image, as of `fill`; -1: it has none
        """
        found = []
        for number, steps in zip(numbers, maps, strict=True):
            is_ground = self.of(number)
            if is_ground is not None and steps.any():
                found.append((float(is_ground[steps >= _STRONG].mean()), float(is_ground.mean())))
        return Share(*np.mean(found, axis=0).tolist()) if found else None


def on(share: Share | None) -> int:
    """Number in `ON` of where a latent lies; 0: not told."""
    if share is None:
        return 0
    return 3 if share.strongest >= _MOSTLY else 1 if share.strongest <= 1 - _MOSTLY else 2


def light_of(picture: Pixels, side: int) -> Floats:
    """(4 side, 4 side): the darkest of red, green and blue at each point, as a share of the light of the ground."""
    small = Image.fromarray(picture).convert("RGB").resize((_POINTS * side,) * 2, Image.Resampling.BOX)
    darkest = np.asarray(small).min(axis=2).astype(np.float32)
    return darkest / max(1.0, float(np.quantile(darkest, 0.95)))


def ground_of(light: Floats, threshold: float) -> Bools:
    """(patches,) of one picture, row by row: is it ground?"""
    side = len(light) // _POINTS
    matter = ndimage.binary_fill_holes(light < threshold)
    share = 1 - matter.reshape(side, _POINTS, side, _POINTS).mean(axis=(1, 3))
    return np.asarray(share.ravel() >= 0.5, bool)


def ground_threshold(pictures: Iterable[Pixels], side: int) -> float | None:
    """The share of light below which a point is matter, from a sample of pictures; None: ground is not told."""
    light = [light_of(picture, side) for picture in pictures] if side >= _LEAST_SIDE else []
    if not light:
        return None
    values = np.concatenate([each.ravel() for each in light])
    rest = values[values > _otsu(values)]
    if not len(rest):
        return None
    threshold = _otsu(rest)
    ground, is_corner = np.stack([ground_of(each, threshold) for each in light]), _corners(side)
    differs = float(ground[:, is_corner].mean() - ground[:, ~is_corner].mean()) >= _LEAST_DIFFERENCE
    return threshold if differs else None


def sampled(images: npt.NDArray[np.int64], find: Callable[[int], Pixels | str]) -> Iterable[Pixels]:
    """The pictures of evenly spaced images that can be read."""
    chosen = np.unique(np.linspace(0, max(0, len(images) - 1), min(SAMPLE, len(images))).astype(np.int64))
    for image in np.sort(images)[chosen].tolist():
        picture = find(image)
        if not isinstance(picture, str):
            yield picture


def _corners(side: int) -> Bools:
    """(patches,) the tenth that is farthest from the middle; as far ones are, too."""
    from_middle = np.square(2 * np.arange(side) - (side - 1))  # four times the square: whole numbers
    distance = np.add.outer(from_middle, from_middle).ravel()
    return np.asarray(distance >= np.sort(distance)[-math.ceil(side**2 / 10)], bool)


def _otsu(values: Floats) -> float:
    """The edge of 256 equal bins with the largest variance between the two sides (Otsu 1979)."""
    counts, edges = np.histogram(values, _BINS)
    centres, n_low = (edges[:-1] + edges[1:]) / 2, np.cumsum(counts)[:-1]
    sums, n_high = np.cumsum(counts * centres), counts.sum() - n_low
    between = n_low * n_high * (sums[:-1] / np.maximum(1, n_low) - (sums[-1] - sums[:-1]) / np.maximum(1, n_high)) ** 2
    return float(edges[1 + int(between.argmax())])
