"""Which cells stand on the pages of patients, diseases and pairs: the strongest of a latent, the typical, the unlike.

Five passes over the barcodes of all images; at 49,152 latents two more for every 682 patients (128 MiB of sums), for
every 682 types of cell of a patient, and for every 341 patients (why a cell is unlike the others).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .cell_reasons import Reason, unlike_parts
from .cell_scan import Likeness, OwnStrongest, Strongest, group_sums, unit_products, unit_sums, with_a_row
from .cohort import Cohort, Ints, Row
from .config import AtlasConfig
from .inputs import Inputs
from .latent_lists import characteristic, unusual_of
from .latent_order import LatentOrder, Sketches, order_latents
from .plan import LISTED

SHOWN = 3  # cells of a latent on each side
KINDS = 4  # atypical cells of a patient, and as many unlike ones
MOST_TYPES = 6  # of cell, of a patient
_PARTS = 12  # latents of an unlike cell that are looked at, of which alike ones are shown as one
_SUM_BYTES = 1 << 27
_DISEASE_CONCEPTS = 6
_SAME = 0.8  # correlation above which two latents would show the same cells
_SPARE = 3  # times as many latents of a pair are looked at as are shown


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The strongest cells of a latent on two sides; image indices, each of another patient on the side of others."""

    mine: list[int]
    others: list[int]
    also: list[int]  # further latents of the list that are active in the same images, and not shown by themselves


@dataclass(frozen=True, kw_only=True)
class PatientCells:
    """What stands on the page of a patient."""

    characteristic: list[dict[str, Any]]
    unusual: list[dict[str, Any]] | None  # None: not asked
    beside: dict[int, Beside]  # latent -> cells; of characteristic ones the others are of all patients
    beside_peers: dict[int, Beside]  # of unusual ones: of other patients with the disease in the dataset
    types: list["CellType"]  # the commonest first
    atypical: list[tuple[int, float]]  # image, mean cosine to the patient's other images; smallest first
    unlike: list[tuple[int, float]]  # image, mean cosine to the images of the others with the disease; smallest first
    why_atypical: dict[int, list[Reason]]  # of each atypical image the latents that make it so
    why_unlike: dict[int, list[Reason]]
    usual: tuple[float, float]  # means of both cosines over the patient's images; nan: not known


@dataclass(frozen=True, kw_only=True)
class CellType:
    """The cells of a patient with one label."""

    label: str  # "" without one
    n: int
    typical: list[tuple[int, float]]  # image, mean cosine to the patient's others with the label; nan: it is alone


@dataclass(frozen=True, eq=False, kw_only=True)
class CellChoice:
    """The cells of all pages of patients (by number), diseases (by number) and pairs (in the order of the inputs)."""

    order: LatentOrder
    patients: Sequence[PatientCells]
    diseases: Sequence[dict[int, Beside]]  # latent -> cells of the disease, and of the other diseases
    disease_lists: Sequence[list[dict[str, Any]]]
    pairs: Sequence[dict[int, Beside]]  # latent -> cells of A, and of B
    portraits: list[int]  # of each patient the most typical image of the commonest type; -1: none

    @cached_property
    def marks(self) -> list[tuple[int, int]]:
        """(image, latent) of every map that is shown, sorted."""
        found: set[tuple[int, int]] = set()
        sides = [each for patient in self.patients for each in (patient.beside, patient.beside_peers)]
        for cells in (*sides, *self.diseases, *self.pairs):
            for latent, beside in cells.items():
                found |= {(image, latent) for image in (*beside.mine, *beside.others)}
        for patient in self.patients:
            for why in (patient.why_atypical, patient.why_unlike):
                found |= {(image, reason.latent) for image, some in why.items() for reason in some}
        return sorted(found)

    @cached_property
    def images(self) -> Ints:
        """All images, rising."""
        found = {image for image, _ in self.marks}
        for patient in self.patients:
            shown = (patient.atypical, patient.unlike, *(each.typical for each in patient.types))
            found |= {image for some in shown for image, _ in some}
        return np.array(sorted(found | {image for image in self.portraits if image >= 0}), np.int64)


