"""Several processes that train one SAE together, as torchrun starts them: each works on its slice of every batch.

Sums over all ranks give every rank the gradients of the whole batch, so all ranks take the same step. With one process
every method returns at once.

A rank that leaves early would let the others wait for ever. So every exchange begins with a question that is asked on
the hosts, through gloo, also where tensors go through NCCL: is each rank still there? A rank that raises an error, in
whatever line, answers with it when it leaves `joined_ranks`; the others then raise `OtherProcessStopped` from their
next exchange. After that all wait for each other once more, so that rank 0 can save the state before torchrun, which
sees the first process end, ends the others. One question takes about 0.1 ms.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from stores.errors import BadInput, CytoError

_LONGEST_WAIT = timedelta(hours=6)  # of the others for what one rank does alone, as measuring held-out images


class OtherProcessStopped(CytoError):
    """Another process of the same run has raised an error, which it prints, or has been ended."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among all. Every method that communicates must be called on all ranks, in the same order."""

    rank: int = 0
    size: int = 1
    hosts: Any = None  # the group of gloo in which the hosts talk
    _known: list[BaseException | None] = field(default_factory=list)  # once all ranks know that the run stops

    @property
    def is_first(self) -> bool:
        """True on rank 0, the one that writes files."""
        return self.rank == 0

    def local_slice(self, n: int) -> slice:
        """This rank's slice of n tokens; `TokenStream.batches` cuts batches in the same way."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def all_reduce_sum_(self, *tensors: torch.Tensor) -> None:
        """In place: the sum over all ranks."""
        if self.size > 1:
            with self._exchange():
                for tensor in tensors:
                    dist.all_reduce(_dense(tensor))

    def all_reduce_any_(self, flags: torch.Tensor) -> None:
        """In place, for booleans: True where any rank has True."""
        if self.size > 1:
            counts = flags.to(torch.int32)
            with self._exchange():
                dist.all_reduce(counts)
            flags.copy_(counts > 0)

    def all_gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The values of each rank, by rank; shape and type must be equal on all.

        values : contiguous
        """
        if self.size == 1:
            return [values]
        of_all = [torch.empty_like(values) for _ in range(self.size)]  # before the others rely on this rank
        with self._exchange():
            dist.all_gather(of_all, values)
        return of_all

    def broadcast_(self, *tensors: torch.Tensor) -> None:
        """In place: the values of rank 0."""
        if self.size > 1:
            with self._exchange():
                for tensor in tensors:
                    dist.broadcast(_dense(tensor), src=0)

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank; it is pickled."""
        if self.size == 1:
            return value
        values = [value]
        with self._exchange():
            dist.broadcast_object_list(values, src=0, group=self.hosts)
        return values[0]

    def require_equal(self, value: Any, what: str) -> None:
        """Raise BadInput on every rank unless all have this value.

        what : its name, in the plural
        """
        if self.size == 1:
            return
        with self._exchange():
            found = self._told(value)
        if any(other != found[0] for other in found):
            said = ", ".join(f"process {rank}: {other}" for rank, other in enumerate(found[:4]))
            raise BadInput(
                f"all processes of a run must work on the same; found different {what} ({said}). Caches and the folder "
                f"of the run must be the same files on all machines"
            )

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            self._meet()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """In the block all ranks exchange something; what may fail on one of them, as making room, comes before."""
        self._meet()
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            self._known.append(None)
        else:
            return
        raise _error_of(_ENDED, self.size)

    def _meet(self) -> None:
        """All ranks come here. Raises if one of them has left with an error."""
        errors = self._stopped(None)
        if errors:
            self._known.append(None)
            raise _error_of(errors, self.size)

    def _leave(self, error: BaseException) -> None:
        """Tell all others that this rank stops, if they do not know, and wait until they have done what is left."""
        with suppress(RuntimeError):  # a process that was ended
            if not self._known:
                self._known.append(error)
                self._stopped(error)
            dist.all_reduce(torch.zeros(()), group=self.hosts)

    def _stopped(self, error: BaseException | None) -> dict[int, tuple[str, bool]]:
        """By rank: what has stopped it, in a line, and whether it was interrupted. Empty, as nearly always: nothing."""
        n_stopped = torch.tensor(int(error is not None))
        try:
            dist.all_reduce(n_stopped, group=self.hosts)
            if not int(n_stopped):
                return {}
            found = self._told(None if error is None else _told_of(error))
        except RuntimeError:  # of gloo: a connection was closed
            return _ENDED
        return {rank: of_rank for rank, of_rank in enumerate(found) if of_rank is not None}

    def _told(self, value: Any) -> list[Any]:
        """The values of all ranks; they are pickled."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values


