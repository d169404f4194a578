"""Several writers of one activation cache: together they make the very bytes that one would have made.

Most of it runs the writer itself, whose chunks are of a hundred bytes, in forked processes that end without a word at
chosen system calls; the rest runs whole extractions.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artefacts import cache_spec, cache_tokens, contents, manifest, outcome, write_cache, write_latents
from click.testing import CliRunner, Result
from kills import KILLED, die_at, exit_code, forked
from PIL import Image

from cli import cli
from cytocache.datasets import Images, open_images
from cytocache.extract import ExtractConfig, extract
from stores import activation_writer, files
from stores.activation_spec import chunk_path
from stores.activation_store import ActivationStore
from stores.activation_writer import ActivationWriter, complete_cache, overlapping_writer, writer_lock
from stores.errors import BadInput, IncompleteStore, StoreNotFound
from stores.files import locked
from stores.runlog import read_runs
from stores.shards import ONE_WRITER, Shard
from stores.spec import ACTIVATIONS, read_header
from stores.verify import verify_activations

CHUNKS = {"chunk_images": 2}  # five of them


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the tiny cache that one writer made."""
    root = tmp_path_factory.mktemp("single") / "acts.zarr"
    write(root, ONE_WRITER)
    return contents(root)


def write(root: Path, shard: Shard, n_chunks: int | None = None) -> bool | None:
    """Begin or continue a shard, and say whether it completed the cache; n: so many chunks, then walk away."""
    root.mkdir(exist_ok=True)
    with locked(writer_lock(root, shard)) as is_ours:
        assert is_ours
        writer = ActivationWriter(root, cache_spec(**CHUNKS), manifest(), shard)
        tokens, table = cache_tokens(), outcome()
        hashes, errors = table["content_hash"].to_pylist(), table["error"].to_pylist()
        for chunk in writer.missing_chunks()[:n_chunks]:
            some = slice(chunk * 2, chunk * 2 + 2)
            writer.write_chunk(chunk, tokens[some], hashes[some], errors[some])
        return writer.finish() is not None if n_chunks is None else None


# ------------------------------------------------------------------------------------------------- which chunks


def test_shards_own_disjoint_chunks_that_together_are_all() -> None:
    """Also more shards than chunks: then some have nothing to do."""
    for n_chunks, count in itertools.product((0, 1, 2, 7, 64, 163), (1, 2, 3, 5, 64, 200)):
        owned = [Shard(index, count).chunks(n_chunks) for index in range(count)]
        assert [*itertools.chain(*owned)] == [*range(n_chunks)]
        assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize(
    "text", ["", "1", "0/0", "2/2", "-1/2", "0/-1", "1/2/3", "a/b", "0.0/2", "\u0660/\u0662x", " 0/2", "0/9999999"]
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"shard must be I/N, for instance 0/4; found|counts I from 0 to N - 1; found"):
        Shard.parse(text)
    assert Shard.parse("3/12") == Shard(3, 12)


# -------------------------------------------------------------------------------- the same bytes as one writer


@pytest.mark.stress
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_in_any_order_the_last_one_completes_the_cache(count: int, single: dict[str, bytes], tmp_path: Path) -> None:
    orders = [*itertools.permutations(range(count))]
    for number, order in enumerate(random.Random(0).sample(orders, min(6, len(orders)))):
        root = tmp_path / str(number)
        n_missing = {*range(5)}
        for index in order:
            n_missing -= {*Shard(index, count).chunks(5)}
            assert write(root, Shard(index, count)) is (not n_missing), order
            if n_missing:
                with pytest.raises(IncompleteStore):
                    ActivationStore(root)
        for index in order[::-1]:  # those that own no chunk may come behind the end
            assert write(root, Shard(index, count)) is True
        assert contents(root) == single, order
    assert not [problem for problem in verify_activations(root) if problem]


