"""Detects that a store was replaced while it was read: every replacement or repair writes a new header file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import StoreReplaced


@dataclass(frozen=True)
class Seal:
    """The state of a store's header file when the store was opened. Costs one `fstat`."""

    path: Path
    state: tuple[int, int, int]  # inode, time of change in ns, bytes; not the device, which differs between machines

    @staticmethod
    def of(header_file: Path) -> "Seal | None":
        """The present seal of a store; None if there is no such file."""
        state = _state(header_file)
        return None if state is None else Seal(header_file.absolute(), state)

    def check(self) -> None:
        """Raise StoreReplaced if the store was replaced or removed."""
        if _state(self.path) != self.state:
            raise StoreReplaced(
                f"{self.path.parent} was replaced or changed by another command while it was read; nothing was "
                f"finished from it. Run the same command again"
            )


def travelling(store: Any) -> tuple[Any, ...]:
    """The result of `__reduce__` of a store with `root` and `header`: its place, and the state of its header file."""
    seal = store.header.seal
    return _reopen, (type(store), store.root, *(() if seal is None else (seal.path.name, *seal.state)))


def _reopen(kind: Any, root: Path | str, *seal: Any) -> Any:
    """Open the same store in another process, or raise StoreReplaced."""
    if seal:
        Seal((Path(root) / seal[0]).absolute(), seal[1:]).check()
    return kind(root)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        with path.open("rb") as file:  # opened, so that a network file system asks its server
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
