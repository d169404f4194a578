"""Barcodes on a cluster for real: `dask scheduler`, `dask worker` and `cyto barcode` as processes of their own.

Workers, the scheduler, files and packages go away in mid-job; what then is written must be the same bytes, and what is
said one line. A preload file holds workers at their fourth partition until a file is removed, so no test
depends on timing.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from artefacts import contents
from distributed import Client
from distributed.security import Security
from latent_stores import Row, local_client, random_latents, write_latents
from object_server import ObjectServer, serving
from places import ROOT

from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.cluster import workers
from stores import BadInput, BarcodeStore, DamagedStore, IncompleteStore, LatentSpec, LatentStore, LatentWriter, csr
from stores.csr_bulk import EntryReader
from stores.errors import SpecMismatch, StoreNotFound, StoreUnreachable
from stores.latent_store import remote_rows
from stores.tables import image_table, table_sha256, with_outcome

pytestmark = pytest.mark.stress

PATIENCE = 60.0  # seconds, for anything that is waited for
SMALL_PARTITIONS = 57_344  # bytes of a worker's memory: a partition is then about 20 of the images below

# a worker counts three partitions, then waits while the file "hold" is there, and leaves a file to say so
HOLD = """
import os, pathlib, time
import cytosae.barcodes.tasks as tasks
place = pathlib.Path(os.environ["HOLD_FOLDER"])
inner, seen = tasks.EntryReader, []
def reader(path, **rest):
    seen.append(path)
    while len(seen) > 3 and (place / "hold").exists():
        (place / f"waits-{os.getpid()}").touch()
        time.sleep(0.01)
    return inner(path, **rest)
tasks.EntryReader = reader
"""
# a machine without the package: as if it was not installed
WITHOUT_CYTO = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cytosae", "stores"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
OTHER_NUMPY = """
import importlib.metadata as metadata
of_package = metadata.version  # no name of HOLD, and before it, which imports what reads versions
metadata.version = lambda name: "1.99.9" if name == "numpy" else of_package(name)
"""


@dataclass
class Dask:
    """Processes started for a test, all ended with it, and what they said."""

    folder: Path
    address: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *arguments: object, **environment: str) -> subprocess.Popen[bytes]:
        settings = {f"DASK_DISTRIBUTED__WORKER__MEMORY__{name}": "False" for name in ("TARGET", "SPILL", "PAUSE")}
        settings |= {"PYTHONPATH": str(ROOT), "HOLD_FOLDER": str(self.folder)}
        with (self.folder / f"log-{len(self.processes)}").open("w") as log:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *map(str, arguments)],
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    env={**os.environ, **settings, **environment},
                )
            )
        return self.processes[-1]

    def log(self, process: subprocess.Popen[bytes]) -> Path:
        return self.folder / f"log-{self.processes.index(process)}"

    def scheduler(self, **environment: str) -> subprocess.Popen[bytes]:
        file = self.folder / f"scheduler-{len(self.processes)}.json"
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        process = self.run("dask", "scheduler", *options, "--scheduler-file", file, **environment)
        self.wait(lambda: file.exists() and bool(file.read_text()))
        self.address = json.loads(file.read_text())["address"]
        return process

    def worker(
        self, preload: str = "", *, memory: int = SMALL_PARTITIONS, nanny: bool = False, **environment: str
    ) -> subprocess.Popen[bytes]:
        options = ["--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--nthreads", "1"]
        options += [
            "--nanny" if nanny else "--no-nanny",
            "--memory-limit",
            str(memory),
            "--local-directory",
            str(self.folder),
        ]
        if preload:
            file = self.folder / f"preload_{len(self.processes)}.py"
            once = "import sys\nif not hasattr(sys, 'preloaded'):\n    sys.preloaded = True\n"  # Dask runs it twice
            file.write_text(once + textwrap.indent(preload, "    "))
            options += ["--preload", str(file)]
        return self.run("dask", "worker", self.address, *options, **environment)

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def dask_processes(folder: Path) -> Iterator[Dask]:
    dask = Dask(folder)
    try:
        yield dask
    finally:
        dask.end()


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    folder = tmp_path / "dask"
    folder.mkdir()
    with dask_processes(folder) as processes:
        yield processes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    """A scheduler and a worker that no test harms."""
    with dask_processes(tmp_path_factory.mktemp("dask")) as processes:
        processes.scheduler()
        processes.worker()
        yield processes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bucket/x.latents.zarr: 260 images of 5 tokens; barcodes: what a local run in one partition gives."""
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    patients = [int(rng.integers(10)) for _ in range(260)]
    rows: list[Row] = [
        (f"P{p}" if p else None, f"D{p % 3}" if p else None, i % 41 != 0) for i, p in enumerate(patients)
    ]
    (root / "bucket").mkdir()
    write_latents(latents_of(root), random_latents(1, (260, 5, 30), rows), rows)
    with local_client(1, 1) as client:
        write_barcodes(latents_of(root), root / "barcodes", BarcodeConfig(partition_images=260), client=client)
    return root


