"""Which latents answer to the same images? An order in which alike latents are neighbours, and families of them.

Alike is Pearson's correlation of sqrt of image activations, as in `cyto concept match`. Latents x images is never held:
each latent has a sketch of 256 numbers (Kane and Nelson 2014, sparse Johnson-Lindenstrauss: each image is added, with a
random sign, to one of 64 places in each of four parts). The cosine of two centred sketches is the correlation, give or
take 0.06. One pass over the images.

Order and families come from halves of halves: a set of latents is cut in two along the direction in which its sketches
differ most (principal directions, Boley 1998), refined by 2-means. The eight families are the parts after seven cuts,
each of the part that is most spread out; inside, cuts go on down to a few latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.csr import CsrRows

FAMILIES = 8  # as many colours are told apart by everybody
N_PARTS, N_PLACES = 4, 64  # of a sketch
_LEAF = 6  # latents that are ordered by their first direction, and cut no further
_POWER_STEPS = 24
_LLOYD_STEPS = 12
_LEAST_GAIN = 1e-6  # of the spread, for a cut into families
Ints = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LatentOrder:
    """The latents that are active anywhere, alike ones side by side; families are ranges of this order."""

    order: Ints  # (n_active,) latents
    family_of: npt.NDArray[np.int8]  # (n_latents,) 0, 1, ... from left to right; -1: never active
    starts: Ints  # (n_families + 1,) where each family begins in `order`

    @property
    def n_families(self) -> int:
        """At most `FAMILIES`."""
        return len(self.starts) - 1


class Sketches:
    """Sketches of all latents, filled image by image; memory: 1 kB a latent."""

    def __init__(self, n_latents: int, seed: int) -> None:
        self._sums = np.zeros((n_latents, N_PARTS * N_PLACES), np.float32)
        self._means = np.zeros(n_latents)
        self._one = np.zeros(N_PARTS * N_PLACES)  # the sketch of a latent that is 1 in every image
        self._n_images, self._seed = 0, seed

    def add(self, first: int, rows: CsrRows, is_counted: npt.NDArray[np.bool_]) -> None:
        """Add images first, first + 1, ...; `rows` holds their image activations, (images, n_latents).

        is_counted : (images,) images that are left out have False
        """
        places, signs = hashed(first, rows.n_rows, self._seed)
        values = np.sqrt(rows.values, dtype=np.float32)
        _add(rows.indptr, rows.indices, values, is_counted, places, signs, self._sums, self._means)
        some = np.flatnonzero(is_counted)
        np.add.at(self._one, places[some].ravel(), signs[some].ravel())
        self._n_images += len(some)

    def vectors(self) -> Float32s:
        """(n_latents, 256) centred sketches of norm 1; 0 of latents that do not vary."""
        means = self._means / max(1, self._n_images)
        found = self._sums - np.outer(means, self._one).astype(np.float32)
        norms = np.linalg.norm(found, axis=1)
        varies = norms > 1e-5 * np.linalg.norm(self._sums, axis=1)
        found[~varies] = 0
        found[varies] /= norms[varies, None]
        return found

    @property
    def is_active(self) -> npt.NDArray[np.bool_]:
        """(n_latents,) is it active in any image that was added?"""
        return self._means > 0


def hashed(first: int, n: int, seed: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
    """(n, 4) places in a sketch and signs of images first to first + n - 1, whatever the blocks they come in."""
    numbers = np.arange(first * N_PARTS, (first + n) * N_PARTS, dtype=np.uint64).reshape(n, N_PARTS)
    mixed: Any = numbers + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)  # Any: numpy's types take uint64 for float64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    places = (mixed % np.uint64(N_PLACES)).astype(np.int32) + np.arange(N_PARTS, dtype=np.int32) * N_PLACES
    signs = ((mixed >> np.uint64(40)) & np.uint64(1)).astype(np.int8) * 2 - 1
    return places, signs.astype(np.int8)


@numba.njit(cache=True)
def _add(
    indptr: Any, indices: Any, values: Any, is_counted: Any, places: Any, signs: Any, sums: Any, means: Any
) -> None:
    for row in range(len(indptr) - 1):
        if not is_counted[row]:
            continue
        for at in range(indptr[row], indptr[row + 1]):
            latent = indices[at]
            means[latent] += values[at]
            for part in range(places.shape[1]):
                sums[latent, places[row, part]] += signs[row, part] * values[at]


def order_latents(vectors: Float32s, is_active: npt.NDArray[np.bool_], most: int = FAMILIES) -> LatentOrder:
    """Order and families of the active latents.

    Parameters
    ----------
    vectors : (n_latents, n) of norm 1 or 0; latents are alike if the product of their vectors is large
    is_active : (n_latents,)
    """
    active = np.flatnonzero(is_active)
    family_of = np.full(len(is_active), -1, np.int8)
    if not len(active):
        return LatentOrder(active, family_of, np.zeros(1, np.int64))
    parts = [active]
    while len(parts) < most:
        spreads = np.array([_spread(vectors[part]) for part in parts])
        widest = int(spreads.argmax())
        halves = _halves(vectors, parts[widest]) if spreads[widest] > _LEAST_GAIN else None
        if halves is None:
            break
        parts[widest : widest + 1] = _turned(vectors, parts, widest, halves)
    ordered: list[Ints] = []
    for number, part in enumerate(parts):
        before = ordered[-1][-1] if ordered else None
        ordered.append(np.array(list(_in_order(vectors, part, before)), np.int64))
        family_of[part] = number
    starts = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int64)
    return LatentOrder(np.concatenate(ordered), family_of, starts)


def _spread(vectors: Float32s) -> float:
    """Squared distances from the mean, summed."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    return float((vectors.astype(np.float64) ** 2).sum() - len(vectors) * (mean**2).sum()) if len(vectors) > 1 else 0.0


