"""Finds byte-identical files, by size and then by SHA-256. A file is read at most once; one of unique size, never."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stores.progress import Progress

from .image_files import MAX_FILE_BYTES, hash_of, size_of

N_THREADS = 8  # most of the time on a network disk is waiting
_SLICE = 512  # files given to the threads at once: Ctrl-C waits for these only


@dataclass(frozen=True)
class Duplicates:
    """`first[i]`: the position of the first file with the bytes of file i, or None if file i is that one."""

    first: list[int | None]
    not_compared: dict[int, str]  # position -> why


def find_duplicates(
    root: Path, paths: Sequence[str], *, progress: Progress = lambda done, total, state: None
) -> Duplicates:
    """Compare the files `root / path`. Memory: a size and, where two sizes agree, a hash per file; 1 MiB per thread.

    Not compared are files that are not regular (a pipe would block), empty, too large for an image, or unreadable.
    """
    sizes: list[int] = []
    not_compared: dict[int, str] = {}
    with ThreadPoolExecutor(N_THREADS) as pool:
        for begin in range(0, len(paths), _SLICE):
            sizes += pool.map(lambda path: _size(root / path), paths[begin : begin + _SLICE])
        n_of_size = Counter(sizes)
        not_compared = {i: _WHY_NOT[size] for i, size in enumerate(sizes) if size in _WHY_NOT}
        shared = [i for i, size in enumerate(sizes) if size not in _WHY_NOT and n_of_size[size] > 1]
        first: list[int | None] = [None] * len(paths)
        seen: dict[bytes, int] = {}
        for begin in range(0, len(shared), _SLICE):
            part = shared[begin : begin + _SLICE]
            for i, digest in zip(part, pool.map(lambda i: _digest(root / paths[i]), part), strict=True):
                if digest is None:
                    not_compared[i] = "cannot be read"
                elif (earlier := seen.setdefault(digest, i)) != i:
                    first[i] = earlier
            progress(begin + len(part), len(shared), "")
    return Duplicates(first, not_compared)


_NO_FILE, _EMPTY, _TOO_LARGE = -1, 0, MAX_FILE_BYTES + 1
_WHY_NOT = {_NO_FILE: "no file", _EMPTY: "empty", _TOO_LARGE: f"more than {MAX_FILE_BYTES:,} bytes"}


def _size(path: Path) -> int:
    found = size_of(path)
    return _NO_FILE if found is None else min(found, _TOO_LARGE)


def _digest(path: Path) -> bytes | None:
    found = hash_of(path)
    return None if found is None else bytes.fromhex(found)
