"""Files get onto the disk whole: killed writers, torn lines, atomic replacement, one spelling for hashes."""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stores
from stores.errors import DamagedStore
from stores.files import (
    append_line,
    canonical_json,
    read_lines,
    readable_json,
    sha256_file,
    sha256_json,
    sweep_partials,
    sync_tree,
    write_atomic,
    write_json,
    write_lines,
)
from stores.runlog import append_run, read_runs

# Writes versions of one file and lines of one journal until it is killed; says "ready" now and then.
# The bare module `stores` spares ten imports of zarr and pyarrow: stores/files.py needs neither. Without waiting for
# the disk it is nearly always amid a write; SIGKILL does not need the wait, the system still has what was written.
WRITER = """
import os, sys, types
os.fsync = lambda descriptor: None
from pathlib import Path
sys.modules["stores"] = types.ModuleType("stores")
sys.modules["stores"].__path__ = [sys.argv[2]]
from stores.files import append_line, read_lines, write_atomic
root = Path(sys.argv[1])
n = len(read_lines(root / "journal.jsonl", mend=True))
while True:
    body = bytes([n % 256]) * (1 << 21)
    write_atomic(root / "file.bin", body[: 1 << 20], memoryview(body)[1 << 20 :])
    append_line(root / "journal.jsonl", {"n": n, "filling": "x" * 20_000})
    if n % 5 == 0:
        print("ready", flush=True)
    n += 1
"""


@pytest.mark.stress
def test_a_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    """SIGKILL at ten random moments: the file is one whole version, the journal is whole up to a torn last line."""
    package = Path(stores.__file__).parent
    moments, n_lines = random.Random(0), 0
    for _ in range(10):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, package], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.03))
        writer.kill()
        writer.wait()
        writer.stdout.close()

        body = (tmp_path / "file.bin").read_bytes()
        assert len(body) == 1 << 21
        assert body == body[:1] * len(body)
        records = read_lines(tmp_path / "journal.jsonl")
        assert [record["n"] for record in records] == list(range(len(records)))
        assert all(record["filling"] == "x" * 20_000 for record in records)
        assert len(records) > n_lines
        assert body[0] in {(len(records) - 1) % 256, len(records) % 256}  # killed after its line, or before
        n_lines = len(records)
        assert sweep_partials(tmp_path) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.bin", "journal.jsonl"]


def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path) -> None:
    """Cut at every byte: the lines before are read, and the next one is appended to whole lines."""
    path = tmp_path / "journal.jsonl"
    assert read_lines(path, mend=True) == []
    assert not path.exists()
    records: list[dict[str, Any]] = [{"chunk": 1, "errors": {"3": "not\nan image, \u2028 ü"}}, {"chunk": 2}]
    for record in records:
        append_line(path, record)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        expected = records[:1] if length >= first else []
        assert read_lines(path) == expected
        assert path.read_bytes() == whole[:length]  # reading changes nothing
        assert read_lines(path, mend=True) == expected
        append_line(path, {"chunk": 9})
        assert read_lines(path) == [*expected, {"chunk": 9}]


@pytest.mark.parametrize("line", [b"{]", b"", b"7", b'"text"', b"\xff"])
def test_any_other_broken_line_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b'{"chunk":1}\n' + line + b'\n{"chunk":3}\n')
    with pytest.raises(DamagedStore, match=r"line 2 of .*journal.jsonl is not a journal record \("):
        read_lines(tmp_path / "journal.jsonl")


def test_a_journal_written_at_once_is_the_one_that_was_appended(tmp_path: Path) -> None:
    records = [{"b": 1, "a": [None, "ü"]}, {}]
    for record in records:
        append_line(tmp_path / "appended", record)
    write_lines(tmp_path / "at once", records)
    assert (tmp_path / "at once").read_bytes() == (tmp_path / "appended").read_bytes()
    assert read_lines(tmp_path / "at once") == records


def test_the_run_log_survives_a_torn_line(tmp_path: Path) -> None:
    """The run after a crash must not glue its line to half of another: the log would be unreadable for ever."""
    append_run(tmp_path, packages=("numpy", "no-such-package"), device="cpu")
    path = tmp_path / "runs.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": "20')
    append_run(tmp_path, packages=("numpy",), device="cuda")
    runs = read_runs(tmp_path)
    assert [run["device"] for run in runs] == ["cpu", "cuda"]
    assert runs[0]["versions"]["no-such-package"] == "unknown"
    assert runs[0]["versions"].keys() >= {"python", "cyto", "numpy"}
    assert read_runs(tmp_path / "nowhere") == []


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a missing folder."""
    path = tmp_path / "file.json"
    write_json(path, {"a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "ü"\n}\n'

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left") as full:
            write_json(path, {"a": 2})
        with pytest.raises(OSError, match=r"No space left .*journal'"):
            append_line(tmp_path / "journal", {})
    assert full.value.filename == str(path), "the system does not say it"
    (tmp_path / "journal").unlink()
    assert path.read_text(encoding="utf-8") == '{\n "a": "ü"\n}\n'
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "file", b"")
    write_atomic(path, b"one ", memoryview(b"two"))
    assert path.read_bytes() == b"one two"


def test_only_partial_files_are_swept(tmp_path: Path) -> None:
    """In sub-folders too; not a folder of that name, nor a file that merely sounds like one."""
    (tmp_path / "sub.partial").mkdir()
    for name in ("a.0123.partial", "sub.partial/b.partial", "partial", "c.partial.txt"):
        (tmp_path / name).write_bytes(b"")
    assert sweep_partials(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c.partial.txt", "partial", "sub.partial"]
    sync_tree(tmp_path)


def test_a_value_has_one_spelling() -> None:
    """Identities are hashes of it: order of keys and of insertion do not matter, NaN is refused."""
    assert canonical_json({"b": [1, 2.5, None, True], "a": "ü\n"}) == '{"a":"ü\\n","b":[1,2.5,null,true]}'.encode()
    assert sha256_json({"a": 1, "b": {"d": 2, "c": 3}}) == sha256_json({"b": {"c": 3, "d": 2}, "a": 1})
    assert sha256_json({}) == hashlib.sha256(b"{}").hexdigest()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"tau": float("nan")})
    of_numpy = {"k": np.int64(3), "tau": np.float32(0.5), "latents": [np.uint16(7)], "exact": np.True_}
    of_python = {"k": 3, "tau": 0.5, "latents": [7], "exact": True}
    assert canonical_json(of_numpy) == canonical_json(of_python)
    assert readable_json(of_numpy) == readable_json(of_python)
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        canonical_json({"root": Path("x")})


def test_a_file_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    body = random.Random(1).randbytes((1 << 20) + 17)
    (tmp_path / "file").write_bytes(body)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(body).hexdigest()


def test_a_run_that_goes_on_elsewhere_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The result may then differ in the last bits; paths may differ without a word."""
    append_run(tmp_path, packages=("numpy",), device="cpu", threads=2, cache="a")
    append_run(tmp_path, packages=("numpy",), device="cpu", threads=2, cache="b")
    assert not caplog.records
    append_run(tmp_path, packages=("numpy",), device="cpu", threads=4, cache="b")
    assert "threads 2 against 4" in caplog.text
    assert [run["threads"] for run in read_runs(tmp_path)] == [2, 2, 4]
