"""Which cells of a patient are less like others of their type, and what makes them so?

A cell is compared with its patient's other cells of its type ("least typical"), and with those of the type of other
patients with the disease in the dataset ("unlike the others"). Listed are the cells that are furthest below what is
usual for the patient's cells of the type, so that types whose cells differ much among themselves do not come first by
that alone. Types of fewer than `LEAST_CELLS` cells, on either side, are not asked.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cell_reasons import SUM_BYTES, Parts, Reason, unlike_parts
from .cell_scan import Likeness, TypeSums, unit_products, unit_sums
from .cell_types import LEAST_CELLS, CellTypes, means_by_type
from .cohort import Cohort, Ints, positions
from .latent_lists import distinct

SHOWN = 3  # reasons of a cell
KINDS = 4  # cells of a patient in each list
_PARTS = 12  # latents of a cell that are looked at, of which alike ones are shown as one
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OddCell:
    """A cell that is less like others of its type than the patient's cells of the type are on average."""

    image: int
    alike: float  # mean cosine to those others
    usual: float  # the same, the mean of the patient's cells of the type
    reasons: list[Reason]  # the largest first
    more: list[tuple[int, float]]  # latents that are more here than in the others, and their shares: at most `_PARTS`


def odd_cells(
    cohort: Cohort, types: CellTypes, compared: TypeSums, alike: Likeness, vectors: npt.NDArray[np.float32]
) -> tuple[list[list[OddCell]], list[list[OddCell]]]:
    """Of each patient the least typical cells, and those unlike the other patients' cells, the furthest first.

    vectors : (n_latents, n) sketches of norm 1, whose products are correlations: latents that are active in the same
        images are told together
    """
    n_own, n_others = _numbers_compared(types)
    least = [
        _furthest(cohort.n_patients, types, each, n >= LEAST_CELLS)
        for each, n in ((alike.to_own, n_own), (alike.to_peers, np.minimum(n_own, n_others)))
    ]
    own, peers = ([image for some in each for image, _, _ in some] for each in least)
    both = unlike_parts(cohort, types, compared, own, peers, most=_PARTS)
    found: list[list[list[OddCell]]] = []
    for lists, parts, is_own in zip(least, both, (True, False), strict=True):
        here, others = _beside(cohort, types, parts, is_own=is_own)
        found.append(
            [
                [
                    OddCell(
                        image=image,
                        alike=value,
                        usual=usual,
                        reasons=_reasons(parts.get(image, []), here[image], others[image], vectors),
                        more=[
                            (latent, share)
                            for latent, share in parts.get(image, [])
                            if here[image][latent] > others[image][latent] + 1e-6  # what rounding adds
                        ],
                    )
                    for image, value, usual in some
                ]
                for some in lists
            ]
        )
    return found[0], found[1]


def likeness(cohort: Cohort, types: CellTypes, compared: TypeSums, *, sum_bytes: int = SUM_BYTES) -> Likeness:
    """How alike each image is to others of its type; two passes over the images of each 128 MiB of sums.

    Images without a latent have no row to compare, and count nowhere.
    """
    group_of = types.groups_of_images()
    n_images, share_of = compared.n_images, 1 / np.maximum(1, compared.n_images)
    n_peers = np.append(compared.n_patients, 0)  # the last: of no group
    to_own, to_peers = np.full((2, len(group_of)), np.nan)
    for here_of, (sums,) in unit_sums(cohort, types.type_of, types.n_types, most_bytes=sum_bytes):
        for first, rows in cohort.image_blocks("X", of=here_of >= 0):
            here = slice(first, first + rows.n_rows)
            mine = unit_products(rows, cohort.rarity, here_of[here], sums)
            theirs = unit_products(
                rows, cohort.rarity, np.where(here_of[here] >= 0, group_of[here], -1), compared.peers
            )
            some = np.flatnonzero(~np.isnan(mine))
            number, at = types.type_of[here][some], first + some
            with np.errstate(divide="ignore", invalid="ignore"):
                to_own[at] = (mine[some] - 1) / (n_images[number] - 1)
                to_peers[at] = (theirs[some] - mine[some] * share_of[number]) / (n_peers[group_of[at]] - 1)
    to_own[~np.isfinite(to_own)] = np.nan
    to_peers[~np.isfinite(to_peers)] = np.nan
    return Likeness(to_own.astype(np.float32), to_peers.astype(np.float32))


