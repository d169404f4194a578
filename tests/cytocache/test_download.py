"""`--weights auto` against a real server on this machine that cuts, lies, changes its mind, and counts its bytes."""

import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import _lively_state, _published, _timm

from cytocache import download
from cytocache.backbones import load_backbone
from cytocache.download import cache_folder, fetch_published, record_url
from stores.errors import BadInput

NAME = "DinoBloom-S.pth"
CONTENT = np.random.default_rng(0).bytes(3_000_000)


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@dataclass
class Site:
    """What the server has, how it behaves, and what it was asked and sent."""

    url: str
    content: bytes = CONTENT
    etag: str = '"one"'
    entry: dict[str, Any] = field(default_factory=dict)  # overrides in the record's entry
    shape: Callable[[dict[str, Any]], Any] = lambda entry: {"id": 1, "files": [{"key": "DinoBloom-B.pth"}, entry]}
    record: bytes | None = None  # instead of all that
    cut_after: list[int] = field(default_factory=list)  # per request of the file: bytes, then the connection ends
    statuses: list[int] = field(default_factory=list)  # per request of the file: answer this instead
    headers: dict[str, str] = field(default_factory=dict)  # overrides
    ranges: bool = True
    redirect: str = ""
    pause_s: float = 0
    piece: int = 1 << 16
    asked: list[str] = field(default_factory=list)  # Range header of each request of the file
    n_records: int = 0
    n_sent: int = 0

    @property
    def record_url(self) -> str:
        return f"{self.url}/api/records/1"

    def json(self) -> bytes:
        entry = {
            "id": "b0-1",
            "key": NAME,
            "size": len(self.content),
            "checksum": f"md5:{_md5(self.content)}",
            "links": {"self": f"{self.url}/api/records/1/files/{NAME}/content"},
            **self.entry,
        }
        return json.dumps(self.shape(entry)).encode() if self.record is None else self.record


