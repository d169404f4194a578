"""The maps of chosen cells: for each image and latent the patches, in 8 bits of the map's own largest value."""

import base64
from collections.abc import Sequence

import numpy as np
import scipy.sparse as ss


class Marks:
    """Maps of (image, latent) pairs, which the pass over the images fills in; memory: a byte a patch."""

    def __init__(self, pairs: Sequence[tuple[int, int]], n_patches: int) -> None:
        """pairs: sorted, each once."""
        self._place = {pair: number for number, pair in enumerate(pairs)}
        self._latents: dict[int, list[int]] = {}
        for image, latent in pairs:
            self._latents.setdefault(image, []).append(latent)
        self._shares = np.zeros((len(pairs), n_patches), np.uint8)
        self._largest = np.zeros(len(pairs), np.float32)

    def fill(self, image: int, patches: ss.csc_matrix) -> None:
        """Take the maps of one image from its patches, (n_patches, n_latents)."""
        for latent in self._latents.get(image, []):
            number = self._place[image, latent]
            some = slice(patches.indptr[latent], patches.indptr[latent + 1])
            values = patches.data[some]
            largest = float(values.max(initial=0))
            self._largest[number] = largest
            self._shares[number, patches.indices[some]] = np.round(values / (largest or 1) * 255)

    def largest(self, image: int, latent: int) -> float:
        """The largest value at a patch."""
        return float(self._largest[self._place[image, latent]])

    def packed(self, image: int, latent: int) -> str:
        """A map as base64, one byte per patch."""
        return base64.b64encode(self._shares[self._place[image, latent]].tobytes()).decode()

    def together(self, image: int, shares: Sequence[tuple[int, float]]) -> str:
        """One map of several latents, packed: at each patch the sum of their maps, each times its share."""
        total = np.zeros(self._shares.shape[1])
        for latent, share in shares:
            total += share * self._shares[self._place[image, latent]]
        largest = float(total.max(initial=0))
        return base64.b64encode(np.round(total / (largest or 1) * 255).astype(np.uint8).tobytes()).decode()
