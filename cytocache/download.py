"""Downloads a published file into the cache folder, from a Zenodo record or a Hugging Face model, and checks it.

The publisher's record states size and checksum; the file is used only if both agree. Every answer of a server is
checked, since it may be slow, wrong or malicious. Standard library only; docs/log.md says why pooch is not used.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from stores.errors import BadInput
from stores.files import sha256_file, sync_folder, write_json
from stores.machine import free_on_disk
from stores.progress import Progress
from stores.spec import cyto_version

RECORD = "https://zenodo.org/api/records/10908163"
PUBLISHED_AT = "Zenodo record 10908163 (doi 10.5281/zenodo.10908163)"
HUB = "https://huggingface.co"
_COMMIT = "[0-9a-f]{40}"
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"  # of an owner, a model, a file or a folder: never a way out of a folder
_FILE = f"{_NAME}(?:/{_NAME})*"
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_MAX_SMALL_BYTES = 4 << 20  # of a file that Hugging Face keeps in its repository, and not as a large one
MAX_BYTES = 16 << 30  # the giant model in float32, with its heads, is below 6 GB
_MAX_RECORD_BYTES = 4 << 20

_TIMEOUT_S = 30.0  # seconds without a byte, after which the connection is given up
_WINDOW_S, _SLOWEST = 60.0, 1024  # below this rate (bytes per second, over a window) a connection counts as lost
_DELAYS_S = (1.0, 4.0, 15.0)  # pauses before tries; from the first again after a try that brought _PROGRESS bytes
_MAX_DELAY_S = 60.0  # upper limit, whatever a server asks for
_PROGRESS = 1 << 20
_PIECE = 1 << 18
_LOCK_POLL_S = 0.5

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """A file in the cache folder that was checked to equal the published one."""

    path: Path
    sha256: str
    source: str  # the value of --weights that gives this file again


@dataclass(frozen=True, kw_only=True)
class _Published:
    """One file by the publisher's record.

    The checksum is an MD5 (Zenodo), a SHA-256 (large files of Hugging Face), or git's name of the content (small ones).
    """

    name: str
    size: int
    kind: str  # "md5", "sha256" or "git"
    checksum: str  # hex
    url: str
    source: str  # the record's own address

    def identity(self) -> dict[str, Any]:
        return {"file": self.name, "size": self.size, self.kind: self.checksum, "source": self.source}

    def difference(self, digests: dict[str, str]) -> str:
        """`the MD5 X, expected Y`, or "" if the checksum agrees."""
        found, name = digests[self.kind], {"md5": "MD5", "sha256": "SHA-256", "git": "git hash"}[self.kind]
        return "" if found == self.checksum else f"{name} {found}, expected {self.checksum}"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where the record of a file is, how it is read, and how it is named to the user."""

    url: str  # of the record
    find: Callable[[Any, str, str], _Published]  # record, file, url of the record
    weights: str  # the value of --weights
    by_hand: str  # where a user can get the file by hand
    is_mirrored: bool = False  # the file may come from another server, since its SHA-256 is known


class _Failed(Exception):
    """A try that failed; it is repeated unless the reason is final."""

    def __init__(self, reason: object, *, is_final: bool = False, starts_over: bool = False, wait_s: float = 0) -> None:
        text = " ".join(str(reason).split())[:300]
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in text))
        self.is_final, self.starts_over, self.wait_s = is_final, starts_over, wait_s


