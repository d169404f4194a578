"""Checks that the workers of a running Dask cluster can do a job, before anything is submitted and when it fails.

A worker imports our tasks by name, reads and writes by path, and must give the same bytes as every other. So: the same
package, the same versions of what decides the numbers or the compressed bytes, and the same files.
"""

import asyncio
import hashlib
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stores.errors import BadInput, ClusterLost, CytoError
from stores.files import sha256_file
from stores.latent_store import remote_rows
from stores.progress import Progress
from stores.runlog import package_version
from stores.spec import FORMATS, cyto_version

if TYPE_CHECKING:
    from distributed import Client, Future

_PACKAGES = ("dask", "distributed", "numba", "numcodecs", "numpy", "zarr")
_FILE_WAIT = 3.0  # seconds until a new file must be seen through a network file system
_CHECK_EVERY = 5.0  # seconds without a result
_MOST_WITHOUT_WORKER = 20.0  # seconds; then a worker that came and went within as many is named


def describe() -> dict[str, str]:
    """What must be equal on all machines: versions, formats, and the source of what workers do."""
    here = Path(__file__).parents[2]
    files = [path for package in ("stores", "cytosae") for path in sorted((here / package).rglob("*.py"))]
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "cyto": cyto_version(),
        "formats": ", ".join(f"{format.kind} {format.version}" for format in FORMATS.values()),
        **{name: package_version(name) for name in _PACKAGES},
        "code of cyto": source[:12],
    }


async def look(seen: dict[str, str], urls: dict[str, str], folder: str) -> str:
    """On a worker: what it does not see, as a message, or the name of a file that it leaves in `folder`.

    seen : path -> SHA-256 of a file that must be there
    urls : URL of a latent store -> SHA-256 of its journal
    """
    for path, sha256 in seen.items():
        for _ in range(int(_FILE_WAIT / 0.1)):
            found = _sha256(Path(path))
            if found == sha256:
                break
            await asyncio.sleep(0.1)
        else:
            return f"does not see {path}" if found is None else f"sees another file at {path}"
    for url, sha256 in urls.items():
        try:
            remote_rows(url, sha256)
        except CytoError as error:
            return f"cannot read a store: {error}"
    name = f".worker-{uuid.uuid4().hex}"
    try:
        (Path(folder) / name).touch(exist_ok=False)
    except OSError as error:
        return f"cannot write to {folder} ({error.strerror})"
    return name


@contextmanager
def cluster_job(client: "Client", folder: Path, latents: Mapping[Path | str, str]) -> Iterator[None]:
    """A job on the workers of `client`, which writes to `folder`. Checks the workers before it, and if it fails.

    A worker that comes later is looked at when a task has failed. A cluster that this process started itself has its
    files and its environment.

    Raises
    ------
    BadInput
        As `require_workers`.
    ClusterLost
        If the scheduler goes away.
    """
    from distributed import CancelledError, LocalCluster
    from distributed.comm.core import CommClosedError

    has_own_workers = isinstance(client.cluster, LocalCluster)
    address = _address(client)
    try:
        try:
            if not has_own_workers:
                require_workers(client, folder, latents)
            yield
        except (CancelledError, CommClosedError):
            raise
        except Exception:  # what a worker that does not fit makes of a task: any error
            if client.status == "running" and not has_own_workers:
                require_workers(client, folder, latents)  # tells of a worker that does not fit, if one is the reason
            raise
    except Exception as error:  # dask tells of a lost scheduler in several ways
        is_lost = isinstance(error, CancelledError | CommClosedError) or client.status != "running"
        if not is_lost or isinstance(error, CytoError):
            raise
        raise ClusterLost(
            f"the Dask scheduler at {address} went away, or dropped the job; what is finished stays in {folder}: start "
            f"a scheduler and workers again (dask scheduler, dask worker), and run the same command"
        ) from None


def require_workers(client: "Client", folder: Path, latents: Mapping[Path | str, str]) -> None:
    """Refuse workers that lack this package, have another version, or do not see the same files.

    latents : stores that are read, each with the SHA-256 of its journal

    Raises
    ------
    BadInput
        Naming a worker and what to do.
    """
    ours = describe()
    _require_equal("scheduler", {_address(client): _on_scheduler(client)}, ours)
    _require_equal("worker", client.run(describe, on_error="return"), ours)
    local = {path / "zarr.json" for path in latents if isinstance(path, Path)}
    nonce = folder / f".cyto-{uuid.uuid4().hex}"
    nonce.write_bytes(nonce.name.encode())
    left: list[Path] = []
    try:
        seen = {str(path): sha256_file(path) for path in (nonce, *sorted(local))}
        urls = {path: sha256 for path, sha256 in latents.items() if isinstance(path, str)}
        found = client.run(look, seen, urls, str(folder), on_error="return")
        left = [folder / str(name) for name in found.values() if str(name).startswith(".worker-")]
        wrong = {worker: what for worker, what in found.items() if not (folder / str(what)).is_file()}
        for worker, what in wrong.items():
            words = f"writes to another {folder}" if str(what).startswith(".worker-") else str(what)
            raise BadInput(
                f"{_who('worker', worker, wrong, found)} {words}: latents and output must lie where all workers "
                f"see them, under the same path"
            )
    finally:
        for path in (nonce, *left):
            path.unlink(missing_ok=True)