class _Server(http.server.ThreadingHTTPServer):
    site: Site
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site = self.server.site
        if self.path == "/api/records/1":
            site.n_records += 1
            self.answer(200, site.json(), {})
        elif self.path.endswith("/moved"):
            self.file(site)
        elif self.path.endswith("/content"):
            if site.redirect:
                self.answer(302, b"", {"Location": site.redirect})
            else:
                self.file(site)
        else:
            self.answer(404, b"", {})

    def file(self, site: Site) -> None:
        asked = self.headers.get("Range", "")
        site.asked.append(asked)
        if site.statuses and (status := site.statuses.pop(0)):
            self.answer(status, b"sorry", {"Retry-After": "0"})
            return
        start, status = 0, 200
        if asked and site.ranges and self.headers.get("If-Range", site.etag) == site.etag:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        headers = {"ETag": site.etag}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(site.content) - 1}/{len(site.content)}"
        self.answer(status, site.content[start:], {**headers, **site.headers}, cut=site.cut_after)

    def answer(self, status: int, body: bytes, headers: dict[str, str], cut: list[int] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if cut:
            body = body[: cut.pop(0)]
        site = self.server.site
        for at in range(0, len(body), site.piece):
            self.wfile.write(body[at : at + site.piece])
            if cut is not None:
                site.n_sent += len(body[at : at + site.piece])
                time.sleep(site.pause_s)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    """A running server; the download goes there, keeps its files under tmp_path and does not wait between tries."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.site = Site(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("CYTO_WEIGHTS_RECORD", server.site.record_url)
        monkeypatch.setenv("CYTO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there: this machine needs no proxy
        monkeypatch.setattr(download, "_DELAYS_S", (0.01, 0.01, 0.01))
        monkeypatch.setattr(download, "_LOCK_POLL_S", 0.01)
        yield server.site
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights"


def _assert_got(site: Site, folder: Path) -> None:
    """The whole file is there, under its name, and nothing of the way there."""
    found = fetch_published(NAME)
    assert found.path == folder / NAME
    assert found.path.read_bytes() == site.content
    assert found.sha256 == hashlib.sha256(site.content).hexdigest()
    assert {path.name for path in folder.iterdir()} == {NAME, f"{NAME}.json", f"{NAME}.lock"}


def _refusal(words: str) -> str:
    with pytest.raises(BadInput, match=words) as raised:
        fetch_published(NAME)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 900
    return str(raised.value)


class TestWhole:
    @pytest.mark.parametrize(
        "shape",
        [
            lambda entry: {"files": [{"key": "DinoBloom-B.pth"}, entry]},
            lambda entry: {
                "files": {
                    "enabled": True,
                    "entries": {
                        NAME: {**entry, "links": {"content": entry["links"]["self"], "self": "http://127.0.0.1/meta"}},
                        "other": {"key": "other"},
                    },
                }
            },
        ],
        ids=["Zenodo", "InvenioRDM"],
    )
    def test_both_shapes_of_record_lead_to_the_file_and_progress_is_told(
        self, site: Site, folder: Path, shape: Callable[[dict[str, Any]], Any]
    ) -> None:
        site.shape = shape
        told: list[tuple[int, int, str]] = []
        fetch_published(NAME, progress=lambda *state: told.append(state))
        assert told[0] == (0, len(CONTENT), "")
        assert told[-1] == (len(CONTENT), len(CONTENT), "checking")
        assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
        assert len(told) > 10
        _assert_got(site, folder)

    def test_the_second_use_needs_no_network_and_no_right_to_write(self, site: Site, folder: Path) -> None:
        _assert_got(site, folder)
        assert (site.n_records, site.n_sent) == (1, len(CONTENT))
        site.statuses, site.record = [500] * 9, b""
        (folder / f"{NAME}.lock").unlink()
        folder.chmod(0o500)
        try:
            assert fetch_published(NAME).path.read_bytes() == CONTENT
        finally:
            folder.chmod(0o700)
        assert (site.n_records, site.n_sent) == (1, len(CONTENT))
        assert not (folder / f"{NAME}.lock").exists()

    def test_the_note_says_what_was_checked(self, site: Site, folder: Path) -> None:
        fetch_published(NAME)
        assert json.loads((folder / f"{NAME}.json").read_text()) == {
            "file": NAME,
            "size": len(CONTENT),
            "md5": _md5(CONTENT),
            "source": site.record_url,
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
        }

    @pytest.mark.parametrize("damage", ["one byte", "length", "gone", "note gone", "note torn", "note of another"])
    def test_what_has_changed_since_is_noticed(self, site: Site, folder: Path, damage: str) -> None:
        path = fetch_published(NAME).path
        note = folder / f"{NAME}.json"
        if damage == "one byte":
            path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
            _refusal(rf"{NAME} has changed since it was downloaded and checked: its SHA-256 was .* Delete it and run")
            path.unlink()
        elif damage == "length":
            path.write_bytes(CONTENT + b"x")
            _refusal(rf"{NAME} has changed .* now it is of another file, 3,000,001 bytes long")
            path.unlink()
        elif damage == "gone":
            path.unlink()
        elif damage == "note gone":
            note.unlink()
        elif damage == "note torn":
            note.write_text(note.read_text()[:40])
        else:
            note.write_text(note.read_text().replace("/records/1", "/records/2"))
        n_sent = site.n_sent
        _assert_got(site, folder)
        kept = damage.startswith("note")  # the file was compared with the record again, not loaded again
        assert site.n_sent - n_sent == (0 if kept else len(CONTENT))
        assert site.n_records == 2

    def test_a_file_put_there_by_hand_is_checked_against_the_record(self, site: Site, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / NAME).write_bytes(b"something else")
        _refusal(rf"{NAME} is not {NAME} of http://.*: its MD5 is {_md5(b'something else')}, expected .* Move it away")
        assert (folder / NAME).read_bytes() == b"something else"
        (folder / NAME).write_bytes(CONTENT)
        _assert_got(site, folder)
        assert site.n_sent == 0

    def test_a_redirect_on_the_same_server_is_followed(self, site: Site, folder: Path) -> None:
        site.redirect = "/somewhere/moved"
        _assert_got(site, folder)


class TestResume:
    def test_lost_connections_are_taken_up_again_where_they_ended(self, site: Site, folder: Path) -> None:
        site.cut_after = [500_000, 0, 700_000]
        _assert_got(site, folder)
        assert site.asked == ["", "bytes=500000-", "bytes=500000-", "bytes=1200000-"]
        assert site.n_sent == len(CONTENT)

    def test_after_too_many_the_command_ends_and_the_next_one_goes_on(self, site: Site, folder: Path) -> None:
        site.cut_after = [100_000] * 4
        message = _refusal(
            rf"cannot get {NAME} from {site.record_url}: the connection ended after 400,000 of 3,000,000 bytes "
            rf"\(4 tries\). 400,000 bytes are kept: run the same command again to go on. "
            rf"By hand: get it from Zenodo record 10908163 .* give it with --weights {NAME}"
        )
        assert len(message) < 500
        assert (folder / f"{NAME}.part").stat().st_size == 400_000
        _assert_got(site, folder)
        assert site.n_sent == len(CONTENT)

    def test_a_try_that_brings_much_starts_the_count_anew(
        self, site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "_PROGRESS", 300_000)
        site.cut_after = [300_000] * 9
        _assert_got(site, folder)
        assert len(site.asked) == 10

    def test_a_killed_process_leaves_what_the_next_one_takes_up(self, site: Site, folder: Path) -> None:
        """Twice SIGKILL mid-download; what is lost each time is at most what was on its way."""
        site.pause_s, part = 0.02, folder / f"{NAME}.part"
        for wanted in (500_000, 1_500_000):
            code = f"from cytocache.download import fetch_published; fetch_published({NAME!r})"
            with subprocess.Popen([sys.executable, "-c", code]) as process:
                deadline = time.monotonic() + 60
                while (not part.exists() or part.stat().st_size < wanted) and time.monotonic() < deadline:
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
            assert wanted <= part.stat().st_size < len(CONTENT)
        n_kept = part.stat().st_size
        site.pause_s, site.asked = 0, []
        before = site.n_sent
        _assert_got(site, folder)
        assert site.asked == [f"bytes={n_kept}-"]
        assert site.n_sent - before <= len(CONTENT) - n_kept + 2 * site.piece  # two may still go to the dead

    def _half(self, site: Site, n_bytes: int = 1_000_000) -> None:
        """A first run that ends with `n_bytes` in the part."""
        site.cut_after = [n_bytes, 0, 0, 0, 0]
        _refusal("the connection ended")
        site.cut_after, site.asked, site.n_sent = [], [], 0

    def test_a_part_that_is_whole_is_only_checked(self, site: Site, folder: Path) -> None:
        self._half(site)
        (folder / f"{NAME}.part").write_bytes(CONTENT)
        _assert_got(site, folder)
        assert site.asked == []

    @pytest.mark.parametrize("way", ["longer than the file", "of another file", "without its note", "note torn"])
    def test_a_part_that_does_not_belong_is_not_continued(self, site: Site, folder: Path, way: str) -> None:
        self._half(site)
        part, note = folder / f"{NAME}.part", folder / f"{NAME}.part.json"
        if way == "longer than the file":
            part.write_bytes(bytes(len(CONTENT) + 1))
        elif way == "of another file":
            site.content = CONTENT[::-1]
        elif way == "without its note":
            note.unlink()
        else:
            note.write_text("[")
        _assert_got(site, folder)
        assert site.asked == [""]

    def test_a_server_without_ranges_sends_it_all(self, site: Site, folder: Path) -> None:
        self._half(site)
        site.ranges = False
        _assert_got(site, folder)
        assert (site.asked, site.n_sent) == (["bytes=1000000-"], len(CONTENT))

    def test_a_file_with_a_new_etag_is_not_glued_to_the_old_part(self, site: Site, folder: Path) -> None:
        """If-Range makes an honest server start over; one that ignores it is found out by its answer's ETag."""
        self._half(site)
        site.etag = '"two"'
        _assert_got(site, folder)
        assert site.n_sent == len(CONTENT)

    @pytest.mark.parametrize(
        "headers",
        [
            {"ETag": '"other"'},
            {"Content-Range": f"bytes 999999-{len(CONTENT) - 1}/{len(CONTENT)}"},
            {"Content-Range": f"bytes 1000000-{len(CONTENT) - 1}/{len(CONTENT) + 5}"},
            {"Content-Range": "bytes 1000000-2000000/3000000"},
            {"Content-Range": ""},
        ],
    )
    def test_an_answer_that_does_not_go_on_exactly_there_makes_it_start_over(
        self, site: Site, folder: Path, headers: dict[str, str]
    ) -> None:
        self._half(site)
        site.headers = headers
        _assert_got(site, folder)
        assert site.asked == ["bytes=1000000-", ""]

    def test_a_refused_range_makes_it_start_over(self, site: Site, folder: Path) -> None:
        self._half(site)
        site.statuses = [416]
        _assert_got(site, folder)
        assert site.asked == ["bytes=1000000-", ""]

    def test_a_server_in_trouble_is_asked_again(self, site: Site, folder: Path) -> None:
        site.statuses = [503, 429, 500]
        _assert_got(site, folder)
        assert len(site.asked) == 4


class TestTwoAtOnce:
    def test_threads_and_processes_get_one_download(self, site: Site, folder: Path) -> None:
        site.pause_s = 0.005
        code = f"from cytocache.download import fetch_published; print(fetch_published({NAME!r}).sha256)"
        processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in "ab"]
        told: list[str] = []
        with ThreadPoolExecutor(2) as threads:
            ours = threads.map(
                lambda _: fetch_published(NAME, progress=lambda done, total, state: told.append(state)).sha256, "ab"
            )
            digests = {*ours, *(process.communicate()[0].strip() for process in processes)}
        assert digests == {hashlib.sha256(CONTENT).hexdigest()}
        assert site.n_sent == len(CONTENT)
        assert "another process downloads it; waiting" in told


