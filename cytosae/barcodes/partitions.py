"""Partitions of images, each counted by one Dask task into a part that a continued job finds again.

How the images are divided depends on the memory of the workers and on the parts that are there, so no number may:
code that adds up parts does so in an order that does not depend on them (`build.py`, and `statistics.py` of concepts).
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cytosae.cluster import Watch
from stores.csr_bulk import CHUNK_ENTRIES
from stores.latent_store import LatentStore

from . import tasks

if TYPE_CHECKING:
    from distributed import Client

_PARTITION_ENTRIES = 32 * CHUNK_ENTRIES  # nonzeros of a partition, unless memory is small or the end is near
_LAST_ENTRIES = 4 * CHUNK_ENTRIES  # of the smallest partitions
_PARTITIONS_LEFT = 3  # for every thread, at least: the last partitions are small, so that all threads end together


def count_into_parts(
    watch: Watch,
    stores: Sequence[LatentStore],
    parts: Path,
    tag: str,
    *,
    taus: tuple[float, ...],
    token_set: str,
    partition_images: int | None,
    each: Callable[[tasks.PartSummary], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Count all images of the stores into the folder `parts`.

    Parameters
    ----------
    each : called with the summary of every part, in the order of the images
    tag : says to which job a part belongs; parts of another job are counted again
    partition_images : None: as the memory of the workers allows
    meanwhile : called once the tasks are submitted, while workers count
    """
    client = watch.client
    parts.mkdir(exist_ok=True)
    partitions = list(plan_partitions(stores, parts, client, n_taus=len(taus), partition_images=partition_images))
    n_images = sum(store.spec.n_images for store in stores)
    there = [partition for partition in partitions if (parts / partition.name).exists()]
    # as the names of the parts say; the tasks check their content
    n_done = sum(partition.stop - partition.start for partition in there)
    watch.tell(n_done, n_images, "counting")
    futures = {
        client.submit(tasks.count_partition, partition, str(parts), tag, taus, token_set, pure=False): number
        for number, partition in enumerate(partitions)
    }
    found: dict[int, tasks.PartSummary] = {}
    n_given = 0
    try:
        meanwhile()
        for future, part in watch.completed(list(futures)):
            partition = partitions[futures[future]]
            found[futures[future]] = part
            while n_given in found:
                each(found.pop(n_given))
                n_given += 1
            if partition not in there:
                n_done += partition.stop - partition.start
                watch.tell(n_done, n_images, "counting")
    finally:
        if client.status == "running":  # else the scheduler is gone
            client.cancel(list(futures))


def plan_partitions(
    stores: Sequence[LatentStore], parts: Path, client: "Client", *, n_taus: int, partition_images: int | None = None
) -> Iterator[tasks.Partition]:
    """All images in order, cut at the edges of stores, around the parts that are already there.

    partition_images : None: as memory allows, smaller to the end
    """
    taken = sorted(_parts_there(parts))
    # a partition's result is at most one entry per nonzero, and is held twice while it grows
    fits = _worker_memory(client) // 4 // (12 + 2 * n_taus)
    most, n_threads = max(1, min(_PARTITION_ENTRIES, fits)), _n_threads(client)
    n_left, first = sum(store.nnz for store in stores), 0
    for store in stores:
        end = first + store.spec.n_images
        at = first
        while at < end:
            entries = min(most, max(_LAST_ENTRIES, n_left // (_PARTITIONS_LEFT * n_threads)))
            size = partition_images or max(1, entries * store.spec.n_images // max(1, store.nnz))
            ready = next((stop for start, stop in taken if start == at and stop <= end), None)
            if ready is None:
                next_there = min((start for start, stop in taken if at < start and stop <= end), default=end)
                ready = min(at + size, next_there)
            n_left -= int(store.image_indptr[ready - first] - store.image_indptr[at - first])
            yield tasks.Partition(
                latents=str(store.root),
                start=at - first,
                stop=ready - first,
                first=at,
                n_images=store.spec.n_images,
                tokens_per_image=store.spec.tokens_per_image,
                n_latents=store.spec.n_latents,
                journal_sha256=store.journal_sha256 if isinstance(store.root, str) else "",
                seal=store.header.seal if isinstance(store.root, Path) else None,
                layout=store.layout,
            )
            at = ready
        first = end


def discard(folder: Path) -> None:
    """Remove a folder; a task of a job that was interrupted may still write into it."""
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _parts_there(folder: Path) -> Iterator[tuple[int, int]]:
    """First and last image of every part of images that a job before this one left."""
    for path in folder.glob("*.part"):
        found = re.fullmatch(r"(\d+)-(\d+)\.part", path.name)
        if found and int(found[1]) < int(found[2]):
            yield int(found[1]), int(found[2])


def _n_threads(client: "Client") -> int:
    """Of all workers, at least one."""
    return max(1, sum(w["nthreads"] for w in client.scheduler_info()["workers"].values()))


def _worker_memory(client: "Client") -> int:
    """The least memory limit of a thread of a worker, in bytes; 2 GiB where there is none."""
    workers = client.scheduler_info()["workers"].values()
    return min((w["memory_limit"] // w["nthreads"] for w in workers if w["memory_limit"]), default=2 << 30)