def test_interrupted_shards_are_continued_and_a_lost_one_is_made_by_others(
    single: dict[str, bytes], tmp_path: Path
) -> None:
    """By the same shard again, by one of another N, by a single writer; nothing is made twice."""
    for number, rescue in enumerate(
        [[Shard(1, 3)], [Shard(1, 2), Shard(0, 2)], [ONE_WRITER], [Shard(1, 5), Shard(2, 5)]]
    ):
        root = tmp_path / str(number)
        write(root, Shard(2, 3), 1)
        write(root, Shard(0, 3))
        write(root, Shard(1, 3), 1)
        write(root, Shard(2, 3))
        (root / "journal-1-of-3.jsonl").write_bytes((root / "journal-1-of-3.jsonl").read_bytes()[:-9])  # torn
        made = {path: path.stat().st_mtime_ns for path in (root / "tokens").rglob("0/0")}
        lost = chunk_path(root, 1)
        results = [write(root, shard) for shard in rescue]
        assert results[-1] is True
        assert contents(root) == single
        assert {path for path, when in made.items() if path.stat().st_mtime_ns != when} <= {lost}


def test_the_run_log_names_every_shard(tmp_path: Path) -> None:
    """In one file at the end, in the order of time."""
    from stores.runlog import append_run

    root = tmp_path / "acts.zarr"
    for index in (1, 0, 2):
        write(root, Shard(index, 3), 0)
        append_run(root, packages=("numpy",), shard=Shard(index, 3), device="cpu")
        write(root, Shard(index, 3))
    assert sorted(path.name for path in root.iterdir() if path.name.startswith("runs")) == ["runs.jsonl"]
    assert sorted(run["shard"] for run in read_runs(root)) == ["0/3", "1/3", "2/3"]


# ------------------------------------------------------------------------------------------------- at the same time


@pytest.mark.stress
def test_processes_that_start_at_the_same_moment_share_nothing(single: dict[str, bytes], tmp_path: Path) -> None:
    """On an empty place, to the end: whoever is last completes the cache, and no one stumbles over another."""
    for number in range(8):
        root, start = tmp_path / str(number), time.time() + 0.1

        def job(index: int, root: Path = root, start: float = start) -> None:
            time.sleep(max(0, start - time.time()))
            root.mkdir(exist_ok=True)
            write(root, Shard(index, 4))

        processes = [forked(lambda index=index: job(index)) for index in range(4)]  # type: ignore[misc]
        assert [exit_code(process) for process in processes] == [0] * 4
        assert contents(root) == single


def test_a_file_that_another_writer_was_quicker_with_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile it may have become the header of a complete cache. Nor is a swept partial file the end."""
    real, path = files.write_atomic, tmp_path / "zarr.json"

    def write_atomic(partial: Path, *pieces: bytes) -> None:
        real(partial, *pieces)
        path.write_bytes(b"complete")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", write_atomic)
        assert not files.write_new(path, b"begun")
    assert path.read_bytes() == b"complete"
    assert [*tmp_path.iterdir()] == [path]

    swept: list[Path] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        if not swept:
            swept.extend(tmp_path.glob("*.partial"))
            files.sweep_partials(tmp_path)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert len(swept) == 1
    assert [*tmp_path.iterdir()] == [path]


def test_who_finishes_while_another_looks_in_vain_still_completes_the_cache(
    single: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one had looked for all chunks before the last was there, and still holds the finishing lock."""
    root, looked, go_on = tmp_path / "acts.zarr", threading.Event(), threading.Event()
    real = activation_writer.written_records

    def slow(root: Path, spec: Any, chunks: range, **kwargs: Any) -> Any:
        found = real(root, spec, chunks, **kwargs)
        if len(chunks) == 5 and not looked.is_set():
            looked.set()
            assert go_on.wait(20)
        return found

    monkeypatch.setattr(activation_writer, "written_records", slow)
    results: list[bool | None] = []
    first = threading.Thread(target=lambda: results.append(write(root, Shard(0, 2))))
    first.start()
    assert looked.wait(20)
    assert complete_cache(root) is None  # as `cyto cache merge` does, which then says so
    threading.Timer(0.3, go_on.set).start()
    assert write(root, Shard(1, 2)) is True
    first.join()
    assert results == [False]
    assert contents(root) == single


