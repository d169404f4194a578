"""Passes over the barcodes of all images that choose cells: the strongest of a latent, the typical ones of a patient.

Kernels run over blocks of sparse rows; what is kept between blocks is small and dense. Twins in plain loops:
tests/cytosae/atlas/test_cell_scan.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.csr import CsrRows

from .cell_types import CellTypes
from .cohort import Cohort

Ints = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class Strongest:
    """Of each wanted latent in each group of images: the images with the largest values, one for each patient.

    Ties: the image of the lower number. Images of nobody (patient -1) or of no group (-1) are left out.
    """

    def __init__(self, latents: Ints, n_latents: int, n_groups: int, n_kept: int) -> None:
        """latents: (n,) wanted; n_kept: images kept of each latent and group, each of another patient."""
        self.latents = latents
        self._place = np.full(n_latents, -1, np.int64)
        self._place[latents] = np.arange(len(latents))
        shape = (n_groups, len(latents), n_kept)
        self.values = np.zeros(shape, np.float32)
        self.images = np.full(shape, -1, np.int64)
        self.patients = np.full(shape, -1, np.int64)

    def add(self, first: int, rows: CsrRows, patient_of: Ints, group_of: Ints) -> None:
        """Look at images first, first + 1, ..., rows; of each its patient and its group, (images,)."""
        _strongest(
            *(rows.indptr, rows.indices, rows.values, first, patient_of, group_of, self._place),
            *(self.values, self.images, self.patients),
        )

    def of(self, latent: int, groups: Sequence[int], n: int, *, without: int = -1) -> list[int]:
        """The `n` strongest images of a latent in some groups, of different patients, strongest first.

        without : a patient whose images are not wanted; `n_kept` must be above n then
        """
        at = int(self._place[latent])
        if at < 0 or not len(groups):
            return []
        values, images, patients = (
            each[list(groups), at].ravel() for each in (self.values, self.images, self.patients)
        )
        order = np.lexsort((images, -values))
        return [int(images[k]) for k in order if images[k] >= 0 and patients[k] != without][:n]


class OwnStrongest:
    """Of each patient's own wanted latents: the patient's images with the largest values."""

    def __init__(self, wanted: Sequence[Ints], n_kept: int) -> None:
        """wanted: of each patient the latents, rising"""
        self._starts = np.cumsum([0, *(len(each) for each in wanted)]).astype(np.int64)
        self._latents = np.concatenate([*wanted, np.empty(0, np.int64)]).astype(np.int64)
        self.values = np.zeros((len(self._latents), n_kept), np.float32)
        self.images = np.full((len(self._latents), n_kept), -1, np.int64)

    def add(self, first: int, rows: CsrRows, patient_of: Ints) -> None:
        """Look at images first, first + 1, ...; `patient_of` (images,), -1: left out."""
        _own(
            *(rows.indptr, rows.indices, rows.values, first, patient_of, self._starts, self._latents),
            *(self.values, self.images),
        )

    def of(self, patient: int, latent: int) -> list[int]:
        """The strongest images of a patient, strongest first."""
        first, last = int(self._starts[patient]), int(self._starts[patient + 1])
        at = first + int(np.searchsorted(self._latents[first:last], latent))
        if at >= last or self._latents[at] != latent:
            return []
        return [int(image) for image in self.images[at] if image >= 0]


@dataclass(frozen=True, eq=False)
class TypeSums:
    """What is compared with: of each type of a patient its images with a row, of each group the sum of unit rows."""

    n_images: Ints  # (n_types,)
    n_patients: Ints  # (n_groups,) with such an image
    peers: Float32s  # (n_groups, n_latents), each patient counts once


def type_sums(cohort: Cohort, types: CellTypes) -> TypeSums:
    """Two passes."""
    counts = with_a_row(cohort, types.type_of, types.n_types)
    has = (counts > 0) & (types.groups >= 0)
    peers = group_sums(cohort, types.groups_of_images(), types.n_groups, types.type_of, counts)
    return TypeSums(counts, np.bincount(types.groups[has], minlength=types.n_groups), peers)


@dataclass(frozen=True, eq=False)
class Likeness:
    """How alike each image is, on average, to other images; cosines of ln(1 + tokens above tau), weighted by rarity.

    nan: of nobody, unreadable, without a latent, or nothing to compare with.
    """

    to_own: Float32s  # (n_images,) to its patient's other images of its type
    to_peers: Float32s  # (n_images,) to those of its type of the other patients of its group, each counting once


def add_unit_rows(
    rows: CsrRows, weights: Float32s, target_of: Ints, shares: Float32s, sums: Float32s, *, power: int = 1
) -> None:
    """Add each image's row, weighted and scaled to norm 1, times its share, to the row of `sums` that it belongs to.

    Parameters
    ----------
    rows : (images, n_latents) tokens above tau
    weights : (n_latents,)
    target_of : (images,) row of `sums`; -1: left out
    shares : (images,)
    sums : (rows, n_latents)
    power : 2 adds the squares of the scaled values
    """
    values = np.log1p(rows.values, dtype=np.float32)
    _add_units(rows.indptr, rows.indices, values, weights, target_of, shares, power, sums)


def unit_sums(
    cohort: Cohort, target_of: Ints, n_targets: int, *, most_bytes: int, powers: Sequence[int] = (1,)
) -> Iterator[tuple[Ints, Float32s]]:
    """Sums of unit rows by target, for as many targets at a time as fit into `most_bytes`; a pass for each time.

    Yields the row of the sums of each image, (n_images,), -1 where it belongs to none of these, and the sums,
    (powers, targets, n_latents).
    """
    size = max(1, most_bytes // (4 * len(powers) * cohort.n_latents))
    for first_target in range(0, n_targets, size):
        n_here = min(size, n_targets - first_target)
        is_here = (target_of >= first_target) & (target_of < first_target + n_here)
        here_of = np.where(is_here, target_of - first_target, -1)
        sums = np.zeros((len(powers), n_here, cohort.n_latents), np.float32)
        for first, rows in cohort.image_blocks("X", of=is_here):
            here = here_of[first : first + rows.n_rows]
            for power, each in zip(powers, sums, strict=True):
                add_unit_rows(rows, cohort.rarity, here, np.ones(rows.n_rows, np.float32), each, power=power)
        yield here_of, sums


def with_a_row(cohort: Cohort, target_of: Ints, n_targets: int) -> Ints:
    """(n_targets,) images with a latent that weighs anything: the others have no row of norm 1. One pass."""
    counts, weighs = np.zeros(n_targets, np.int64), cohort.rarity > 0
    for first, rows in cohort.image_blocks("X"):
        row_of = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
        has = np.bincount(row_of[weighs[rows.indices]], minlength=rows.n_rows) > 0
        whose = target_of[first : first + rows.n_rows]
        counts += np.bincount(whose[has & (whose >= 0)], minlength=n_targets)
    return counts


def group_sums(cohort: Cohort, group_of: Ints, n_groups: int, target_of: Ints, n_images: Ints) -> Float32s:
    """(n_groups, n_latents) sums of unit rows by group, in which each target counts once; one pass.

    group_of, target_of : (all images,) -1: left out
    n_images : (n_targets,) by which a target's rows are divided
    """
    share_of = np.append(1 / np.maximum(1, n_images), 0).astype(np.float32)  # the last: of -1, nobody's images
    found = np.zeros((n_groups, cohort.n_latents), np.float32)
    for first, rows in cohort.image_blocks("X"):
        here = slice(first, first + rows.n_rows)
        add_unit_rows(rows, cohort.rarity, group_of[here], share_of[target_of[here]], found)
    return found


def unit_products(rows: CsrRows, weights: Float32s, target_of: Ints, sums: Float32s) -> npt.NDArray[np.float64]:
    """(images,) product of each image's row of norm 1 with its row of `sums`; nan: no target, or an empty row."""
    found = np.full(rows.n_rows, np.nan)
    _products(rows.indptr, rows.indices, np.log1p(rows.values, dtype=np.float32), weights, target_of, sums, found)
    return found


