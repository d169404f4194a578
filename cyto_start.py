"""Starts the command `cyto`, after a check that the packages `cli` and `stores` are those of Cyto.

Standard library only; no module of Cyto is imported before the check. The name of this module is unique.
"""

import importlib.util
import sys
from pathlib import Path


def start() -> None:
    """Entry point of the console script: `cli.main` if `cli` and `stores` are Cyto's; else an error, exit code 1.

    Both names are common. Another package of the same name in the same environment replaces Cyto's files, and its
    removal deletes them.
    """
    if foreign := foreign_packages():
        names, place = " and ".join(foreign), Path(sys.prefix)
        sys.exit(
            f"Error: another package has taken the place of {names} of cyto in {place}: expected ours in "
            f"{Path(__file__).parent}. Give cyto an environment of its own: python3 -m venv cyto-env && "
            f"cyto-env/bin/pip install cytobarcode"
        )
    try:
        from cli import main
    except OSError as error:  # `stores` looks for a folder for the caches of libraries, and may find none
        sys.exit(f"Error: cannot use {error.filename or 'a file of cyto'}: {error.strerror or error}")

    main()


def foreign_packages(here: Path | None = None) -> list[str]:
    """Which of `cli` and `stores` would be imported from elsewhere, or were overwritten; imports neither.

    An overwritten file is recognised by a word that Cyto's file has near its beginning.
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
