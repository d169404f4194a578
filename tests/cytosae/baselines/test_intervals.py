"""The intervals of SAE minus baseline hold the truth about as often as they say, also over few patients."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import t as student

from cytosae.baselines.figures_of_draws import figures_of_draws, purity_without
from cytosae.baselines.measure import ImageSums
from cytosae.baselines.versus import (
    Lead,
    interval_of_difference,
    interval_of_draws,
    interval_without,
    smaller_lead,
)
from cytosae.concepts import shuffled_labels

Ints = npt.NDArray[np.int64]


@pytest.mark.parametrize("n_patients", [5, 8, 20, 60])
def test_coverage(n_patients: int) -> None:
    """Two SAEs that leave 0.3 and 0.4 of the variance, more or less by patient; patients have 4 to 30 images."""
    rng = np.random.default_rng(n_patients)
    n_within = n_plain = 0
    for _ in range(300):
        variance = rng.gamma(3, 1, n_patients) * rng.integers(4, 30, n_patients)
        hard = rng.gamma(4, 0.25, n_patients)  # a patient is hard for both
        errors = [share * variance * hard * rng.gamma(20, 0.05, n_patients) for share in (0.3, 0.4)]
        weights = np.vstack(
            [np.ones(n_patients), rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), 300)]
        )
        difference = (weights @ (errors[1] - errors[0])) / (weights @ variance)
        low, high = interval_of_draws(difference[0], difference[1:], n_patients)
        assert low is not None
        assert high is not None
        n_within += low < 0.1 < high
        plain = np.quantile(difference[1:], [0.025, 0.975])
        n_plain += plain[0] < 0.1 < plain[1]
    assert n_within / 300 > 0.88
    assert n_within >= n_plain
    if n_patients <= 8:
        assert n_plain / 300 < 0.88  # what plain quantiles would give


def test_few_and_none() -> None:
    draws = np.linspace(-1, 1, 1001)
    many, few = interval_of_draws(0.0, draws, 10_000), interval_of_draws(0.0, draws, 2)
    assert many == pytest.approx((-0.95, 0.95), abs=1e-3)
    assert few[0] is not None
    assert few[0] == pytest.approx(-0.95 * 12.7062 / 1.95996 * 2**0.5, rel=1e-3)
    assert interval_of_draws(0.0, draws, 1) == (None, None)
    assert interval_of_draws(float("nan"), draws, 9) == (None, None)
    moved = interval_of_draws(0.2, draws + 5, 10_000, is_moved=True)  # draws lie elsewhere: only their spread counts
    assert moved == pytest.approx((0.2 - 0.95, 0.2 + 0.95), abs=1e-3)
    few_left = interval_without(1.0, np.array([0.9, 1.1]))
    assert few_left == pytest.approx((1 - 12.7062 * 0.1, 1 + 12.7062 * 0.1), rel=1e-4)
    assert interval_without(1.0, np.array([0.9, np.nan])) == (None, None)
    assert interval_without(float("nan"), np.array([0.9, 1.1])) == (None, None)


def cells(rng: np.random.Generator, n_patients: int, n_latents: int, factor: float) -> tuple[ImageSums, Ints, Ints]:
    """Images of patients with their own mixture of three labels and their own frequency of each latent.

    A latent is `factor` times as frequent in images of one label.
    """
    groups = np.repeat(np.arange(n_patients), rng.integers(4, 30, n_patients))
    mixtures = rng.dirichlet([2, 2, 2], n_patients)
    labels = np.array([rng.choice(3, p=mixtures[patient]) for patient in groups])
    return latents_of(rng, labels, groups, n_latents, factor), labels, groups


def latents_of(rng: np.random.Generator, labels: Ints, groups: Ints, n_latents: int, factor: float) -> ImageSums:
    """Another SAE's latents of the same images."""
    own, rate = np.arange(n_latents) % 3, 0.08 * rng.gamma(3, 1 / 3, (int(groups.max()) + 1, n_latents))
    odds = np.where(own == labels[:, None], factor, 1) * rate[groups]
    active = rng.random(odds.shape) < np.minimum(0.9, odds)
    one, latents = np.ones(len(groups)), np.nonzero(active)[1]
    return ImageSums(
        n_latents=n_latents, tokens=one, error=one, square=one, shifted=one[:, None], active=one,
        begins=np.concatenate([[0], np.cumsum(active.sum(1))]), latents=latents.astype(np.int32),
        values=rng.gamma(2, 1, len(latents)).astype(np.float32),
    )  # fmt: skip


