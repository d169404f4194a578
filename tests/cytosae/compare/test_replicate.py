"""Replication in another cohort: equal to plain loops, planted latents return, chance is uniform, bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from barcode_maker import write_patient_barcodes
from command_line import fails, run
from scipy import stats

from cytosae.compare import CompareConfig, ReplicateConfig, compare, replicate, replication
from cytosae.compare.groups import Prepared, TwoGroups
from cytosae.compare.permutation import combine_draws
from cytosae.compare.replication import (
    correlation_limits,
    effect_sizes,
    holm_adjusted,
    joint_test,
    ratio_limits,
    signed_test,
)
from stores import REPLICATION, ResultStore
from stores.errors import BadInput, SpecMismatch
from stores.verify_any import verify_folder

Array = npt.NDArray[Any]
DISEASES = ["AML"] * 12 + ["well"] * 12
PLANTED, LOWER = [2, 5, 9], [20, 21]


def draw(seed: int, shift: float = 3.0, n_latents: int = 60) -> npt.NDArray[np.float32]:
    """(patients, latents): PLANTED are higher in AML, LOWER in the others, by `shift` standard deviations."""
    rng = np.random.default_rng(seed)
    values = rng.normal(20, 1, (len(DISEASES), n_latents))
    values[:12, PLANTED] += shift
    values[12:, LOWER] += shift
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def discovery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("discovery")
    write_patient_barcodes(folder / "b", draw(0, shift=5), DISEASES, names=[f"D{n}" for n in range(24)])
    compare(folder / "b", folder / "found", CompareConfig(a="AML", b="well", n_permutations=2000, n_bootstraps=20))
    return folder / "found"


def settings(**changes: Any) -> ReplicateConfig:
    return ReplicateConfig(**{"n_permutations": 1000, "n_bootstraps": 200, **changes})


# ------------------------------------------------------------------------------------------- slow twins


def slow_p(
    values: Array, is_a: Array, direction: float, strata: Array, covariates: Array, seed: int, n: int
) -> tuple[float, float]:
    """(p, statistic) of one column by least squares: the t of the group, for each permutation of the residuals."""
    others = np.column_stack([np.eye(strata.max() + 1)[strata], covariates])
    residuals = values - others @ np.linalg.lstsq(others, values, rcond=None)[0]

    def t_of(y: Array) -> float:
        x = np.column_stack([is_a.astype(float), others])
        fit, *_ = np.linalg.lstsq(x, y, rcond=None)
        left = y - x @ fit
        spread = np.linalg.pinv(x.T @ x)[0, 0] * (left @ left) / (len(y) - np.linalg.matrix_rank(x))
        return float(direction * fit[0] / np.sqrt(spread))

    rng = np.random.default_rng([seed, 5])
    observed, as_far = t_of(residuals), 0
    places = np.tile(np.arange(len(is_a)), (n, 1))
    for name in np.unique(strata):
        rows = np.flatnonzero(strata == name)
        places[:, rows] = rng.permuted(places[:, rows], axis=1)
    for order in places:
        back = np.argsort(order)  # `signed_test` permutes the groups, here the residuals are permuted
        as_far += t_of(residuals[back]) >= observed - 1e-7
    return (1 + as_far) / (1 + n), observed


@pytest.mark.parametrize("adjusted", [False, True])
def test_p_equals_a_regression_for_every_permutation(adjusted: bool) -> None:
    rng = np.random.default_rng(1)
    is_a = np.arange(18) % 3 == 0
    strata = (np.arange(18) // 6 if adjusted else np.zeros(18)).astype(np.int64)
    covariates = rng.normal(size=(18, 2)) if adjusted else np.zeros((18, 0))
    values = rng.normal(size=(18, 4)) + 0.7 * is_a[:, None]
    direction = np.array([1.0, 1, -1, -1])
    test, observed, permuted = signed_test(
        values, is_a, direction, n_permutations=150, seed=3, strata=strata, covariates=covariates
    )
    assert permuted.shape == (150, 4)
    for column in range(4):
        p, t = slow_p(values[:, column], is_a, direction[column], strata, covariates, 3, 150)
        assert test.p[column] == pytest.approx(p)
        assert np.sign(observed[column]) == np.sign(t)


def test_no_p_below_what_the_patients_allow() -> None:
    """3 against 3: one way of 20 is the observed one, however many permutations are drawn."""
    is_a = np.array([True] * 3 + [False] * 3)
    values = np.column_stack([[6.0, 5, 4, 3, 2, 1]] * 50)
    for seed in range(20):  # drawn with replacement, the observed way comes in fewer than 1 / 20 of half the seeds
        test, _, _ = signed_test(values, is_a, np.ones(50), n_permutations=400, seed=seed)
        assert test.floor == 1 / 20
        assert test.p.min() >= 1 / 20
    strata = np.array([0, 0, 1, 0, 1, 1])
    test, _, _ = signed_test(values, is_a, np.ones(50), n_permutations=400, seed=0, strata=strata)
    assert test.floor == 1 / 9  # 3 ways in each stratum
    many = signed_test(np.vstack([values] * 4), np.tile(is_a, 4), np.ones(50), n_permutations=400, seed=0)[0]
    assert many.floor == 1 / 401


def test_holm_is_the_step_down_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    p = rng.choice([0.001, 0.01, 0.01, 0.02, 0.3, 1.0], 8)
    expected: dict[int, float] = {}
    for rank, index in enumerate(sorted(range(8), key=lambda n: p[n])):
        expected[index] = max([min(1.0, (8 - rank) * p[index]), *expected.values()])
    assert holm_adjusted(p).tolist() == pytest.approx([expected[n] for n in range(8)])


def test_effect_size_is_hedges_g() -> None:
    values = draw(4)[:, :3].astype(np.float64)
    for column, g in enumerate(effect_sizes(values, 12)):
        one, other = values[:12, column], values[12:, column]
        t = stats.ttest_ind(one, other).statistic
        assert g == pytest.approx(t * np.sqrt(1 / 12 + 1 / 12) * (1 - 3 / (4 * 22 - 1)))
    assert np.isnan(effect_sizes(np.ones((24, 1)), 12)).all()


def test_limits_of_the_correlation_hold_what_other_cohorts_have() -> None:
    """60 cohorts of 2 x 20 patients; quantiles of draws, whose noise counts twice, seldom hold it."""
    rng = np.random.default_rng(3)
    before = rng.normal(0, 0.5, 80)
    real = 0.6 * before + rng.normal(0, 0.15, 80)

    def effects() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        values = rng.standard_normal((40, 80))
        values[:20] += real
        rows = [np.concatenate([rng.integers(20, size=20), 20 + rng.integers(20, size=20)]) for _ in range(80)]
        return effect_sizes(values, 20), np.array([effect_sizes(values[some], 20) for some in rows])

    def correlation(now: npt.NDArray[np.float64]) -> float:
        return float(np.corrcoef(before, now)[0, 1])

    made = [effects() for _ in range(60)]
    expected = float(np.mean([correlation(now) for now, _ in made]))
    n_within = n_plain = 0
    for now, drawn in made:
        draws = np.array([correlation(each) for each in drawn])
        low, high = correlation_limits(correlation(now), draws, 20)
        assert low is not None
        assert high is not None
        assert low < correlation(now) < high
        n_within += low < expected < high
        plain = np.quantile(draws, [0.025, 0.975])
        n_plain += plain[0] < expected < plain[1]
    assert n_within >= 50
    assert n_plain < 30
    assert correlation_limits(0.5, np.full(9, np.nan), 20) == (None, None)


def test_limits_of_the_ratio_hold_it_and_the_true_one() -> None:
    """150 cohorts of 2 x 6 patients with large effects: quantiles of draws often miss the true slope."""
    rng = np.random.default_rng(4)
    real = np.where(np.arange(10) % 2, 2.0, -2.0)
    before = 1.3 * real
    n_within = n_plain = 0
    for _ in range(150):
        values = rng.standard_normal((12, 10))
        values[:6] += real
        rows = [np.concatenate([rng.integers(6, size=6), 6 + rng.integers(6, size=6)]) for _ in range(100)]
        observed, *drawn = (
            float(before @ effect_sizes(each, 6) / (before @ before)) for each in (values, *(values[r] for r in rows))
        )
        low, high = ratio_limits(observed, np.array(drawn), 6)
        assert low is not None
        assert high is not None
        assert low <= observed <= high
        n_within += low < 1 / 1.3 < high
        plain = np.quantile(drawn, [0.025, 0.975])
        n_plain += plain[0] < 1 / 1.3 < plain[1]
    assert n_within >= 135
    assert n_plain < 110
    assert ratio_limits(0.5, np.full(9, np.nan), 6) == (None, None)


def test_an_effect_is_not_divided_by_rounding() -> None:
    """One patient of each group, drawn again and again: there is no spread, and no effect of 10^13."""
    values = np.repeat([[0.1], [1.2]], 3, axis=0) + np.array([[0], [1e-16], [2e-16]] * 2)
    assert np.isnan(effect_sizes(values, 3)).all()


def test_the_joint_test_counts_as_loops_do() -> None:
    rng = np.random.default_rng(3)
    permuted, observed, before = rng.normal(size=(80, 9)), rng.normal(0.4, 1, 9), rng.normal(size=7)
    both = np.arange(9) % 4 != 3
    permuted[5, both] = 0.25 * np.where(np.arange(9) % 2, 1.0, -1)[both]  # does not vary: no correlation
    direction = np.where(np.arange(9) % 2, 1.0, -1)
    found = joint_test(observed, permuted, direction, before, both, floor=0.01)
    n_same = sum(value > 0 for value in observed)
    seen = np.corrcoef(before, (observed * direction)[both])[0, 1]
    signs = [sum(value > 0 for value in row) for row in permuted]
    signed = [(row * direction)[both] for row in permuted]
    correlations = [np.corrcoef(before, row)[0, 1] if np.ptp(row) else -np.inf for row in signed]
    for at, (null, here) in enumerate(((signs, n_same), (correlations, seen))):
        as_far, farther = sum(value >= here for value in null), sum(value > here for value in null)
        assert found.p[at] == pytest.approx((1 + as_far) / 81)
        assert found.p_mid[at] == pytest.approx((1 + (as_far + farther) / 2) / 81)
    assert joint_test(observed + 9, permuted, direction, before, both, floor=0.3).p[0] == 0.3
    silent = joint_test(direction / 2, permuted, direction, before, both, floor=0.01)
    assert silent.p[1] == 1, "effects that do not vary say nothing"


def test_all_draws_of_thinned_patients_decide_together(
    discovery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p of the signs and of the correlation was that of the first draw alone."""
    others = write_patient_barcodes(tmp_path / "b", draw(1, shift=0.4), DISEASES)
    noise = np.random.default_rng(4).normal(0, 2, (2, len(DISEASES), 60)).astype(np.float32)
    plain, kept = vars(replication)["prepare"], []

    def thinned(*given: Any, **named: Any) -> Any:
        prepared = plain(*given, **named)
        kept.append(replace(prepared, draws=[prepared.draws[0], *(prepared.draws[0] + noise)]))
        return kept[-1]

    monkeypatch.setattr(replication, "prepare", thinned)
    config = settings(n_permutations=200, n_bootstraps=2, top=6)
    done = replicate(discovery, others, tmp_path / "out", config)
    (prepared,) = kept
    rows = done.rows
    chosen = [row["latent"] for row in rows]
    assert len(chosen) > 8
    direction = np.sign([row["discovery_difference"] for row in rows])
    before = np.array([row["discovery_hedges_g"] for row in rows])
    tests = []
    for values in (each[:, chosen] for each in prepared.draws):
        _, observed, _ = signed_test(values, prepared.groups.is_a, direction, n_permutations=200, seed=config.seed)
        same = values - np.where(prepared.groups.is_a[:, None], values[:12].mean(0), values[12:].mean(0))
        permuted = signed_test(same, prepared.groups.is_a, direction, n_permutations=200, seed=config.seed)[2]
        every, floor = np.ones(len(rows), bool), done.summary["p_floor"]
        tests.append(joint_test(observed, permuted, direction, before, every, floor=floor))
    wanted = combine_draws(tests).p
    assert len({*(float(test.p[1]) for test in tests)}) > 1
    assert [done.summary["p_same_sign"], done.summary["p_correlation"]] == pytest.approx(wanted.tolist(), rel=0.02)


