"""Reads a store at a URL through obstore: small files are copied once, chunks are read by zarr and checked.

Endpoint, region and keys come from the environment, as for other tools (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, ...), never from the URL: a URL is logged and pickled.
"""

import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import zarr.storage
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from .chunk_cache import FORKED
from .errors import BadInput, CytoError, DamagedStore, StoreUnreachable
from .files import MOST_JSON_BYTES
from .version import missing_package
from .zarr_meta import parse_object

if TYPE_CHECKING:
    from obstore import Bytes
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "https", "http")
_SMALL_FILES = ("zarr.json", "images.parquet", "journal.jsonl", "runs.jsonl")
# of a request that is refused, interrupted or answered with 5xx; with growing pauses, 13 s in all
_RETRY: "RetryConfig" = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}
# `timeout` limits the whole response, which may be a slow chunk of 100 MB; `read_timeout`, a silent connection
_CLIENT: "ClientConfig" = {"allow_http": True, "connect_timeout": "10s", "read_timeout": "30s", "timeout": "15m"}
_KEY_SERVICE = "169.254.169.254"  # gives keys inside a cloud; obstore asks it if the environment has none
_COPY_AGAIN = "Copy the store there again"


def store_root(root: Path | str) -> Path | str:
    """The absolute path of a local store (a file:// URL is one), or the URL of a remote one without a slash at its end.

    Raises
    ------
    BadInput
        If the URL is of a kind that cannot be read, or holds a password, a query or a fragment.
    """
    if isinstance(root, Path) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", root):
        return Path(root).absolute()
    parts = urlsplit(root)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path)).absolute()
    if parts.scheme not in _SCHEMES or not parts.netloc or ".." in parts.path.split("/"):
        raise BadInput(f"{root!r} cannot be read: expected a local path, or a URL like {'://, '.join(_SCHEMES)}://")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise BadInput(
            f"the URL {parts.scheme}://{parts.netloc.split('@')[-1]}{parts.path} holds more than a place (user, "
            f"password, query or fragment); give access in the environment instead, for instance AWS_ACCESS_KEY_ID"
        )
    return root.rstrip("/")


@contextmanager
def small_files(root: Path | str) -> Iterator[Path]:
    """A folder with all files of a store except its chunks: `root` itself, or a temporary copy of those at a URL.

    In error messages inside this context, the URL replaces the path of the copy.
    """
    if isinstance(root, Path):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="cyto-") as temporary:
        folder = Path(temporary) / "store"
        remote = RemoteFolder(root)
        for name in _SMALL_FILES:
            remote.copy(name, folder / name)
            if not folder.exists():  # no header: no store
                break
        try:
            yield folder
        except CytoError as error:
            raise type(error)(str(error).replace(str(folder), root)) from None


class RemoteFolder:
    """The objects below a URL. Of a process and its forks, only the first that reads a URL may do so."""

    _process: ClassVar[int | None] = None

    def __init__(self, url: str) -> None:
        """Opens no connection. Raises BadInput if obstore is missing, refuses the URL, or would hang (after a fork)."""
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise BadInput(missing_package("obstore", f"reading {url}")) from None
        if self._process not in (None, os.getpid()):
            raise BadInput(FORKED)
        RemoteFolder._process = os.getpid()
        self.url = url
        try:
            self.objects: ObjectStore = from_url(url, client_options=_CLIENT, retry_config=_RETRY)
        except (BaseError, ValueError) as error:
            raise BadInput(f"{url} cannot be read: {_first_line(error)}") from None

    def copy(self, name: str, path: Path) -> None:
        """Copy one object to a file, whose folder is made; nothing happens if there is no such object."""
        import obstore

        try:
            with reachable(self.url):
                answer = obstore.get(self.objects, name)
                if name.endswith(".json") and answer.meta["size"] > MOST_JSON_BYTES:
                    raise DamagedStore(f"{self.url}/{name} has more than {MOST_JSON_BYTES:,} bytes. {_COPY_AGAIN}")
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    for piece in answer.stream():
                        file.write(piece)
        except FileNotFoundError:
            return

    def sizes(self, names: list[str], *, prefix: str) -> dict[str, int]:
        """The sizes (bytes) of the existing objects among `names`, all of which begin with `prefix`."""
        import obstore

        with reachable(self.url):
            if not isinstance(self.objects, obstore.store.HTTPStore):
                batches = obstore.list(self.objects, prefix)
                return {item["path"]: item["size"] for batch in batches for item in batch}
            with ThreadPoolExecutor(16) as threads:  # a web server has no listing
                sizes = threads.map(self.size, names)
                return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}

    def size(self, name: str) -> int | None:
        """The size (bytes) of an object; None if there is none."""
        import obstore

        try:
            return obstore.head(self.objects, name)["size"]
        except FileNotFoundError:
            return None


