"""Safe writing of files: atomic writes, fsync, hashes, journals.

A file is either absent or complete: it is written under a temporary name, synced, then renamed.
"""

import errno
import hashlib
import json
import logging
import math
import os
import platform
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DamagedStore

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]  # not on Windows

PARTIAL_SUFFIX = ".partial"
LOCK_SUFFIX = ".lock"
# files and folders of network disks, Windows, macOS and NFS, in lower case: ignored, and no damage
_DROPPINGS = {
    *(
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "@sharebin",
        "@snapshot",
        "@__thumb",
        "#recycle",
        "#snapshot",
    ),
    *("$recycle.bin", "recycler", "lost+found", "found.000", "system volume information", "network trash folder"),
    *("temporary items", "__macosx", "~snapshot", ".snapshot", ".snapshots", ".zfs", ".ds_store", ".localized"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", ".directory", ".appledouble", ".appledb", ".appledesktop"),
    *(".spotlight-v100", ".fseventsd", ".temporaryitems", ".documentrevisions-v100", ".ipynb_checkpoints", ".@__thumb"),
    *(".lustre", ".stfolder", ".sync", ".dropbox", ".thumbnails"),
}
_DROPPINGS_BEGIN = ("._", ".nfs", ".fuse_hidden", ".smbdelete", ".afpdeleted", ".trash", ".nextcloudsync")
MOST_JSON_BYTES = 16 << 20  # of a header or another file that is one JSON value
_MOST_JOURNAL_BYTES = 1 << 30
_MOST_NESTED = 64  # objects and lists inside each other
_SYNCING_AT_ONCE = 8  # files: one flush of the disk serves all that wait for it
_log = logging.getLogger(__name__)


def is_dropping(name: str) -> bool:
    """Is this the name of a file or folder that a disk, a system or a file manager puts anywhere?"""
    folded = name.casefold()
    return folded in _DROPPINGS or folded.startswith(_DROPPINGS_BEGIN)


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of a value, for hashes: sorted keys, no blanks, UTF-8, NaN refused."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=plain_number
    )
    return text.encode()


def plain_number(value: Any) -> Any:
    """A number of numpy, as settings from a notebook hold it, as the same number of Python: for `json.dumps`."""
    if type(value).__module__ == "numpy" and value.shape == ():
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r:.60} cannot be written as JSON")


def decode_text(raw: bytes) -> str:
    """The content of a text file: UTF-8 with or without a byte order mark, or UTF-16 with one, as Excel writes them.

    Raises UnicodeDecodeError for anything else, since older encodings cannot be told apart.
    """
    return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


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


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An error of the system inside says which file was written: that of a full disk does not say it by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, *pieces: bytes | memoryview) -> None:
    """Write the pieces to `path`, atomically and durably: after a crash there is the old file or the new one."""
    for is_last_try in (False, True):
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        try:
            with named(path), partial.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            break
        except FileNotFoundError:  # another writer removed it, on a file system without locks
            if is_last_try:
                raise
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_files(root: Path, files: Mapping[str, bytes]) -> None:
    """Write small files by their names below a folder: of a store that nobody reads before its header is complete."""
    folders = set()
    for name, raw in files.items():
        path = root / name
        if path.parent not in folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.add(path.parent)
        with named(path):
            path.write_bytes(raw)


