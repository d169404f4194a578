"""The server of an atlas, over real sockets: what it serves, what it takes, and whom it refuses."""

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from review_client import ask, post, running, start, token_of
from review_site import make_site

from cytosae.atlas import ServeConfig, open_server
from cytosae.atlas.review_server import AtlasServer
from cytosae.review import read_verdicts
from cytosae.review.verdicts import journal
from stores import BadInput


@pytest.fixture(scope="module")
def site(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    make_site(made, folder)
    return folder / "atlas"


@pytest.fixture
def server(site: Path, tmp_path: Path) -> Iterator[AtlasServer]:
    with running(site, tmp_path / "reviews") as server:
        yield server


def test_serves_the_atlas_and_the_review_page(server: AtlasServer, site: Path) -> None:
    port = server.server_port
    picture = next((site / "review").glob("*.jpg"))
    expected = {
        "/": ("text/html; charset=utf-8", (site / "index.html").read_bytes()),
        "/concepts/7.html?x=1": ("text/html; charset=utf-8", (site / "concepts" / "7.html").read_bytes()),
        f"/review/{picture.name}": ("image/jpeg", picture.read_bytes()),
        "/review.js": ("text/javascript; charset=utf-8", (ROOT / "cytosae/atlas/static/review.js").read_bytes()),
    }
    for path, (kind, body) in expected.items():
        status, found, headers = ask(port, "GET", path)
        assert (status, headers["Content-Type"], found) == (200, kind, body)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "connect-src" not in headers["Content-Security-Policy"], "no page of the atlas may send anything"
    status, page, headers = ask(port, "GET", "/review.html")
    assert status == 200
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert server.token.encode() in page
    assert b"TOKEN" not in page
    assert not [path for path in site.rglob("*") if path.is_file() and server.token.encode() in path.read_bytes()]
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port), timeout=2):
        pass


def test_paths_stay_inside(site: Path, tmp_path: Path) -> None:
    """Every way out, and links, folders, hidden files, the key of the review: 404 and one line."""
    site = Path(shutil.copytree(site, tmp_path / "atlas"))
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.html").write_text("secret")
    (site / "link.html").symlink_to(tmp_path / "secret.html")
    (site / "inner.html").symlink_to(site / "index.html")
    (site / "linked").symlink_to(tmp_path / "other")
    (site / "loop.html").symlink_to(site / "loop.html")
    (site / ".hidden").write_text("secret")
    os.mkfifo(site / "pipe.html")
    paths = [
        "/../secret.html",
        "/%2e%2e/secret.html",
        "/%2E%2E%2Fsecret.html",
        "/..%2fsecret.html",
        "/concepts/../../secret.html",
    ]
    paths += [f"/{tmp_path}/secret.html", f"{tmp_path}/secret.html", f"/%2f{tmp_path}/secret.html", "/..\\secret.html"]
    paths += [
        "/%5c..%5csecret.html",
        "/%252e%252e/secret.html",
        "/index.html%00.jpg",
        "/%00",
        "/index.html%ff",
        "/link.html",
    ]
    paths += [
        "/inner.html",
        "/linked/x.html",
        "/loop.html",
        "/.hidden",
        "/concepts",
        "/concepts/",
        "/pipe.html",
        "/./index.html",
    ]
    paths += [
        "/review.json",
        "/review%2ejson",
        "/reviews",
        "/atlas.reviews",
        "/nothing.html",
        f"/{'x' * 5000}",
        "/C:/x",
        "secret.html",
    ]
    paths += ["http://127.0.0.1/index.html", "*"]
    with running(site, tmp_path / "atlas.reviews") as server:
        for path in paths:
            status, body, headers = ask(server.server_port, "GET", path)
            assert (status, body) == (404, b"no such page in this atlas\n"), path
            assert headers["Content-Type"].startswith("text/plain")


def test_only_this_host_is_answered(server: AtlasServer) -> None:
    """A name of somebody else's that points here (DNS rebinding) gets nothing, on any path and method."""
    port = server.server_port
    assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"127.0.0.1:{port}.evil.example",
        "",
        f"[::1]:{port}",
    ):
        for path in ("/", "/review.html"):
            status, body, _ = ask(port, "GET", path, Host=host)
            assert status == 403, host
            assert body == f"open this atlas at http://127.0.0.1:{port}/\n".encode()
        assert post(port, "/reviews", {}, server.token, Host=host, Origin=f"http://{host}")[0] == 403
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example\r\n\r\n".encode())
        assert b" 403 " in raw.recv(100)
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"GET /\r\n\r\n")
        assert b"<!doctype" not in raw.recv(1000)


