"""The run log of an artefact: when, where and with which versions it was made. It is outside the identity."""

import logging
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .files import append_line, read_lines

_FILE = "runs.jsonl"
_DECISIVE = ("machine", "device", "threads", "batch_size")
_log = logging.getLogger(__name__)


def append_run(root: Path, *, packages: tuple[str, ...], **facts: Any) -> None:
    """Add a line: time, versions of Python and of `packages`, and the given facts (device, threads, paths).

    Warns if the job goes on from a run with another version, device, thread count or batch size: then it may not
    end bit for bit as an uninterrupted one would have.
    """
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("cyto", *packages)}},
        **facts,
    }
    before = read_lines(root / _FILE, mend=True)  # a line that a crash tore must not take this one along
    if before:
        _warn_of_changes(root, before[-1], record)
    append_line(root / _FILE, record)


def read_runs(root: Path) -> list[dict[str, Any]]:
    """The run log, oldest first; [] where there is none."""
    return read_lines(root / _FILE)


def _warn_of_changes(root: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = ({**run["versions"], **{name: run.get(name) for name in _DECISIVE}} for run in (before, now))
    changed = [f"{name} {old[name]} against {new[name]}" for name in new if name in old and old[name] != new[name]]
    if changed:
        _log.warning("%s goes on from a run with other settings of the machine: %s", root, ", ".join(changed))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
