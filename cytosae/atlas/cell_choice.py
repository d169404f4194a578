"""Which cells stand on the pages of patients, diseases and pairs: the strongest of a latent, the typical, the unlike.

Five passes over the barcodes of all images; at 49,152 latents two more of the images of each 682 types of cell of
patients (128 MiB of sums), and of each 341 of these (what makes a cell unlike others).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .cell_scan import OwnStrongest, Strongest, type_sums
from .cell_types import CellTypes, cell_types
from .cohort import Cohort, Ints, Row
from .config import AtlasConfig
from .inputs import Inputs
from .latent_lists import characteristic, distinct, higher_on, unusual_of
from .latent_order import LatentOrder, Sketches, order_latents
from .odd_cells import OddCell, likeness, odd_cells
from .plan import LISTED

SHOWN = 3  # cells of a latent on each side
MOST_TYPES = 6  # of cell, of a patient
_DISEASE_CONCEPTS = 6
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
    atypical: list[OddCell]  # beside the patient's other images of their type
    unlike: list[OddCell]  # beside images of their type of other patients with the disease in the dataset


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
            for odd in (*patient.atypical, *patient.unlike):
                found |= {(odd.image, latent) for latent in (*(each.latent for each in odd.reasons), *dict(odd.more))}
        return sorted(found)

    @cached_property
    def images(self) -> Ints:
        """All images, rising."""
        found = {image for image, _ in self.marks}
        for patient in self.patients:
            found |= {odd.image for odd in (*patient.atypical, *patient.unlike)}
            found |= {image for each in patient.types for image, _ in each.typical}
        return np.array(sorted(found | {image for image in self.portraits if image >= 0}), np.int64)


@dataclass(eq=False, kw_only=True)
class _Wanted:
    """Latents of which cells are looked for."""

    characteristic: list[list[dict[str, Any]]]
    unusual: list[list[dict[str, Any]] | None]
    of_diseases: list[list[dict[str, Any]]]
    of_pairs: list[list[list[int]]]  # of A, of B
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
    types = cell_types(cohort)
    compared = type_sums(cohort, types)
    alike = likeness(cohort, types, compared)
    atypical, unlike = odd_cells(cohort, types, compared, alike, vectors)
    images_of = types.images_by_type()
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
            types=_types(types, images_of, alike.to_own, number),
            atypical=atypical[number],
            unlike=unlike[number],
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
        portraits=[cells.types[0].typical[0][0] if cells.types else -1 for cells in patients],
    )


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
        of_pairs.append([higher_on(table, side, most) for side in "ab"])
    return _Wanted(characteristic=lists, unusual=rare, of_diseases=of_diseases, of_pairs=of_pairs)


def _group_of(cohort: Cohort, patient_of: Ints) -> Ints:
    """(n_images,) group of each image: disease and dataset; the last for patients without a disease; -1 for nobody."""
    n_groups = int(cohort.peers_of.max(initial=-1)) + 2
    if not cohort.n_patients:
        return np.full(len(patient_of), -1, np.int64)
    return np.where(patient_of >= 0, cohort.peers_of[patient_of] % n_groups, -1)


def _types(types: CellTypes, images_of: Sequence[Ints], alike: npt.NDArray[np.float32], patient: int) -> list[CellType]:
    """The patient's commonest types of cell, and the most typical cells of each."""
    return [
        CellType(label=types.labels[at], n=int(types.n_images[at]), typical=_typical(images_of[at], alike))
        for at in types.of_patient(patient)[:MOST_TYPES]
    ]


def _typical(images: Ints, alike: npt.NDArray[np.float32]) -> list[tuple[int, float]]:
    """At most `SHOWN`, the most alike first, ties (to 1e-5) by number; what is like nothing last."""
    order = np.lexsort((images, np.round(-np.nan_to_num(alike[images], nan=-1), 5)))[:SHOWN]
    return [(int(images[at]), float(alike[images[at]])) for at in order]


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