def latents_of(root: Path) -> Path:
    return root / "bucket" / "x.latents.zarr"


def command(latents: object, barcodes: Path, dask: Dask) -> subprocess.Popen[bytes]:
    """`cyto barcode`, as a user's process."""
    arguments = ["barcode", str(latents), "-o", str(barcodes), "--scheduler", dask.address]
    return dask.run("cli", *arguments)


def said_by(process: subprocess.Popen[bytes], dask: Dask, code: int) -> str:
    """What it said beside progress and its summary, when it has ended with this exit code."""
    process.wait(timeout=PATIENCE)
    said = dask.log(process).read_text().splitlines()
    assert process.returncode == code, said
    if code == 0:
        said = [
            line for line in said if not re.match(r"\S+/barcodes: [\d,]+ images|left out: |[\d.]+% of the nonz", line)
        ]
    return "\n".join(line for line in said if not line.startswith("barcode:"))


def refusal(latents: object, barcodes: Path, dask: Dask) -> str:
    """The one line with which it ends."""
    line = said_by(command(latents, barcodes, dask), dask, 1)
    assert line.startswith("Error: ")
    assert "\n" not in line, line
    return line


# ------------------------------------------------------------------------------------------- the same bytes


def test_a_cluster_gives_the_same_bytes(cluster: Dask, store: Path, tmp_path: Path) -> None:
    """In many small partitions; nothing of the check of the workers is left over."""
    assert said_by(command(latents_of(store), tmp_path / "barcodes", cluster), cluster, 0) == ""
    assert contents(tmp_path / "barcodes") == contents(store / "barcodes")
    assert "Compute Failed" not in cluster.said()
    assert len(set(re.findall(r"count_partition-\S+", cluster.said()))) > 8  # keys that were released


