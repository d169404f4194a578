"""Counting latents, compiled: tokens to images in one pass over the nonzeros, images to groups in another.

One thread; Dask runs several processes. Sums over the tokens of an image run in token order, sums over the images of a
group in the order given, so no number depends on how the work was divided. Twins: tests/support/reference.py.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core.cgutils import false_bit
from numba.extending import intrinsic

from stores.errors import DamagedStore
from stores.token_layout import TokenLayout, cls_first
from stores.token_sets import chosen_tokens

_DONE, _MORE_ENTRIES, _MORE_ROOM = range(3)
_WORD = 64  # latents of an image that one number marks, a bit each
_CELL = np.dtype([("total", "f8"), ("max", "f4"), ("count", "i4")])  # of a latent in one image
_SUM = np.dtype([("activation", "f8"), ("max", "f4"), ("n_active", "i4")])  # of a latent in some images

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
    n_values: int  # stored nonzeros that were counted


class EntryChecker:
    """Checks entries of rows, given in pieces and in order, before compiled code uses their indices."""

    def __init__(self, row_starts: Ints, *, n_latents: int, place: str) -> None:
        """`row_starts` and `place` as of `ImageCounter`."""
        self._row_starts, self._place, self._n_latents = row_starts, place, n_latents
        self._before = -1  # the index of the last entry given

    def check(self, first: int, indices: npt.NDArray[Any], values: npt.NDArray[np.float32]) -> None:
        """The next entries, at least one, from number `first` on.

        Raises
        ------
        DamagedStore
            If indices do not rise within a row or leave the latents, or a value is not positive and finite.
        """
        if not _are_positive(values.view(np.uint32)):
            raise DamagedStore(
                f"{self._place}: a value is zero, negative, NaN or infinite; a chunk of data is lost or damaged"
            )
        if indices.dtype.kind == "i":  # of other programs: what is below 0 becomes larger than any latent
            indices = indices.view(f"u{indices.dtype.itemsize}")
        low, high = np.searchsorted(self._row_starts, (first, first + len(indices)))
        if not _are_rising(first, indices, self._before, self._row_starts[low:high], self._n_latents):
            raise DamagedStore(
                f"{self._place}: indices out of range or not increasing; a chunk of indices is lost or damaged"
            )
        self._before = int(indices[-1])


class ImageCounter:
    """Counts the token rows of whole images, given in pieces. Memory: its result, and a few numbers per latent.

    Parameters
    ----------
    row_starts : (n_rows + 1,) numbers of the rows' first entries; rising; `tokens_per_image` rows an image
    taus : rising; a latent is active at a token if its value is greater than tau, both float32
    place : what an error calls these rows
    layout : which token of an image is what; None: CLS first, then patches
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
        layout: TokenLayout | None = None,
    ) -> None:
        n_images = (len(row_starts) - 1) // tokens_per_image
        assert n_images * tokens_per_image == len(row_starts) - 1
        self._row_starts, self._taus = row_starts, np.array(taus, np.float32)
        self._checker = EntryChecker(row_starts, n_latents=n_latents, place=place)
        chosen = chosen_tokens(token_set, layout or cls_first(tokens_per_image), place)
        # entries of every image: those that count, and where it ends
        self._lows, self._highs, self._ends = (
            np.ascontiguousarray(row_starts[token::tokens_per_image][:n_images])
            for token in (chosen.start, chosen.stop, tokens_per_image)
        )
        self._n_set = len(chosen)
        # of the current image; the numbers of one latent lie in one cache line
        self._cells = np.zeros(n_latents, _CELL)
        self._above = np.zeros((n_latents, len(taus)), np.int32)  # of the second tau and later ones
        self._is_there = np.zeros(-(-n_latents // _WORD), np.uint64)
        self._found = np.empty(n_latents, np.int32)
        self._state = np.array([0, row_starts[0], 0, 0], np.int64)  # see _count
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
        """Count the next entries, from number `first` on.

        Raises
        ------
        DamagedStore
            If indices do not rise within a row or leave the latents, or a value is not positive and finite.
        """
        if len(indices):
            self._checker.check(first, indices, values)
        scratch = (self._cells, self._above, self._is_there, self._found)
        images = (self._lows, self._highs, self._ends, self._n_set, self._taus)
        while (
            _count(first, indices, values, *images, *scratch, self._state, self._indptr, self._n_above, *self._out)
            == _MORE_ROOM
        ):
            self._grow()

    def finish(self) -> ImageCounts:
        """What was counted; all entries must have been given."""
        self.add(int(self._row_starts[-1]), np.empty(0, self._out[0].dtype), np.empty(0, np.float32))
        n_images, _, n_out, n_values = (int(number) for number in self._state)
        assert n_images == len(self._lows)
        latent, count, largest, mean = (array[..., :n_out] for array in self._out)
        return ImageCounts(self._indptr, latent, count, largest, mean, self._n_above, n_values)

    def _grow(self) -> None:
        """Room for what the images so far make likely, and for one image more than there is."""
        n_out, n_done, n_images = int(self._state[2]), int(self._state[0]), len(self._lows)
        room = n_out + len(self._cells) + (n_out * (n_images - n_done) // max(1, n_done)) * 9 // 8
        grown = []
        for array in self._out:
            new = np.empty((*array.shape[:-1], room), array.dtype)
            new[..., :n_out] = array[..., :n_out]
            grown.append(new)
        self._out = tuple(grown)


@dataclass(frozen=True)
class LatentSums:
    """Per latent, over some images: images with any activation, summed and largest image activation, tokens."""

    cells: npt.NDArray[np.void]  # (n_latents,) of _SUM: the numbers of one latent lie in one cache line
    tokens: Ints  # (n_taus, n_latents): tokens above tau

    @staticmethod
    def zeros(n_taus: int, n_latents: int) -> "LatentSums":
        """Of no images."""
        return LatentSums(np.zeros(n_latents, _SUM), np.zeros((n_taus, n_latents), np.int64))

    @property
    def n_active(self) -> Ints:
        """(n_latents,) images with any activation."""
        return self.cells["n_active"].astype(np.int64)

    @property
    def activation(self) -> npt.NDArray[np.float64]:
        """(n_latents,) sum of the images' means."""
        return self.cells["activation"]

    @property
    def max(self) -> npt.NDArray[np.float32]:
        """(n_latents,) over the images' tokens."""
        return self.cells["max"]

    def move(self, other: "LatentSums", latents: Ints) -> None:
        """Add the images of another one, active in `latents` only, and clear it. Time: that of `latents`."""
        self._add(other, latents)
        other.cells[latents] = 0
        other.tokens[:, latents] = 0

    def add(self, other: "LatentSums") -> None:
        """Add the images of another one."""
        self._add(other, slice(None))

    def add_images(self, counts: Any, images: Ints) -> None:
        """Add rows of an open part of images, or of a mapping with the same names, in the order given."""
        columns = (counts["indptr"], counts["latent"], counts["X"], counts["max"], counts["mean"])
        _add_images(*columns, images, self.cells, self.tokens)

    def _add(self, other: "LatentSums", latents: Ints | slice) -> None:
        ours, theirs = self.cells, other.cells[latents]
        ours["n_active"][latents] += theirs["n_active"]
        ours["activation"][latents] += theirs["activation"]
        ours["max"][latents] = np.maximum(ours["max"][latents], theirs["max"])
        self.tokens[:, latents] += other.tokens[:, latents]


def add_rows(part: Any, rows: Ints, sums: npt.NDArray[np.float64]) -> None:
    """Add the `X` of rows of a part of patients to `sums` (n_taus, n_latents), in the order given."""
    _add_rows(part["indptr"], part["latent"], part["X"], rows, sums)


def take_nonzero(
    latent: npt.NDArray[Any], value: npt.NDArray[Any], at: int, skip: int, indices: npt.NDArray[np.int32], values: Any
) -> tuple[int, int]:
    """Copy the entries with a value from number `at` on, the first `skip` of them left out, until the outputs are full.

    Says how many were copied, and the number of the entry to go on with.
    """
    taken, at = _take_nonzero(latent, value, at, skip, indices, values)
    return int(taken), int(at)


def _cttz(_: Any, number: Any) -> Any:
    """Counts trailing zeros: the place of the lowest bit of a number above 0, one instruction, unnamed in numba."""
    return number(number), lambda _, builder, signature, arguments: builder.cttz(arguments[0], false_bit)


_lowest_bit: Any = intrinsic(_cttz)  # compiled code calls it with the number alone


@numba.njit(cache=True, error_model="numpy")
def _count(
    first: int,
    indices: Any,
    values: Any,
    lows: Any,
    highs: Any,
    ends: Any,
    n_set: int,
    taus: Any,
    cells: Any,
    above: Any,
    is_there: Any,
    found: Any,
    state: Any,
    indptr: Any,
    n_above: Any,
    out_latent: Any,
    out_count: Any,
    out_max: Any,
    out_mean: Any,
) -> int:
    """Go on where `state` says: image, its entry, entries out, nonzeros looked at."""
    image, at, n_out, n_values = state
    n_taus, end = len(taus), first + len(indices)
    least, tau, divisor = np.float32(1e-45), taus[0], np.float64(n_set)
    status = _DONE
    while image < len(lows):
        low, high = max(at, lows[image]), min(end, highs[image])
        high = max(low, high)
        n_values += high - low
        # slices, and numbers without a sign: these cannot be negative, which would have to be looked at
        latents, their_values = indices[low - first : high - first], values[low - first : high - first]
        for k in range(len(latents)):
            active = np.uint64(latents[k])
            value = their_values[k]
            cell = cells[active]
            cell.total += value
            cell.max = max(cell.max, value)
            cell.count += value > tau
            is_there[active >> np.uint64(6)] |= np.uint64(1) << (active & np.uint64(_WORD - 1))
        if n_taus > 1:  # a separate loop: inside the one above it would cost time also with one tau
            for k in range(len(latents)):
                of_latent, value = above[np.uint64(latents[k])], their_values[k]
                for t in range(1, n_taus):
                    of_latent[t] += value > taus[t]
        at = min(end, ends[image])
        if ends[image] > end:
            status = _MORE_ENTRIES
            break
        n_found = 0  # all tokens of the image are in: emit it, latents rising
        for w in range(len(is_there)):
            word = is_there[w]
            while word != 0:
                found[n_found] = w * _WORD + _lowest_bit(word)
                n_found += 1
                word &= word - np.uint64(1)
        if n_out + n_found > len(out_latent):
            status = _MORE_ROOM
            break
        is_there[:] = 0
        n_counted, first_count = 0, out_count[0]
        for k in range(n_found):
            latent, to = np.intp(np.uint32(found[k])), n_out + k
            cell = cells[latent]
            out_latent[to] = latent
            out_max[to] = cell.max
            out_mean[to] = max(np.float32(cell.total / divisor), least)  # active or not is decided before rounding
            first_count[to] = cell.count
            n_counted += cell.count > 0
            for t in range(1, n_taus):
                out_count[t, to] = above[latent, t]
                n_above[t, image] += above[latent, t] > 0
                above[latent, t] = 0
            cell.total = 0
            cell.max = 0.0
            cell.count = 0
        n_above[0, image] = n_counted
        n_out += n_found
        image += 1
        indptr[image] = n_out
    state[0], state[1], state[2], state[3] = image, at, n_out, n_values
    return status


@numba.njit(cache=True)
def _are_rising(first: int, indices: Any, before: int, row_starts: Any, n_latents: int) -> bool:
    """Do indices rise in every row, and stay below n_latents? `row_starts`: of the rows that begin here.

    Where an index does not rise, a row must begin: as many such places as row starts with one. Counting both takes a
    fifth of the time of looking row by row.
    """
    n_falls, n_explained, largest = 0, 0, indices[0]
    for k in range(1, len(indices)):
        n_falls += indices[k] <= indices[k - 1]
    for k in range(len(indices)):
        largest = max(largest, indices[k])
    last = np.int64(-1)
    for start in row_starts:
        if start != last:  # an empty row begins where the next one does
            at = start - first
            n_explained += at > 0 and indices[at] <= indices[at - 1]
            last = start
    begins_a_row = len(row_starts) > 0 and row_starts[0] == first
    return n_falls == n_explained and largest < n_latents and (begins_a_row or indices[0] > before)


@numba.njit(cache=True)
def _are_positive(bits: Any) -> bool:
    """Are these float32 (as bits) all above zero and finite?"""
    is_bad: Any = False
    for k in range(len(bits)):
        is_bad |= np.uint32(bits[k] - np.uint32(1)) >= np.uint32(0x7F7FFFFF)
    return not is_bad


@numba.njit(cache=True)
def _add_images(
    indptr: Any, latent: Any, count: Any, largest: Any, mean: Any, images: Any, cells: Any, tokens: Any
) -> None:
    for image in images:
        for k in range(indptr[image], indptr[image + 1]):
            cell = cells[np.intp(latent[k])]
            cell.n_active += 1
            cell.activation += mean[k]
            cell.max = max(cell.max, largest[k])
        for t in range(len(tokens)):
            for k in range(indptr[image], indptr[image + 1]):
                tokens[t, latent[k]] += count[t, k]


@numba.njit(cache=True)
def _add_rows(indptr: Any, latent: Any, values: Any, rows: Any, sums: Any) -> None:
    for row in rows:
        for k in range(indptr[row], indptr[row + 1]):
            for t in range(len(sums)):
                sums[t, latent[k]] += values[t, k]


@numba.njit(cache=True)
def _take_nonzero(latent: Any, value: Any, at: int, skip: int, indices: Any, values: Any) -> tuple[int, int]:
    taken = 0
    for k in range(at, len(latent)):
        if value[k] != 0:
            if skip > 0:
                skip -= 1
            elif taken == len(indices):
                return taken, k
            else:
                indices[taken] = latent[k]
                values[taken] = value[k]
                taken += 1
    return taken, len(latent)