def test_purities_without_a_patient_equal_leaving_it_out() -> None:
    rng = np.random.default_rng(0)
    sums, labels, groups = cells(rng, 6, 9, 3.0)
    labels[3] = -1
    shuffled = np.stack([rng.permutation(labels) for _ in range(3)])
    found = purity_without(sums, labels, shuffled, groups, least_images=2)
    for patient in range(6):
        kept = np.vstack([np.ones(len(labels)), (groups != patient)[None], (groups != patient)[None]]).astype(float)
        twin = [figures_of_draws(sums, kept, labels, np.stack([each, each]), least_images=2) for each in shuffled]
        chance = np.mean([each["label_purity_by_chance"][1] for each in twin])
        assert found["label_purity"][patient] == pytest.approx(twin[0]["label_purity"][1])
        assert found["label_purity_by_chance"][patient] == pytest.approx(chance)
        assert found["label_purity_above_chance"][patient] == pytest.approx(twin[0]["label_purity"][1] - chance)
    nothing = purity_without(sums, np.full(len(labels), -1), shuffled, groups, least_images=2)
    assert np.isnan(nothing["label_purity"]).all()


def slow_difference(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float]:
    """Of rows with the figure and then the figure without each patient, pair by pair and patient by patient."""
    n, of_patients, differences = len(ours[0]) - 1, [], []
    for one in ours:
        for other in theirs:
            left = [a - b for a, b in zip(one[1:], other[1:], strict=True)]
            mean = sum(left) / n
            of_patients.append((n - 1) / n * sum((each - mean) ** 2 for each in left))
            differences.append(one[0] - other[0])
    of_rows = 0.0
    for side in (ours, theirs):
        mean = sum(row[0] for row in side) / len(side)
        of_rows += sum((row[0] - mean) ** 2 for row in side) / len(side)
    far = student.ppf(0.975, n - 1) * (sum(of_patients) / len(of_patients) + of_rows) ** 0.5
    middle = sum(differences) / len(differences)
    return middle - far, middle + far


