"""When a state is saved, and how training goes on meanwhile.

By time (`SAVE_EVERY`), or every so many steps. Between two steps the tensors are copied: on a GPU to the GPU, in the
time of a copy there; where its memory is short, to the host. A thread writes the copy while training goes on. So there
is one copy, and one state on its way, whatever the speed of the disk: the next save waits for the one before, and by
time the thread also rests three times as long as it has written. Where there is no memory for a copy, the state is
written on the spot.

A state that cannot be written is a warning, and the states before it stay; after `TRIES` in a row it is an error. A
kill leaves a `.partial` file, which the next start removes. Nothing here changes what is computed.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stores.errors import BadInput
from stores.machine import free_on_disk

from .state import Snapshot, TrainState, look_at, write_state

SAVE_EVERY = 120.0  # seconds
MOST_STATE_GB = 32.0  # 10^9 bytes of saved states at a time
TRIES = 3  # states in a row that may fail to be written
_REST = 3.0  # times as long as it has written, the thread rests
_FREE_IF_UNKNOWN = 4 << 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SaveRule:
    """When states are saved, and how many stay.

    seconds : between two saved states, above 0; None: not by time
    steps : a state at each multiple of it, >= 1; None: not by steps
    keep : saved states that stay on disk while a run is unfinished, >= 1
    most_gb : 10^9 bytes that the saved states of all runs of a pass take at most, beyond one for each run
    """

    seconds: float | None = SAVE_EVERY
    steps: int | None = None
    keep: int = 2
    most_gb: float = MOST_STATE_GB

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise BadInput(f"expected more than 0 seconds between two saved states; found {self.seconds}")
        if self.steps is not None and self.steps < 1:
            raise BadInput(f"expected at least 1 step between two saved states; found {self.steps}")
        if self.keep < 1:
            raise BadInput(f"expected at least 1 saved state to keep; found {self.keep}")
        if not self.most_gb > 0:
            raise BadInput(f"expected more than 0 GB for saved states; found {self.most_gb}")

    @classmethod
    def of(cls, save_every: float | None, checkpoint_every: int | None, keep: int, most_gb: float) -> "SaveRule":
        """By time, every two minutes if nothing is said; with steps alone not by time."""
        if save_every is None and checkpoint_every is None:
            save_every = SAVE_EVERY
        return cls(seconds=save_every, steps=checkpoint_every, keep=keep, most_gb=most_gb)

    def within(self, n_bytes: list[int]) -> "SaveRule":
        """The rule for runs whose states have so many bytes each: fewer stay, down to one, where they are too large.

        While a state is written, it is there beside those that stay.
        """
        n_fit = int((self.most_gb * 1e9 - max(n_bytes)) // sum(n_bytes))
        return replace(self, keep=max(1, min(self.keep, n_fit)))

    def most_bytes(self, n_bytes: list[int]) -> int:
        """Bytes on disk at the worst moment, for runs whose states have so many bytes each."""
        return self.keep * sum(n_bytes) + max(n_bytes)


def space_warnings(root: Path, rule: SaveRule, n_bytes: list[int]) -> tuple[str, ...]:
    """One line if the disk of `root` has no room for the states, else none."""
    free, needed = free_on_disk(root), rule.most_bytes(n_bytes)
    if free >= needed:
        return ()
    return (f"saved states take up to {needed / 1e9:.1f} GB in {root}, where {free / 1e9:.1f} GB are free",)


class Saver:
    """Writes states in a thread, one at a time."""

    def __init__(self, rule: SaveRule | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rule, self._clock = rule or SaveRule(), clock
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[Path, int, Future[float]] | None = None  # folder, step, seconds that writing took
        self._rests_until = -float("inf")
        self._n_failed = 0

    def now(self) -> float:
        """The time, in seconds, by which states are due."""
        return self._clock()

    def is_due(self, step: int, saved_at: float) -> bool:
        """Is a run to be saved, behind `step` steps, that was last saved (or begun) at `saved_at`?

        Raises the error of the thread, if there was one that is not to be survived.
        """
        if self.rule.steps is not None and step % self.rule.steps == 0:
            return True
        now = self._clock()
        if self.rule.seconds is None or now - saved_at < self.rule.seconds:
            return False
        self._settle(wait=False)
        return self._pending is None and now >= self._rests_until

    def begin(self, root: Path, state: TrainState) -> None:
        """Copy the state, and write it to the folder `root` in the thread. Waits for the state before.

        Raises
        ------
        OSError
            If states cannot be written, `TRIES` times in a row.
        """
        self._settle(wait=True)
        found = snapshot(state)
        if found is None:  # no memory for a copy
            self._take_result(root, state.step, lambda: self._write(root, look_at(state)))
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="save state")
        self._pending = (root, found.step, self._thread.submit(self._write, root, found))

    def save_now(self, root: Path, state: TrainState) -> None:
        """Write the state to the folder `root` before this returns, unless it is there already.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        if self._pending is not None:
            pending_root, step, _ = self._pending
            n_failed = self._n_failed
            self.wait()
            if (pending_root, step) == (root, state.step) and self._n_failed <= n_failed:
                return
        write_state(root, look_at(state), keep=self.rule.keep)

    def wait(self, root: Path | None = None) -> None:
        """Until what was begun (in the folder `root`; None: in any) is on the disk. A failure is a warning."""
        if self._pending is not None and root in (None, self._pending[0]):
            try:
                self._settle(wait=True)
            except OSError:
                pass  # it was told

    def close(self) -> None:
        """Wait, and end the thread; it starts again when it is needed."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _write(self, root: Path, found: Snapshot) -> float:
        began = self._clock()
        write_state(root, found, keep=self.rule.keep)
        return self._clock() - began

    def _settle(self, *, wait: bool) -> None:
        """Take the result of what was begun, if it is there."""
        if self._pending is None or not (wait or self._pending[2].done()):
            return
        root, step, future = self._pending
        future.exception()  # an interrupt while this waits leaves it pending
        self._pending = None
        self._take_result(root, step, future.result)

    def _take_result(self, root: Path, step: int, result: Callable[[], float]) -> None:
        try:
            self._rests_until = self._clock() + _REST * result()
            self._n_failed = 0
        except OSError as error:
            self._n_failed += 1
            _log.warning(
                "%s: the state of step %s could not be saved (%s); the states before it stay",
                root,
                f"{step:,}",
                error.strerror or error,
            )
            if self._n_failed >= TRIES:
                raise


def snapshot(state: TrainState) -> Snapshot | None:
    """A copy of the state that the next steps do not change; None if there is no memory for one.

    On a GPU it stays there if, beside it, as much is free again; the host does not wait for the copy.
    """
    found = look_at(state)
    device = state.steps_since_fired.device
    try:
        if device.type == "cuda" and free_memory(str(device)) >= 2 * found.n_bytes:
            tensors = {name: value.clone() for name, value in found.tensors.items()}
            return replace(found, tensors=tensors, ready=torch.cuda.current_stream(device).record_event())
        if free_memory("cpu") < 2 * found.n_bytes:
            return None
        # in the layout of the weights, as memory is copied fastest; the thread turns what is stored by latent
        return replace(found, tensors={name: _on_host(value) for name, value in found.tensors.items()})
    except (MemoryError, torch.OutOfMemoryError):
        return None


def _on_host(value: torch.Tensor) -> torch.Tensor:
    if value.device.type == "cpu":
        return value.clone()
    return torch.empty_like(value, device="cpu").copy_(value)  # in its own layout


def free_memory(device: str) -> int:
    """Free memory on the device, in bytes; on a CPU within the limit of the container."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = _FREE_IF_UNKNOWN
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    except OSError:  # not Linux
        pass
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max": without a limit
        return free