class TestRefused:
    def test_a_wrong_checksum_deletes_the_download_and_says_so(self, site: Site, folder: Path) -> None:
        site.entry = {"checksum": "md5:" + "0" * 32}
        _refusal(f"what came has the MD5 {_md5(CONTENT)}, expected {'0' * 32} as published; it was deleted")
        assert {path.name for path in folder.iterdir()} == {f"{NAME}.lock"}
        site.entry = {}
        _assert_got(site, folder)

    def test_a_file_swapped_between_two_requests_never_counts(self, site: Site, folder: Path) -> None:
        """Same size, same ETag, other bytes: only the checksum can tell."""
        site.cut_after = [1_000_000, 0, 0, 0, 0]
        _refusal("the connection ended")
        good = site.json()
        site.record, site.content, site.cut_after = good, CONTENT[::-1], []
        _refusal("what came has the MD5")
        assert not (folder / NAME).exists()
        site.content = CONTENT
        _assert_got(site, folder)

    @pytest.mark.parametrize("n_more", [-1, 1])
    def test_another_size_than_the_records_is_refused_before_the_download(
        self, site: Site, folder: Path, n_more: int
    ) -> None:
        site.entry = {"size": len(CONTENT) + n_more}
        _refusal(f"the server has 3000000 bytes, the record says {len(CONTENT) + n_more:,}")
        assert not (folder / f"{NAME}.part").exists()

    def test_a_body_without_end_is_cut_at_the_records_size(self, site: Site, folder: Path) -> None:
        """The server gives no length and just goes on."""
        site.entry, site.headers = {"size": 1_000_000}, {"Content-Length": ""}
        _refusal("the server sends more than the 1,000,000 bytes of the record")
        assert not (folder / f"{NAME}.part").exists()

    @pytest.mark.parametrize("where", ["http://127.0.0.2:1/x", "https://127.0.0.1/x", "//evil.example/x", "ftp://a/b"])
    def test_a_redirect_elsewhere_is_refused(self, site: Site, where: str) -> None:
        site.redirect = where
        _refusal("it leads to another server, .*, which is not followed|answers 302")

    def test_a_redirect_in_circles_ends(self, site: Site) -> None:
        site.redirect = f"/api/records/1/files/{NAME}/content"
        _refusal("answers 302")

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_a_final_answer_is_not_asked_again(self, site: Site, status: int) -> None:
        site.statuses = [status] * 4
        _refusal(f"the server answers {status}")
        assert len(site.asked) == 1

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            ({"size": 0}, "expected a size of 1 to .* found 0"),
            ({"size": 1 << 60}, "expected a size of 1 to"),
            ({"size": True}, "expected a size of 1 to"),
            ({"size": "3000000"}, "expected a size of 1 to"),
            ({"checksum": None}, "expected a checksum"),
            ({"checksum": "md5:../../etc"}, "expected a checksum"),
            ({"checksum": "sha1:" + "0" * 40}, "expected a checksum"),
            ({"key": f"../{NAME}"}, "it lists 0 files of this name among 2"),
            ({"links": None}, "on the record's own server; found None"),
            ({"links": {"self": "http://127.0.0.1:1/x"}}, "on the record's own server"),
            ({"links": {"self": "file:///etc/passwd"}}, "on the record's own server"),
            ({"links": {"self": "http://[::1/x"}}, "on the record's own server"),
            ({"links": {"self": "http://127.0.0.1:99999999/x"}}, "on the record's own server"),
        ],
    )
    def test_a_record_that_asks_for_something_odd_is_refused(
        self, site: Site, folder: Path, entry: dict[str, Any], words: str
    ) -> None:
        site.entry = entry
        _refusal(f"the record cannot be used: .*{words}")
        assert not list(folder.glob("*.part*"))
        assert site.asked == []

    @pytest.mark.parametrize(
        "record",
        [b"", b"<html>", b"[]", b'{"files": 3}', b'{"files": {"entries": 3}}', b"[" * 100_000, b"\xff\xfe", b"{}"],
    )
    def test_what_is_no_record_is_refused(self, site: Site, record: bytes) -> None:
        site.record = record
        _refusal("the record cannot be used")

    def test_a_record_without_end_is_refused(self, site: Site) -> None:
        site.record = b" " * (5 << 20)
        _refusal("this is no record: more than 4,194,304 bytes")

    def test_the_same_name_twice_is_refused(self, site: Site) -> None:
        site.shape = lambda entry: {"files": [entry, entry]}
        _refusal("it lists 2 files of this name among 2")

    def test_words_of_the_server_cannot_reach_the_terminal(self, site: Site) -> None:
        site.entry = {"checksum": "\x1b[2J\nhello"}
        _refusal("expected a checksum")


