"""Comparisons of groups that differ in images, site, age or mixture of cells: p is what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from barcode_maker import write_image_barcodes
from scipy import optimize, stats

from cytosae.compare import CompareConfig, Comparison, choose_number, compare
from cytosae.compare.intervals import intervals
from cytosae.compare.patient_values import plan_images, read_values
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput

L = 300


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_scatter", "plot_patients", "plot_correlation"):
        monkeypatch.setattr(f"cytosae.compare.differential.{name}", lambda *given: None)


def small(**settings: Any) -> CompareConfig:
    return CompareConfig(a="A", b="B", **{"n_permutations": 299, "n_bootstraps": 0, **settings})


def column(done: Comparison, name: str) -> npt.NDArray[Any]:
    return np.asarray(done.results.table("differential")[name].to_pandas())


def share_below(done: Comparison, name: str = "p") -> float:
    return float((column(done, name) <= 0.05).mean())


def cohort(
    n_images: list[int], rng: np.random.Generator, alike: float = 4
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Whose each image is, and skewed counts (images, latents) of patients who differ a little."""
    patient = np.repeat(np.arange(len(n_images)), n_images)
    rate = rng.gamma(alike, 0.3 / alike, (len(n_images), L))
    counts = rng.poisson(rate[patient]) * rng.geometric(0.3, (len(patient), L))
    return np.asarray(patient, np.int64), np.asarray(counts, np.float64)


@pytest.mark.stress
def test_few_images_against_many(tmp_path: Path) -> None:
    """Nothing differs: 0.05 below 0.05 if thinned, which is the default; without, p is false and it is said."""
    patient, values = cohort([20] * 10 + [200] * 30, np.random.default_rng(1), alike=100)
    root = write_image_barcodes(tmp_path / "b", values, patient, ["A"] * 10 + ["B"] * 30)
    thinned = compare(root, tmp_path / "thinned", small())
    assert 0.02 <= share_below(thinned) <= 0.085
    assert thinned.summary["images"]["per_patient"] == {"": 20}
    assert any("each patient is thinned to 20 images, 10 times" in each for each in thinned.summary["warnings"])
    crude = compare(root, tmp_path / "all", small(images_per_patient="all"))
    assert share_below(crude) > 0.12
    assert any("p, q and p_max_t are too small" in each for each in crude.summary["warnings"])
    assert np.array_equal(column(crude, "difference"), column(thinned, "difference"))
    again = compare(root, tmp_path / "seed", small(seed=1))
    assert np.corrcoef(column(thinned, "p"), column(again, "p"))[0, 1] > 0.8  # little a matter of the draws
    with pytest.raises(BadInput, match="0 of 10 patients of A have 21 images"):
        compare(root, tmp_path / "many", small(images_per_patient="21"))


def test_draws_equal_a_loop(tmp_path: Path) -> None:
    """Every draw is a mean of so many images of each patient and type; all images give the plain, weighted mean."""
    rng = np.random.default_rng(2)
    patient, values = cohort([6, 7, 9, 12, 8, 30], rng)
    labels = np.array(["x", "y"], object)[np.arange(len(patient)) % 2]
    root = write_image_barcodes(tmp_path / "b", values, patient, ["A"] * 3 + ["B"] * 3, label=labels)
    is_a = np.arange(6) < 3
    names = [f"P{i}" for i in range(6)]
    plan = plan_images(patient, labels, is_a, names, within=None, standardize=True, images_per_patient=4)
    assert plan.per_type is not None
    assert plan.per_type.tolist() == [2, 2]
    whole, draws = read_values(BarcodeStore(root), None, plan, seed=0)
    for i in range(6):
        means = [values[(patient == i) & (labels == name)].mean(0) for name in "xy"]
        assert np.allclose(whole[i], plan.weights @ np.array(means), rtol=1e-6)
    counts = [np.rint(draw / (plan.weights[0] / 2)) for draw in draws]
    assert len(draws) == 10
    assert any(not np.array_equal(draws[0], draw) for draw in draws[1:])
    assert np.allclose(np.mean(draws, 0), whole, atol=6 * values.std() / np.sqrt(20))
    assert counts[0].min() >= 0
    one = plan_images(patient, labels, is_a, names, within="x", standardize=False, images_per_patient=3)
    whole, draws = read_values(BarcodeStore(root), None, one, seed=0)
    assert np.allclose(whole[0], values[(patient == 0) & (labels == "x")].mean(0))
    assert np.allclose(draws[0][0], whole[0])  # 3 of 3


