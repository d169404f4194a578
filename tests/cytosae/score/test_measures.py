"""Each measure of a scorecard equals its slow twin on small data, finds what is planted, and nothing in noise."""

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.sparse import csc_matrix, csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from cytosae.score.hierarchy import best_threshold, lineages
from cytosae.score.images import some_rows
from cytosae.score.intervals import MOST_BLOCKS, blocks_of, limits
from cytosae.score.monosemanticity import mean_cosine, monosemanticity, monosemanticity_without, unit_rows
from cytosae.score.morans_i import means_without, morans_i, shuffled
from cytosae.score.single_latents import single_latents, single_without
from cytosae.score.sparse_probing import area_under_roc, areas_without, rank_latents, sparse_probing

Floats = npt.NDArray[np.float64]


def drawn(n: int, n_latents: int, seed: int, share: float = 0.4) -> npt.NDArray[np.float32]:
    """Sparse activations, some of them equal; latent 0 never active, latent 1 always."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((n, n_latents)) < share, rng.integers(1, 9, (n, n_latents)) / 4, 0)
    values[:, 0] = 0
    values[:, 1] = 0.5 + rng.random(n)
    return values.astype(np.float32)


def by_latent(values: npt.NDArray[np.float32]) -> csc_matrix:
    found = csc_matrix(values)
    found.sort_indices()
    return found


# ------------------------------------------------------------------------------------------------ single latents


@pytest.mark.parametrize("signed", [False, True])
def test_every_latent_equals_scikit_learn(signed: bool) -> None:
    """Ties, latents that are never or always active, activations below 0, and images of none of the classes."""
    rng = np.random.default_rng(1)
    values = drawn(60, 8, 0)
    if signed:
        values[:, 3] *= rng.choice([-1, 1], 60)
    labels = rng.integers(-1, 3, 60)
    found = single_latents(by_latent(values), labels, 3)
    for latent in range(8):
        for c in range(3):
            truth, x = labels == c, values[:, latent].astype(np.float64)
            assert found.average_precision[latent, c] == pytest.approx(average_precision_score(truth, x))
            if latent == 0:
                assert found.removed[latent, c] == 0
                continue
            scaled = (x / x.std())[:, None]
            model = LogisticRegression(C=1, tol=1e-10, max_iter=10_000).fit(scaled, truth)
            share = log_loss(truth, np.full(60, truth.mean()))
            expected = 1 - log_loss(truth, model.predict_proba(scaled)[:, 1]) / share
            assert found.removed[latent, c] == pytest.approx(expected, abs=1e-6)


def test_a_class_without_an_image_has_no_score() -> None:
    found = single_latents(by_latent(drawn(20, 3, 0)), np.zeros(20, np.int64), 2)
    assert np.isnan(found.average_precision[:, 1]).all()
    assert np.isnan(found.removed).all()  # class 0 is every image
    assert found.average_precision[:, 0] == pytest.approx([1, 1, 1])


# ------------------------------------------------------------------------------------------------ sparse probing


def test_latents_are_ranked_by_the_difference_of_means() -> None:
    values, labels = drawn(50, 9, 2), np.random.default_rng(3).integers(-1, 3, 50)
    ranked = rank_latents(csr_matrix(values), labels, 3, 20)
    assert ranked.shape == (3, 9)
    x = values.astype(np.float64)
    for c in range(3):
        spread = np.where(x.std(0) > 0, x.std(0), np.inf)
        effect = np.abs(x[labels == c].mean(0) - x[labels != c].mean(0)) / spread
        assert effect[ranked[c]].tolist() == pytest.approx(sorted(effect, reverse=True))
        assert ranked[c][-1] == 0  # never active
    training = np.random.default_rng(4).random(50) < 0.7
    of_some = rank_latents(csr_matrix(values), labels, 3, 20, training)
    np.testing.assert_array_equal(of_some, rank_latents(csr_matrix(values[training]), labels[training], 3, 20))


def test_some_rows_are_those_of_the_dense_matrix() -> None:
    values, rows = drawn(40, 9, 5), np.flatnonzero(np.random.default_rng(6).random(40) < 0.4)
    found = some_rows(by_latent(values), rows)
    np.testing.assert_array_equal(found.toarray(), values[rows])
    assert found.has_sorted_indices
    assert some_rows(by_latent(values), rows[:0]).shape == (0, 9)


def test_area_under_roc_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, score = rng.random(80) < 0.3, rng.integers(0, 9, 80).astype(np.float64)
    assert area_under_roc(truth, score) == pytest.approx(roc_auc_score(truth, score))


@pytest.mark.stress
def test_a_planted_latent_is_enough_and_noise_is_not() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 300)
    values = drawn(300, 40, 6)
    values[:, 10:13] = 0
    values[np.arange(300), 10 + labels] = 1 + rng.random(300)
    fold_of = rng.integers(0, 5, 300)
    dense = np.eye(3)[labels] @ rng.normal(size=(3, 6)) + 0.01 * rng.normal(size=(300, 6))
    found = sparse_probing(csr_matrix(values), labels, fold_of, 3, (1, 2), dense=dense.astype(np.float32))
    assert found.dense is not None
    assert found.latents.min() > 0.999
    assert found.dense.min() > 0.999
    noise = sparse_probing(csr_matrix(values), rng.permutation(labels), fold_of, 3, (1, 2, 5))
    assert noise.dense is None
    assert np.abs(noise.latents - 0.5).max() < 0.15


def test_nothing_is_chosen_with_held_out_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of latents of noise, 20 that are chosen by all rows tell labels apart in held-out rows, too."""
    rng = np.random.default_rng(7)
    values = csr_matrix(rng.random((120, 3000)).astype(np.float32))
    labels, fold_of = rng.permutation(np.arange(120) % 2), rng.permutation(np.arange(120) % 4)
    found = sparse_probing(values, labels, fold_of, 2, (20,)).latents.mean()
    of_all = rank_latents(values, labels, 2, 20)
    monkeypatch.setattr("cytosae.score.sparse_probing.rank_latents", lambda *args: of_all)
    assert sparse_probing(values, labels, fold_of, 2, (20,)).latents.mean() > 0.8
    assert abs(found - 0.5) < 0.15