@pytest.mark.parametrize(("n_ours", "n_theirs"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_interval_of_difference_equals_its_slow_twin(n_ours: int, n_theirs: int) -> None:
    """Leaving out a patient from both SAEs, on labels and latents; then the loops over pairs."""
    rng = np.random.default_rng([n_ours, n_theirs])
    sums, labels, groups = cells(rng, 7, 9, 4.0)
    shuffled = np.stack([rng.permutation(labels) for _ in range(3)])
    kept = np.vstack([np.ones(len(labels)), *(groups != patient for patient in range(7))]).astype(float)
    sides = []
    for number in (n_ours, n_theirs):
        rows = []
        for _ in range(number):
            one = replace(sums, values=rng.gamma(1, 1, len(sums.values)).astype(np.float32))  # same images, another SAE
            whole = figures_of_draws(one, kept, labels, shuffled, least_images=2)["label_purity"]
            without = purity_without(one, labels, shuffled, groups, least_images=2)["label_purity"]
            np.testing.assert_allclose(without, whole[1:])
            rows.append([whole[0], *without])
        sides.append(np.array(rows))
    found = interval_of_difference(*sides)
    assert found == pytest.approx(slow_difference(sides[0].tolist(), sides[1].tolist()))
    if (n_ours, n_theirs) == (1, 1):
        assert found == pytest.approx(interval_without(sides[0][0, 0] - sides[1][0, 0], (sides[0] - sides[1])[0, 1:]))
    sides[0][0, 3] = np.nan  # a label that one patient alone has: without them there is no figure
    assert interval_of_difference(*sides) == pytest.approx(
        slow_difference(*(np.delete(side, 3, axis=1).tolist() for side in sides))
    )
    assert interval_of_difference(sides[0][:, :2], sides[1][:, :2]) == (None, None)
    sides[1][:, 0] = np.nan
    assert interval_of_difference(*sides) == (None, None)


def test_the_smaller_lead_is_that_over_the_better_of_two() -> None:
    over_one, over_other = Lead(0.3, 0.2, 0.4), Lead(0.25, -0.1, 0.6)
    assert smaller_lead(over_one, over_other) == smaller_lead(over_other, over_one) == Lead(0.25, -0.1, 0.4)
    assert (over_one.is_ahead, over_other.is_ahead, over_other.is_behind) == (True, False, False)
    unknown = smaller_lead(over_one, Lead(0.1, None, None))
    assert (unknown, unknown.is_ahead, unknown.is_behind) == (Lead(0.1, None, None), None, None)


@pytest.mark.stress
@pytest.mark.parametrize(("n_patients", "factor"), [(5, 1.0), (8, 1.0), (8, 4.0), (20, 4.0)])
def test_coverage_of_differences_of_purity(n_patients: int, factor: float) -> None:
    """The SAE's factor against its root; then that it is ahead of two, where nothing or both are as good as it."""
    rng = np.random.default_rng([n_patients, int(factor), 1])
    found, n_beaten = [], 0
    for _ in range(200):
        sums, labels, groups = cells(rng, n_patients, 40, factor)
        others = [latents_of(rng, labels, groups, 40, each) for each in (factor**0.5, factor, factor)]
        shuffled = np.stack([*shuffled_labels(labels, groups, shuffles=10, seed=0)])
        whole = np.ones((1, len(labels)))
        rows = []
        for one in (sums, *others):
            observed = figures_of_draws(one, whole, labels, shuffled, least_images=5)["label_purity_above_chance"][0]
            without = purity_without(one, labels, shuffled, groups, least_images=5)["label_purity_above_chance"]
            rows.append(np.array([[observed, *without]]))
        found.append([rows[0][0, 0] - rows[1][0, 0], *interval_of_difference(rows[0], rows[1])])
        lows = [interval_of_difference(rows[0], each)[0] for each in rows[2:]]
        n_beaten += all(low is not None and low > 0 for low in lows)
    values = np.array(found, np.float64)
    wanted = values[:, 0].mean()
    assert ((values[:, 1] <= wanted) & (wanted <= values[:, 2])).mean() >= 0.92
    assert n_beaten / 200 <= 0.025  # of SAEs that are no better than either


@pytest.mark.stress
@pytest.mark.parametrize(("n_patients", "factor"), [(5, 1.0), (8, 4.0), (20, 1.0), (20, 4.0)])
def test_coverage_of_purity(n_patients: int, factor: float) -> None:
    """The intervals hold the mean over cohorts."""
    rng, found = np.random.default_rng([n_patients, int(factor)]), []
    for _ in range(200):
        sums, labels, groups = cells(rng, n_patients, 40, factor)
        shuffled = np.stack([rng.permutation(labels) for _ in range(10)])
        purity = purity_without(sums, labels, shuffled, groups, least_images=5)
        whole = np.ones((1, len(labels)))
        observed = float(figures_of_draws(sums, whole, labels, shuffled, least_images=5)["label_purity"][0])
        found.append([observed, *interval_without(observed, purity["label_purity"])])
    values = np.array(found, np.float64)
    wanted = values[:, 0].mean()
    assert ((values[:, 1] <= wanted) & (wanted <= values[:, 2])).mean() >= 0.92