class TestNoNetwork:
    def test_nobody_there_is_one_line_with_the_way_by_hand(
        self, site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket() as taken:  # bound, not listening
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/api/records/1"
            monkeypatch.setenv("CYTO_WEIGHTS_RECORD", url)
            _refusal(
                rf"cannot get {NAME} from {url}: .*refused \(4 tries\). By hand: get it from Zenodo record 10908163 "
                rf"\(doi .*\) and give it with --weights {NAME}"
            )

    def test_a_name_that_does_not_resolve(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*args: Any, **kwargs: Any) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", fails)
        monkeypatch.delenv("CYTO_WEIGHTS_RECORD")
        monkeypatch.delenv("http_proxy")
        for key in [key for key in os.environ if key.lower().endswith("_proxy")]:
            monkeypatch.delenv(key)
        _refusal(rf"cannot get {NAME} from https://zenodo.org/api/records/10908163: .*Name or service not known")

    def test_a_silent_server_times_out(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download, "_TIMEOUT_S", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("CYTO_WEIGHTS_RECORD", f"http://127.0.0.1:{silent.getsockname()[1]}/api/records/1")
            _refusal(r"timed out \(4 tries\)")

    def test_a_dripping_server_counts_as_lost(self, site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download, "_WINDOW_S", 0.1)
        site.piece, site.pause_s = 1, 0.01
        _refusal(r"only \d+ bytes came in 0 s \(4 tries\)")
        site.piece, site.pause_s = 1 << 16, 0
        _assert_got(site, folder)

    @pytest.mark.parametrize(
        "url",
        [
            "http://example.org/api/records/1",
            "ftp://127.0.0.1/x",
            "file:///etc/passwd",
            "zenodo",
            "https://",
            "https://a@b/",
        ],
    )
    def test_a_record_must_come_over_https_or_from_this_machine(
        self, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        monkeypatch.setenv("CYTO_WEIGHTS_RECORD", url)
        with pytest.raises(BadInput, match=r"must be an https:// address \(http:// on this machine only\); found"):
            record_url()

    def test_a_folder_that_cannot_be_written_names_the_way_out(
        self, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("CYTO_CACHE", str(tmp_path / "file"))
        _refusal(f"cannot keep {NAME} in .*set CYTO_CACHE to a folder with space")

    def test_a_full_disk_is_told_before_the_download(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = type("Usage", (), {"free": 1_000})
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        _refusal("3,000,000 bytes are needed, 1,000 are free.*; set CYTO_CACHE")
        assert site.asked == []


class TestCacheFolder:
    def test_the_platforms_place(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("CYTO_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(sys, "platform", "linux")
        assert cache_folder() == tmp_path / ".cache" / "cyto"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "cyto"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_folder() == tmp_path / ".cache" / "cyto"
        monkeypatch.setattr(sys, "platform", "darwin")
        assert cache_folder() == tmp_path / "Library" / "Caches" / "cyto"
        monkeypatch.setenv("CYTO_CACHE", str(tmp_path / "mine"))
        assert cache_folder() == tmp_path / "mine"

    def test_a_user_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        for name in ("CYTO_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", no_home)
        with pytest.raises(BadInput, match=r"this user has no home .* set CYTO_CACHE to a folder"):
            cache_folder()


class TestLoad:
    @pytest.mark.stress
    def test_auto_is_the_published_file(self, site: Site, folder: Path, tmp_path: Path) -> None:
        torch.save(_published(_lively_state(_timm("dinobloom-s"))), tmp_path / "x.pth")
        site.content = (tmp_path / "x.pth").read_bytes()
        told: list[int] = []
        ours = load_backbone("dinobloom-s", weights="auto", progress=lambda done, total, state: told.append(done))
        by_hand = load_backbone("dinobloom-s", weights=str(tmp_path / "x.pth"))
        assert told[-1] == len(site.content)
        assert ours.trained
        assert ours.weights_sha256 == by_hand.weights_sha256 == hashlib.sha256(site.content).hexdigest()
        pixels = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
        with torch.inference_mode():
            assert torch.equal(ours.tokens(pixels)[0], by_hand.tokens(pixels)[0])
        n_records = site.n_records
        load_backbone("dinobloom-s", weights="auto")
        assert site.n_records == n_records

    def test_a_checked_file_is_still_not_trusted(self, site: Site) -> None:
        """The record vouches for the bytes, not for what is in them."""
        with pytest.raises(BadInput, match="expected a DinoBloom checkpoint"):
            load_backbone("dinobloom-s", weights="auto")

    def test_a_wrong_block_is_told_before_the_download(self, site: Site) -> None:
        with pytest.raises(BadInput, match="--block must be -12 to 11; found 12"):
            load_backbone("dinobloom-s", weights="auto", blocks=(12,))
        assert site.n_records == 0

    def test_the_untrained_backbone_has_nothing_to_download(self, site: Site) -> None:
        with pytest.raises(BadInput, match="random-vit-tiny is untrained and takes no --weights; found 'auto'"):
            load_backbone("random-vit-tiny", weights="auto")
