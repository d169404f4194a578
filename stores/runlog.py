"""The run log of an artefact: when, where and with which versions it was made. It is not part of the identity.

Each shard has its own log, `runs-I-of-N.jsonl`; the finished store has all lines in `runs.jsonl`.
"""

import logging
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .files import append_line, parse_json, read_lines, read_regular, sha256_json, write_lines
from .shards import ONE_WRITER, Shard
from .version import VERSION

_FILE = "runs.jsonl"
_MOST_BYTES = 1 << 30
_DECISIVE = ("machine", "device", "threads", "processes", "batch_size")
_log = logging.getLogger(__name__)


def append_run(root: Path, *, packages: tuple[str, ...], shard: Shard = ONE_WRITER, **facts: Any) -> None:
    """Add a line: time, versions of Python and of `packages`, and the given facts (device, threads, paths).

    Warns if the job continues a run with another version, device, thread count or batch size: then the last bits may
    differ from those of an uninterrupted run.
    """
    record: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "cyto": VERSION,
            **{name: package_version(name) for name in packages},
        },
        **({} if shard.is_only else {"shard": str(shard)}),
        **facts,
    }
    record["sha256"] = sha256_json(record)
    own = root / (_FILE if shard.is_only else f"runs-{shard.file_part}.jsonl")
    read_lines(own, mend=True, skip_damaged=True)  # remove a truncated line, so that this one is not joined to it
    before = read_runs(root)
    if before:
        _warn_of_changes(root, before[-1], record)
    append_line(own, record)


def read_runs(root: Path | str) -> list[dict[str, Any]]:
    """The run log, oldest first; [] where there is none. Damaged lines are left out: no number depends on them."""
    root = Path(root)
    of_shards = [run for path in shard_logs(root) for run in read_lines(path, skip_damaged=True)]
    # after a crash at the end, a shard's lines may be in both files
    others = [run for run in read_lines(root / _FILE, skip_damaged=True) if run not in of_shards]
    return sorted([*others, *of_shards], key=lambda run: str(run.get("time")))


def damaged_runs(root: Path) -> list[str]:
    """The changed lines of the run log, in words. A truncated last line is skipped."""
    path = root / _FILE
    try:
        lines = read_regular(path, most_bytes=_MOST_BYTES).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"{path} cannot be read ({error})"]
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = dict(parse_json(line))
            said = record.pop("sha256", None)  # an older cyto wrote none
            is_whole = said is None or said == sha256_json(record)
        except (TypeError, ValueError):
            is_whole = False
        if not is_whole:
            found.append(f"line {number} of {path} is not what was written; no number rests on it: remove it")
    return found


def shard_logs(root: Path) -> list[Path]:
    """The logs of single shards, while the store is written."""
    return sorted(root.glob("runs-*-of-*.jsonl"))


def join_runs(root: Path) -> None:
    """Copy all lines into `runs.jsonl`; the logs of the shards stay."""
    if shard_logs(root):
        write_lines(root / _FILE, read_runs(root))


def _warn_of_changes(root: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = ({**_versions(run), **{name: run.get(name) for name in _DECISIVE}} for run in (before, now))
    changed = [f"{name} {old[name]} against {new[name]}" for name in new if name in old and old[name] != new[name]]
    if changed:
        _log.warning("%s goes on from a run with other settings of the machine: %s", root, ", ".join(changed))


def _versions(run: dict[str, Any]) -> dict[str, Any]:
    versions = run.get("versions")
    return versions if isinstance(versions, dict) else {}


def package_version(package: str) -> str:
    """Of an installed package, or `unknown`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
