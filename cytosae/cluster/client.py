"""Where a job of Dask tasks runs: on a cluster that is there, or on one that is started for the time of the job."""

import logging
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import Client, KilledWorker
from distributed.versions import VersionMismatchWarning

from stores.errors import BadInput
from stores.machine import n_cores, open_files

from .private import PrivateCluster

# one process, one thread; zarr would start ten to read with. Workers take their settings from the environment
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "ZARR_ASYNC__CONCURRENCY": "4",
    "ZARR_THREADING__MAX_WORKERS": "2",
}

MEMORY_LIMIT = "2GiB"  # of a local worker
_FILES, _FILES_PER_WORKER = 128, 12  # open at once in this process: its own, and for each worker (measured: 9)


@contextmanager
def open_client(
    scheduler: str | None = None, *, workers: int = n_cores(), memory_limit: str = MEMORY_LIMIT
) -> Iterator[Client]:
    """A client of the scheduler at this address; None: of a cluster that lives as long as the client.

    Only the owner can talk to that cluster. It is started from the main thread only: Ctrl-C is for this process, not
    for the workers.

    Parameters
    ----------
    scheduler : tcp://HOST:PORT, or tls://HOST:PORT with the keys that Dask's configuration names
    workers : processes of one thread each, where a cluster is started
    memory_limit : of each of these, such as 2GiB

    Raises
    ------
    BadInput
        If no scheduler answers, it has no workers, the limit is no size, there are more workers than this process may
        have connections, or workers were ended again and again.
    """
    opened = _connected(scheduler) if scheduler else _started(workers, memory_limit)
    try:
        with opened as client:
            yield client
    except KilledWorker:
        limit = "its own, of dask worker" if scheduler else memory_limit
        remedy = "start workers with a larger --memory-limit" if scheduler else "raise --memory-limit"
        raise BadInput(
            f"a worker was ended again and again, most likely for its memory (limit {limit}); "
            f"{remedy} and run the same command again"
        ) from None


@contextmanager
def client_or_own(client: Client | None) -> Iterator[Client]:
    """The client that was given; None: one of a cluster that is started here, with the defaults of the command line."""
    if client is not None:
        yield client
        return
    with open_client(None, workers=n_cores(), memory_limit=MEMORY_LIMIT) as own:
        yield own


@contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    with _dask_silent():
        try:
            client = Client(scheduler, timeout="10s")
        except TypeError:  # what distributed raises where its configuration names no keys
            raise BadInput(
                f"no Dask scheduler answers at {scheduler} (tls:// needs keys, and Dask's configuration names none); "
                f"set distributed.comm.tls as docs/cluster.md says"
            ) from None
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise BadInput(f"no Dask scheduler answers at {scheduler} ({reason}); start one: dask scheduler") from None
        with client:
            try:
                client.wait_for_workers(1, timeout=60)
            except TimeoutError:
                raise BadInput(f"the scheduler at {scheduler} has no workers; start some: dask worker") from None
            yield client


def memory_bytes(memory_limit: str) -> int:
    """Bytes of a size such as 2GiB. Raises BadInput if it is none."""
    try:
        return int(dask.utils.parse_bytes(memory_limit))
    except ValueError:
        raise BadInput(f"--memory-limit must be a size like 2GiB; found {memory_limit!r}") from None


@contextmanager
def _started(workers: int, memory_limit: str) -> Iterator[Client]:
    limit = memory_bytes(memory_limit)
    if (most := (open_files() - _FILES) // _FILES_PER_WORKER) < workers:
        raise BadInput(
            f"--workers {workers} need more open files than this process may have: "
            f"{f'give at most {most}, or ' if most > 0 else ''}raise the limit "
            f"(ulimit -n {workers * _FILES_PER_WORKER + _FILES})"
        )
    settings = {
        "distributed.nanny.pre-spawn-environ": _ENVIRONMENT,
        "distributed.worker.profile.enabled": False,  # it is not used here, and interrupts every thread again and again
    }
    scratch = tempfile.TemporaryDirectory(
        prefix="cyto-", dir=dask.config.get("temporary-directory"), ignore_cleanup_errors=True
    )
    with scratch as private, dask.config.set(settings):
        with _ctrl_c_ignored():  # inherited by the workers: Ctrl-C is for this process, which then ends them
            cluster = PrivateCluster(
                workers,
                memory_limit=limit,
                scratch=Path(private),
                silence_logs=logging.CRITICAL,  # what goes wrong in a task comes back as its error
            )
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def _dask_silent() -> Iterator[None]:
    """Silence Dask's own messages: errors are reported by ours (other versions, a lost scheduler)."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client", "tornado.application")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VersionMismatchWarning)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
