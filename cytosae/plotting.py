"""What all figures share: colours for colour-blind readers, figures without a display, PNG and SVG files.

matplotlib parses text between `$` as mathematics, so names from the data go through `plain` before they are drawn.
"""

from pathlib import Path
from typing import Any

from stores.files import named

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito
MARKERS = "osD^vP*X"
_LONGEST_NAME = 40


def new_figure(*, width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of this size in inches (at most 24 x 40), and its axes: one, or an array (rows, columns)."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and may need a display

    figure = Figure(figsize=(min(width, 24), min(height, 40)), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=rows * columns == 1)


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure atomically, in the format of the suffix (.png, .svg); equal figures give equal bytes."""
    import matplotlib

    partial = path.with_name(f"{path.name}.partial")
    kind = path.suffix[1:]
    with named(path), matplotlib.rc_context({"svg.hashsalt": "cyto", "svg.fonttype": "none"}):
        figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
    partial.replace(path)


def save_both(figure: Any, path: Path) -> None:
    """Write `path`.png and `path`.svg."""
    for kind in ("png", "svg"):
        save_figure(figure, path.with_name(f"{path.name}.{kind}"))


def plain(name: object) -> str:
    """A name from the data as literal text for matplotlib: one line, at most 40 characters, `$` escaped."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(name))
    if len(text) > _LONGEST_NAME:
        text = f"{text[: _LONGEST_NAME - 1]}…"
    return text.replace("$", r"\$")


def text_color(number: int) -> str:
    """A colour for text: `COLORS` without yellow and black."""
    return COLORS[:6][number % 6]