def cache_folder() -> Path:
    """Where downloads are kept: `$CYTO_CACHE`, or `cyto` in the user's cache folder of this platform.

    Raises
    ------
    BadInput
        If $CYTO_CACHE is not set and the user has no home folder.
    """
    if chosen := os.environ.get("CYTO_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if sys.platform != "darwin" and base.is_absolute():  # by the XDG rules a relative path is ignored
        return base / "cyto"
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and no entry for this user, as in some containers
        raise BadInput("this user has no home to keep downloads in; set CYTO_CACHE to a folder for them") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "cyto"


def record_url() -> str:
    """URL of the publisher's record, or `$CYTO_WEIGHTS_RECORD` (a mirror, or a server in a test).

    The record holds the checksum of the file, so it must come over HTTPS, or from this machine.
    """
    return _server_of("CYTO_WEIGHTS_RECORD", RECORD)


def _server_of(variable: str, usual: str) -> str:
    url = os.environ.get(variable) or usual
    if not _is_trusted(url):
        raise BadInput(f"{variable} must be an https:// address (http:// on this machine only); found {url!r}")
    return url


def _is_trusted(url: str) -> bool:
    """Is the URL HTTPS, or of this machine?"""
    try:
        scheme, host, _ = _origin(url)
    except ValueError:
        return False
    return bool(host) and (scheme == "https" or (scheme == "http" and host in ("127.0.0.1", "::1", "localhost")))


def fetch_published(name: str, *, progress: Progress = lambda done, total, state: None) -> Downloaded:
    """The published file `name` in the cache folder: downloaded if missing, continued if incomplete.

    A file that was checked once is later used without a network, by its recorded hash. Several processes may call this
    at once: one downloads, the others wait. Memory: a few hundred kilobytes. `progress` gets bytes done and bytes in
    all (0 while unknown).

    Raises
    ------
    BadInput
        If the download fails, or the file is not the published one; the message says how to get it by hand.
    """
    source = _Source(url=record_url(), find=_find, weights="auto", by_hand=PUBLISHED_AT)
    return _downloaded(cache_folder() / "weights" / name, source, progress)


def fetch_from_hub(
    address: str, name: str | Sequence[str], *, progress: Progress = lambda done, total, state: None
) -> Downloaded:
    """The weights file of a model on Hugging Face, kept as by `fetch_published`, checked by the SHA-256 stated there.

    A commit as revision needs no network the second time, if FILE is given or is `name`. For a branch or tag, its
    present commit is looked up; `Downloaded.source` names it.

    Parameters
    ----------
    address : `hf:OWNER/NAME[/FILE][@REVISION]`; the revision is a commit (40 hex digits), a branch or a tag
        (default: `main`)
    name : if no FILE is given, the file to use if the model has it, or several, the best first; otherwise the model's
        only file of weights. A file with another suffix than weights have, such as config.json, is found only by name

    Raises
    ------
    BadInput
        As `fetch_published`; also for a malformed address, or a model without exactly one file of weights.
    """
    names = (name,) if isinstance(name, str) else tuple(name)
    found = re.fullmatch(rf"(?:hf|hf-hub):({_NAME}/{_NAME})(?:/({_FILE}))?(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?", address)
    if found is None or ".." in address:
        raise BadInput(
            f"expected weights hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE; found {address!r}"
        )
    model, file, revision = found[1], found[2] or "", found[3] or "main"
    hub = _server_of("HF_ENDPOINT", HUB).rstrip("/")
    folder = cache_folder() / "weights" / "hf" / model.replace("/", "--")
    by_hand = f"{hub}/{model}"
    if re.fullmatch(_COMMIT, revision) and not file:  # as chosen when it was downloaded: no request is needed
        file = next((each for each in names if (folder / revision / f"{each}.json").exists()), "")
    if not re.fullmatch(_COMMIT, revision) or not file:
        url = f"{hub}/api/models/{model}/revision/{quote(revision, safe='')}?blobs=true"
        listed_at = _Source(url=url, find=_find, weights=address, by_hand=by_hand)
        try:
            revision, file = _retried(
                lambda: _look_up(url, file, names), folder / (file or names[0]), listed_at, progress
            )
        except BadInput as error:
            known = f"; already here: --weights {kept}" if (kept := _newest_download(folder, model)) else ""
            raise BadInput(f"{error}{known}") from None
    url = f"{hub}/api/models/{model}/revision/{revision}?blobs=true"
    source = _Source(
        url=url,
        find=partial(_find_on_hub, file=file, at=f"{hub}/{model}/resolve/{revision}/{file}"),
        weights=f"hf:{model}/{file}@{revision}",
        by_hand=by_hand,
        is_mirrored=file.endswith(_WEIGHTS),
    )
    return _downloaded(folder / revision / file, source, progress)


def _newest_download(folder: Path, model: str) -> str:
    """The address of the newest downloaded and checked file of this model; "" if there is none."""
    notes = [path for path in folder.rglob("*.json") if not path.name.endswith(".part.json")]
    notes = [path for path in notes if path.with_suffix("").is_file()]
    for note in sorted(notes, key=lambda path: path.stat().st_mtime, reverse=True):
        commit, *file = note.relative_to(folder).with_suffix("").parts
        return f"hf:{model}/{'/'.join(file)}@{commit}"
    return ""


def _downloaded(path: Path, source: _Source, progress: Progress) -> Downloaded:
    name = path.name
    try:
        if found := _checked_before(path, source):  # before anything is written: the folder may be read-only
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, progress):
            return _checked_before(path, source) or _fetch(path, source, progress)
    except OSError as error:
        raise BadInput(
            f"cannot keep {name} in {path.parent} ({error.strerror or error}); "
            f"set CYTO_CACHE to a folder with space that you can write to"
        ) from None


def _checked_before(path: Path, source: _Source) -> Downloaded | None:
    """The checked file, if it has not changed; None if there is none of this record."""
    try:
        note = json.loads(_beside(path, ".json").read_text())
        size, sha256 = note["size"], note["sha256"]
        is_ours = note["source"] == source.url and note["file"] == path.name and path.is_file()
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
    return Downloaded(path=path, sha256=sha256, source=source.weights)


