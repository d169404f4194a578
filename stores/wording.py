"""Text for numbers, names and results, on the screen and in notebooks; without click.

Functions return a `Report`: its fields hold what was done, `lines()` gives it in words.
"""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Report:
    """Base of result objects: frozen dataclasses whose fields hold what was done. A command prints `lines()`.

    A notebook shows notes, lines and warnings.
    """

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the inputs that do not make the result doubtful."""
        return ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the result doubtful."""
        return ()

    def lines(self) -> Iterator[str]:
        """What was done, in words, line by line."""
        raise NotImplementedError

    def __str__(self) -> str:
        warnings = (f"warning: {printable(warning)}" for warning in self.warnings)
        return "\n".join([*map(printable, self.notes), *self.lines(), *warnings])

    def _repr_html_(self) -> str:
        lines = html.escape("\n".join([*map(printable, self.notes), *self.lines()]))
        warnings = "".join(f"<p><b>warning:</b> {html.escape(printable(each))}</p>" for each in self.warnings)
        return f"<pre>{lines}</pre>{warnings}"


def left_out_text(number: int, what: str) -> str:
    """`1 image without a patient`; `what` is given in the plural: `images without a patient`."""
    one = re.sub(r"\b(image|patient|mask)s\b", r"\1", what, count=1)
    return f"{number:,} {printable(one if number == 1 else what)}"


def cell(value: float | None, form: str) -> str:
    """A number formatted for its column; `-` if there is none."""
    return "-".rjust(int(form.split(".")[0] or 0)) if value is None else format(value, form)


def decimals(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def counted(number: int, what: str) -> str:
    """`1 latent`, `2,000 latents`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def rate(part: int, whole: int) -> str:
    return f"{part / whole:.2e}" if whole else "n/a"


def page_lines(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    """A title, and a line for each named value."""
    yield title
    for name, value in rows.items():
        yield f"  {name:<10} {value}"


def page_html(title: str, rows: Mapping[str, str]) -> str:
    """The same as an HTML table."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(value)}</td>"
        for name, value in rows.items()
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def pruning(min_activation: float, summary: dict[str, Any]) -> str:
    if not min_activation:
        return "nothing dropped"
    n_dropped, nnz = summary.get("n_dropped", 0), summary.get("nnz", 0)
    counted = f": {n_dropped:,} of {nnz + n_dropped:,}" if summary else ""
    return f"values below {min_activation:g} dropped{counted}"


def more_or_fewer(found: int, published: int) -> str:
    if found == published:
        return ""
    return f"<- {abs(found - published):,} {'fewer' if found < published else 'more'}"


def printable(name: str) -> str:
    """A name from a file or disk, safe to print: without escape sequences or invalid UTF-8."""
    return name if name.isprintable() else ascii(name)


def plain_text(name: str) -> str:
    """A name from the data for display: characters that are not printable become the replacement character.

    This includes bidirectional control characters, with which a name could disguise the text after it.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in name)


def state_of(complete: bool) -> str:
    return "complete" if complete else "INCOMPLETE (run the same command again to continue)"


def megabytes(n_bytes: int | None) -> str:
    return "n/a" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB"


def size_on_disk(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def left_out_lines(left_out: Mapping[str, int]) -> Iterator[str]:
    """`left out: 2 unreadable images`, for each kind with a number above 0."""
    for what, number in left_out.items():
        if number:
            yield f"left out: {left_out_text(number, what)}"
