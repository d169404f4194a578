"""The intervals of SAE minus baseline hold the truth about as often as they say, also over few patients."""

import numpy as np
import pytest

from cytosae.baselines.versus import interval_of_draws


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
    hull = interval_of_draws(0.2, draws + 5, 10_000, is_perhaps_moved=True)  # about both
    assert hull == pytest.approx((0.2 - 0.95, 5 + 0.95), abs=2e-3)
