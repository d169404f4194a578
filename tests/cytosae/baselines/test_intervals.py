"""The intervals of SAE minus baseline hold the truth about as often as they say, also over few patients."""

import numpy as np
import numpy.typing as npt
import pytest

from cytosae.baselines.figures_of_draws import figures_of_draws, purity_without
from cytosae.baselines.measure import ImageSums
from cytosae.baselines.versus import interval_of_draws, interval_without

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
    hull = interval_of_draws(0.2, draws + 5, 10_000, is_perhaps_moved=True)  # about both
    assert hull == pytest.approx((0.2 - 0.95, 5 + 0.95), abs=2e-3)
    assert interval_without(1.0, np.array([0.9, np.nan])) == (None, None)
    assert interval_without(float("nan"), np.array([0.9, 1.1])) == (None, None)


def cells(rng: np.random.Generator, n_patients: int, n_latents: int, factor: float) -> tuple[ImageSums, Ints, Ints]:
    """Images of patients with their own mixture of three labels and their own frequency of each latent.

    A latent is `factor` times as frequent in images of one label.
    """
    own, rate = np.arange(n_latents) % 3, 0.08 * rng.gamma(3, 1 / 3, (n_patients, n_latents))
    groups = np.repeat(np.arange(n_patients), rng.integers(4, 30, n_patients))
    mixtures = rng.dirichlet([2, 2, 2], n_patients)
    labels = np.array([rng.choice(3, p=mixtures[patient]) for patient in groups])
    odds = np.where(own == labels[:, None], factor, 1) * rate[groups]
    active = rng.random(odds.shape) < np.minimum(0.9, odds)
    one, latents = np.ones(len(groups)), np.nonzero(active)[1]
    sums = ImageSums(
        n_latents=n_latents, tokens=one, error=one, square=one, shifted=one[:, None], active=one,
        begins=np.concatenate([[0], np.cumsum(active.sum(1))]), latents=latents.astype(np.int32),
        values=rng.gamma(2, 1, len(latents)).astype(np.float32),
    )  # fmt: skip
    return sums, labels, groups


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
