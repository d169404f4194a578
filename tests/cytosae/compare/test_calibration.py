"""Patients made up without their images (bench/patient_generator.py) have the law of those made with them."""

import sys

import numpy as np
import numpy.typing as npt
import pytest
from places import ROOT
from scipy import stats

sys.path.insert(0, str(ROOT / "bench"))
import calibration
from patient_generator import patient_means, rates

from cytosae.compare import combine_draws, permutation_test

Floats = npt.NDArray[np.float64]
N_IMAGES, N_THINNED, N_DRAWS = np.array([9, 30]), 9, 3


def made_one_by_one(rng: np.random.Generator, rate: Floats, ties: bool) -> Floats:
    """(1 + draws, patients, latents): every image of every patient is made, then some are taken at random."""
    means = []
    for n, share in zip(N_IMAGES, rate, strict=True):
        shown = rng.random((n, rate.shape[1])) < share
        values = shown * (1.0 if ties else np.minimum(257, np.ceil(rng.exponential(20, shown.shape))))
        means.append([values.mean(0), *(values[rng.permutation(n)[:N_THINNED]].mean(0) for _ in range(N_DRAWS))])
    return np.array(means).transpose(1, 0, 2)


@pytest.mark.parametrize("ties", [False, True])
def test_means_have_the_law_of_images_made_one_by_one(ties: bool) -> None:
    """Values of one draw, agreement of two, and of a draw with the whole: over latents of three frequencies."""
    rng = np.random.default_rng(ties)
    for frequency in (0.9, 0.1, 0.02):
        found, slow = [], []
        for _ in range(30):
            rate = rates(rng, np.full(2, frequency), 200)
            whole, draws = patient_means(rng, N_IMAGES, rate, ties, N_THINNED, N_DRAWS)
            found.append(np.array([whole, *draws]))
            slow.append(made_one_by_one(rng, rate, ties))
        one, other = np.concatenate(found, 2), np.concatenate(slow, 2)
        assert np.allclose(one[0, 0], one[1, 0])  # 9 of 9 images: the draw is all of them
        for of in (lambda m: m[0, 1], lambda m: m[1, 1], lambda m: m[1, 1] - m[2, 1], lambda m: m[0, 1] - m[3, 1]):
            assert stats.ks_2samp(of(one), of(other)).pvalue > 1e-3, (frequency, ties)


def test_ties_broken_at_random_make_p_uniform() -> None:
    """Of one draw, exactly: 0.05 of 12,000 latents, where with all ties counted it is far less."""
    rng, is_a, levels = np.random.default_rng(3), np.arange(20) < 8, []
    below = plain = 0.0
    for run in range(40):
        values = np.asarray(rng.binomial(1, 0.15, (20, 300)), np.float64)
        values = values[:, values.any(0)]
        test = permutation_test(values, is_a, n_permutations=199, seed=run)
        p, level = calibration.break_ties([values], is_a, [test], 199, run, np.asarray(rng.random(values.shape[1])))
        assert (p <= test.p).all()
        below, plain = below + (p <= 0.05).mean() / 40, plain + (test.p <= 0.05).mean() / 40
        levels.append(level)
    assert below == pytest.approx(0.05, abs=0.008)
    assert plain < 0.035
    assert np.mean(levels) == pytest.approx(plain, abs=0.005)  # what one test can attain is what it does


@pytest.mark.stress
def test_combined_p_is_calibrated_where_p_was_lost_and_where_it_was_too_small() -> None:
    """60 x 20 against 16 x 400 images, 2% and 30%: the share of p <= 0.05, of 2,000 latents each."""
    for frequency in (0.3, 0.02):
        found = calibration.simulate((60, 20, 16, 400), frequency, True, 100, 20, 199)
        assert 0.025 <= found["p"] <= 0.065, found
        assert 0.035 <= found["p_random"] <= 0.065, found
        assert found["p_all"] < 0.04  # not thinned


@pytest.mark.parametrize("factor", [1 / 3, 1.0, 10.0])
def test_intervals_of_rare_latents_cover(factor: float) -> None:
    """0.2% of 20 images of 16 patients, and up to ten times as many: 0.95, and at least 0.93 but for chance."""
    found = calibration.cover((16, 20, 60, 400), 0.002, True, factor, 100, 10)
    assert min(found["coverage"]) >= 0.92, found
    assert found["with_limits"] > 0.9


def test_draws_combined_are_no_smaller_than_the_smallest_and_no_larger_than_the_mean() -> None:
    rng, is_a = np.random.default_rng(4), np.arange(16) < 6
    tests = [permutation_test(rng.poisson(0.5, (16, 50)) * 1.0, is_a, n_permutations=199, seed=1) for _ in range(6)]
    both, each = combine_draws(tests), np.stack([test.p_max_t for test in tests])
    assert (both.p_max_t >= each.min(0) - 1e-12).all()
    assert (both.p_max_t <= each.mean(0) + 1e-12).all()
    assert (both.p_step_down <= both.p_max_t + 1e-12).all()