# ------------------------------------------------------------------------------------------- what is found


def test_planted_latents_return_at_half_the_size(discovery: Path, tmp_path: Path) -> None:
    """Half the shift gives about half the effect, in the same direction; the interval and every p say so."""
    others = write_patient_barcodes(tmp_path / "b", draw(1, shift=2.5), DISEASES)
    done = replicate(discovery, others, tmp_path / "out", settings())
    said = done.summary
    assert {*PLANTED, *LOWER} <= {row["latent"] for row in done.rows}
    planted = [row for row in done.rows if row["latent"] in (*PLANTED, *LOWER)]
    assert all(row["same_sign"] and row["is_replicated"] for row in planted)
    assert said["correlation"] > 0.9
    assert said["correlation_low"] > 0.8
    assert said["p_correlation"] <= 0.05, "effects both ways agree: p was that of their sizes alone, 0.1 to 0.9"
    assert 0.3 < said["ratio_low"] < said["ratio"] < said["ratio_high"] < 0.75
    by_coins = stats.binomtest(said["n_same_sign"], said["n_latents"], alternative="greater").pvalue
    assert said["p_same_sign"] == pytest.approx(by_coins, abs=0.06)  # these latents are independent
    again = replicate(discovery, others, tmp_path / "out", settings())
    assert (again.rows, again.was_complete) == (done.rows, True)
    assert not verify_folder(tmp_path / "out").problems
    assert ResultStore(tmp_path / "out", REPLICATION).header.spec["rule"] == "q"