# ------------------------------------------------------------------------------------------------ monosemanticity


def slow_monosemanticity(activation: Floats, units: Floats) -> float:
    """All pairs, one after the other."""
    a = activation - activation.min()
    pairs = [(a[n] * a[m], float(units[n] @ units[m])) for n, m in combinations(range(len(a)), 2)]
    weight = sum(w for w, _ in pairs)
    return sum(w * cosine for w, cosine in pairs) / weight if weight > 1e-12 else float("nan")


@pytest.mark.parametrize("signed", [False, True])
def test_monosemanticity_equals_all_pairs(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cytosae.score.monosemanticity._MOST_NUMBERS", 15)  # several blocks of latents
    rng = np.random.default_rng(0)
    values, units = drawn(30, 8, 1), unit_rows(rng.normal(size=(30, 5)) + 3)
    values[:, 4] = 0
    values[7, 4] = 2  # active in one image: no pair
    if signed:
        values[:, 3] -= 1
    found = monosemanticity(by_latent(values), units)
    assert np.isnan(found[[0, 4]]).all()
    for latent in (1, 2, 3, 5, 6, 7):
        assert found[latent] == pytest.approx(slow_monosemanticity(values[:, latent].astype(np.float64), units))
    cosines = [float(units[n] @ units[m]) for n, m in combinations(range(30), 2)]
    assert mean_cosine(units) == pytest.approx(np.mean(cosines))


def test_a_latent_of_one_kind_of_image_is_monosemantic() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 200)
    units = unit_rows(4 * np.eye(4)[kind] + 0.1 * rng.normal(size=(200, 4)))
    values = drawn(200, 12, 3)
    values[:, 2] = (kind == 1) * (1 + rng.random(200))
    found = monosemanticity(by_latent(values), units)
    assert found[2] > 0.95
    assert np.abs(found[3:] - mean_cosine(units)).max() < 0.1


# ------------------------------------------------------------------------------------------------ Moran's I


