"""Precision of a search at k, by the way of searching."""

from pathlib import Path
from typing import Any

from cytosae.plotting import COLORS, MARKERS, new_figure, save_both


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
