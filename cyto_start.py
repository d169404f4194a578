"""The start of the command `cyto`, under a name that no other package has: are `cli` and `stores` ours?

Only the standard library, and nothing of ours before the answer.
"""

import importlib.util
import sys
from pathlib import Path


def start() -> None:
    """Entry point of the console script: `cli.main`, if `cli` and `stores` are ours; otherwise one line, exit code 1.

    Both are common names. A package of the same name that is installed into the same environment takes the place of
    ours, and its removal deletes ours.
    """
    if foreign := foreign_packages():
        names, place = " and ".join(foreign), Path(sys.prefix)
        sys.exit(
            f"Error: another package has taken the place of {names} of cyto in {place}: expected ours in "
            f"{Path(__file__).parent}. Give cyto an environment of its own: python3 -m venv cyto-env && "
            f"cyto-env/bin/pip install cytobarcode"
        )
    from cli import main

    main()


def foreign_packages(here: Path | None = None) -> list[str]:
    """Which of `cli` and `stores` would not be imported from beside this file, or are not ours there; imports neither.

    A word of ours near their beginning tells them from files that were written over them.
    """
    here = (here or Path(__file__).parent).resolve()
    expected = {"cli": (here / "cli.py", b"cytosae"), "stores": (here / "stores" / "__init__.py", b"open_door")}
    return [name for name, (path, word) in expected.items() if not _is_ours(name, path, word)]


def _is_ours(name: str, path: Path, word: bytes) -> bool:
    try:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or Path(found.origin).resolve() != path:
            return False
        return word in path.read_bytes()
    except (OSError, ValueError, ImportError):
        return False