def prepare_workers(client: "Client", warm_up: Callable[[], Any]) -> None:
    """While this process plans, let the workers that it started run `warm_up`, which imports and compiles."""
    from distributed import LocalCluster, fire_and_forget

    if isinstance(client.cluster, LocalCluster):
        for worker in client.scheduler_info()["workers"]:
            fire_and_forget(client.submit(warm_up, workers=[worker], pure=False))


class Watch:
    """Waits for tasks, and looks meanwhile whether there are workers that can do them."""

    def __init__(self, client: "Client", progress: Progress) -> None:
        """What is told through `tell` goes to `progress`, which also hears that no worker is there."""
        self.client, self._progress, self._told = client, progress, (0, 0)
        self._began, self._without_since = time.time(), 0.0
        self._fitting = set(client.scheduler_info()["workers"])  # were looked at before the job began

    def tell(self, done: int, total: int, state: str) -> None:
        """How far the job is."""
        self._told = (done, total)
        self._progress(done, total, state)

    def completed(self, futures: "Sequence[Future]") -> "Iterator[tuple[Future, Any]]":
        """The futures and their results, as they come.

        Raises
        ------
        BadInput
            If the only workers that came are none for this job.
        """
        from distributed import CancelledError, as_completed

        coming, looked = as_completed(list(futures), with_results=True), time.monotonic()
        while not coming.is_empty():
            if not coming.has_ready() and time.monotonic() - looked > _CHECK_EVERY:
                self._look()
                looked = time.monotonic()
            if not coming.has_ready():
                with coming.thread_condition:
                    coming.thread_condition.wait(0.1)
                continue
            future, result = next(coming)
            if isinstance(result, CancelledError):  # as_completed does not raise it
                raise result
            yield future, result
            looked = time.monotonic()

    def results(self, futures: "Sequence[Future]") -> list[Any]:
        """All results, in the order of the futures."""
        found = {future.key: result for future, result in self.completed(futures)}
        return [found[future.key] for future in futures]

    def _look(self) -> None:
        there = set(self.client.scheduler_info()["workers"])
        late = there - self._fitting
        if there and not there - late:  # all workers are new: check that they fit
            found = self.client.run(describe, workers=list(late), on_error="return")
            _require_equal("worker", found, describe())
            self._fitting |= set(found)
        if there:
            self._without_since = 0.0
            return
        self._progress(*self._told, "waiting for workers")
        self._without_since = self._without_since or time.time()
        if time.time() - self._without_since > _MOST_WITHOUT_WORKER and (gone := self._came_and_went()):
            raise BadInput(
                f"no worker is left, and the worker at {gone} ended soon after it came, as one does that lacks cyto or "
                f"has another version (its log says why): start workers in the environment that this command runs in, "
                f"and run the same command again"
            )

    def _came_and_went(self) -> str:
        """The last worker that came in the middle of the job and stayed for seconds only; "" if there is none."""
        came: dict[str, float] = {}
        gone = ""
        for at, event in self.client.get_events("all"):
            worker = event.get("worker", "")
            if event.get("action") == "add-worker" and at > self._began:
                came[worker] = at
            elif event.get("action") == "remove-worker" and at - came.get(worker, 0.0) < _MOST_WITHOUT_WORKER:
                gone = worker
        return gone


def _address(client: "Client") -> str:
    return str(client.scheduler.address) if client.scheduler else "an unknown address"


def _on_scheduler(client: "Client") -> Any:
    """The scheduler, too, imports what it passes on."""
    try:
        return client.run_on_scheduler(describe)
    except (ImportError, AttributeError) as error:
        return error


def _require_equal(role: str, found: Mapping[str, Any], ours: dict[str, str]) -> None:
    wrong = {address: _difference(theirs, ours) for address, theirs in found.items() if theirs != ours}
    for address, what in wrong.items():
        raise BadInput(f"{_who(role, address, wrong, found)} {what}")


def _difference(theirs: Any, ours: dict[str, str]) -> str:
    if not isinstance(theirs, dict):
        missing = re.search(r"No module named '[^']*'", str(theirs))
        return (
            f"cannot import cyto {ours['cyto']} ({missing[0] if missing else theirs}): install it there, or start it "
            f"in the environment that this command runs in"
        )
    name = next(name for name in ours if theirs.get(name) != ours[name])
    return (
        f"has {name} {theirs.get(name)}, this command {ours[name]}: install the same there, or start it in the "
        f"environment that this command runs in"
    )


def _who(role: str, address: str, wrong: Sequence[str] | Mapping[str, Any], found: Mapping[str, Any]) -> str:
    more = f" ({len(wrong)} of {len(found)} {role}s)" if len(wrong) > 1 else ""
    return f"the {role} at {address}{more}"


def _sha256(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None
