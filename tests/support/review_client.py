"""What test_review_server.py and other tests share."""

import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from places import ROOT

from cytosae.atlas import ServeConfig, open_server
from cytosae.atlas.review_server import AtlasServer


@contextmanager
def running(site: Path, reviews: Path, **settings: Any) -> Iterator[AtlasServer]:
    with open_server(site, reviews, ServeConfig(port=0, **settings)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    """(status, body, headers) of one request; `Host_` and the like may be given as they are to be sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    sent = {"Host": f"127.0.0.1:{port}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body is not None:
        sent.setdefault("Content-Length", str(len(body)))
    for name, value in sent.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def post(port: int, path: str, content: Any, token: str, **headers: str) -> tuple[int, bytes, Any]:
    sent = {"Origin": f"http://127.0.0.1:{port}", "X_Cyto_Token": token, "Content_Type": "application/json", **headers}
    return ask(port, "POST", path, json.dumps(content).encode(), **{k: v for k, v in sent.items() if v is not None})


def token_of(port: int) -> str:
    (token,) = re.findall(rb'name="cyto-token" content="([0-9a-f]{64})"', ask(port, "GET", "/review.html")[1])
    return token.decode()


def start(site: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """`cyto atlas serve` as a process of its own, and its port."""
    command = [sys.executable, "-m", "cli", "atlas", "serve", str(site), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    first, asked, verdicts = (process.stdout.readline() for _ in range(3))
    assert asked.startswith("asked: Meaningful concepts (6), ")
    assert verdicts.startswith("verdicts: ")
    return process, int(re.findall(r"http://127\.0\.0\.1:(\d+)/", first)[0])