def slow_morans_i(image: Floats) -> float:
    """By its definition, with the matrix of weights."""
    side = len(image)
    place = [(r, c) for r in range(side) for c in range(side)]
    weights = np.array([[abs(r - s) + abs(c - d) == 1 for s, d in place] for r, c in place], float)
    z = image.ravel() - image.mean()
    return float(len(z) / weights.sum() * (z @ weights @ z) / (z @ z))


def test_morans_i_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    maps = np.where(rng.random((6, 6, 20)) < 0.5, rng.random((6, 6, 20)), 0)
    maps[:, :, 3] = 0.25
    found = morans_i(maps)
    assert np.isnan(found[3])
    for n in (n for n in range(20) if n != 3):
        assert found[n] == pytest.approx(slow_morans_i(maps[:, :, n]))


def test_morans_i_of_shuffled_patches_is_that_of_chance() -> None:
    rng = np.random.default_rng(1)
    row, column = np.mgrid[:16, :16]
    disc = ((row - 7) ** 2 + (column - 7) ** 2 < 20).astype(float)
    board = ((row + column) % 2).astype(float)
    maps = np.stack([disc, board], -1)
    assert morans_i(maps) == pytest.approx([0.8, -1], abs=0.1)
    by_chance = np.mean([morans_i(shuffled(maps, rng)) for _ in range(400)], axis=0)
    assert by_chance == pytest.approx([-1 / 255, -1 / 255], abs=0.01)


# ------------------------------------------------------------------------------------------------ coarse and fine


def test_the_threshold_has_the_best_f1() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, truth = rng.integers(0, 5, 30).astype(float), rng.random(30) < 0.4
        if not truth.any():
            continue
        f1 = {t: 2 * (truth & (values >= t)).sum() / ((values >= t).sum() + truth.sum()) for t in np.unique(values)}
        assert f1[best_threshold(values, truth)] == pytest.approx(max(f1.values()))


