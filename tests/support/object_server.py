"""A local server that answers like S3 (GET, HEAD, Range, ListObjectsV2, path style) or like a plain web server.

Enough for reading: signatures are not checked (docs/log.md has a run against moto, which does more). It can be told
to fail.
"""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 7  # names in one answer to a listing: small, so that paging is tested


class ObjectServer(ThreadingHTTPServer):
    """Serves the files below `root`; the first folder is the bucket."""

    daemon_threads = True

    def __init__(self, root: Path, *, lists: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.lists = root, lists
        self.failing: dict[
            str, list[str]
        ] = {}  # end of a path -> a status, "cut" (half of it) or "drop", one per request
        self.waits = threading.Event()  # set: a chunk waits (two seconds at most) until a second one is asked for
        self.requests: Counter[str] = Counter()
        self.gives_ranges = True
        self.ranges: list[tuple[str, int, int]] = []  # name, first byte, one behind the last
        self.fetching, self.most_at_once, self.lock = 0, 0, threading.Lock()

    @property
    def url(self) -> str:
        """Its address, `http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query and self.server.lists:
            self._list(query)
        else:
            self._object(with_body=True)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _object(self, *, with_body: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.requests[f"{self.command} {name}"] += 1
        path = self.server.root / name
        failures = next((left for end, left in self.server.failing.items() if name.endswith(end)), [])
        failure = failures.pop(0) if failures else ""
        if failure.isdigit():
            return self._answer(int(failure), b"")
        if not path.is_file():
            return self._answer(404, b"")
        body = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.gives_ranges:
            first, last = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
            self.server.ranges.append((name, first, last + 1))
            if first > last:
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            headers = {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
            return self._answer(206, body[first : last + 1], headers, with_body=with_body, failure=failure)
        self._answer(200, body, with_body=with_body, failure=failure, is_chunk="/c/" in name)

    def _list(self, query: dict[str, list[str]]) -> None:
        bucket, prefix = urlsplit(self.path).path.strip("/"), query.get("prefix", [""])[0]
        self.server.requests[f"LIST {prefix}"] += 1
        folder = self.server.root / bucket
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if name.startswith(prefix)]
        at = int(query.get("continuation-token", ["0"])[0])
        items = "".join(
            f"<Contents><Key>{escape(quote(name))}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<Size>{(folder / name).stat().st_size}</Size></Contents>"
            for name in names[at : at + PAGE]
        )
        more = f"<NextContinuationToken>{at + PAGE}</NextContinuationToken>" if at + PAGE < len(names) else ""
        self._answer(200, f"<ListBucketResult>{items}{more}</ListBucketResult>".encode())

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        with_body: bool = True,
        failure: str = "",
        is_chunk: bool = False,
    ) -> None:
        with self._counted(is_chunk and with_body):
            self.send_response(status)
            for name, value in {"Last-Modified": formatdate(0, usegmt=True), "ETag": '"1"', **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body[: {"cut": len(body) // 2, "drop": 0}.get(failure, len(body))])
            self.close_connection = bool(failure)

    @contextmanager
    def _counted(self, counts: bool) -> Iterator[None]:
        """How many chunks are being fetched at once."""
        if not counts:
            yield
            return
        with self.server.lock:
            self.server.fetching += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.fetching)
            if self.server.fetching > 1:
                self.server.waits.clear()
        for _ in range(200):
            if not self.server.waits.is_set():
                break
            threading.Event().wait(0.01)
        yield
        with self.server.lock:
            self.server.fetching -= 1


@contextmanager
def serving(root: Path, *, lists: bool = True) -> Iterator[ObjectServer]:
    """The server, in a thread, for the time of the block."""
    with ObjectServer(root, lists=lists) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