@pytest.mark.slow
def test_tls_as_the_manual_sets_it_up(dask: Dask, store: Path, tmp_path: Path) -> None:
    """The same bytes with the settings of docs/cluster.md; who has no key, or another one, is told in one line."""
    (settings,) = re.findall(r"tls.yaml <<EOF\n(.*?)\nEOF\n", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    for owner in ("mine", "other"):
        folder = tmp_path / owner
        (folder / ".dask-keys").mkdir(parents=True)
        made = Security.temporary()
        (folder / ".dask-keys" / "cert.pem").write_text(made.tls_ca_file)
        (folder / ".dask-keys" / "key.pem").write_text(made.tls_client_key)
        (folder / "tls.yaml").write_text(settings.replace("$HOME", str(folder)))
    mine = str(tmp_path / "mine")
    dask.scheduler(DASK_CONFIG=mine)
    dask.worker(DASK_CONFIG=mine)
    assert dask.address.startswith("tls://127.0.0.1:")
    arguments = ["barcode", latents_of(store), "-o", tmp_path / "barcodes", "--scheduler", dask.address]
    for strangers in ("", str(tmp_path / "other")):
        line = said_by(dask.run("cli", *arguments, DASK_CONFIG=strangers), dask, 1)
        assert re.fullmatch(rf"Error: no Dask scheduler answers at {dask.address} \(.*\); .*", line), line
    assert said_by(dask.run("cli", *arguments, DASK_CONFIG=mine), dask, 0) == ""
    assert contents(tmp_path / "barcodes") == contents(store / "barcodes")


def test_a_worker_killed_in_mid_job_changes_no_byte(dask: Dask, store: Path, tmp_path: Path) -> None:
    """Two hold the job; one is killed with a partition in its hands, and with results that only it had."""
    dask.scheduler()
    workers = [dask.worker(HOLD), dask.worker(HOLD)]
    (dask.folder / "hold").touch()
    process = command(latents_of(store), tmp_path / "barcodes", dask)
    dask.wait(lambda: all((dask.folder / f"waits-{worker.pid}").exists() for worker in workers))
    there = list((tmp_path / "barcodes" / "parts").glob("*.part"))
    assert len(there) == 6
    workers[0].send_signal(signal.SIGKILL)
    (dask.folder / "hold").unlink()
    assert said_by(process, dask, 0) == ""
    assert workers[0].wait() == -signal.SIGKILL
    assert contents(tmp_path / "barcodes") == contents(store / "barcodes")


def test_a_scheduler_that_goes_away_is_one_line_and_the_job_goes_on(dask: Dask, store: Path, tmp_path: Path) -> None:
    """Finished partitions stay; the next run, elsewhere and with other partitions, begins behind them."""
    barcodes = tmp_path / "barcodes"
    scheduler = dask.scheduler()
    worker = dask.worker(HOLD)
    (dask.folder / "hold").touch()
    process = command(latents_of(store), barcodes, dask)
    dask.wait((dask.folder / f"waits-{worker.pid}").exists)
    began = time.monotonic()
    scheduler.send_signal(signal.SIGKILL)
    line = said_by(process, dask, 1)
    assert time.monotonic() - began < 25
    assert re.fullmatch(
        rf"Error: the Dask scheduler at {dask.address} went away, or dropped the job; what is finished stays in "
        rf"{barcodes}: start a scheduler and workers again \(dask scheduler, dask worker\), and run the same command",
        line,
    )
    with pytest.raises(IncompleteStore, match="Run the same cyto barcode command again"):
        BarcodeStore(barcodes)
    worker.kill()
    worker.wait()
    n_images = sum(int(path.stem[10:]) - int(path.stem[:9]) for path in (barcodes / "parts").glob("*.part"))
    assert 40 <= n_images <= 80  # three partitions
    seen: list[int] = []
    with local_client(1, 2) as client:
        config = BarcodeConfig(partition_images=50)
        write_barcodes(
            latents_of(store), barcodes, config, client=client, progress=lambda done, total, state: seen.append(done)
        )
    assert seen[0] == n_images
    assert contents(barcodes) == contents(store / "barcodes")


# ------------------------------------------------------------------------------------------- workers that do not fit


def test_a_worker_without_the_package_is_named(dask: Dask, store: Path, tmp_path: Path) -> None:
    """Not installed; another numpy; another source: told before anything is written."""
    dask.scheduler()
    for preload, words in {
        WITHOUT_CYTO: r"cannot import cyto \S+ \(No module named 'cytosae'\): install it there",
        OTHER_NUMPY: r"has numpy 1.99.9, this command 2\.\S+: install the same there",
    }.items():
        worker = dask.worker(preload)
        line = refusal(latents_of(store), tmp_path / "barcodes", dask)
        assert re.search(rf"^Error: the worker at tcp://127\.0\.0\.1:\d+ {words}", line), line
        assert not (tmp_path / "barcodes").exists()
        worker.kill()
        worker.wait()


@pytest.mark.slow
def test_a_worker_that_comes_later_without_the_package_does_no_harm(dask: Dask, store: Path, tmp_path: Path) -> None:
    """It ends at the first task that it is given; the others do it."""
    dask.scheduler()
    first = dask.worker(HOLD)
    (dask.folder / "hold").touch()
    process = command(latents_of(store), tmp_path / "barcodes", dask)
    dask.wait((dask.folder / f"waits-{first.pid}").exists)
    dask.worker(WITHOUT_CYTO)
    dask.wait(lambda: dask.said().count("Register worker addr") == 2)
    (dask.folder / "hold").unlink()
    assert said_by(process, dask, 0) == ""
    assert contents(tmp_path / "barcodes") == contents(store / "barcodes")


@pytest.mark.parametrize(
    ("preload", "words"),
    [
        (
            WITHOUT_CYTO,
            r"no worker is left, and the worker at \S+ ended soon after it came, as one does that lacks cyto"
            r"|the worker at \S+ cannot import cyto",  # if it was asked before it ended
        ),
        (OTHER_NUMPY + HOLD, r"the worker at \S+ has numpy 1.99.9, this command"),
    ],
    ids=["ends at once", "stays"],
)
def test_workers_that_come_later_and_are_the_only_ones_are_named(
    dask: Dask, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: str, words: str
) -> None:
    """The one that fitted is killed. It says that it waits for workers, then what is wrong with the one that came."""
    monkeypatch.setattr(workers, "_CHECK_EVERY", 0.2)
    monkeypatch.setattr(workers, "_MOST_WITHOUT_WORKER", 5.0)
    dask.scheduler()
    first = dask.worker(HOLD)
    (dask.folder / "hold").touch()
    said: list[str] = []

    def hear(done: int, total: int, state: str) -> None:
        said.append(state)
        if state == "waiting for workers" and first.poll() is not None and len(dask.processes) == 2:
            dask.worker(preload)

    def kill() -> None:
        dask.wait((dask.folder / f"waits-{first.pid}").exists)
        first.kill()
        first.wait()

    killer = threading.Thread(target=kill)
    killer.start()
    with Client(dask.address) as client:
        client.wait_for_workers(1, timeout=PATIENCE)
        with pytest.raises(BadInput, match=words):
            write_barcodes(latents_of(store), tmp_path / "barcodes", BarcodeConfig(), client=client, progress=hear)
    killer.join()
    assert said[:1] == ["counting"]
    assert "waiting for workers" in said


def test_a_scheduler_without_the_package_is_named(dask: Dask, store: Path, tmp_path: Path) -> None:
    """It unpickles what it passes on."""
    (dask.folder / "sitecustomize.py").write_text(WITHOUT_CYTO)
    dask.scheduler(PYTHONPATH=str(dask.folder))
    dask.worker()
    line = refusal(latents_of(store), tmp_path / "barcodes", dask)
    assert re.search(r"^Error: the scheduler at tcp://\S+ cannot import cyto", line), line


@pytest.mark.slow
def test_a_worker_that_sees_other_files_is_named(dask: Dask, store: Path, tmp_path: Path) -> None:
    """As on a node without the shared disk: here a worker for which a folder's name means another."""
    elsewhere = "import pathlib, cytosae.cluster.workers as w\nw._FILE_WAIT = 0.2\ninner = w.Path\n"
    dask.scheduler()
    for words, hidden in {
        r"does not see \S+zarr.json: latents and output must lie where all workers": store,
        r"does not see \S+/barcodes/\.cyto-\w+: latents and": tmp_path,
    }.items():
        worker = dask.worker(f"{elsewhere}w.Path = lambda p: inner(str(p).replace({str(hidden)!r}, '/nowhere'))\n")
        line = refusal(latents_of(store), tmp_path / "barcodes", dask)
        assert re.search(rf"^Error: the worker at tcp://127\.0\.0\.1:\d+ {words}", line), line
        assert not (tmp_path / "barcodes").exists()
        worker.kill()
        worker.wait()


# ------------------------------------------------------------------------------------------- latents behind a URL


@pytest.fixture
def server(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A copy of the store as s3://bucket/x.latents.zarr, that a test may damage."""
    shutil.copytree(store / "bucket", tmp_path / "served" / "bucket")
    with serving(tmp_path / "served") as objects:
        for name, value in access(objects).items():
            monkeypatch.setenv(name, value)
        yield objects


def access(objects: ObjectServer) -> dict[str, Any]:
    return {
        "AWS_ENDPOINT_URL": objects.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }


URL = "s3://bucket/x.latents.zarr"


@pytest.mark.slow
def test_latents_are_read_from_a_url(server: ObjectServer, dask: Dask, tmp_path: Path, store: Path) -> None:
    """By workers on a cluster, each with the access that its own environment gives; the same bytes as from a path."""
    dask.scheduler()
    dask.worker(**access(server))
    assert said_by(command(URL, tmp_path / "barcodes", dask), dask, 0) == ""
    assert contents(tmp_path / "barcodes") == contents(store / "barcodes")


def test_a_worker_without_access_to_the_url_is_named(server: ObjectServer, cluster: Dask, tmp_path: Path) -> None:
    line = refusal(URL, tmp_path / "barcodes", cluster)
    assert re.search(r"^Error: the worker at \S+ cannot read a store: s3://bucket/x.latents.zarr ", line), line


def test_a_store_behind_a_url_reads_as_the_local_one(server: ObjectServer, store: Path) -> None:
    ours, theirs = LatentStore(URL), LatentStore(latents_of(store))
    assert (ours.identity, ours.nnz, str(ours.root)) == (theirs.identity, theirs.nnz, URL)
    assert ours.images.equals(theirs.images)
    assert np.array_equal(ours.image_indptr, theirs.image_indptr)
    for name in ("indices", "values", "indptr"):
        assert np.array_equal(getattr(ours.read_images(3, 40), name), getattr(theirs.read_images(3, 40), name))


def test_the_next_chunk_of_a_url_comes_while_this_one_is_counted(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each array ahead, not more, and none behind the last that is needed."""
    monkeypatch.setattr(csr, "CHUNK_ENTRIES", 400)
    rows: list[Row] = [("P", "D", True)] * 40
    local = server.root / "bucket" / "y.latents.zarr"
    write_latents(local, random_latents(2, (40, 5, 30), rows), rows)
    url, sha256 = "s3://bucket/y.latents.zarr", LatentStore(local).journal_sha256
    reader = EntryReader(f"{url}/X", shape=(200, 30), start=0, stop=150, objects=remote_rows(url, sha256))

    def asked_for() -> set[str]:
        return {
            f"{name}/{chunk}"
            for request in server.requests
            for name, chunk in re.findall(r"GET bucket/y\S+/X/(data|indices)/c/(\d+)", request)
        }

    pieces: Iterator[tuple[Any, ...]] = reader.entries()
    expected: Iterator[tuple[Any, ...]] = EntryReader(local / "X", shape=(200, 30), start=0, stop=150).entries()
    last = (int(reader.row_starts[-1]) - 1) // 400
    assert last >= 2
    for number, (ours, theirs) in enumerate(zip(pieces, expected, strict=True)):
        assert all(np.array_equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
        ahead = {f"{name}/{chunk}" for name in ("data", "indices") for chunk in range(min(number + 1, last) + 1)}
        deadline = time.monotonic() + PATIENCE
        while asked_for() < ahead:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert asked_for() == ahead


def test_what_is_wrong_behind_a_url_is_told(server: ObjectServer, tmp_path: Path, hide: None) -> None:
    """Missing, short, swapped and flipped chunks; another journal; a store made again in mid-job; no access."""
    with pytest.raises(StoreNotFound, match=r"no latent store at s3://bucket/nothing"):
        LatentStore("s3://bucket/nothing")
    root = server.root / "bucket" / "x.latents.zarr"
    chunk = root / "X" / "data" / "c" / "0"
    raw = chunk.read_bytes()
    for wrong, words in {
        raw[:-1]: rf"X/data/c/0 has {len(raw) - 1:,} bytes, expected {len(raw):,}",
        raw[:50] + bytes([raw[50] ^ 1]) + raw[51:]: r"X/data/c/0 is not the chunk that the journal names",
    }.items():
        chunk.write_bytes(wrong)
        with local_client(1, 1) as client, pytest.raises(DamagedStore, match=words):
            write_barcodes(URL, tmp_path / "barcodes", BarcodeConfig(), client=client)
    chunk.unlink()
    with pytest.raises(DamagedStore, match=r"x.latents.zarr/X/data/c/0 is missing"):
        LatentStore(URL)
    chunk.write_bytes(raw)
    with pytest.raises(DamagedStore, match=r"journal.jsonl is missing or was changed"):
        remote_rows(URL, "0" * 64)
    with pytest.raises(SpecMismatch, match="older cyto, which wrote no checksums"):
        remote_rows(URL, "")
    for name in ("data", "indices"):
        array = root / "X" / name / "zarr.json"
        array.write_text(re.sub(r'"shape":\s*\[\s*\d+\s*\]', '"shape":[9000000]', array.read_text()))
    with pytest.raises(DamagedStore, match=r"X/\w+/c/\d is not named in the journal"):
        LatentStore(URL)
    server.failing["zarr.json"] = ["403"] * 40
    with pytest.raises(StoreUnreachable, match="may not be read with the access"):
        LatentStore(URL)


@pytest.fixture
def hide() -> Iterator[None]:
    """The cache of journals, as in a process of its own."""
    remote_rows.cache_clear()
    yield
    remote_rows.cache_clear()


def test_a_url_as_output_is_refused(store: Path) -> None:
    arguments = [sys.executable, "-m", "cli", "barcode", str(latents_of(store)), "-o", "s3://bucket/x.barcodes"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "'s3://bucket/x.barcodes' is a URL" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------- many patients


@pytest.mark.slow
def test_ten_thousand_patients_in_bounded_memory(dask: Dask, tmp_path: Path) -> None:
    """20,000 images, 49,152 latents, 4.8 M nonzeros: a dense table of patients would be 2 GB in float32.

    Measured: the peak resident set of the worker, as the system counts it (ru_maxrss), above what
    a job of one patient needs.
    """
    peaks, n_latents = [], 49_152
    for n_patients in (1, 10_000):
        n = 2 * n_patients
        rng = np.random.default_rng(n)
        latent = np.sort(
            np.argsort(rng.random((n * 4, 60)), axis=1).astype(np.int64) * 800 + rng.integers(0, 800, (n * 4, 60)),
            axis=1,
        )
        values = rng.random((n * 4, 60)).astype(np.float32) + np.float32(0.01)
        values = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        people: dict[str, list[str | None]] = {
            "path": [f"{i:05d}.png" for i in range(n)],
            "patient": [f"{(7 * i) % n_patients:05d}" for i in range(n)],
            "disease": ["ABC"[(7 * i) % n_patients % 3] for i in range(n)],
        }
        images = with_outcome(image_table(people, source="test", dataset="d"), ["0" * 64] * n, [None] * n)
        spec = LatentSpec(
            sae_sha256="1" * 64,
            cache_sha256="2" * 64,
            cache={"backbone": "none", "trained": False, "block": 10},
            images_sha256=table_sha256(images),
            n_images=n,
            tokens_per_image=4,
            n_latents=n_latents,
            precision="fp32",
            value_bits=10,
            min_activation=0.0,
        )
        root = tmp_path / f"{n_patients}"
        writer = LatentWriter(root / "latents.zarr", spec, images)
        writer.append_tokens(latent.ravel(), values.ravel(), np.full(n * 4, 60))
        writer.commit(n)
        writer.finish()

        dask.scheduler()
        worker = dask.worker(memory=2 << 30)
        process = command(root / "latents.zarr", root / "barcodes", dask)
        assert said_by(process, dask, 0) == ""
        with Client(dask.address) as client:
            peaks.append(
                max(found.ru_maxrss * 1024 for found in client.run(resource.getrusage, resource.RUSAGE_SELF).values())
            )
        worker.kill()
        worker.wait()
    assert peaks[1] - peaks[0] < 400e6, peaks

    found = anndata.read_zarr(root / "barcodes" / "patient.zarr")
    expected = np.zeros((100, n_latents))
    for i in range(n):
        patient = (7 * i) % n_patients
        if patient < 100:
            rows = slice(4 * i, 4 * i + 4)
            np.add.at(expected[patient], latent[rows][values[rows] > np.float32(0.2)], 0.5)
    assert found.shape == (10_000, n_latents)
    assert found.obs_names.tolist() == [f"{i:05d}" for i in range(n_patients)]
    assert np.array_equal(found.X[:100].toarray(), expected.astype(np.float32))
    assert found.X.sum() == (values > np.float32(0.2)).sum() / 2


@pytest.mark.slow
def test_the_setting_of_malloc_that_the_docs_advise(dask: Dask) -> None:
    """`dask worker` sets it for its worker process; a variable in the environment wins."""
    dask.scheduler()
    for environment, expected in ({}, "65536"), ({"MALLOC_TRIM_THRESHOLD_": "268435456"}, "268435456"):
        worker = dask.worker(nanny=True, memory=1 << 30, **environment)
        with Client(dask.address) as client:
            client.wait_for_workers(1, timeout=PATIENCE)
            assert set(client.run(os.getenv, "MALLOC_TRIM_THRESHOLD_").values()) == {expected}
        worker.terminate()
        worker.wait()