@dataclass(eq=False, kw_only=True)
class _Wanted:
    """Latents of which cells are looked for."""

    characteristic: list[list[dict[str, Any]]]
    unusual: list[list[dict[str, Any]] | None]
    of_diseases: list[list[dict[str, Any]]]
    of_pairs: list[list[list[int]]]  # of A, of B: by rank
    own: list[Ints] = field(init=False)

    def __post_init__(self) -> None:
        several = [
            [row["latent"] for row in (*first, *(second or []))]
            for first, second in zip(self.characteristic, self.unusual, strict=True)
        ]
        self.own = [np.unique(np.array(each, np.int64)) for each in several]

    @property
    def latents(self) -> Ints:
        """All of them, rising."""
        of_diseases = [row["latent"] for rows in self.of_diseases for row in rows]
        of_pairs = [latent for sides in self.of_pairs for side in sides for latent in side]
        return np.unique(np.concatenate([*self.own, np.array([*of_diseases, *of_pairs], np.int64)]))


def choose_cells(inputs: Inputs, cohort: Cohort, config: AtlasConfig) -> CellChoice:
    """Look at the barcodes of all patients, then of all images.

    Memory: a sketch of 1 kB a latent, 128 MiB of sums, and a block of images.
    """
    wanted = _wanted(inputs, cohort, config)
    patient_of = np.where(cohort.is_readable, cohort.patient_of, -1)
    group_of = _group_of(cohort, patient_of)
    n_groups = int(cohort.peers_of.max(initial=-1)) + 2
    strongest = Strongest(wanted.latents, cohort.n_latents, n_groups, SHOWN + 1)
    own = OwnStrongest(wanted.own, SHOWN)
    sketches = Sketches(cohort.n_latents, config.seed)
    for first, rows in cohort.image_blocks("mean"):
        here = slice(first, first + rows.n_rows)
        strongest.add(first, rows, patient_of[here], group_of[here])
        own.add(first, rows, patient_of[here])
        sketches.add(first, rows, cohort.is_readable[here])
    vectors = sketches.vectors()
    alike = likeness(cohort, patient_of)
    images = _images_of(cohort, patient_of)
    atypical = [_extremes(mine, alike.to_own, 1) for mine in images]
    unlike = [_extremes(mine, alike.to_peers, 1) for mine in images]
    why = _reasons(cohort, patient_of, (atypical, unlike), vectors)
    types = _types(cohort, patient_of, images)
    every_group = list(range(n_groups))
    patients = [
        PatientCells(
            characteristic=wanted.characteristic[number],
            unusual=wanted.unusual[number],
            beside={
                latent: Beside(
                    mine=own.of(number, latent),
                    others=strongest.of(latent, every_group, SHOWN, without=number),
                    also=also,
                )
                for latent, also in distinct(
                    [row["latent"] for row in wanted.characteristic[number]], vectors, config.patient_concepts
                ).items()
            },
            beside_peers={
                latent: Beside(
                    mine=own.of(number, latent),
                    others=strongest.of(latent, [int(cohort.peers_of[number])], SHOWN, without=number),
                    also=also,
                )
                for latent, also in distinct(
                    [row["latent"] for row in wanted.unusual[number] or []], vectors, config.patient_concepts
                ).items()
            },
            types=types[number],
            atypical=atypical[number],
            unlike=unlike[number],
            why_atypical={image: why[0][image] for image, _ in atypical[number]},
            why_unlike={image: why[1][image] for image, _ in unlike[number]},
            usual=(_mean(alike.to_own[images[number]]), _mean(alike.to_peers[images[number]])),
        )
        for number in range(cohort.n_patients)
    ]
    return CellChoice(
        order=order_latents(vectors, sketches.is_active),
        patients=patients,
        diseases=[_of_disease(cohort, wanted, strongest, vectors, number) for number in range(len(cohort.diseases))],
        disease_lists=wanted.of_diseases,
        pairs=[
            _of_pair(inputs, cohort, wanted, strongest, vectors, config.pair_concepts, number)
            for number in range(len(inputs.comparisons))
        ],
        portraits=[_portrait(cells, images[number]) for number, cells in enumerate(patients)],
    )


