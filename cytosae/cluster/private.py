"""A Dask cluster on this machine that only its owner can connect to. Workers import this first: only Dask in here.

Every user who connects to a Dask process can run code as its owner, and 127.0.0.1 is open to all users. So all
processes speak TLS only, and both sides show a key that was made for this cluster; it lies on a disk for as long as
OpenSSL takes to read it, in a folder of the owner's. None of them listens for HTTP. Workers import from their scratch
folder and unpickle what they find there, so it lies where only the owner can enter.
"""

from pathlib import Path
from typing import Any

from distributed import LocalCluster, Nanny, Scheduler, Worker
from distributed.security import Security


class _NoHttp:
    """A Dask process without its HTTP server, which would answer every user of the machine."""

    def start_http_server(self, *arguments: Any, **settings: Any) -> None:
        pass


class _Scheduler(_NoHttp, Scheduler):
    pass


class _Worker(_NoHttp, Worker):
    pass


class _Nanny(Nanny):
    """Watches over a process of _Worker."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "worker_class": _Worker})


class PrivateCluster(LocalCluster):
    """Processes of one thread each.

    Parameters
    ----------
    scratch : a folder that only the owner can enter
    memory_limit : bytes, of each process
    silence_logs : level of `logging` below which nothing is said
    """

    def __init__(self, workers: int, *, memory_limit: int, scratch: Path, silence_logs: int) -> None:
        super().__init__(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=memory_limit,
            host="127.0.0.1",
            security=Security.temporary(),
            worker_class=_Nanny,
            local_directory=str(scratch),
            dashboard_address=None,
            silence_logs=silence_logs,
        )

    async def _start(self) -> None:
        self.scheduler_spec["cls"] = _Scheduler  # LocalCluster leaves no choice
        await super()._start()