def test_planted_absorption_and_splitting_are_found() -> None:
    """Coarse label 0 has finer labels 0 and 1; its latent is silent in images of 1, where latent 2 is on instead."""
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1, 2, 3], [80, 40, 60, 60])
    parents = np.repeat([0, 1], [120, 120])
    values = np.zeros((240, 6), np.float32)
    values[:, 3:] = np.where(rng.random((240, 3)) < 0.3, rng.random((240, 3)), 0)
    values[labels == 0, 1] = 1
    values[labels == 1, 2] = 1
    values[parents == 1, 0] = 1  # a latent of the whole second label: nothing is absorbed
    some = by_latent(values)
    by_label, by_parent = (single_latents(some, x, n).average_precision for x, n in ((labels, 4), (parents, 2)))
    first, second = lineages(
        *(some, labels, parents, np.arange(240), 4, 2),
        of_labels=by_label,
        of_parents=by_parent,
        shuffles=5,
        seed=0,
        blocks=blocks_of(np.arange(240) // 30, "patient", 0),
    )
    assert (first.latent, first.child_latents[1]) == (1, 2)
    assert first.absorbed == pytest.approx(40 / 120)
    assert first.absorbed_null == pytest.approx(40 / 120 * 40 / 120)  # latent 2 is on in a third of the images
    assert first.split == pytest.approx(1)
    assert max(first.split_null) < 0.9
    assert second.absorbed == 0
    left = np.arange(240) >= 30  # the first of 8 blocks has images of label 0 only
    assert (first.n_blocks, first.images_of_block[0], first.taken_of_block.sum()) == (4, 30, 40)
    inside = left & (parents == 0)
    twin = [average_precision_score(labels[inside] == c, values[inside, latent]) for c, latent in ((0, 1), (1, 2))]
    assert first.split_without[0] == pytest.approx(np.mean(twin))
    assert second.split < max(second.split_null) + 0.1


# ------------------------------------------------------------------------------------------------ intervals


def test_what_is_left_without_a_block_equals_leaving_it_out() -> None:
    rng = np.random.default_rng(4)
    values, labels, block_of = drawn(60, 8, 5), rng.integers(-1, 3, 60), rng.integers(0, 5, 60)
    some, units = by_latent(values), unit_rows(rng.normal(size=(60, 6)))
    score, truth = np.round(rng.normal(size=60), 1), labels == 1
    areas = areas_without(truth, score, block_of, 5)
    assert areas[0] == pytest.approx(roc_auc_score(truth, score))
    best = np.array([1, 5, 7])
    precision, removed = single_without(some, labels, block_of, 5, best)
    looks = monosemanticity_without(some, units, block_of, 5)
    maps, of_latent = rng.normal(size=40), rng.integers(0, 4, 40)
    of_map = np.where(of_latent == 3, 2, rng.integers(0, 5, 40))  # all maps of latent 3 are in block 2
    means, shares = means_without(maps, of_latent, of_map, 6, 5, 0.1)
    for block in range(5):
        left = block_of != block
        assert areas[1 + block] == pytest.approx(roc_auc_score(truth[left], score[left]))
        twin = single_latents(by_latent(values[left]), labels[left], 3)
        np.testing.assert_allclose(precision[:, block], twin.average_precision[best, range(3)])
        np.testing.assert_allclose(removed[:, block], twin.removed[best, range(3)], atol=1e-8)
        np.testing.assert_allclose(looks[2:, block], monosemanticity(by_latent(values[left]), units[left])[2:])
        by_mean = [
            maps[(of_latent == latent) & (of_map != block)].mean()
            for latent in range(4)
            if ((of_latent == latent) & (of_map != block)).any()
        ]
        assert means[block] == pytest.approx(np.mean(by_mean))
        assert shares[block] == pytest.approx(np.mean(np.array(by_mean) > 0.1))
    assert np.isnan(areas_without(np.arange(4) < 2, np.arange(4.0), np.array([0, 0, 1, 1]), 2)[1:]).all()


@pytest.mark.parametrize(("n_patients", "far", "least"), [(6, 1.0, 0.93), (20, 1.0, 0.93), (20, 3.5, 0.93)])
def test_intervals_hold_the_area_of_other_patients(n_patients: int, far: float, least: float) -> None:
    """Patients of 4 to 30 images with a shift of their own; the label moves the score by `far`."""

    def cohort(rng: np.random.Generator, n: int) -> tuple[npt.NDArray[np.bool_], Floats, npt.NDArray[np.int64]]:
        of = np.repeat(np.arange(n), rng.integers(4, 30, n))
        truth = rng.random(len(of)) < rng.beta(2, 2, n)[of]
        return truth, far * truth + rng.normal(size=len(of)) + 0.7 * rng.normal(size=n)[of], of

    rng = np.random.default_rng([n_patients, int(far)])
    truth, score, _ = cohort(rng, 20_000)
    wanted, n_within, widths = area_under_roc(truth, score), 0, []
    for _ in range(300):
        truth, score, of = cohort(rng, n_patients)
        found = areas_without(truth, score, of, n_patients)
        low, high = limits(found[0], found[1:], n_patients, bounded=True)
        assert low is not None
        assert high is not None
        assert 0 <= low <= found[0] <= high <= 1
        n_within += low <= wanted <= high
        widths.append(high - low)
    assert n_within / 300 >= least
    assert np.median(widths) < {(6, 1.0): 0.65, (20, 1.0): 0.25, (20, 3.5): 0.13}[n_patients, far]


def test_few_and_many_groups() -> None:
    assert limits(0.5, np.array([0.4, np.nan]), 5, bounded=True) == (None, None)
    assert limits(0.5, np.array([0.4, 0.6]), 1, bounded=False) == (None, None)
    all_right = limits(1.0, np.ones(20), 20, bounded=True)  # as of a share: 1 / (1 + t^2 / n)
    assert all_right == pytest.approx((1 / (1 + 2.093**2 / 20), 1.0), abs=1e-4)
    plain = limits(2.0, np.array([1.0, 3.0]), 2, bounded=False)
    assert plain == pytest.approx((2 - 12.7062, 2 + 12.7062), rel=1e-4)
    few, many = blocks_of(np.array([7, 7, 3]), "patient", 0), blocks_of(np.arange(1000), "image", 0)
    assert (few.of_image.tolist(), few.n) == ([1, 1, 0], 2)
    assert (many.n, {*np.bincount(many.of_image).tolist()}) == (MOST_BLOCKS, {5})
