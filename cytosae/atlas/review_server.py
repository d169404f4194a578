"""The local server of an atlas: it sends files and the review page, and receives verdicts.

It listens on 127.0.0.1 only. Other web pages can make a browser send requests to it, so each request must name this
server as its Host (against DNS rebinding), and each POST must have the Origin of our page and the token of this start,
which is in the review page and not on disk. Only files in the folder of the atlas are sent, never through a link.
"""

import hmac
import json
import logging
import secrets
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from cytosae.review import (
    REVIEW_FILE,
    REVIEW_PICTURES,
    Review,
    current,
    default_reviews,
    new_verdict,
    read_review,
    read_verdicts,
    read_verdicts_of,
    reviewer_name,
    save_verdict,
    sent,
    withdrawal,
)
from stores.errors import BadInput, CytoError
from stores.files import locked
from stores.wording import printable

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Cyto-Token"
_LONGEST_BODY = 1 << 16  # bytes of a POST
_TIMEOUT = 30  # seconds without data after which a connection is closed
_LONGEST_REQUEST = 120  # seconds for a whole request, even if data keeps arriving slowly
_MOST_CONNECTIONS = 64  # open at a time; each has a thread
_OWN = {name: f"static/{name}" for name in ("review.html", "review.js", "review.css")}  # of this package
_OWN |= {f"review-{name}": f"static/{of}" for name, of in (("design.css", "atlas.css"), ("cyto.js", "cyto.js"))}
_OWN |= {"review-maps.js": "static/maps.js"}  # the same as of the atlas, which may be of another version
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
# Only the review page may send requests, only to this server; no page may load from other hosts or be framed
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; {connect}"
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Port, order of items, and what reviewers may see."""

    port: int = 8765  # 0: any that is free
    seed: int = 0  # of each reviewer's order of items
    shows_labels: bool = False  # show latents, datasets and labels in the review
    is_review_only: bool = False  # serve the review page only, not the atlas


class AtlasServer(ThreadingHTTPServer):
    """A server that is bound to its port; `serve_forever` answers requests."""

    daemon_threads = True  # an open connection does not keep the program from ending

    def __init__(self, site: Path, reviews: Path, review: Review, config: ServeConfig) -> None:
        """Bind to the port; the caller holds the lock of `reviews`."""
        self.named, self.site = site, site.resolve()  # as it was given, and the place that files are served from
        self.reviews, self.review, self.config = reviews, review, config
        self.token = secrets.token_hex(32)
        self._began: dict[Any, float] = {}  # open connection -> when it came
        self.writing = threading.Lock()
        try:
            super().__init__((HOST, config.port), _Handler)
        except OSError as error:
            raise BadInput(
                f"cannot listen on port {config.port} ({error.strerror}); choose another with --port"
            ) from None
        self.hosts = {f"{name}:{self.server_address[1]}" for name in (HOST, "localhost")}

    def server_bind(self) -> None:
        """As in http.server, but without the slow DNS look-up of this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def lines(self) -> Iterator[str]:
        """Where to look, what is asked, and where the verdicts go."""
        asked = ", ".join(f"{question.title} ({len(question.items):,})" for question in self.review.questions)
        yield f"{self.named}: {self.address}  review: {self.address}review.html  (Ctrl-C stops)"
        yield f"asked: {printable(asked) or 'nothing; the atlas was built without a selection and comparisons'}"
        yield f"verdicts: {self.reviews}"

    @property
    def address(self) -> str:
        """URL of the first page: the atlas, or the review if only that is served."""
        return f"http://{HOST}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; if too many connections are open, close this one."""
        if len(self._began) >= _MOST_CONNECTIONS:
            self.shutdown_request(request)
            return
        self._began[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Called at the end of each connection."""
        self._began.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second: close connections whose request takes too long."""
        for request, began in list(self._began.items()):
            if time.monotonic() - began > _LONGEST_REQUEST:
                with suppress(OSError):  # it has been closed meanwhile
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that the browser closed; show any other error, which is a bug."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def open_server(
    site: Path | str, reviews: Path | str | None = None, config: ServeConfig = ServeConfig()
) -> Iterator[AtlasServer]:
    """A server of the atlas in the folder `site` that keeps verdicts in the folder `reviews`.

    It listens on this machine only; `serve_forever` answers until it is interrupted.

    Parameters
    ----------
    reviews : None: `site`.reviews, beside the atlas

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch, DamagedStore
        If `site` is no atlas, or `reviews` holds what is no review.
    BadInput
        If another server uses `reviews`, or the port is in use.
    """
    site = Path(site)
    review = read_review(site)
    reviews = default_reviews(site) if reviews is None else Path(reviews)
    reviews.mkdir(parents=True, exist_ok=True)
    with locked(reviews / "serve.lock") as is_ours:
        if not is_ours:
            raise BadInput(f"another server is at work on {reviews}; use that one, or give --reviews another folder")
        read_verdicts(reviews)
        with AtlasServer(site, reviews, review, config) as server:
            try:
                yield server
            finally:
                server.writing.acquire()  # wait for a verdict that is being written; no later one is accepted


