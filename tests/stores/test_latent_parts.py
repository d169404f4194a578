"""Several writers of one latent store: joined, their parts are the very bytes that one writer would have made."""

import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from artefacts import N_IMAGES, N_TOKENS, contents, latent_rows, latent_spec, outcome
from command_line import run
from kills import KILLED, die_at, exit_code, forked
from sparse_tokens import random_tokens, write_sae
from token_caches import write_cache

from cytosae.latents.encode import encode
from stores import csr, latent_shards
from stores.activation_writer import writer_lock
from stores.errors import BadInput, DamagedStore, IncompleteStore
from stores.files import locked
from stores.latent_parts import missing_images
from stores.latent_shards import complete_latents, copy_part, next_part, open_writer, remove_part
from stores.latent_spec import shard_images
from stores.latent_store import LatentStore
from stores.latent_writer import LatentWriter
from stores.runlog import read_runs
from stores.shards import ONE_WRITER, Shard
from stores.verify import verify_latents

EDGES = (4, 8, 10)  # of the chunks of the cache, where commits lie


pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, small_chunks: None) -> dict[str, bytes]:
    """The files of the tiny store that one writer made."""
    root = tmp_path_factory.mktemp("single") / "l.zarr"
    assert write(root, ONE_WRITER)
    return contents(root)


