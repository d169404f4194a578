"""The probe finds what is planted, scores at chance where nothing is, and never sees what it predicts.

Slow twins: scikit-learn on all columns, plain loops over folds and thresholds, sklearn.metrics.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from cohorts import N_LATENTS, THRESHOLDS, Array, cohort, fill, finished, kept_latents, one_thread, quick, write_folder
from scipy import stats
from scipy.linalg import LinAlgError
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from cli import cli
from cytosae.probe import (
    MilConfig,
    Plan,
    ProbeConfig,
    UnitConfig,
    assign_folds,
    draw_groups,
    interval,
    logistic_columns,
    probe,
    scores_of_draws,
    threshold_grams,
)
from cytosae.probe import run as probe_run
from cytosae.probe import units as probe_units
from cytosae.probe.baselines import features, read_image_tokens
from cytosae.probe.cross_validation import Repeat, Thresholds, run_repeat
from cytosae.probe.folds import choose_null, connected_groups, shuffle_labels
from cytosae.probe.intervals import calibration, calibration_error, possible
from cytosae.probe.logistic import fit_rows
from cytosae.probe.logistic_columns import fit_columns, fit_gram
from cytosae.probe.scores import class_scores, score
from cytosae.probe.scores import confusion_matrix as our_confusion
from cytosae.probe.threshold_columns import ThresholdColumns
from cytosae.probe.threshold_grams import ThresholdGrams
from cytosae.probe.units import read_units
from stores import PROBE, SAE, BarcodeStore, ResultStore, new_header, write_header
from stores.activation_spec import ActivationSpec
from stores.activation_store import ActivationStore
from stores.activation_writer import ActivationWriter
from stores.content_hashes import write_trained_on
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.tables import image_table, table_sha256, with_outcome

__all__ = ["one_thread"]  # a fixture that every test here uses

MEASURED = """
import resource, sys
from cli import cli
cli(sys.argv[1:], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


# ------------------------------------------------------------------------------------------- made-up barcodes


def write_images(root: Path, *, n_images: int, n_latents: int) -> Path:
    """Barcodes of images of 60 patients, as sparse as released ones.

    Every 50th latent knows one of 3 classes; one image in ten bears another's label.
    """
    rng = np.random.default_rng(0)
    frequency = np.minimum(1, n_latents / 170 / rng.permutation(np.arange(1, n_latents + 1)))
    truth, patients = rng.integers(0, 3, n_images), rng.integers(0, 60, n_images)
    frequency[::50], boost = 0.2, np.ones((3, n_latents))
    boost[np.arange(0, n_latents, 50) // 50 % 3, np.arange(0, n_latents, 50)] = 3
    mean = 10.0 ** rng.normal(-2, 1, n_latents)
    indices, counts = [], []
    for k in truth:
        active = np.flatnonzero(rng.random(n_latents) < frequency * boost[k])
        indices.append(active)
        counts.append(1 + rng.poisson(3 * boost[k, active]))
    columns, values = np.concatenate(indices), np.concatenate(counts).astype(np.float32)
    indptr = np.cumsum([0, *map(len, indices)])
    layers = {"X": values, "mean": (values * mean[columns]).astype(np.float32)}
    shape = (n_images, n_latents)
    labels = np.where(rng.random(n_images) < 0.1, rng.permutation(truth), truth)
    obs = pd.DataFrame(
        {
            "patient": [f"P{k}" for k in patients],
            "disease": "",
            "label": [f"L{k}" for k in labels],
            "content_hash": [str(k) for k in range(n_images)],
            "dataset": "d",
            "status": "ok",
        },
        index=pd.Index([f"i{k:06d}" for k in range(n_images)], name="image_id"),
    )
    fill(root / "image.zarr", obs, {name: csr_matrix((data, columns, indptr), shape) for name, data in layers.items()})
    return finished(root, not_read=("patient", "disease"))


# ------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize(
    ("n", "m", "n_classes", "C"),
    [(40, 90, 3, 24.0), (40, 300, 2, 5.0), (60, 10, 3, 1.0), (30, 60, 4, 2000.0), (25, 8, 2, 1e4), (40, 30, 5, 0.1)],
)
def test_row_space_is_the_direct_fit(n: int, m: int, n_classes: int, C: float) -> None:
    """Probabilities of new rows to 1e-6, against scikit-learn on all columns; separable or not."""
    rng = np.random.default_rng(n + m)
    x, new = rng.poisson(2, (n, m)) / 3.0, rng.poisson(2, (15, m)) / 3.0
    labels = rng.integers(0, n_classes, n)
    fit = fit_rows(x @ x.T, labels, n_classes, C)
    assert fit.converged
    direct = LogisticRegression(C=C, tol=1e-10, max_iter=1000, solver="newton-cholesky").fit(x, labels)
    np.testing.assert_allclose(fit.probabilities(new @ x.T), direct.predict_proba(new), atol=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "n_classes", "C"),
    [(60, 150, 3, 24.0), (60, 300, 2, 5.0), (90, 10, 3, 1.0), (50, 90, 4, 2000.0), (60, 8, 2, 1e4)],
)
def test_many_rows_are_fitted_as_few_are(
    n: int, m: int, n_classes: int, C: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a factor of the Gram matrix, dense and sparse columns: Newton's probabilities."""
    rng = np.random.default_rng(n + m)
    x, new = rng.poisson(2, (n, m)) / 3.0, rng.poisson(2, (15, m)) / 3.0
    labels = rng.integers(0, n_classes, n) * 2  # classes 1, 3 ... have no row
    exact = fit_rows(x @ x.T, labels, 2 * n_classes, C).probabilities(new @ x.T)
    monkeypatch.setattr(logistic_columns, "NEWTON_ROWS", 0)
    monkeypatch.setattr(logistic_columns, "_GAP", 1e-10)
    factored = fit_gram(x @ x.T, labels, 2 * n_classes, C)
    assert factored.converged
    np.testing.assert_allclose(factored.probabilities(new @ x.T), exact, atol=1e-5)
    for columns in (x, csr_matrix(x)):
        fit = fit_columns(columns, labels, 2 * n_classes, C)
        assert fit.converged
        np.testing.assert_allclose(fit.probabilities(new), exact, atol=1e-5)
    monkeypatch.setattr(logistic_columns, "_MOST_STEPS", 3)
    monkeypatch.setattr(logistic_columns, "_MOST_NEWTON_STEPS", 3)
    assert not fit_columns(x, labels, 2 * n_classes, C).converged
    assert not fit_gram(x @ x.T, labels, 2 * n_classes, C).converged


def test_few_weights_take_few_steps() -> None:
    """Counts of unlike sizes that do not part the classes: L-BFGS would take thousands; if Newton fails it serves."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-1, 2, 20)
    x = rng.poisson(2, (300, 20)) * size
    labels = rng.permutation(np.arange(300) % 3)
    labels[:150] = x[:150, 0] > 2 * size[0]
    exact = fit_rows(x @ x.T, labels, 3, 50.0).probabilities(x @ x.T)
    found = fit_columns(csr_matrix(x), labels, 3, 50.0)
    assert found.converged
    assert found.n_steps < 30
    np.testing.assert_allclose(found.probabilities(x), exact, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogisticRegression, "fit", Mock(side_effect=LinAlgError))
        slow = fit_columns(x, labels, 3, 50.0)
    assert slow.converged
    assert slow.n_steps > 300
    np.testing.assert_allclose(slow.probabilities(x), exact, atol=1e-3)


def test_few_rows_with_fewer_columns_are_fitted_too() -> None:
    """At a large C, Newton's method on the rows ends too early, by rounding: far from what the columns' fit says."""
    rng = np.random.default_rng(0)
    x, labels = rng.poisson(2, (60, 12)) * 10.0 ** rng.uniform(0, 2, 12), rng.permutation(np.arange(60) % 3)
    direct = LogisticRegression(C=1e4, tol=1e-8, max_iter=1000, solver="newton-cholesky").fit(x - x.mean(0), labels)
    exact = direct.predict_proba(x - x.mean(0))
    stuck = fit_rows(x @ x.T, labels, 3, 1e4)
    assert not stuck.converged
    assert np.abs(stuck.probabilities(x @ x.T) - exact).max() > 0.1
    found = fit_gram(x @ x.T, labels, 3, 1e4)
    assert found.converged
    assert found.n_steps < 10
    np.testing.assert_allclose(found.probabilities(x @ x.T), exact, atol=1e-6)


def test_what_newton_does_not_fit_on_rows_is_fitted_on_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more columns than a third of the rows, rows come first; a fit that does not converge there is done again."""
    rng = np.random.default_rng(1)
    x, labels = rng.poisson(2, (60, 30)) / 3.0, rng.permutation(np.arange(60) % 3)
    exact = fit_rows(x @ x.T, labels, 3, 5.0)
    assert fit_gram(x @ x.T, labels, 3, 5.0).n_steps == exact.n_steps
    monkeypatch.setattr("cytosae.probe.logistic._MOST_STEPS", 1)
    assert not fit_rows(x @ x.T, labels, 3, 5.0).converged
    again = fit_gram(x @ x.T, labels, 3, 5.0)
    assert again.converged
    np.testing.assert_allclose(again.probabilities(x @ x.T), exact.probabilities(x @ x.T), atol=1e-3)


def test_a_fit_ends_within_its_tolerance() -> None:
    """The objective is no more than 1e-7 above its minimum, and far enough away that the rule is what ended it."""
    rng = np.random.default_rng(0)
    x, labels = rng.poisson(1, (80, 200)) * 1.0, rng.integers(0, 3, 80)
    fit, exact = fit_columns(x, labels, 3, 100.0), fit_rows(x @ x.T, labels, 3, 100.0)

    def objective(weights: Array, p: Array) -> float:
        return -100 * np.log(p[np.arange(80), labels]).sum() + (weights**2).sum() / 2

    least = objective(100.0 * (x - x.mean(0)).T @ exact.dual, exact.probabilities(x @ x.T))
    assert 1e-12 < objective(fit.weights, fit.probabilities(x)) / least - 1 <= 1e-7
    weak = fit_columns(x / 1e4, labels, 3, 100.0).probabilities(x / 1e4) - np.bincount(labels) / 80
    wanted = fit_rows(x @ x.T / 1e8, labels, 3, 100.0).probabilities(x @ x.T / 1e8) - np.bincount(labels) / 80
    np.testing.assert_allclose(weak, wanted, atol=1e-3 * np.abs(wanted).max())


def test_what_cannot_be_learnt_is_stated_as_shares() -> None:
    """No columns: the shares of the classes. A class without a row: probability 0. One class: 1. No row: all 0."""
    labels = np.array([0, 0, 2, 0])
    np.testing.assert_allclose(
        fit_rows(np.zeros((4, 4)), labels, 3, 1.0).probabilities(np.zeros((1, 4))), [[0.75, 0, 0.25]]
    )
    nothing = fit_rows(np.zeros((0, 0)), np.zeros(0, np.int64), 3, 1.0)
    assert (nothing.probabilities(np.zeros((2, 0))) == 0).all()
    alone = fit_rows(np.eye(2), np.array([1, 1]), 3, 1.0)
    assert alone.converged
    np.testing.assert_allclose(alone.probabilities(np.ones((1, 2))), [[0, 1, 0]])
    for x, truth, wanted in (
        (np.zeros((4, 0)), labels, [[0.75, 0, 0.25]]),
        (np.zeros((0, 1)), np.zeros(0, np.int64), [[0, 0, 0]]),
        (np.ones((2, 1)), np.array([1, 1]), [[0, 1, 0]]),
    ):
        found = fit_columns(csr_matrix(x), truth, 3, 1.0)
        assert found.converged
        np.testing.assert_allclose(found.probabilities(np.ones((1, x.shape[1]))), wanted)


@pytest.mark.parametrize("n_predicted", [1, 3])
def test_scores_are_those_of_sklearn(n_predicted: int) -> None:
    """Also where a class is never predicted."""
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 3, 50), rng.integers(0, n_predicted, 50)
    counts = our_confusion(true, predicted, 3)
    np.testing.assert_array_equal(counts, confusion_matrix(true, predicted, labels=[0, 1, 2]))
    found = score(counts)
    assert found["weighted_f1"] == pytest.approx(f1_score(true, predicted, average="weighted", zero_division=0))
    assert found["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    theirs = np.array(precision_recall_fscore_support(true, predicted, zero_division=0))
    ours = np.array([list(row.values()) for row in class_scores(counts, ["a", "b", "c"]).values()])
    np.testing.assert_allclose(ours, theirs.T)


# ------------------------------------------------------------------------------------------- groups and folds


def test_groups_are_connected_components() -> None:
    """Through any column and any number of links; an empty value links nobody."""
    patients = ["a", "a", "b", "c", "d", "", ""]
    hashes = ["1", "2", "2", "3", "4", "4", ""]
    assert connected_groups([patients, hashes]).tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert connected_groups([patients, hashes, ["", "", "x", "", "", "", "x"]]).tolist() == [0, 0, 0, 1, 2, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides_and_classes_are_spread(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.unique(rng.integers(0, 30, 60), return_inverse=True)[1]
    labels = rng.integers(0, 3, groups.max() + 1)[groups]
    fold_of = assign_folds(labels, groups, 4, np.random.default_rng(1))
    assert all(len(np.unique(fold_of[groups == group])) == 1 for group in groups)
    alone = assign_folds(labels, np.arange(60), 4, np.random.default_rng(1))
    for k in range(3):
        sizes = np.bincount(alone[labels == k], minlength=4)
        assert sizes.max() - sizes.min() <= 1
    assert np.ptp(np.bincount(alone)) <= 2
    assert (assign_folds(labels, groups, 4, np.random.default_rng(2)) != fold_of).any()


def test_shuffled_labels_keep_groups_whole() -> None:
    """Between: groups of one label each exchange them. Within: rows of a group exchange theirs."""
    groups = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    labels = np.array([0, 0, 1, 2, 2, 2, 1, 0])
    seen = set()
    for seed in range(40):
        shuffled = shuffle_labels(labels, groups, np.random.default_rng(seed), "between")
        first = [shuffled[groups == g][0] for g in range(5)]
        assert (shuffled == np.array(first)[groups]).all()
        assert sorted(first) == [0, 0, 1, 1, 2]
        seen.add(tuple(first))
    assert len(seen) > 10
    mixed = np.array([0, 1, 1, 2, 2, 0, 1, 0])
    for seed in range(20):
        shuffled = shuffle_labels(mixed, groups, np.random.default_rng(seed), "within")
        for group in range(5):
            assert sorted(shuffled[groups == group]) == sorted(mixed[groups == group])


@pytest.mark.parametrize("sizes", [np.full(20, 10), np.arange(20, 60), np.arange(1, 41)])
def test_a_few_odd_labels_do_not_stop_the_shuffle(sizes: Array) -> None:
    """Whole groups still exchange labels when one image, or one in ten, has another one; classes stay as large."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    pure = groups % 2
    odd = pure.copy()
    odd[-1] = 1 - odd[-1]
    nearly = np.where(np.random.default_rng(0).random(len(pure)) < 0.1, 1 - pure, pure)
    for labels in (pure, odd, nearly):
        assert choose_null(labels, groups) == "between"
        drawn = [shuffle_labels(labels, groups, np.random.default_rng(seed), "between") for seed in range(50)]
        assert np.mean([(each != labels).mean() for each in drawn]) > 0.4
        assert np.mean([each.mean() for each in drawn]) == pytest.approx(labels.mean(), abs=0.04)
        purity = [
            np.mean([max(each[groups == g].mean(), 1 - each[groups == g].mean()) for g in set(groups)])
            for each in (labels, drawn[0])
        ]
        assert purity[0] == pytest.approx(purity[1], abs=0.05)
    free = np.random.default_rng(1).integers(0, 2, len(pure))
    assert choose_null(free, groups) == "within"
    assert choose_null(free, groups, "between") == "between"


def test_sizes_that_go_with_the_classes_are_not_shuffled_away() -> None:
    """Else the commonest class, common because its groups are large, would beat every shuffle."""
    groups = np.repeat(np.arange(20), [1] * 10 + [50] * 10)
    labels = (groups >= 10).astype(np.int64)
    for seed in range(10):
        assert (shuffle_labels(labels, groups, np.random.default_rng(seed), "between") == labels).all()


# ------------------------------------------------------------------------------------------- intervals


def test_scores_of_draws_are_sklearns_with_weights() -> None:
    """Each draw's score is scikit-learn's on rows weighted by how often their group was drawn."""
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(12), 5), rng.integers(0, 3, 60)
    p = np.round(rng.dirichlet(np.ones(3), 60) + 0.5 * np.eye(3)[labels], 1)  # rounded: ties
    p /= p.sum(1, keepdims=True)
    draws = draw_groups(groups, [1], n_draws=20)
    fold_of = rng.integers(0, 2, 12)[groups]
    found = scores_of_draws([p], labels, draws, [fold_of])
    silent = scores_of_draws([np.full((60, 3), 1 / 3)], labels, draws, [fold_of])
    np.testing.assert_allclose(silent["auroc"], 0.5)
    for b, w in enumerate(draws.of_rows):
        for name, average in {"weighted_f1": "weighted", "macro_f1": "macro"}.items():
            wanted = f1_score(labels, p.argmax(1), average=average, sample_weight=w, zero_division=0)
            assert found[name][b] == pytest.approx(wanted)
        one_hot = np.eye(3)[labels]
        wanted = np.mean([average_precision_score(one_hot[:, k], p[:, k], sample_weight=w) for k in range(3)])
        assert found["auprc"][b] == pytest.approx(wanted)
        areas = []
        for k in range(3):
            won = pairs = 0.0
            for fold in range(2):
                mine = (fold_of == fold) & (w > 0)
                n_pairs = w[mine & (labels == k)].sum() * w[mine & (labels != k)].sum()
                if n_pairs:
                    won += n_pairs * roc_auc_score(one_hot[mine, k], p[mine, k], sample_weight=w[mine])
                    pairs += n_pairs
            areas.append(won / pairs)
        assert found["auroc"][b] == pytest.approx(np.mean(areas))
        assert found["log_loss"][b] == pytest.approx(log_loss(labels, np.maximum(p, 1e-15), sample_weight=w))
        assert found["brier"][b] == pytest.approx(np.average(((p - one_hot) ** 2).sum(1), weights=w))
    assert interval(found["accuracy"])["low"] < found["accuracy"][0] < interval(found["accuracy"])["high"]
    assert interval(np.full(21, 0.5)) == {"low": 0.5, "high": 0.5}
    assert interval(np.full(21, np.nan)) == {"low": None, "high": None}
    assert possible("weighted_f1", {"low": -0.1, "high": 1.02}) == {"low": 0.0, "high": 1.0}  # a widened interval
    assert possible("log_loss", {"low": -0.1, "high": 1.02}) == {"low": 0.0, "high": 1.02}
    assert possible("auroc", {"low": None, "high": None}) == {"low": None, "high": None}


def test_calibration_tells_overconfidence() -> None:
    sure = np.tile([0.95, 0.05], (40, 1))
    table = calibration([sure], np.arange(40) % 2)
    assert [row["n"] for row in table] == [40]
    assert calibration_error(table) == pytest.approx(0.45)


# ------------------------------------------------------------------------------------------- one repeat


def small_problem(seed: int = 0, n: int = 24, m: int = 60) -> tuple[Array, Array, Array, Array, Array]:
    """values, sums, counts (m, n), labels and groups; latents come and go around the thresholds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    values = rng.poisson(1.0, (m, n)) * (rng.random((m, n)) < 0.5) * 1.0
    values[:3] += 2 * (labels == np.arange(3)[:, None])
    counts = np.where(values > 0, rng.integers(1, 5, (m, n)), 0).astype(float)
    sums = counts * 10.0 ** rng.uniform(-3, 0.5, (m, 1)) * rng.uniform(0.2, 2, (m, n))
    return values, sums, counts, labels, np.arange(n) // 2 * 3 % n


def slow_repeat(
    values: Array, sums: Array, counts: Array, labels: Array, groups: Array, plan: Plan, seed: int
) -> Repeat:
    """The same repeat in plain loops, scikit-learn on all columns, those below the threshold set to zero."""
    rng = np.random.default_rng(seed)
    fold_of = assign_folds(labels, groups, plan.n_folds, rng)
    probabilities, chosen, factors = np.zeros((len(THRESHOLDS), len(labels), plan.n_classes)), [], []
    inner_folds = []

    def predict(training: Array, tested: Array, threshold: float, factor: float) -> Array:
        x = (values * kept_latents(sums, counts, training, threshold)[:, None]).T
        if not x[training].any():
            return np.tile(np.bincount(labels[training], minlength=plan.n_classes) / training.sum(), (tested.sum(), 1))
        C = factor * plan.C_of(int(training.sum()))
        model = LogisticRegression(C=C, tol=1e-10, max_iter=1000, solver="newton-cholesky")
        return model.fit(x[training], labels[training]).predict_proba(x[tested])

    for fold in range(plan.n_folds):
        training = fold_of != fold
        inner_of = np.full(len(labels), -1)
        inner_of[training] = assign_folds(labels[training], groups[training], plan.n_inner_folds, rng)
        inner_folds.append(inner_of)
        f1 = np.zeros((len(THRESHOLDS), len(plan.c_factors)))
        for (t, threshold), (k, factor) in product(enumerate(THRESHOLDS), enumerate(plan.c_factors)):
            predicted = np.zeros(len(labels), int)
            for inner in range(plan.n_inner_folds):
                tested = inner_of == inner
                predicted[tested] = predict(training & ~tested, tested, threshold, factor).argmax(1)
            f1[t, k] = f1_score(labels[training], predicted[training], average="weighted", zero_division=0)
        best = np.argmax(np.round(f1, 12), axis=1)
        chosen.append(int(np.argmax(np.round(f1.max(1), 12))))
        factors.append([plan.c_factors[k] for k in best])
        for t, threshold in enumerate(THRESHOLDS):
            probabilities[t, ~training] = predict(training, ~training, threshold, factors[-1][t])
    n_kept = np.zeros(0, np.int64)
    return Repeat(fold_of, probabilities, np.array(chosen), np.array(factors), np.array(inner_folds), n_kept, 0, 0)


PLAN = Plan(n_folds=3, n_inner_folds=2, n_classes=3, C_of=lambda n: 0.1 * n, c_factors=(1e-3, 0.1, 1.0))


def along_thresholds(way: str, values: Array, sums: Array, counts: Array) -> Thresholds:
    if way == "columns":
        return ThresholdColumns(csr_matrix(values.T), csr_matrix(sums.T), csr_matrix(counts.T), THRESHOLDS)
    if way == "sparse grams":
        return ThresholdGrams(csr_matrix(values), csr_matrix(sums), csr_matrix(counts), THRESHOLDS)
    return ThresholdGrams(values, sums, counts, THRESHOLDS)


@pytest.mark.parametrize("way", ["grams", "sparse grams", "columns"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_repeat_is_its_slow_twin(way: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic_columns, "_GAP", 1e-10)
    monkeypatch.setattr(threshold_grams, "_CHUNK", 200)
    values, sums, counts, labels, groups = small_problem(seed)
    fast = run_repeat(along_thresholds(way, values, sums, counts), labels, groups, PLAN, np.random.default_rng(5))
    slow = slow_repeat(values, sums, counts, labels, groups, PLAN, 5)
    np.testing.assert_array_equal(fast.fold_of, slow.fold_of)
    np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=1e-5 if way == "columns" else 1e-6)
    assert fast.chosen.tolist() == slow.chosen.tolist()
    np.testing.assert_array_equal(fast.c_factors, slow.c_factors)
    assert len(np.unique(fast.c_factors)) > 1  # else C would be chosen by nothing
    np.testing.assert_array_equal(fast.inner_of, slow.inner_of)
    assert (fast.n_unconverged, fast.n_unseen) == (0, 0)
    for fold, n_kept in enumerate(fast.n_kept):
        there = counts[:, fast.fold_of != fold].any(1)
        wanted = [(kept_latents(sums, counts, fast.fold_of != fold, t) & there).sum() for t in THRESHOLDS]
        assert n_kept.tolist() == wanted
    assert len(set(fast.n_kept[0])) == len(THRESHOLDS)  # else the thresholds would be tested by nothing


def test_of_a_single_threshold_nothing_is_chosen() -> None:
    values, sums, counts, labels, groups = small_problem()
    several = run_repeat(
        along_thresholds("grams", values, sums, counts), labels, groups, PLAN, np.random.default_rng(5)
    )
    single = ThresholdGrams(values, sums, counts, THRESHOLDS[1:2])
    found = run_repeat(single, labels, groups, PLAN, np.random.default_rng(5))
    assert found.chosen.tolist() == [0] * PLAN.n_folds
    np.testing.assert_allclose(found.probabilities[0], several.probabilities[1], atol=1e-8)


@pytest.mark.parametrize("way", ["grams", "columns"])
def test_what_is_predicted_has_no_part_in_the_fit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test rows, wildly changed: what was chosen stays, and so does a test row that was not changed."""
    monkeypatch.setattr(logistic_columns, "_MOST_STEPS", 30)  # not to the end: it would be the same
    values, sums, counts, labels, groups = small_problem()
    before = run_repeat(along_thresholds(way, values, sums, counts), labels, groups, PLAN, np.random.default_rng(5))
    for fold in range(PLAN.n_folds if way == "grams" else 1):
        untouched, *others = np.flatnonzero(before.fold_of == fold)
        changed = [matrix.copy() for matrix in (values, sums, counts)]
        rng = np.random.default_rng(fold)
        for matrix in changed:
            matrix[:, others] = rng.integers(1, 100, (len(values), len(others)))
        after = run_repeat(along_thresholds(way, *changed), labels, groups, PLAN, np.random.default_rng(5))
        assert after.chosen[fold] == before.chosen[fold]
        assert (after.n_kept[fold] == before.n_kept[fold]).all()
        np.testing.assert_allclose(after.probabilities[:, untouched], before.probabilities[:, untouched], atol=1e-8)
        assert np.abs(after.probabilities - before.probabilities).max() > 0.1


# ------------------------------------------------------------------------------------------- the whole probe


@pytest.mark.stress
def test_planted_signal_is_found_and_chance_is_chance(tmp_path: Path) -> None:
    """With the signal the least p there is; without it, scores within chance. No NaN; tables and scores agree."""
    done = probe(write_folder(tmp_path / "b", *cohort(signal=4.0)), tmp_path / "out", quick(permutations=19), workers=2)
    scores = done.scores
    assert not done.was_complete
    assert scores["methods"]["barcode"]["weighted_f1"]["mean"] > 0.9
    assert scores["permutation"]["weighted_f1"]["p"] == 1 / 20
    assert 0.3 < scores["permutation"]["weighted_f1"]["mean"] < 0.7
    assert scores["methods"]["majority"]["balanced_accuracy"]["mean"] == pytest.approx(0.5)
    assert scores["curve"][-1]["n_latents"] < scores["curve"][0]["n_latents"]
    json.dumps(scores, allow_nan=False)

    store = ResultStore(tmp_path / "out", PROBE)
    assert store.json("scores") == scores
    folds = store.table("folds").to_pandas()
    sides = folds.groupby(["repeat", "fold", "group"])["side"].nunique()
    assert (sides == 1).all()
    assert (folds[folds["side"] == "test"].groupby(["repeat", "patient"]).size() == 1).all()
    predictions = store.table("predictions").to_pandas()
    mine = predictions[predictions["threshold_chosen_inside"] & (predictions["repeat"] == 1)]
    wanted = f1_score(mine["true"], mine["predicted"], average="weighted")
    assert scores["methods"]["barcode"]["weighted_f1"]["values"][1] == pytest.approx(wanted)
    assert np.allclose(np.stack(predictions["probabilities"]).sum(1), 1)
    assert all(
        (tmp_path / "out" / f"{name}.{kind}").stat().st_size > 5000
        for name in ("curve", "confusion", "methods")
        for kind in ("png", "svg")
    )

    again = probe(tmp_path / "b", tmp_path / "out", quick(permutations=19))
    assert again.was_complete
    assert again.scores == scores
    assert [*again.lines()] == [*done.lines()]
    with pytest.raises(SpecMismatch, match="other settings"):
        probe(tmp_path / "b", tmp_path / "out", quick(permutations=18))

    nothing = write_folder(tmp_path / "n", *cohort(signal=0.0))
    scores = probe(nothing, tmp_path / "chance", quick(permutations=19)).scores
    assert scores["permutation"]["weighted_f1"]["p"] > 0.1
    assert scores["methods"]["barcode"]["weighted_f1"]["mean"] < 0.75


@pytest.mark.stress
def test_order_of_patients_and_number_of_threads_change_nothing(tmp_path: Path) -> None:
    made = cohort(signal=1.0)
    tables = []
    for name, order, workers in (("a", [], 1), ("b", np.random.default_rng(0).permutation(16).tolist(), 2)):
        probe(write_folder(tmp_path / name, *made, order=order), tmp_path / f"{name}.out", quick(), workers=workers)
        tables.append(pq.read_table(tmp_path / f"{name}.out" / "predictions.parquet").to_pandas())
    assert tables[0].drop(columns="probabilities").equals(tables[1].drop(columns="probabilities"))
    one, other = (np.stack(table["probabilities"]) for table in tables)
    np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.stress
def test_patients_who_share_an_image_are_never_parted(tmp_path: Path) -> None:
    """Everybody has a copy under another name. Parted, the copies give everything away; kept together, nothing."""
    table, counts, means = cohort(signal=0.0, n_per_class=12, seed=3)
    copy = table.assign(patient="Q" + table["patient"], image_id="Q" + table["image_id"])
    both = pd.concat([table, copy], ignore_index=True)
    doubled = 10 * np.concatenate([counts, counts]), np.concatenate([means, means])
    honest = write_folder(tmp_path / "honest", both, *doubled)
    blind = both.assign(content_hash=[str(k) for k in range(len(both))], field=[*table["field"], *table["field"]])
    naive = write_folder(tmp_path / "naive", blind, *doubled)
    f1 = {}
    for name, folder, group_by in (("honest", honest, None), ("naive", naive, None), ("by field", naive, "field")):
        config = quick(folds=8, repeats=1, thresholds=(0.0,), units=UnitConfig(group_by=group_by))
        scores = probe(folder, tmp_path / f"{name}.out", config).scores
        f1[name] = scores["methods"]["barcode"]["weighted_f1"]["mean"]
        assert scores["n_groups"] == (48 if name == "naive" else 24)
    assert f1["naive"] > 0.8
    assert f1["honest"] < 0.65
    assert f1["by field"] == f1["honest"]


@pytest.mark.stress
def test_images_by_label_with_patients_kept_together(tmp_path: Path) -> None:
    """Only as many as asked for, of patients only; a patient's images lie on one side."""
    table, counts, means = cohort()
    counts[:, 5] += 12 * (table["label"] == "L1")
    table.loc[0, "patient"] = ""
    table.loc[1, "status"] = "unreadable"
    folder = write_folder(tmp_path / "b", table, counts, means)
    scores = probe(folder, tmp_path / "out", quick(units=UnitConfig(level="image", target="", max_images=50))).scores
    assert (scores["n_units"], scores["target"]) == (50, "label")
    assert scores["n_groups"] <= 16
    assert scores["left_out"]["images without a patient"] == 1
    assert scores["methods"]["barcode"]["weighted_f1"]["mean"] > 0.85
    folds = ResultStore(tmp_path / "out", PROBE).table("folds").to_pandas()
    of_patient = folds["image"].str.split("_").str[0]
    assert (folds.groupby(["repeat", "fold", of_patient])["side"].nunique() == 1).all()


@pytest.mark.stress
def test_many_images_are_probed_on_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that are drawn are read; the same by any number of threads, and nearly the same by Gram matrices."""
    read = []
    read_rows = BarcodeStore.read_rows

    def noted(self: BarcodeStore, level: str, rows: Array, *more: Any, **named: Any) -> Any:
        read.append(len(rows))
        return read_rows(self, level, rows, *more, **named)

    monkeypatch.setattr(BarcodeStore, "read_rows", noted)
    folder = write_images(tmp_path / "b", n_images=600, n_latents=600)
    config = quick(
        folds=3, repeats=1, thresholds=(0.0, 0.05), units=UnitConfig(level="image", target="", max_images=400)
    )
    ways = {"one": (100, 1), "two": (100, 2), "grams": (1000, 1)}
    for name, (most, workers) in ways.items():
        monkeypatch.setattr(probe_run, "GRAM_ROWS", most)
        scores = probe(folder, tmp_path / name, config, workers=workers).scores
        assert (scores["n_units"], scores["n_fits_unconverged"]) == (400, 0)
        assert 0.75 < scores["methods"]["barcode"]["weighted_f1"]["mean"] < 0.97  # a tenth is mislabelled
    assert read == [400] * 6
    tables = [ResultStore(tmp_path / name, PROBE).table("predictions") for name in ways]
    near = [np.stack(table["probabilities"].to_numpy()) for table in tables[1:]]
    assert np.quantile(np.abs(near[0] - near[1]), 0.99) < 0.01
    monkeypatch.setattr(probe_run, "GRAM_ROWS", 100)
    assert tables[0].equals(tables[1])
    monkeypatch.setattr(logistic_columns, "_MOST_STEPS", 3)
    scores = probe(folder, tmp_path / "three", replace(config, thresholds=(0.0,), c_factors=(1.0,))).scores
    assert any("3 fits did not converge" in warning for warning in scores["warnings"])
    monkeypatch.setattr(probe_units, "_MOST_BYTES", 1 << 10)
    with pytest.raises(BadInput, match=r"barcodes of 400 images need .* GiB; .* choose a smaller --max-images"):
        probe(folder, tmp_path / "four", config)


@pytest.mark.slow
def test_twenty_thousand_images_at_full_width(tmp_path: Path) -> None:
    """In its own process, so that its memory can be told: under 4 GiB."""
    folder = write_images(tmp_path / "b", n_images=20_000, n_latents=49_152)
    command = [sys.executable, "-c", MEASURED, "probe", str(folder), "-o", str(tmp_path / "out"), "--level", "image"]
    command += ["--max-images", "1000000", "--folds", "2", "--repeats", "1", "--permutations", "0", "--threshold", "0"]
    command += ["--c-factor", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    scores, peak_kib = json.loads(done.stdout), int(done.stderr.splitlines()[-1])
    assert scores["n_units"] == 20_000
    assert scores["methods"]["barcode"]["weighted_f1"]["mean"] > 0.8
    assert peak_kib < 4 << 20


def test_classes_that_were_drawn_too_rarely_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "b", n_images=200, n_latents=50)
    with pytest.raises(BadInput, match=r"found .*; raise --max-images, or "):
        probe(folder, tmp_path / "out", quick(folds=5, units=UnitConfig(level="image", target="", max_images=14)))


@pytest.mark.stress
def test_two_patients_leave_no_inner_training_side(tmp_path: Path) -> None:
    """One patient trains, so nothing can be chosen inside: the lowest threshold, and a warning."""
    table, counts, means = cohort(n_per_class=1, images_each=12)
    folder = write_folder(tmp_path / "b", table, counts, means)
    units = UnitConfig(level="image", target="")
    scores = probe(folder, tmp_path / "out", quick(folds=2, permutations=2, units=units)).scores
    assert scores["n_groups"] == 2
    assert scores["curve"][0]["n_folds_chosen"] == 4
    assert any("a class had no training row" in warning for warning in scores["warnings"])


@pytest.mark.stress
def test_the_released_divisor_is_told(tmp_path: Path) -> None:
    """With it the number of images is in every barcode of a patient, not in those of images."""
    folder = write_folder(tmp_path / "b", *cohort(), normalize="cytosae-release")
    for level, is_told in (("patient", True), ("image", False)):
        units = UnitConfig(level=level, target="")
        scores = probe(folder, tmp_path / level, quick(repeats=1, thresholds=(0.0,), units=units)).scores
        assert any("normalised as cytosae-release" in warning for warning in scores["warnings"]) == is_told


@pytest.mark.stress
def test_damage_is_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "b", *cohort())
    chunk = next(
        path for path in (folder / "patient.zarr" / "layers" / "activation_sum").rglob("c/*") if path.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedStore, match=r"patient.zarr cannot be read .*count again"):
        probe(folder, tmp_path / "out", quick())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Barcodes of the cohort, read only."""
    return write_folder(tmp_path_factory.mktemp("whole") / "b", *cohort())


@pytest.mark.parametrize(
    ("changes", "units", "words"),
    [
        ({}, {"target": "stage"}, r"no column 'stage' of images; it has patient, disease"),
        ({}, {"target": "label"}, r"patients have images of several label \(P00, .*use --level image"),
        ({}, {"classes": ("D7",)}, "no patient has disease D7; there are D0, D1"),
        ({}, {"classes": ("D1",)}, "disease has one class only"),
        ({}, {"group_by": "dataset"}, r"found D0: 1, D1: 1 \(all 16 rows form 1 groups\); name the classes"),
        ({}, {"group_by": "room"}, "no column 'room'"),
        ({}, {"min_images": 9}, "no patient of .* is left"),
        ({}, {"tau": 0.3}, "has no barcodes at tau 0.3; it holds 0.2"),
        ({"folds": 9}, {}, r"9 folds need at least 9 independent .* found D0: 8, D1: 8 .*choose --folds 8"),
        ({"folds": 1}, {}, "folds must be at least 2"),
        ({"thresholds": (0.0, float("nan"))}, {}, "thresholds must be numbers"),
        ({"regularization": "guess"}, {}, "regularization must be"),
        ({"repeats": 0}, {}, "repeats must be at least 1"),
        ({}, {"level": "cell"}, "level must be"),
        ({}, {"min_images": 0}, "min_images must be at least 1"),
    ],
)
def test_mistakes_get_one_line(
    whole: Path, tmp_path: Path, changes: dict[str, Any], units: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        probe(whole, tmp_path / "out", quick(units=UnitConfig(**units), **changes))
    assert not (tmp_path / "out").exists()


def test_where_nothing_is_predicted_wrongly_the_interval_is_called_too_narrow(tmp_path: Path) -> None:
    """Sixteen of sixteen: 1.000 (1.000 to 1.000) stood there without a word. One of five mistaken gives it in 3%."""
    scores = probe(write_folder(tmp_path / "b", *cohort(signal=30.0)), tmp_path / "out", quick(permutations=0)).scores
    assert scores["methods"]["barcode"]["interval"]["accuracy"] == {"low": 1.0, "high": 1.0}
    share = stats.binomtest(0, scores["n_groups"]).proportion_ci().high
    (said,) = [warning for warning in scores["warnings"] if "no prediction of the barcodes is wrong" in warning]
    assert f"with {scores['n_groups']} independent groups, up to {share:.0%} of others" in said
    scores = probe(write_folder(tmp_path / "n", *cohort(signal=0.0)), tmp_path / "no", quick(permutations=0)).scores
    assert not any("is wrong" in warning for warning in scores["warnings"])


def test_patients_without_a_disease_are_left_out_and_counted(tmp_path: Path) -> None:
    table, counts, means = cohort()
    table.loc[table["patient"].isin(["P00", "P01"]), "disease"] = ""
    units = read_units(BarcodeStore(write_folder(tmp_path / "b", table, counts, means)), UnitConfig(min_images=4))
    few = table[table["disease"] != ""].groupby("patient").size() < 4
    assert units.left_out == {"patients without disease": 2, "patients with fewer than 4 images": int(few.sum())}
    assert units.classes == ["D0", "D1"]
    assert len(units.names) == 14 - few.sum()
    table["disease"] = ""
    nothing = write_folder(tmp_path / "n", table, counts, means)
    with pytest.raises(BadInput, match=r"no patient of .* with disease is left"):
        read_units(BarcodeStore(nothing), UnitConfig())


@pytest.mark.stress
def test_whether_the_sae_has_seen_the_images_is_decided_by_their_content(tmp_path: Path) -> None:
    """Not by the cache: from another one, under other names, a file is the same file; and it says how many."""
    table, counts, means = cohort(images_each=3)
    table["content_hash"] = [hashlib.sha256(name.encode()).hexdigest() for name in table["image_id"]]
    folder = write_folder(tmp_path / "b", table, counts, means)
    weights = BarcodeStore(folder).header.spec["latents_spec"]
    weights = (weights[0] if isinstance(weights, list) else weights)["sae_sha256"]

    def warnings(seen: Sequence[str], without: int = 0, *, said: bool = True) -> list[str]:
        run = tmp_path / f"run{len(seen)}{without}{said}"
        run.mkdir()
        images = image_table({"path": [f"{k}" for k in range(len(seen) + without)]}, source="test", dataset="elsewhere")
        nothing: list[str | None] = [None] * images.num_rows
        images = with_outcome(images, [*seen, *nothing[:without]], nothing)
        listed = {"trained_on": write_trained_on(run, [images])} if said else {}
        header = new_header(SAE, {"caches": [{"sha256": "e" * 64}], "images": {"excluded": 0}})
        write_header(run, replace(header, complete=True, summary={"sae_sha256": weights, **listed}))
        config = quick(repeats=1, thresholds=(0.0,), c_factors=(1.0,))
        scores = probe(folder, tmp_path / f"out{run.name}", config, sae=run).scores
        return [text for text in scores["warnings"] if "known" in text]

    n = len(table)
    assert warnings(table["content_hash"][:5].tolist()) == [
        f"transductive: the SAE has seen images of the test folds, without labels "
        f"({n} of the {n} images are known: 5 trained on)"
    ]
    assert warnings(["a" * 64]) == []
    assert warnings(["a" * 64], 1) == [
        f"{tmp_path / 'run11True'} does not say of all these images whether it was trained on them "
        f"(0 of the {n} images are known: 0 trained on)"
    ]
    assert len(warnings(["a" * 64], said=False)) == 1


# ------------------------------------------------------------------------------------------- baselines


def write_small_cache(root: Path, image_ids: Sequence[str], tokens: Array) -> ActivationStore:
    """A cache of 5 tokens of width 6, 4 images a chunk."""
    table = image_table({"path": [*image_ids], "image_id": [*image_ids]}, source="test", dataset="d")
    spec = ActivationSpec(
        backbone="none",
        weights_sha256="0" * 64,
        trained=True,
        block=0,
        n_blocks=1,
        transform={},
        precision="fp32",
        token_layout="1 CLS + 2x2 patches, row-major",
        n_images=len(image_ids),
        tokens_per_image=5,
        width=6,
        chunk_images=4,
        manifest_sha256=table_sha256(table),
    )
    writer = ActivationWriter(root, spec, table)
    for chunk in range(spec.n_chunks):
        rows = spec.chunk_rows(chunk)
        writer.write_chunk(
            chunk, tokens[rows.start : rows.stop].astype(np.float16), ["0"] * len(rows), [None] * len(rows)
        )
    writer.finish()
    return ActivationStore(root)


@pytest.mark.stress
def test_baselines_stand_beside_on_the_same_folds(tmp_path: Path) -> None:
    """Tokens that know the disease, counts that do not, through the command line; an image that is missing is named."""
    table, counts, means = cohort(n_per_class=6)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(table))
    tokens = rng.normal(size=(len(table), 5, 6))
    tokens[:, 1:, 2] += 8 * np.asarray(table["disease"] == "D1")[:, None]
    shuffled = [table["image_id"][k] for k in order]
    cache = write_small_cache(tmp_path / "c.zarr", shuffled, tokens[order])
    found = read_image_tokens([cache], [*table["image_id"]], progress=lambda *_: None)
    half = tokens.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(found.patches, half[:, 1:].mean(1))
    np.testing.assert_allclose(found.cls, half[:, 0])
    with pytest.raises(BadInput, match=r"1 of 1 images of the barcodes are not readable in --cache \(nobody\)"):
        read_image_tokens([cache], ["nobody"], progress=lambda *_: None)

    folder = write_folder(tmp_path / "b", table, counts, means)
    command = ["probe", folder, "-o", tmp_path / "out", "--cache", tmp_path / "c.zarr", "--folds", 3, "--repeats", 2]
    command += ["--permutations", 5, "--threshold", 0, "--mil-repeats", 1, "--mil-epochs", 60, "--workers", 1]
    done = CliRunner().invoke(cli, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    assert "12 patients in 12 groups; disease: D0 6, D1 6" in done.stdout
    assert "of 5 shuffles; first repeat" in done.stdout
    assert "the latents were not encoded from" in done.stderr  # this cache is not the one in the header
    assert "few independent groups (D0: 6, D1: 6)" in done.stderr
    scores = json.loads(CliRunner().invoke(cli, [*map(str, command), "--json"]).stdout)
    f1 = {name: found["weighted_f1"] for name, found in scores["methods"].items()}
    assert f1.keys() == {"barcode", "attention_mil", "majority", "n_images", "mean_tokens", "cls_token"}
    assert f1["mean_tokens"]["mean"] == 1
    assert f1["attention_mil"]["mean"] > 0.8
    assert len(f1["attention_mil"]["values"]) == 1
    assert f1["cls_token"]["mean"] < 0.9


@pytest.mark.parametrize("n", [60, 300])  # Gram matrix; columns
def test_token_baselines_are_scaled_by_their_training_rows(n: int) -> None:
    """As scikit-learn on tokens over their deviation in the training rows, whatever the backbone's scale is."""
    rng = np.random.default_rng(n)
    labels = np.arange(n) % 3
    tokens = 3 + rng.normal(size=(n, 5)) * [1, 2, 0.5, 1, 0] + 3 * np.eye(3, 5)[labels]
    training, inner_of = np.arange(n) % 5 > 0, np.where(np.arange(n) % 5 > 0, rng.permutation(n) % 3, -1)

    def found(values: Array, factors: Sequence[float]) -> Array:
        return features(values, 3, lambda n_rows: 0.15, factors)(labels, training, inner_of)

    scaled = tokens / np.sqrt(tokens[training].var(0).mean())
    slow = LogisticRegression(C=0.015, tol=1e-10, max_iter=5000).fit(scaled[training], labels[training])
    np.testing.assert_allclose(found(tokens, [0.1]), slow.predict_proba(scaled[~training]), atol=1e-3)
    many = found(tokens, [1e-4, 1e-2, 1.0])
    assert (many.argmax(1) == labels[~training]).mean() > 0.5
    for factor in (1e-6, 1e3):
        np.testing.assert_allclose(found(tokens * factor, [1e-4, 1e-2, 1.0]), many, atol=1e-3)
    for spread in (1e-4, 1e-6, 1e-8):  # of tokens that are nearly all the same, as an untrained backbone's CLS is
        nearly = 1 + np.arange(5) + spread * tokens
        np.testing.assert_allclose(found(nearly, [0.1]), found(tokens, [0.1]), atol=1e-5)
    assert np.isfinite(found(np.ones_like(tokens), [1.0])).all()  # tokens that are all equal
    equal = np.where(training[:, None], 0.1 * np.arange(1, 6), tokens)  # nothing can be learnt: the classes' shares
    shares = np.bincount(labels[training]) / training.sum()
    np.testing.assert_allclose(found(equal, [1.0]), np.tile(shares, (int((~training).sum()), 1)), atol=1e-6)


@pytest.mark.stress
def test_attention_finds_the_one_image_that_matters_and_is_seeded() -> None:
    from cytosae.probe.attention_mil import fit_predict  # brings torch

    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(120 * 8, 6)), np.arange(120) % 2
    rows_of = np.split(np.arange(120 * 8), 120)
    for k in np.flatnonzero(labels):
        images[rows_of[k][3], 0] += 8  # one of eight images
    training = np.arange(120) % 3 > 0
    config = MilConfig(epochs=40, lr=3e-3)
    found = fit_predict(images, rows_of, labels, training, 2, config, seed=[1])
    assert (found.argmax(1) == labels[~training]).mean() > 0.85
    np.testing.assert_array_equal(found, fit_predict(images, rows_of, labels, training, 2, config, seed=[1]))
    changed = images.copy()
    untouched, *others = np.flatnonzero(~training)
    changed[np.concatenate([rows_of[k] for k in others])] = 99
    after = fit_predict(changed, rows_of, labels, training, 2, config, seed=[1])
    np.testing.assert_allclose(after[0], found[0], atol=1e-6)
    assert untouched == np.flatnonzero(~training)[0]


@pytest.mark.stress
def test_every_reading_of_the_rule(tmp_path: Path) -> None:
    """M c / 100, W c / 100, n c / 100 and 100 / (n c); 16 patients in 4 folds, so n = 12."""
    folder = write_folder(tmp_path / "b", *cohort())
    wanted = {
        "latents": N_LATENTS * 2 / 100,
        "backbone": 6 * 2 / 100,
        "samples": 12 * 2 / 100,
        "samples-inverse": 100 / 24,
    }
    for rule, C in wanted.items():
        config = replace(quick(repeats=1, thresholds=(0.0,)), regularization=rule)
        scores = probe(folder, tmp_path / rule, config).scores
        assert scores["regularization"]["C"] == pytest.approx(C)


@pytest.mark.stress
def test_what_the_command_knows_python_knows(tmp_path: Path) -> None:
    """Numbers and columns by level; `--test-where` as text; a result shows itself in a notebook, escaped."""
    patients, images = ProbeConfig(), ProbeConfig(units=UnitConfig(level="image"))
    assert (patients.n_repeats, patients.n_permutations, patients.units.target) == (10, 99, "disease")
    assert (images.n_repeats, images.n_permutations, images.units.target) == (3, 19, "label")
    assert ProbeConfig(permutations=0).n_permutations == 0
    assert probe_units.Where.parse(["site=Munich", "site = Ulm"]) == probe_units.Where("site", ("Munich", "Ulm"))
    assert probe_units.Where.parse([]) is None
    with pytest.raises(BadInput, match=r"epochs of the attention-MIL head must be at least 1"):
        MilConfig(epochs=0)
    table, counts, means = cohort(signal=4.0)
    table["disease"] = table["disease"].replace("D1", "<b>D1</b>")
    done = probe(
        write_folder(tmp_path / "b", table, counts, means), tmp_path / "out", quick(repeats=1, c_factors=(1.0,))
    )
    assert str(done).startswith(f"{tmp_path / 'out'}: 16 patients in 16 groups; disease: <b>D1</b> 8, D0 8\n")
    shown = done._repr_html_()
    assert "&lt;b&gt;D1&lt;/b&gt;" in shown
    assert "<b>D1" not in shown
    assert '<img alt="methods" src="data:image/png;base64,' in shown
    assert "<td>majority</td>" in shown