def test_the_number_of_images_is_chosen_by_the_rule() -> None:
    """At most a tenth of each group's patients may have fewer; even groups are left alone."""
    is_a = np.arange(40) < 20
    counts = np.where(is_a, 30, 300)
    counts[:2] = 3
    assert choose_number(counts[:, None], is_a, np.ones(1), "auto") == [30]
    counts[2] = 4
    assert choose_number(counts[:, None], is_a, np.ones(1), "auto") == [4]
    assert choose_number(np.full((40, 1), 50), is_a, np.ones(1), "auto") is None
    assert choose_number(counts[:, None], is_a, np.ones(1), "all") is None
    of_types = choose_number(np.full((40, 3), 50), is_a, np.array([0.9, 0.08, 0.02]), 20)
    assert of_types is not None
    assert of_types.tolist() == [18, 2, 1]  # at least one of a rare type
    lopsided = np.where(is_a, 100, np.where(np.arange(40) % 2, 190, 10))  # medians are equal, noise is not
    assert choose_number(lopsided[:, None], is_a, np.ones(1), "auto") == [10]


@pytest.mark.stress
def test_a_site_is_taken_out(tmp_path: Path) -> None:
    """18 + 2 against 2 + 18 patients with an effect of the laboratory only; then of age only."""
    rng = np.random.default_rng(3)
    patient, values = cohort([10] * 40, rng)
    is_a = np.arange(40) < 20
    site = np.where(np.isin(np.arange(40), [18, 19]) | (np.arange(40) >= 22), "north", "south")
    age = np.where(is_a, 70, 55) + rng.normal(0, 8, 40)
    by_site = values + (site[patient] == "north")[:, None] * 0.8
    extra = {"site": site[patient], "age": [f"{age[i]:.1f}" for i in patient]}
    diseases = ["A"] * 20 + ["B"] * 20
    root = write_image_barcodes(tmp_path / "b", by_site, patient, diseases, **extra)
    plain = compare(root, tmp_path / "plain", small())
    assert share_below(plain) > 0.5
    assert any("site (north: 10% against 90%" in each for each in plain.summary["warnings"])
    for settings in ({"strata": "site"}, {"adjust": ("site",)}):
        done = compare(root, tmp_path / f"{settings}".replace("/", ""), small(**settings))
        assert share_below(done) <= 0.09, settings
        assert share_below(done, "p_crude") > 0.5
        assert np.nanmedian(column(done, "explained")) > 0.6
    design = np.column_stack([is_a, np.ones(40), site == "north"]).astype(float)
    means = np.array([by_site[patient == i].mean(0) for i in range(40)])
    assert np.allclose(column(done, "difference"), np.linalg.lstsq(design, means, rcond=None)[0][0], atol=1e-5)
    old = write_image_barcodes(tmp_path / "old", values + 0.05 * age[patient, None], patient, diseases, **extra)
    assert share_below(compare(old, tmp_path / "young", small())) > 0.3
    assert share_below(compare(old, tmp_path / "aged", small(adjust=("age",)))) <= 0.09
    with pytest.raises(BadInput, match=r"no column 'sex' to go by; there are .*age"):
        compare(root, tmp_path / "sex", small(adjust=("sex",)))
    with pytest.raises(BadInput, match="column 'content_hash' differs between images of one patient"):
        compare(root, tmp_path / "hash", small(strata="content_hash"))