class _Refused(Exception):
    """A request that gets a status and one line instead of an answer."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: AtlasServer
    server_version, sys_version = "cyto", ""
    timeout = _TIMEOUT

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: object) -> None:
        """No log line per request."""

    # ------------------------------------------------------------------------------------------------- answers

    def _answer(self, make: Any) -> None:
        status = HTTPStatus.OK
        try:
            self._check_host()
            kind, body = make()
        except _Refused as refused:
            status, kind, body = refused.status, "text/plain; charset=utf-8", f"{refused}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        """Add our headers to every response, including errors that http.server sends."""
        connect = "connect-src 'self'; " if self._name() == "review.html" else ""
        self.send_header("Content-Security-Policy", _POLICY.format(connect=connect))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, f"open this atlas at {self.server.address}")

    def _get(self) -> tuple[str, bytes]:
        name = self._name()
        if name in _OWN:
            body = (files(__package__) / _OWN[name]).read_bytes()
            if name == "review.html":
                body = body.replace(b"TOKEN", self.server.token.encode())
        else:
            body = self._read(name)
        return _TYPES.get(Path(name).suffix, "application/octet-stream"), body

    def _name(self) -> str:
        """The requested path relative to the folder of the atlas; "" if it is not valid."""
        path = getattr(self, "path", "").partition("?")[0]
        try:
            name = unquote_to_bytes(path).decode()
        except UnicodeDecodeError:
            return ""
        if name == "/":
            return "review.html" if self.server.config.is_review_only else "index.html"
        return name[1:] if name.startswith("/") else ""

    def _read(self, name: str) -> bytes:
        """The content of a regular file of the atlas; no part of its path may be a link."""
        parts = name.split("/")
        is_plain = not any(part.startswith(".") or part == "" for part in parts) and not set(name) & {"\0", "\\", ":"}
        is_served = name != f"{REVIEW_FILE}.json" and (
            parts[0] == REVIEW_PICTURES or not self.server.config.is_review_only
        )
        path = self.server.site.joinpath(*parts)
        try:
            if is_plain and is_served and path.resolve() == path and path.is_file():
                return path.read_bytes()
        except (OSError, RuntimeError):  # a name too long, a file removed meanwhile, a loop of links
            pass
        raise _Refused(HTTPStatus.NOT_FOUND, "no such page in this atlas")

    # ---------------------------------------------------------------------------------------------------- posts

    def _post(self) -> tuple[str, bytes]:
        said = self._checked_body()
        answers = {"reviews/begin": self._begin, "reviews": self._save, "reviews/withdraw": self._withdraw}
        if self._name() not in answers:
            raise _Refused(HTTPStatus.NOT_FOUND, "nothing is taken here")
        try:
            found = answers[self._name()](said)
        except BadInput as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        except (CytoError, OSError) as error:
            _log.warning("%s", error)
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, f"NOT saved: {error}") from None
        return "application/json", json.dumps(found).encode()

    def _begin(self, said: dict[str, Any]) -> dict[str, Any]:
        """All questions for a reviewer, and the current verdicts of this reviewer."""
        server, reviewer = self.server, reviewer_name(said.get("reviewer"))
        with server.writing:
            verdicts = current(read_verdicts_of(server.reviews, reviewer))
        shown = ("verdict", "name", "notes", "confidence")
        config = server.config
        return {
            "reviewer": reviewer,
            "shows_labels": config.shows_labels,
            "has_atlas": not config.is_review_only,
            "questions": [
                sent(server.review, question, reviewer, seed=config.seed, shows_labels=config.shows_labels)
                for question in server.review.questions
            ],
            "verdicts": {
                item: {name: getattr(verdict, name) for name in shown} for (_, item), verdict in verdicts.items()
            },
        }

    def _save(self, said: dict[str, Any]) -> dict[str, Any]:
        verdict = new_verdict(said, self.server.review, is_blinded=not self.server.config.shows_labels)
        with self.server.writing:
            save_verdict(self.server.reviews, verdict)
        return {"saved": verdict.item, "time": verdict.time}

    def _withdraw(self, said: dict[str, Any]) -> dict[str, Any]:
        verdict = withdrawal(said, self.server.review, is_blinded=not self.server.config.shows_labels)
        with self.server.writing:
            save_verdict(self.server.reviews, verdict)
        return {"withdrawn": verdict.item, "time": verdict.time}

    def _checked_body(self) -> dict[str, Any]:
        if self.headers.get_all("Origin", []) != [f"http://{self.headers['Host']}"]:
            raise _Refused(HTTPStatus.FORBIDDEN, "only the review page of this server may do that")
        token = self.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "this page is from an earlier start of the server; load it again")
        if self.headers.get("Content-Type") != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(length) > 9 or int(length) > _LONGEST_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {_LONGEST_BODY:,} bytes")
        try:
            said = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return said
