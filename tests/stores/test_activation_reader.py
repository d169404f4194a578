"""One reader, wherever the cache lies: the same numbers from a path, a file:// URL, an S3 bucket and a web server.

The twin is `np.fromfile` of the raw chunk files. The servers are local (`object_server.py`).
"""

import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from click.testing import CliRunner
from object_server import ObjectServer, serving
from places import ROOT
from tiny_runs import tiny_config
from token_caches import write_cache

from cli import cli
from cytosae.latents.encode import encode
from cytosae.training.train import train
from stores import (
    ActivationStore,
    BadInput,
    CytoError,
    DamagedStore,
    IncompleteStore,
    LatentStore,
    SpecMismatch,
    StoreNotFound,
    StoreUnreachable,
    TokenStream,
    chunk_cache,
    open_caches,
    remote,
)
from stores.activation_spec import chunk_path
from stores.spec import find_header, write_header

N_IMAGES, CHUNK_IMAGES, N_TOKENS, WIDTH = 11, 3, 5, 8  # four chunks, the last with two images
UNREADABLE = (3, 4, 5, 9)
CHUNK_BYTES = CHUNK_IMAGES * N_TOKENS * WIDTH * 2 + 4
REMOTE = ("s3", "web")
NEEDS_OBSTORE = "reading URLs needs the package obstore: pip install 'cytobarcode[remote]'"

Float16 = npt.NDArray[np.float16]
Bits = npt.NDArray[np.uint16]


def random_tokens(n_images: int, n_tokens: int = N_TOKENS, width: int = WIDTH, seed: int = 0) -> Float16:
    return np.random.default_rng(seed).standard_normal((n_images, n_tokens, width)).astype(np.float16)


