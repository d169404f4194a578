"""The files of a finished probe: scores.json, tables of folds and predictions, figures."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.result_folder import ResultWriter

from .cross_validation import Repeat
from .figures import plot_confusion, plot_curve, plot_methods
from .folds import FEW_CHANGED, free_share
from .intervals import (
    N_DRAWS,
    calibration,
    calibration_error,
    draw_groups,
    faultless,
    interval,
    possible,
    scores_of_draws,
)
from .scores import METRICS, class_scores, confusion_matrix, finite_or_none, score, summarize
from .units import Units, shared_groups

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BARCODE = "barcode"


@dataclass(frozen=True)
class Method:
    """Predictions of one method: per repeat (n, c) probabilities."""

    name: str
    probabilities: list[Float]
    threshold: float | None = None


@dataclass(frozen=True)
class Shuffle:
    """The scores of a repeat on shuffled labels."""

    scores: list[dict[str, float]]  # with the threshold chosen inside, then at every threshold
    share_changed: float  # of the labels
    n_unconverged: int
    n_unseen: int


@dataclass(frozen=True)
class Found:
    """All that was computed; `methods[0]` is the barcode with the threshold chosen inside."""

    units: Units
    thresholds: tuple[float, ...]
    repeats: list[Repeat]
    shuffles: list[Shuffle]
    methods: list[Method]


def keep_shuffle(repeat: Repeat, labels: Ints, true: Ints, n_classes: int) -> Shuffle:
    """The scores of a repeat on shuffled `labels`; its predictions are not kept."""
    scores = [score(_confusion(p, labels, n_classes)) for p in (repeat.selected, *repeat.probabilities)]
    return Shuffle(scores, float((labels != true).mean()), repeat.n_unconverged, repeat.n_unseen)


def scores_of(found: Found, about: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """scores.json: the fields of `about`, then all scores by name; None instead of NaN."""
    units, repeats = found.units, found.repeats
    all_fits: list[Repeat | Shuffle] = [*repeats, *found.shuffles]
    n_unconverged = sum(each.n_unconverged for each in all_fits)
    n_unseen = sum(each.n_unseen for each in all_fits)
    if n_unconverged:
        warnings = [*warnings, f"{n_unconverged:,} fits did not converge; their predictions count as they are"]
    if n_unseen:
        warnings = [*warnings, f"in {n_unseen:,} fits a class had no training row; it has probability 0 there"]
    share_changed = float(np.mean([each.share_changed for each in found.shuffles])) if found.shuffles else None
    if share_changed is not None and share_changed < FEW_CHANGED:
        warnings = [*warnings, _unchanged_warning(share_changed, units, about["null"]["used"])]
    sizes = Counter(units.labels.tolist())
    nulls = [shuffle.scores for shuffle in found.shuffles]
    n_kept = np.mean([repeat.n_kept.mean(0) for repeat in repeats], axis=0)
    chosen = Counter(t for repeat in repeats for t in repeat.chosen.tolist())
    barcode, *others = found.methods
    warnings = [*warnings, *faultless(barcode.probabilities, units.labels, units.groups)]
    curve = [method for method in others if method.threshold is not None]
    return {
        **about,
        "classes": {name: sizes[k] for k, name in enumerate(units.classes)},
        "n_units": len(units.names),
        "n_groups": len(np.unique(units.groups)),
        "n_units_in_shared_groups": shared_groups(units),
        "left_out": units.left_out,
        "warnings": warnings,
        "n_latents": units.n_latents,
        "n_latents_above_tau": units.values.shape[1],
        "n_fits_unconverged": n_unconverged,
        "methods": _with_intervals(
            {m.name: _method_scores(m, found) for m in (barcode, *others) if m.threshold is None}, found, about
        ),
        "curve": [
            {
                "threshold": method.threshold,
                "n_latents": float(n_kept[t]),
                "n_folds_chosen": chosen[t],
                **{name: summarize(values) for name, values in _by_metric(method, units).items()},
                "null": {name: _band([row[1 + t][name] for row in nulls]) for name in METRICS} if nulls else None,
            }
            for t, method in enumerate(curve)
        ],
        "permutation": _permutation(barcode, units, nulls, share_changed),
    }


def write_report(writer: ResultWriter, found: Found, scores: dict[str, Any]) -> None:
    """folds.parquet, predictions.parquet, scores.json, three figures."""
    writer.write_table("folds", _folds_table(found, scores["level"]))
    writer.write_table("predictions", _predictions_table(found, scores["level"]))
    writer.write_json("scores", scores)
    plot_curve(scores, writer.root / "curve")
    plot_confusion(scores, writer.root / "confusion")
    plot_methods(scores, writer.root / "methods")


def _folds_table(found: Found, level: str) -> pa.Table:
    """A row per repeat, fold and unit, with its side: train or test."""
    names, n = pa.array(found.units.names), len(found.units.names)
    return pa.concat_tables(
        pa.table(
            {
                "repeat": np.full(n, number),
                "fold": np.full(n, fold),
                level: names,
                "group": found.units.groups,
                "side": np.where(repeat.fold_of == fold, "test", "train"),
            }
        )
        for number, repeat in enumerate(found.repeats)
        for fold in range(repeat.fold_of.max() + 1)
    )


def _predictions_table(found: Found, level: str) -> pa.Table:
    """A row per method, repeat and unit; `probabilities` in the order of the classes in scores.json."""
    names, n, classes = pa.array(found.units.names), len(found.units.names), np.array(found.units.classes)
    thresholds = np.array(found.thresholds)
    tables = []
    for method in found.methods:
        is_chosen = method.name == BARCODE and method.threshold is None
        for number, p in enumerate(method.probabilities):
            repeat = found.repeats[number]
            threshold = thresholds[repeat.chosen[repeat.fold_of]] if is_chosen else [method.threshold] * n
            tables.append(
                pa.table(
                    {
                        "method": [method.name] * n,
                        "threshold": pa.array(threshold, pa.float64()),
                        "threshold_chosen_inside": [is_chosen] * n,
                        "repeat": np.full(n, number),
                        "fold": repeat.fold_of,
                        level: names,
                        "true": classes[found.units.labels],
                        "predicted": classes[p.argmax(1)],
                        "probabilities": pa.ListArray.from_arrays(
                            np.arange(n + 1, dtype=np.int32) * p.shape[1], p.ravel()
                        ),
                    }
                )
            )
    return pa.concat_tables(tables)


def _by_metric(method: Method, units: Units) -> dict[str, list[float]]:
    rows = [score(_confusion(p, units.labels, len(units.classes))) for p in method.probabilities]
    return {name: [row[name] for row in rows] for name in METRICS}


def _method_scores(method: Method, found: Found) -> dict[str, Any]:
    """Scores over repeats (all folds of a repeat together); weighted F1 also over single folds, as papers report it."""
    units, c = found.units, len(found.units.classes)
    confusions = [_confusion(p, units.labels, c) for p in method.probabilities]
    folds = [
        score(_confusion(p[tested], units.labels[tested], c))["weighted_f1"]
        for p, repeat in zip(method.probabilities, found.repeats, strict=False)  # MIL has fewer
        for tested in (repeat.fold_of == fold for fold in range(repeat.fold_of.max() + 1))
    ]
    of_folds = summarize(folds)
    by_class = [class_scores(confusion, units.classes) for confusion in confusions]
    return {
        **{name: summarize(values) for name, values in _by_metric(method, units).items()},
        "weighted_f1_of_folds": {"mean": of_folds["mean"], "sd": of_folds["sd"], "n": len(folds)},
        "per_class": {
            name: {key: float(np.mean([row[name][key] for row in by_class])) for key in by_class[0][name]}
            for name in units.classes
        },
        "confusion": np.mean(confusions, axis=0).tolist(),
    }


def _with_intervals(methods: dict[str, Any], found: Found, about: dict[str, Any]) -> dict[str, Any]:
    """Scores of probabilities, calibration, 95% intervals over groups, and barcode minus each method."""
    labels = found.units.labels
    draws = draw_groups(found.units.groups, [about["seed"], 4])
    folds = [repeat.fold_of for repeat in found.repeats]
    drawn = {
        m.name: scores_of_draws(m.probabilities, labels, draws, folds) for m in found.methods if m.threshold is None
    }
    predictions = {m.name: m.probabilities for m in found.methods if m.threshold is None}
    for name, scores in methods.items():
        bins = calibration(predictions[name], labels)
        scores["n_repeats"] = len(predictions[name])
        scores |= {key: float(drawn[name][key][0]) for key in ("log_loss", "brier")}
        scores |= {key: finite_or_none(drawn[name][key][0]) for key in ("auroc", "auprc")}
        scores |= {"calibration_error": calibration_error(bins), "calibration": bins, "n_draws": N_DRAWS}
        scores["interval"] = {key: possible(key, interval(values)) for key, values in drawn[name].items()}
        if name != BARCODE:
            differences = {key: drawn[BARCODE][key] - values for key, values in drawn[name].items()}
            scores["barcode_minus_this"] = {
                key: {"difference": finite_or_none(values[0]), **interval(values)}
                for key, values in differences.items()
            }
    return methods


def _unchanged_warning(share_changed: float, units: Units, null: str) -> str:
    """The warning where shuffles change few labels."""
    most = free_share(np.bincount(units.labels).astype(np.float64))
    said = f"a shuffle changes only {share_changed:.0%} of the labels, so shuffled labels are much like the true ones"
    if null == "within":
        return f"{said} and p is too large: groups are nearly of one label; --null between exchanges whole groups"
    return (
        f"{said} and p may be far too large (without groups {most:.0%} would change): one class is that common, or "
        f"groups have few others of about their size to exchange labels with"
    )


def _permutation(
    method: Method, units: Units, nulls: list[list[dict[str, float]]], share_changed: float | None
) -> dict[str, Any] | None:
    """p = (1 + number of shuffles that score no less) / (1 + number of shuffles), for the first repeat."""
    if not nulls:
        return None
    observed = {name: values[0] for name, values in _by_metric(method, units).items()}
    out: dict[str, Any] = {
        "n": len(nulls),
        "statistic": "the first repeat, its thresholds and C chosen inside",
        "p_floor": 1 / (1 + len(nulls)),
        "share_of_labels_changed": share_changed,
    }
    for name in METRICS:
        values = [row[0][name] for row in nulls]
        n_reached = sum(value >= observed[name] - 1e-12 for value in values)
        out[name] = {"observed": observed[name], "p": (1 + n_reached) / (1 + len(values)), **_band(values)}
        out[name]["values"] = values
    return out


def _band(values: list[float]) -> dict[str, float]:
    low, high = np.quantile(values, [0.05, 0.95])
    return {"mean": float(np.mean(values)), "q05": float(low), "q95": float(high)}


def _confusion(probabilities: Float, labels: Ints, n_classes: int) -> Ints:
    return confusion_matrix(labels, probabilities.argmax(1), n_classes)