def _fetch(path: Path, source: _Source, progress: Progress) -> Downloaded:
    part = _beside(path, ".part")
    file = _retried(lambda: _read_record(path.name, source), path, source, progress)
    if path.exists():  # put there by hand, or its note was not written before a crash
        digests = _digests(path)
        sha256 = digests["sha256"]
        if difference := file.difference(digests):
            raise BadInput(
                f"{path} is not {file.name} of {source.url}: its {difference.replace(' ', ' is ', 1)}. "
                f"Move it away and run the same command again"
            )
    else:
        sha256 = _retried(
            lambda: _download(file, part, progress, is_mirrored=source.is_mirrored and file.kind == "sha256"),
            path,
            source,
            progress,
        )
        part.replace(path)
        sync_folder(path.parent)
    _forget(part)
    write_json(_beside(path, ".json"), {**file.identity(), "sha256": sha256})
    return Downloaded(path=path, sha256=sha256, source=source.weights)


def _retried(once: Callable[[], _T], path: Path, source: _Source, progress: Progress) -> _T:
    """The result of `once`, repeated with growing pauses while it fails without much progress."""
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
                    f"cannot get {path.name} from {source.url}: {failed}{tries}.{kept} By hand: get it from "
                    f"{source.by_hand} and give it with --weights {path.name}"
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


