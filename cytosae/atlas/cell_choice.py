"""Which cells stand on the pages of patients, diseases and pairs: the strongest of a latent, the typical, the unlike.

Three passes over the barcodes of all images, and two more for every 682 patients at 49,152 latents (128 MiB of sums).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .cell_scan import Likeness, OwnStrongest, Strongest, add_unit_rows, unit_products
from .cohort import Cohort, Ints, Row
from .config import AtlasConfig
from .inputs import Inputs
from .latent_lists import characteristic, unusual_of
from .latent_order import LatentOrder, Sketches, order_latents
from .plan import LISTED

SHOWN = 3  # cells of a latent on each side
KINDS = 4  # typical cells of a patient, and as many atypical and unlike ones
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
    typical: list[tuple[int, float]]  # image, mean cosine to the patient's other images; largest first
    atypical: list[tuple[int, float]]  # smallest first
    unlike: list[tuple[int, float]]  # image, mean cosine to the images of the others with the disease; smallest first


@dataclass(frozen=True, eq=False, kw_only=True)
class CellChoice:
    """The cells of all pages of patients (by number), diseases (by number) and pairs (in the order of the inputs)."""

    order: LatentOrder
    patients: Sequence[PatientCells]
    diseases: Sequence[dict[int, Beside]]  # latent -> cells of the disease, and of the other diseases
    disease_lists: Sequence[list[dict[str, Any]]]
    pairs: Sequence[dict[int, Beside]]  # latent -> cells of A, and of B
    portraits: list[int]  # of each patient the most typical image; -1: none

    @cached_property
    def marks(self) -> list[tuple[int, int]]:
        """(image, latent) of every map that is shown, sorted."""
        found: set[tuple[int, int]] = set()
        sides = [each for patient in self.patients for each in (patient.beside, patient.beside_peers)]
        for cells in (*sides, *self.diseases, *self.pairs):
            for latent, beside in cells.items():
                found |= {(image, latent) for image in (*beside.mine, *beside.others)}
        return sorted(found)

    @cached_property
    def images(self) -> Ints:
        """All images, rising."""
        found = {image for image, _ in self.marks}
        for patient in self.patients:
            found |= {image for some in (patient.typical, patient.atypical, patient.unlike) for image, _ in some}
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
            typical=_extremes(images[number], alike.to_own, -1),
            atypical=_extremes(images[number], alike.to_own, 1),
            unlike=_extremes(images[number], alike.to_peers, 1),
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
    """How alike each image is to others; two passes for each 128 MiB of sums.

    patient_of : (n_images,) -1: left out
    """
    weights = cohort.rarity
    group_of = _group_of(cohort, patient_of)
    n_groups = int(cohort.peers_of.max(initial=-1)) + 2
    n_images = np.bincount(patient_of[patient_of >= 0], minlength=cohort.n_patients)
    share_of = (1 / np.maximum(1, n_images)).astype(np.float32)  # each patient of a group counts once
    peers = np.zeros((n_groups, cohort.n_latents), np.float32)
    n_peers = np.bincount(cohort.peers_of % n_groups, weights=n_images > 0, minlength=n_groups)
    to_own, to_peers = np.full((2, len(patient_of)), np.nan)
    size = max(1, _SUM_BYTES // (4 * cohort.n_latents))
    for first_patient in range(0, cohort.n_patients, size):
        is_here = (patient_of >= first_patient) & (patient_of < first_patient + size)
        target_of = np.where(is_here, patient_of - first_patient, -1)
        sums = np.zeros((min(size, cohort.n_patients - first_patient), cohort.n_latents), np.float32)
        for first, rows in cohort.image_blocks("X"):
            here = slice(first, first + rows.n_rows)
            add_unit_rows(rows, weights, target_of[here], np.ones(rows.n_rows, np.float32), sums)
            if first_patient == 0:
                shares = np.where(patient_of[here] >= 0, share_of[patient_of[here]], 0).astype(np.float32)
                add_unit_rows(rows, weights, group_of[here], shares, peers)
        for first, rows in cohort.image_blocks("X"):
            here = slice(first, first + rows.n_rows)
            mine = unit_products(rows, weights, target_of[here], sums)
            theirs = unit_products(rows, weights, np.where(is_here[here], group_of[here], -1), peers)
            some = np.flatnonzero(is_here[here] & ~np.isnan(mine))
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
    """The most typical image of a patient, or the first."""
    return cells.typical[0][0] if cells.typical else int(images[0]) if len(images) else -1


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
