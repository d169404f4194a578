"""How active are chosen latents in each image? One pass over the means of the barcodes for each block of latents."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from stores.barcode_store import BarcodeStore
from stores.csr import CsrReader
from stores.errors import BadInput
from stores.machine import n_cores
from stores.progress import Progress

Ints = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
BLOCK = 1 << 22  # nonzeros that are read together
MOST = 1 << 25  # nonzeros of the latents that are kept together: 0.4 GiB


def means_of_images(barcodes: BarcodeStore, tau: float | None) -> CsrReader:
    """The mean activations of all images, (images, latents).

    Raises
    ------
    BadInput
        If these barcodes do not have them.
    """
    if not (barcodes.path("image", tau) / "layers" / "mean").is_dir():
        raise BadInput(f"{barcodes.root} has no layer 'mean' of images; count again with cyto barcode")
    return barcodes.matrix("image", tau, "mean")


def blocks_of_latents(latents: Sequence[int], n_active: Ints, most: int = MOST) -> list[list[int]]:
    """The latents in blocks, in order, each with at most `most` nonzeros, and at least one latent.

    n_active : (n_latents,) images in which each latent is active
    """
    blocks: list[list[int]] = []
    held = 0
    for latent in latents:
        if not blocks or held + int(n_active[latent]) > most:
            blocks.append([])
            held = 0
        blocks[-1].append(latent)
        held += int(n_active[latent])
    return blocks


def read_activations(
    reader: CsrReader, latents: Sequence[int], progress: Progress = lambda done, total, state: None
) -> Iterator[tuple[int, Ints, Float32s]]:
    """(latent, images in which it is active, rising, their mean activations) for each of a block of latents.

    Memory: the nonzeros of these latents, and a few times `BLOCK` of all. Threads do not change the result.
    """
    place = np.full(reader.shape[1], -1, np.int64)
    place[list(latents)] = np.arange(len(latents))

    def read(first: int, last: int) -> tuple[Ints, npt.NDArray[np.int32], Float32s]:
        rows = reader.read_rows(first, last)
        of = place[rows.indices]
        kept = np.flatnonzero((of >= 0) & (rows.values > 0))
        image = first + np.searchsorted(rows.indptr, kept, side="right") - 1
        return image.astype(np.int64), of[kept].astype(np.int32), rows.values[kept].astype(np.float32)

    pieces: list[tuple[Ints, npt.NDArray[np.int32], Float32s]] = []
    bounds = _blocks(reader)
    with ThreadPoolExecutor(n_cores(), thread_name_prefix="activations") as threads:
        for start in range(0, len(bounds), 2 * n_cores()):  # a few blocks at a time: what is read is bounded
            some = bounds[start : start + 2 * n_cores()]
            pieces += threads.map(lambda block: read(*block), some)
            progress(some[-1][1], reader.shape[0], "barcodes")
    image, of_latent, values = (np.concatenate([piece[n] for piece in pieces]) for n in range(3))
    order = np.argsort(of_latent, kind="stable")  # images stay in order
    edges = np.searchsorted(of_latent[order], np.arange(len(latents) + 1))
    for number, latent in enumerate(latents):
        mine = order[edges[number] : edges[number + 1]]
        yield int(latent), image[mine], values[mine]


def _blocks(reader: CsrReader) -> list[tuple[int, int]]:
    """Ranges of rows that cover all, each with about `BLOCK` nonzeros, at least one row."""
    starts = reader.row_starts(0, reader.shape[0] + 1)
    found, first = [], 0
    while first < reader.shape[0]:
        last = int(np.searchsorted(starts, starts[first] + BLOCK, side="right")) - 1
        found.append((first, min(max(last, first + 1), reader.shape[0])))
        first = found[-1][1]
    return found