def _numbers_compared(types: CellTypes) -> tuple[Ints, Ints]:
    """(n_types,) images of each type, and of the type in the other patients of its group."""
    has = types.groups >= 0
    of_group = np.bincount(types.groups[has], types.n_images[has], types.n_groups).astype(np.int64)
    return types.n_images, np.where(has, np.append(of_group, 0)[types.groups] - types.n_images, 0)


def _furthest(
    n_patients: int, types: CellTypes, values: npt.NDArray[np.float32], is_asked: npt.NDArray[np.bool_]
) -> list[list[tuple[int, float, float]]]:
    """Of each patient at most `KINDS` images, and at most half, furthest below the mean of their type.

    With each its value and that mean. Ties (to 1e-5): the lower number.
    """
    usual = means_by_type(values, types)
    known = np.flatnonzero((types.type_of >= 0) & ~np.isnan(values))
    known = known[is_asked[types.type_of[known]]]
    means = usual[types.type_of[known]]
    less = np.round(means - values[known], 5)
    patient = types.patients[types.type_of[known]]
    found: list[list[tuple[int, float, float]]] = [[] for _ in range(n_patients)]
    n_known = np.bincount(patient, minlength=n_patients)
    for at in np.lexsort((known, -less)).tolist():
        some = found[patient[at]]
        if less[at] > 0 and len(some) < min(KINDS, n_known[patient[at]] // 2):
            some.append((int(known[at]), float(values[known[at]]), float(means[at])))
    return found


def _reasons(
    parts: list[tuple[int, float]], here: dict[int, float], others: dict[int, float], vectors: npt.NDArray[np.float32]
) -> list[Reason]:
    """At most `SHOWN` latents, those that are active in the same images as one."""
    share = dict(parts)
    return [
        Reason(
            latent=latent,
            also=also,
            share=sum(share[one] for one in (latent, *also)),
            here=here[latent],
            others=others[latent],
        )
        for latent, also in distinct([latent for latent, _ in parts], vectors, SHOWN).items()
    ]


def _beside(
    cohort: Cohort, types: CellTypes, parts: Parts, *, is_own: bool
) -> tuple[dict[int, dict[int, float]], dict[int, dict[int, float]]]:
    """Image -> latent -> tokens above the threshold: in it, and on average in those that it is compared with.

    Those are the patient's other images of the type; or of each other patient the mean of its images of the type. One
    pass. Memory: a number for each latent that is told, for each type of a patient with such a cell and each group.
    """
    latents = np.unique(np.array([latent for some in parts.values() for latent, _ in some], np.int64))
    place = positions(latents, cohort.n_latents)
    asked = np.unique(types.type_of[np.array(sorted(parts), np.int64)])
    row_of = np.append(positions(asked, types.n_types), -1)  # the last: of no type
    is_compared = row_of[types.type_of] >= 0
    if not is_own:
        is_compared |= np.isin(types.groups_of_images(), types.groups[asked])
    share_of = 1 / np.maximum(1, types.n_images)
    own, of_group = np.zeros((len(asked), len(latents))), np.zeros((types.n_groups, len(latents)))
    here: dict[int, dict[int, float]] = {}
    for first, rows in cohort.image_blocks("X", of=is_compared):
        image = first + np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
        some = np.flatnonzero(is_compared[image] & (place[rows.indices] >= 0))
        number, at, value = types.type_of[image[some]], place[rows.indices[some]], rows.values[some].astype(np.float64)
        mine = row_of[number] >= 0
        np.add.at(own, (row_of[number[mine]], at[mine]), value[mine])
        if not is_own:
            np.add.at(of_group, (types.groups[number], at), value * share_of[number])
        for one in (n for n in range(first, first + rows.n_rows) if n in parts):
            cells = slice(rows.indptr[one - first], rows.indptr[one - first + 1])
            row = dict(zip(rows.indices[cells].tolist(), rows.values[cells].tolist(), strict=True))
            here[one] = {latent: float(row.get(latent, 0)) for latent, _ in parts[one]}
    n_patients = np.bincount(types.groups[types.groups >= 0], minlength=types.n_groups)
    others: dict[int, dict[int, float]] = {}
    for one, some_parts in parts.items():
        kind = int(types.type_of[one])
        n, group = int(types.n_images[kind]), int(types.groups[kind])
        others[one] = {}
        for latent, _ in some_parts:
            total = float(own[row_of[kind], place[latent]])
            rest, n_rest = total - here[one][latent], n - 1
            if not is_own:
                rest, n_rest = float(of_group[group, place[latent]]) - total / n, int(n_patients[group]) - 1
            mean = rest / max(1, n_rest)
            others[one][latent] = mean if mean > 1e-5 else 0.0  # what rounding leaves
    return here, others
