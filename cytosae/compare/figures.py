"""Figures of a comparison: mean barcodes of B against A, values of single patients, correlation of patients."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cytosae.plotting import COLORS, new_figure, plain, save_both, text_color

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes

Shown = dict[str, list[int]]  # the latents of the lists "a" and "b", in order of rank
_LOOKS = {"a": (COLORS[0], "o"), "b": (COLORS[5], "^")}  # colour and marker of a group
_NAMED = 10  # latents of each list that bear their number in the scatter, unless it would cover another's
_MOST_NAMED = 80  # patients that have their name at the correlations
_JITTER = 0.16  # of a row of the patients' figure


def plot_scatter(table: "pa.Table", shown: Shown, titles: tuple[str, str], path: Path) -> None:
    """Mean barcode of B against that of A, a point per latent, the top lists marked; axes by square root, 0 included.

    Parameters
    ----------
    table : `differential.parquet`
    titles : what the groups are called
    path : without its ending; .png and .svg are written
    """
    x, y = (np.asarray(table[name], np.float64) for name in ("mean_a", "mean_b"))
    is_tested = np.asarray(table["is_tested"])
    figure, axes = new_figure(width=6.4, height=6)
    limit = 1.15 * max(x.max(), y.max()) or 1.0  # room for the labels beside the points
    axes.set_xscale("function", functions=(_root, np.square))
    axes.set_yscale("function", functions=(_root, np.square))
    axes.set(xlim=(0, limit), ylim=(0, limit))
    axes.plot([0, limit], [0, limit], color="0.6", linewidth=0.8, zorder=1)
    marked = np.isin(np.arange(len(x)), [*shown["a"], *shown["b"]])
    others = is_tested & ~marked
    axes.scatter(x[others], y[others], s=5, color="0.55", alpha=0.5, linewidth=0, rasterized=True)
    for group, title in zip("ab", titles, strict=True):
        color, marker = _LOOKS[group]
        some = shown[group]
        label = f"top {len(some)} higher in {plain(title)}"
        axes.scatter(x[some], y[some], s=18, color=color, marker=marker, linewidth=0, alpha=0.85, label=label, zorder=3)
        for latent in _apart(some[:_NAMED], _root(x) / limit**0.5, _root(y) / limit**0.5):
            axes.annotate(
                str(latent),
                (x[latent], y[latent]),
                xytext=(4, -4) if group == "a" else (-4, 4),
                textcoords="offset points",
                ha="left" if group == "a" else "right",
                va="top" if group == "a" else "bottom",
                fontsize=6,
                color=color,
            )
    axes.set_xlabel(f"mean barcode of {plain(titles[0])}")
    axes.set_ylabel(f"mean barcode of {plain(titles[1])}")
    axes.legend(fontsize=7, frameon=False, loc="upper left")
    axes.set_title(f"{is_tested.sum():,} tested latents; square-root axes", fontsize=9, loc="left")
    save_both(figure, path)


def _apart(latents: list[int], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> list[int]:
    """Points whose label does not overlap labels before it; positions are fractions of the axes."""
    kept: list[int] = []
    for latent in latents:
        if all(abs(x[latent] - x[other]) > 0.07 or abs(y[latent] - y[other]) > 0.03 for other in kept):
            kept.append(latent)
    return kept


def plot_patients(
    values: npt.NDArray[np.floating], is_a: npt.NDArray[np.bool_], shown: Shown, titles: tuple[str, str], path: Path
) -> None:
    """Every patient's value of the chosen latents: a row per latent, A above, B below, a line at each group's mean.

    Each row is scaled to its largest value, which stands at its right.
    """
    n_rows = max(1, *map(len, shown.values()))
    figure, (both,) = new_figure(width=11, height=1.3 + 0.26 * n_rows, columns=2)
    for axes, group, title in zip(both, "ab", titles, strict=True):
        latents = shown[group]
        _draw_rows(axes, values[:, latents], is_a)
        axes.set_yticks(range(len(latents)), [str(latent) for latent in latents], fontsize=7)
        axes.set(xlim=(-0.03, 1.03), ylim=(n_rows - 0.5, -0.5))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel("value, relative to the largest of the latent (right)", fontsize=8)
        axes.set_title(f"higher in {plain(title)}", fontsize=9, loc="left")
        for edge in ("top", "right", "left"):
            axes.spines[edge].set_visible(False)
    for group, title in zip("ab", titles, strict=True):
        color, marker = _LOOKS[group]
        both[0].plot([], [], marker, color=color, markersize=4, label=plain(title))
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    save_both(figure, path)


def _draw_rows(axes: "Axes", values: npt.NDArray[np.floating], is_a: npt.NDArray[np.bool_]) -> None:
    """Dots and means of both groups: a row per column of `values`."""
    rows = np.arange(values.shape[1])
    largest = values.max(0, initial=0)
    shares = values / np.where(largest > 0, largest, 1)
    axes.hlines(rows + 0.5, 0, 1, color="0.9", linewidth=0.5, zorder=0)
    for row, number in enumerate(largest):
        axes.text(1.04, row, f"{number:.3g}", fontsize=6, va="center", color="0.35")
    for group, members, middle in (("a", is_a, rows - 0.22), ("b", ~is_a, rows + 0.22)):
        color, marker = _LOOKS[group]
        x = np.sort(shares[members], axis=0)
        spread = _JITTER * (np.arange(len(x)) * 0.618034 % 1 - 0.5)  # evenly, without chance
        y = middle + spread[:, None]
        axes.scatter(x, y, s=9, color=color, marker=marker, alpha=0.6, linewidth=0, rasterized=True)
        axes.vlines(x.mean(0), middle - 0.2, middle + 0.2, color="black", linewidth=1.2)


def plot_correlation(correlation: npt.NDArray[np.float64], diseases: list[str], names: list[str], path: Path) -> None:
    """Correlation of every two patients, in the given order, with lines between diseases; white where undefined.

    The colours reach from the lowest fiftieth (one odd patient would take all of them) to the largest of two patients.
    """
    n_patients = len(names)
    size = min(12.0, 3 + 0.13 * n_patients)
    figure, axes = new_figure(width=size + 1.6, height=size)
    off_diagonal = correlation[~np.eye(n_patients, dtype=bool)]
    known = off_diagonal[np.isfinite(off_diagonal)]
    low, high = np.percentile(known, [2, 100]) if len(known) else (0.0, 1.0)
    image = axes.imshow(correlation, cmap=_cividis(), vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04, extend="both")
    bar.set_label("correlation of the patients' barcodes", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    runs = [(disease, len(list(members))) for disease, members in groupby(diseases)]
    edges = np.cumsum([0, *(length for _, length in runs)])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    if n_patients <= _MOST_NAMED:
        axes.set_yticks(range(n_patients), [plain(name) for name in names], fontsize=6)
    else:
        axes.set_yticks([])
    axes.set_xticks((edges[:-1] + edges[1:] - 1) / 2, [plain(disease) for disease, _ in runs], fontsize=8)
    for number, tick in enumerate(axes.get_xticklabels()):
        tick.set_color(text_color(number))
    axes.tick_params(axis="x", length=0, rotation=0 if len(runs) < 4 else 20)
    save_both(figure, path)


def _root(values: npt.NDArray[np.floating]) -> Any:
    return np.sqrt(np.maximum(values, 0))


def _cividis() -> Any:
    from matplotlib import colormaps

    return colormaps["cividis"].with_extremes(bad="white")
