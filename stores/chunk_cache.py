"""Which chunks stay at hand: memory maps under the limit of open files, or chunks of a URL fetched ahead in threads."""

import errno
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from .errors import BadInput

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]  # not on Windows

FORKED = "a store of a URL cannot be read in a forked process; start processes with spawn"
Float16 = npt.NDArray[np.float16]
_MOST_MAPS = 512
_READERS = 8  # threads of one store, at most; they start as they are needed


class OpenMaps:
    """Memory maps by chunk; the last used ones stay open. Each holds one file descriptor, as long as it has a view.

    All stores of a process share a quarter of its limit of open files, 512 at most. May be used by several threads.
    """

    _all: ClassVar[WeakSet["OpenMaps"]] = WeakSet()

    def __init__(self, open_map: Callable[[int], Float16]) -> None:
        self._open_map, self._share = open_map, _share_of_descriptors()
        self._maps: OrderedDict[int, Float16] = OrderedDict()
        self._lock = threading.Lock()
        self._all.add(self)

    def get(self, chunk: int) -> Float16:
        """The map of a chunk, opened if need be.

        Raises
        ------
        BadInput
            If the process may open no more files, although no map is kept any longer.
        """
        with self._lock:
            if chunk not in self._maps:
                self._drop_oldest(down_to=max(1, self._share // len(self._all)) - 1)
                self._maps[chunk] = self._open_chunk(chunk)
            self._maps.move_to_end(chunk)
            return self._maps[chunk]

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Ask the system to read these chunks from the disk meanwhile."""
        for chunk in chunks:
            base = self.get(chunk)
            while isinstance(base.base, np.ndarray):
                base = base.base
            if isinstance(base.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
                base.base.madvise(mmap.MADV_WILLNEED)

    def _open_chunk(self, chunk: int) -> Float16:
        try:
            return self._open_map(chunk)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        self._drop_oldest(down_to=0)  # others hold more files open than we left them
        try:
            return self._open_map(chunk)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise BadInput(
                f"this process may open no more files: chunk {chunk} cannot be mapped. Drop views of chunks that are "
                f"no longer needed, or raise the limit: ulimit -n 4096"
            ) from None

    def _drop_oldest(self, *, down_to: int) -> None:
        while len(self._maps) > down_to:
            self._maps.popitem(last=False)


class ReadAhead:
    """Fetched chunks; the last used ones are kept, and what is announced is fetched in threads meanwhile.

    Memory: two chunks, and twice those announced at once. May be used by several threads.
    """

    def __init__(self, fetch: Callable[[int], Float16]) -> None:
        self._fetch, self._kept = fetch, 2
        self._chunks: OrderedDict[int, Future[Float16]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="cyto-chunk")
        self._process = os.getpid()

    def get(self, chunk: int) -> Float16:
        """A chunk; waits until it is there. What `fetch` raises is raised here, and the next call tries anew."""
        future = self._begin(chunk)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._chunks.get(chunk) is future:
                    del self._chunks[chunk]
            raise

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Begin to fetch these chunks. They are kept, and those announced before them too."""
        self._kept = max(self._kept, 2 * len(chunks) + 2)
        for chunk in chunks:
            self._begin(chunk)

    def _begin(self, chunk: int) -> Future[Float16]:
        if os.getpid() != self._process:  # a fork has neither our threads nor obstore's, and would wait for ever
            raise BadInput(FORKED)
        with self._lock:
            if chunk not in self._chunks:
                self._chunks[chunk] = self._threads.submit(self._fetch, chunk)
            self._chunks.move_to_end(chunk)
            while len(self._chunks) > self._kept:
                self._chunks.popitem(last=False)  # not cancelled: another thread may wait for it
            return self._chunks[chunk]


def _share_of_descriptors() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else 4 * _MOST_MAPS
    return min(_MOST_MAPS, soft // 4) if soft > 0 else _MOST_MAPS  # below 0: unlimited
