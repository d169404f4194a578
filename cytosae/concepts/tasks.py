"""What Dask's workers do for concepts, once the images are counted: add up images, and keep the largest activations.

A task is a function of paths and plain values, and can be done twice. What comes back is a few numbers per latent.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cytosae.barcodes import LatentSums, LevelParts, opener, split_by_part

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TopImages:
    """Per latent its largest image activations, falling; of equal ones the image of the smaller number comes first.

    A total order: the same images stay, however images are divided among tasks.
    """

    value: npt.NDArray[np.float32]  # (n_latents, top_k); 0 where there is no image
    image: Ints  # (n_latents, top_k); -1 where there is no image

    @staticmethod
    def zeros(n_latents: int, top_k: int) -> "TopImages":
        """Of no images."""
        return TopImages(np.zeros((n_latents, top_k), np.float32), np.full((n_latents, top_k), -1, np.int64))

    def add_images(self, counts: Any, images: Ints, numbers: Ints) -> None:
        """Add rows `images` of a part of images, which have these numbers."""
        _add_images(counts["indptr"], counts["latent"], counts["mean"], images, numbers, self.value, self.image)

    def add(self, other: "TopImages") -> None:
        """Add what another one has kept, of other images."""
        _add(other.value, other.image, self.value, self.image)


def sum_images(
    images: Ints, numbers: Ints, below: LevelParts, n_latents: int, top_k: int
) -> tuple[LatentSums, TopImages]:
    """Sums over some images, in the order given, and their largest activations.

    Parameters
    ----------
    images : (n,) rows of the parts of `below`, which hold counted images one below the other
    numbers : (n,) what TopImages calls them; of equal activations the smaller number comes first
    below : where the parts lie
    """
    opened = opener(below)
    sums, top, at = LatentSums.zeros(1, n_latents), TopImages.zeros(n_latents, top_k), 0
    for part, rows in split_by_part(images, below.bounds):
        sums.add_images(opened(part), rows)
        top.add_images(opened(part), rows, numbers[at : at + len(rows)])
        at += len(rows)
    return sums, top


@numba.njit(cache=True)
def _insert(value: Any, image: Any, top_value: Any, top_image: Any) -> None:
    """Into one latent's list, if it is large enough."""
    at = len(top_value)
    while at > 0 and (top_value[at - 1] < value or (top_value[at - 1] == value and top_image[at - 1] > image)):
        at -= 1
    for k in range(len(top_value) - 1, at, -1):
        top_value[k], top_image[k] = top_value[k - 1], top_image[k - 1]
    if at < len(top_value):
        top_value[at], top_image[at] = value, image


@numba.njit(cache=True)
def _add_images(indptr: Any, latent: Any, mean: Any, images: Any, numbers: Any, top_value: Any, top_image: Any) -> None:
    for i in range(len(images)):
        for k in range(indptr[images[i]], indptr[images[i] + 1]):
            _insert(mean[k], numbers[i], top_value[latent[k]], top_image[latent[k]])


@numba.njit(cache=True)
def _add(value: Any, image: Any, top_value: Any, top_image: Any) -> None:
    for s in range(len(value)):
        for k in range(value.shape[1]):
            if image[s, k] >= 0:
                _insert(value[s, k], image[s, k], top_value[s], top_image[s])
