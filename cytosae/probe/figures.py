"""Figures of a probe, from its scores: the curve over thresholds (Fig. 4A), confusion matrix, methods and chance."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.plotting import COLORS, new_figure, plain, save_both
from stores.wording import counted

_METHODS = {
    "barcode": "SAE barcode",
    "mean_tokens": "mean patch token",
    "cls_token": "CLS token",
    "attention_mil": "attention MIL",
    "n_images": "number of images",
    "majority": "majority class",
}


def plot_curve(scores: dict[str, Any], path: Path) -> None:
    """Weighted F1 against the threshold of mean activation, with the number of kept latents, and the null band."""
    rows = scores["curve"]
    positions = range(len(rows))  # evenly: 0 has no logarithm
    figure, grid = new_figure(width=6, height=5, rows=2)
    axes, below = grid[:, 0]
    axes.get_subplotspec().get_gridspec().set_height_ratios([3, 1])
    if rows[0]["null"]:
        null = [row["null"]["weighted_f1"] for row in rows]
        n = scores["permutation"]["n"]
        axes.fill_between(
            positions,
            [band["q05"] for band in null],
            [band["q95"] for band in null],
            color="0.85",
            label=f"chance: {n:,} shuffles, 5 to 95%",
        )
        axes.plot(positions, [band["mean"] for band in null], color="0.5", linestyle=":", label="chance: mean")
    f1 = [row["weighted_f1"] for row in rows]
    axes.errorbar(
        positions,
        [value["mean"] for value in f1],
        yerr=[value["sd"] for value in f1],
        color=COLORS[0],
        marker="o",
        markersize=4,
        capsize=3,
        label=f"mean and SD over {counted(scores['repeats'], 'repeat')}",
    )
    selected = scores["methods"]["barcode"]["weighted_f1"]["mean"]
    axes.axhline(
        selected, color=COLORS[5], linestyle="--", linewidth=1, label=f"threshold chosen inside: {selected:.3f}"
    )
    axes.set_ylabel("weighted F1")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=7, frameon=False, loc="best")
    axes.set_title(_title(scores), fontsize=9, loc="left")
    axes.set_xticks(positions, [""] * len(rows))
    below.bar(positions, [row["n_latents"] for row in rows], color=COLORS[4])
    below.set_yscale("symlog", linthresh=1)
    below.set_ylim(bottom=0)
    below.set_ylabel("latents left", fontsize=8)
    below.set_xlabel("threshold of mean activation in the training fold")
    below.set_xlim(axes.get_xlim())
    below.set_xticks(positions, [f"{row['threshold']:g}" for row in rows])
    for each in (axes, below):
        each.tick_params(labelsize=8)
        each.grid(alpha=0.25, linewidth=0.5)
    save_both(figure, path)


def plot_confusion(scores: dict[str, Any], path: Path) -> None:
    """The barcode's confusion matrix, mean over repeats: shares of the true class, and counts."""
    title = f"{_title(scores)}\nmean over {counted(scores['repeats'], 'repeat')}"
    _draw_confusion(np.array(scores["methods"]["barcode"]["confusion"]), scores, title, path)


def plot_test_confusion(scores: dict[str, Any], path: Path) -> None:
    """The confusion matrix of a test: rows whose class the model knows."""
    title = f"{plain(scores['target'])} of {scores['n_scored']:,} {scores['level']}s that no fit has seen"
    _draw_confusion(np.array(scores["methods"]["barcode"]["confusion"]), scores, title, path)


def _draw_confusion(counts: npt.NDArray[Any], scores: dict[str, Any], title: str, path: Path) -> None:
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [plain(name) for name in scores["classes"]]
    size = 2.2 + 0.75 * len(names)
    figure, axes = new_figure(width=size + 1.2, height=size)
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        count = counts[row, column]  # a mean over repeats has a fraction
        text = f"{share:.0%}\n{count:,}" if counts.dtype.kind == "i" else f"{share:.0%}\n{count:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="black" if share > 0.5 else "white")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=8, loc="left")
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02).set_label("share of the true class", fontsize=8)
    save_both(figure, path)


def plot_methods(scores: dict[str, Any], path: Path) -> None:
    """Weighted F1 of every method on the same folds, and of the barcode on shuffled labels."""
    methods = [(label, scores["methods"][name]) for name, label in _METHODS.items() if name in scores["methods"]]
    figure, axes = new_figure(width=6.5, height=1.6 + 0.42 * (len(methods) + 1))
    for row, (_, found) in enumerate(methods):
        values = found["weighted_f1"]
        axes.plot(values["values"], [row] * len(values["values"]), "|", color="0.55", markersize=9)
        axes.errorbar(values["mean"], row, xerr=values["sd"], fmt="o", color=COLORS[0], capsize=3, markersize=5)
        axes.annotate(
            f"{values['mean']:.3f} ± {values['sd']:.3f}",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )
    labels = [label for label, _ in methods]
    if scores["permutation"]:
        null = scores["permutation"]["weighted_f1"]
        row = len(methods)
        parts = axes.violinplot(null["values"], positions=[row], orientation="horizontal", widths=0.8)
        for body in parts["bodies"]:
            body.set(facecolor=COLORS[1], alpha=0.6)
        for name in ("cbars", "cmins", "cmaxes"):
            parts[name].set(color=COLORS[1], linewidth=1)
        axes.annotate(f"p = {null['p']:.3g}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        labels.append(f"SAE barcode, {scores['permutation']['n']:,} shuffles")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("weighted F1: mean and SD over repeats; ticks are single repeats")
    axes.grid(alpha=0.25, linewidth=0.5, axis="x")
    axes.set_title(_title(scores), fontsize=9, loc="left")
    save_both(figure, path)


def _title(scores: dict[str, Any]) -> str:
    rule = scores["regularization"]
    return (
        f"{plain(scores['target'])} of {scores['n_units']:,} {scores['level']}s in {scores['n_groups']:,} groups, "
        f"{scores['folds']} folds, C = {rule['C']:.4g}"
    )