@pytest.mark.stress
def test_an_interrupted_replication_goes_on(discovery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at the bootstraps: patients are not read and the groups not permuted again; the numbers are the same."""
    others = write_patient_barcodes(tmp_path / "b", draw(1, shift=2.5), DISEASES)
    config = settings(n_permutations=300, n_bootstraps=50)
    whole = replicate(discovery, others, tmp_path / "whole", config)
    calls: list[str] = []
    for name in ("prepare", "read_patients", "signed_test"):
        plain = getattr(replication, name)

        def counted(*given: Any, plain: Any = plain, name: str = name, **named: Any) -> Any:
            calls.append(name)
            return plain(*given, **named)

        monkeypatch.setattr(replication, name, counted)

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replication, "bootstrap_effects", stop)
        with pytest.raises(KeyboardInterrupt):
            replicate(discovery, others, tmp_path / "out", config)
    assert (calls.count("prepare"), calls.count("signed_test")) == (1, 2)  # one of them with the difference taken off
    calls.clear()
    done = replicate(discovery, others, tmp_path / "out", config)
    assert (calls.count("prepare"), calls.count("signed_test")) == (0, 0)
    assert done.rows == whole.rows
    assert done.summary == whole.summary
    calls.clear()
    assert replicate(discovery, others, tmp_path / "out", config).was_complete
    assert not calls  # nothing is read again


def test_no_p_is_below_what_so_few_patients_can_give(discovery: Path, tmp_path: Path) -> None:
    """Five against four: 126 ways to share them out. p of the correlation was 0.001, with more permutations less."""
    values = draw(1)[[0, 1, 2, 3, 4, 12, 13, 14, 15]]
    others = write_patient_barcodes(tmp_path / "b", values, ["AML"] * 5 + ["well"] * 4)
    said = replicate(discovery, others, tmp_path / "out", settings()).summary
    assert said["p_floor"] == pytest.approx(1 / 126)
    assert min(said["p_correlation"], said["p_same_sign"]) >= said["p_floor"]
    assert said["ratio_low"] <= said["ratio"] <= said["ratio_high"]


def test_where_the_difference_is_taken_off_rounding_is_no_effect() -> None:
    """3 against 3: a tenth of the permutations are the patients as they are. Rounding gave them signs at random."""
    values = draw(1)[[0, 1, 2, 12, 13, 14]]
    said: dict[str, Any] = {name: ["x"] * 6 for name in ("names", "ids", "diseases", "datasets")}
    said |= {"n_images": np.ones(6, np.int64), "n_without_disease": 0, "n_of_others": 0}
    groups = TwoGroups(values=values, is_a=np.arange(6) < 3, **said)
    prepared = Prepared(groups=groups, draws=[values], crude=(values, [values], groups.is_a))
    found = replication._without_difference(values, prepared, np.ones(values.shape[1]), settings())
    assert 50 < (found == 0).all(1).sum() < 150
    assert not ((np.abs(found) < 1e-9) & (found != 0)).any()


@pytest.mark.stress
def test_the_other_direction_is_no_replication(discovery: Path, tmp_path: Path) -> None:
    others = write_patient_barcodes(tmp_path / "b", draw(1), [{"AML": "well", "well": "AML"}[d] for d in DISEASES])
    done = replicate(discovery, others, tmp_path / "out", settings())
    planted = [row for row in done.rows if row["latent"] in (*PLANTED, *LOWER)]
    assert not any(row["same_sign"] or row["is_replicated"] for row in planted)
    assert min(row["p_one_sided"] for row in planted) > 0.9
    assert done.summary["ratio"] < -0.5
    turned = replicate(discovery, others, tmp_path / "turned", settings(a="well", b="AML"))
    assert turned.summary["ratio_low"] < turned.summary["ratio"] < turned.summary["ratio_high"]
    assert turned.summary["n_replicated"] >= 5


@pytest.mark.stress
def test_where_nothing_differs_p_is_uniform(discovery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 60 cohorts without any difference: one-sided p, p of the signs and of the correlation; few replicate."""
    monkeypatch.setattr("cytosae.compare.replication.plot_replication", lambda *given: None)
    each, signs, correlations, n_any = [], [], [], 0
    for seed in range(60):
        root = write_patient_barcodes(tmp_path / f"b{seed}", draw(100 + seed, shift=0), DISEASES)
        config = settings(n_permutations=199, n_bootstraps=2, top=6)
        done = replicate(discovery, root, tmp_path / f"out{seed}", config)
        each += [row["p_one_sided"] for row in done.rows]
        signs.append(done.summary["p_same_sign"])
        correlations.append(done.summary["p_correlation"])
        n_any += done.summary["n_replicated"] > 0
    for found in (each, correlations):
        assert stats.kstest(found, "uniform").pvalue > 0.001
    assert abs(np.mean(each) - 0.5) < 0.05
    assert np.mean(np.array(signs) <= 0.05) <= 0.15  # of whole numbers, so above the level only by chance
    assert n_any <= 9


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.stress
def test_what_is_no_replication(discovery: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="that is no replication"):
        replicate(discovery, discovery.with_name("b"), tmp_path / "out")
    others = write_patient_barcodes(tmp_path / "b", draw(1), DISEASES)
    with pytest.raises(BadInput, match=r"no latent with q of 1e-09 or less \(the smallest is .*--top 20"):
        replicate(discovery, others, tmp_path / "out", settings(most=1e-9))
    with pytest.raises(BadInput, match="no disease 'APL' in these barcodes"):
        replicate(discovery, others, tmp_path / "out", settings(a="APL"))
    fewer = write_patient_barcodes(tmp_path / "fewer", draw(1, n_latents=40), DISEASES)
    with pytest.raises(SpecMismatch, match=r"has 40 latents, .* 60: another SAE"):
        replicate(discovery, fewer, tmp_path / "out", settings())
    summed = write_patient_barcodes(tmp_path / "summed", draw(1), DISEASES, normalize="cytosae-release")
    with pytest.raises(SpecMismatch, match="is normalised as cytosae-release"):
        replicate(discovery, summed, tmp_path / "out", settings())
    patches = write_patient_barcodes(tmp_path / "patches", draw(1), DISEASES, token_set="patch")
    with pytest.raises(SpecMismatch, match=r"counts patch tokens, .* is of all; .*cyto barcode --token-set all"):
        replicate(discovery, patches, tmp_path / "out", settings())
    other = write_patient_barcodes(tmp_path / "other", draw(1), DISEASES, taus=(0.1, 0.0899))
    with pytest.raises(SpecMismatch, match=r"at tau 0\.1, 0\.0899, .* at 0\.2; .*cyto barcode --tau 0\.2"):
        replicate(discovery, other, tmp_path / "out", settings())
    same = write_patient_barcodes(tmp_path / "same", draw(1), DISEASES, names=["X", *(f"D{n}" for n in range(1, 24))])
    done = replicate(discovery, same, tmp_path / "out", settings())
    assert any("23 patients have names of the discovery's patients" in warning for warning in done.warnings)
    with pytest.raises(BadInput, match="rule must be one of q, p_max_t, p_step_down"):
        ReplicateConfig(rule="p")


@pytest.mark.stress
def test_the_command_stands_beside_the_old_one(discovery: Path, tmp_path: Path) -> None:
    others = write_patient_barcodes(tmp_path / "b", draw(1), DISEASES)
    done = run("compare", "replicate", discovery, others, "-o", tmp_path / "out", "--permutations", 200)
    assert done.exit_code == 0, done.output
    assert "same direction: " in done.stdout
    assert "winner's curse" in done.stdout
    assert (tmp_path / "out" / "replication.png").is_file()
    again = run("compare", "replicate", discovery, others, "-o", tmp_path / "out", "--permutations", 200, "--json")
    said = json.loads(again.stdout)
    assert said["n_latents"] == len(said["latents"])
    fails("no comparison at", "compare", "replicate", others, others, "-o", tmp_path / "none")
    old = run("compare", others, "AML", "well", "-o", tmp_path / "old", "--permutations", 50, "--bootstraps", 2)
    assert old.exit_code == 0, old.output
    assert "higher in AML" in old.stdout
