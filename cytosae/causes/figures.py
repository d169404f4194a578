"""Figures of an ablation: effects beside their controls, and the curves of k."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from cytosae.plotting import COLORS, new_figure, save_both

_MOST = 40  # latents of a figure
_ORDERS = {"chosen": "chosen latents, by effect", "largest": "largest in the image", "random": "in random order"}


def plot_effects(effects: pa.Table, path: Path) -> None:
    """The change of the final CLS by each chosen latent, the largest first; at most 40."""
    rows = [row for row in effects.to_pylist() if row["quantity"] == "cls_change"]
    rows = sorted(rows, key=lambda row: -row["effect"])[:_MOST]
    figure, axes = new_figure(width=7.5, height=1.4 + 0.3 * len(rows))
    for at, row in enumerate(rows):
        for name, color, below in (("control", COLORS[1], 0.16), ("direction", COLORS[4], 0.32)):
            if row[f"{name}_mean"] is None:
                continue
            label = {"control": "matched latents, 95% of them", "direction": "random directions of the same norm"}[name]
            axes.plot(
                [row[f"{name}_low"], row[f"{name}_high"]],
                [at + below] * 2,
                color=color,
                linewidth=4,
                solid_capstyle="butt",
                label=label if not at else None,
            )
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [at, at], color=COLORS[0], linewidth=1.2)
        axes.plot(row["effect"], at, "o", color=COLORS[0], markersize=5, label="the latent" if not at else None)
    axes.set_yticks(range(len(rows)), [str(row["latent"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_ylabel("latent")
    axes.set_xlabel("change of the final CLS embedding, share of its norm (mean over patients, 95% interval)")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    save_both(figure, path)


def plot_curves(curves: pa.Table, path: Path) -> None:
    """Share of the change without any latent, by k: removing and keeping, one panel each."""
    rows = [row for row in curves.to_pylist() if row["quantity"] == "share_of_all" and row["k"]]
    figure, panels = new_figure(width=9, height=3.6, columns=2)
    for axes, (edit, title) in zip(
        panels.ravel(),
        (("remove", "Necessary: the first k are removed"), ("keep", "Sufficient: only the first k are kept")),
        strict=True,
    ):
        for (order, label), color in zip(_ORDERS.items(), COLORS, strict=False):
            some: list[dict[str, Any]] = [row for row in rows if (row["order"], row["edit"]) == (order, edit)]
            if not some:
                continue
            k = [row["k"] for row in some]
            axes.plot(k, [row["effect"] for row in some], "o-", color=color, markersize=4, label=label)
            if all(row["low"] is not None for row in some):
                axes.fill_between(
                    k, [row["low"] for row in some], [row["high"] for row in some], color=color, alpha=0.15
                )
        axes.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("k")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25, linewidth=0.5)
    panels.ravel()[0].set_ylabel("change of the final CLS,\nshare of that without any latent")
    panels.ravel()[0].legend(fontsize=8, frameon=False, loc="lower right")
    save_both(figure, path)
