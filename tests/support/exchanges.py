"""What test_exchanged.py and other tests share."""

import shutil
from pathlib import Path


def exchange(root: Path) -> None:
    """As --overwrite does it: another folder takes the name. The same bytes: only the place tells."""
    shutil.copytree(root, root.with_name("copy"))
    root.rename(root.with_name("old"))
    root.with_name("copy").rename(root)
