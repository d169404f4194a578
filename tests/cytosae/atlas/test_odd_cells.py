"""Cells that are unlike others of their type, against plain loops over an invented cohort."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from cytosae.atlas.cell_reasons import unlike_parts
from cytosae.atlas.cell_scan import type_sums
from cytosae.atlas.cell_types import LEAST_CELLS, CellTypes, cell_types, means_by_type
from cytosae.atlas.cohort import Cohort
from cytosae.atlas.odd_cells import KINDS, SHOWN, OddCell, likeness, odd_cells
from stores.csr import CsrRows

N_IMAGES, N_PATIENTS, N_LATENTS = 150, 7, 24


class Invented:
    """150 images of 7 patients: two diseases, one patient without; three types, some images without a label."""

    n_latents, n_patients = N_LATENTS, N_PATIENTS
    peers_of = np.array([0, 0, 1, 1, 0, -1, 2])  # the last is alone

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.labels = [("a", "b", "", "rare")[n] for n in rng.choice(4, N_IMAGES, p=(0.5, 0.3, 0.15, 0.05))]
        usual = rng.gamma(0.5, 2, (4, N_LATENTS))
        rates = usual[["a", "b", "", "rare"].index("a")] * np.ones((N_IMAGES, 1))
        for n, label in enumerate(self.labels):
            rates[n] = usual[("a", "b", "", "rare").index(label)] * rng.gamma(1, 1, N_LATENTS)
        self.dense = rng.poisson(rates).astype(np.float32)
        self.dense[:, 20] = 1  # in every image: weighs nothing
        self.dense[rng.random(N_IMAGES) < 0.98, 21] = 0  # in too few to be told
        self.dense[[30, 71]] = 0  # without a latent
        self.is_readable = np.ones(N_IMAGES, bool)
        self.is_readable[[5, 30]] = False
        self.patient_of = rng.integers(-1, N_PATIENTS, N_IMAGES)
        with_each = (self.dense[self.is_readable] > 0).sum(axis=0)
        self.groups = SimpleNamespace(n_images_with=with_each)
        self.rarity = np.log((self.is_readable.sum() + 1) / (with_each + 1)).clip(0).astype(np.float32)

    def image_blocks(self, matrix: str, *, of: np.ndarray | None = None) -> Iterator[tuple[int, CsrRows]]:
        assert matrix == "X"
        for first in range(0, N_IMAGES, 16):
            some = self.dense[first : first + 16]
            if of is not None and not of[first : first + 16].any():
                continue
            row, latent = np.nonzero(some)
            indptr = np.searchsorted(row, np.arange(len(some) + 1))
            yield first, CsrRows(latent.astype(np.int32), some[row, latent], indptr.astype(np.int64))


@pytest.fixture(scope="module")
def made() -> Invented:
    return Invented()


@pytest.fixture(scope="module")
def types(made: Invented) -> CellTypes:
    return cell_types(cast(Cohort, made))


def members(made: Invented, patient: int, label: str) -> list[int]:
    return [
        n for n in range(N_IMAGES) if made.is_readable[n] and made.patient_of[n] == patient and made.labels[n] == label
    ]


def others_of(made: Invented, image: int) -> list[list[int]]:
    """The images of the type, of each other patient with the disease that has some."""
    patient = int(made.patient_of[image])
    peers = [p for p in range(N_PATIENTS) if p != patient and made.peers_of[p] == made.peers_of[patient] >= 0]
    return [some for some in (members(made, p, made.labels[image]) for p in peers) if some]


def asked(made: Invented) -> list[int]:
    return [n for n in range(N_IMAGES) if made.is_readable[n] and made.patient_of[n] >= 0]


def units_of(made: Invented) -> np.ndarray:
    scaled = np.log1p(made.dense.astype(np.float64)) * made.rarity
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-30)


def slow_likeness(made: Invented) -> tuple[np.ndarray, np.ndarray]:
    units = units_of(made)
    to_own, to_peers = np.full((2, N_IMAGES), np.nan)
    for image in asked(made):
        if not units[image].any():
            continue
        mine = members(made, int(made.patient_of[image]), made.labels[image])
        own = [units[image] @ units[n] for n in mine if n != image and units[n].any()]
        peers = [np.mean([units[image] @ units[n] for n in some if units[n].any()]) for some in others_of(made, image)]
        to_own[image] = np.mean(own) if own else np.nan
        to_peers[image] = np.mean(peers) if peers else np.nan
    return to_own, to_peers


def test_types_are_the_labels_of_each_patient(made: Invented, types: CellTypes) -> None:
    assert (types.type_of >= 0).sum() == len(asked(made))
    images_of = types.images_by_type()
    group: dict[tuple[int, str], int] = {}
    for patient in range(N_PATIENTS):
        numbers = types.of_patient(patient)
        labels = [types.labels[n] for n in numbers]
        counts = {label: len(members(made, patient, label)) for label in {*made.labels}}
        assert labels == sorted(
            (each for each in counts if counts[each]), key=lambda each: (each == "", -counts[each], each)
        )
        for n in numbers:
            assert images_of[n].tolist() == members(made, patient, types.labels[n])
            assert types.n_images[n] == len(images_of[n])
            key = (int(made.peers_of[patient]), types.labels[n])
            assert types.groups[n] == (group.setdefault(key, int(types.groups[n])) if key[0] >= 0 else -1)
    assert len(set(group.values())) == len(group) == types.n_groups


@pytest.mark.parametrize("n_at_once", [1000, 3, 1])
def test_likeness_is_within_a_type(made: Invented, types: CellTypes, n_at_once: int) -> None:
    cohort = cast(Cohort, made)
    found = likeness(cohort, types, type_sums(cohort, types), sum_bytes=n_at_once * 4 * N_LATENTS)
    to_own, to_peers = slow_likeness(made)
    np.testing.assert_allclose(found.to_own, to_own, atol=1e-5)
    np.testing.assert_allclose(found.to_peers, to_peers, atol=1e-5)
    assert np.isnan(to_peers[made.patient_of == 6]).all(), "nobody is beside the last"


def found_in(cohort: Cohort, types: CellTypes, vectors: np.ndarray) -> tuple[list[list[OddCell]], list[list[OddCell]]]:
    compared = type_sums(cohort, types)
    return odd_cells(cohort, types, compared, likeness(cohort, types, compared), vectors)


def slow_odd(made: Invented, values: np.ndarray, patient: int, *, is_own: bool) -> list[tuple[int, float]]:
    """(image, usual), the furthest first."""
    rows = []
    for image in asked(made):
        mine = members(made, patient, made.labels[image])
        if image not in mine or np.isnan(values[image]) or len(mine) < LEAST_CELLS:
            continue
        if not is_own and sum(map(len, others_of(made, image))) < LEAST_CELLS:
            continue
        usual = np.nanmean([values[n] for n in mine])
        rows.append((round(float(usual - values[image]), 5), image, float(usual)))
    rows.sort(key=lambda row: (-row[0], row[1]))
    return [(image, usual) for less, image, usual in rows if less > 0][: min(KINDS, len(rows) // 2)]


def slow_parts(made: Invented, image: int, *, is_own: bool) -> np.ndarray:
    """(latents,) mean distance from those compared with, less that of the patient's cells of the type on average."""
    units = units_of(made)
    mine = [n for n in members(made, int(made.patient_of[image]), made.labels[image]) if units[n].any()]
    others = [[n for n in some if units[n].any()] for some in others_of(made, image)]

    def distance(one: int) -> np.ndarray:
        sides = [[n for n in mine if n != one]] if is_own else others
        return np.mean([np.mean([(units[one] - units[n]) ** 2 / 2 for n in some], axis=0) for some in sides], axis=0)

    return distance(image) - np.mean([distance(n) for n in mine], axis=0)


