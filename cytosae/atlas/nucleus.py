"""Which patches of an image show the nucleus, told from the picture alone, of stains after Romanowsky (Wright, Giemsa).

The rule: chromatin is violet and dark. It takes away red and green light; a red cell, and the granules of an
eosinophil, take away blue and green, and hardly any red; the blue of cytoplasm leaves more of the green. So of the
points that are matter (ground.py) those count that have lost a larger share of red than of blue, each channel beside
its own light of the ground, so that white balance and brightness cancel. Of their green light Otsu's threshold (1979),
over a sample of the pictures, parts nuclei from cytoplasm and most platelets. Dark points that touch, or leave room for
two points at most, are one piece. What is smaller than a sixth of the usual piece, in pixels of the picture, is a
platelet or a granule: a platelet has a third of a nucleus's diameter or less. Usual is the piece in which the middle
of all area lies, the pieces in a row by size. A patch is nucleus if at least half of its points are.

It is not told where the ground is not, and where what was found is no chromatin: it must take away two fifths of the
green light, leave less of it than the other violet points by 0.15, and less of the red than of the blue by 0.05, means
over the sample. So red cells or platelets alone have no nucleus, nor have grey pictures. Known are pixels: granules of
basophils and dark cytoplasm of blasts look like chromatin, and pictures that were all resized to one size have lost
what tells a platelet from a nucleus. Beside masks: `cyto concept masks`. Twin: test_nucleus.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from .ground import Bools, Float32s, Points, light_of, mostly, otsu, share_of_light

_SMALLEST = 1 / 6  # of the usual piece
_MOST_GREEN = 0.6  # that chromatin leaves of the light
_LESS_GREEN = 0.15  # than other violet points
_LESS_RED = 0.05  # than blue
_RED, _GREEN, _BLUE = range(3)
_AROUND = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Chromatin:
    """What is taken for a nucleus."""

    green: float  # share of the light: what leaves less is dark enough
    smallest: float  # pixels of the picture: a smaller piece is none


def chromatin_of(pictures: Sequence[Points], sizes: Sequence[int], ground: float | None) -> Chromatin | None:
    """The rule's numbers from a sample of pictures; None: nuclei are not told.

    pictures : of `points_of`
    sizes : pixels of each picture as it was before
    ground : of `ground_threshold`
    """
    if ground is None or not pictures:
        return None
    light = [_channels(points) for points in pictures]
    is_violet = [_violet(points, each, ground) for points, each in zip(pictures, light, strict=True)]
    violet = np.concatenate([each[where] for each, where in zip(light, is_violet, strict=True)])
    if not len(violet):
        return None
    green = otsu(violet[:, _GREEN])
    is_dark = [where & (each[..., _GREEN] < green) for each, where in zip(light, is_violet, strict=True)]
    areas = [_pieces(dark)[1] * size / dark.size for dark, size in zip(is_dark, sizes, strict=True)]
    found = Chromatin(green, _SMALLEST * _usual(np.concatenate(areas)))
    is_nucleus = [_large(dark, size, found.smallest) for dark, size in zip(is_dark, sizes, strict=True)]
    nuclei = np.concatenate([each[where] for each, where in zip(light, is_nucleus, strict=True)])
    pale = violet[violet[:, _GREEN] >= green, _GREEN]
    if not len(nuclei) or not len(pale):
        return None
    left = nuclei.mean(axis=0)
    is_chromatin = left[_GREEN] <= min(_MOST_GREEN, pale.mean() - _LESS_GREEN) and left[_BLUE] - left[_RED] >= _LESS_RED
    return found if is_chromatin else None


def nucleus_of(points: Points, size: int, ground: float, chromatin: Chromatin) -> Bools:
    """(patches,) of one picture, row by row: is it nucleus?

    points, size : of `points_of`, and the pixels of the picture before
    """
    light = _channels(points)
    is_dark = _violet(points, light, ground) & (light[..., _GREEN] < chromatin.green)
    return mostly(_large(is_dark, size, chromatin.smallest))


def _channels(points: Points) -> Float32s:
    """(4 side, 4 side, 3): red, green and blue, each as a share of its own light of the ground."""
    return np.stack([share_of_light(points[..., channel]) for channel in range(3)], axis=2)


def _violet(points: Points, light: Float32s, ground: float) -> Bools:
    return np.asarray((light_of(points) < ground) & (light[..., _RED] < light[..., _BLUE]), bool)


def _pieces(is_dark: Bools) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The number of each point's piece, 0 for none, and the points of each piece from 1 on."""
    pieces, n = ndimage.label(ndimage.binary_dilation(is_dark, _AROUND), _AROUND)
    pieces = np.where(is_dark, pieces, 0).astype(np.int32)
    return pieces, np.bincount(pieces.ravel(), minlength=n + 1)[1:]


def _large(is_dark: Bools, size: int, smallest: float) -> Bools:
    """The points of pieces that are large enough."""
    pieces, counts = _pieces(is_dark)
    return np.asarray(np.append(False, counts * size / is_dark.size >= smallest)[pieces], bool)


def _usual(areas: npt.NDArray[np.float64]) -> float:
    """The area of the piece in which the middle of all area lies, by size."""
    ordered = np.sort(areas)
    total = np.cumsum(ordered)
    return float(ordered[np.searchsorted(total, total[-1] / 2)]) if len(ordered) else 0.0
