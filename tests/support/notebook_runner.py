"""Runs docs/notebook.py as a notebook does: cell by cell, the last value of a cell shown, here as text and as HTML.

A script with a guard, since the workers of a Dask cluster import it again.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

from stores.wording import Report


def cells(source: str) -> list[str]:
    """The code of each cell that is not text."""
    found = re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.MULTILINE | re.DOTALL)
    return [code for is_text, code in found if not is_text]


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Execute a cell; the value of its last line, None where that is a statement."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def main(notebook: Path) -> None:
    """Run all cells; print the values."""
    names: dict[str, Any] = {}
    for number, code in enumerate(cells(notebook.read_text()), start=1):
        value = run_cell(code, names)
        if value is None:
            continue
        sys.stdout.write(f"[{number}] {type(value).__name__}\n")
        if isinstance(value, Report):
            sys.stdout.write(f"{value}\n")
        if hasattr(value, "_repr_html_"):
            Path(f"cell{number}.html").write_text(value._repr_html_())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
