"""Which cells are chosen, and the order of latents, against plain loops over dense arrays."""

import base64

import numpy as np
import pytest
import scipy.sparse as ss

from cytosae.atlas.cell_maps import Marks
from cytosae.atlas.cell_scan import OwnStrongest, Strongest, add_unit_rows, unit_products
from cytosae.atlas.composition import OTHER, Composition
from cytosae.atlas.drawings import STRIP_WIDTH, barcode_columns, barcode_picture, strip_of, strip_ticks
from cytosae.atlas.latent_lists import distinct
from cytosae.atlas.latent_order import N_PARTS, N_PLACES, Sketches, hashed, order_latents
from cytosae.atlas.pair_pages import largest_clear_p
from stores.csr import CsrRows

N_IMAGES, N_LATENTS, N_PATIENTS = 90, 30, 7


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    """(images, latents) with many equal values, and rows without any."""
    rng = np.random.default_rng(0)
    values = rng.integers(1, 6, (N_IMAGES, N_LATENTS)) * (rng.random((N_IMAGES, N_LATENTS)) < 0.3)
    values[:, 29] = 0
    values[[5, 40]] = 0
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def patient_of() -> np.ndarray:
    return np.random.default_rng(1).integers(-1, N_PATIENTS, N_IMAGES)


GROUP_OF_PATIENT = np.array([0, 0, 1, 1, 1, 2, 2, -1])  # the last is nobody


def blocks(dense: np.ndarray, size: int = 32) -> list[tuple[int, CsrRows]]:
    found = []
    for first in range(0, len(dense), size):
        rows = ss.csr_matrix(dense[first : first + size])
        found.append((first, CsrRows(rows.indices, rows.data, rows.indptr.astype(np.int64))))
    return found


@pytest.mark.parametrize("n_kept", [1, 2, 4])
def test_strongest_cells_are_of_different_patients(dense: np.ndarray, patient_of: np.ndarray, n_kept: int) -> None:
    latents = np.array([0, 3, 7, 28, 29])
    group_of = GROUP_OF_PATIENT[patient_of]
    found = Strongest(latents, N_LATENTS, 3, n_kept)
    for first, rows in blocks(dense):
        here = slice(first, first + rows.n_rows)
        found.add(first, rows, patient_of[here], group_of[here])

    def slow(latent: int, groups: list[int], n: int, without: int = -1) -> list[int]:
        ranked = sorted((-dense[i, latent], i) for i in range(N_IMAGES) if group_of[i] in groups and dense[i, latent])
        kept: dict[int, int] = {}  # patient -> image; a group keeps n_kept patients
        in_group = {group: 0 for group in groups}
        for _, image in ranked:
            group = int(group_of[image])
            if patient_of[image] not in kept and in_group[group] < n_kept:
                kept[int(patient_of[image])] = image
                in_group[group] += 1
        return [image for patient, image in kept.items() if patient != without][:n]

    for latent in latents.tolist():
        for groups in ([0], [1], [2], [0, 1, 2]):
            assert found.of(latent, groups, 3) == slow(latent, groups, 3)
            assert found.of(latent, groups, 2, without=3) == slow(latent, groups, 2, without=3)
    assert found.of(1, [0], 3) == [], "not wanted"


