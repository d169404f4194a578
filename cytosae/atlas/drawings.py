"""Coordinates of small SVG drawings: bars of a histogram, points of patients, stripes of a barcode. No HTML here."""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 560, 120  # of a histogram without its axis, pixels
STRIP_WIDTH, STRIP_HEIGHT = 560, 26
_MOST_POINTS = 300  # per disease; of more patients, this many at even ranks
_STRIPES = 1024


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
    """The points of one disease. The y position carries no information; it separates points of equal value."""
    order = np.argsort(values, kind="stable")
    if len(order) > _MOST_POINTS:
        order = order[np.linspace(0, len(order) - 1, _MOST_POINTS).round().astype(int)]
    points = [
        {
            "x": round(float(values[at]) / (largest or 1) * STRIP_WIDTH, 1),
            "y": round(4 + (n * 0.618034 % 1) * (STRIP_HEIGHT - 8), 1),
            "at": at,
            "value": float(values[at]),
        }
        for n, at in enumerate(order.tolist())
    ]
    return Strip(points, len(values) - len(points))


def stripes(latents: npt.NDArray[Any], values: npt.NDArray[np.float32], n_latents: int) -> dict[str, Any]:
    """A barcode as at most 1,024 stripes: maximum over neighbouring latents, square root of its share, 8 bits."""
    n_stripes = min(_STRIPES, n_latents)
    heights = np.zeros(n_stripes)
    np.maximum.at(heights, latents.astype(np.int64) * n_stripes // n_latents, values)
    largest = float(heights.max(initial=0))
    steps = np.round(np.sqrt(heights / (largest or 1)) * 255).astype(np.uint8)
    return {"packed": base64.b64encode(steps.tobytes()).decode(), "n": n_stripes, "largest": largest}
