"""`--weights hf:OWNER/NAME` against a real server on this machine that has a model, as Hugging Face would serve it."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from safetensors.torch import save
from tiny_models import FAMILIES

from cytocache import download
from cytocache.backbones import load_backbone
from cytocache.download import fetch_from_hub
from stores.errors import BadInput

NAME = "DinoBloom-S.pth"
CONTENT = np.random.default_rng(0).bytes(400_000)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "f" * 40


@dataclass
class Hub:
    """What it has and how it behaves; what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"README.md": b"# hello", NAME: CONTENT})
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "pr/1": LATER, COMMIT: COMMIT})
    lfs: dict[str, Any] = field(default_factory=dict)  # overrides
    small: dict[str, Any] = field(default_factory=dict)  # the same, of files that are no weights
    token: str = ""  # that small files ask for
    leaked: bool = False  # a token came where a redirect leads
    redirect: str = "/cdn/{file}"  # relative, or an address
    cut_after: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


class _Server(http.server.ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        hub.asked.append(self.path)
        if found := re.fullmatch(r"/api/models/marr/bloom/revision/(.+)", parts.path):
            commit = hub.revisions.get(found[1].replace("%2F", "/"))
            record = {"sha": commit, "siblings": [self.entry(name) for name in hub.files]}
            self.answer(200 if commit else 404, json.dumps(record).encode())
        elif found := re.fullmatch(rf"/marr/bloom/resolve/{COMMIT}/(.+\.json)", parts.path):
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer(401, b"")
            else:
                self.file(hub.files[found[1]])
        elif found := re.fullmatch(rf"/marr/bloom/resolve/{COMMIT}/(.+)", parts.path):
            self.answer(302, b"", Location=hub.redirect.format(file=found[1]))
        elif found := re.fullmatch(r"/cdn/(.+)", parts.path):
            hub.leaked |= "Authorization" in self.headers
            self.file(hub.files[found[1]])
        else:
            self.answer(404, b"")

    def entry(self, name: str) -> dict[str, Any]:
        hub, content = self.server.hub, self.server.hub.files[name]
        if not name.endswith((".pth", ".safetensors")):  # a small file is not kept apart: git's own hash
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return {"rfilename": name, "size": len(content), "blobId": blob, **hub.small}
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), **hub.lfs}
        return {"rfilename": name, "size": len(content), "lfs": lfs}

    def file(self, content: bytes) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if start else 200, content[start:], **({"Content-Range": span} if start else {}))

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "ETag": '"x"', **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        cuts = self.server.hub.cut_after
        self.wfile.write(body[: cuts.pop(0)] if cuts and len(body) > 10_000 else body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.hub.url)
        monkeypatch.setenv("CYTO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(download, "_DELAYS_S", (0.01, 0.01, 0.01))
        yield server.hub
        server.shutdown()
        thread.join()


def refusal(address: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as raised:
        fetch_from_hub(address, NAME)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "address", ["hf:marr/bloom", "hf:marr/bloom@main", f"hf:marr/bloom@{COMMIT}", f"hf:marr/bloom/{NAME}"]
)
def test_the_file_is_got_checked_and_named_by_its_commit(hub: Hub, tmp_path: Path, address: str) -> None:
    """Through a redirect and a lost connection; again by its commit, and without a network."""
    hub.cut_after = [150_000]
    found = fetch_from_hub(address, NAME)
    assert found.path == tmp_path / "cache" / "weights" / "hf" / "marr--bloom" / COMMIT / NAME
    assert found.path.read_bytes() == CONTENT
    assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert found.source == f"hf:marr/bloom/{NAME}@{COMMIT}"
    note = json.loads(found.path.with_name(f"{NAME}.json").read_text())
    assert (note["size"], note["sha256"], COMMIT in note["source"]) == (len(CONTENT), found.sha256, True)
    hub.asked.clear()
    assert fetch_from_hub(found.source, NAME) == fetch_from_hub(f"hf:marr/bloom@{COMMIT}", NAME) == found
    assert hub.asked == []


def test_a_branch_is_looked_up_each_time(hub: Hub) -> None:
    """What it is now decides; where nobody answers, the file that is here is named."""
    first = fetch_from_hub("hf:marr/bloom@main", NAME)
    hub.asked.clear()
    assert fetch_from_hub("hf:marr/bloom@main", NAME) == first
    assert hub.asked == ["/api/models/marr/bloom/revision/main?blobs=true"]
    hub.revisions.clear()
    refusal("hf:marr/bloom", rf"the server answers 404 .* already here: --weights {first.source}$")
    first.path.unlink()
    refusal("hf:marr/bloom", r"the server answers 404 .* --weights DinoBloom-S\.pth$")  # only its note is here


def test_a_file_that_is_named_is_not_replaced_by_the_usual_one(hub: Hub) -> None:
    hub.files["other.pth"] = CONTENT
    assert fetch_from_hub("hf:marr/bloom/other.pth@main", NAME).path.name == "other.pth"
    for revision in ("", "@main", f"@{COMMIT}"):
        refusal(f"hf:marr/bloom/typo.pth{revision}", "it has no file typo.pth")


def test_a_name_with_a_slash_is_one_revision(hub: Hub) -> None:
    hub.revisions["pr/1"] = COMMIT
    assert fetch_from_hub("hf:marr/bloom@pr/1", NAME).source == f"hf:marr/bloom/{NAME}@{COMMIT}"


def test_another_name_is_taken_if_it_is_the_only_one(hub: Hub) -> None:
    hub.files = {"b.pth": CONTENT, "README.md": b""}
    assert fetch_from_hub("hf:marr/bloom", NAME).path.name == "b.pth"
    hub.files["a.pth"] = b"x"
    refusal(
        "hf:marr/bloom", rf"expected {NAME}, or one file of weights; it has a.pth, b.pth; name one: hf:OWNER/NAME/FILE"
    )
    refusal("hf:marr/bloom/c.pth", "it has no file c.pth; its files of weights: a.pth, b.pth")
    assert fetch_from_hub("hf:marr/bloom/b.pth", NAME).path.name == "b.pth"


def test_a_name_that_leads_out_of_the_folder_is_not_taken(hub: Hub, tmp_path: Path) -> None:
    """The only file of weights is taken by the name that a server gives it."""
    for name in ("../../../evil.pth", "/evil.pth", "a/../../evil.pth", ".evil.pth", "e\x1b[2Jvil.pth"):
        hub.files = {name: CONTENT}
        refusal("hf:marr/bloom", f"expected {NAME}, or one file of weights; it has none")
    assert not [*tmp_path.rglob("*evil*")]
    hub.files = {"a/b.pth": CONTENT}
    assert fetch_from_hub("hf:marr/bloom", NAME).path.read_bytes() == CONTENT


def test_what_is_not_the_file_of_the_record_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.lfs = {"sha256": "0" * 64}
    refusal("hf:marr/bloom", "what came has the SHA-256 .*, expected 0{64} as published; it was deleted")
    assert not [*tmp_path.rglob("*.pth")]
    hub.lfs = {"sha256": "short"}
    refusal("hf:marr/bloom", r"expected the SHA-256 of .* \(64 hex digits\); found 'short'")


def test_the_file_may_come_from_elsewhere_only_safely(hub: Hub) -> None:
    hub.redirect = "http://example.org/{file}"
    refusal("hf:marr/bloom", "it leads to an address that is not https://")


@pytest.mark.parametrize(
    "address",
    [
        "hf:",
        "hf:bloom",
        "hf:marr/bloom@",
        "hf:marr/../x",
        "hf:marr/bloom/../../x",
        "hf:marr/bloom@../x",
        "hf:a/b?x=1",
        "hf:/a/b",
    ],
)
def test_what_is_no_address_is_refused_before_anybody_is_asked(hub: Hub, address: str) -> None:
    refusal(address, "expected weights hf:OWNER/NAME")
    assert hub.asked == []


def test_the_endpoint_must_be_safe(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://example.org")
    refusal("hf:marr/bloom", r"HF_ENDPOINT must be an https:// address \(http:// on this machine only\)")


MODEL = FAMILIES["DINOv3"]


def give_model(hub: Hub) -> bytes:
    """The hub has a model in timm's layout; its weights."""
    weights = save(MODEL.state())
    hub.files = {
        "README.md": b"# hello",
        "config.json": json.dumps(MODEL.config).encode(),
        "model.safetensors": weights,
        "pytorch_model.bin": b"this is not read",
    }
    return weights


def test_a_model_is_got_with_its_description_and_used_offline_by_its_commit(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = give_model(hub)
    backbone = load_backbone("hf-hub:marr/bloom", blocks=(-1,))
    assert backbone.layout == MODEL.layout
    assert backbone.name == "timm:vit_small_patch16_dinov3?depth=3&embed_dim=32&num_heads=2"
    assert backbone.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert backbone.weights_source == f"hf:marr/bloom/model.safetensors@{COMMIT}"
    assert not any("pytorch_model.bin" in asked for asked in hub.asked)
    hub.asked.clear()
    again = load_backbone(f"hf-hub:marr/bloom@{COMMIT}", blocks=(-1,))
    by_name = load_backbone(backbone.name, weights=backbone.weights_source, image_size=64)
    assert again.weights_sha256 == by_name.weights_sha256 == backbone.weights_sha256
    assert hub.asked == []
    assert not load_backbone(f"hf-hub:marr/bloom@{COMMIT}", weights="random").trained


def test_a_description_that_is_not_the_one_of_the_record_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    give_model(hub)
    hub.small = {"blobId": "0" * 40}
    with pytest.raises(BadInput, match=r"what came has the git hash .*, expected 0{40} as published; it was deleted"):
        load_backbone("hf-hub:marr/bloom")
    assert not [*tmp_path.rglob("config.json")]
    hub.small = {"size": 5 << 20}
    with pytest.raises(BadInput, match="expected a size of 1 to 4,194,304 bytes"):
        load_backbone("hf-hub:marr/bloom")
    del hub.files["config.json"]
    with pytest.raises(BadInput, match=r"it has no file config\.json"):
        load_backbone("hf-hub:marr/bloom")


def test_a_gated_model_asks_for_a_token_that_goes_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    give_model(hub)
    hub.token = "hf_secret"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(BadInput, match=r"answers 401 .* set HF_TOKEN to your access token") as raised:
        load_backbone("hf-hub:marr/bloom")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert load_backbone("hf-hub:marr/bloom").trained
    assert not hub.leaked
    assert hub.token not in str(raised.value)


def test_small_weights_may_not_come_from_elsewhere(hub: Hub) -> None:
    """Git's hash is no protection against another server's file."""
    hub.files = {"w.bin": b"x"}
    hub.redirect = "https://example.org/{file}"
    refusal("hf:marr/bloom", "it leads to another server")
