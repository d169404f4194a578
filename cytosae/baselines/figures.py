"""The figure of a comparison with baselines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cytosae.plotting import COLORS, new_figure, plain, save_both

from .report import WORDS


def plot_differences(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """SAE minus baseline with its interval, a panel for each metric that is judged. rows : of differences.parquet."""
    shown = {metric: [row for row in rows if row["metric"] == metric and row["low"] is not None] for metric in WORDS}
    shown = {metric: some for metric, some in shown.items() if some}
    most = max((len(some) for some in shown.values()), default=1)
    figure, axes = new_figure(width=4.2 * max(1, len(shown)), height=1.2 + 0.3 * most, columns=max(1, len(shown)))
    for axis, (metric, some) in zip(axes.flat if len(shown) > 1 else [axes], shown.items(), strict=False):
        for place, row in enumerate(some):
            color = COLORS[2] if row["is_better"] else COLORS[5] if row["is_worse"] else "0.5"
            axis.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2)
            axis.plot([row["difference"]], [place], "o", color=color, markersize=5)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_yticks(range(len(some)), [plain(row["baseline"]) for row in some])
        axis.invert_yaxis()
        axis.set_xlabel(f"{WORDS[metric]}: SAE minus baseline", fontsize=8)
        axis.grid(alpha=0.25, linewidth=0.5, axis="x")
    save_both(figure, path)