class CheckedObjects(zarr.storage.ObjectStore[Any]):
    """A zarr store of a remote folder in which a missing or changed chunk is an error.

    Zarr itself reads a missing chunk as the fill value. The expected ("promised") objects come from the journal.
    """

    def __init__(self, folder: RemoteFolder, promised: dict[str, tuple[int, bytes | int]]) -> None:
        """promised : name -> (size of the object in bytes, its last bytes or its CRC-32 as a number)."""
        super().__init__(folder.objects, read_only=True)
        self.url, self._folder, self._promised = folder.url, folder, promised
        self._named: set[str] = set()  # objects read by ranges whose last bytes were checked

    def check_sizes(self, *, prefix: str) -> None:
        """Raises DamagedStore if a promised object is missing or has a wrong size; all names begin with `prefix`."""
        sizes = self._folder.sizes(list(self._promised), prefix=prefix)
        for name in self._promised:
            self._check_size(name, sizes.get(name))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """An object for zarr. Raises DamagedStore if a promised object is missing or has changed."""
        if key not in self._promised:
            return await super().get(key, prototype, byte_range)
        import obstore

        assert byte_range is None, "a chunk is read whole"
        try:
            answer = await obstore.get_async(self.store, key)
        except FileNotFoundError:
            self._check_size(key, None)
            raise
        self._check_size(key, answer.meta["size"])  # before its bytes are fetched
        content = await answer.bytes_async()
        self._check_content(key, memoryview(content))
        return prototype.buffer.from_bytes(content)  # type: ignore[arg-type]  # obstore's buffer type

    def get_range(self, name: str, start: int, stop: int) -> "Bytes":
        """A range of bytes of a promised object. Its size is always checked; its last bytes, the first time.

        Raises
        ------
        DamagedStore
            If it is missing or has changed.
        StoreUnreachable
            If it cannot be read, or the server does not support HTTP ranges.
        """
        from obstore.exceptions import BaseError, NotSupportedError

        size, end = self._promised[name]
        assert isinstance(end, bytes), "its end tells it apart, a checksum of the whole does not"
        try:
            if name not in self._named:
                self._check_content(name, memoryview(self._range(name, size - len(end), size)))
                self._named.add(name)
            return self._range(name, start, stop)
        except FileNotFoundError:
            self._check_size(name, None)
            raise
        except NotSupportedError:
            raise StoreUnreachable(
                f"the server of {self._folder.url} does not give parts of a file (HTTP ranges), which shuffling needs; "
                f"copy the cache to a local disk, or serve it by one that does"
            ) from None
        except BaseError:
            with reachable(self._folder.url):
                self._check_size(name, self._folder.size(name))  # the file may be too short for the range
                raise

    def _range(self, name: str, start: int, stop: int) -> "Bytes":
        import obstore

        answer = obstore.get(self._folder.objects, name, options={"range": (start, stop)})
        self._check_size(name, answer.meta["size"])
        return answer.bytes()

    def read(self, name: str) -> memoryview:
        """A whole promised object, without zarr. Raises DamagedStore if it has changed, or StoreUnreachable."""
        import obstore

        self.require_promised([name])

        try:
            with reachable(self.url):
                answer = obstore.get(self.store, name)
                self._check_size(name, answer.meta["size"])  # before its bytes are fetched
                content = memoryview(answer.bytes())
        except FileNotFoundError:
            self._check_size(name, None)
            raise
        self._check_content(name, content)
        return content

    def small_object(self, name: str) -> dict[str, Any]:
        """The JSON in a file of the store, of at most 16 MiB. Raises DamagedStore, StoreUnreachable."""
        import obstore

        try:
            with reachable(self.url):
                answer = obstore.get(self.store, name)
                if answer.meta["size"] > MOST_JSON_BYTES:
                    raise DamagedStore(f"{self.url}/{name} has more than {MOST_JSON_BYTES:,} bytes. {_COPY_AGAIN}")
                return parse_object(bytes(answer.bytes()), f"{self.url}/{name}")
        except FileNotFoundError:
            raise DamagedStore(f"{self.url}/{name} is missing. {_COPY_AGAIN}") from None

    def require_promised(self, names: Iterable[str]) -> None:
        """Raises DamagedStore if the journal does not name one of these."""
        for name in names:
            if name not in self._promised:
                raise DamagedStore(f"{self.url}/{name} is not named in the journal. {_COPY_AGAIN}")

    def _check_content(self, name: str, content: memoryview) -> None:
        """Compare `content` (the whole object, or its last bytes if these are promised) with the journal."""
        _, promised = self._promised[name]
        if isinstance(promised, int):
            is_promised = zlib.crc32(content) == promised
        else:
            is_promised = content[-len(promised) :] == promised
        if not is_promised:
            raise DamagedStore(
                f"{self.url}/{name} is not the chunk that the journal names: another one took its place. {_COPY_AGAIN}"
            )

    def _check_size(self, name: str, found: int | None) -> None:
        expected, place = self._promised[name][0], f"{self._folder.url}/{name}"
        if found is None:
            raise DamagedStore(f"{place} is missing. {_COPY_AGAIN}")
        if found != expected:
            raise DamagedStore(f"{place} has {found:,} bytes, expected {expected:,}. {_COPY_AGAIN}")


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Turns errors of obstore, after its retries, into one line; a missing object stays a FileNotFoundError."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (BaseError, TimeoutError, ConnectionError) as error:
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
        if refused or _KEY_SERVICE in str(error):
            raise StoreUnreachable(
                f"{url} may not be read with the access that the environment gives (AWS_ACCESS_KEY_ID and the like; "
                f"AWS_SKIP_SIGNATURE=true for public data): {_first_line(error)}"
            ) from None
        raise StoreUnreachable(f"{url} cannot be read now, try again later: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    line = str(error).strip().split("\n")[0].strip()
    return line if len(line) <= 300 else line[:300] + "…"
