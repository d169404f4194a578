"""One pass over all images of barcodes, block by block: what a query is compared with. Memory: a few blocks.

Blocks have about the same number of nonzeros, are decoded and compared in threads, and come in order, so that results
do not depend on threads.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.barcodes import IMAGE_COLUMNS
from stores.barcode_store import BarcodeStore
from stores.csr import CsrReader, CsrRows
from stores.errors import BadInput
from stores.machine import n_cores
from stores.progress import Progress
from stores.tables import STATUS_OK

from .config import BARCODE, FINGERPRINT, REGION
from .together import rarity

_BLOCK = 1 << 22  # nonzeros of a block, about: 32 MiB, and as much again while it is decoded
_MOST_ROWS = 1 << 15
LAYERS = {FINGERPRINT: "mean", BARCODE: "X", REGION: "max"}  # what of image.zarr each way reads
Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Collection:
    """The images of barcodes: who they are, and what each latent weighs."""

    store: BarcodeStore
    tau: float
    ids: list[str]
    columns: dict[str, npt.NDArray[np.object_]]  # of the image table; "" where unknown
    is_readable: npt.NDArray[np.bool_]  # (images,)
    patient_of: Ints  # (images,) a number for each (dataset, patient); of an image without a patient one of its own
    dataset_of: Ints  # (images,)
    patients: list[tuple[str, str]]  # (patient, dataset) by number; ("", dataset): an image without a patient
    weights: Float32s  # (latents,)

    @property
    def n_images(self) -> int:
        """All images, unreadable ones included."""
        return len(self.ids)

    @property
    def n_latents(self) -> int:
        """Latents of the SAE."""
        return len(self.weights)

    def find(self, image_id: str) -> int | None:
        """The number of an image, or None."""
        return self.ids.index(image_id) if image_id in self.ids else None


def open_collection(barcodes: Any, tau: float | None, weigh: str) -> Collection:
    """The images of barcodes, with the weights of their latents.

    Raises
    ------
    BadInput
        If there is no such tau.
    DamagedStore
        If tables cannot be read or lack a column.
    """
    store = BarcodeStore(barcodes)
    tau = store.taus[0] if tau is None and len(store.taus) == 1 else tau
    images = store.read_obs("image", tau, needed=IMAGE_COLUMNS)
    columns = {str(name): images[name].astype(str).to_numpy(object) for name in images.columns}
    readable = columns["status"] == STATUS_OK
    names: dict[tuple[str, str], int] = {}
    numbers = []
    for number, (patient, dataset) in enumerate(zip(columns["patient"], columns["dataset"], strict=True)):
        key = (patient, dataset) if patient else (f"\0{number}", dataset)  # of nobody: a patient of its own
        numbers.append(names.setdefault(key, len(names)))
    by_rarity = rarity(store, tau, int(readable.sum()))
    assert tau is not None
    return Collection(
        store=store,
        tau=float(tau),
        ids=[str(name) for name in images.index],
        columns=columns,
        is_readable=np.asarray(readable, bool),
        patient_of=np.array(numbers, np.int64),
        dataset_of=np.unique(columns["dataset"], return_inverse=True)[1].astype(np.int64),
        patients=[("" if name.startswith("\0") else name, dataset) for name, dataset in names],
        weights=by_rarity if weigh == "rarity" else np.ones(len(by_rarity), np.float32),
    )


def reader_of(collection: Collection, way: str) -> CsrReader:
    """The matrix that a way of searching reads.

    Raises
    ------
    BadInput
        If these barcodes do not have it.
    """
    layer = LAYERS[way]
    if layer != "X" and not (collection.store.path("image", collection.tau) / "layers" / layer).is_dir():
        raise BadInput(f"{collection.store.root} has no layer {layer!r} of images; count again with cyto barcode")
    return collection.store.matrix("image", collection.tau, layer)


def scan(
    reader: CsrReader,
    score: Callable[[CsrRows], Float32s],
    *,
    progress: Progress = lambda done, total, state: None,
) -> Iterator[tuple[int, Float32s]]:
    """(first image, scores) of every block of images, in order; scores are what `score` makes of the block's rows.

    progress : images compared, images in all

    Raises
    ------
    DamagedStore
        If a chunk is damaged or missing.
    """
    bounds = blocks_of(reader, _BLOCK)
    n_threads = n_cores()

    def task(first: int, last: int) -> Float32s:
        return score(reader.read_rows(first, last))

    waiting: deque[tuple[int, int, Future[Float32s]]] = deque()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="search") as threads:
        try:
            for first, last in [*bounds, (-1, -1)]:
                if first >= 0:
                    waiting.append((first, last, threads.submit(task, first, last)))
                while waiting and (first < 0 or len(waiting) > n_threads):
                    at, end, future = waiting.popleft()
                    yield at, future.result()
                    progress(end, reader.shape[0], "")
        finally:
            for *_, future in waiting:
                future.cancel()


def blocks_of(reader: CsrReader, block: int) -> list[tuple[int, int]]:
    """Ranges of rows that cover all, each with about `block` nonzeros, at least one row."""
    starts = reader.row_starts(0, reader.shape[0] + 1)
    found, first = [], 0
    while first < reader.shape[0]:
        last = int(np.searchsorted(starts, starts[first] + block, side="right")) - 1
        last = min(max(last, first + 1), first + _MOST_ROWS, reader.shape[0])
        found.append((first, last))
        first = last
    return found