def test_a_writer_of_overlapping_chunks_is_seen_while_it_is_at_work(tmp_path: Path) -> None:
    (tmp_path / "writer-nobody.lock").touch()
    writer_lock(tmp_path, Shard(0, 3)).touch()  # of a killed one
    for held in (Shard(1, 2), Shard(0, 7), ONE_WRITER):
        with locked(writer_lock(tmp_path, held)):
            for shard in (ONE_WRITER, *(Shard(index, 3) for index in range(3)), held):
                overlap = shard != held and bool({*held.chunks(5)} & {*shard.chunks(5)})
                assert overlapping_writer(tmp_path, shard, 5) == (held if overlap else None), (held, shard)
        assert overlapping_writer(tmp_path, ONE_WRITER if held != ONE_WRITER else Shard(0, 2), 5) is None


# ------------------------------------------------------------------------------------------------- killed, anywhere


def kill_everywhere(root: Path, shard: Shard, prepare: Callable[[Path], object], every: int) -> Iterator[Path]:
    """Stores whose writer of `shard` was killed at one call after another, until it came to its end."""
    for n_calls in itertools.count(random.randrange(every), every):
        store = root / str(n_calls)
        prepare(store)

        def job(store: Path = store, n_calls: int = n_calls) -> None:
            die_at(n_calls)
            write(store, shard)

        code = exit_code(forked(job))
        assert code in (0, KILLED)
        yield store
        shutil.rmtree(store)
        if code == 0:
            assert n_calls > 20
            return


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_call_and_continued_equals_uninterrupted(
    every: int, single: dict[str, bytes], tmp_path: Path
) -> None:
    """A single writer, from its first folder to its last rename."""
    for store in kill_everywhere(tmp_path, ONE_WRITER, lambda store: None, every):
        header = read_header(store, ACTIVATIONS, complete=False) if (store / "zarr.json").exists() else None
        if header is None or not header.complete:
            with pytest.raises((IncompleteStore, StoreNotFound)):
                ActivationStore(store)
        write(store, ONE_WRITER)
        assert contents(store) == single


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_last_shard_that_is_killed_is_continued_or_merged(
    every: int, single: dict[str, bytes], tmp_path: Path
) -> None:
    """By itself, by another shard that had long ended, by a single writer, or by `cyto cache merge`."""

    def prepare(store: Path) -> None:
        write(store, Shard(0, 3))
        write(store, Shard(1, 3))

    for number, store in enumerate(kill_everywhere(tmp_path, Shard(2, 3), prepare, every)):
        if number % 4 == 0:
            try:
                complete_cache(store)
            except IncompleteStore:
                write(store, Shard(2, 3))
        elif number % 4 == 1:
            if not write(store, Shard(0, 3)):
                write(store, Shard(2, 3))
        else:
            write(store, Shard(2, 3) if number % 4 == 2 else ONE_WRITER)
        assert contents(store) == single


# ---------------------------------------------------------------------------------------------- whole extractions


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five noisy images, one of them torn."""
    root = tmp_path_factory.mktemp("data") / "cells"
    root.mkdir()
    for n in range(5):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (20, 20, 3), np.uint8)).save(root / f"{n}.png")
    (root / "3.png").write_bytes((root / "3.png").read_bytes()[:100])
    return root


def config(**changes: Any) -> ExtractConfig:
    """Three chunks, the last one short."""
    settings: dict[str, Any] = {"blocks": (0,), "chunk_images": 2, "batch_size": 2, "workers": 1, **changes}
    return ExtractConfig(**settings)


@pytest.fixture(scope="module")
def whole(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks 0 and 2 of `cells`, each extracted alone by one writer; read-only."""
    root = tmp_path_factory.mktemp("whole")
    for block in (0, 2):
        extract(open_images(cells), root / f"block{block}.zarr", config(blocks=(block,)))
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["cache", *map(str, arguments)])


def assert_one_line(result: Result, words: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)  # handled, not escaped
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_two_blocks_by_four_shards_equal_each_block_by_one_writer(cells: Path, whole: Path, tmp_path: Path) -> None:
    """More shards than chunks, several blocks in one pass, any order; each shard says what it did."""
    done = {}
    for index in (2, 0, 3, 1):
        done[index] = extract(open_images(cells), tmp_path / "acts", config(blocks=(2, 0)), shard=Shard(index, 4))
    assert done.pop(1).is_complete
    assert [(index, d.n_readable, d.n_unreadable, d.is_complete) for index, d in done.items()] == [
        (2, 1, 1, False),
        (0, 0, 0, False),
        (3, 1, 0, False),
    ]
    for block in (0, 2):
        assert contents(tmp_path / "acts" / f"block{block}.zarr") == contents(whole / f"block{block}.zarr")
        assert len(read_runs(tmp_path / "acts" / f"block{block}.zarr")) == 4
    assert sorted(path.name for path in (tmp_path / "acts").iterdir()) == ["block0.zarr", "block2.zarr"]