def distinct(latents: Sequence[int], vectors: npt.NDArray[np.float32], most: int) -> dict[int, list[int]]:
    """The first latents of a list that are not active in the same images as one before: latent -> those left to it.

    vectors : (n_latents, n) sketches of norm 1, whose products are correlations
    """
    shown: dict[int, list[int]] = {}
    for latent in latents:
        same = next((other for other in shown if vectors[latent] @ vectors[other] > _SAME), None)
        if same is not None:
            shown[same].append(latent)
        elif len(shown) < most:
            shown[latent] = []
    return shown


def likeness(cohort: Cohort, patient_of: Ints) -> Likeness:
    """How alike each image is to others; two passes, and two for each 128 MiB of sums.

    Images without a latent have no row to compare, and count nowhere.

    patient_of : (n_images,) -1: left out
    """
    group_of = _group_of(cohort, patient_of)
    n_groups = int(cohort.peers_of.max(initial=-1)) + 2
    n_images = with_a_row(cohort, patient_of)
    share_of = 1 / np.maximum(1, n_images)  # each patient of a group counts once
    peers = group_sums(cohort, group_of, n_groups, patient_of, n_images)
    n_peers = np.bincount(cohort.peers_of % n_groups, weights=n_images > 0, minlength=n_groups)
    to_own, to_peers = np.full((2, len(patient_of)), np.nan)
    for here_of, (sums,) in unit_sums(cohort, patient_of, cohort.n_patients, most_bytes=_SUM_BYTES):
        for first, rows in cohort.image_blocks("X"):
            here = slice(first, first + rows.n_rows)
            mine = unit_products(rows, cohort.rarity, here_of[here], sums)
            theirs = unit_products(rows, cohort.rarity, np.where(here_of[here] >= 0, group_of[here], -1), peers)
            some = np.flatnonzero(~np.isnan(mine))
            patient, at = patient_of[here][some], first + some
            with np.errstate(divide="ignore", invalid="ignore"):
                to_own[at] = (mine[some] - 1) / (n_images[patient] - 1)
                others = n_peers[group_of[at]] - 1
                to_peers[at] = (theirs[some] - mine[some] * share_of[patient]) / others
    to_own[~np.isfinite(to_own)] = np.nan
    to_peers[~np.isfinite(to_peers) | (group_of == n_groups - 1)] = np.nan
    return Likeness(to_own.astype(np.float32), to_peers.astype(np.float32))


def _wanted(inputs: Inputs, cohort: Cohort, config: AtlasConfig) -> _Wanted:
    overall = cohort.groups.sums.sum(axis=0) / max(1, cohort.n_patients)
    lists: list[list[dict[str, Any]]] = [[] for _ in cohort.names]
    rare: list[list[dict[str, Any]] | None] = [None for _ in cohort.names]
    for number, row in cohort.rows():
        lists[number], rare[number] = characteristic(row, overall), unusual_of(cohort, number, row)
    means = cohort.disease_means.astype(np.float64)
    of_diseases = []
    for number in range(len(cohort.diseases)):
        others = np.delete(means, number, axis=0).mean(axis=0) if len(means) > 1 else np.zeros(means.shape[1])
        latents = np.flatnonzero(means[number])
        of_diseases.append(characteristic(Row(latents, means[number, latents].astype(np.float32)), others))
    of_pairs: list[list[list[int]]] = []
    most = min(LISTED, _SPARE * config.pair_concepts)
    for number in range(len(inputs.comparisons)):
        table = inputs.comparison_table(number)
        ranks = [table[name].to_numpy(zero_copy_only=False) for name in ("rank_a", "rank_b")]
        chosen = [np.flatnonzero(each <= most) for each in ranks]
        of_pairs.append([some[np.argsort(each[some])].tolist() for each, some in zip(ranks, chosen, strict=True)])
    return _Wanted(characteristic=lists, unusual=rare, of_diseases=of_diseases, of_pairs=of_pairs)


def _group_of(cohort: Cohort, patient_of: Ints) -> Ints:
    """(n_images,) group of each image: disease and dataset; the last for patients without a disease; -1 for nobody."""
    n_groups = int(cohort.peers_of.max(initial=-1)) + 2
    if not cohort.n_patients:
        return np.full(len(patient_of), -1, np.int64)
    return np.where(patient_of >= 0, cohort.peers_of[patient_of] % n_groups, -1)


