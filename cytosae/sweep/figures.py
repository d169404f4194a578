"""The figure of a sweep: explained variance against L0, with the frontier that no other setting lies above."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cytosae.plotting import COLORS, MARKERS, new_figure, save_figure

from .recommend import bands_of, is_on_frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NAMED = 16  # most values in a legend


def plot_sweep(
    table: Sequence[dict[str, Any]], settings: Sequence[str], paths: Sequence[Path], *, x: str, y: str
) -> None:
    """Draw explained variance against L0, one point per row of a sweep's table: mean and standard deviation over seeds.

    One panel per setting that varies. All panels show the same points, with colours and markers by the setting of the
    panel. Rows without a finished SAE are not shown; the title says how many there are. The line is the frontier of
    each kind of caches: no other setting explains as much with fewer active latents. A ring marks what is recommended.

    table : rows of table.parquet
    settings : names of the settings that vary
    paths : files to write; the suffix gives the format
    x, y : metrics by their names in the table, without `_mean` and `_sd`
    """
    shown = [row for row in table if row[f"{x}_mean"] is not None and row[f"{y}_mean"] is not None]
    panels = list(settings) or [""]
    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, grid = new_figure(width=4.2 * columns, height=3.6 * n_rows + 0.5, rows=n_rows, columns=columns)
    all_axes = np.atleast_1d(grid).ravel()
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    spread = [row[f"{x}_mean"] for row in shown if row[f"{x}_mean"] > 0]
    for axes, setting in zip(all_axes, panels, strict=False):
        if len(spread) == len(shown) and spread and max(spread) > 10 * min(spread):
            _scale_by_log(axes)
        _draw_frontier(axes, shown, x, y)
        _draw_sweep(axes, shown, setting, x, y)
        axes.set_xlabel("L0: active latents per token", fontsize=8)
        axes.set_ylabel("explained variance", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.5)
    measured = "held-out images" if x.startswith("held_out_") else "last batch of training"
    missing = f"; not shown: {len(table) - len(shown)} without a finished SAE" if len(shown) < len(table) else ""
    ringed = "; ring: recommended" if any(band.is_recommended for band in bands_of(shown)) else ""
    title = f"{len(shown)} settings, mean and standard deviation over seeds ({measured}){missing}"
    figure.suptitle(f"{title}; line: frontier{ringed}", fontsize=9)
    for path in paths:
        save_figure(figure, path)


def _draw_frontier(axes: "Axes", rows: Sequence[dict[str, Any]], x: str, y: str) -> None:
    for caches in dict.fromkeys(row["caches"] for row in rows):
        mine = [row for row in rows if row["caches"] == caches]
        best = [row for row in mine if is_on_frontier(row, mine, x=f"{x}_mean", y=f"{y}_mean")]
        best.sort(key=lambda row: row[f"{x}_mean"])
        places = [[row[f"{name}_mean"] for row in best] for name in (x, y)]
        axes.plot(*places, color="0.6", linewidth=1, zorder=0, gid="frontier")
    if x.startswith("held_out_"):
        ringed = [band.best for band in bands_of(rows) if band.is_recommended]
        places = [[row[f"{name}_mean"] for row in ringed] for name in (x, y)]
        axes.plot(*places, "o", color="none", markeredgecolor="black", markersize=11, gid="recommended")


def _draw_sweep(axes: "Axes", rows: Sequence[dict[str, Any]], setting: str, x: str, y: str) -> None:
    """One panel. Values get distinct colours if there are enough, otherwise shades of one colour map in their order."""
    values = list(dict.fromkeys(row[setting] for row in rows)) if setting else [None]
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    for number, value in enumerate(values):
        some = [row for row in rows if not setting or row[setting] == value]
        axes.errorbar(
            [row[f"{x}_mean"] for row in some],
            [row[f"{y}_mean"] for row in some],
            xerr=[row[f"{x}_sd"] or 0 for row in some],
            yerr=[row[f"{y}_sd"] or 0 for row in some],
            fmt=MARKERS[number % len(MARKERS)],
            color=COLORS[number] if len(values) <= len(COLORS) else _shade(number / (len(values) - 1)),
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.4,
            elinewidth=1,
            capsize=2,
            alpha=0.9,
            label=str(value) if number < _MOST_NAMED else None,
        )
    if setting and rows:
        unnamed = f" ({_MOST_NAMED} of {len(values)} named)" if len(values) > _MOST_NAMED else ""
        axes.set_title(f"{setting}{unnamed}", fontsize=9, loc="left")
        axes.legend(fontsize=7, frameon=False, ncols=1 if len(values) <= 8 else 2)


def _scale_by_log(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["cividis"](share)