def _direction(vectors: Float32s) -> Float32s:
    """(n,) the products of centred vectors with the direction in which they differ most."""
    centred = vectors - vectors.mean(axis=0)
    direction = centred[int((centred**2).sum(axis=1).argmax())].copy()
    for _ in range(_POWER_STEPS):
        direction = centred.T @ (centred @ direction)
        norm = np.linalg.norm(direction)
        if norm <= 1e-12:
            return np.zeros(len(vectors), np.float32)
        direction /= norm
    return np.asarray(centred @ direction, np.float32)


def _halves(vectors: Float32s, part: Ints) -> tuple[Ints, Ints] | None:
    """A set of latents in two, or None if they are all the same."""
    mine = vectors[part]
    along = _direction(mine)
    is_second = along > 0
    for _ in range(_LLOYD_STEPS):
        if is_second.all() or not is_second.any():
            break
        centres = np.stack([mine[~is_second].mean(axis=0), mine[is_second].mean(axis=0)])
        nearer = mine @ (centres[1] - centres[0]) > ((centres[1] ** 2).sum() - (centres[0] ** 2).sum()) / 2
        if (nearer == is_second).all() or nearer.all() or not nearer.any():
            break
        is_second = nearer
    if is_second.all() or not is_second.any():
        return None
    return part[~is_second], part[is_second]


def _turned(vectors: Float32s, parts: list[Ints], at: int, halves: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    """Two halves so that each lies beside the neighbour of the whole that it is more like."""
    means = [vectors[half].mean(axis=0) for half in halves]
    gain = 0.0
    if at:
        gain += float(vectors[parts[at - 1]].mean(axis=0) @ (means[0] - means[1]))
    if at + 1 < len(parts):
        gain += float(vectors[parts[at + 1]].mean(axis=0) @ (means[1] - means[0]))
    return halves if gain >= 0 else (halves[1], halves[0])


def _in_order(vectors: Float32s, part: Ints, before: Any) -> Iterator[int]:
    """The latents of a part, alike ones side by side, the end that is more like `before` first."""
    waiting = [part]
    while waiting:
        mine = waiting.pop()
        halves = _halves(vectors, mine) if len(mine) > _LEAF else None
        if halves is None:
            along = _direction(vectors[mine])
            mine = mine[np.lexsort((mine, along))]
            if before is not None and vectors[mine[-1]] @ vectors[before] > vectors[mine[0]] @ vectors[before]:
                mine = mine[::-1]
            yield from mine.tolist()
            before = mine[-1]
            continue
        if before is not None:
            likes = [float(vectors[half].mean(axis=0) @ vectors[before]) for half in halves]
            halves = halves if likes[0] >= likes[1] else (halves[1], halves[0])
        waiting += [halves[1], halves[0]]
