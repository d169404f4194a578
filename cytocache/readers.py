"""Reads and resizes images in worker processes, ahead of their use, and gives them in order.

A worker that crashes or does not answer is replaced, and its image is tried once more; if the new worker crashes too,
the image is listed as unreadable. Linux and macOS.
"""

import json
import mmap
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from stores.errors import CytoError

from .archive_member import BadArchive, Member
from .archives import locate
from .preprocess import Preprocess

SECONDS_PER_IMAGE = 60.0  # the largest allowed image takes two
_SECONDS_TO_START = 120.0  # of a process; long for a Python on a slow network disk
_GROUP = 16  # images per request, at most
_PACKAGE_ROOT = os.fspath(Path(__file__).resolve().parents[1])

Outcome = tuple[str | None, str | None, str | None]  # SHA-256 of the file, error, what is cut off; None: there is none


@dataclass(frozen=True)
class ReadPictures:
    """A batch of resized images, and for each file its hash or error."""

    pixels: npt.NDArray[np.uint8]  # (n, size, size, 3), shared memory; zeros where unreadable
    content_hash: list[str | None]
    errors: list[str | None]
    truncated: list[str | None] = field(default_factory=list)  # what is missing of files that end too early


class ImageReaders:
    """A pool of reader processes, for use in a `with`.

    Memory: `n_slots` batches of pixels, shared between all processes; each process holds one decoded image.
    """

    def __init__(
        self,
        n_workers: int,
        *,
        batch_size: int,
        size: int,
        preprocess: Preprocess | None = None,
        seconds_per_image: float = SECONDS_PER_IMAGE,
        allow_truncated: bool = False,
    ):
        """Start the processes.

        Parameters
        ----------
        batch_size : of the largest batch that will be read
        size : pixels along each side after resizing
        preprocess : how images get this size; None: as for DinoBloom
        allow_truncated : see `read_image_file`
        """
        preprocess = replace(preprocess or Preprocess(), size=size)
        self._seconds = seconds_per_image
        self._group = max(1, min(_GROUP, batch_size // n_workers))
        n_slots = 2 + -(-4 * n_workers * self._group // batch_size)  # four requests ahead for every worker
        self._image_bytes = size * size * 3
        self._memory = _shared_file(n_slots * batch_size * self._image_bytes)
        mapped = mmap.mmap(self._memory.fileno(), 0)
        self._slots = np.frombuffer(mapped, np.uint8).reshape(n_slots, batch_size, size, size, 3)
        self._size, self._closed = size, False
        self._workers = [
            _Worker(self._memory.fileno(), preprocess, seconds_per_image, allow_truncated) for _ in range(n_workers)
        ]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(n_workers, thread_name_prefix="read")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._memory.close()

    def read(self, batches: Iterable[list[Path]]) -> Iterator[ReadPictures]:
        """The images of each batch, in order. The pixels of a batch are valid until the next batch is requested."""
        coming, free = iter(batches), deque(range(len(self._slots)))
        waiting: deque[tuple[int, list[Future[list[Outcome]]]]] = deque()
        while True:
            while free and (paths := next(coming, None)) is not None:
                slot = free.popleft()
                waiting.append((slot, self._submit(slot, paths)))
            if not waiting:
                return
            slot, reading = waiting.popleft()
            outcomes = [outcome for group in reading for outcome in group.result()]
            hashes, errors, truncated = ([outcome[n] for outcome in outcomes] for n in range(3))
            yield ReadPictures(self._slots[slot, : len(outcomes)], hashes, errors, truncated)
            free.append(slot)

    def _submit(self, slot: int, paths: list[Path]) -> list[Future[list[Outcome]]]:
        at = slot * len(self._slots[slot]) * self._image_bytes
        return [
            self._threads.submit(self._read, at + start * self._image_bytes, paths[start : start + self._group])
            for start in range(0, len(paths), self._group)
        ]

    def _read(self, offset: int, paths: list[Path]) -> list[Outcome]:
        """In a thread: let an idle worker read a group of images."""
        worker, outcomes, n_tries = self._idle.get(), list[Outcome](), 0
        try:
            while len(outcomes) < len(paths):
                at = offset + len(outcomes) * self._image_bytes
                done, failure = worker.ask(at, paths[len(outcomes) :], self._seconds)
                outcomes += done
                if failure is None:
                    break
                worker.restart()
                if self._closed:  # checked after the restart, so that the new process is killed by `__exit__` or here
                    worker.kill()
                    raise RuntimeError("the readers were closed")
                n_tries = 1 if done else n_tries + 1
                if n_tries == 2:  # this image is the cause
                    at = offset + len(outcomes) * self._image_bytes
                    self._slots.reshape(-1)[at : at + self._image_bytes] = 0
                    outcomes.append((None, failure, None))
                    n_tries = 0
            return outcomes
        finally:
            self._idle.put(worker)


class _Worker:
    """One reader process and the pipes to it."""

    def __init__(self, descriptor: int, preprocess: Preprocess, seconds: float, allow_truncated: bool) -> None:
        said = json.dumps(preprocess.to_dict())
        self._arguments = [str(descriptor), said, str(2 * seconds), str(int(allow_truncated))]
        self._descriptor = descriptor
        self._start()

    def ask(self, offset: int, paths: list[Path], seconds: float) -> tuple[list[Outcome], str | None]:
        """The outcomes of all images; or of those before the image at which the process ended, and how it ended.

        Raises
        ------
        CytoError
            If the process did not start.
        """
        if not self._is_ready:
            self._wait_until_ready()
        places = [_place(path) for path in paths]
        request = json.dumps([offset, [astuple(place) if isinstance(place, Member) else place for place in places]])
        outcomes: list[Outcome] = []
        try:
            rest = memoryview(request.encode() + b"\n")
            while rest:  # a pipe may take less than it is given
                rest = rest[self._pipe_in.write(rest) or 0 :]
            while len(outcomes) < len(paths):
                place = places[len(outcomes)]
                more = place.seconds_to_reach if isinstance(place, Member) else 0.0
                content_hash, error, truncated = json.loads(self._line(seconds + more))
                outcomes.append((content_hash, error, truncated))
        except TimeoutError:
            return outcomes, f"cannot be decoded: not done after {seconds:.0f} seconds"
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            return outcomes, f"cannot be decoded: the decoder crashed ({_how_it_ended(code)})"
        return outcomes, None

    def restart(self) -> None:
        self.close()
        self._start()

    def kill(self) -> None:
        """End the process now; a thread that waits for its answer sees the end of the file."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe_in.close()
        self._pipe_out.close()

    def _start(self) -> None:
        # blocked signals stay blocked in the child: Ctrl-C while it imports must not end it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process = subprocess.Popen(
                [*_python(), "-m", "cytocache.read_worker", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # decoders in C print warnings there
                bufsize=0,
                pass_fds=[self._descriptor],
                env=_environment(),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipe_in, self._pipe_out = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._pipe_out, select.POLLIN)
        self._unread, self._is_ready = b"", False

    def _wait_until_ready(self) -> None:
        try:
            while self._line(_SECONDS_TO_START) != b"ready":
                pass  # output of Python's start-up files
        except TimeoutError:
            raise CytoError(
                f"a process that reads images did not start within {_SECONDS_TO_START:.0f} seconds"
            ) from None
        except EOFError:
            raise CytoError(f"a process that reads images did not start: {_why_not()}") from None
        self._is_ready = True

    def _line(self, seconds: float) -> bytes:
        """The next line of the process's answers, without its newline.

        Raises TimeoutError if none comes within `seconds`, EOFError if the process has ended.
        """
        while b"\n" not in self._unread:
            if not self._poll.poll(seconds * 1000):
                raise TimeoutError
            piece = self._pipe_out.read(1 << 16)
            if not piece:
                raise EOFError
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return line


def _place(path: Path) -> str | Member | dict[str, str]:
    """Where a worker finds an image: archives are listed here, once for all workers."""
    try:
        member = locate(path)
    except BadArchive as error:
        return {"error": str(error)}
    return os.fspath(path) if member is None else member


def _python() -> list[str]:
    return [sys.executable, "-P"]  # -P: do not import from the current folder


def _environment() -> dict[str, str]:
    paths = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _why_not() -> str:
    """The last line of the error of a process that only imports the worker's module."""
    try:
        again = subprocess.run(
            [*_python(), "-c", "import cytocache.read_worker"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_TO_START,
            env=_environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    return " ".join(again.stderr.split("\n")[-2:]).strip() or "?"


def _how_it_ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _shared_file(n_bytes: int) -> IO[bytes]:
    """An unnamed file that processes share; in memory if the system supports it."""
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("cyto-pixels"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)
    file.truncate(n_bytes)
    return file