# ------------------------------------------------------------------------------------------------- kernels


@numba.njit(cache=True)
def _strongest(
    indptr: Any, indices: Any, values: Any, first: int, patient_of: Any, group_of: Any, place: Any,
    best: Any, images: Any, patients: Any,
) -> None:  # fmt: skip
    n_kept = best.shape[2]
    for row in range(len(indptr) - 1):
        patient, group = patient_of[row], group_of[row]
        if patient < 0 or group < 0:
            continue
        for at in range(indptr[row], indptr[row + 1]):
            k, value = place[indices[at]], values[at]
            if k < 0 or value <= best[group, k, n_kept - 1]:
                continue
            end = n_kept - 1  # the place that is given up: the patient's own, or the last
            for n in range(n_kept):
                if patients[group, k, n] == patient:
                    end = n
                    break
            if patients[group, k, end] == patient and value <= best[group, k, end]:
                continue
            while end > 0 and best[group, k, end - 1] < value:
                best[group, k, end] = best[group, k, end - 1]
                images[group, k, end] = images[group, k, end - 1]
                patients[group, k, end] = patients[group, k, end - 1]
                end -= 1
            best[group, k, end], images[group, k, end], patients[group, k, end] = value, first + row, patient


@numba.njit(cache=True)
def _own(
    indptr: Any, indices: Any, values: Any, first: int, patient_of: Any, starts: Any, latents: Any,
    best: Any, images: Any,
) -> None:  # fmt: skip
    n_kept = best.shape[1]
    for row in range(len(indptr) - 1):
        patient = patient_of[row]
        if patient < 0 or starts[patient] == starts[patient + 1]:
            continue
        low, high = starts[patient], starts[patient + 1]
        for at in range(indptr[row], indptr[row + 1]):
            k = low + np.searchsorted(latents[low:high], indices[at])
            if k >= high or latents[k] != indices[at] or values[at] <= best[k, n_kept - 1]:
                continue
            end = n_kept - 1
            while end > 0 and best[k, end - 1] < values[at]:
                best[k, end] = best[k, end - 1]
                images[k, end] = images[k, end - 1]
                end -= 1
            best[k, end], images[k, end] = values[at], first + row


@numba.njit(cache=True)
def _add_units(
    indptr: Any, indices: Any, values: Any, weights: Any, target_of: Any, shares: Any, power: int, sums: Any
) -> None:
    for row in range(len(indptr) - 1):
        target = target_of[row]
        if target < 0:
            continue
        squares = 0.0
        for at in range(indptr[row], indptr[row + 1]):
            squares += (values[at] * weights[indices[at]]) ** 2
        if squares == 0:
            continue
        scale = 1 / np.sqrt(squares)
        for at in range(indptr[row], indptr[row + 1]):
            sums[target, indices[at]] += shares[row] * (values[at] * weights[indices[at]] * scale) ** power


@numba.njit(cache=True)
def _products(indptr: Any, indices: Any, values: Any, weights: Any, target_of: Any, sums: Any, out: Any) -> None:
    for row in range(len(indptr) - 1):
        target = target_of[row]
        if target < 0:
            continue
        squares, product = 0.0, 0.0
        for at in range(indptr[row], indptr[row + 1]):
            value = values[at] * weights[indices[at]]
            squares += value**2
            product += value * sums[target, indices[at]]
        if squares > 0:
            out[row] = product / np.sqrt(squares)