def test_odd_cells_and_their_reasons(made: Invented, types: CellTypes) -> None:
    cohort = cast(Cohort, made)
    vectors = np.eye(N_LATENTS, dtype=np.float32)
    vectors[3] = vectors[2]  # active in the same images: told together
    both = found_in(cohort, types, vectors)
    is_told = made.groups.n_images_with >= 5
    assert not is_told.all()
    n_reasons = n_together = 0
    for found, values, is_own in zip(both, slow_likeness(made), (True, False), strict=True):
        for patient in range(N_PATIENTS):
            expected = slow_odd(made, values, patient, is_own=is_own)
            assert [odd.image for odd in found[patient]] == [image for image, _ in expected]
            for odd, (image, usual) in zip(found[patient], expected, strict=True):
                assert odd.alike == pytest.approx(values[image], abs=1e-5)
                assert odd.usual == pytest.approx(usual, abs=1e-5)
                parts = slow_parts(made, image, is_own=is_own)
                assert parts.sum() == pytest.approx(usual - values[image], abs=1e-6), "distances are cosines"
                shares = np.where(is_told, parts, 0).clip(0) / parts[parts > 0].sum()
                mine = [n for n in members(made, patient, made.labels[image]) if n != image]
                mean = (
                    made.dense[mine].mean(axis=0, dtype=np.float64)
                    if is_own
                    else np.mean(
                        [made.dense[some].mean(axis=0, dtype=np.float64) for some in others_of(made, image)], axis=0
                    )
                )
                top = np.sort(shares)[::-1][:12]
                assert sum(share for _, share in odd.more) <= top.sum() + 1e-6
                for latent, share in odd.more:
                    assert share == pytest.approx(shares[latent], abs=1e-4)
                    assert made.dense[image, latent] > mean[latent]
                assert len(odd.reasons) <= SHOWN
                for reason in odd.reasons:
                    n_reasons += 1
                    n_together += bool(reason.also)
                    assert reason.share == pytest.approx(shares[[reason.latent, *reason.also]].sum(), abs=1e-4)
                    assert reason.here == made.dense[image, reason.latent]
                    assert reason.others == pytest.approx(mean[reason.latent], abs=2e-5)
    assert n_reasons > 40
    assert n_together > 3
    assert not both[1][5], "no disease stated"
    assert not both[1][6], "nobody beside"