def write_new(path: Path, *pieces: bytes | memoryview) -> bool:
    """Like `write_atomic`, but never replaces a file: False if it exists, or another process was faster."""
    if path.exists():
        return False
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        write_atomic(partial, *pieces)
        try:
            path.hardlink_to(partial)  # unlike a rename, this fails if the name exists
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Try to hold the lock file at `path` while the context is open: True if held, False at once if another holds it.

    The system releases the lock when the process ends in any way, so the file of a killed process locks nothing. While
    the lock is held, the file names machine and process (`lock_holder`). True on a file system without locks.

    shared : other processes may hold it, too, if they also share it; the last of them removes the file
    """
    kind = None if fcntl is None else fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(_open_lock(path))
            try:
                if fcntl is not None and kind is not None:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                _log.warning(
                    "%s: the file system knows no locks (%s); see to it that no two processes write the same",
                    path.parent,
                    error.strerror,
                )
            if _is_at(path, file.fileno()):  # else its last holder removed the file before it was locked here
                break
        with suppress(OSError):  # another user's file, or a full disk: the lock is held all the same
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        try:
            yield True
        finally:
            if not shared or _is_last(file.fileno()):
                with suppress(OSError):  # the folder may have become read-only
                    path.unlink(missing_ok=True)


def lock_holder(path: Path) -> str:
    """The holder of the lock at `path`, in words: `process 123 on host`."""
    try:
        return path.read_bytes()[:200].decode(errors="replace") or "another process"
    except OSError:
        return "another process"


def _open_lock(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except PermissionError:
        if not path.exists():
            raise
        return path.open("rb")  # of another user: it can be locked without writing to it


def _is_last(descriptor: int) -> bool:
    """Is this the only process that shares the lock?"""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def readable_json(value: Any) -> bytes:
    """Indented JSON, for people to read."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=plain_number) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    write_atomic(path, readable_json(value))


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """The content of a regular file of at most `most_bytes`; pipes and devices, which could block, are not opened.

    Raises
    ------
    OSError
        If it is missing or cannot be read.
    ValueError
        If it is no regular file, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is not a file")
        raw = file.read(state.st_size) if state.st_size <= most_bytes else b""
    if state.st_size > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return raw


def parse_json(raw: bytes) -> Any:
    """One strictly checked JSON value: one that `canonical_json` could have written.

    Raises
    ------
    ValueError
        If it is no JSON in UTF-8, or has a repeated key, a number beyond 64 bits, NaN or infinity, text that is not
        valid Unicode, or more than 64 nested objects and lists.
    """
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_distinct,
            parse_int=_bounded,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if raw.count(b"[") + raw.count(b"{") > _MOST_NESTED:
        _check_nesting(value)
    if b"\\ud" in raw or b"\\uD" in raw:  # half a surrogate pair is not valid Unicode
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> Any:
    """The JSON value in a file of at most 16 MiB. Raises OSError and ValueError as `read_regular` and `parse_json`."""
    return parse_json(read_regular(path, most_bytes=MOST_JSON_BYTES))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("it names a key twice")
    return value


def _bounded(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 1 << 64:
        raise ValueError("it holds a number of more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("it holds a number that is not finite")
    return number


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(_MOST_NESTED + 1):
        insides = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for inside in insides for inner in inside if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable (a no-op where folders cannot be synced)."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """fsync every file and folder below `root`, so that a store is on the disk before it is marked complete.

    Lock files and files of the system are left out: they do not belong to a store, and may vanish at any time.
    """
    folders, files = [], []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not is_dropping(name)]
        folders.append(Path(folder))
        files += [Path(folder) / name for name in names if not (name.endswith(LOCK_SUFFIX) or is_dropping(name))]
    with ThreadPoolExecutor(_SYNCING_AT_ONCE) as threads:
        for _ in threads.map(sync_file, files):
            pass
    for each in folders:
        sync_folder(each)


def sync_file(path: Path) -> None:
    """fsync a file that other code has written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sweep_partials(root: Path) -> int:
    """Delete the temporary files of killed writers below `root`; returns their number."""
    left_over = [path for path in root.rglob(f"*{PARTIAL_SUFFIX}") if path.is_file()]
    for path in left_over:
        path.unlink()
    return len(left_over)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and sync it. A crash can truncate this line, but no earlier one."""
    is_new = not path.exists()
    with named(path), path.open("ab") as file:
        file.write(canonical_json(record) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def read_lines(path: Path, *, mend: bool = False, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """Read a journal written by `append_line`; [] where there is none.

    A last line without newline was truncated by a crash: it is left out, and with `mend` also removed from the file,
    so that the next line can be appended.

    Raises
    ------
    DamagedStore
        If it is no regular file, or any other line is not JSON (and not `skip_damaged`).
    """
    try:
        raw = read_regular(path, most_bytes=_MOST_JOURNAL_BYTES)
    except FileNotFoundError:
        return []
    except (IsADirectoryError, ValueError) as error:
        raise DamagedStore(f"{path} cannot be read: {error}") from None
    whole = raw[: raw.rfind(b"\n") + 1]
    if mend and len(whole) < len(raw):
        write_atomic(path, whole)
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if skip_damaged:
                continue
            raise DamagedStore(f"line {number} of {path} is not a journal record ({error})") from None
        records.append(record)
    return records


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a whole journal at once, atomically."""
    write_atomic(path, b"".join(canonical_json(record) + b"\n" for record in records))
