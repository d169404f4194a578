"""The run log of an artefact: when, where and with which versions it was made. It is outside the identity."""

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .files import append_line, read_lines

_FILE = "runs.jsonl"


def append_run(root: Path, *, packages: tuple[str, ...], **facts: Any) -> None:
    """Add a line: time, versions of Python and of `packages`, and the given facts (device, threads, paths)."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("cyto", *packages)}},
        **facts,
    }
    read_lines(root / _FILE, mend=True)  # a line that a crash tore must not take this one along
    append_line(root / _FILE, record)


def read_runs(root: Path) -> list[dict[str, Any]]:
    """The run log, oldest first; [] where there is none."""
    return read_lines(root / _FILE)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
