"""One pass over the latents: how frequent each one is, how large, and the first images in which it is active.

The pass reads a latent store, or encodes the cache. Only tokens that may be edited count. What is kept of an image are
sums, and for each latent the `n_kept` active images that come first in a given order, so memory does not depend on the
number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stores.csr import CsrRows
from stores.latent_store import LatentStore
from stores.progress import Progress

from .places import Ints, Places

Floats = npt.NDArray[np.float64]
_TOGETHER = 32  # images of a store that are read at once
_NONE = np.iinfo(np.int64).max


class LatentSource(Protocol):
    """Where the latents of an image come from."""

    def rows(self, images: Ints) -> Iterator[tuple[int, CsrRows]]:
        """(image index, its rows, one per token) of these images, which rise."""


@dataclass(frozen=True)
class StoredLatents:
    """The latents of a store."""

    store: LatentStore

    def rows(self, images: Ints) -> Iterator[tuple[int, CsrRows]]:
        """As `LatentSource`. Memory: the nonzeros of a few images."""
        per_image = self.store.spec.tokens_per_image
        at = 0
        while at < len(images):
            first = int(images[at])
            stop = int(np.searchsorted(images, first + _TOGETHER))
            found = self.store.read_images(first, int(images[stop - 1]) + 1)
            for image in images[at:stop].tolist():
                yield image, image_rows(found, (image - first) * per_image, per_image)
            at = stop


@dataclass(frozen=True)
class Survey:
    """What is known of L latents: counts over the tokens that may be edited."""

    n_images: int  # that were looked at
    n_tokens: int
    n_images_active: Ints  # (L,)
    n_tokens_active: Ints  # (L,)
    total: Floats  # (L,) sum of the values
    square: Floats  # (L,) sum of the squared values
    images: Ints  # (L, n_kept) active images, the first ones in the order; -1 where there are no more

    @property
    def mean(self) -> Floats:
        """(L,) mean value over all tokens that may be edited."""
        return self.total / max(1, self.n_tokens)

    def norms(self, decoder_norms: Floats) -> Floats:
        """(L,) root mean square over its active images of the norm of what a latent adds to them."""
        return decoder_norms * np.sqrt(self.square / np.maximum(self.n_images_active, 1))

    def arrays(self) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.float64]]:
        """For a part file."""
        found = {name: getattr(self, name) for name in ("n_images_active", "n_tokens_active", "total", "square")}
        return {**found, "images": self.images, "sizes": np.array([self.n_images, self.n_tokens], np.int64)}


def image_rows(rows: CsrRows, first: int, n: int) -> CsrRows:
    """`n` rows from row `first` on, as rows of their own that share the memory."""
    begin, end = int(rows.indptr[first]), int(rows.indptr[first + n])
    return CsrRows(rows.indices[begin:end], rows.values[begin:end], rows.indptr[first : first + n + 1] - begin)


def tokens_of(rows: CsrRows) -> Ints:
    """(nnz,) the token of each nonzero."""
    return np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))


def take_survey(
    source: LatentSource, images: Ints, places: Places, order: Ints, *, n_latents: int, n_kept: int, progress: Progress
) -> Survey:
    """Count the latents of `images` (rising).

    Parameters
    ----------
    order : (n_images of the cache,) the place of each image in the order that decides which images are kept
    """
    n_images_active, n_tokens_active = np.zeros((2, n_latents), np.int64)
    total, square = np.zeros((2, n_latents))
    kept = np.full((n_latents, n_kept), _NONE)  # places in the order
    last = kept.max(1)
    n_tokens = 0
    for n_done, (image, rows) in enumerate(source.rows(images), start=1):
        mask = places.mask(image)
        counts = mask[tokens_of(rows)]
        latents, values = rows.indices[counts].astype(np.int64), rows.values[counts].astype(np.float64)
        n_tokens += int(mask.sum())
        active, which = np.unique(latents, return_inverse=True)
        n_images_active[active] += 1
        n_tokens_active[active] += np.bincount(which, minlength=len(active))
        total[active] += np.bincount(which, values, len(active))
        square[active] += np.bincount(which, values**2, len(active))
        place = order[image]
        earlier = active[place < last[active]]
        kept[earlier, kept[earlier].argmax(1)] = place
        last[earlier] = kept[earlier].max(1)
        progress(n_done, len(images), "")
    kept.sort(1)
    image_at = np.append(np.argsort(order, kind="stable"), -1)  # of images that are not looked at the place is not used
    found = image_at[np.where(kept == _NONE, len(order), kept)]
    return Survey(len(images), n_tokens, n_images_active, n_tokens_active, total, square, found)
