"""Coordinates of small SVG drawings: bars of a histogram, points of patients, barcodes, shares. No HTML here."""

import base64
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .composition import Composition

WIDTH, HEIGHT = 560, 120  # of a histogram without its axis, pixels
STRIP_WIDTH, STRIP_HEIGHT = 560, 26
_MOST_POINTS = 300  # per disease; of more patients, this many at even ranks
_COLUMNS = 1024  # of a barcode


@dataclass(frozen=True)
class Bars:
    """A histogram: rectangles in a box of `WIDTH` x `HEIGHT`, and ticks below it."""

    bars: list[dict[str, float]]  # x, y, width, height, count, low, high
    ticks: list[dict[str, Any]]  # x, text
    most: int


@dataclass(frozen=True)
class Strip:
    """Points of patients in a box of `STRIP_WIDTH` x `STRIP_HEIGHT`."""

    points: list[dict[str, Any]]  # x, y, at (position in the values), value
    n_left_out: int


def histogram_bars(counts: npt.NDArray[np.int32], edges: npt.NDArray[np.float64]) -> Bars:
    """The bars of one histogram; `edges` (n + 1,) are log10 of the values."""
    most = int(counts.max(initial=0))
    wide = WIDTH / len(counts)
    bars = [
        {
            "x": round(n * wide, 1),
            "y": round(HEIGHT * (1 - count / most), 1),
            "width": round(wide * 0.92, 1),
            "height": round(HEIGHT * count / most, 1),
            "count": count,
            "low": 10 ** float(edges[n]),
            "high": 10 ** float(edges[n + 1]),
        }
        for n, count in enumerate(counts.tolist())
        if count
    ]
    span = float(edges[-1] - edges[0])
    decades = [decade for decade in range(-7, 4) if edges[0] <= decade <= edges[-1]]
    at = [float(decade) for decade in decades] if len(decades) > 1 else [float(edges[0]), float(edges[-1])]
    ticks = [{"x": round((edge - float(edges[0])) / span * WIDTH, 1), "text": f"{10**edge:.2g}"} for edge in at]
    return Bars(bars, ticks, most)


def strip_of(values: npt.NDArray[np.float32], largest: float) -> Strip:
    """The points of one disease, on a root scale: one large value must not press all others together.

    The y position carries no information; it separates points of equal value.
    """
    order = np.argsort(values, kind="stable")
    if len(order) > _MOST_POINTS:
        order = order[np.linspace(0, len(order) - 1, _MOST_POINTS).round().astype(int)]
    points = [
        {
            "x": _root_place(float(values[at]), largest),
            "y": round(4 + (n * 0.618034 % 1) * (STRIP_HEIGHT - 8), 1),
            "at": at,
            "value": float(values[at]),
        }
        for n, at in enumerate(order.tolist())
    ]
    return Strip(points, len(values) - len(points))


def strip_ticks(largest: float) -> list[dict[str, Any]]:
    """Round numbers below a strip: x, text; 0, and the largest 1, 2 or 5 times a power of ten, a tenth of it, ..."""
    top = 10.0 ** math.floor(math.log10(largest)) if largest > 0 else 0.0
    top = max((digit * top for digit in (1, 2, 5) if digit * top <= largest), default=0.0)
    return [{"x": _root_place(value, largest), "text": f"{value:.6g}"} for value in sorted({0.0, top / 10, top})]


def _root_place(value: float, largest: float) -> float:
    return round(math.sqrt(max(0.0, value) / (largest or 1)) * STRIP_WIDTH, 1)


@dataclass(frozen=True, eq=False)
class Columns:
    """Where each latent stands in the picture of a barcode: alike latents side by side, a family in its own columns."""

    column_of: npt.NDArray[np.int64]  # (n_latents,) -1: never active
    starts: list[int]  # (n_families + 1,) first column of each family

    @property
    def n(self) -> int:
        """Columns."""
        return self.starts[-1]


def barcode_columns(
    order: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], n_latents: int, most: int = _COLUMNS
) -> Columns:
    """At most about `most` columns for the latents of an order, which is cut into families at `starts`."""
    column_of = np.full(n_latents, -1, np.int64)
    firsts, shrink = [0], max(1.0, len(order) / most)
    for first, last in pairwise(starts.tolist()):
        n_columns = max(1, round((last - first) / shrink))
        column_of[order[first:last]] = firsts[-1] + np.arange(last - first) * n_columns // (last - first)
        firsts.append(firsts[-1] + n_columns)
    return Columns(column_of, firsts)


def barcode_picture(
    columns: Columns,
    mine: tuple[npt.NDArray[Any], npt.NDArray[np.float32]],
    others: tuple[npt.NDArray[Any], npt.NDArray[np.float32]],
    k: float,
) -> dict[str, Any]:
    """Two barcodes, one upwards, one downwards, as bytes in base64: the largest value of each column's latents.

    Heights are ln(1 + k value) as shares of that of the larger of both largest values, in 8 bits. `latents` says which
    latent has the largest value of its column: of mine, or of the others where mine is 0.

    Parameters
    ----------
    mine, others : (latents, values) of what is not 0
    """
    largest = float(max(mine[1].max(initial=0), others[1].max(initial=0)))
    heights, named = np.zeros((2, columns.n)), np.zeros(columns.n, np.int64)
    for side, (latents, values) in ((1, others), (0, mine)):
        at = columns.column_of[latents.astype(np.int64)]
        order = np.lexsort((-latents.astype(np.int64), values))
        order = order[at[order] >= 0]
        heights[side, at[order]] = values[order]  # the largest is written last; of equals the lower number
        named[at[order]] = latents[order]
    steps = np.round(np.log1p(k * heights) / np.log1p(k * (largest or 1)) * 255).astype(np.uint8)
    return {
        "mine": base64.b64encode(steps[0].tobytes()).decode(),
        "others": base64.b64encode(steps[1].tobytes()).decode(),
        "latents": base64.b64encode(named.astype("<u4").tobytes()).decode(),
        "n": columns.n,
        "starts": columns.starts,
        "largest": largest,
        "k": k,
    }


_LABEL_ROW, _LABEL_WIDTH = 34, 360
TWO_ROW = 50  # of a label with a bar for each of two groups


def composition_picture(
    composition: Composition, members: npt.NDArray[np.int64], others: npt.NDArray[np.int64], row: int = _LABEL_ROW
) -> dict[str, Any]:
    """Shares of labels of some patients and of others, with the middle half of both; a label has `row` pixels."""
    rows = composition.of(members, others)

    def at(share: float | None) -> float | None:
        return None if share is None else round(share * _LABEL_WIDTH, 1)

    return {
        "width": _LABEL_WIDTH,
        "height": row * len(rows),
        "n": int(composition.counts[members].sum()),
        "n_members": int((composition.counts[members].sum(axis=1) > 0).sum()),
        "n_others": int((composition.counts[others].sum(axis=1) > 0).sum()),
        "rows": [
            {**found, "y": row * number, "x": at(found["share"]), "x_others": at(found["others"])}
            | {"x_low": at(found["low"]), "x_high": at(found["high"])}
            | {"x_own_low": at(found["own_low"]), "x_own_high": at(found["own_high"])}
            for number, found in enumerate(rows)
        ],
    }
