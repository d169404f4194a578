"""Figures of the statistics of latents (CytoSAE, Fig. 2A): scatter of all latents, counts above thresholds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.plotting import COLORS, new_figure, plain, save_both
from stores.concept_store import MEANINGFUL

Floats = npt.NDArray[np.float64]
_COLUMNS = 3  # panels beside each other
_MOST_PANELS = 12
_MOST_VECTOR = 2000  # points that an SVG draws one by one; more become a picture in it
_UNKNOWN = COLORS[3]  # no colour of cividis is near it
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """The latents of one SAE in one dataset."""

    name: str
    frequency: Floats  # (n_latents,) 0: never active
    mean_activation: Floats
    entropy: Floats  # NaN: not known

    @staticmethod
    def of(latents: pa.Table, name: str) -> "Panel":
        """From the rows of `latents.parquet` of one dataset."""
        columns = ("frequency", "mean_activation", "label_entropy")
        return Panel(name, *(np.asarray(latents[column].to_numpy(), np.float64) for column in columns))


def latents_above(mean_activation: npt.ArrayLike, thresholds: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """(n_thresholds,) number of latents whose mean activation is greater than each threshold, strictly."""
    rising = np.sort(np.asarray(mean_activation, np.float64))
    return len(rising) - np.searchsorted(rising, np.asarray(thresholds, np.float64), side="right")


def plot_scatter(panels: Sequence[Panel], path: Path) -> None:
    """log10 frequency against log10 mean activation, coloured by label entropy, with histograms along both axes.

    Latents that are never active have no place here; they are counted above the panel. All panels have the same axes.
    At most 12 panels are drawn, and the rest is counted.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    drawn = panels[:_MOST_PANELS]
    columns = min(_COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, grid = new_figure(width=4.3 * columns + 1.2, height=4.6 * rows + 0.3, rows=rows, columns=columns)
    axes = np.atleast_1d(grid).ravel()
    entropies = np.concatenate([panel.entropy[panel.frequency > 0] for panel in drawn])
    known = entropies[~np.isnan(entropies)]
    norm = Normalize(0, max(known.max(initial=0), 0.1))
    points = np.concatenate([_points(panel) for panel in drawn], axis=1)
    limits = [_limits(values) for values in points]
    for spare in axes[len(drawn) :]:
        spare.axis("off")
    for panel, place in zip(drawn, axes, strict=False):
        _draw_scatter(panel, place, norm, limits)
    if len(known):
        bar = figure.colorbar(ScalarMappable(norm, cmap="cividis"), ax=grid, pad=0.02, shrink=min(1, 0.8 / rows + 0.2))
        bar.set_label("label entropy of the top images (nats)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if len(panels) > len(drawn):
        figure.suptitle(f"the first {len(drawn)} of {len(panels)}", fontsize=8)
    save_both(figure, path)


def plot_thresholds(panels: Sequence[Panel], path: Path) -> None:
    """The number of latents above a mean activation, against that mean activation: one curve per panel."""
    figure, axes = new_figure(width=6.2, height=4.2)
    means = [panel.mean_activation[panel.mean_activation > 0] for panel in panels]
    low, high = _limits(np.log10(np.concatenate(means)))
    grid = np.linspace(low, high, 500)
    for number, (panel, values) in enumerate(zip(panels, means, strict=True)):
        counts = latents_above(values, 10**grid).astype(float)
        counts[counts == 0] = np.nan  # has no logarithm
        style = _DASHES[number // len(COLORS) % len(_DASHES)]
        color = COLORS[number % len(COLORS)]
        axes.plot(grid, counts, style, color=color, linewidth=1.5, label=plain(panel.name))
    axes.axvline(np.log10(MEANINGFUL), color="0.5", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(0.8, 1.5 * max(2, *map(len, means)))
    axes.set_xlim(low, high)
    axes.set_xlabel("log10 threshold on the mean activation (dotted: 10^-3)", fontsize=8)
    axes.set_ylabel("latents above the threshold", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=7, frameon=False, loc="lower left")
    save_both(figure, path)


def _draw_scatter(panel: Panel, axes: Any, norm: Any, limits: list[tuple[float, float]]) -> None:
    x, y = _points(panel)
    entropy = panel.entropy[panel.frequency > 0]
    is_known = ~np.isnan(entropy)
    is_picture = len(x) > _MOST_VECTOR
    size = float(np.clip(4000 / max(1, len(x)), 1.5, 14))
    dots = {"s": size, "linewidths": 0, "rasterized": is_picture}
    axes.scatter(x[~is_known], y[~is_known], color=_UNKNOWN, **dots)
    axes.scatter(x[is_known], y[is_known], c=entropy[is_known], cmap="cividis", norm=norm, **dots)
    axes.axhline(np.log10(MEANINGFUL), color="0.5", linewidth=0.8, linestyle=":")
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    axes.set_xlabel("log10 frequency", fontsize=8)
    axes.set_ylabel("log10 mean activation", fontsize=8)
    axes.tick_params(labelsize=7)
    top = axes.inset_axes((0, 1.02, 1, 0.16), sharex=axes)
    right = axes.inset_axes((1.02, 0, 0.16, 1), sharey=axes)
    top.hist(x, bins=np.linspace(*limits[0], 61), color="0.4")
    right.hist(y, bins=np.linspace(*limits[1], 61), color="0.4", orientation="horizontal")
    for beside in (top, right):
        beside.tick_params(labelbottom=False, labelleft=False, length=0)
        beside.spines[["top", "right"]].set_visible(False)
    top.set_title(f"{plain(panel.name)}\n{_caption(panel, int((~is_known).sum()))}", fontsize=7.5, loc="left")


def _caption(panel: Panel, n_unknown: int) -> str:
    n_silent = int((panel.frequency == 0).sum())
    parts = [f"{len(panel.frequency):,} latents"]
    parts += [f"{n_silent:,} never fire (not shown)"] if n_silent else []
    parts += [f"{n_unknown:,} without entropy (pink)"] if n_unknown else []
    return "; ".join(parts)


def _points(panel: Panel) -> Floats:
    """(2, n) log10 of frequency and of mean activation, of the latents that are active at all."""
    is_active = panel.frequency > 0
    return np.log10(np.stack([panel.frequency[is_active], panel.mean_activation[is_active]]))


def _limits(values: Floats) -> tuple[float, float]:
    """A range with some room around the values."""
    if not len(values):
        return -1.0, 0.0
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room
