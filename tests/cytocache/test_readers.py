"""Reader processes: every image at its place, whatever a decoder does to its process, and nothing left behind.

What a decoder does here is patched into the child through a `sitecustomize.py` on PYTHONPATH, chosen by a word that
stands behind the image's own bytes.
"""

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytocache.images import read_image
from cytocache.preprocess import Preprocess
from cytocache.readers import ImageReaders, ReadPictures
from stores.errors import CytoError

SIZE = 8  # pixels along each side after resizing
IN_CHILD = """
import ctypes, os, signal, sys, time
if "cytocache.read_worker" in " ".join(sys.orig_argv):
    from PIL import Image
    real = Image.open
    def open(file, *args, **kwargs):
        _, _, word = file.getvalue().rpartition(b"do:")
        if word == b"segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif word == b"exit":
            os._exit(3)
        elif word == b"hang":
            ctypes.PyDLL(None).sleep(100)  # in C, and without letting the interpreter go
        elif word == b"wait":
            time.sleep(0.05)
        elif word == b"print":
            print("loud words", flush=True)
            print('["0", null]', flush=True)
            os.write(1, b"loud words\\n" * 9000)  # more than a pipe holds
        elif word.startswith(b"once "):
            try:
                os.close(os.open(word[5:], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGSEGV)
        return real(file, *args, **kwargs)
    Image.open = open
"""
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into Linux's /proc")


@pytest.fixture
def in_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `sitecustomize.py` of reader processes; a test may add to it."""
    folder = tmp_path / "in_child"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(IN_CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder / "sitecustomize.py"


def draw(path: Path, seed: int, word: str = "") -> Path:
    """A noisy image, no two alike, after which the decoder is told what to do."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 5, 12, 3), np.uint8)
    Image.fromarray(pixels).save(path, format="bmp")  # what stands behind a PNG never reaches the decoder
    path.write_bytes(path.read_bytes() + (f"do:{word}".encode() if word else b""))
    return path


def twin(paths: list[Path]) -> ReadPictures:
    """The same, one after the other, in this process."""
    read = [read_image(path) for path in paths]
    pixels = [
        np.zeros((SIZE, SIZE, 3), np.uint8) if picture is None else Preprocess(size=SIZE).resize(picture)
        for picture, _, _ in read
    ]
    return ReadPictures(np.stack(pixels), [content for _, content, _ in read], [error for _, _, error in read])


def assert_same(found: ReadPictures, expected: ReadPictures) -> None:
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.content_hash == expected.content_hash
    assert found.errors == expected.errors


def children(process: int | str = "self") -> set[int]:
    """Its child processes, zombies included."""
    return {
        int(child) for file in Path(f"/proc/{process}/task").glob("*/children") for child in file.read_text().split()
    }


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def resources() -> tuple[set[int], int, int]:
    """Child processes, open files, maps of the pixels' shared memory."""
    gc.collect()
    n_maps = Path("/proc/self/maps").read_text().count("cyto-pixels")
    return children(), len(list(Path("/proc/self/fd").iterdir())), n_maps


# ------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("n_workers", "batch_size"), [(1, 4), (5, 7), (2, 50)])
def test_every_image_is_at_its_place(n_workers: int, batch_size: int, in_child: Path, tmp_path: Path) -> None:
    """With more workers than batches and the reverse; some images take longer, some cannot be read at all."""
    rng = random.Random(n_workers)
    paths = [draw(tmp_path / f"{n}.png", n, rng.choice(["", "", "wait"])) for n in range(45)]
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    paths[17].unlink()
    paths[18] = tmp_path
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    n_seen = 0
    with ImageReaders(n_workers, batch_size=batch_size, size=SIZE) as readers:
        for found, batch in zip(readers.read(iter(batches)), batches, strict=True):
            if rng.random() < 0.3:
                time.sleep(0.05)  # the readers run ahead, and must not overwrite this batch
            assert_same(found, twin(batch))
            n_seen += len(batch)
    assert n_seen == 45


def test_any_name_that_a_file_system_allows_is_read(tmp_path: Path) -> None:
    """New line, quotes, other alphabets, bytes that are not UTF-8."""
    names = ["new\nline", 'qu"o\\te', "ünï😀", "\u2028", os.fsdecode(b"caf\xe9\xff"), " "]
    paths = [draw(tmp_path / name, seed) for seed, name in enumerate(names)]
    batch = [path for path in paths for path in (path, path.with_name(f"no {path.name}"))]
    with ImageReaders(1, batch_size=12, size=SIZE) as readers:
        (found,) = readers.read([batch])
        assert_same(found, twin(batch))
    assert found.errors == [None, "no such file"] * 6