def test_own_strongest_cells(dense: np.ndarray, patient_of: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    wanted = [np.sort(rng.choice(N_LATENTS, n, replace=False)) for n in (0, 1, 5, 12, 3, 30, 2)]
    found = OwnStrongest(wanted, 3)
    for first, rows in blocks(dense):
        found.add(first, rows, patient_of[first : first + rows.n_rows])
    for patient, latents in enumerate(wanted):
        for latent in range(N_LATENTS):
            mine = [i for i in range(N_IMAGES) if patient_of[i] == patient and dense[i, latent] > 0]
            best = sorted(mine, key=lambda i: (-dense[i, latent], i))[:3] if latent in latents else []
            assert found.of(patient, latent) == best


def test_unit_rows_and_their_products(dense: np.ndarray, patient_of: np.ndarray) -> None:
    weights = np.random.default_rng(3).random(N_LATENTS).astype(np.float32)
    weights[:5] = 0
    share = np.arange(1, 1 + N_IMAGES, dtype=np.float32)
    sums = np.zeros((N_PATIENTS, N_LATENTS), np.float32)
    for first, rows in blocks(dense):
        here = slice(first, first + rows.n_rows)
        add_unit_rows(rows, weights, patient_of[here], share[here], sums)
    scaled = np.log1p(dense.astype(np.float64)) * weights
    norms = np.linalg.norm(scaled, axis=1)
    units = np.divide(scaled, norms[:, None], where=norms[:, None] > 0, out=np.zeros_like(scaled))
    slow = np.stack([(units * share[:, None])[patient_of == p].sum(axis=0) for p in range(N_PATIENTS)])
    np.testing.assert_allclose(sums, slow, rtol=1e-5, atol=1e-5)
    found = np.concatenate(
        [unit_products(rows, weights, patient_of[first : first + rows.n_rows], sums) for first, rows in blocks(dense)]
    )
    expected = [units[i] @ sums[p] if p >= 0 and norms[i] > 0 else np.nan for i, p in enumerate(patient_of)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isnan(found[[5, 40]]).all()


def test_sketches_are_sums_of_signed_images_whatever_the_blocks(dense: np.ndarray) -> None:
    is_counted = np.arange(N_IMAGES) % 9 > 0
    one, other = Sketches(N_LATENTS, 4), Sketches(N_LATENTS, 4)
    for sketches, size in ((one, 32), (other, 7)):
        for first, rows in blocks(dense, size):
            sketches.add(first, rows, is_counted[first : first + rows.n_rows])
    np.testing.assert_allclose(one.vectors(), other.vectors(), atol=1e-6)
    places, signs = hashed(0, N_IMAGES, 4)
    random = np.zeros((N_IMAGES, N_PARTS * N_PLACES))
    for image in range(N_IMAGES):
        for part in range(N_PARTS):
            random[image, places[image, part]] += signs[image, part]
            assert places[image, part] // N_PLACES == part
    values = np.sqrt(dense[is_counted].astype(np.float64))
    slow = (values - values.mean(axis=0)).T @ random[is_counted]
    norms = np.linalg.norm(slow, axis=1)
    norms[29] = 1
    np.testing.assert_allclose(one.vectors(), np.where(norms[:, None] > 0, slow / norms[:, None], 0), atol=1e-4)
    assert one.is_active.tolist() == (dense[is_counted] > 0).any(axis=0).tolist()


def test_products_of_sketches_are_correlations() -> None:
    """Of 3,000 images: within five standard errors of a sketch of 256 numbers, and right on average."""
    rng = np.random.default_rng(5)
    shared = rng.gamma(1, 1, (3000, 6))
    dense = (shared[:, rng.integers(0, 6, 40)] * rng.gamma(1, 1, (3000, 40))).astype(np.float32)
    dense[rng.random(dense.shape) < 0.5] = 0
    sketches = Sketches(40, 0)
    for first, rows in blocks(dense, 1024):
        sketches.add(first, rows, np.ones(rows.n_rows, bool))
    vectors = sketches.vectors()
    error = (vectors @ vectors.T - np.corrcoef(np.sqrt(dense).T))[np.triu_indices(40, 1)]
    assert abs(error).max() < 5 / 16
    assert abs(error.mean()) < 0.02
    assert error.std() < 1.2 / 16


def test_alike_latents_become_families_and_neighbours() -> None:
    rng = np.random.default_rng(6)
    family = np.repeat(np.arange(5), [40, 25, 20, 10, 6])
    centres = np.linalg.qr(rng.normal(size=(64, 5)))[0].T
    vectors = centres[family] + rng.normal(0, 0.05, (101, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    shuffled = rng.permutation(101)
    is_active = np.ones(110, bool)
    is_active[[3, 109]] = False
    places = np.flatnonzero(is_active)[:101]
    given = np.zeros((110, 64), np.float32)
    given[places] = vectors[shuffled]
    is_active[:] = False
    is_active[places] = True
    found = order_latents(given, is_active, most=5)
    assert sorted(found.order) == places.tolist()
    assert found.n_families == 5
    assert (found.family_of[~is_active] == -1).all()
    truth = dict(zip(places.tolist(), family[shuffled].tolist(), strict=True))
    for number in range(5):
        members = found.order[found.starts[number] : found.starts[number + 1]]
        assert (found.family_of[members] == number).all()
        assert len({truth[latent] for latent in members.tolist()}) == 1
    again = order_latents(given, is_active, most=5)
    assert again.order.tolist() == found.order.tolist()

    # inside a family: along a line, latents come in the order of the line
    angles = np.sort(rng.uniform(0, 1.2, 50))
    line = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    mixed = rng.permutation(50)
    ordered = mixed[order_latents(line[mixed], np.ones(50, bool), most=1).order]
    steps = np.abs(np.diff(ordered))
    assert np.median(steps) == 1
    assert steps.mean() < 3, "a random order has 17"


def test_no_latent_or_equal_latents_have_an_order() -> None:
    none = order_latents(np.zeros((4, 8), np.float32), np.zeros(4, bool))
    assert (none.order.tolist(), none.n_families, none.family_of.tolist()) == ([], 0, [-1] * 4)
    same = np.zeros((20, 8), np.float32)
    same[:, 0] = 1
    assert order_latents(same, np.ones(20, bool)).order.tolist() == list(range(20))
    assert order_latents(np.zeros((20, 8), np.float32), np.ones(20, bool)).n_families == 1


def test_latents_of_the_same_images_are_shown_once() -> None:
    vectors = np.zeros((7, 4), np.float32)
    for latent, place in enumerate((0, 1, 0, 2, 1, 0, 3)):
        vectors[latent, place] = 1
    assert distinct([5, 3, 0, 6, 2, 4, 1], vectors, 3) == {5: [0, 2], 3: [], 6: []}
    assert distinct([4, 1, 6], vectors, 9) == {4: [1], 6: []}
    assert distinct([4, 1], vectors, 0) == {}


def test_the_picture_of_a_barcode_has_the_largest_of_each_column() -> None:
    rng = np.random.default_rng(7)
    order = rng.permutation(500)[:430]
    starts = np.array([0, 3, 200, 430])
    columns = barcode_columns(order, starts, 500, most=100)
    assert columns.starts[0] == 0
    assert 98 <= columns.n <= 102
    for number in range(3):
        mine = columns.column_of[order[starts[number] : starts[number + 1]]]
        assert sorted(set(mine.tolist())) == list(range(columns.starts[number], columns.starts[number + 1]))
        assert (np.diff(mine) >= 0).all()
    barcodes = [rng.gamma(1, 1, 500) * (rng.random(500) < share) for share in (0.4, 0.8)]
    pairs = [(np.flatnonzero(each), each[each > 0].astype(np.float32)) for each in barcodes]
    found = barcode_picture(columns, pairs[0], pairs[1], 20.0)
    named = np.frombuffer(base64.b64decode(found["latents"]), "<u4")
    largest = max(each[order].max() for each in barcodes)
    for name, values in zip(("mine", "others"), barcodes, strict=True):
        steps = np.frombuffer(base64.b64decode(found[name]), np.uint8)
        for column in range(columns.n):
            members = np.flatnonzero(columns.column_of == column)
            assert steps[column] == np.round(
                np.log1p(20 * float(np.float32(values[members].max()))) / np.log1p(20 * found["largest"]) * 255
            )
    assert found["largest"] >= largest * (1 - 1e-6)
    for column in range(columns.n):
        members = np.flatnonzero(columns.column_of == column)
        first, second = (each[members] for each in barcodes)
        best = members[(first if first.any() else second).argmax()] if first.any() or second.any() else 0
        assert named[column] == best
    all_of_few = barcode_columns(np.array([2, 0, 1]), np.array([0, 1, 3]), 4)
    assert all_of_few.column_of.tolist() == [1, 2, 0, -1]


def test_maps_of_chosen_cells() -> None:
    rng = np.random.default_rng(8)
    images = {n: (rng.random((16, N_LATENTS)) * (rng.random((16, N_LATENTS)) < 0.4)).astype(np.float32) for n in (3, 9)}
    images[9][:, 4] = 0
    pairs = [(3, 1), (3, 4), (9, 4)]
    marks = Marks(pairs, 16)
    for image, dense in images.items():
        marks.fill(image, ss.csc_matrix(dense))
    marks.fill(11, ss.csc_matrix(images[3]))  # shown for another reason
    for image, latent in pairs:
        values = images[image][:, latent]
        assert marks.largest(image, latent) == values.max()
        steps = np.frombuffer(base64.b64decode(marks.packed(image, latent)), np.uint8)
        np.testing.assert_allclose(steps / 255 * values.max(), values, atol=values.max() / 500 + 1e-9)
    both = np.frombuffer(base64.b64decode(marks.together(3, [(1, 0.5), (4, 0.1)])), np.uint8)
    total = 0.5 * images[3][:, 1] / images[3][:, 1].max() + 0.1 * images[3][:, 4] / images[3][:, 4].max()
    np.testing.assert_allclose(both / 255, total / total.max(), atol=1 / 200)
    assert not any(base64.b64decode(marks.together(3, [])))


def test_shares_of_labels_by_patient() -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [1, 0, 1], [2, 2, 0], [0, 4, 0], [1, 3, 0]])
    found = Composition(["a", "b", OTHER], counts)
    rows = found.of(np.array([0]), np.array([1, 2, 3, 4, 5]))
    assert [row["label"] for row in rows] == ["a", "b", OTHER]
    assert [row["share"] for row in rows] == [0.75, 0.25, 0]
    theirs = np.array([[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 1, 0], [0.25, 0.75, 0]])
    np.testing.assert_allclose([row["others"] for row in rows], theirs.mean(axis=0))
    np.testing.assert_allclose([row["low"] for row in rows], np.quantile(theirs, 0.25, axis=0))
    assert [row["n"] for row in rows] == [3, 1, 0]
    assert [row["own_low"] for row in rows] == [None] * 3, "one patient has no range"
    back = found.of(np.array([1, 2, 3, 4, 5]), np.array([0]))
    np.testing.assert_allclose([row["own_low"] for row in back], np.quantile(theirs, 0.25, axis=0))
    np.testing.assert_allclose([row["own_high"] for row in back], np.quantile(theirs, 0.75, axis=0))
    few = found.of(np.array([1]), np.array([0, 2]))
    assert [row["share"] for row in few] == [None] * 3
    assert [row["low"] for row in few] == [None] * 3
    assert [row["label"] for row in found.of(np.array([0]), np.array([3]))] == ["a", "b"]


def test_ticks_of_a_strip_are_round_and_on_its_scale() -> None:
    assert [tick["text"] for tick in strip_ticks(93.6)] == ["0", "5", "50"]
    assert [tick["text"] for tick in strip_ticks(0.0231)] == ["0", "0.002", "0.02"]
    assert [tick["text"] for tick in strip_ticks(1)] == ["0", "0.1", "1"]
    assert strip_ticks(0.0) == [{"x": 0.0, "text": "0"}]
    for largest in (93.6, 1e-6, 7e8):
        found = strip_of(np.array([float(tick["text"]) for tick in strip_ticks(largest)], np.float32), largest)
        places = sorted(point["x"] for point in found.points)
        np.testing.assert_allclose(places, [tick["x"] for tick in strip_ticks(largest)], atol=0.11)
        assert places[-1] > 0.7 * STRIP_WIDTH, "the last number stands far to the right"


def test_the_line_of_a_volcano_parts_clear_from_unclear() -> None:
    p = np.array([0.001, 0.2, 0.01, np.nan, 0.04], np.float32)
    q = np.array([0.005, 0.3, 0.02, np.nan, 0.06], np.float32)
    assert largest_clear_p(p, q) == pytest.approx(0.01)
    assert largest_clear_p(p, np.full(5, 0.5, np.float32)) is None
    assert largest_clear_p(p, np.array([0.005, 0.04, 0.2, np.nan, 0.06], np.float32)) is None, "no line parts them"
