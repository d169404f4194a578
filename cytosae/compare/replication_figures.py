"""Effects of the discovery against those of the replication."""

from pathlib import Path
from typing import Any

from cytosae.plotting import COLORS, new_figure, plain, save_both


def plot_replication(rows: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """A point for each latent: Hedges' g there and here, with its interval; on the line both are equal."""
    figure, axes = new_figure(width=5.2, height=4.6)
    both = [row for row in rows if None not in (row["discovery_hedges_g"], row["replication_hedges_g"])]
    most = max([1.0, *(abs(row[f"{side}_hedges_g"]) for row in both for side in ("discovery", "replication"))]) * 1.15
    axes.plot([-most, most], [-most, most], color="0.6", linewidth=0.8, linestyle=":", label="as large as there")
    for flag, label in ((True, "replicated (Holm p <= 0.05)"), (False, "not replicated")):
        some = [row for row in both if row["is_replicated"] == flag]
        color = COLORS[0] if flag else "0.55"
        for row in some:
            low, high = row["replication_hedges_g_low"], row["replication_hedges_g_high"]
            if None not in (low, high):
                axes.plot([row["discovery_hedges_g"]] * 2, [low, high], color=color, linewidth=0.7, alpha=0.6)
        x, y = ([row[f"{side}_hedges_g"] for row in some] for side in ("discovery", "replication"))
        axes.plot(x, y, "o", color=color, markersize=4, label=label)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlim(-most, most)
    axes.set_xlabel("Hedges' g in the discovery")
    axes.set_ylabel("Hedges' g in the replication")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=7, frameon=False)
    names = summary["names"]
    axes.set_title(f"{plain(names['a'])} against {plain(names['b'])}", fontsize=10, loc="left")
    save_both(figure, path)