def test_parts_are_the_same_however_few_types_fit(made: Invented, types: CellTypes) -> None:
    images = [n for n in asked(made) if units_of(made)[n].any()]
    cohort = cast(Cohort, made)
    compared = type_sums(cohort, types)
    whole = unlike_parts(cohort, types, compared, images, images, most=5)
    few = unlike_parts(cohort, types, compared, images, images, most=5, sum_bytes=3 * 8 * N_LATENTS)
    for each, other in zip(whole, few, strict=True):
        assert each.keys() == other.keys()
        for image, parts in each.items():
            np.testing.assert_allclose(parts, other[image], atol=1e-5)
            assert [share for _, share in parts] == sorted((share for _, share in parts), reverse=True)


def test_nobody_has_no_type(made: Invented) -> None:
    nobody = Invented()
    nobody.patient_of[:] = -1
    types = cell_types(cast(Cohort, nobody))
    assert (types.n_types, types.n_groups) == (0, 0)
    cohort = cast(Cohort, nobody)
    assert np.isnan(likeness(cohort, types, type_sums(cohort, types)).to_own).all()
    found = found_in(cohort, types, np.eye(N_LATENTS, dtype=np.float32))
    assert found == ([[]] * N_PATIENTS, [[]] * N_PATIENTS)


def test_means_by_type(types: CellTypes) -> None:
    values = np.random.default_rng(0).random(N_IMAGES).astype(np.float32)
    values[types.type_of == 2] = np.nan
    found = means_by_type(values, types)
    for number in range(types.n_types):
        expected = np.nan if number == 2 else values[types.type_of == number].mean()
        assert found[number] == pytest.approx(expected, nan_ok=True)


def test_a_rare_type_is_not_the_least_typical_by_being_rare() -> None:
    """One image of another type among forty alike: over all types it was the least typical; of its type it is alone."""
    made = Invented()
    made.patient_of[:] = 0
    made.labels = ["a"] * 30 + ["b"] * (N_IMAGES - 30)
    made.labels[100] = "rare"
    made.dense[100] = 0
    made.dense[100, 23] = 9
    types = cell_types(cast(Cohort, made))
    found, _ = found_in(cast(Cohort, made), types, np.eye(N_LATENTS, dtype=np.float32))
    assert len(found[0]) == KINDS
    assert 100 not in [odd.image for odd in found[0]]