_ENDED = {-1: ("", False)}  # what has stopped a process that could not say it
ALONE = Ranks()


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started (it sets WORLD_SIZE), or this process alone.

    device : cpu, or cuda:N with a GPU for each process of a machine, which becomes the current one

    Raises
    ------
    BadInput
        If two processes of this machine would use the same GPU.
    OtherProcessStopped
        In the block, from an exchange: if another process has raised an error, or was ended.
    KeyboardInterrupt
        Likewise, if another process was interrupted.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    with ExitStack() as stack:
        gpu = _own_gpu(device) if device.startswith("cuda") else None
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # before NCCL begins, which takes the current one
                dist.init_process_group("nccl", device_id=gpu, timeout=_LONGEST_WAIT)
            else:
                dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
            stack.callback(dist.destroy_process_group)
            hosts = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        except RuntimeError as error:
            raise BadInput(
                f"the processes of this run cannot reach each other: {(str(error).splitlines() or ['unknown'])[0]}. "
                f"On several machines, name their network in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            ) from None
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), hosts)
        try:
            yield ranks
            ranks.barrier()
        except BaseException as error:
            ranks._leave(error)
            raise


@contextmanager
def interrupted_between_steps(ranks: Ranks) -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM in the block only count; the function that is given raises KeyboardInterrupt if there was one.

    So a signal, which reaches the ranks at different places of a step, stops all of them between two steps, and saving
    the state is not cut off by the next one. With one process signals stay as they are. Other threads than the main
    one get none.
    """
    if ranks.size == 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def raise_if_interrupted() -> None:
        if received:
            raise KeyboardInterrupt

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not set in Python
    try:
        for number in before:
            signal.signal(number, lambda number, frame: received.append(number))
        yield raise_if_interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _own_gpu(device: str) -> torch.device:
    """The GPU of this process, by number."""
    gpu = torch.device(device)
    if gpu.index is None:
        gpu = torch.device("cuda", torch.cuda.current_device())
    n_here, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if n_here > 1 and torch.cuda.device_count() > 1 and gpu.index != local_rank:
        raise BadInput(
            f"each of the {n_here} processes on {socket.gethostname()} must have a GPU of its own; found device "
            f"{device!r} for process {local_rank}. Leave --device out, or give --device cuda"
        )
    return gpu


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A transposed weight or gradient is dense in memory, which is all that a sum or a copy needs."""
    return tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor


def _told_of(error: BaseException) -> tuple[str, bool]:
    lines = str(error).strip().splitlines() or [""]
    line = lines[0] if isinstance(error, CytoError) else f"{type(error).__name__}: {lines[0]}"
    return line, isinstance(error, KeyboardInterrupt)


def _error_of(errors: dict[int, tuple[str, bool]], size: int) -> BaseException:
    """The error of a rank that did not stop by itself."""
    rank, (line, is_interrupted) = min(errors.items())
    if is_interrupted:
        return KeyboardInterrupt()
    if rank < 0:
        return OtherProcessStopped(
            f"another of the {size} processes of this run was ended; run the same command again to continue from the "
            f"last saved state"
        )
    return OtherProcessStopped(f"process {rank} of {size} stopped: {line}")