def append(writer: LatentWriter, stop: int) -> None:
    """The rows of the next images, one value in five called dropped, and a commit."""
    some = latent_rows()[writer.n_images * N_TOKENS : stop * N_TOKENS]
    writer.append_tokens(some.indices, some.data, np.diff(some.indptr), n_dropped=some.nnz // 5)
    writer.commit(stop)


def write(root: Path, shard: Shard, n_commits: int | None = None) -> bool:
    """Begin or continue a shard as `encode` does, and say whether it completed the store; n: so many commits only."""
    with ExitStack() as stack:
        writer = open_writer(stack, root, latent_spec(), outcome(), shard)
        edges = [edge for edge in EDGES if writer.n_images < edge <= writer.images.stop]
        for edge in edges[:n_commits]:
            part = next_part(root, writer) if shard.is_only else None
            if part is not None and part.images.start <= writer.n_images:
                assert [*copy_part(part, writer)]
                remove_part(part)
            elif writer.n_images < edge:
                append(writer, edge)
        if n_commits is not None:
            return False
        header = writer.finish()
        if shard.is_only:
            complete_latents_left_overs(root)
        elif not missing_images(root, latent_spec()):
            header = complete_latents(root)
        return header is not None


def complete_latents_left_overs(root: Path) -> None:
    from stores.latent_shards import remove_left_overs

    remove_left_overs(root)


def kept(root: Path) -> dict[str, bytes]:
    """The files of a store, but for locks that are held or were left by the killed."""
    return {name: raw for name, raw in contents(root).items() if not name.endswith(".lock")}


# ----------------------------------------------------------------------------------- the same bytes as one writer


@pytest.mark.parametrize("count", [2, 3, 4])
def test_in_any_order_the_last_one_completes_the_store(count: int, single: dict[str, bytes], tmp_path: Path) -> None:
    for number, order in enumerate(random.Random(0).sample([*itertools.permutations(range(count))], 2)):
        root = tmp_path / str(number)
        left = {image for index in range(count) for image in shard_images(latent_spec(), Shard(index, count))}
        assert left == {*range(N_IMAGES)}
        for n_done, index in enumerate(order):
            assert [*itertools.chain(*missing_images(root, latent_spec()))] == sorted(left)
            left -= {*shard_images(latent_spec(), Shard(index, count))}
            is_last = not left
            assert write(root, Shard(index, count)) is is_last, order
            if is_last:
                break
            with pytest.raises(IncompleteStore):
                LatentStore(root)
            assert n_done < count
        assert contents(root) == single, order
        assert list(verify_latents(root)) == [None]
        assert LatentStore(root).n_dropped == sum(
            latent_rows()[a * 3 : b * 3].nnz // 5 for a, b in [(0, 4), (4, 8), (8, 10)]
        )


def test_rows_that_are_read_ahead_are_joined_in_order(
    single: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads read at once, and the later rows are there first."""
    real, reading, most_at_once = csr.CsrReader.read_rows, 0, 0

    def read_rows(self: csr.CsrReader, start: int, stop: int) -> csr.CsrRows:
        nonlocal reading, most_at_once
        reading += 1
        most_at_once = max(most_at_once, reading)
        time.sleep(0.3 if start == 0 else 0.05)
        rows = real(self, start, stop)
        reading -= 1
        return rows

    root = tmp_path / "l.zarr"
    for index in (1, 0):
        if index == 0:
            monkeypatch.setattr(latent_shards, "n_cores", lambda: 2)
            monkeypatch.setattr(csr.CsrReader, "read_rows", read_rows)
        write(root, Shard(index, 2))
    assert contents(root) == single
    assert most_at_once == 2


def test_what_one_writer_lacks_it_takes_from_finished_parts(single: dict[str, bytes], tmp_path: Path) -> None:
    """It began alone, others made a part behind it and one across it, one was interrupted: only the rest is encoded."""
    root = tmp_path / "l.zarr"
    write(root, ONE_WRITER, 1)
    write(root, Shard(1, 3))
    write(root, Shard(1, 2), 1)  # not finished: made again
    write(root, ONE_WRITER)
    assert contents(root) == single
    root = tmp_path / "m.zarr"
    write(root, ONE_WRITER, 1)
    write(root, Shard(0, 2))
    write(root, Shard(1, 3))
    assert missing_images(root, latent_spec()) == [range(8, 10)]
    assert write(root, Shard(2, 3)) is True
    assert contents(root) == single


# ------------------------------------------------------------------------------------------------ refused, damaged


def test_the_same_images_are_not_written_twice_at_the_same_time(tmp_path: Path) -> None:
    root, stack = tmp_path / "l.zarr", ExitStack()
    with stack:
        open_writer(stack, root, latent_spec(), outcome(), Shard(1, 3))
        for shard in (ONE_WRITER, Shard(1, 3), Shard(1, 2)):
            if {*shard_images(latent_spec(), shard)} & {*range(4, 8)}:
                with pytest.raises(BadInput, match=r"another process is writing shard 1/3 of .*l\.zarr at this moment"):
                    write(root, shard)
        write(root, Shard(2, 3))
    with locked(root / "finish.lock"):
        for shard in (ONE_WRITER, Shard(0, 3)):
            with pytest.raises(BadInput, match=r"another process is writing .*l\.zarr at this moment"):
                write(root, shard)
        assert complete_latents(root) is None
    with pytest.raises(IncompleteStore, match=r"the latents of 8 of 10 images are not there \(images 0 to 7\)"):
        complete_latents(root)
    with locked(writer_lock(root, ONE_WRITER)), pytest.raises(BadInput, match="another process is writing"):
        write(root, Shard(0, 3))


@pytest.mark.parametrize("damage", [None, "flipped", "swapped"])
def test_a_damaged_part_is_not_joined(damage: str | None, single: dict[str, bytes], tmp_path: Path) -> None:
    """It is named, and made again by its own command when it is removed."""
    root = tmp_path / "l.zarr"
    write(root, Shard(0, 2))
    part = root / "part-0-of-2"
    first, second = (part / "X" / "data" / "c" / name for name in ("0", "1"))
    raw = first.read_bytes()
    if damage is None:
        first.unlink()
    elif damage == "flipped":
        first.write_bytes(raw[:9] + bytes([raw[9] ^ 1]) + raw[10:])
    else:
        first.write_bytes(second.read_bytes())
        second.write_bytes(raw)
    with pytest.raises(DamagedStore, match=r"X/data/c/0 .*\. Remove .*part-0-of-2 and run its cyto sae encode --shard"):
        write(root, Shard(1, 2))
    shutil.rmtree(part)
    assert write(root, Shard(0, 2)) is True
    assert contents(root) == single


# ---------------------------------------------------------------------------------------------- killed, anywhere


def kill_everywhere(
    root: Path, shard: Shard, prepare: Callable[[Path], object], every: int, again: Callable[[Path], object]
) -> Iterator[Path]:
    """Stores whose writer was killed at one call after another until it came to its end, and then continued."""
    for n_calls in itertools.count(random.randrange(every), every):
        store = root / str(n_calls)
        prepare(store)

        def job(store: Path = store, n_calls: int = n_calls) -> None:
            die_at(n_calls)
            write(store, shard)

        code = exit_code(forked(job))
        assert code in (0, KILLED)
        again(store)
        yield store
        shutil.rmtree(store)
        if code == 0:
            assert n_calls > 20
            return


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_one_writer_killed_at_any_call_and_continued(every: int, single: dict[str, bytes], tmp_path: Path) -> None:
    for store in kill_everywhere(
        tmp_path, ONE_WRITER, lambda store: None, every, lambda store: write_unless_complete(store, ONE_WRITER)
    ):
        assert kept(store) == single


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_the_last_shard_killed_at_any_call_and_continued(every: int, single: dict[str, bytes], tmp_path: Path) -> None:
    """In its own rows or while it joins; continued by itself, by a single writer, or by `cyto latents merge`."""
    ways = itertools.cycle([Shard(1, 2), ONE_WRITER, None])

    def prepare(store: Path) -> None:
        write(store, Shard(0, 2))

    def again(store: Path) -> None:
        shard = next(ways)
        if shard is None:
            try:
                complete_latents(store)
                return
            except IncompleteStore:
                shard = Shard(1, 2)
        write_unless_complete(store, shard)

    for store in kill_everywhere(tmp_path, Shard(1, 2), prepare, every, again):
        assert kept(store) == single


def write_unless_complete(store: Path, shard: Shard) -> None:
    """As `encode` does: a complete store is only tidied up."""
    from stores.spec import find_header

    header = find_header(store)
    if header is not None and header.complete:
        complete_latents(store)
    else:
        write(store, shard)


# -------------------------------------------------------------------------------------------------- whole encodings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_chunks: None) -> Path:
    """acts.zarr: 9 images of 17 tokens, two a chunk, image 5 unreadable; run: 30 latents; one.zarr: encoded at once."""
    root = tmp_path_factory.mktemp("parts")
    write_cache(root / "acts.zarr", random_tokens(9, 17), unreadable=(5,), chunk_images=2)
    write_sae(root / "run", root / "acts.zarr", n_latents=30)
    encode(root / "acts.zarr", root / "run", root / "one.zarr", min_activation=0.1)
    return root


def without_runs(root: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in contents(root).items() if name != "runs.jsonl"}


@pytest.mark.stress
def test_shards_of_the_command_are_the_store_of_one(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one completes it; merge says what is missing, joins what a killed last one left, and repeats."""
    monkeypatch.chdir(tmp_path)
    out = Path("l.zarr")  # places are called as they were typed
    encode_shard = ["sae", "encode", made / "acts.zarr", made / "run", "-o", out, "--device", "cpu"]
    encode_shard += ["--min-activation", 0.1, "--shard"]
    result = run(*encode_shard, "2/3")
    assert result.exit_code == 0, result.output
    assert f"{out}: shard 2/3 is done, 3 readable images; other shards are not" in result.stdout
    assert run(*encode_shard, "2/3").stdout == result.stdout
    result = run("latents", "merge", out)
    assert result.exit_code == 1
    assert "l.zarr is incomplete: the latents of 6 of 9 images are not there (images 0 to 5)" in result.stderr
    assert "  missing    images 0 to 5" in run("latents", "info", out).stdout
    assert json.loads(run("latents", "info", out, "--json").stdout)["n_images_missing"] == 6
    assert run(*encode_shard, "0/3").exit_code == 0
    result = run(*encode_shard, "1/3")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("l.zarr: 9 images x 17 tokens x 30 latents")
    assert "values below 0.1 dropped: " in result.stdout
    assert without_runs(out) == without_runs(made / "one.zarr")
    assert sorted(line["shard"] for line in read_runs(out)) == ["0/3", "1/3", "2/3", "2/3"]
    assert run("latents", "verify", out).exit_code == 0
    assert "is already complete" in run(*encode_shard, "1/3").stderr
    assert run("latents", "merge", out).stdout.startswith("l.zarr: 9 images x 17 tokens")
    assert without_runs(out) == without_runs(made / "one.zarr")
    result = run(*encode_shard, "1/3", "--overwrite")
    assert (result.exit_code, "a shard cannot overwrite what other shards may be writing" in result.stderr) == (1, True)


def test_what_a_kill_left_before_the_header_is_no_obstacle(made: Path, tmp_path: Path) -> None:
    """Locks only; nobody holds them."""
    out = tmp_path / "l.zarr"
    out.mkdir()
    for name in ("writer-0-of-1.lock", "finish.lock", "writer-1-of-2.lock"):
        (out / name).touch()
    encode(made / "acts.zarr", made / "run", out, min_activation=0.1)
    assert without_runs(out) == without_runs(made / "one.zarr")
    (out / "part-1-of-2").mkdir()  # killed behind the mark
    (out / "writer-1-of-2.lock").touch()
    assert encode(made / "acts.zarr", made / "run", out, min_activation=0.1).was_complete
    assert without_runs(out) == without_runs(made / "one.zarr")


def test_a_shard_that_cannot_go_on_says_what_to_do(single: dict[str, bytes], tmp_path: Path) -> None:
    """Also one that an older cyto began, whose journal names no chunks."""
    root = tmp_path / "l.zarr"
    write(root, Shard(0, 2))
    write(root, Shard(1, 2), 1)
    part = root / "part-1-of-2"
    words = r"so the job cannot go on from it; begin again with --overwrite, or remove .*part-1-of-2 and run the same"
    (tail,) = (part / "X").glob("tail-*")
    for spoil in (tail.unlink, lambda: (part / "journal.jsonl").write_text('{"n_images":8,"n_rows":12,"nnz":3}\n')):
        spoil()
        with pytest.raises(DamagedStore, match=words):
            write(root, Shard(1, 2))
    shutil.rmtree(part)
    assert write(root, Shard(1, 2)) is True
    assert contents(root) == single


def test_processes_that_start_at_the_same_moment(made: Path, tmp_path: Path) -> None:
    """Whoever is last completes the store; a merge mends the rest if two saw the other at it."""
    for number in range(3):
        root, start = tmp_path / str(number), time.time() + 0.1

        def job(index: int, root: Path = root, start: float = start) -> None:
            time.sleep(max(0, start - time.time()))
            write(root, Shard(index, 3))

        processes = [forked(lambda index=index: job(index)) for index in range(3)]  # type: ignore[misc]
        assert [exit_code(process) for process in processes] == [0] * 3
        assert LatentStore(root).nnz == latent_rows().nnz
        assert not [
            path for path in root.iterdir() if path.name.startswith(("part-", "runs-")) or path.suffix == ".lock"
        ]
