"""Which SAE of a sweep to take: the least held-out error among those of comparable L0, never the best explained alone.

An SAE with more active latents always explains more. So settings are compared within bands of L0 whose ends differ by a
factor of two, by the share of the held-out images' variance that is left unexplained (comparable between losses, unlike
the MSE). Of the bands, the one in the middle of the range that is healthy for barcodes is recommended
(cytosae/training/health.py). Kinds of caches, such as blocks, are not compared with each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cytosae.training import healthy_l0

from .grid import setting_text

Row = dict[str, Any]
_X, _Y = "held_out_l0_mean", "held_out_explained_variance_mean"


@dataclass(frozen=True, kw_only=True)
class Band:
    """Settings of comparable L0, of one kind of caches."""

    caches: str
    low: float  # L0 from here ...
    high: float  # ... to below here, twice as much
    rows: tuple[Row, ...]  # of the table, the least held-out error first
    is_healthy: bool  # the best row's L0 lies in the range that is healthy for barcodes
    is_recommended: bool = False

    @property
    def best(self) -> Row:
        """The row with the least held-out error."""
        return self.rows[0]


def unexplained(row: Row) -> float:
    """Share of the held-out images' variance that a row's SAEs leave, mean over seeds."""
    return 1 - float(row[_Y])


def is_on_frontier(row: Row, rows: Sequence[Row], *, x: str = _X, y: str = _Y) -> bool:
    """No other row explains as much with fewer active latents, or more with as many; x, y: columns."""
    return not any(
        other[x] <= row[x] and other[y] >= row[y] and (other[x], other[y]) != (row[x], row[y]) for other in rows
    )


def bands_of(table: Sequence[Row]) -> list[Band]:
    """The bands of L0 that have a finished SAE, rising, by kind of caches; empty without held-out images.

    table : rows of table.parquet
    """
    known = [row for row in table if row.get(_X) is not None and row.get(_Y) is not None and row[_X] > 0]
    found: list[Band] = []
    for caches in dict.fromkeys(row["caches"] for row in known):
        by_octave: dict[int, list[Row]] = {}
        for row in known:
            if row["caches"] == caches:
                by_octave.setdefault(math.floor(math.log2(row[_X])), []).append(row)
        bands = [_band(caches, octave, rows) for octave, rows in sorted(by_octave.items())]
        chosen = _middle(bands)
        found += [Band(**{**vars(band), "is_recommended": number == chosen}) for number, band in enumerate(bands)]
    return found


def _band(caches: str, octave: int, rows: list[Row]) -> Band:
    ordered = tuple(sorted(rows, key=lambda row: (unexplained(row), row[_X])))
    low, high = _healthy(ordered[0])
    return Band(
        caches=caches,
        low=2.0**octave,
        high=2.0 ** (octave + 1),
        rows=ordered,
        is_healthy=low <= ordered[0][_X] <= high,
    )


def _middle(bands: Sequence[Band]) -> int | None:
    """The healthy band whose best row is nearest to the geometric middle of its range; None if no band is healthy."""
    apart = {
        number: abs(math.log(band.best[_X]) - sum(map(math.log, _healthy(band.best))) / 2)
        for number, band in enumerate(bands)
        if band.is_healthy
    }
    return min(apart, key=lambda number: apart[number], default=None)


def _healthy(row: Row) -> tuple[float, float]:
    width, n_latents = row.get("width"), row.get("n_latents")
    return healthy_l0(width, n_latents) if width and n_latents else healthy_l0(1, 1)


def recommendation(table: Sequence[Row], settings: Sequence[str]) -> str:
    """Markdown: the best settings in every band of L0, and which to take for barcodes; settings: those that vary."""
    bands = bands_of(table)
    if not any(row["n"] for row in table):
        return ""
    if not bands:
        return (
            "\nNo setting is recommended: that takes the error on images that nobody trained on. Set holdout = 0.1 in "
            "[base], and choose another -o.\n"
        )
    several = len({band.caches for band in bands}) > 1
    names = [*(["caches"] if several else []), *(name for name in settings if name not in ("seed", "caches"))]
    columns = ["comparable L0", *names, "L0", "unexplained", "next best", "settings"]
    lines = [
        "",
        "The least error on the held-out images among settings of comparable L0 (within a factor of two). Unexplained: "
        "the share of their variance; more active latents always leave less, so compare within a line.",
        "",
        table_line(columns),
        table_line(["---"] * (1 + len(names)) + ["---:"] * 4),
    ]
    for band in bands:
        best = band.best
        name = f"{band.low:g} to {band.high:g}" + ("" if band.is_healthy else " (not healthy)")
        second = f"{unexplained(band.rows[1]):.4f}" if len(band.rows) > 1 else "-"
        cells = [f"**{name}**" if band.is_recommended else name, *(setting_text(best[each]) for each in names)]
        lines.append(table_line([*cells, f"{best[_X]:.1f}", f"{unexplained(best):.4f}", second, str(len(band.rows))]))
    lines.append("")
    for caches in dict.fromkeys(band.caches for band in bands):
        lines.append(_sentence(caches if several else "", [band for band in bands if band.caches == caches], names))
    return "\n".join(lines) + "\n"


def _sentence(caches: str, bands: Sequence[Band], names: Sequence[str]) -> str:
    of = f" of {caches}" if caches else ""
    low, high = _healthy(bands[0].best)
    for band in bands:
        if band.is_recommended:
            said = ", ".join(f"{name} {setting_text(band.best[name])}" for name in names if name != "caches")
            return (
                f"Recommended for barcodes{of}: {said or 'the only settings'} (L0 {band.best[_X]:.1f}, in the middle "
                f"of the healthy range {low:g} to {high:.3g}; {unexplained(band.best):.4f} unexplained)."
            )
    return (
        f"None is recommended for barcodes{of}: no L0 lies in the healthy range {low:g} to {high:.3g}; add settings "
        f"with k or a target_l0 in it."
    )


def table_line(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
