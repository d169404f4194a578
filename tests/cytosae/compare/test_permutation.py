"""Permutation p-values: equal to slow twins and to scipy, honest where nothing differs, exact about ties."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from cytosae.compare import combine_draws, permutation_test
from cytosae.compare.freedman_lane import residual_group, residual_permutation_test
from cytosae.compare.permutation import PermutationTest
from stores.errors import BadInput

Floats = npt.NDArray[np.float64]


def groups(n_a: int, n_b: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Members of A among n_a + n_b units, in a random order."""
    return np.random.default_rng(seed).permutation(np.arange(n_a + n_b) < n_a)


def run(
    values: npt.NDArray[np.floating], is_a: npt.NDArray[np.bool_], n: int = 10_000, seed: int = 0
) -> PermutationTest:
    return permutation_test(values, is_a, n_permutations=n, seed=seed)


def twin(values: Floats, is_a: npt.NDArray[np.bool_], n: int, seed: int) -> tuple[Floats, Floats]:
    """p and p_max_t, one permutation after the other, by the absolute pooled t statistic."""

    def size(members: npt.NDArray[np.bool_]) -> Floats:
        a, b = values[members], values[~members]
        spread = np.sqrt((a.var(0) * len(a) + b.var(0) * len(b)) * (1 / len(a) + 1 / len(b)) / (len(values) - 2))
        return np.abs(a.mean(0) - b.mean(0)) / spread

    observed, rng = size(is_a), np.random.default_rng(seed)
    assert np.allclose(observed, np.abs(stats.ttest_ind(values[is_a], values[~is_a]).statistic))
    n_as_extreme, n_max = np.ones((2, values.shape[1]))
    for _ in range(n):
        drawn = size(rng.permuted(is_a))
        n_as_extreme += drawn >= observed * (1 - 1e-9)
        n_max += drawn.max() >= observed * (1 - 1e-9)
    return n_as_extreme / (n + 1), n_max / (n + 1)


def test_random_permutations_equal_the_twin() -> None:
    """Skewed columns, ties, very different sizes; units and columns that fill no table."""
    rng = np.random.default_rng(1)
    values = np.hstack([rng.exponential(1, (23, 60)), rng.integers(0, 3, (23, 15)) * 1.0, rng.random((23, 2)) * 1e6])
    is_a = groups(9, 14)
    values[is_a, :3] += 1.5
    found = run(values, is_a, 2_000, seed=5)
    p, p_max_t = twin(values, is_a, 2_000, seed=5)
    assert np.array_equal(found.p, p)
    assert np.array_equal(found.p_max_t, p_max_t)
    assert not found.is_exact
    assert found.floor == 1 / 2_001
    assert (found.p_max_t >= found.p).all()


