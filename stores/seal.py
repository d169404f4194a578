"""Was a store exchanged while it was read? Its header file tells: every replacement and repair writes a new one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StoreReplaced


@dataclass(frozen=True)
class Seal:
    """The header file of a store as it was when the store was opened. Costs one small look at the disk."""

    path: Path
    state: tuple[int, int, int]  # inode, time of change in ns, bytes; no device: it differs between machines

    @staticmethod
    def of(header_file: Path) -> "Seal | None":
        """The seal of a store now; None where there is no such file."""
        state = _state(header_file)
        return None if state is None else Seal(header_file.absolute(), state)

    def check(self) -> None:
        """Raise StoreReplaced if another store lies there now, or none."""
        if _state(self.path) != self.state:
            raise StoreReplaced(
                f"{self.path.parent} was replaced or changed by another command while it was read; nothing was "
                f"finished from it. Run the same command again"
            )


def travelling(store: Any) -> tuple[Any, ...]:
    """What `__reduce__` of a store with `root` and `header` gives: its place, and the state of its header file."""
    seal = store.header.seal
    return _reopen, (type(store), store.root, *(() if seal is None else (seal.path.name, *seal.state)))


def _reopen(kind: Any, root: Path | str, *seal: Any) -> Any:
    """In another process: the same store, or StoreReplaced."""
    if seal:
        Seal((Path(root) / seal[0]).absolute(), seal[1:]).check()
    return kind(root)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        with path.open("rb") as file:  # opened: a network file system then asks its server
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
