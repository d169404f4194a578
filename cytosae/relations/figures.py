"""Figures of how latents relate: between SAEs, and of a patient to the others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.plotting import COLORS, MARKERS, new_figure, plain, save_both

Floats = npt.NDArray[np.float64]
_BINS = np.linspace(0, 1, 51)


def plot_stability(cosines: Sequence[Floats], null: Sequence[Floats], path: Path) -> None:
    """Cosines of matched latents, pooled over pairs of SAEs, and what chance gives; 0 is no match."""
    figure, axes = new_figure(width=6.4, height=3.8)
    for values, color, label in (
        (np.concatenate(null), COLORS[1], "by chance (see docs, relations)"),
        (np.concatenate(cosines), COLORS[0], "decoders"),
    ):
        matched = values[values > 0]
        weights = np.full(len(matched), 1 / max(1, len(matched)))
        axes.hist(matched, _BINS, weights=weights, color=color, alpha=0.35)
        axes.hist(matched, _BINS, weights=weights, histtype="step", color=color, linewidth=1.5, label=label)
    axes.set_xlim(0, 1)
    axes.set_yscale("log")  # otherwise a few latents that agree could not be seen beside many that do not
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("cosine of matched decoder rows")
    axes.set_ylabel("share of matched pairs")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False)
    n_matched = sum(int((values > 0).sum()) for values in cosines)
    pairs = "1 pair of SAEs" if len(cosines) == 1 else f"{len(cosines):,} pairs of SAEs"
    axes.set_title(f"Latents matched one to one: {n_matched:,} in {pairs}", fontsize=10, loc="left")
    save_both(figure, path)


def plot_patient(
    title: str, names: Sequence[str], z: Floats, others_z: Floats, sets_apart: npt.NDArray[np.bool_], path: Path
) -> None:
    """Latents (rows) with the patient against the others of the disease, in the unit of z.

    names, z, sets_apart : (n,); others_z : (n_others, n)
    """
    figure, axes = new_figure(width=8.5, height=1.6 + 0.28 * max(1, len(names)))
    rows = np.arange(len(names))
    for others in others_z:
        axes.plot(others, rows, "|", color="0.55", markersize=8, markeredgewidth=1)
    for flag, fill, label in (
        (True, COLORS[5], "the patient, set apart"),
        (False, "white", "the patient, not set apart"),
    ):
        some = sets_apart == flag
        axes.plot(z[some], rows[some], "D", color=COLORS[5], markerfacecolor=fill, markersize=6, label=label)
    axes.plot([], [], "|", color="0.55", markersize=8, label="each other patient")
    axes.axvline(0, color="0.3", linewidth=0.8)
    for bound in (-3, 3):
        axes.axvline(bound, color="0.3", linewidth=0.8, linestyle=":")
    axes.set_yticks(rows, list(names), fontsize=7)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    largest = max([4, *np.abs(z), *np.abs(others_z).ravel()])
    axes.set_xlim(-1.1 * largest, 1.1 * largest)
    _scale(axes, "x", largest, linear_to=3, most=20)
    axes.set_xlabel("z: distance from the others' mean", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    axes.set_title(title, fontsize=10, loc="left")
    save_both(figure, path)


def _scale(axes: Any, which: str, largest: float, *, linear_to: float, most: float) -> None:
    """Beyond `most`, logarithmic from `linear_to` on; numbers are written out."""
    if largest > most:
        (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=linear_to)
        (axes.xaxis if which == "x" else axes.yaxis).set_major_formatter("{x:g}")


def plot_all_patients(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each patient: how many replicated concepts set it apart, and how well its two halves agree."""
    figure, axes = new_figure(width=7.5, height=4.5)
    diseases = sorted({row["disease"] for row in rows})
    for number, disease in enumerate(diseases):
        some = [row for row in rows if row["disease"] == disease]
        axes.scatter(
            [row["halves_correlation"] for row in some],
            [row["n_raised"] + row["n_lowered"] for row in some],
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
            s=30,
            alpha=0.8,
            label=plain(disease) if number < 16 else None,
        )
    largest = max(row["n_raised"] + row["n_lowered"] for row in rows)
    _scale(axes, "y", largest, linear_to=1, most=20)
    axes.set_ylim(-0.5, 1.2 * largest + 0.5)
    axes.yaxis.get_major_locator().set_params(**({} if largest > 20 else {"integer": True}))
    axes.set_xlabel("correlation of the patient's two halves (deviation from the others' mean)")
    axes.set_ylabel("latents that set the patient apart")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(f"{len(rows):,} patients, each against the others of its disease", fontsize=10, loc="left")
    save_both(figure, path)


def plot_match(correlations: Sequence[float], null: Sequence[float], p99: float, path: Path) -> None:
    """Correlations of matched latents, and of those matched after images are permuted within strata."""
    figure, axes = new_figure(width=6.4, height=3.8)
    for values, color, label in (
        (np.array(null), COLORS[1], "images permuted within strata"),
        (np.array(correlations), COLORS[0], "the same images"),
    ):
        weights = np.full(len(values), 1 / max(1, len(values)))
        axes.hist(values, _BINS, weights=weights, color=color, alpha=0.35)
        axes.hist(values, _BINS, weights=weights, histtype="step", color=color, linewidth=1.5, label=label)
    axes.axvline(p99, color="0.3", linestyle=":", linewidth=0.9, label="99% of the permuted")
    axes.set_xlim(0, 1)
    axes.set_xlabel("correlation of matched latents over images")
    axes.set_ylabel("share of matched pairs")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"Latents matched one to one: {len(correlations):,}", fontsize=10, loc="left")
    save_both(figure, path)
