"""A cache of open chunks: memory maps of local chunks, or chunks of a URL, prefetched in threads."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import BadInput

FORKED = "a store of a URL cannot be read in a forked process; start processes with spawn"
Float16 = npt.NDArray[np.float16]
_MOST_MAPS = 2_048  # Linux allows 65,530 for a process; the page tables of a map in use take 1/500 of its size
_READERS = 8  # most threads of one store; started when needed
_ADVISED, _LOOKED_AT = 1 << 17, 1 << 20  # bytes


class OpenMaps:
    """Memory maps by chunk; the 2,048 last used ones of all stores in a process are kept. No file is kept open.

    A map exists as long as an array uses it. May be used by several threads.
    """

    _all: ClassVar[WeakSet["OpenMaps"]] = WeakSet()

    def __init__(self, open_map: Callable[[int], Float16], path_of: Callable[[int], Path]) -> None:
        self._open_map, self._path_of = open_map, cache(path_of)
        self._maps: OrderedDict[int, Float16] = OrderedDict()
        self._lock = threading.Lock()
        self._all.add(self)

    def get(self, chunk: int) -> Float16:
        """The map of a chunk, opened if it is not.

        Raises
        ------
        BadInput
            If the process may open no more files, or may have no more maps.
        """
        with self._lock:
            if chunk not in self._maps:
                while len(self._maps) >= max(1, _MOST_MAPS // len(self._all)):
                    self._maps.popitem(last=False)
                self._maps[chunk] = self._open_chunk(chunk)
            self._maps.move_to_end(chunk)
            return self._maps[chunk]

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Ask the system to read these chunks from the disk in the background."""
        for chunk in chunks:
            read_ahead(self._path_of(chunk), 0, self.get(chunk).nbytes)

    def release(self) -> None:
        """Keep no map; one exists on only as long as an array uses it."""
        with self._lock:
            self._maps.clear()

    def begin_rows(self, chunk: int, rows: range) -> Future[Float16]:
        """Some consecutive images of a chunk: a view of its map. The system is asked to read them from the disk."""
        view = self.get(chunk)[rows.start : rows.stop]
        read_ahead(self._path_of(chunk), rows.start * view.strides[0], view.nbytes)
        future: Future[Float16] = Future()
        future.set_result(view)
        return future

    def _open_chunk(self, chunk: int) -> Float16:
        try:
            return self._open_map(chunk)
        except OSError as error:
            if error.errno == errno.EMFILE:
                what, then = "open no more files", "raise the limit: ulimit -n 4096"
            elif "Memory mapping" in str(error):  # Arrow gives no number
                what, then = "map no more files", "drop views of chunks, or take pool_chunks smaller"
            else:
                raise
            raise BadInput(f"this process may {what}: chunk {chunk} cannot be mapped; {then}") from None


def map_file(path: Path, n_bytes: int) -> npt.NDArray[np.uint8]:
    """The first bytes of a file as a read-only memory map, which exists as long as an array uses it.

    Made by Arrow, since Python's `mmap` keeps its file open, and a pool may need thousands of maps.
    """
    with pa.memory_map(os.fspath(path)) as file:
        return np.frombuffer(file.read_buffer(n_bytes), np.uint8)


def read_ahead(path: Path, start: int, n_bytes: int) -> None:
    """Ask the system to read a range of a file from the disk, mostly without pages that are in memory.

    Linux reads at most the device's read-ahead size per request (128 KiB by default), so many requests are made. Each
    costs as much as reading from memory, so pages are checked first.
    """
    if not hasattr(os, "posix_fadvise"):  # not on macOS and Windows, where pages are read on access
        return
    stop = start + n_bytes
    with suppress(OSError):  # reading the file will raise the error
        file = os.open(path, os.O_RDONLY)
        try:
            for at in range(start, stop, _LOOKED_AT):
                if not _is_in_memory(file, at):
                    for begin in range(at, min(at + _LOOKED_AT, stop), _ADVISED):
                        os.posix_fadvise(file, begin, min(_ADVISED, stop - begin), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _is_in_memory(file: int, at: int) -> bool:
    """Is this page in memory? False if the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT)
    except OSError:  # EAGAIN: it would wait for the disk
        return False
    return True


class ReadAhead:
    """Fetched chunks: the two last used ones are kept, and announced ones are fetched in threads.

    Memory: two chunks, and twice the announced ones. May be used by several threads.
    """

    def __init__(self, fetch: Callable[[int], Float16], fetch_rows: Callable[[int, range], Float16]) -> None:
        self._fetch, self._fetch_rows, self._kept = fetch, fetch_rows, 2
        self._chunks: OrderedDict[int, Future[Float16]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="cyto-chunk")
        self._process = os.getpid()

    def get(self, chunk: int) -> Float16:
        """A chunk; waits until it is fetched. Raises the errors of `fetch`; the next call tries again."""
        while True:
            future, is_ours = self._begin(chunk)
            try:
                return future.result()
            except Exception:  # an error of `fetch`, which the future keeps
                with self._lock:
                    if self._chunks.get(chunk) is future:
                        del self._chunks[chunk]
                if is_ours:  # else it was announced earlier and may succeed now
                    raise

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Begin to fetch these chunks; they and those announced before are kept."""
        self._kept = max(self._kept, 2 * len(chunks) + 2)
        for chunk in chunks:
            self._begin(chunk)

    def release(self) -> None:
        """Keep no chunk."""
        with self._lock:
            self._chunks.clear()

    def begin_rows(self, chunk: int, rows: range) -> Future[Float16]:
        """Begin to fetch some consecutive images of a chunk; only the future keeps them."""
        self._check_process()
        return self._threads.submit(self._fetch_rows, chunk, rows)

    def _begin(self, chunk: int) -> tuple[Future[Float16], bool]:
        """The future of the chunk, and whether its fetch was started by this call."""
        self._check_process()
        with self._lock:
            is_new = chunk not in self._chunks
            if is_new:
                self._chunks[chunk] = self._threads.submit(self._fetch, chunk)
            self._chunks.move_to_end(chunk)
            while len(self._chunks) > self._kept:
                self._chunks.popitem(last=False)  # not cancelled, since another thread may wait for it
            return self._chunks[chunk], is_new

    def _check_process(self) -> None:
        # a forked process has no threads of ours or of obstore, and would wait forever
        if os.getpid() != self._process:
            raise BadInput(FORKED)
