"""A store behind a URL, read through obstore: its small files are copied once, its chunks go through zarr, checked.

Where to (endpoint, region) and as whom (keys) stand in the environment, as for other tools of that storage
(AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...), never in the URL: a URL may be logged and pickled.
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
# of one request that is refused, cut off, or answered with 5xx; with growing pauses, 13 s in all
_RETRY: "RetryConfig" = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}
# `timeout` is for a whole answer, and a chunk of 100 MB may come slowly; `read_timeout` is for silence
_CLIENT: "ClientConfig" = {"allow_http": True, "connect_timeout": "10s", "read_timeout": "30s", "timeout": "15m"}
_KEY_SERVICE = "169.254.169.254"  # inside a cloud it gives keys; obstore asks it where the environment has none
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
    """A folder with everything of a store but its chunks: `root` itself, or a temporary copy of a URL's files.

    Inside, an error that names the copy names the URL instead.
    """
    if isinstance(root, Path):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="cyto-") as temporary:
        folder = Path(temporary) / "store"
        remote = RemoteFolder(root)
        for name in _SMALL_FILES:
            remote.copy(name, folder / name)
            if not folder.exists():  # no header: as where nothing is
                break
        try:
            yield folder
        except CytoError as error:
            raise type(error)(str(error).replace(str(folder), root)) from None


class RemoteFolder:
    """What lies below a URL. Only one process of a family of forks may read URLs: the first that did."""

    _process: ClassVar[int | None] = None

    def __init__(self, url: str) -> None:
        """Contacts nobody yet. Raises BadInput if obstore is not installed, does not take the URL, or would hang."""
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
        """Copy one object to a file, with its folder; nothing happens if there is no such object."""
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
        """The sizes (bytes) of those of these objects that are there; all their names begin with `prefix`."""
        import obstore

        with reachable(self.url):
            if not isinstance(self.objects, obstore.store.HTTPStore):
                batches = obstore.list(self.objects, prefix)
                return {item["path"]: item["size"] for batch in batches for item in batch}
            with ThreadPoolExecutor(16) as threads:  # a web server does not list
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
    """Zarr's store of a remote folder, where a promised object that is missing or is another one is an error.

    Zarr alone reads a missing chunk as the fill value.
    """

    def __init__(self, folder: RemoteFolder, promised: dict[str, tuple[int, bytes | int]]) -> None:
        """promised : by name, the size of an object in bytes, and how it ends (bytes) or its CRC-32 (a number)."""
        super().__init__(folder.objects, read_only=True)
        self.url, self._folder, self._promised = folder.url, folder, promised
        self._named: set[str] = set()  # of those read by ranges: objects whose end was seen

    def check_sizes(self, *, prefix: str) -> None:
        """Raises DamagedStore if a promised object, all of whose names begin so, is missing or has a wrong size."""
        sizes = self._folder.sizes(list(self._promised), prefix=prefix)
        for name in self._promised:
            self._check_size(name, sizes.get(name))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """What zarr asks for. Raises DamagedStore if a promised object is not the one."""
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
        return prototype.buffer.from_bytes(content)  # type: ignore[arg-type]  # obstore's own buffer

    def get_range(self, name: str, start: int, stop: int) -> "Bytes":
        """Some bytes of a promised object. The first time, how it ends is looked at too; its size is every time.

        Raises
        ------
        DamagedStore
            If it is missing or not the one.
        StoreUnreachable
            If it cannot be read, or the server does not give parts of a file.
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
                self._check_size(name, self._folder.size(name))  # a file that is too short has no such range
                raise

    def _range(self, name: str, start: int, stop: int) -> "Bytes":
        import obstore

        answer = obstore.get(self._folder.objects, name, options={"range": (start, stop)})
        self._check_size(name, answer.meta["size"])
        return answer.bytes()

    def read(self, name: str) -> memoryview:
        """A promised object, whole, without zarr. Raises DamagedStore if it is not the one, StoreUnreachable."""
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
        """The JSON object at a name of the store, of at most 16 MiB. Raises DamagedStore, StoreUnreachable."""
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
        """`content`: all of it, or its end where that is what was promised."""
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
    """Turns what obstore raises when it has tried often enough into one line; not found stays FileNotFoundError."""
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
