"""Which image files are others than those that a cache was made from: replaced, copied again, or removed since."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stores.tables import column, listed, read_image_table

from .archives import split_path
from .datasets import Images
from .duplicates import N_THREADS
from .image_files import hash_of

_MOST = 1_000  # files that are read: after all were copied to another disk, all are newer than the cache
_FIRST_FILE = "tokens/zarr.json"  # of a cache: written before its first image is read, and never again


def changed_files(images: Images, cache: Path) -> str:
    """`2 of 24 image files are others than those that were extracted (...): ...`; empty if none is, as far as is seen.

    A file is compared by its content if it, or the archive that holds it, was written after the cache was begun; of
    many such files the newest. Memory: a few numbers for each image.
    """
    first, table = cache / _FIRST_FILE, cache / "images.parquet"
    if not (first.is_file() and table.is_file()):
        return ""  # damaged, which its readers tell
    paths = [str(path) for path in column(images.table, "path")]
    known = column(read_image_table(table), "content_hash")
    if len(known) != len(paths):
        return ""  # a cache of other images
    begun = first.stat().st_mtime
    with ThreadPoolExecutor(N_THREADS) as pool:
        written = [*pool.map(lambda path: _written(images.root / path), paths)]
        newer = [row for row, time in enumerate(written) if time > begun]
        newer = sorted(sorted(newer, key=lambda row: -written[row])[:_MOST])
        now = [*pool.map(lambda row: hash_of(images.root / paths[row]), newer)]
    found = [paths[row] for row, content in zip(newer, now, strict=True) if content != known[row]]
    if not found:
        return ""
    return (
        f"{len(found):,} of {len(paths):,} image files are others than those that were extracted, or gone "
        f"({listed(found)}); all results are of the files as they were"
    )


def _written(path: Path) -> float:
    """When a file, or the archive around it, was last written or put there; infinity if there is none."""
    packed = split_path(path)
    try:
        state = (path if packed is None else packed[0]).stat()
    except OSError:
        return float("inf")
    return max(state.st_mtime, state.st_ctime)