def _digests(path: Path) -> dict[str, str]:
    """MD5, SHA-256 and git's hash of a file, read once. MD5 and git's SHA-1 show damage, but no manipulation.

    Both come by the publisher's own server over HTTPS; the file itself may come from another one only by its SHA-256.
    """
    found = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    found["git"] = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            for digest in found.values():
                digest.update(piece)
    return {kind: digest.hexdigest() for kind, digest in found.items()}


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Only one process at a time; the lock ends with its process."""
    import fcntl  # imported here, since not every platform has it

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


def _read_record(name: str, source: _Source) -> _Published:
    return _read_json(source.url, lambda record: source.find(record, name, source.url))


def _read_json(url: str, find: Callable[[Any], _T]) -> _T:
    """The result of `find` on the JSON at an address; `find` raises ValueError for a record that it cannot use."""
    raw = bytearray()
    with _open(url, {"Accept": "application/json"}) as response:
        for piece in _pieces(response):
            raw += piece
            if len(raw) > _MAX_RECORD_BYTES:
                raise _Failed(f"this is no record: more than {_MAX_RECORD_BYTES:,} bytes", is_final=True)
    try:
        return find(json.loads(bytes(raw)))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or from `find`
        raise _Failed(f"the record cannot be used: {error}", is_final=True) from None


def _look_up(url: str, file: str, usual: Sequence[str]) -> tuple[str, str]:
    """(commit, file) of a model: the given file; without one the first usual file, else its only file of weights."""

    def find(record: Any) -> tuple[str, str]:
        commit, files = record.get("sha") if isinstance(record, dict) else None, _hub_files(record)
        if not isinstance(commit, str) or not re.fullmatch(_COMMIT, commit):
            raise ValueError(f"expected a commit of 40 hex digits; found {commit!r:.80}")
        names = [name for name in files if name.endswith(_WEIGHTS) and re.fullmatch(_FILE, name)]
        there = ", ".join(sorted(names)[:8]) or "none"
        for name in (file,) if file else usual:
            if name in files:
                return commit, name
        if file:  # not the usual one in its place: that would be other weights than were asked for
            raise ValueError(f"it has no file {file}; its files of weights: {there}")
        wanted = " or ".join(usual)
        if not wanted.endswith(_WEIGHTS):
            raise ValueError(f"it has no file {wanted}")
        if len(names) != 1:
            raise ValueError(f"expected {wanted}, or one file of weights; it has {there}; name one: hf:OWNER/NAME/FILE")
        return commit, names[0]

    return _read_json(url, find)


def _hub_files(record: Any) -> dict[str, dict[str, Any]]:
    """File name -> its entry in the record of a model."""
    files = record.get("siblings") if isinstance(record, dict) else None
    if not isinstance(files, list):
        raise ValueError("it has no list of files")
    return {str(each["rfilename"]): each for each in files if isinstance(each, dict) and "rfilename" in each}


def _find_on_hub(record: Any, name: str, source: str, *, file: str, at: str) -> _Published:
    """The entry of `file`; `at`: the URL of the file."""
    entry = _hub_files(record).get(file)
    if entry is None:
        raise ValueError(f"it has no file {file}")
    lfs, blob = entry.get("lfs"), entry.get("blobId")
    if not isinstance(lfs, dict) and isinstance(blob, str) and re.fullmatch("[0-9a-f]{40}", blob):
        size = entry.get("size")
        if type(size) is not int or not 0 < size <= _MAX_SMALL_BYTES:
            raise ValueError(f"expected a size of 1 to {_MAX_SMALL_BYTES:,} bytes; found {size!r:.40}")
        return _Published(name=name, size=size, kind="git", checksum=blob, url=at, source=source)
    size, checksum = (lfs.get("size"), lfs.get("sha256")) if isinstance(lfs, dict) else (None, None)
    if type(size) is not int or not 0 < size <= MAX_BYTES:
        raise ValueError(f"expected a size of 1 to {MAX_BYTES:,} bytes; found {size!r:.40}")
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise ValueError(f"expected the SHA-256 of {file} (64 hex digits); found {checksum!r:.80}")
    return _Published(name=name, size=size, kind="sha256", checksum=checksum, url=at, source=source)


def _find(record: Any, name: str, source: str) -> _Published:
    """The entry of this name: in Zenodo's list, or in InvenioRDM's `entries`, where the link is called `content`."""
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
    return _Published(name=name, size=size, kind="md5", checksum=checksum.removeprefix("md5:"), url=url, source=source)


# ---------------------------------------------------------------------------------------------- download


def _download(file: _Published, part: Path, progress: Progress, *, is_mirrored: bool) -> str:
    """Download the missing bytes of `part`, check the file, and return its SHA-256."""
    have, etag = _partial_download(file, part)
    if have < file.size:
        _append(file, part, have, etag, progress, is_mirrored=is_mirrored)
    progress(file.size, file.size, "checking")
    with part.open("rb") as written:
        os.fsync(written.fileno())
    digests = _digests(part)
    if difference := file.difference(digests):
        raise _Failed(
            f"what came has the {difference} as published; it was deleted",
            is_final=True,
            starts_over=True,
        )
    return digests["sha256"]


def _append(file: _Published, part: Path, have: int, etag: str, progress: Progress, *, is_mirrored: bool) -> None:
    """Download the bytes after the first `have`; all of them if the server does not continue exactly there."""
    if (free := free_on_disk(part.parent)) < file.size - have:
        raise OSError(f"{file.size - have:,} bytes are needed, {free:,} are free")
    asked = {"Range": f"bytes={have}-", **({"If-Range": etag} if etag else {})} if have else {}
    with _open(file.url, asked, is_mirrored=is_mirrored) as response:
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
            part.write_bytes(b"")  # before the note, which must not describe other bytes
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


def _partial_download(file: _Published, part: Path) -> tuple[int, str]:
    """(bytes to keep, their ETag) of an earlier download of the same file; (0, "") if there is none."""
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


class _AnyServer(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to any server over HTTPS: for files whose SHA-256 is known."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if not _is_trusted(newurl) or (newurl.startswith("http:") and req.full_url.startswith("https:")):
            fp.close()
            raise _Failed(f"it leads to an address that is not https://, {newurl!r:.120}", is_final=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _open(url: str, headers: dict[str, str], *, is_mirrored: bool = False) -> Iterator[http.client.HTTPResponse]:
    """The response to a GET request; raises `_Failed` for an error status."""
    handlers: list[Any] = [_AnyServer if is_mirrored else _OneServer]
    if url.startswith("http:"):  # this machine: without a proxy
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"User-Agent": f"cyto/{cyto_version()}", **headers})
    token = os.environ.get("HF_TOKEN", "").strip()
    if re.fullmatch("[!-~]+", token) and _same_server(url, os.environ.get("HF_ENDPOINT") or HUB):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # a redirect leads to other servers
    try:
        response = urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            may_pass = error.code in (408, 416, 425, 429) or error.code >= 500
            wait = error.headers.get("Retry-After", "")
            is_gated = error.code in (401, 403) and _same_server(url, os.environ.get("HF_ENDPOINT") or HUB)
            hint = " (accept the model's terms on its page, and set HF_TOKEN to your access token)" if is_gated else ""
            raise _Failed(
                f"the server answers {error.code} {error.reason}{hint}",
                is_final=not may_pass,
                starts_over=error.code == 416,  # range not satisfiable: no bytes after those that are here
                wait_s=float(wait) if re.fullmatch("[0-9]{1,6}", wait) else 0,
            ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        is_forged = isinstance(reason, ssl.SSLCertVerificationError)
        raise _Failed(str(reason) or type(error).__name__, is_final=is_forged) from None
    with response:
        yield response


def _pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body in pieces; a connection that is too slow counts as lost."""
    began, n_bytes = time.monotonic(), 0
    while True:
        try:
            piece = response.read1(_PIECE)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an invalid chunk header
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
