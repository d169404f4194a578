"""Writes docs/notebook.md from the cells of docs/notebook.py; tests/project/test_docs.py checks that it is fresh."""

import re
from pathlib import Path

_PLACE = Path(__file__).parent
_RUN = "<!-- executed by tests/project/test_site.py -->"


def notebook_page() -> str:
    """The whole page: markdown cells as they are, the others as blocks of Python."""
    text = (_PLACE / "notebook.py").read_text()
    parts = ["<!-- Made by `make docs` from docs/notebook.py; a test checks that it is fresh. -->"]
    for mark, body in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.MULTILINE | re.DOTALL):
        if mark:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"{_RUN}\n```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (_PLACE / "notebook.md").write_text(notebook_page())
