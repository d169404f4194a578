"""How often do the 95% intervals of `cyto probe` hold the score that the whole procedure gives on average?

Cohorts are drawn again and again (Gaussian features, one of which is shifted in each class; rows of a group alike), a
logistic regression is cross-validated by whole groups, and the interval of each score is held against the mean of that
score over all cohorts. Then one fit is tried on cohorts drawn again and again (`cyto probe --test`), against its score
on a very large one. Prints one line of JSON: coverage by cohort and score, and its target.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from common import arguments, emit
from sklearn.linear_model import LogisticRegression

from cytosae.probe import WIDER, assign_folds, draw_groups, interval, scores_of_draws

Floats = npt.NDArray[np.float64]
COHORTS = (  # groups, classes, shift, rows of a group, folds
    *((40, 2, 1.0, 1, 5), (36, 3, 1.2, 1, 5), (100, 2, 0.7, 1, 5), (60, 3, 1.5, 4, 5), (150, 5, 1.3, 1, 5)),
    *((40, 2, 1.0, 1, 3), (40, 2, 1.0, 1, 10)),
)
TESTS = ((20, 2, 1.0, 1), (40, 2, 1.0, 1), (36, 3, 1.2, 1), (60, 3, 1.5, 4), (100, 2, 0.7, 1))  # as above
SCORES = ("weighted_f1", "balanced_accuracy", "auroc", "auprc", "log_loss", "brier")


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=20, help="cohorts drawn of each kind (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="times that folds are drawn (%(default)s)")
    parser.add_argument("--draws", type=int, default=300, help="of the bootstrap (%(default)s)")
    options = parser.parse_args()
    began = time.monotonic()
    found = [measure(*cohort, options=options) for cohort in COHORTS]
    tests = [measure_test(*cohort, options=options) for cohort in TESTS]
    seconds = time.monotonic() - began
    rate = {"rate": options.runs * len(COHORTS) / seconds, "unit": "cohorts/s", "seconds": seconds}
    of_f1 = [row["coverage"]["weighted_f1"] for row in found]
    unstretched = [row["spread_over_stated"]["weighted_f1"] for row in found]
    emit(
        "probe_intervals",
        ratio=min(of_f1),
        target=0.93,
        ours=rate | {"mean_coverage": float(np.mean(of_f1)), "least_coverage": min(of_f1)},
        baseline=rate | {"what": "spread over cohorts, in stated spreads: 1 is right", "ratios": unstretched},
        cohorts=found,
        tests=tests,
        params=vars(options),
    )


def measure(n_groups: int, n_classes: int, shift: float, size: int, n_folds: int, *, options: Any) -> dict[str, Any]:
    """Coverage of each score, and its spread over cohorts in spreads that the intervals state."""
    observed: dict[str, list[float]] = {name: [] for name in SCORES}
    limits: dict[str, list[tuple[float, float]]] = {name: [] for name in SCORES}
    rng = np.random.default_rng(1)
    for run in range(options.runs):
        x, labels, groups = cohort(rng, n_groups, n_classes, shift, size)
        predicted, folds = [], []
        for repeat in range(options.repeats):
            fold_of = assign_folds(labels, groups, n_folds, np.random.default_rng([run, repeat]))
            p = np.zeros((len(labels), n_classes))
            for fold in range(n_folds):
                seen = fold_of != fold
                p[~seen] = LogisticRegression(C=0.1).fit(x[seen], labels[seen]).predict_proba(x[~seen])
            predicted.append(p)
            folds.append(fold_of)
        scores = scores_of_draws(predicted, labels, draw_groups(groups, [run], options.draws), folds)
        for name in SCORES:
            ends = interval(scores[name])
            observed[name].append(float(scores[name][0]))
            limits[name].append((ends["low"] or 0.0, ends["high"] or 0.0))
    coverage, ratio = {}, {}
    for name in SCORES:
        truth, ends_of = np.mean(observed[name]), np.array(limits[name])
        coverage[name] = float(((ends_of[:, 0] <= truth) & (truth <= ends_of[:, 1])).mean())
        ratio[name] = float(np.std(observed[name]) / ((ends_of[:, 1] - ends_of[:, 0]).mean() / 3.92))
    what = {"groups": n_groups, "classes": n_classes, "shift": shift, "rows": size, "folds": n_folds}
    return what | {"coverage": coverage, "spread_over_stated": ratio}


def measure_test(n_groups: int, n_classes: int, shift: float, size: int, *, options: Any) -> dict[str, Any]:
    """Coverage of each score of one fit (100 patients) on a cohort, against its score on 2,000 patients of a class."""
    rng = np.random.default_rng(1)
    x, labels, _ = cohort(rng, 100, n_classes, shift, 1)
    fit = LogisticRegression(C=0.1).fit(x, labels)

    def scores(n: int, rows: int, n_draws: int, seed: int) -> dict[str, Floats]:
        x, labels, groups = cohort(rng, n, n_classes, shift, rows)
        draws, together = draw_groups(groups, [seed], n_draws), [np.zeros(len(labels), np.int64)]
        return scores_of_draws([fit.predict_proba(x)], labels, draws, together)

    truth = {name: values[0] for name, values in scores(2000 * n_classes, 1, 1, 0).items()}
    hits = dict.fromkeys(SCORES, 0)
    for run in range(options.runs):
        found = scores(n_groups, size, options.draws, run)
        for name in SCORES:
            ends = interval(found[name], WIDER)
            hits[name] += (ends["low"] or 0.0) <= truth[name] <= (ends["high"] or 0.0)
    what = {"groups": n_groups, "classes": n_classes, "shift": shift, "rows": size}
    return what | {"coverage": {name: n / options.runs for name, n in hits.items()}}


def cohort(
    rng: np.random.Generator, n_groups: int, n_classes: int, shift: float, size: int
) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Features (rows, 12), labels and groups; rows of a group share most of theirs."""
    of_group = np.arange(n_groups) % n_classes
    groups = np.repeat(np.arange(n_groups), size)
    x = rng.normal(size=(n_groups, 12)) + shift * (np.arange(12) == of_group[:, None])
    return x[groups] + 0.7 * rng.normal(size=(len(groups), 12)), of_group[groups], groups


if __name__ == "__main__":
    main()