def test_one_block_of_two_that_is_complete_is_not_made_again(cells: Path, whole: Path, tmp_path: Path) -> None:
    """Nor touched; an interrupted one beside it is continued."""
    store = tmp_path / "acts" / "block0.zarr"
    shutil.copytree(whole / "block0.zarr", store)
    before = {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]}
    extract(open_images(cells), tmp_path / "acts", config(blocks=(0, 2)))
    assert {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]} == before
    assert contents(tmp_path / "acts" / "block2.zarr") == contents(whole / "block2.zarr")


def test_blocks_of_one_pass_that_lack_different_chunks(cells: Path, whole: Path, tmp_path: Path) -> None:
    """Each is given what it lacks, and only that."""
    images, stop = open_images(cells), iter([False, False, True]).__next__
    with pytest.raises(KeyboardInterrupt):
        extract(images, tmp_path / "acts", config(blocks=(0, 2)), stop=stop)
    kept = chunk_path(tmp_path / "acts" / "block0.zarr", 1)
    when = kept.stat().st_mtime_ns
    for block, chunk in [(0, 0), (2, 1)]:
        chunk_path(tmp_path / "acts" / f"block{block}.zarr", chunk).unlink()
    extract(images, tmp_path / "acts", config(blocks=(0, 2)))
    for block in (0, 2):
        assert contents(tmp_path / "acts" / f"block{block}.zarr") == contents(whole / f"block{block}.zarr")
    assert kept.stat().st_mtime_ns == when


