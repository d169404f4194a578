"""Counting latents, compiled: tokens to images in one pass over the nonzeros, images to groups in another.

One thread; Dask runs several processes. Sums over the tokens of an image run in token order, sums over the images of a
group in the order given, so nothing depends on how the work was cut. Twins: tests/reference.py.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.errors import DamagedStore

TOKEN_SETS = ("all", "patch", "cls")
_DONE, _MORE_ENTRIES, _MORE_ROOM, _DAMAGED = range(4)
_WORD = 8  # bytes that are looked at together in search of the latents of an image

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageCounts:
    """Sparse rows of images: entry k belongs to `latent[k]`; image i holds entries indptr[i]..indptr[i + 1]."""

    indptr: Ints  # (n_images + 1,)
    latent: npt.NDArray[Any]  # (entries,) unsigned, rising in an image
    count: npt.NDArray[Any]  # (n_taus, entries) unsigned: tokens of the set above tau; may be 0
    max: npt.NDArray[np.float32]  # (entries,) over the tokens of the set
    mean: npt.NDArray[np.float32]  # (entries,) over all tokens of the set; never 0
    n_above: npt.NDArray[np.int32]  # (n_taus, n_images): latents with a count
    n_values: int  # nonzeros that were looked at


class ImageCounter:
    """Counts the token rows of whole images, given in pieces. Memory: its result, and a few numbers per latent.

    Parameters
    ----------
    row_starts : (n_rows + 1,) numbers of the rows' first entries; rising; `tokens_per_image` rows an image, CLS first
    taus : rising; a latent is active at a token if its value is greater than tau, both float32
    place : what an error calls these rows
    """

    def __init__(
        self,
        row_starts: Ints,
        *,
        n_latents: int,
        tokens_per_image: int,
        taus: tuple[float, ...],
        token_set: str,
        place: str,
    ) -> None:
        n_images = (len(row_starts) - 1) // tokens_per_image
        assert n_images * tokens_per_image == len(row_starts) - 1
        self._row_starts, self._n_latents, self._tokens, self._place = row_starts, n_latents, tokens_per_image, place
        self._taus = np.array(taus, np.float32)
        self._set = TOKEN_SETS.index(token_set)
        self._n_set = {"all": tokens_per_image, "patch": tokens_per_image - 1, "cls": 1}[token_set]
        # of one image: its latents get numbers 1, 2, ... in order of appearance, so that their sums lie together
        self._number = np.zeros(n_latents, np.int32)
        self._is_there = np.zeros(n_latents + -n_latents % _WORD, np.uint8)
        self._total = np.zeros(n_latents + 1)
        self._max = np.zeros(n_latents + 1, np.float32)
        self._bins = np.zeros((n_latents + 1, len(taus) + 1), np.int32)  # tokens above so many taus
        self._state = np.array([0, row_starts[0], -1, 0, 0, 0, 0], np.int64)  # see _count
        self._indptr = np.zeros(n_images + 1, np.int64)
        self._n_above = np.zeros((len(taus), n_images), np.int32)
        kind = np.uint16 if n_latents <= 1 << 16 else np.uint32
        count_kind = np.uint16 if tokens_per_image < 1 << 16 else np.uint32
        self._out: tuple[npt.NDArray[Any], ...] = (
            np.empty(0, kind),
            np.empty((len(taus), 0), count_kind),
            np.empty(0, np.float32),
            np.empty(0, np.float32),
        )

    def add(self, first: int, indices: npt.NDArray[Any], values: npt.NDArray[np.float32]) -> None:
        """Count the next entries, number `first` and those behind it.

        Raises
        ------
        DamagedStore
            If indices do not rise within a row or leave the latents, or a value is not positive and finite.
        """
        while True:
            scratch = (self._number, self._is_there.view(np.uint64), self._is_there, self._total, self._max, self._bins)
            rows = (self._row_starts, self._tokens, self._set, self._n_set, self._taus, self._n_latents)
            status = _count(
                first, indices, values, *rows, *scratch, self._state, self._indptr, self._n_above, *self._out
            )
            if status == _DAMAGED:
                raise DamagedStore(
                    f"{self._place}: indices out of range or not increasing, or a value that is zero, NaN or infinite; "
                    f"a chunk of indices or data is lost or damaged"
                )
            if status != _MORE_ROOM:
                return
            self._grow()

    def finish(self) -> ImageCounts:
        """What was counted; all entries must have been given."""
        self.add(int(self._row_starts[-1]), np.empty(0, self._out[0].dtype), np.empty(0, np.float32))
        n_out, n_values, n_images = int(self._state[4]), int(self._state[5]), int(self._state[6])
        assert n_images == len(self._indptr) - 1
        latent, count, largest, mean = (array[..., :n_out] for array in self._out)
        return ImageCounts(self._indptr, latent, count, largest, mean, self._n_above, n_values)

    def _grow(self) -> None:
        """Room for what the images so far make likely, and for one image more than there is."""
        n_out, n_done, n_images = int(self._state[4]), int(self._state[6]), len(self._indptr) - 1
        room = n_out + self._n_latents + (n_out * (n_images - n_done) // max(1, n_done)) * 9 // 8
        grown = []
        for array in self._out:
            new = np.empty((*array.shape[:-1], room), array.dtype)
            new[..., :n_out] = array[..., :n_out]
            grown.append(new)
        self._out = tuple(grown)


@dataclass(frozen=True)
class LatentSums:
    """Per latent, over some images: images with any activation, summed and largest image activation, tokens."""

    n_active: Ints  # (n_latents,)
    activation: npt.NDArray[np.float64]  # (n_latents,) sum of the images' means
    max: npt.NDArray[np.float32]  # (n_latents,)
    tokens: Ints  # (n_taus, n_latents): tokens above tau

    @staticmethod
    def zeros(n_taus: int, n_latents: int) -> "LatentSums":
        """Of no images."""
        return LatentSums(
            np.zeros(n_latents, np.int64),
            np.zeros(n_latents),
            np.zeros(n_latents, np.float32),
            np.zeros((n_taus, n_latents), np.int64),
        )

    def clear(self) -> None:
        """Back to no images."""
        for array in (self.n_active, self.activation, self.max, self.tokens):
            array.fill(0)

    def add(self, other: "LatentSums") -> None:
        """Add the images of another one."""
        self.n_active[:] += other.n_active
        self.activation[:] += other.activation
        np.maximum(self.max, other.max, out=self.max)
        self.tokens[:] += other.tokens

    def add_images(self, counts: Any, images: Ints) -> None:
        """Add rows of `ImageCounts` (or of the part that holds them), in the order given."""
        columns = (counts["indptr"], counts["latent"], counts["X"], counts["max"], counts["mean"])
        _add_images(*columns, images, self.n_active, self.activation, self.max, self.tokens)


def add_rows(part: Any, rows: Ints, sums: npt.NDArray[np.float64]) -> None:
    """Add the `X` of rows of a part of patients to `sums` (n_taus, n_latents), in the order given."""
    _add_rows(part["indptr"], part["latent"], part["X"], rows, sums)


def take_nonzero(
    latent: npt.NDArray[Any], value: npt.NDArray[Any], skip: int, indices: npt.NDArray[np.int32], values: Any
) -> int:
    """Copy the entries with a value, the first `skip` of them left out, until the outputs are full; says how many."""
    return int(_take_nonzero(latent, value, skip, indices, values))


@numba.njit(cache=True)
def _count(
    first: int,
    indices: Any,
    values: Any,
    row_starts: Any,
    tokens: int,
    token_set: int,
    n_set: int,
    taus: Any,
    n_latents: int,
    number: Any,
    words: Any,
    is_there: Any,
    total: Any,
    largest: Any,
    bins: Any,
    state: Any,
    indptr: Any,
    n_above: Any,
    out_latent: Any,
    out_count: Any,
    out_max: Any,
    out_mean: Any,
) -> int:
    """Go on where `state` says: row, entry, index before, latents of this image, entries out, nonzeros, images out."""
    row, at, previous, n_there, n_out, n_values, image = state
    latent: Any = 0
    n_rows, n_taus, end = len(row_starts) - 1, len(taus), first + len(indices)
    status = _DONE
    while True:
        if row == (image + 1) * tokens:  # all tokens of an image are in: emit it, latents rising
            if n_out + n_there > len(out_latent):
                status = _MORE_ROOM
                break
            for w in range(len(words)):
                if words[w] == 0:
                    continue
                for latent in range(w * _WORD, w * _WORD + _WORD):
                    if is_there[latent] == 0:
                        continue
                    is_there[latent] = 0
                    n = number[latent]
                    number[latent] = 0
                    out_latent[n_out] = latent
                    out_max[n_out] = largest[n]
                    mean = np.float32(total[n] / n_set)
                    if mean == 0:  # kept as the least number: active or not is decided before rounding
                        mean = np.float32(1e-45)
                    out_mean[n_out] = mean
                    above = 0
                    for t in range(n_taus - 1, -1, -1):
                        above += bins[n, t + 1]
                        out_count[t, n_out] = above
                        n_above[t, image] += above > 0
                    n_out += 1
            n_there = 0
            image += 1
            indptr[image] = n_out
        if row == n_rows:
            break
        stop = row_starts[row + 1]
        upto = min(stop, end)
        is_chosen = token_set == 0 or (row % tokens != 0) == (token_set == 1)
        for k in range(at - first, upto - first):
            latent = np.int64(indices[k])
            value = values[k]
            if latent <= previous or latent >= n_latents or not (value > 0) or value > np.float32(3.4028235e38):
                return _DAMAGED
            previous = latent
            if is_chosen:
                n = number[latent]
                if n == 0:
                    n_there += 1
                    n = n_there
                    number[latent] = n
                    is_there[latent] = 1
                    total[n] = 0.0
                    largest[n] = 0.0
                    for t in range(n_taus + 1):
                        bins[n, t] = 0
                total[n] += value
                largest[n] = max(largest[n], value)
                above = 0
                for t in range(n_taus):
                    above += value > taus[t]
                bins[n, above] += 1
        if is_chosen:
            n_values += upto - at
        at = upto
        if stop > end:
            status = _MORE_ENTRIES
            break
        row += 1
        previous = -1
    state[0], state[1], state[2], state[3] = row, at, previous, n_there
    state[4], state[5], state[6] = n_out, n_values, image
    return status


@numba.njit(cache=True)
def _add_images(
    indptr: Any,
    latent: Any,
    count: Any,
    largest: Any,
    mean: Any,
    images: Any,
    n_active: Any,
    activation: Any,
    maximum: Any,
    tokens: Any,
) -> None:
    for image in images:
        for k in range(indptr[image], indptr[image + 1]):
            at = latent[k]
            n_active[at] += 1
            activation[at] += mean[k]
            maximum[at] = max(maximum[at], largest[k])
            for t in range(len(tokens)):
                tokens[t, at] += count[t, k]


@numba.njit(cache=True)
def _add_rows(indptr: Any, latent: Any, values: Any, rows: Any, sums: Any) -> None:
    for row in rows:
        for k in range(indptr[row], indptr[row + 1]):
            for t in range(len(sums)):
                sums[t, latent[k]] += values[t, k]


@numba.njit(cache=True)
def _take_nonzero(latent: Any, value: Any, skip: int, indices: Any, values: Any) -> int:
    seen, taken = 0, 0
    for k in range(len(latent)):
        if value[k] != 0:
            seen += 1
            if seen > skip:
                if taken == len(indices):
                    break
                indices[taken] = latent[k]
                values[taken] = value[k]
                taken += 1
    return taken
