"""The cells that a search lists, and precision of a search at k, by the way of searching."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cytosae.plotting import COLORS, MARKERS, new_figure, plain, save_both
from cytosae.stage_one import Pixels

SHOWN = 8  # images of each way in a figure


def plot_found(
    name: str, query: Pixels | str, rows: Sequence[tuple[str, list[tuple[str, Pixels | str]]]], path: Path
) -> None:
    """The image that was looked for, and a row of its nearest images for each way: (way, (caption, pixels) ...).

    A text instead of pixels says why an image cannot be shown.
    """
    columns = 1 + max([1, *(len(found) for _, found in rows)])
    figure, axes = new_figure(width=1.35 * columns, height=0.4 + 1.7 * len(rows), rows=len(rows), columns=columns)
    axes = axes.reshape(len(rows), columns)
    for line, (way, found) in zip(axes, rows, strict=True):
        for panel in line:
            panel.axis("off")
        for panel, (caption, picture) in zip(line, [(plain(name), query), *found], strict=False):
            if isinstance(picture, str):
                panel.text(0.5, 0.5, "cannot be shown", ha="center", va="center", fontsize=6, transform=panel.transAxes)
            else:
                panel.imshow(picture)
            panel.set_title(caption, fontsize=6)
        line[0].text(-0.1, 0.5, way, rotation=90, ha="right", va="center", fontsize=8, transform=line[0].transAxes)
    save_both(figure, path)


def plot_precision(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each column and scope: precision against k, a line for each way, and chance."""
    panels = list(dict.fromkeys((row["column"], row["scope"]) for row in rows))
    figure, axes = new_figure(width=4.2 * len(panels), height=3.6, columns=len(panels))
    for (column, scope), panel in zip(panels, axes.ravel() if len(panels) > 1 else [axes], strict=True):
        some = [row for row in rows if (row["column"], row["scope"]) == (column, scope)]
        for number, way in enumerate(dict.fromkeys(row["by"] for row in some)):
            mine = [row for row in some if row["by"] == way]
            at = [row["at"] for row in mine]
            panel.plot(at, [row["precision"] for row in mine], MARKERS[number] + "-", color=COLORS[number], label=way)
            if all(row["low"] is not None for row in mine):
                low, high = ([row[name] for row in mine] for name in ("low", "high"))
                panel.fill_between(at, low, high, color=COLORS[number], alpha=0.15, linewidth=0)
        panel.axhline(some[0]["chance"], color="0.4", linestyle=":", label="chance")
        panel.set_ylim(0, 1)
        panel.set_xlabel("nearest images")
        panel.set_ylabel(f"share of the same {column}")
        panel.set_title(scope, fontsize=9, loc="left")
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.legend(fontsize=7, frameon=False)
    save_both(figure, path)
