"""Get a published file, whole and checked, into the cache folder.

The publisher's record names the file's size and checksum; the file counts only once both fit. Everything that
a server says is checked: it may be down, slow, lying, or somebody else. Standard library only.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from stores.errors import BadInput
from stores.files import sha256_file, sync_folder, write_json
from stores.progress import Progress
from stores.spec import cyto_version

RECORD = "https://zenodo.org/api/records/10908163"
PUBLISHED_AT = "Zenodo record 10908163 (doi 10.5281/zenodo.10908163)"
MAX_BYTES = 16 << 30  # the giant model in float32 with its heads is below 6 GB
_MAX_RECORD_BYTES = 4 << 20

_TIMEOUT_S = 30.0  # without a single byte
_WINDOW_S, _SLOWEST = 60.0, 1024  # less than this many bytes per second over a window counts as a lost connection
_DELAYS_S = (1.0, 4.0, 15.0)  # before another try; from the first again once a try has brought _PROGRESS bytes
_MAX_DELAY_S = 60.0  # whatever a server asks for
_PROGRESS = 1 << 20
_PIECE = 1 << 18
_LOCK_POLL_S = 0.5

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """A file in the cache folder that has just been found equal to the published one."""

    path: Path
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Published:
    """What the publisher's record says about one file."""

    name: str
    size: int
    md5: str
    url: str
    source: str  # the record's own address

    def identity(self) -> dict[str, Any]:
        return {"file": self.name, "size": self.size, "md5": self.md5, "source": self.source}


class _Failed(Exception):
    """A try that brought no file: worth another one, unless the reason is final."""

    def __init__(self, reason: object, *, is_final: bool = False, starts_over: bool = False, wait_s: float = 0) -> None:
        text = " ".join(str(reason).split())[:300]
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in text))
        self.is_final, self.starts_over, self.wait_s = is_final, starts_over, wait_s


def cache_folder() -> Path:
    """Where downloads are kept: `$CYTO_CACHE`, or `cyto` in the user's cache folder of this platform.

    Raises
    ------
    BadInput
        If that is not said, and the user has no home.
    """
    if chosen := os.environ.get("CYTO_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if sys.platform != "darwin" and base.is_absolute():  # the XDG rules: ignore a relative one
        return base / "cyto"
    try:
        home = Path.home()
    except RuntimeError:  # a user without an entry in the list of users, as in a container, and without HOME
        raise BadInput("this user has no home to keep downloads in; set CYTO_CACHE to a folder for them") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "cyto"


def record_url() -> str:
    """The publisher's record, or the one that `$CYTO_WEIGHTS_RECORD` names: a mirror, a server in a test.

    The record vouches for the file, so it must come over HTTPS, or from this machine itself.
    """
    url = os.environ.get("CYTO_WEIGHTS_RECORD") or RECORD
    try:
        scheme, host, _ = _origin(url)
    except ValueError:
        scheme, host = "", ""
    if not host or not (scheme == "https" or (scheme == "http" and host in ("127.0.0.1", "::1", "localhost"))):
        raise BadInput(f"CYTO_WEIGHTS_RECORD must be an https:// address (http:// on this machine only); found {url!r}")
    return url


def fetch_published(name: str, *, progress: Progress = lambda done, total, state: None) -> Downloaded:
    """The published file `name` in the cache folder: downloaded if it is not there, continued if it is there in part.

    A file that was checked once is found again without a network, by the hash that was taken then. Several
    processes may ask at once: one downloads, the others wait. Memory: a few hundred kilobytes. `progress` is told of
    bytes; of 0 in all while that is unknown.

    Raises
    ------
    BadInput
        If the file cannot be got, or is not the published one; the message says how to get it by hand.
    """
    source = record_url()
    path = cache_folder() / "weights" / name
    try:
        if found := _remembered(path, source):  # before anything is written: the folder may be read-only by now
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, progress):
            return _remembered(path, source) or _fetch(path, source, progress)
    except OSError as error:
        raise BadInput(
            f"cannot keep {name} in {path.parent} ({error.strerror or error}); "
            f"set CYTO_CACHE to a folder with space that you can write to"
        ) from None


def _remembered(path: Path, source: str) -> Downloaded | None:
    """The checked file, if it is still what it was; None if there is none from this record."""
    try:
        note = json.loads(_beside(path, ".json").read_text())
        size, sha256 = note["size"], note["sha256"]
        is_ours = note["source"] == source and note["file"] == path.name and path.is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not is_ours:
        return None
    found = sha256_file(path) if path.stat().st_size == size else f"of another file, {path.stat().st_size:,} bytes long"
    if found != sha256:
        raise BadInput(
            f"{path} has changed since it was downloaded and checked: its SHA-256 was {sha256}, now it is {found}. "
            f"Delete it and run the same command again"
        )
    return Downloaded(path=path, sha256=sha256)