def test_who_is_left_out_is_named(tmp_path: Path) -> None:
    patient, values = cohort([5] * 12, np.random.default_rng(4))
    age = np.array([str(50 + i) for i in range(12)], object)
    age[[3, 9]] = ["", "NA"]
    ward = np.array(["x", "y"] * 5 + ["z", "z"], object)
    root = write_image_barcodes(
        tmp_path / "b", values, patient, ["A"] * 6 + ["B"] * 6, age=age[patient], ward=ward[patient]
    )
    notes = compare(root, tmp_path / "out", small(adjust=("age",), strata="ward")).summary["warnings"]
    assert "2 patients have no age and are left out: P003, P009" in notes
    assert "2 patients stand in a ward with one group only, say nothing, and are left out: z" in notes
    table = compare(root, tmp_path / "exact", small(strata="ward", n_permutations=1_000)).summary
    assert table["is_exact"]
    assert table["n_permutations"] == 10 * 10


@pytest.mark.stress
def test_a_mixture_is_taken_out(tmp_path: Path) -> None:
    """No latent differs within a type: crude p is false, within a label and standardised it holds."""
    rng = np.random.default_rng(5)
    patient, values = cohort([60] * 40, rng)
    is_a = np.arange(40) < 20
    share = np.where(is_a, 0.65, 0.35) + rng.uniform(-0.1, 0.1, 40)
    labels = np.where(rng.random(len(patient)) < share[patient], "blast", "lymphocyte").astype(object)
    values += (labels == "blast")[:, None] * rng.poisson(1.0, values.shape)
    root = write_image_barcodes(tmp_path / "b", values, patient, ["A"] * 20 + ["B"] * 20, label=labels)
    even = compare(root, tmp_path / "even", small(standardize="label"))
    assert share_below(even) <= 0.09
    assert share_below(even, "p_crude") > 0.3
    assert np.nanmedian(column(even, "explained")) > 0.5
    assert even.summary["images"]["weights"].keys() == {"blast", "lymphocyte"}
    one = compare(root, tmp_path / "one", small(within_label="blast"))
    assert share_below(one) <= 0.09
    labels[patient == 3] = "blast"
    root = write_image_barcodes(tmp_path / "lack", values, patient, ["A"] * 20 + ["B"] * 20, label=labels)
    notes = compare(root, tmp_path / "named", small(standardize="label")).summary["warnings"]
    assert any("1 patient without an image of each label, left out: P003 (lymphocyte)" in each for each in notes)
    with pytest.raises(BadInput, match="no image of these patients has the label 'basophil'"):
        compare(root, tmp_path / "no", small(within_label="basophil"))


def test_intervals_cover(tmp_path: Path) -> None:
    """Latents of 30%, 2% and 0.2% of images, with and without a difference; the whole table: bench/calibration.py."""
    rng, is_a = np.random.default_rng(6), np.arange(40) < 20
    for frequency in (0.3, 0.02, 0.002):
        for factor in (1.0, 1.5):
            rate = np.where(is_a[:, None], factor, 1) * rng.gamma(4, frequency / 4, (40, 800))
            values = rng.binomial(100, np.minimum(rate, 1)) / 100
            values = values[:, values.any(0)]
            found = intervals(values, [values], is_a)
            truth = frequency * (factor - 1)
            covers = (found["difference_low"] <= truth) & (truth <= found["difference_high"])
            assert covers.mean() >= 0.92, (frequency, factor)
            if factor == 1:
                for name, none in (("hedges_g", 0), ("auc", 0.5)):
                    assert ((found[f"{name}_low"] <= none) & (none <= found[f"{name}_high"])).mean() >= 0.93
    common = np.asarray(rng.normal(50, 3, (40, 5)), np.float64)
    found = intervals(common, [common], is_a)
    wider = []
    for column in range(5):  # nothing is skewed: Welch's, but that no variance is below the pooled one
        welch = stats.ttest_ind(common[:20, column], common[20:, column], equal_var=False).confidence_interval()
        wider.append((found["difference_high"] - found["difference_low"])[column] / (welch.high - welch.low))
    assert 1 <= min(wider)
    assert np.mean(wider) < 1.15