def test_more_than_one_block_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of columns and of permutations have no part in the numbers."""
    from cytosae.compare import permutation

    values, is_a = np.random.default_rng(2).exponential(1, (70, 300)), groups(32, 38)
    whole = run(values, is_a, 999)
    monkeypatch.setattr(permutation, "_SPLITS", 100)
    monkeypatch.setattr(permutation, "_COLUMNS", 64)
    in_blocks = run(values, is_a, 999)
    assert np.array_equal(whole.p, in_blocks.p)
    assert np.array_equal(whole.p_max_t, in_blocks.p_max_t)


@pytest.mark.parametrize(("n_a", "n_b"), [(4, 5), (4, 4), (2, 7)])
def test_few_units_are_enumerated_as_scipy_does(n_a: int, n_b: int) -> None:
    values, is_a = np.random.default_rng(n_a).exponential(1, (n_a + n_b, 12)), groups(n_a, n_b)
    values[is_a, 0] += 100  # nothing can be more extreme
    found = run(values, is_a)
    by_scipy = stats.permutation_test(
        (values[is_a], values[~is_a]),
        lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)),
        alternative="greater",
        n_resamples=np.inf,
        axis=0,
        vectorized=True,
    )
    assert np.allclose(found.p, by_scipy.pvalue, rtol=1e-12, atol=0)
    assert found.is_exact
    assert found.n_permutations == math.comb(n_a + n_b, n_a)
    assert found.floor == found.p[0] == (2 if n_a == n_b else 1) / found.n_permutations


def test_enumeration_begins_where_it_costs_no_more() -> None:
    values, is_a = np.random.default_rng(0).random((8, 3)), groups(4, 4)
    assert run(values, is_a, 70).is_exact
    assert not run(values, is_a, 69).is_exact


def test_ties_count_also_where_float32_rounds_them_apart() -> None:
    """Thirds and tenths, as means over images are: 0.1 + 0.2 against 0.3. Counted in fractions by hand."""
    rng, is_a = np.random.default_rng(3), groups(4, 5)
    exact = [[Fraction(int(k), int(d)) for k in rng.integers(0, 4, 9)] for d in rng.choice([3, 7, 10], 40)]
    values = np.array([[float(cell) for cell in row] for row in exact], np.float32).T
    found = run(values, is_a)
    n_naive = 0
    for column, row in enumerate(exact):
        splits = [*combinations(range(9), 4)]
        middle = sum(row) * Fraction(4, 9)
        observed = abs(sum(row[i] for i in np.flatnonzero(is_a)) - middle)
        as_extreme = sum(abs(sum(row[i] for i in split) - middle) >= observed for split in splits)
        assert found.p[column] == as_extreme / len(splits), column
        sums = np.array([values[[*split], column].sum() for split in splits], np.float32)
        center = values[:, column].sum() * np.float32(4 / 9)
        n_naive += (np.abs(sums - center) >= np.abs(values[is_a, column].sum() - center)).sum() != as_extreme
    assert n_naive > 0  # the case is there


def test_order_names_and_scale_have_no_part() -> None:
    """Which group is called A, and the unit of a column, change nothing; of all splits, neither does the order."""
    values, is_a = np.random.default_rng(4).exponential(1, (20, 8)).astype(np.float32), groups(10, 10)
    one, swapped, scaled = run(values, is_a, 500), run(values, ~is_a, 500), run(values * np.float32(1 << 10), is_a, 500)
    for other in (swapped, scaled):
        assert np.array_equal(one.p, other.p)
        assert np.array_equal(one.p_max_t, other.p_max_t)
    few, order = slice(0, 9), np.random.default_rng(5).permutation(9)
    one, moved = run(values[few], is_a[few]), run(values[few][order], is_a[few][order])
    assert one.is_exact
    assert np.array_equal(one.p, moved.p)


def test_what_does_not_vary_has_p_one() -> None:
    """Nor does what varies by its own rounding only."""
    values, is_a = np.ones((12, 3), np.float32), groups(6, 6)
    values[:, 1] = np.float32(0.1)
    values[is_a, 2] = np.nextafter(np.float32(1), np.float32(2))
    found = run(values, is_a, 200)
    assert (found.p == 1).all()
    assert (found.p_max_t == 1).all()


def test_chance_is_chance() -> None:
    """Where the groups are random, p <= 0.05 in a twentieth of the columns, and min p_max_t <= 0.05 in one of the runs.

    Skewed, sparse columns of very different spread, groups of different size. Bounds: 99.9% of the binomial.
    """
    n_runs, n_columns, n_below, n_families = 300, 40, 0, 0
    lowest = []
    for seed in range(n_runs):
        rng = np.random.default_rng([7, seed])
        values = rng.exponential(1, (22, n_columns)) * (rng.random((22, n_columns)) < 0.7) * 10 ** rng.uniform(-3, 3)
        found = run(values, groups(7, 15, seed), 199, seed)
        n_below += int((found.p <= 0.05).sum())
        n_families += found.p_max_t.min() <= 0.05
        lowest.append(found.p_max_t.min())
    low, high = stats.binom.ppf([0.0005, 0.9995], n_runs * n_columns, 0.05)
    assert low <= n_below <= high
    low, high = stats.binom.ppf([0.0005, 0.9995], n_runs, 0.05)
    assert low <= n_families <= high
    assert stats.kstest(lowest, "uniform").pvalue > 0.001


def test_max_t_weighs_columns_by_their_own_spread() -> None:
    """A clear effect in a column of small numbers stands beside noise in columns of huge ones."""
    rng, is_a = np.random.default_rng(8), groups(15, 15)
    values = rng.normal(0, 1e4, (30, 200))
    values[:, 0] = rng.normal(0, 1e-3, 30) + 5e-3 * is_a
    found = run(values, is_a, 999)
    assert found.p_max_t[0] == 1 / 1_000
    assert (found.p_max_t[1:] > 0.05).all()


def test_it_stops_when_asked() -> None:
    def interrupt(done: int, total: int, state: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permutation_test(
            np.random.default_rng(0).random((30, 50)), groups(15, 15), n_permutations=10**9, seed=0, progress=interrupt
        )


def slow_p_values(sizes: Floats, observed: Floats, drawn: int) -> tuple[Floats, Floats, Floats]:
    """p, single-step and step-down max-T from |t| of each permutation, column by column."""
    order = np.argsort(-observed, kind="stable")
    reached = observed * (1 - 1e-9)
    p = (drawn + (sizes >= reached).sum(0)) / (drawn + len(sizes))
    single = (drawn + (sizes.max(1)[:, None] >= reached).sum(0)) / (drawn + len(sizes))
    step_down, lowest = np.empty(len(order)), 0.0
    for place, column in enumerate(order):
        largest = sizes[:, order[place:]].max(1)
        lowest = max(lowest, (drawn + (largest >= reached[column]).sum()) / (drawn + len(sizes)))
        step_down[column] = lowest
    return p, single, step_down


def absolute_t(values: Floats, group: npt.NDArray[np.bool_], others: Floats) -> Floats:
    """|t| of the group in a least-squares regression on it and `others`, a column at a time."""
    design, found = np.column_stack([group, others]), []
    for column in values.T:
        solution = np.linalg.lstsq(design, column, rcond=None)[0]
        left = column - design @ solution
        spread = left @ left / (len(column) - np.linalg.matrix_rank(design))
        found.append(abs(solution[0]) / np.sqrt(spread * np.linalg.pinv(design.T @ design)[0, 0]))
    return np.array(found)


def test_step_down_equals_the_twin() -> None:
    """More columns than a table holds, effects of all sizes; never above single-step, never below p."""
    rng, is_a = np.random.default_rng(1), groups(8, 12)
    values = rng.exponential(1, (20, 150))
    values[is_a, :12] += np.linspace(0.3, 3, 12)
    found = run(values, is_a, 400, seed=3)
    ones = np.ones((20, 1))
    shuffles = np.random.default_rng(3)
    drawn = [shuffles.permuted(np.tile(is_a.astype(np.uint8), (400, 1)), axis=1)]
    sizes = np.array([absolute_t(values, mask.astype(bool), ones) for mask in drawn[0]])
    p, single, step_down = slow_p_values(sizes, absolute_t(values, is_a, ones), 1)
    assert np.array_equal(found.p, p)
    assert np.array_equal(found.p_max_t, single)
    assert np.array_equal(found.p_step_down, step_down)
    assert (step_down < single).any()
    assert (p <= step_down).all()


def test_strata_are_dealt_within_and_enumerated() -> None:
    """By t of a regression with strata; a stratum of one group has no part; all ways are a product."""
    rng = np.random.default_rng(2)
    strata = np.array([0] * 5 + [1] * 4 + [2] * 3)
    is_a = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1], bool)
    values = rng.exponential(1, (12, 9)) + strata[:, None] * 5
    found = permutation_test(values, is_a, n_permutations=1_000, seed=0, strata=strata)
    assert found.is_exact
    assert found.n_permutations == 10 * 4
    used = strata < 2
    dummies = np.eye(2)[strata[used]]
    masks = [
        np.isin(np.arange(9), [*first, *second])
        for first in combinations(range(5), 2)
        for second in combinations(range(5, 9), 3)
    ]
    sizes = np.array([absolute_t(values[used], mask, dummies) for mask in masks])
    p, single, step_down = slow_p_values(sizes, absolute_t(values[used], is_a[used], dummies), 0)
    assert np.array_equal(found.p, p)
    assert np.array_equal(found.p_max_t, single)
    assert np.array_equal(found.p_step_down, step_down)
    drawn = permutation_test(values, is_a, n_permutations=39, seed=0, strata=strata)
    assert not drawn.is_exact
    with pytest.raises(ValueError, match="no stratum has members of both"):
        permutation_test(values, strata < 1, n_permutations=39, seed=0, strata=strata)


def test_residuals_are_permuted_as_freedman_and_lane_say() -> None:
    """Least squares for each permutation: fitted values plus permuted residuals, regressed on all again."""
    rng, is_a, strata = np.random.default_rng(4), groups(9, 13), np.arange(22) % 2
    age, values = rng.normal(60, 10, 22) + 8 * is_a, rng.exponential(1, (22, 7))
    values += 0.1 * age[:, None]
    values[is_a, 0] += 3
    found = residual_permutation_test(
        values, is_a, np.asarray(age[:, None], float), n_permutations=150, seed=6, strata=strata
    )
    others = np.column_stack([np.eye(2)[strata], age])
    fitted = others @ np.linalg.lstsq(others, values, rcond=None)[0]
    shuffles, sizes = np.random.default_rng(6), []
    for size in (64, 64, 22):
        places = np.tile(np.arange(22), (size, 1))
        for block in (np.flatnonzero(strata == 0), np.flatnonzero(strata == 1)):
            places[:, block] = shuffles.permuted(places[:, block], axis=1)
        for row in places:
            permuted = np.empty_like(values)
            permuted[:] = fitted + (values - fitted)[np.argsort(row)]
            sizes.append(absolute_t(permuted, is_a, others))
    p, single, step_down = slow_p_values(np.array(sizes), absolute_t(values, is_a, others), 1)
    assert np.array_equal(found.p, p)
    assert np.array_equal(found.p_max_t, single)
    assert np.array_equal(found.p_step_down, step_down)
    with pytest.raises(BadInput, match="tell the groups apart by themselves"):
        residual_permutation_test(values, is_a, np.where(is_a, 2.0, 0.0)[:, None], n_permutations=9, seed=0)


def test_covariates_leave_at_least_two_degrees_of_freedom() -> None:
    """8 patients in 2 strata, and the group itself: with 3 columns 2 are left, with 4 one. Equal columns count once."""
    rng, is_a, strata = np.random.default_rng(4), np.arange(8) % 2 == 0, np.arange(8) // 4
    columns = rng.standard_normal((8, 4))
    _, base = residual_group(is_a, np.hstack([columns[:, :3], columns[:, :3] * 2 + 1]), strata)
    assert base.shape == (8, 3)
    with pytest.raises(BadInput, match="8 patients are too few for 4 columns of covariates"):
        residual_group(is_a, columns, strata)
    with pytest.raises(BadInput, match="tell the groups apart by themselves"):
        residual_group(is_a, np.where(is_a, 1.0, 3.0)[:, None], strata)


def test_draws_are_combined() -> None:
    """Equal draws leave p; ties count a half; a silent draw does not undo the others; the order has no part."""
    rng, is_a = np.random.default_rng(5), groups(8, 8)
    draws = [run(rng.poisson(0.4, (16, 30)) + is_a[:, None] * 0.6, is_a, 500) for _ in range(5)]
    assert np.array_equal(combine_draws([draws[0]] * 4).p, draws[0].p)
    both = combine_draws(draws)
    assert np.allclose(both.p, combine_draws(draws[::-1]).p)
    by_hand = [(sum(d.p_mid[c] ** -0.8 for d in draws) / 5) ** (-1 / 0.8) for c in range(30)]
    assert np.allclose(both.p, by_hand)
    adjusted = [(sum(d.p_max_t[c] ** -0.8 for d in draws) / 5) ** (-1 / 0.8) for c in range(30)]
    assert np.allclose(both.p_max_t, adjusted)
    assert (both.p_max_t >= both.p).all()


@pytest.mark.parametrize(("n_a", "n_b", "n"), [(9, 14, 400), (4, 5, 10_000), (4, 4, 10_000)])
def test_half_of_the_ties_count_in_p_mid(n_a: int, n_b: int, n: int) -> None:
    """One split after the other, by whole numbers; the residuals' test counts the same ties."""
    values, is_a = np.random.default_rng(6).poisson(0.5, (n_a + n_b, 40)) * 1.0, groups(n_a, n_b)
    found = run(values, is_a, n, seed=3)
    if found.is_exact:
        masks = [np.isin(np.arange(n_a + n_b), some) for some in combinations(range(n_a + n_b), n_a)]
    else:
        shuffles = np.random.default_rng(3)
        masks = [is_a, *(shuffles.permuted(is_a) for _ in range(n))]
    for column in range(40):
        total = round(values[:, column].sum())
        sizes = [abs((n_a + n_b) * round(values[mask, column].sum()) - n_a * total) for mask in masks]
        observed = abs((n_a + n_b) * round(values[is_a, column].sum()) - n_a * total)
        n_above, n_tied = sum(s > observed for s in sizes), sum(s == observed for s in sizes)
        assert found.p[column] == (n_above + n_tied) / len(masks)
        assert found.p_mid[column] == max(found.floor, (n_above + (n_tied + 1) / 2) / len(masks))
    if not found.is_exact:
        nothing = np.zeros((n_a + n_b, 1))
        by_residuals = residual_permutation_test(values, is_a, nothing, n_permutations=n, seed=3)
        assert np.corrcoef(by_residuals.p_mid, found.p_mid)[0, 1] > 0.99
        assert (by_residuals.p_mid <= by_residuals.p).all()
