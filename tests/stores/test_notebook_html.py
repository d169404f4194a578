"""How results look in a notebook: no name from a disk becomes HTML, and no more is shown than asked for."""

import base64
from pathlib import Path

from stores.notebook import figure_html, table_html

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def test_names_cannot_become_html() -> None:
    shown = table_html([{"<b>": "<script>alert(1)</script>", "n": 1.23456789, "none": None, "odd": "a\x1b[2J"}])
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "<td>1.235</td><td></td>" in shown
    assert "\x1b" not in shown


def test_long_tables_are_cut_and_say_so() -> None:
    rows = [{"a": n, "b": -n} for n in range(25)]
    shown = table_html(rows, ["b"], most=20)
    assert shown.count("<tr>") == 21
    assert "<th>a</th>" not in shown
    assert shown.endswith("<p>5 more rows</p>")
    assert table_html([]) == ""


def test_only_a_png_of_some_size_is_shown(tmp_path: Path) -> None:
    (tmp_path / 'a"b.png').write_bytes(PNG)
    assert base64.b64encode(PNG).decode() in figure_html(tmp_path / 'a"b.png')
    assert 'alt="a&quot;b"' in figure_html(tmp_path / 'a"b.png')
    (tmp_path / "text.png").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "large.png").write_bytes(PNG + bytes(4 << 20))
    for name in ("text.png", "large.png", "missing.png"):
        assert figure_html(tmp_path / name) == ""
