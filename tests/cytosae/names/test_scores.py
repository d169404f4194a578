"""AUC and its intervals: equal to plain loops, and the truth lies within as often as is said."""

import math

import numpy as np
import pytest

from cytosae.names.scores import auc, draw_groups, drawn_auc, independent_interval, interval, wins


def slow_auc(active: list[float], inactive: list[float]) -> float:
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in active for b in inactive]
    return sum(won) / len(won) if won else math.nan


def test_auc_equals_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (7, 5), (20, 20)):
        active, inactive = rng.integers(0, 4, n) / 3, rng.integers(0, 3, m) / 3
        assert auc(active, inactive) == pytest.approx(slow_auc(active.tolist(), inactive.tolist()))
    assert auc(np.array([1.0]), np.array([0.0])) == 1
    assert math.isnan(auc(np.array([]), np.array([0.0])))


def test_draws_equal_lists_in_which_images_are_repeated() -> None:
    rng = np.random.default_rng(1)
    active, inactive = rng.random(9), rng.random(8)
    of_active, of_inactive = rng.integers(0, 4, 9), rng.integers(0, 4, 8)
    draws = draw_groups(np.arange(4), 30, seed=2)
    assert draw_groups(np.array([3, 1]), 30, seed=2).tolist() == draws[:, [3, 1]].tolist()
    assert draw_groups(np.array([7]), 4_000, seed=2).mean() == pytest.approx(1, abs=0.05)
    found = drawn_auc(wins(active, inactive), of_active, of_inactive, draws)
    for number, draw in enumerate(draws.astype(int)):
        left = [value for value, group in zip(active, of_active, strict=True) for _ in range(draw[group])]
        right = [value for value, group in zip(inactive, of_inactive, strict=True) for _ in range(draw[group])]
        assert found[number] == pytest.approx(slow_auc(left, right), nan_ok=True)


@pytest.mark.parametrize(("value", "n", "m"), [(1.0, 10, 10), (0.5, 20, 20), (0.83, 5, 12), (0.0, 8, 8)])
def test_the_independent_interval_equals_a_search_over_a_grid(value: float, n: int, m: int) -> None:
    """All AUCs from which the measured one is less than 1.96 standard errors away."""
    grid = np.linspace(0, 1, 200_001)
    rest = (n + m) / 2 - 1
    variance = grid * (1 - grid) * (1 + rest * ((1 - grid) / (2 - grid) + grid / (1 + grid))) / (n * m)
    inside = grid[np.abs(grid - value) <= 1.959964 * np.sqrt(variance)]
    inside = np.append(inside, value)  # at 0 and 1 its own standard error is 0
    assert independent_interval(value, n, m) == pytest.approx((inside.min(), inside.max()), abs=1e-4)


def test_ten_perfect_answers_are_not_certain() -> None:
    low, high = interval(1.0, np.ones(100), 10, 10)
    assert 0.6 < low < 0.9
    assert high == 1


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_truth_lies_within(spread: float) -> None:
    """Images of 12 patients whose scores differ from patient to patient by `spread`; active ones are 1 higher."""
    rng = np.random.default_rng(3)
    group = np.arange(24) % 12
    truth, n_within = 0.5 * (1 + math.erf(1 / math.sqrt(2 * (1 + spread**2)) / math.sqrt(2))), 0
    for seed in range(200):
        patient = spread * rng.normal(size=12)
        active, inactive = 1 + patient[group] + rng.normal(size=24), patient[group] + rng.normal(size=24)
        won = wins(active, inactive)
        drawn = drawn_auc(won, group, group, draw_groups(np.arange(12), 200, seed))
        low, high = interval(float(won.mean()), drawn, 24, 24)
        n_within += low <= truth <= high
    assert n_within >= 182