@pytest.mark.slow
def test_real_processes_started_together(cells: Path, tmp_path: Path) -> None:
    """Two at the same moment on an empty place, and a third that is a shard too many: it is refused in one line."""
    options = ["--block", "0", "--chunk-images", "1", "--batch-size", "1", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import cli; cli.main()", "cache", "extract", str(cells)]
    begun = [
        subprocess.Popen(
            [*command, str(tmp_path / store), *options, *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for store, more in [("a.zarr", ["--shard", "0/2"]), ("a.zarr", ["--shard", "1/2"]), ("one.zarr", [])]
    ]
    said = [process.communicate(timeout=120) for process in begun]
    assert [process.returncode for process in begun] == [0, 0, 0], said
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "one.zarr")
    shard_lines = [stdout for stdout, _ in said[:2]]
    assert any("5 images x 257 tokens x 192 channels, block 0" in line for line in shard_lines)
    words = "is done, {} images; other shards are not. The last one completes the store"
    assert all(words.format(2 + n) in line or "5 images x" in line for n, line in enumerate(shard_lines))


def test_the_same_shard_or_one_that_overlaps_is_refused_while_it_is_written(cells: Path, tmp_path: Path) -> None:
    store, options = tmp_path / "a.zarr", ["--block", 0, "--chunk-images", 2, "--workers", 1]
    result = run("extract", cells, store, *options, "--shard", "0/4")
    assert (result.exit_code, f"{store}: shard 0/4 is done, 0 images; other" in result.stdout) == (0, True)
    with locked(writer_lock(store, Shard(0, 2))):
        for more in (["--shard", "0/2"], [], ["--shard", "1/3"]):
            result = run("extract", cells, store, *options, *more)
            if more == ["--shard", "1/3"]:
                assert result.exit_code == 0, result.output  # chunk 1 of three is not the chunk of 0/2
                assert f"{store}: shard 1/3 is done, 2 images; other shards are not." in result.stdout
            else:
                assert_one_line(result, f"another process is writing shard 0/2 of {store} at this moment; wait until")
    with locked(writer_lock(store, ONE_WRITER)):
        for more in ([], ["--shard", "1/2"]):
            result = run("extract", cells, store, *options, *more)
            assert_one_line(result, f"another process is writing {store} at this moment; wait until it ends")
    assert run("extract", cells, store, *options).exit_code == 0
    assert_one_line(run("extract", cells, store, "--shard", "2/2"), "shard I/N counts I from 0 to N - 1; found 2/2")
    assert_one_line(
        run("extract", cells, store, "--shard", "0/2", "--overwrite"), "a shard cannot overwrite what other"
    )
    assert run("extract", cells, store, *options, "--shard", "5/9").exit_code == 0  # complete: nothing to do


def test_a_killed_shard_leaves_no_lock(cells: Path, whole: Path, tmp_path: Path) -> None:
    """The lock file stays, the lock does not; and at the end the file is gone as well, even behind the last step."""
    store = tmp_path / "block0.zarr"
    code = "import sys, time\nfrom pathlib import Path\nfrom stores.files import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    store.mkdir()
    for name in ("writer-0-of-1.lock", "finish.lock"):
        process = subprocess.Popen([sys.executable, "-c", code, str(store / name)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (store / name).exists()
    shutil.rmtree(store)
    extract(open_images(cells), store, config())
    assert contents(store) == contents(whole / "block0.zarr")
    # killed when the header was complete, but what is no longer needed was still there
    journal = (store / "journal.jsonl").read_bytes()
    for name in (
        "journal-0-of-1.jsonl",
        "journal-1-of-2.jsonl",
        "writer-0-of-1.lock",
        "writer-1-of-2.lock",
        "finish.lock",
    ):
        (store / name).write_bytes(journal if "journal" in name else b"")
    assert ActivationStore(store).readable().sum() == 4
    assert extract(open_images(cells), store, config()).was_complete
    assert contents(store) == contents(whole / "block0.zarr")


def test_merge(cells: Path, whole: Path, tmp_path: Path) -> None:
    """Completes what has all chunks, one or several blocks; names what is missing; touches nothing that is not ours."""
    store = tmp_path / "acts"
    images: Images = open_images(cells)
    extract(images, store, config(blocks=(0, 2)), shard=Shard(1, 2))
    result = run("merge", store)
    assert_one_line(
        result, "block0.zarr is incomplete: 1 of 3 chunks are not there (chunk 0). Run the cyto cache extract"
    )
    assert "without --shard, the command makes all that is missing" in result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationWriter, "finish", lambda self: None)  # killed before it
        extract(images, store, config(blocks=(0, 2)), shard=Shard(0, 2))
    with locked(store / "block0.zarr" / "finish.lock"):
        assert_one_line(run("merge", store), "block0.zarr is being completed by another process; wait until it ends")
    for _ in range(2):  # a second time changes nothing
        result = run("merge", store)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("5 images x 257 tokens x 192 channels") == 2
        for block in (0, 2):
            assert contents(store / f"block{block}.zarr") == contents(whole / f"block{block}.zarr")

    photos, latents = tmp_path / "photos", tmp_path / "latents.zarr"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"dear to me")
    write_latents(latents)
    when = photos.stat().st_mtime_ns, latents.stat().st_mtime_ns
    assert_one_line(run("merge", photos), "it is not a store of ours. Make one with cyto cache extract")
    assert_one_line(run("merge", latents), "it holds a latent store, version 1")
    assert_one_line(run("merge", tmp_path / "nowhere"), "nowhere: nothing is there. Make one with cyto cache extract")
    assert_one_line(run("merge", photos / "a.jpg"), "it is not a store of ours")
    assert (photos.stat().st_mtime_ns, latents.stat().st_mtime_ns) == when


def test_info_of_shards_at_work_counts_what_is_there(tmp_path: Path) -> None:
    """Whatever stands in a journal."""
    write_cache(tmp_path / "a.zarr", 1)
    root = tmp_path / "b.zarr"
    write(root, Shard(1, 2), 2)
    write(root, Shard(0, 2), 1)
    lines = [{}, {"chunk": [1]}, {"chunk": 99, "crc32c": "0" * 8}, {"chunk": "0"}]
    with (root / "journal-0-of-2.jsonl").open("a") as file:
        file.write("no json\n" + "".join(json.dumps(line) + "\n" for line in lines))
    result = run("info", root, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["complete"], found["n_images_written"]) == (False, 6)