def twin(root: Path) -> Float16:
    """All tokens, from the bytes of the chunk files."""
    chunks = [np.fromfile(chunk_path(root, chunk), "<u2") for chunk in range(-(-N_IMAGES // CHUNK_IMAGES))]
    numbers = np.concatenate([chunk[:-2].reshape(CHUNK_IMAGES, N_TOKENS, WIDTH) for chunk in chunks])
    return numbers[:N_IMAGES].view(np.float16)


def bits(tokens: Float16) -> Bits:
    """For comparisons in which NaN equals itself only if its bits do."""
    return np.ascontiguousarray(tokens).view(np.uint16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a cache that no test changes."""
    root = tmp_path_factory.mktemp("reader")
    write_cache(
        root / "bucket" / "deep" / "cache.zarr",
        random_tokens(N_IMAGES),
        unreadable=UNREADABLE,
        chunk_images=CHUNK_IMAGES,
    )
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, served as the bucket of `s3` and `web`."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path / "bucket" / "deep" / "cache.zarr"


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A server like S3 over `tmp_path`, in the environment as one sets it for an endpoint of one's own."""
    pytest.importorskip("obstore", reason=NEEDS_OBSTORE)
    with serving(tmp_path) as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield server


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A plain web server over `tmp_path`, which cannot list."""
    pytest.importorskip("obstore", reason=NEEDS_OBSTORE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(tmp_path, lists=False) as server:
        yield server


@pytest.fixture(params=["local", *REMOTE])
def place(request: pytest.FixtureRequest, root: Path) -> Path | str:
    """The cache at `root`, as it is found there and from elsewhere."""
    if request.param in REMOTE:
        server = request.getfixturevalue(request.param)
        return "s3://bucket/deep/cache.zarr/" if request.param == "s3" else f"{server.url}/bucket/deep/cache.zarr"
    return root


@pytest.fixture(params=REMOTE)
def url(request: pytest.FixtureRequest, root: Path) -> str:
    server = request.getfixturevalue(request.param)
    return "s3://bucket/deep/cache.zarr" if request.param == "s3" else f"{server.url}/bucket/deep/cache.zarr"


# ------------------------------------------------------------------------------------------ the same everywhere


def test_everything_equals_the_twin(place: Path | str, root: Path) -> None:
    store, expected = ActivationStore(place), twin(root)
    local = ActivationStore(root)
    assert (store.identity, store.content_sha256, store.spec) == (local.identity, local.content_sha256, local.spec)
    assert store.images.equals(local.images)
    assert store.readable().tolist() == [image not in UNREADABLE for image in range(N_IMAGES)]
    assert np.isnan(expected[list(UNREADABLE)]).all()

    for chunk in range(4):
        tokens = store.read_chunk(chunk)
        assert tokens.dtype == np.float16
        assert not tokens.flags.writeable
        np.testing.assert_array_equal(bits(tokens), bits(expected[3 * chunk : 3 * chunk + 3]), strict=True)
    assert store.read_chunk(3).shape == (2, N_TOKENS, WIDTH)  # its padding is cut off

    rows, chunks = zip(*store.iter_chunks(first=1), strict=True)
    assert rows == (range(3, 6), range(6, 9), range(9, 11))
    np.testing.assert_array_equal(bits(np.concatenate(chunks)), bits(expected[3:]))
    assert list(store.iter_chunks(first=4)) == []

    for chosen in ([7], [10, 0, 10, 3, 10], range(N_IMAGES), np.array([8, 2], np.uint8), []):
        read = store.read_images(chosen)
        np.testing.assert_array_equal(bits(read), bits(expected[np.array(chosen, int)]), strict=True)
        assert read.flags.writeable  # a copy, the caller's own

    for start, stop in itertools.combinations_with_replacement(range(N_IMAGES + 1), 2):
        read = store.read_rows(start, stop)
        np.testing.assert_array_equal(bits(read), bits(expected[start:stop]), strict=True)
        assert not read.flags.writeable or read.size == 0


def test_a_local_cache_has_many_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    for name in (root, str(root), Path("cache.zarr"), "cache.zarr", f"{root}/", root.as_uri()):
        store = ActivationStore(name)
        assert store.root == root
        assert not store.read_chunk(1).flags.writeable


@pytest.mark.parametrize("token_set", ["all", "patch", "cls"])
def test_shuffled_tokens_are_those_of_training(place: Path | str, root: Path, token_set: str) -> None:
    """Each readable token once per epoch; the order is the stream's, from a path and from a URL, from any position."""
    store, expected = ActivationStore(place), twin(root)
    tokens = {"all": expected, "patch": expected[:, 1:], "cls": expected[:, :1]}[token_set]
    readable = tokens[ActivationStore(root).readable()].reshape(-1, WIDTH)
    epoch = next(store.shuffled_tokens(len(readable), seed=3, token_set=token_set, pool_chunks=2))
    assert sorted(map(bytes, bits(epoch))) == sorted(map(bytes, bits(readable)))
    assert (epoch != readable).any()

    stream = TokenStream([ActivationStore(root)], seed=3, token_set=token_set, pool_chunks=2)
    for position in (0, len(readable) // 2, 2 * len(readable) + 1):
        ours = islice(store.shuffled_tokens(4, seed=3, position=position, token_set=token_set, pool_chunks=2), 9)
        trained = islice(stream.batches(4, position=position), 9)
        np.testing.assert_array_equal(list(ours), list(trained))


def test_several_caches_may_lie_in_different_places(root: Path, s3: ObjectServer) -> None:
    other = write_cache(root.parent / "other.zarr", random_tokens(4, seed=1), chunk_images=2)
    mixed = open_caches([other, "s3://bucket/deep/cache.zarr"])
    stream, local = TokenStream(mixed, pool_chunks=3), TokenStream(open_caches([other, root]), pool_chunks=3)
    np.testing.assert_array_equal(list(islice(stream.batches(7), 20)), list(islice(local.batches(7), 20)))
    with pytest.raises(BadInput, match="the same cache is given twice"):
        open_caches([root, "s3://bucket/deep/cache.zarr"])
    narrow = write_cache(root.parent / "narrow.zarr", random_tokens(4, width=2))
    with pytest.raises(
        SpecMismatch, match=r"narrow\.zarr and s3://bucket/deep/cache\.zarr do not .*: width 2 against 8"
    ):
        open_caches([narrow, "s3://bucket/deep/cache.zarr"])


def read_all(store: ActivationStore) -> tuple[str, bytes]:
    """What a worker process is asked to do."""
    return str(store.root), store.read_images(range(store.spec.n_images)).tobytes()


@pytest.mark.stress
def test_a_store_pickles_as_its_place(root: Path, s3: ObjectServer) -> None:
    """Into a process that shares nothing; `s3` is found there by the environment."""
    stores = [ActivationStore(root), ActivationStore("s3://bucket/deep/cache.zarr/")]
    for store in stores:
        store.read_chunk(0)  # nothing that is open or fetched travels
        assert len(pickle.dumps(store)) < 300
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        results = pool.map(read_all, stores)
    assert results == [(str(root), twin(root).tobytes()), ("s3://bucket/deep/cache.zarr", twin(root).tobytes())]
    dumped = pickle.dumps(stores[0])
    chunk_path(root, 2).unlink()
    with pytest.raises(DamagedStore, match="c/2/0/0 is missing"):
        pickle.loads(dumped)


def read_in_a_fork(store: ActivationStore, answers: Any) -> None:
    for read in (lambda: store.read_chunk(0), lambda: ActivationStore(store.root)):
        try:
            read()
            answers.send("read")
        except BadInput as error:
            answers.send(str(error))


def test_a_fork_is_refused_and_does_not_hang(root: Path, s3: ObjectServer) -> None:
    """obstore's threads do not survive it; maps do."""
    context = multiprocessing.get_context("fork")
    for place, what in (("s3://bucket/deep/cache.zarr", "start processes with spawn"), (root, "^read$")):
        store = ActivationStore(place)
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=read_in_a_fork, args=(store, sending))
        process.start()
        for _ in range(2):
            assert receiving.poll(20)
            assert re.search(what, receiving.recv())
        process.join()


def test_what_no_cache_holds_is_refused(place: Path | str) -> None:
    store = ActivationStore(place)
    for chunk in (-1, 4):
        with pytest.raises(IndexError, match=rf"chunk {chunk} outside 0\.\.3"):
            store.read_chunk(chunk)
    for images in ([-1], [0, 11], np.array([2**63], np.uint64)):
        with pytest.raises(IndexError, match=r"image index outside 0\.\.10"):
            store.read_images(images)
    not_whole: list[Any] = [[1.0], [True, False], 3, [[1]], ["1"]]
    for images in not_whole:
        with pytest.raises(TypeError, match="must be a list of whole numbers"):
            store.read_images(images)
    for start, stop in ((-1, 2), (2, 1), (0, 12), (12, 12)):
        with pytest.raises(IndexError, match=rf"images {start} to {stop} outside 0\.\.11"):
            store.read_rows(start, stop)
    fraction: Any = 1.5
    with pytest.raises(TypeError):
        store.read_rows(0, fraction)
    with pytest.raises(TypeError):
        store.read_chunk(fraction)
    with pytest.raises(BadInput, match="no cache is given"):
        TokenStream([])
    for batch, position in ((0, 0), (-1, 0), (5, -1)):
        with pytest.raises(BadInput, match=f"found {batch}, {position}"):
            store.shuffled_tokens(batch, position=position)
    with pytest.raises(BadInput, match="token_set must be one of all, patch, cls, register; found 'patches'"):
        store.shuffled_tokens(5, token_set="patches")


# ------------------------------------------------------------------------------------------------- open files


def maps_and_files(root: Path) -> tuple[int, int]:
    """Memory maps of this process of what lies below `root`, and descriptors."""
    maps = sum(f" {root}/" in line for line in Path("/proc/self/maps").read_text().splitlines())
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    return maps, sum(link.startswith(str(root)) for link in links)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts maps and descriptors in /proc")
def test_maps_are_bounded_hold_no_file_open_and_end_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some number, shared by all stores of the process; also with several threads. Views keep theirs."""
    monkeypatch.setattr(chunk_cache, "_MOST_MAPS", 12)
    monkeypatch.setattr(chunk_cache.OpenMaps, "_all", type(chunk_cache.OpenMaps._all)())
    tokens = random_tokens(40)
    root = write_cache(tmp_path / "a.zarr", tokens, chunk_images=1)
    first = ActivationStore(root)
    assert maps_and_files(root) == (0, 0)

    def read_much(store: ActivationStore, seed: int) -> None:
        for chunk in np.random.default_rng(seed).integers(0, 40, 300).tolist():
            if not np.array_equal(store.read_chunk(chunk)[0], tokens[chunk]):
                wrong.append(chunk)

    wrong: list[int] = []
    threads = [threading.Thread(target=read_much, args=(first, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del threads, thread
    assert not wrong
    assert maps_and_files(root) == (12, 0)
    second = ActivationStore(root)
    for _ in range(2):
        for chunk in range(40):
            assert first.read_chunk(chunk) is first.read_chunk(chunk)  # the last used one stays mapped
            second.read_chunk(chunk)
    assert maps_and_files(root) == (12, 0)  # six each
    view = second.read_chunk(5)[:, 0]
    first.release()
    assert maps_and_files(root) == (6, 0)
    np.testing.assert_array_equal(first.read_chunk(3)[0], tokens[3])
    del first, second
    assert maps_and_files(root) == (1, 0)
    np.testing.assert_array_equal(view, tokens[5:6, 0])
    del view
    assert maps_and_files(root) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_what_is_not_in_memory_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a stretch and no more, in pieces that the system does not cut off; a lost file is no error here."""
    asked: list[range] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, n, advice: asked.append(range(start, start + n)))
    monkeypatch.setattr(chunk_cache, "_is_in_memory", lambda file, at: at == (1 << 20) + 10)
    (tmp_path / "file").write_bytes(b"")
    chunk_cache.read_ahead(tmp_path / "file", 10, (5 << 19) + 3)
    assert all(0 < len(piece) <= 1 << 17 for piece in asked)
    stretches = [range(10, (1 << 20) + 10), range((1 << 21) + 10, (5 << 19) + 13)]
    assert [at for piece in asked for at in piece] == [at for stretch in stretches for at in stretch]
    chunk_cache.read_ahead(tmp_path / "gone", 0, 10)


FEW_FILES = """
import os, resource, sys
import numpy as np
from stores import ActivationStore, BadInput

tokens = np.load(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
store = ActivationStore(sys.argv[1])
assert store.spec.n_chunks == 1500
epoch = next(store.shuffled_tokens(tokens.size // 2, pool_chunks=1000))
assert sorted(map(bytes, epoch)) == sorted(map(bytes, tokens.reshape(-1, 2)))
views = [store.read_chunk(chunk) for chunk in range(1500)]
assert np.array_equal(np.concatenate(views), tokens)
store, others = ActivationStore(sys.argv[1]), []
try:
    while True:
        others.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    try:
        store.read_chunk(700)
    except BadInput as error:
        print(error)
for other in others:
    os.close(other)
assert np.array_equal(store.read_chunk(700)[0], tokens[700])
resource.setrlimit(resource.RLIMIT_AS, (1, 1))
try:
    store.read_chunk(701)
except BadInput as error:
    print(error)
"""


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs a POSIX limit of open files")
def test_1500_chunks_with_64_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own; where no file can be opened or mapped at all it is said what to do."""
    tokens = random_tokens(1500, 3, 2)
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", lambda descriptor: None)  # written for this test only, and as quickly as may be
        root = write_cache(tmp_path / "a.zarr", tokens, chunk_images=1)
    np.save(tmp_path / "tokens.npy", tokens)
    command = [sys.executable, "-c", FEW_FILES, str(root), str(tmp_path / "tokens.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files, maps = done.stdout.splitlines()
    assert files == "this process may open no more files: chunk 700 cannot be mapped; raise the limit: ulimit -n 4096"
    assert maps.startswith("this process may map no more files: chunk 701 cannot be mapped; drop views")


# ----------------------------------------------------------------------------------------------------- damage


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:position] + bytes([raw[position] ^ 4]) + raw[position + 1 :]


MISSHAPEN: list[tuple[Callable[[bytes], bytes | None], str]] = [
    (lambda raw: None, "is missing"),
    (lambda raw: b"", f"has 0 bytes, expected {CHUNK_BYTES}"),
    (lambda raw: raw[:-1], f"has {CHUNK_BYTES - 1} bytes, expected {CHUNK_BYTES}"),
    (lambda raw: raw + b"\0", f"has {CHUNK_BYTES + 1} bytes, expected {CHUNK_BYTES}"),
]


@pytest.mark.stress
@pytest.mark.parametrize("chunk", [0, 3])
def test_a_misshapen_chunk_is_named(place: Path | str, root: Path, chunk: int) -> None:
    """When the cache is opened, and by an open one when it comes to that chunk; never as NaN, never as the padding."""
    path = chunk_path(root, chunk)
    raw = path.read_bytes()
    for damage, what in MISSHAPEN:
        opened, damaged = ActivationStore(place), damage(raw)
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        named = rf"cache\.zarr/tokens/c/{chunk}/0/0 {what}"
        with pytest.raises(DamagedStore, match=named):
            ActivationStore(place)
        with pytest.raises(DamagedStore, match=named):
            opened.read_chunk(chunk)
        with pytest.raises(DamagedStore, match=named):
            opened.read_images([0, 10])
        with pytest.raises(DamagedStore, match=named):
            opened.read_rows(0, N_IMAGES)
        with pytest.raises(DamagedStore, match=named):
            list(opened.iter_chunks())
        if chunk == 0:  # the last one holds few tokens and may come late in an epoch
            with pytest.raises(DamagedStore, match=named):
                list(islice(opened.shuffled_tokens(35), 1))
        path.write_bytes(raw)
        np.testing.assert_array_equal(bits(opened.read_chunk(chunk)), bits(ActivationStore(root).read_chunk(chunk)))


@pytest.mark.parametrize("position", [0, 100, CHUNK_BYTES - 5])
@pytest.mark.parametrize("chunk", [0, 3])
def test_a_flipped_bit_fails_the_checksum_of_a_url(url: str, root: Path, chunk: int, position: int) -> None:
    """In a number, in the padding of the last chunk; a local map bypasses the checksum (`cyto cache verify`)."""
    path = chunk_path(root, chunk)
    path.write_bytes(flip(position)(path.read_bytes()))
    store, images = ActivationStore(url), ("0 to 2", "", "", "9 to 10")[chunk]
    store.read_chunk(1)
    with pytest.raises(DamagedStore, match=rf"chunk {chunk} of {url} \(images {images}\) fails its checksum"):
        store.read_chunk(chunk)
    assert ActivationStore(root).read_chunk(chunk).shape == ((3, 2)[chunk == 3], N_TOKENS, WIDTH)


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_prefetch_that_failed_says_nothing_about_later(is_noticed: bool) -> None:
    """Announced while a chunk was gone, asked for when it is there again; an error of the asking itself is raised."""
    is_there, goes_on, calls = threading.Event(), threading.Event(), []

    def fetch(chunk: int) -> Float16:
        calls.append(chunk)
        was_there = is_there.is_set()
        goes_on.wait(5)
        if not was_there:
            raise DamagedStore(f"chunk {chunk} is missing")
        return np.full((1, 1, 1), chunk, np.float16)

    chunks = chunk_cache.ReadAhead(fetch, lambda chunk, rows: fetch(chunk)[rows.start : rows.stop])
    chunks.prefetch([7])
    while not calls:
        time.sleep(0.001)
    is_there.set()
    if is_noticed:
        goes_on.set()
        time.sleep(0.05)
    else:
        threading.Timer(0.05, goes_on.set).start()
    assert chunks.get(7).item() == 7
    assert calls == [7, 7]
    is_there.clear()
    with pytest.raises(DamagedStore, match="chunk 8 is missing"):
        chunks.get(8)
    assert calls == [7, 7, 8]


def test_another_chunk_in_the_place_of_one_is_seen(place: Path | str, root: Path) -> None:
    """Two whole chunks swapped; one rewritten whole, with a checksum of its own; a flipped bit in the checksum."""
    opened = ActivationStore(place)
    first, second = chunk_path(root, 0), chunk_path(root, 1)
    a, b = first.read_bytes(), second.read_bytes()
    for at_first, at_second in ((b, a), (flip(CHUNK_BYTES - 1)(a), b)):
        first.write_bytes(at_first)
        second.write_bytes(at_second)
        with pytest.raises(DamagedStore, match="c/0/0/0 is not the chunk that the journal names"):
            ActivationStore(place).read_chunk(0)
        with pytest.raises(DamagedStore, match="c/0/0/0 is not the chunk that the journal names"):
            opened.read_chunk(0)


def edit_header(root: Path, **changes: Any) -> None:
    """Change the header, with an identity that fits again."""
    header = find_header(root)
    assert header is not None
    write_header(root, type(header)(**{**vars(header), **changes}))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def spec_with(**changes: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        header = find_header(root)
        assert header is not None
        edit_header(root, spec={**header.spec, **changes})

    return edit


def layout_with(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "tokens" / "zarr.json", lambda value: value.update(changes))


def as_zarr_2(root: Path) -> None:
    (root / "tokens" / "zarr.json").unlink()
    shape, chunks = (N_IMAGES, N_TOKENS, WIDTH), (CHUNK_IMAGES, N_TOKENS, WIDTH)
    zarr.create_array(root / "tokens-2", shape=shape, chunks=chunks, dtype="float16", zarr_format=2)
    shutil.move(root / "tokens-2" / ".zarray", root / "tokens" / ".zarray")


def drop_a_line(root: Path) -> None:
    journal = root / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))


def without_checksum(root: Path) -> None:
    journal = root / "journal.jsonl"
    journal.write_text(re.sub(r'"crc32c":"[^"]*"', '"crc32c":"zz"', journal.read_text(), count=1))


DOTS = {"name": "default", "configuration": {"separator": "."}}
LAYOUT = "does not have the layout that its header states"
BROKEN: list[tuple[str, Callable[[Path], object], type[CytoError], str]] = [
    ("nothing", shutil.rmtree, StoreNotFound, "no activation cache at .*: nothing is there"),
    ("no header", lambda root: (root / "zarr.json").unlink(), StoreNotFound, "no activation cache at"),
    (
        "not JSON",
        lambda root: (root / "zarr.json").write_text("{"),
        DamagedStore,
        r"zarr\.json cannot be read: .*line 1",
    ),
    ("incomplete", lambda root: edit_header(root, complete=False), IncompleteStore, "is incomplete"),
    ("newer", lambda root: edit_header(root, version=2), SpecMismatch, "version 2 is newer than this cyto"),
    ("a field too many", spec_with(colour="red"), DamagedStore, "header cannot be read: it knows 'colour'"),
    ("no images", spec_with(n_images=0), DamagedStore, "the header says n_images 0"),
    ("chunks of no image", spec_with(chunk_images=0), DamagedStore, "the header says chunk_images 0"),
    ("text", spec_with(width="8"), DamagedStore, "the header says width '8'"),
    ("endless", spec_with(n_images=10**15), DamagedStore, r"has 11 rows, the cache holds 1,000,000,000,000,000 images"),
    ("wide", spec_with(width=10**12), DamagedStore, LAYOUT),
    ("no table", lambda root: (root / "images.parquet").unlink(), BadInput, "no image table at"),
    ("no journal", lambda root: (root / "journal.jsonl").unlink(), DamagedStore, "names 0 chunks, expected 4"),
    ("a journal line lost", drop_a_line, DamagedStore, "names 3 chunks, expected 4"),
    ("no checksum", without_checksum, DamagedStore, "expected 4 with a checksum each"),
    ("no array", lambda root: (root / "tokens" / "zarr.json").unlink(), DamagedStore, LAYOUT),
    ("other names", layout_with(chunk_key_encoding=DOTS), DamagedStore, LAYOUT),
    ("Zarr 2", as_zarr_2, DamagedStore, LAYOUT),
]


@pytest.mark.parametrize(("damage", "kind", "what"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_promise_is_told_when_the_cache_is_opened(
    damage: Callable[[Path], object], kind: type[CytoError], what: str, root: Path, s3: ObjectServer, web: ObjectServer
) -> None:
    """In the same words from everywhere, with the place that was asked for."""
    damage(root)
    for place in (str(root), "s3://bucket/deep/cache.zarr", f"{web.url}/bucket/deep/cache.zarr"):
        with pytest.raises(kind, match=what) as caught:
            ActivationStore(place)
        assert place in str(caught.value)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("cache.zarr/zarr.json", "503"),
        ("images.parquet", "cut"),
        ("journal.jsonl", "drop"),
        ("tokens/zarr.json", "503"),
        ("c/1/0/0", "503"),
        ("c/1/0/0", "cut"),
        ("c/1/0/0", "drop"),
    ],
)
def test_a_passing_failure_is_not_seen(root: Path, s3: ObjectServer, name: str, failure: str) -> None:
    s3.failing = {name: [failure]}
    tokens = ActivationStore("s3://bucket/deep/cache.zarr").read_chunk(1)
    np.testing.assert_array_equal(bits(tokens), bits(twin(root)[3:6]))
    assert s3.failing == {name: []}


@pytest.mark.stress
def test_a_lasting_failure_is_one_line(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """When it is opened, and later; a chunk that failed is asked for anew. No access is told apart."""
    server = request.getfixturevalue("s3" if url.startswith("s3") else "web")
    monkeypatch.setitem(remote._RETRY, "max_retries", 1)
    failures = {"503": "cannot be read now, try again later", "drop": "try again later", "403": "AWS_ACCESS_KEY_ID"}
    for failure, what in failures.items():
        for name in ("cache.zarr/zarr.json", "journal.jsonl", "tokens/zarr.json"):
            server.failing = {name: [failure] * 9}
            with pytest.raises(StoreUnreachable, match=f"^{url} .*{what}[^\n]*$"):
                ActivationStore(url)
        server.failing = {}
        store = ActivationStore(url)
        server.failing = {"c/2/0/0": [failure] * 99}
        reads: list[Callable[[], object]] = [
            lambda store=store: store.read_chunk(2),  # type: ignore[misc]
            lambda store=store: store.read_images([0, 7]),  # type: ignore[misc]
            lambda store=store: list(store.iter_chunks()),  # type: ignore[misc]
        ]
        for read in reads:
            with pytest.raises(StoreUnreachable, match=f"^{url} .*{what}[^\n]*$"):
                read()
        server.failing = {}
        np.testing.assert_array_equal(bits(store.read_chunk(2)), bits(twin(root)[6:9]))


def test_a_server_that_is_not_there_is_one_line(root: Path, web: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote._RETRY, "max_retries", 1)
    url = f"{web.url}/bucket/deep/cache.zarr"
    web.shutdown()
    web.server_close()
    with pytest.raises(StoreUnreachable, match=f"^{url} cannot be read now, try again later: [^\n]*$"):
        ActivationStore(url)


def test_chunks_are_fetched_ahead_each_once(root: Path, s3: ObjectServer) -> None:
    store, chunks = ActivationStore("s3://bucket/deep/cache.zarr"), "GET bucket/deep/cache.zarr/tokens/c/{}/0/0"
    s3.waits.set()  # the first chunk comes only once a second one is asked for
    steps = store.iter_chunks(ahead=1)
    next(steps)
    assert s3.most_at_once == 2
    assert [s3.requests[chunks.format(chunk)] for chunk in range(4)] == [1, 1, 0, 0]  # and no further
    list(steps)
    assert [s3.requests[chunks.format(chunk)] for chunk in range(4)] == [1, 1, 1, 1]

    store, s3.most_at_once = ActivationStore("s3://bucket/deep/cache.zarr"), 0
    list(store.iter_chunks(ahead=0))
    assert s3.most_at_once == 1
    before = s3.requests.copy()
    store.read_rows(9, 10)
    store.read_images([10, 9])
    assert s3.requests == before  # the last chunk is still there
    store.read_rows(0, 1)
    assert s3.requests - before == {chunks.format(0): 1}

    s3.waits.set()
    next(ActivationStore("s3://bucket/deep/cache.zarr").shuffled_tokens(5, pool_chunks=3))
    assert s3.most_at_once >= 2


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of two images, so that a chunk has two."""
    monkeypatch.setattr("stores.token_stream.SEGMENT_IMAGES", 2)
    return 2 * N_TOKENS * WIDTH * 2  # bytes


def test_parts_of_chunks_of_a_url_are_fetched_alone(root: Path, s3: ObjectServer, small_parts: int) -> None:
    """The same tokens as from the disk. Asked for are the bytes of the part, and once the end of the chunk."""
    remote_store, local = ActivationStore("s3://bucket/deep/cache.zarr"), ActivationStore(root)
    s3.requests.clear()
    for order, n_tokens in (("tokens", 35), ("images", 35)):
        ours, wanted = (
            list(islice(TokenStream([store], order=order, pool_chunks=1, seed=3).batches(n_tokens), 3))
            for store in (remote_store, local)
        )
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
        if order == "tokens":
            assert {asked[0][-5] for asked in s3.ranges} == {"0", "2", "3"}  # chunk 1 is unreadable
            assert {asked[1:] for asked in s3.ranges} == {
                *((0, small_parts), (small_parts, small_parts * 3 // 2)),  # images 0 and 1, 2
                (small_parts // 2, small_parts),  # image 10
                (CHUNK_BYTES - 4, CHUNK_BYTES),
            }
    assert not [name for name in s3.requests if name.startswith("GET") and "/c/1/" in name]


@pytest.mark.parametrize("what", ["missing", "short", "empty", "long", "another"])
def test_a_part_of_a_misshapen_chunk_is_named(url: str, root: Path, what: str, small_parts: int) -> None:
    store, path = ActivationStore(url), chunk_path(root, 2)
    raw, other = path.read_bytes(), chunk_path(root, 0).read_bytes()
    changed = {"short": raw[:-1], "empty": b"", "long": raw + b"0", "another": other}
    path.unlink()
    if what != "missing":
        path.write_bytes(changed[what])
    text = {"missing": "is missing", "another": "is not the chunk that the journal names"}.get(what, "bytes, expected")
    with pytest.raises(DamagedStore, match=rf"{url}/tokens/c/2/0/0 .*{text}"):
        store.begin_rows(2, range(1)).result()
    path.write_bytes(raw)
    np.testing.assert_array_equal(bits(store.begin_rows(2, range(1)).result()), bits(twin(root)[6:7]))
    path.write_bytes(raw[:100])  # later, too
    with pytest.raises(DamagedStore, match=f"has 100 bytes, expected {CHUNK_BYTES}"):
        next(TokenStream([store]).batches(35))


def test_a_server_that_gives_no_parts_of_files_is_one_line(root: Path, web: ObjectServer, small_parts: int) -> None:
    web.gives_ranges = False
    store = ActivationStore(f"{web.url}/bucket/deep/cache.zarr")
    with pytest.raises(
        StoreUnreachable, match=r"^the server of http.* does not give parts of a file \(HTTP ranges\), "
    ):
        next(TokenStream([store]).batches(35))
    assert store.read_chunk(0).shape == (3, N_TOKENS, WIDTH)


@pytest.mark.parametrize("rows", [range(0), range(2, 2), range(4), range(-1, 2), range(0, 3, 2)])
def test_rows_outside_of_a_chunk_are_refused(root: Path, rows: range) -> None:
    store = ActivationStore(root)
    with pytest.raises(IndexError, match=f"images {rows.start} to {rows.stop} outside the 3 of chunk 0"):
        store.begin_rows(0, rows)
    for chunk, images in ((3, 2), (4, 0), (-1, 0)):
        with pytest.raises(IndexError, match=f"outside the {images} of chunk {chunk}"):
            store.begin_rows(chunk, range(3))


def test_a_stream_that_is_closed_fetches_no_further(
    tmp_path: Path, s3: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pools of 60 parts are asked for; after the first batch nobody waits for the second."""
    write_cache(tmp_path / "bucket" / "a.zarr", random_tokens(120, 3, 2), chunk_images=1)
    fetched, goes_on = set[int](), threading.Event()

    def slowly(fetch: object, objects: object, spec: object, names: object, chunk: int, rows: range) -> Float16:
        fetched.add(chunk)
        if len(fetched) > 60:
            goes_on.wait(10)
        return random_tokens(1, 3, 2)

    monkeypatch.setattr("stores.activation_store._fetch_rows", slowly)
    batches = TokenStream([ActivationStore("s3://bucket/a.zarr")], pool_chunks=60).batches(10)
    next(batches)
    batches.close()
    goes_on.set()
    time.sleep(0.1)
    assert 60 <= len(fetched) <= 60 + 8  # as many threads


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("memory://x/y", "cannot be read: expected a local path, or a URL like s3://"),
        ("s3://", "cannot be read: expected a local path, or a URL like s3://"),
        ("ftp://host/x", "cannot be read: expected a local path, or a URL like s3://"),
        ("file://elsewhere/x", "cannot be read: expected a local path, or a URL like s3://"),
        ("https://me:hunter2@host/x", "the URL https://host/x holds more than a place"),
        ("https://host/x?signature=hunter2", "the URL https://host/x holds more than a place"),
        ("s3://bucket/../x", "cannot be read: expected a local path, or a URL like s3://"),
    ],
)
def test_urls_that_are_refused(given: str, what: str) -> None:
    """Before anything is asked for; a secret in one is not repeated."""
    pytest.importorskip("obstore", reason=NEEDS_OBSTORE)
    with pytest.raises(BadInput, match=re.escape(what)) as caught:
        ActivationStore(given)
    assert "hunter2" not in str(caught.value)


def test_without_obstore_a_url_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("obstore", "obstore.store", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        BadInput, match=r"reading s3://b/x needs the package obstore; .* pip install 'cytobarcode\[remote\]'"
    ):
        ActivationStore("s3://b/x")
    assert ActivationStore(root).read_chunk(0).shape == (3, N_TOKENS, WIDTH)


# --------------------------------------------------------------------------------------------------- commands


@pytest.mark.stress
def test_commands_on_a_url(made: Path, tmp_path: Path, s3: ObjectServer) -> None:
    """`cache info`, `sae train`, `encode` and `eval` of s3://... give what they give of the local cache."""
    shutil.copytree(made / "acts.zarr", tmp_path / "bucket" / "acts.zarr")
    settings = ["--expansion", "2", "--tokens", "2048", "--batch-tokens", "256"]
    where = {"url": "s3://bucket/acts.zarr", "path": str(tmp_path / "bucket" / "acts.zarr")}
    printed = {}
    for name, cache in where.items():
        run, latents = str(tmp_path / f"{name}.sae"), str(tmp_path / f"{name}.latents.zarr")
        for command in (
            ["cache", "info", cache],
            ["cache", "info", cache, "--json"],
            ["sae", "train", cache, "-o", run, *settings],
            ["sae", "encode", cache, run, "-o", latents],
            ["sae", "eval", run, cache, "--json"],
        ):
            done = CliRunner().invoke(cli, command)
            assert done.exit_code == 0, done.output
            printed[name, command[1], len(command)] = done.stdout
    assert printed["url", "info", 3].startswith("s3://bucket/acts.zarr: activation cache, version 1, complete")
    assert "1 of 10 images could not be read" in printed["url", "info", 3]
    info, local = (json.loads(printed[name, "info", 4]) for name in where)
    assert abs(info.pop("bytes") - local.pop("bytes")) < 4096  # the array's own metadata
    assert info == local
    found, local = (json.loads(printed[name, "eval", 5]) for name in where)
    assert (found.pop("store"), found.pop("sae")) != (local.pop("store"), local.pop("sae"))
    assert found == local
    one, two = (tmp_path / f"{name}.sae" / "sae.safetensors" for name in where)
    assert one.read_bytes() == two.read_bytes()
    stores = [LatentStore(tmp_path / f"{name}.latents.zarr") for name in where]
    assert stores[0].identity == stores[1].identity
    assert stores[0].read_images(0, 10).values.tobytes() == stores[1].read_images(0, 10).values.tobytes()

    edit_header(tmp_path / "bucket" / "acts.zarr", complete=False)
    done = CliRunner().invoke(cli, ["cache", "info", "s3://bucket/acts.zarr"])
    assert done.exit_code == 1
    assert "Error: s3://bucket/acts.zarr is incomplete" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["cache", "extract", "images", "s3://bucket/x.zarr"],
        ["cache", "verify", "s3://bucket/x.zarr"],
        ["sae", "train", "x.zarr", "-o", "s3://bucket/x.sae"],
        ["sae", "encode", "x.zarr", "x.sae", "-o", "s3://bucket/x.zarr"],
        ["barcode", "x.zarr", "-o", "s3://bucket/out"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_url_where_none_is_taken_is_wrong_usage(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a path it would lose a slash, and `s3:` would become a folder."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2
    assert (
        "is a URL; caches and latents are read from one by cache info, sae train, sweep, eval, encode, baseline"
        in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_the_message_names_the_commands_that_read_from_a_url() -> None:
    root = click.Context(cli)
    said = CliRunner().invoke(cli, ["cache", "verify", "s3://bucket/x.zarr"]).stderr.rpartition("from one by ")[2]
    groups = {part.split()[0]: part for part in re.split(r",? and (?=concept)|, (?=sae|barcode)", said)}
    for group in cli.list_commands(root):
        found = cli.get_command(root, group)
        names = found.list_commands(root) if isinstance(found, click.Group) else [group]
        for name in names:
            command = found.get_command(root, name) if isinstance(found, click.Group) else found
            assert command is not None
            takes = any(getattr(each.type, "urls", False) for each in command.params)
            assert takes == bool(re.search(rf"\b{name}\b", groups.get(group, ""))), (group, name)


@pytest.mark.stress
def test_training_goes_on_after_the_network_failed(
    tmp_path: Path, s3: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is saved when the next chunk does not come; the same call then ends as if nothing had been."""
    monkeypatch.setitem(remote._RETRY, "max_retries", 0)
    cache = write_cache(tmp_path / "bucket" / "a.zarr", random_tokens(40), chunk_images=2)
    config = tiny_config(batch_tokens=20, tokens=20 * 24, pool_chunks=2)
    whole = train([cache], tmp_path / "whole", config)

    def fail(done: int, total: int, metrics: object) -> None:
        s3.failing = {"/0/0": ["503"] * 200}

    with pytest.raises(StoreUnreachable, match=r"s3://bucket/a\.zarr cannot be read now"):
        train(["s3://bucket/a.zarr"], tmp_path / "run", config, progress=fail)
    assert [*(tmp_path / "run" / "state").glob("state-*.safetensors")]
    s3.failing = {}
    header = train(["s3://bucket/a.zarr"], tmp_path / "run", config)
    assert header.identity == whole.identity
    one, two = (tmp_path / name / "sae.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == two.read_bytes()


def test_encoding_goes_on_after_the_network_failed(
    made: Path, tmp_path: Path, s3: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first chunk that is not yet committed: what is done is not fetched again."""
    monkeypatch.setitem(remote._RETRY, "max_retries", 0)
    shutil.copytree(made / "acts.zarr", tmp_path / "bucket" / "acts.zarr")
    s3.failing = {"c/2/0/0": ["503"] * 9}
    with pytest.raises(StoreUnreachable):
        encode("s3://bucket/acts.zarr", made / "run", tmp_path / "latents.zarr")
    s3.failing = {}
    s3.requests.clear()
    encode("s3://bucket/acts.zarr", made / "run", tmp_path / "latents.zarr")
    assert [name for name in s3.requests if "/c/" in name and name.startswith("GET")] == [
        "GET bucket/acts.zarr/tokens/c/2/0/0"
    ]
    ours, local = LatentStore(tmp_path / "latents.zarr"), LatentStore(made / "latents.zarr")
    assert ours.identity == local.identity
    assert ours.read_images(0, 10).values.tobytes() == local.read_images(0, 10).values.tobytes()
