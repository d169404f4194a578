"""How a file gets onto the disk whole: atomic writes, fsync, hashes, journals.

A file is either absent or complete: it is written under a temporary name, synced, then renamed.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import DamagedStore

PARTIAL_SUFFIX = ".partial"


def canonical_json(value: Any) -> bytes:
    """The one JSON spelling of a value: sorted keys, no blanks, UTF-8, NaN refused. Hashes are taken of it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_json(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, *pieces: bytes | memoryview) -> None:
    """Write the pieces one after the other to `path`, so that a crash leaves the old file or the new one, durable."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable (a no-op where folders cannot be synced)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """fsync every file and folder below `root`: before a store is called complete, its bytes are on the disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def sweep_partials(root: Path) -> int:
    """Delete what killed writers left under `root`; returns how many files went."""
    left_over = [path for path in root.rglob(f"*{PARTIAL_SUFFIX}") if path.is_file()]
    for path in left_over:
        path.unlink()
    return len(left_over)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and sync it. A crash can tear this line only, never an earlier one."""
    is_new = not path.exists()
    with path.open("ab") as file:
        file.write(canonical_json(record) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def read_lines(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """Read a journal written by `append_line`; [] where there is none.

    A last line without its newline was torn by a crash: it is left out, and with `mend` cut off the file, so that
    the next line can be appended.

    Raises
    ------
    DamagedStore
        If any other line is not JSON.
    """
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if mend and len(whole) < len(raw):
        write_atomic(path, whole)
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise DamagedStore(f"line {number} of {path} is not a journal record ({error})") from None
        records.append(record)
    return records


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a whole journal at once, atomically."""
    write_atomic(path, b"".join(canonical_json(record) + b"\n" for record in records))