def _fetch(path: Path, source: str, progress: Progress) -> Downloaded:
    part = _beside(path, ".part")
    file = _retried(lambda: _read_record(path.name, source), path, source, progress)
    if path.exists():  # put there by hand, or a crash came before the note was written
        md5, sha256 = _digests(path)
        if md5 != file.md5:
            raise BadInput(
                f"{path} is not {file.name} of {source}: its MD5 is {md5}, expected {file.md5}. "
                f"Move it away and run the same command again"
            )
    else:
        sha256 = _retried(lambda: _download(file, part, progress), path, source, progress)
        part.replace(path)
        sync_folder(path.parent)
    _forget(part)
    write_json(_beside(path, ".json"), {**file.identity(), "sha256": sha256})
    return Downloaded(path=path, sha256=sha256)


def _retried(once: Callable[[], _T], path: Path, source: str, progress: Progress) -> _T:
    """What `once` returns, tried again with growing pauses as long as it fails without bringing much."""
    part, n_failed = _beside(path, ".part"), 0
    while True:
        before = _size(part)
        try:
            return once()
        except _Failed as failed:
            n_failed = 1 if _size(part) - before >= _PROGRESS else n_failed + 1
            if failed.starts_over:
                _forget(part)
            if failed.is_final or n_failed > len(_DELAYS_S):
                tries = "" if failed.is_final else f" ({n_failed} tries)"
                kept = f" {_size(part):,} bytes are kept: run the same command again to go on." if _size(part) else ""
                raise BadInput(
                    f"cannot get {path.name} from {source}: {failed}{tries}.{kept} By hand: get it from "
                    f"{PUBLISHED_AT} and give it with --weights {path.name}"
                ) from None
            progress(_size(part), 0, f"{failed}; trying again")
            time.sleep(max(_DELAYS_S[n_failed - 1], min(failed.wait_s, _MAX_DELAY_S)))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _beside(part, ".json").unlink(missing_ok=True)


