"""Why is a cell less like others than its patient's cells of the type are? The latents that make it so.

Alike is the cosine of two images' rows of norm 1 (`Likeness`), and 1 minus a cosine is half the squared distance of
the rows: a sum over latents, none below 0. So the mean distance of a cell from others is a sum over latents, too, and
so is that of its patient's cells of the type on average. The difference of both, latent by latent, says what makes the
cell unlike; over all latents it is the difference of the two mean cosines. Images without a latent have no row, and
are left out. Told are latents that are active in some images (`least_images`): what only a few images have is no
concept that can be looked at.

Two passes over the images of each 341 types of patients at 49,152 latents (128 MiB of sums). Twin in
plain loops: test_odd_cells.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stores.csr import CsrRows

from .cell_scan import TypeSums, unit_sums
from .cell_types import CellTypes
from .cohort import Cohort

SUM_BYTES = 1 << 27
_LEAST_IMAGES = 5
_LEAST_SHARE = 0.01
Floats = npt.NDArray[np.float64]
Parts = dict[int, list[tuple[int, float]]]  # image -> (latent, its share of all parts above 0), the largest first


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A latent that makes a cell unlike others, and how much it is there."""

    latent: int
    also: list[int]  # latents that are active in the same images; their shares are added
    share: float  # of all that makes the cell less alike; what makes it more alike is not counted
    here: float  # tokens above the threshold
    others: float  # the mean of those it is compared with


def least_images(cohort: Cohort) -> int:
    """In how many readable images a latent must be active to be told: a hundredth of them, at least five."""
    return max(_LEAST_IMAGES, math.ceil(_LEAST_SHARE * int(cohort.is_readable.sum())))


def unlike_parts(
    cohort: Cohort,
    types: CellTypes,
    compared: TypeSums,
    to_own: Sequence[int],
    to_peers: Sequence[int],
    *,
    most: int,
    sum_bytes: int = SUM_BYTES,
) -> tuple[Parts, Parts]:
    """What makes images `to_own` unlike their patient's others of the type, and `to_peers` unlike other patients'.

    Those of other patients are of the same type, disease and dataset, and each patient counts once. An image that is
    not less alike than its patient's images of the type are on average has no part. Only latents of `least_images` are
    told; shares are of all.

    most : parts of each image
    """
    is_told = cohort.groups.n_images_with >= least_images(cohort)
    group_of = types.groups_of_images()
    counts, share_of = compared.n_images, 1 / np.maximum(1, compared.n_images)
    found: tuple[Parts, Parts] = ({}, {})
    wanted = [np.unique(np.array(some, np.int64)) for some in (to_own, to_peers)]
    is_wanted = np.zeros(len(group_of), bool)
    is_wanted[np.concatenate(wanted)] = True
    for here_of, both in unit_sums(cohort, types.type_of, types.n_types, most_bytes=sum_bytes, powers=(1, 2)):
        for first, rows in cohort.image_blocks("X", of=is_wanted & (here_of >= 0)):
            for parts, images, is_own in zip(found, wanted, (True, False), strict=True):
                some = images[(images >= first) & (images < first + rows.n_rows)]
                for image in some[here_of[some] >= 0].tolist():
                    unit, number = _unit(rows, image - first, cohort.rarity), int(types.type_of[image])
                    n, (total, square) = int(counts[number]), both[:, here_of[image]].astype(np.float64)
                    if is_own:
                        parts[image] = _largest(_from_own(unit, total, square, n), is_told, most)
                        continue
                    group = int(group_of[image])
                    others = int(compared.n_patients[group]) - 1 if group >= 0 else 0
                    if others > 0:
                        mean = (compared.peers[group] - total * share_of[number]) / others
                        parts[image] = _largest(_from_peers(unit, total, square, n, mean), is_told, most)
    return found


def _from_own(unit: Floats, total: Floats, square: Floats, n: int) -> Floats:
    """(n_latents,) what each adds to the mean distance from the n - 1 others, less what it adds on average."""
    if n < 2:
        return np.zeros_like(unit)
    mean, mean_square = (total - unit) / (n - 1), (square - unit**2) / (n - 1)
    on_average = (square - total**2 / n) / (n - 1)
    return (unit**2 - 2 * unit * mean + mean_square) / 2 - on_average


def _from_peers(unit: Floats, total: Floats, square: Floats, n: int, mean: Floats) -> Floats:
    """The same for the images of others, whose mean row is given: their squares are the same for all own images."""
    return (unit**2 - square / n) / 2 - (unit - total / n) * mean


def _largest(parts: Floats, is_told: npt.NDArray[np.bool_], most: int) -> list[tuple[int, float]]:
    if float(parts.sum()) <= 1e-6:
        return []
    whole = float(parts[parts > 0].sum())
    order = np.argsort(-np.where(is_told, parts, 0), kind="stable")[:most]
    order = order[is_told[order]]
    return [(int(latent), float(parts[latent] / whole)) for latent in order if parts[latent] > 0]


def _unit(rows: CsrRows, row: int, weights: npt.NDArray[np.float32]) -> Floats:
    """(n_latents,) one row, weighted and of norm 1."""
    some = slice(rows.indptr[row], rows.indptr[row + 1])
    found = np.zeros(len(weights))
    found[rows.indices[some]] = np.log1p(rows.values[some].astype(np.float64)) * weights[rows.indices[some]]
    return found / max(float(np.linalg.norm(found)), 1e-30)