def test_values_that_are_not_counts_have_the_limits_of_welch_or_student() -> None:
    """By scipy: Welch where the small group varies more; else Student, since no variance is below the pooled one."""
    rng, is_a = np.random.default_rng(8), np.arange(36) < 6
    spread = np.where(is_a[:, None], [[5.0, 0.2]], 1.0)
    values = np.asarray(rng.normal(0, spread), np.float64)
    found = intervals(values, [values], is_a)
    for column, has_equal_variances in ((0, False), (1, True)):
        a, b = values[is_a, column], values[~is_a, column]
        limits = stats.ttest_ind(a, b, equal_var=has_equal_variances).confidence_interval()
        assert found["difference_low"][column] == pytest.approx(limits.low)
        assert found["difference_high"][column] == pytest.approx(limits.high)


def test_the_interval_of_a_rare_difference_is_newcombes() -> None:
    """By solving for the limits of each group; where nobody of a group shows it, by what the others' counts vary."""
    values = np.zeros((30, 3))
    values[[0, 3, 4, 20, 21], 0] = [0.05, 0.05, 0.15, 0.1, 0.05]
    values[[2, 5, 6, 9], 1] = [0.2, 0.05, 0.4, 0.1]  # none in B
    values[[1, 25], 2] = [0.1, 0.3]  # too few
    is_a = np.arange(30) < 12
    found = intervals(values, [values], is_a)
    for column in range(2):
        groups = values[is_a, column], values[~is_a, column]
        mean = [group.mean() for group in groups]
        pooled = sum(((group - group.mean()) ** 2).sum() for group in groups) / 28
        pooled_mean = (11 * mean[0] + 17 * mean[1]) / 28
        away = []
        for group, m in zip(groups, mean, strict=True):
            floor = min(pooled / pooled_mean * m, pooled)
            own = group.var(ddof=1)
            c = pooled / pooled_mean if m == 0 else max(own, floor) / m
            t = stats.t.ppf(0.975, len(group) - 1 if own > floor else 28)

            def gap(mu: float, m: float = m, c: float = c, t: float = t, size: int = len(group)) -> float:
                return float((m - mu) ** 2 - t**2 * c * mu / size)

            low = optimize.brentq(gap, 0, m) if m > 0 else 0.0
            away.append((m - low, optimize.brentq(gap, max(m, 1e-9), 100) - m))
        down, up = np.hypot(away[0][0], away[1][1]), np.hypot(away[0][1], away[1][0])
        assert found["difference_low"][column] == pytest.approx(mean[0] - mean[1] - down, rel=1e-6)
        assert found["difference_high"][column] == pytest.approx(mean[0] - mean[1] + up, rel=1e-6)
        assert found["hedges_g_low"][column] < found["hedges_g"][column] < found["hedges_g_high"][column]
    for name in ("difference", "hedges_g"):
        assert np.isnan([found[f"{name}_low"][2], found[f"{name}_high"][2]]).all()
        assert np.isfinite(found[name][2])
    swapped = intervals(values, [values], ~is_a)
    assert np.allclose(swapped["difference_low"], -found["difference_high"], equal_nan=True)
    same = intervals(values, [values], is_a, counted=(values, [values]))
    assert (same["difference_high"][:2] >= found["difference_high"][:2] - 1e-12).all()  # no narrower than Welch's


@pytest.mark.parametrize("wrong", ["inf", "-Infinity", "1e300"])
def test_a_covariate_that_is_not_finite_is_refused(tmp_path: Path, wrong: str) -> None:
    """One such value made every residual NaN: the column was left out in silence, and nothing was adjusted."""
    patient, values = cohort([2] * 12, np.random.default_rng(0))
    ages = [wrong if i == 3 else f"{40 + i}" for i in range(12)]
    columns = {"age": [ages[i] for i in patient]}
    root = write_image_barcodes(tmp_path / "b", values, patient, ["A"] * 6 + ["B"] * 6, **columns)
    with pytest.raises(BadInput, match=rf"column 'age' holds {wrong}, and only finite numbers below 1e\+100 can be"):
        compare(root, tmp_path / "out", small(adjust=("age",)))
    assert not (tmp_path / "out").exists()
