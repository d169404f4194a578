"""Two commands that write the same place: the second is told who is at it, touches nothing, leaves nothing."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stores.destination import claimed, plan_output
from stores.errors import SpecMismatch
from stores.files import locked
from stores.result_folder import begin_results
from stores.spec import COMPARISON, write_header

pytestmark = pytest.mark.stress

HOLD = """
import sys, time
from pathlib import Path
from stores.destination import plan_output
from stores.result_folder import begin_results
from stores.spec import COMPARISON
writer = begin_results(Path(sys.argv[1]), COMPARISON, {"a": "1"}, overwrite="--overwrite" in sys.argv)
print("held", flush=True)
sys.stdin.readline()
writer.write_json("numbers", [1])
writer.finish({})
"""


def other(target: Path, *options: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", HOLD, str(target), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def begin(target: Path, *, overwrite: bool = False) -> object:
    return begin_results(target, COMPARISON, {"a": "2"}, overwrite=overwrite)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_second_is_told_and_the_first_ends_as_if_alone(tmp_path: Path) -> None:
    """Also where both replace something, and whatever settings the second has; nothing is left beside the results."""
    target = tmp_path / "new" / "out"
    for options in ((), ("--overwrite",)):
        process = other(target, *options)
        before = contents(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(SpecMismatch, match=rf"being written by another process \(process {process.pid} on "):
                begin(target, overwrite=overwrite)
        assert contents(tmp_path) == before
        process.communicate(b"\n")
        assert process.returncode == 0
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        assert {path.name for path in target.iterdir()} == {"comparison.json", "numbers.json", "runs.jsonl"}


def test_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    process = other(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".out.lock").exists()
    writer = begin_results(tmp_path / "out", COMPARISON, {"a": "1"})
    writer.finish({})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_lets_go(tmp_path: Path) -> None:
    """Even while a traceback keeps the writer: this thread may begin again, another may not before."""
    kept = begin(tmp_path / "out")
    found = []

    def try_it() -> None:
        try:
            begin(tmp_path / "out")
        except SpecMismatch as error:
            found.append(str(error))

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    assert f"process {os.getpid()} on " in found[0]
    again = begin(tmp_path / "out")
    del kept  # must not let go what is now the other's
    assert (tmp_path / ".out.lock").exists()
    del again
    assert not (tmp_path / ".out.lock").exists()


def test_sharing(tmp_path: Path) -> None:
    """Those that share are many, and shut out one that wants it alone; the last one removes the file."""
    lock = tmp_path / "x.lock"
    with locked(lock, shared=True) as first:
        with locked(lock, shared=True) as second, locked(lock) as alone:
            assert (first, second, alone) == (True, True, False)
        assert lock.exists()
        with locked(lock) as alone:
            assert not alone
    assert not lock.exists()
    with locked(lock), locked(lock, shared=True) as second:
        assert not second


def test_a_lock_of_another_user_can_be_taken(tmp_path: Path) -> None:
    """Left by a kill, and not to be written to."""
    lock = tmp_path / ".out.lock"
    lock.touch(mode=0o444)
    with claimed(tmp_path / "out"), pytest.raises(SpecMismatch, match="being written by"), claimed(tmp_path / "out"):
        pass
    assert not lock.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_in_somebody_elses_folder(tmp_path: Path) -> None:
    target = tmp_path / "theirs" / "mine"
    target.mkdir(parents=True)
    target.parent.chmod(0o555)
    try:
        with claimed(target), pytest.raises(SpecMismatch, match="being written by"), claimed(target):
            pass
        writer = begin_results(target, COMPARISON, {"a": "1"})
        writer.finish({})
        assert {path.name for path in target.iterdir()} == {"comparison.json", "runs.jsonl"}
        target.chmod(0o555)
        assert begin_results(target, COMPARISON, {"a": "1"}).is_complete
    finally:
        target.chmod(0o755)
        target.parent.chmod(0o755)


def test_a_refused_place_is_not_touched(tmp_path: Path) -> None:
    inside = begin_results(tmp_path / "out", COMPARISON, {"a": "1"})
    write_header(inside.root, inside.header)
    with pytest.raises(SpecMismatch, match="lies inside a comparison"):
        plan_output(tmp_path / "out" / "sub" / "x", inside.header)
    assert not (tmp_path / "out" / "sub").exists()