def _digests(path: Path) -> tuple[str, str]:
    """(MD5, SHA-256) of a file, read once. The MD5 is what Zenodo publishes; it shows damage, not an attack."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            md5.update(piece)
            sha256.update(piece)
    return md5.hexdigest(), sha256.hexdigest()


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    import fcntl  # here, so that the module can be imported where there is none

    with _beside(path, ".lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(_size(_beside(path, ".part")), 0, "another process downloads it; waiting")
                time.sleep(_LOCK_POLL_S)
        yield


# ------------------------------------------------------------------------------------------------ record


def _read_record(name: str, source: str) -> _Published:
    raw = bytearray()
    with _open(source, {"Accept": "application/json"}) as response:
        for piece in _pieces(response):
            raw += piece
            if len(raw) > _MAX_RECORD_BYTES:
                raise _Failed(f"this is no record: more than {_MAX_RECORD_BYTES:,} bytes", is_final=True)
    try:
        return _find(json.loads(bytes(raw)), name, source)
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or what _find says
        raise _Failed(f"the record cannot be used: {error}", is_final=True) from None


def _find(record: Any, name: str, source: str) -> _Published:
    """The one entry of this name: in Zenodo's list, or in InvenioRDM's `entries`, where the link is named `content`."""
    files = record.get("files") if isinstance(record, dict) else None
    if isinstance(files, dict):
        entries = files.get("entries")
        files = list(entries.values()) if isinstance(entries, dict) else entries
    if not isinstance(files, list):
        raise ValueError("it has no list of files")
    found = [entry for entry in files if isinstance(entry, dict) and entry.get("key") == name]
    if len(found) != 1:
        raise ValueError(f"it lists {len(found)} files of this name among {len(files):,}")
    size, checksum, links = found[0].get("size"), found[0].get("checksum"), found[0].get("links")
    if type(size) is not int or not 0 < size <= MAX_BYTES:
        raise ValueError(f"expected a size of 1 to {MAX_BYTES:,} bytes; found {size!r:.40}")
    if not isinstance(checksum, str) or not re.fullmatch("md5:[0-9a-f]{32}", checksum):
        raise ValueError(f"expected a checksum md5:<32 hex digits>; found {checksum!r:.80}")
    url = (links.get("content") or links.get("self")) if isinstance(links, dict) else None
    if not isinstance(url, str) or not re.fullmatch("[!-~]+", url) or not _same_server(url, source):
        raise ValueError(f"expected the file's address on the record's own server; found {url!r:.120}")
    return _Published(name=name, size=size, md5=checksum.removeprefix("md5:"), url=url, source=source)


# ---------------------------------------------------------------------------------------------- download


def _download(file: _Published, part: Path, progress: Progress) -> str:
    """The SHA-256 of the whole, checked part; what it lacks is got first."""
    have, etag = _begun(file, part)
    if have < file.size:
        _append(file, part, have, etag, progress)
    progress(file.size, file.size, "checking")
    with part.open("rb") as written:
        os.fsync(written.fileno())
    md5, sha256 = _digests(part)
    if md5 != file.md5:
        raise _Failed(
            f"what came has the MD5 {md5}, expected {file.md5} as published; it was deleted",
            is_final=True,
            starts_over=True,
        )
    return sha256


def _append(file: _Published, part: Path, have: int, etag: str, progress: Progress) -> None:
    """Get the bytes behind the first `have`; all of them if the server does not go on exactly there."""
    if (free := shutil.disk_usage(part.parent).free) < file.size - have:
        raise OSError(f"{file.size - have:,} bytes are needed, {free:,} are free")
    asked = {"Range": f"bytes={have}-", **({"If-Range": etag} if etag else {})} if have else {}
    with _open(file.url, asked) as response:
        headers = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _Failed("the server recodes the file on the way", is_final=True)
        if response.status == 206 and have:
            goes_on = headers.get("Content-Range", "").strip() == f"bytes {have}-{file.size - 1}/{file.size}"
            if not goes_on or (etag and headers.get("ETag", etag) != etag):
                raise _Failed("the server did not go on with the same file", starts_over=True)
        elif response.status == 200:
            if (length := headers.get("Content-Length", str(file.size))) != str(file.size):
                raise _Failed(f"the server has {length[:20]} bytes, the record says {file.size:,}", is_final=True)
            have = 0
            part.write_bytes(b"")  # before the note, which must never speak of other bytes
            write_json(_beside(part, ".json"), {**file.identity(), "etag": headers.get("ETag", "")})
        else:
            raise _Failed(f"the server answers {response.status} and not with the file", starts_over=True)
        with part.open("ab") as written:
            progress(have, file.size, "")
            for piece in _pieces(response):
                if have + len(piece) > file.size:
                    raise _Failed(
                        f"the server sends more than the {file.size:,} bytes of the record",
                        is_final=True,
                        starts_over=True,
                    )
                written.write(piece)
                have += len(piece)
                progress(have, file.size, "")
    if have < file.size:
        raise _Failed(f"the connection ended after {have:,} of {file.size:,} bytes")


def _begun(file: _Published, part: Path) -> tuple[int, str]:
    """(bytes to keep, ETag they came with) of an earlier download of this very file; (0, "") if there is none."""
    try:
        note = json.loads(_beside(part, ".json").read_text())
        have = part.stat().st_size
        if {key: note.get(key) for key in file.identity()} != file.identity() or have > file.size:
            return 0, ""
        return have, str(note.get("etag", ""))
    except (OSError, ValueError, AttributeError):
        return 0, ""


# --------------------------------------------------------------------------------------------- transport


class _OneServer(urllib.request.HTTPRedirectHandler):
    """Follows a redirect on the same server only."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if not _same_server(newurl, req.full_url):
            fp.close()
            raise _Failed(f"it leads to another server, {newurl!r:.120}, which is not followed", is_final=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _open(url: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET, if it is a good one."""
    handlers: list[Any] = [_OneServer]
    if url.startswith("http:"):  # this machine: no proxy is between
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"User-Agent": f"cyto/{cyto_version()}", **headers})
    try:
        response = urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            may_pass = error.code in (408, 416, 425, 429) or error.code >= 500
            wait = error.headers.get("Retry-After", "")
            raise _Failed(
                f"the server answers {error.code} {error.reason}",
                is_final=not may_pass,
                starts_over=error.code == 416,  # there is nothing behind what we have
                wait_s=float(wait) if re.fullmatch("[0-9]{1,6}", wait) else 0,
            ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        is_forged = isinstance(reason, ssl.SSLCertVerificationError)
        raise _Failed(str(reason) or type(error).__name__, is_final=is_forged) from None
    with response:
        yield response


def _pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it comes; a server that only drips counts as lost."""
    began, n_bytes = time.monotonic(), 0
    while True:
        try:
            piece = response.read1(_PIECE)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a torn chunk header
            raise _Failed(str(error) or type(error).__name__) from None
        if not piece:
            return
        yield piece
        n_bytes += len(piece)
        if (passed := time.monotonic() - began) > _WINDOW_S:
            if n_bytes < _SLOWEST * passed:
                raise _Failed(f"only {n_bytes:,} bytes came in {passed:.0f} s")
            began, n_bytes = time.monotonic(), 0


def _same_server(first: str, second: str) -> bool:
    try:
        return _origin(first) == _origin(second)
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port); raises ValueError if it cannot be read."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("an address with a user name")
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)
