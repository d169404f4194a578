"""Which images are most alike among many? The fingerprints of all of them, each against each. Twin: test_search.py.

Fingerprints and cosines are those of a search for one image (kernels.py). An image is compared only with images that
have a latent of its fingerprint: their lists are kept by latent, so that the work is the number of such pairs.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.barcode_store import BarcodeStore
from stores.csr import CsrRows
from stores.errors import DamagedStore
from stores.machine import n_cores

Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_AT_ONCE = 1024  # images that one thread looks for at a time


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """The fingerprints of some images: their latents, largest weighted value first, as vectors of norm 1."""

    latents: npt.NDArray[np.int32]  # (images, k); -1 where there are fewer
    values: Float32s  # (images, k); 0 there

    @classmethod
    def empty(cls, n_images: int, k: int) -> "Fingerprints":
        """Of images that were not read yet."""
        return cls(np.full((n_images, k), -1, np.int32), np.zeros((n_images, k), np.float32))

    def fill(self, first: int, rows: CsrRows, weights: Float32s) -> None:
        """Those of the images from `first` on; rows are their mean activations, weights (latents,)."""
        last = first + rows.n_rows
        _fill(rows.indptr, rows.indices, rows.values, weights, self.latents[first:last], self.values[first:last])

    def take(self, images: Ints) -> "Fingerprints":
        """Those of some images, in this order."""
        return Fingerprints(self.latents[images], self.values[images])


def rarity(store: BarcodeStore, tau: float | None, n_readable: int) -> Float32s:
    """(latents,) what a latent weighs: ln((n + 1) / (images with it + 1)), 0 for one that every image has.

    Raises
    ------
    DamagedStore
        If the table of latents lacks the number of images.
    """
    latents = store.read_element("image", "var", tau)
    if "n_active_images" not in latents.columns:
        raise DamagedStore(f"{store.path('image', tau)} has no column n_active_images; count again with cyto barcode")
    with_it = latents["n_active_images"].to_numpy(np.float64)
    found: Float32s = np.log((n_readable + 1) / (with_it + 1)).clip(0).astype(np.float32)
    return found


def nearest_among(
    given: Fingerprints, owner: Ints, content: Ints, *, top: int, queries: Ints | None = None
) -> tuple[npt.NDArray[np.int32], Float32s]:
    """The most similar of these images for each of them: (images, 2, top) their positions, -1: none, and cosines.

    First those of any patient, then those of other patients. Of equal images the earlier one comes first. Memory: the
    lists by latent (8 bytes an entry), and a number for each image and thread.

    Parameters
    ----------
    owner : (images,) the patient of each; a negative number: nobody's, which is another patient than all
    content : (images,) a number for each content; images of the same content are not listed for each other
    queries : positions of the images that others are looked for; None: all of them
    """
    queries = np.arange(len(given.latents)) if queries is None else queries
    used = given.latents >= 0
    n_latents = int(given.latents.max(initial=-1)) + 1
    starts = np.r_[0, np.cumsum(np.bincount(given.latents[used], minlength=n_latents))].astype(np.int64)
    order = np.argsort(given.latents[used], kind="stable")
    images = np.nonzero(used)[0][order].astype(np.int32)
    values = given.values[used][order]
    found = np.full((len(queries), 2, top), -1, np.int32)
    scores = np.zeros((len(queries), 2, top), np.float32)

    def task(first: int) -> None:
        some = slice(first, first + _AT_ONCE)
        lists = found[some], scores[some]
        _nearest(queries[some], given.latents, given.values, starts, images, values, owner, content, *lists)

    with ThreadPoolExecutor(n_cores(), thread_name_prefix="alike") as threads:
        for _ in threads.map(task, range(0, len(queries) if top else 0, _AT_ONCE)):
            pass
    return found, scores


@numba.njit(cache=True, nogil=True)
def _fill(indptr: Any, indices: Any, values: Any, weights: Any, which: Any, best: Any) -> None:
    k = which.shape[1]
    for row in range(len(indptr) - 1):
        n = 0
        for at in range(indptr[row], indptr[row + 1]):
            value = values[at] * weights[indices[at]]
            if value <= 0 or (n == k and value <= best[row, k - 1]):
                continue
            n = min(n + 1, k)
            place = n - 1
            while place > 0 and best[row, place - 1] < value:
                best[row, place] = best[row, place - 1]
                which[row, place] = which[row, place - 1]
                place -= 1
            best[row, place] = value
            which[row, place] = indices[at]
        squares = 0.0
        for place in range(n):
            squares += best[row, place] * best[row, place]
        for place in range(n):
            best[row, place] = np.float32(best[row, place] / np.sqrt(squares))


@numba.njit(cache=True, nogil=True)
def _nearest(
    queries: Any, latents: Any, parts: Any, starts: Any, images: Any, values: Any, owner: Any, content: Any, found: Any,
    scores: Any,
) -> None:  # fmt: skip
    n_images, k, top = latents.shape[0], latents.shape[1], found.shape[2]
    cosine = np.zeros(n_images, np.float32)
    for query in range(len(queries)):
        image = queries[query]
        cosine[:] = 0
        for place in range(k):
            latent = latents[image, place]
            if latent < 0:
                break
            part = parts[image, place]
            for at in range(starts[latent], starts[latent + 1]):
                cosine[images[at]] += part * values[at]
        for other in range(n_images):
            score = cosine[other]
            if score <= scores[query, 1, top - 1] and score <= scores[query, 0, top - 1]:
                continue
            if other == image or content[other] == content[image]:
                continue
            for kind in range(2):
                if kind == 1 and owner[image] >= 0 and owner[other] == owner[image]:
                    continue
                if score <= scores[query, kind, top - 1]:
                    continue
                at = top - 1
                while at > 0 and scores[query, kind, at - 1] < score:
                    scores[query, kind, at] = scores[query, kind, at - 1]
                    found[query, kind, at] = found[query, kind, at - 1]
                    at -= 1
                scores[query, kind, at] = score
                found[query, kind, at] = other
