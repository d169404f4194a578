"""How a result looks in a notebook: tables and figures as HTML. Every text is escaped, since names come from disks."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .wording import printable

_MOST_ROWS = 20  # of a table that is shown
_MOST_BYTES = 4 << 20  # of a figure that is shown


def table_html(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = (), *, most: int = _MOST_ROWS) -> str:
    """The first rows of a table as HTML; the empty string without rows.

    Parameters
    ----------
    rows : one mapping per row: column -> value
    columns : which columns, in this order; none: those of the first row
    most : number of rows that are shown
    """
    if not rows:
        return ""
    names = list(columns or rows[0])
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(row.get(name))}</td>' for name in names)}</tr>" for row in list(rows)[:most]
    )
    rest = f"<p>{len(rows) - most:,} more rows</p>" if len(rows) > most else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}"


def figure_html(png: Path) -> str:
    """A PNG file as an image of the page itself; the empty string if it cannot be read or has more than 4 MiB."""
    try:
        data = png.read_bytes() if png.stat().st_size <= _MOST_BYTES else b""
    except OSError:
        return ""
    if not data.startswith(b"\x89PNG"):
        return ""
    return f'<img alt="{_text(png.stem)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _text(value: Any) -> str:
    if value is None:
        return ""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else printable(str(value)))