def test_no_images_no_batches() -> None:
    with ImageReaders(2, batch_size=3, size=SIZE) as readers:
        assert list(readers.read([])) == []


# -------------------------------------------------------------------------------------------- what decoders do


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("segv", "cannot be decoded: the decoder crashed (SIGSEGV)"),
        ("exit", "cannot be decoded: the decoder crashed (exit code 3)"),
        ("hang", "cannot be decoded: not done after 1 seconds"),
    ],
)
@pytest.mark.stress
def test_an_image_that_brings_its_process_down_costs_only_itself(
    word: str, error: str, in_child: Path, tmp_path: Path
) -> None:
    """First, last, two in a row; each other image is read, and an earlier batch's pixels are not left in its place."""
    bad = {0, 1, 11} if word == "segv" else {5}
    first = [draw(tmp_path / f"first{n}.png", 50 + n) for n in range(12)]
    paths = [draw(tmp_path / f"{n}.png", n, word if n in bad else "") for n in range(12)]
    # this process, which has not been patched, reads them all
    batches = [first] * 8 + [paths] + [first]
    with ImageReaders(1, batch_size=12, size=SIZE, seconds_per_image=1) as readers:
        *_, found, after = ((p.pixels.copy(), p.content_hash, p.errors) for p in readers.read(batches))
    expected = twin(paths)
    assert found[2] == [error if n in bad else None for n in range(12)]
    assert found[1] == [None if n in bad else expected.content_hash[n] for n in range(12)]
    expected.pixels[sorted(bad)] = 0
    np.testing.assert_array_equal(found[0], expected.pixels)
    assert after[2] == [None] * 12


def test_a_process_that_dies_once_costs_nothing(in_child: Path, tmp_path: Path) -> None:
    """A node short of memory: the image is innocent, and read by the next process."""
    paths = [draw(tmp_path / f"{n}.png", n, f"once {tmp_path}/mark{n}" if n in (0, 5) else "") for n in range(8)]
    with ImageReaders(1, batch_size=8, size=SIZE) as readers:
        (found,) = readers.read([paths])
        assert_same(found, twin(paths))
    assert len(list(tmp_path.glob("mark*"))) == 2


@pytest.mark.stress
@linux
def test_processes_killed_from_outside_are_replaced(in_child: Path, tmp_path: Path) -> None:
    """All of them, between two batches: whether idle or at work."""
    paths = [draw(tmp_path / f"{n}.png", n, "wait") for n in range(6)]
    before, killed = children(), set[int]()
    with ImageReaders(2, batch_size=6, size=SIZE) as readers:
        for number, found in enumerate(readers.read([paths] * 8)):
            assert_same(found, twin(paths))
            if number == 2:
                for process in children() - before:
                    os.kill(process, signal.SIGKILL)
                    killed.add(process)
    assert len(killed) == 2


def test_what_a_library_prints_is_no_answer(in_child: Path, tmp_path: Path) -> None:
    """While Python starts, from Python and from C; even if it looks like an answer."""
    in_child.write_text(in_child.read_text() + "\nprint('welcome', flush=True)\n")
    paths = [draw(tmp_path / f"{n}.png", n, "print") for n in range(5)]
    with ImageReaders(2, batch_size=2, size=SIZE) as readers:
        for found, batch in zip(readers.read([paths[:2], paths[2:4]]), [paths[:2], paths[2:4]], strict=True):
            assert_same(found, twin(batch))


def test_a_process_that_cannot_start_is_one_clean_error(in_child: Path, tmp_path: Path) -> None:
    in_child.write_text("import sys\nsys.modules['PIL'] = None\n")
    words = "a process that reads images did not start: ModuleNotFoundError: import of PIL halted"
    with ImageReaders(2, batch_size=2, size=SIZE) as readers, pytest.raises(CytoError, match=words):
        next(readers.read([[draw(tmp_path / "a.png", 1)]]))
    in_child.write_text("import os, sys\nos._exit(0)\n")
    with ImageReaders(1, batch_size=2, size=SIZE) as readers, pytest.raises(CytoError, match=r"did not start: \?"):
        next(readers.read([[draw(tmp_path / "a.png", 1)]]))