def _images_of(cohort: Cohort, patient_of: Ints) -> list[Ints]:
    order = np.argsort(patient_of, kind="stable")
    starts = np.searchsorted(patient_of[order], np.arange(cohort.n_patients + 1))
    return [order[first:last] for first, last in pairwise(starts)]


def _extremes(images: Ints, values: npt.NDArray[np.float32], sign: int) -> list[tuple[int, float]]:
    """At most `KINDS` images, and at most half, with the smallest sign * value; ties (to 1e-5): the lower number."""
    known = images[~np.isnan(values[images])]
    order = np.lexsort((known, np.round(sign * values[known], 5)))[: min(KINDS, len(known) // 2)]
    return [(int(known[at]), float(values[known[at]])) for at in order]


def _portrait(cells: PatientCells, images: Ints) -> int:
    """The most typical image of the patient's commonest type, or the first."""
    return cells.types[0].typical[0][0] if cells.types else int(images[0]) if len(images) else -1


def _mean(values: npt.NDArray[np.float32]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _types(cohort: Cohort, patient_of: Ints, images: Sequence[Ints]) -> list[list[CellType]]:
    """Of each patient the commonest types of cell, and the most typical cells of each."""
    target_of = np.full(len(patient_of), -1, np.int64)
    members: list[list[tuple[str, Ints]]] = []
    n_targets = 0
    for mine in images:
        labels = np.array([cohort.labels[image] for image in mine.tolist()], object)
        names, counts = np.unique(labels.astype(str), return_counts=True)
        chosen = names[np.lexsort((names, -counts, names == ""))][:MOST_TYPES].tolist()
        members.append([(label, mine[labels == label]) for label in chosen])
        for _, some in members[-1]:
            target_of[some] = n_targets
            n_targets += 1
    alike = mean_cosines(cohort, target_of, n_targets)
    return [
        [CellType(label=label, n=len(some), typical=_typical(some, alike)) for label, some in of_patient]
        for of_patient in members
    ]


def _typical(images: Ints, alike: npt.NDArray[np.float32]) -> list[tuple[int, float]]:
    """At most `SHOWN`, the most alike first, ties (to 1e-5) by number; what is like nothing last."""
    order = np.lexsort((images, np.round(-np.nan_to_num(alike[images], nan=-1), 5)))[:SHOWN]
    return [(int(images[at]), float(alike[images[at]])) for at in order]


def mean_cosines(cohort: Cohort, target_of: Ints, n_targets: int) -> npt.NDArray[np.float32]:
    """(n_images,) mean cosine of each image to the others with its target, as `likeness`; nan: alone, or -1.

    Two passes for each 128 MiB of sums.
    """
    found = np.full(len(target_of), np.nan)
    n_images = np.bincount(target_of[target_of >= 0], minlength=max(1, n_targets))
    for here_of, (sums,) in unit_sums(cohort, target_of, n_targets, most_bytes=_SUM_BYTES):
        for first, rows in cohort.image_blocks("X"):
            here = slice(first, first + rows.n_rows)
            mine = unit_products(rows, cohort.rarity, here_of[here], sums)
            some = np.flatnonzero(~np.isnan(mine))
            n = n_images[target_of[here][some]]
            with np.errstate(divide="ignore", invalid="ignore"):
                found[first + some] = np.where(n > 1, (mine[some] - 1) / (n - 1), np.nan)
    return found.astype(np.float32)


def _reasons(
    cohort: Cohort,
    patient_of: Ints,
    cells: Sequence[Sequence[list[tuple[int, float]]]],
    vectors: npt.NDArray[np.float32],
) -> list[dict[int, list[Reason]]]:
    """For the atypical and the unlike cells of all patients, by image, what makes them so: at most `SHOWN` latents."""
    group_of = _group_of(cohort, patient_of)
    own, peers = ([image for some in patients for image, _ in some] for patients in cells)
    parts = unlike_parts(cohort, patient_of, group_of, own, peers, most=_PARTS)
    folded = [
        {image: distinct([latent for latent, _ in some], vectors, SHOWN) for image, some in each.items()}
        for each in parts
    ]
    latents = np.unique(np.array([latent for each in folded for one in each.values() for latent in one], np.int64))
    is_mean = cohort.barcodes.header.spec["normalize"] == "images"
    rates = cohort.values(latents).astype(np.float64)  # tokens above the threshold, of an image on average
    rates = rates if is_mean else rates / np.maximum(1, cohort.n_images)[:, None]
    here = _values_of(cohort, latents, sorted({*own, *peers}))
    column = {latent: at for at, latent in enumerate(latents.tolist())}
    found: list[dict[int, list[Reason]]] = []
    for images, each, some, is_own in zip((own, peers), parts, folded, (True, False), strict=True):
        rows: dict[int, list[Reason]] = {image: [] for image in images}
        for image, chosen in some.items():
            share, patient = dict(each[image]), int(patient_of[image])
            others = _others_of(cohort, patient, rates, here[image], is_own=is_own)
            rows[image] = [
                Reason(
                    latent=latent,
                    also=also,
                    share=sum(share[one] for one in (latent, *also)),
                    here=float(here[image][column[latent]]),
                    others=float(others[column[latent]]),
                )
                for latent, also in chosen.items()
            ]
        found.append(rows)
    return found


def _others_of(
    cohort: Cohort, patient: int, rates: npt.NDArray[np.float64], here: npt.NDArray[np.float64], *, is_own: bool
) -> npt.NDArray[np.float64]:
    """(latents,) the mean of the patient's other images, or of the other patients of its disease and dataset."""
    if is_own:
        n = int(cohort.n_images[patient])
        others = np.maximum(0, n * rates[patient] - here) / max(1, n - 1)
        return np.where(others < 1e-5, 0.0, others)  # what rounding leaves
    same = cohort.peers_of == cohort.peers_of[patient]
    same[patient] = False
    return np.asarray(rates[same].mean(axis=0))


def _values_of(cohort: Cohort, latents: Ints, images: list[int]) -> dict[int, npt.NDArray[np.float64]]:
    """Image -> (latents,) tokens above the threshold."""
    wanted, found = np.array(images, np.int64), {}
    for first, rows in cohort.image_blocks("X"):
        for image in wanted[(wanted >= first) & (wanted < first + rows.n_rows)].tolist():
            some = slice(rows.indptr[image - first], rows.indptr[image - first + 1])
            dense = np.zeros(cohort.n_latents)
            dense[rows.indices[some]] = rows.values[some]
            found[image] = dense[latents]
    return found


def _of_disease(
    cohort: Cohort, wanted: _Wanted, strongest: Strongest, vectors: npt.NDArray[np.float32], number: int
) -> dict[int, Beside]:
    rest = [n for other in range(len(cohort.diseases)) if other != number for n in cohort.groups_of(other)]
    latents = [row["latent"] for row in wanted.of_diseases[number]]
    return _two_sides(strongest, distinct(latents, vectors, _DISEASE_CONCEPTS), cohort.groups_of(number), rest)


def _of_pair(
    inputs: Inputs,
    cohort: Cohort,
    wanted: _Wanted,
    strongest: Strongest,
    vectors: npt.NDArray[np.float32],
    most: int,
    number: int,
) -> dict[int, Beside]:
    spec = inputs.comparisons[number].header.spec
    is_b = [name != spec["a"] if spec["b_is_rest"] else name == str(spec["b"]) for name in cohort.diseases]
    a = [n for at, name in enumerate(cohort.diseases) if name == spec["a"] for n in cohort.groups_of(at)]
    b = [n for at, is_one in enumerate(is_b) if is_one for n in cohort.groups_of(at)]
    found: dict[int, Beside] = {}
    for latents in wanted.of_pairs[number]:
        found |= _two_sides(strongest, distinct(latents, vectors, most), a, b)
    return found


def _two_sides(
    strongest: Strongest, latents: dict[int, list[int]], mine: Sequence[int], others: Sequence[int]
) -> dict[int, Beside]:
    """Cells of two sets of groups; `latents` as of `distinct`."""
    return {
        latent: Beside(mine=strongest.of(latent, mine, SHOWN), others=strongest.of(latent, others, SHOWN), also=also)
        for latent, also in latents.items()
    }
