"""Which patches of an image show background, told from the picture alone.

The rule: a stained cell takes light away from at least one of red, green and blue, and the ground does not. A picture
is averaged to 4 x 4 points a patch; of each point the darkest of the three, as a share of its 95% quantile in the
picture, which is the light of the ground. Of these shares in a sample of the pictures Otsu's threshold (1979) parts
what is dark (nuclei, red cells) from the rest, and a second one, of the rest, parts pale matter from ground. Ground
that matter encloses, as the pale middle of a red cell, is cell. A patch is ground if at least half of its points are.

As in `cyto sae train --background`, ground must be commoner in the corners of the pictures (the tenth of the patches
that are farthest from the middle) than in the rest, by a tenth: of dark pictures, or of other objects, it is not told.
Known are pixels, and no segmentation: matter is any cell, also a neighbour. Beside masks: `cyto concept masks`.
What a latent lies on: lies_on.py. Nuclei: nucleus.py.
Twin: test_ground.py; measured: bench/background.py has the same rule with masks of each pixel.
"""

import math
from collections.abc import Callable, Iterable, Sequence

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
Points = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Float32s = npt.NDArray[np.float32]


def points_of(picture: Pixels, side: int) -> Points:
    """(4 side, 4 side, 3): a picture averaged to 4 x 4 points a patch, stretched as its map is."""
    small = Image.fromarray(picture).convert("RGB").resize((_POINTS * side,) * 2, Image.Resampling.BOX)
    return np.asarray(small)


def light_of(points: Points) -> Float32s:
    """(4 side, 4 side): the darkest of red, green and blue at each point, as a share of the light of the ground."""
    return share_of_light(points.min(axis=2))


def share_of_light(values: Points) -> Float32s:
    """Of numbers of one picture their shares of the 95% quantile, which is the light of the ground."""
    light = values.astype(np.float32)
    return light / max(1.0, float(np.quantile(light, 0.95)))


def ground_of(light: Float32s, threshold: float) -> Bools:
    """(patches,) of one picture, row by row: is it ground?"""
    return mostly(~ndimage.binary_fill_holes(light < threshold))


def mostly(points: Bools) -> Bools:
    """(patches,) are at least half of the points of each true?"""
    side = len(points) // _POINTS
    return np.asarray(points.reshape(side, _POINTS, side, _POINTS).mean(axis=(1, 3)).ravel() >= 0.5, bool)


def ground_threshold(pictures: Sequence[Points], side: int) -> float | None:
    """The share of light below which a point is matter, from a sample of pictures; None: ground is not told.

    pictures : of `points_of`
    """
    light = [light_of(points) for points in pictures] if side >= _LEAST_SIDE else []
    if not light:
        return None
    values = np.concatenate([each.ravel() for each in light])
    rest = values[values > otsu(values)]
    if not len(rest):
        return None
    threshold = otsu(rest)
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


def otsu(values: Float32s) -> float:
    """The edge of 256 equal bins with the largest variance between the two sides (Otsu 1979)."""
    counts, edges = np.histogram(values, _BINS)
    centres, n_low = (edges[:-1] + edges[1:]) / 2, np.cumsum(counts)[:-1]
    sums, n_high = np.cumsum(counts * centres), counts.sum() - n_low
    between = n_low * n_high * (sums[:-1] / np.maximum(1, n_low) - (sums[-1] - sums[:-1]) / np.maximum(1, n_high)) ** 2
    return float(edges[1 + int(between.argmax())])