def test_only_the_page_of_this_start_may_write(server: AtlasServer, tmp_path: Path) -> None:
    port, token = server.server_port, token_of(server.server_port)
    item = server.review.questions[0].items[0].item
    good = {"reviewer": "Ada", "item": item, "verdict": "not", "name": "", "notes": ""}
    for path in ("/reviews", "/reviews/begin"):
        for origin in (
            None,
            "null",
            "http://evil.example",
            f"https://127.0.0.1:{port}",
            f"http://localhost:{port}",
            "http://127.0.0.1",
        ):
            status, body, _ = post(port, path, good, token, Origin=origin)  # type: ignore[arg-type]
            assert (status, body) == (403, b"only the review page of this server may do that\n"), origin
        for wrong in (None, "", "0" * 64, token[:-1], token.upper() + "\xe9"):
            status, body, _ = post(port, path, good, wrong)  # type: ignore[arg-type]
            assert (status, body) == (403, b"this page is from an earlier start of the server; load it again\n")
        assert post(port, path, good, token, Content_Type="text/plain")[0] == 415, "a form elsewhere could send that"
    assert ask(port, "OPTIONS", "/reviews", Origin="http://evil.example")[0] == 501
    assert not list((tmp_path / "reviews").glob("*.jsonl"))
    assert post(port, "/reviews", good, token)[0] == 200
    assert post(port, "/reviews", good, token, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    assert len(read_verdicts(tmp_path / "reviews")) == 2


def test_bodies_that_are_no_verdict(server: AtlasServer, tmp_path: Path) -> None:
    port, token = server.server_port, server.token
    headers = {"Origin": f"http://127.0.0.1:{port}", "X_Cyto_Token": token, "Content_Type": "application/json"}
    for body in (b"", b"{", b"[]", b"7", b"\xff", b"[" * 60_000, b'{"a":' * 10_000):
        status, found, _ = ask(port, "POST", "/reviews", body, **headers)
        assert (status, found) == (400, b"expected a JSON object\n")
    for length, status in (("-1", 411), ("1e3", 411), ("", 411), ("\u0663", 411), ("65537", 413), ("9" * 50, 413)):
        assert (
            ask(port, "POST", "/reviews", None, Content_Length=length.encode().decode("latin-1"), **headers)[0]
            == status
        )
    assert ask(port, "POST", "/reviews", None, Transfer_Encoding="chunked", **headers)[0] == 411
    status, found, _ = post(port, "/reviews", {"reviewer": "Ada", "item": "x"}, token)
    assert (status, found) == (400, b"this atlas does not ask about that item; load the page again\n")
    assert post(port, "/elsewhere", {}, token)[0] == 404
    assert not list((tmp_path / "reviews").glob("*.jsonl"))


def test_a_verdict_that_is_not_on_the_disk_is_not_called_saved(
    server: AtlasServer, tmp_path: Path, monkeypatch: Any
) -> None:
    good = {"reviewer": "Ada", "item": server.review.questions[0].items[0].item, "verdict": "not"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cytosae.review.verdicts.append_line", full)
    status, found, _ = post(server.server_port, "/reviews", good, server.token)
    assert status == 500
    assert found == b"NOT saved: [Errno 28] No space left on device\n"
    monkeypatch.undo()
    journal(tmp_path / "reviews", "Ada").write_text("nonsense\n")
    status, found, _ = post(server.server_port, "/reviews/begin", {"reviewer": "Ada"}, server.token)
    assert status == 500
    assert b"is not a journal record" in found


def test_reviewers_are_kept_apart_and_resume(server: AtlasServer) -> None:
    port, token = server.server_port, server.token
    begun = json.loads(post(port, "/reviews/begin", {"reviewer": " Ada  L. "}, token)[1])
    assert begun["reviewer"] == "Ada L."
    assert begun["verdicts"] == {}
    assert [question["title"] for question in begun["questions"]] == ["Meaningful concepts", "sick against well"]
    assert begun["questions"][1]["choices"] == ["a", "b", "neither", "unsure"]
    order = [item["item"] for item in begun["questions"][0]["items"]]
    said = {"verdict": "meaningful", "name": "granules", "notes": "n", "confidence": 4}
    assert post(port, "/reviews", {"reviewer": "Ada L.", "item": order[0], **said}, token)[0] == 200
    again = json.loads(post(port, "/reviews/begin", {"reviewer": "Ada L."}, token)[1])
    assert again["verdicts"] == {order[0]: said}
    assert [item["item"] for item in again["questions"][0]["items"]] == order
    assert json.loads(post(port, "/reviews/begin", {"reviewer": "Bob"}, token)[1])["verdicts"] == {}


def test_nothing_that_is_hidden_leaves_the_server(server: AtlasServer, site: Path) -> None:
    """Blinded: no label, dataset, list or decoy in what is sent. Pictures are named by hashes."""
    text = post(server.server_port, "/reviews/begin", {"reviewer": "Ada"}, server.token)[1].decode()
    for word in ("neutrophil", "lymphocyte", "decoy", "cluster", "other", "group", "rank", ".png"):
        assert word not in text, word
    assert {item["latent"] for question in json.loads(text)["questions"] for item in question["items"]} == {None}
    assert all(re.fullmatch(r"[0-9a-f]{32}\.jpg", path.name) for path in (site / "review").iterdir())


def test_review_only_and_labels(site: Path, tmp_path: Path) -> None:
    with running(site, tmp_path / "reviews", is_review_only=True, shows_labels=True) as server:
        port = server.server_port
        assert ask(port, "GET", "/concepts/7.html")[0] == ask(port, "GET", "/index.html")[0] == 404
        assert b"cyto-token" in ask(port, "GET", "/")[1]
        assert ask(port, "GET", f"/review/{next((site / 'review').iterdir()).name}")[0] == 200
        begun = json.loads(post(port, "/reviews/begin", {"reviewer": "Ada"}, server.token)[1])
        assert begun["shows_labels"]
        assert not begun["has_atlas"]
        item = begun["questions"][0]["items"][0]
        assert isinstance(item["latent"], int)
        assert item["rows"][0]["title"] in ("images", "other")
        post(port, "/reviews", {"reviewer": "Ada", "item": item["item"], "verdict": "not"}, server.token)
    (verdict,) = read_verdicts(tmp_path / "reviews")
    assert not verdict.is_blinded


def test_a_second_server_is_refused(server: AtlasServer, site: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(BadInput, match=r"another server is at work on .*reviews; use that one, or give --reviews"),
        running(site, tmp_path / "reviews"),
    ):
        pass
    with (
        pytest.raises(BadInput, match=rf"cannot listen on port {server.server_port} .*choose another with --port"),
        open_server(site, tmp_path / "other", ServeConfig(port=server.server_port)),
    ):
        pass


@pytest.mark.stress
def test_a_killed_server_loses_nothing(site: Path, tmp_path: Path) -> None:
    """kill -9 right after the answer: the verdict is there, the folder is free again, the old page is told so."""
    site = Path(shutil.copytree(site, tmp_path / "atlas"))
    process, port = start(site)
    try:
        token = token_of(port)
        items = json.loads(post(port, "/reviews/begin", {"reviewer": "Ada"}, token)[1])["questions"][0]["items"]
        for item in items[:2]:
            assert post(port, "/reviews", {"reviewer": "Ada", "item": item["item"], "verdict": "not"}, token)[0] == 200
    finally:
        process.kill()
        process.communicate()
    process, port = start(site)
    try:
        assert post(port, "/reviews/begin", {"reviewer": "Ada"}, token)[0] == 403
        again = json.loads(post(port, "/reviews/begin", {"reviewer": "Ada"}, token_of(port))[1])
        assert set(again["verdicts"]) == {item["item"] for item in items[:2]}
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert len(read_verdicts(tmp_path / "atlas.reviews")) == 2
    assert "stopped" in out
    assert err == ""


def test_slow_and_many_connections_end(server: AtlasServer, monkeypatch: Any) -> None:
    """One that sends a byte now and then is cut off; with too many open, the next is closed; others are answered."""
    monkeypatch.setattr("cytosae.atlas.review_server._MOST_CONNECTIONS", 3)
    monkeypatch.setattr("cytosae.atlas.review_server._LONGEST_REQUEST", 0.8)
    port = server.server_port
    waiting = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(2)]
    began = time.monotonic()
    with suppress(OSError):  # closed while we send
        while time.monotonic() - began < 5:
            waiting[0].sendall(b"G")
            assert ask(port, "GET", "/review.css")[0] == 200
            time.sleep(0.1)
    assert 0.7 < time.monotonic() - began < 3
    assert [each.recv(10) for each in waiting] == [b"", b""]
    waiting += [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(4)]
    assert waiting[-1].recv(10) == b""
    assert time.monotonic() - began < 4, "closed at once"
    monkeypatch.undo()
    assert ask(port, "GET", "/review.css")[0] == 200
    for each in waiting:
        each.close()


def test_a_silent_connection_ends(server: AtlasServer, monkeypatch: Any) -> None:
    """Also one that promised a body."""
    monkeypatch.setattr("cytosae.atlas.review_server._Handler.timeout", 0.2)
    port = server.server_port
    head = f"POST /reviews HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
    head += f"X-Cyto-Token: {server.token}\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
    for said in (b"", b"GET / HT", head.encode()):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            raw.sendall(said)
            assert raw.recv(100) == b""