@pytest.mark.parametrize("pythonpath", [None, "", "elsewhere"])
def test_nothing_is_imported_from_the_current_folder(
    pythonpath: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the folder of somebody's images, with somebody's numpy.py in it."""
    for name in ("numpy", "json", "PIL", "cytocache", "stores"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if pythonpath is not None:
        monkeypatch.setenv("PYTHONPATH", pythonpath)
    paths = [draw(tmp_path / "a.png", 1)]
    with ImageReaders(1, batch_size=1, size=SIZE) as readers:
        assert_same(next(readers.read([paths])), twin(paths))
    assert not (tmp_path / "imported").exists()


# ------------------------------------------------------------------------------------------- nothing left behind


class Mistake(BaseException):
    """Like Ctrl-C, it is no `Exception`."""


@pytest.mark.stress
@linux
@pytest.mark.parametrize("how", ["end", "error", "hung", "at once"])
def test_no_process_file_or_memory_is_left(how: str, in_child: Path, tmp_path: Path) -> None:
    """After the last batch, after an exception, with a decoder that hangs, before anything was read."""
    paths = [
        draw(tmp_path / f"{n}.png", n, "hang" if how == "hung" and n > 3 else "segv" if n == 1 else "")
        for n in range(8)
    ]
    before = resources()

    def use() -> None:
        with ImageReaders(3, batch_size=2, size=SIZE, seconds_per_image=30) as readers:
            assert len(children()) == len(before[0]) + 3
            if how == "at once":
                return
            for number, _ in enumerate(readers.read(paths[start : start + 2] for start in (0, 2, 4, 6))):
                if how == "hung" and number == 1:
                    break
                if how == "error" and number == 1:
                    raise Mistake

    began = time.monotonic()
    if how == "error":
        with pytest.raises(Mistake):
            use()
    else:
        use()
    assert resources() == before
    assert time.monotonic() - began < 10  # nobody waited for the decoder that hangs


PARENT = """
import sys, time
from pathlib import Path
from cytocache.readers import ImageReaders
paths = [Path(path) for path in sys.argv[1:]]
with ImageReaders(3, batch_size=1, size=8, seconds_per_image=1) as readers:
    for pictures in readers.read([path] for path in paths):
        print("one", flush=True)
        time.sleep(0.2)
"""


@pytest.mark.stress
@linux
@pytest.mark.parametrize("word", ["", "hang"])
def test_when_the_parent_is_killed_the_children_end_by_themselves(word: str, in_child: Path, tmp_path: Path) -> None:
    """Idle, at work, or hung in a decoder, which does not see that nobody listens any more."""
    paths = [draw(tmp_path / f"{n}.png", n, word if n else "") for n in range(6)]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *map(str, paths)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"one\n"
    readers = children(parent.pid)
    assert len(readers) == 3
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 6
    while any(is_alive(process) for process in readers) and time.monotonic() < until:
        time.sleep(0.02)
    left = [process for process in readers if is_alive(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []


@pytest.fixture
def slow_start(in_child: Path) -> None:
    """Reader processes need half a second before they can say what a signal means to them."""
    wait = "\nif 'cytocache.read_worker' in ' '.join(sys.orig_argv): time.sleep(0.7)\n"
    in_child.write_text(in_child.read_text() + wait)


@pytest.mark.stress
@linux
@pytest.mark.usefixtures("slow_start")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_for_the_whole_group_is_for_the_parent_alone(number: int, tmp_path: Path) -> None:
    """Even while the readers start. It ends what is in flight, says how to go on, and leaves nobody behind."""
    (tmp_path / "cells").mkdir()
    for n in range(6):
        draw(tmp_path / "cells" / f"{n}.png", n, "wait")
    store = tmp_path / "a.zarr"
    command = ["-c", "import cli; cli.main()", "cache", "extract", str(tmp_path / "cells"), str(store)]
    options = ["--block", "0", "--chunk-images", "1", "--batch-size", "1", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, *command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(readers := children(process.pid)) < 2 and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.3)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "\nfinishing the chunk in flight; Ctrl-C again stops at once and loses it\n" in stderr
    assert stderr.endswith("\ninterrupted; run the same command again to continue\n")
    assert len((store / "journal-0-of-1.jsonl").read_text().splitlines()) == 1
    assert not any(is_alive(reader) for reader in readers)
    assert not [path for path in store.rglob("*") if path.suffix in (".partial", ".lock")]
    shutil.rmtree(store)
