"""The latent store: the sparse latents of every token, one CSR row per token, and the image table.

Format "latent store", version 1: docs/formats.md. Row `i * tokens_per_image + t` is token t of image i (CLS first);
an unreadable image has empty rows. Values are float32, rounded to `value_bits` mantissa bits. Whether a latent is zero
is decided before rounding; thresholds are compared with the stored, rounded value.
"""

import operator
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from .csr import CsrCommit, CsrReader, CsrRows
from .errors import CytoError, DamagedStore, SpecMismatch
from .files import read_lines, sha256_file
from .info import LatentsInfo
from .latent_parts import missing_images
from .latent_spec import read_latent_spec
from .remote import CheckedObjects, RemoteFolder, reachable, small_files, store_root
from .runlog import read_runs
from .seal import travelling
from .spec import LATENTS, read_header, require_unchanged
from .tables import listed, read_image_table, readable, table_sha256
from .token_layout import TokenLayout, read_layout
from .wording import megabytes, pruning, size_on_disk
from .zarr_meta import ArrayMeta, array_meta, check_chunk_header, read_array


class LatentStore:
    """A complete latent store, open for reading; `root` is a local path or a URL. Pickled as its path or URL.

    Memory: what is read. A chunk of a URL is checked against the journal's checksum whenever it is read.
    """

    def __init__(self, root: Path | str, *, check_files: bool = True) -> None:
        """Open the store at `root`; `check_files` looks for every chunk file and hashes the image table.

        Raises
        ------
        StoreNotFound, IncompleteStore, SpecMismatch
            If there is no finished latent store of a version that this program reads.
        DamagedStore
            If a chunk is missing, or shapes, lengths or tables disagree.
        StoreUnreachable
            If a URL cannot be read, after some retries.
        """
        self.root = store_root(root)
        with small_files(self.root) as folder:
            self.header = read_header(folder, LATENTS)
            self.spec = read_latent_spec(self.header, folder)
            if not isinstance(self.root, Path):
                self.header = replace(self.header, seal=None)  # of the temporary copy, which is deleted
                self.images = read_image_table(folder / "images.parquet")
        shape = (self.spec.n_rows, self.spec.n_latents)
        if isinstance(self.root, Path):
            self._rows = CsrReader(self.root / "X", shape=shape)
            missing = self._rows.missing_chunks() if check_files else []
            if missing:
                names = listed([str(path.relative_to(self.root)) for path in missing])
                raise DamagedStore(f"{self.root} has {len(missing):,} missing or empty chunk files ({names})")
            self.images = read_image_table(self.root / "images.parquet")
        else:
            objects = remote_rows(self.root, self.journal_sha256)
            self._rows = CsrReader(f"{self.root}/X", shape=shape, objects=objects)
            for name, n_chunks in self._rows.chunk_counts().items():
                objects.require_promised(f"X/{name}/c/{chunk}" for chunk in range(n_chunks))
            if check_files:
                with reachable(self.root):
                    objects.check_sizes(prefix="X/")
        self.image_indptr = self._read_image_indptr()
        changed = check_files and table_sha256(self.images) != self.spec.images_sha256
        if changed or self.images.num_rows != self.spec.n_images:
            raise DamagedStore(f"{self.root}/images.parquet was changed: its hash is not the one in the header")

    def describe(self) -> LatentsInfo:
        """Size, settings and runs of the store, as `cyto latents info` prints them."""
        return latents_info(self.root)

    def line(self, name: Path | str | None = None) -> str:
        """The store in one line: its size, nonzeros, what was dropped; called `name`, or else its root."""
        spec = self.spec
        dropped = f"; {pruning(spec.min_activation, self.header.summary or {})}" if spec.min_activation else ""
        return (
            f"{name or self.root}: {spec.n_images:,} images x {spec.tokens_per_image} tokens x {spec.n_latents:,} "
            f"latents, {self.nnz:,} nonzeros ({self.nnz / max(1, self.n_readable_tokens):.1f} per token of a readable "
            f"image{dropped}), {megabytes(size_on_disk(self.root) if isinstance(self.root, Path) else None)}"
        )

    def _repr_html_(self) -> str:
        return self.describe()._repr_html_()

    def __reduce__(self) -> tuple[Any, ...]:
        return travelling(self)

    @property
    def identity(self) -> str:
        """SHA-256 of everything that decides the numbers."""
        return self.header.identity

    @property
    def layout(self) -> TokenLayout:
        """Which token of an image is what. Raises DamagedStore if the cache's layout does not fit the rows."""
        return read_layout(self.spec.cache.get("token_layout"), self.spec.tokens_per_image, self.root)

    @property
    def journal_sha256(self) -> str:
        """SHA-256 of the journal, which names every chunk file with its checksum; "" in stores of an older cyto."""
        return str((self.header.summary or {}).get("journal_sha256", ""))

    @property
    def nnz(self) -> int:
        """Number of stored latents over all tokens."""
        return self._rows.nnz

    @property
    def n_readable_tokens(self) -> int:
        """Number of tokens of readable images."""
        return int(self.readable().sum()) * self.spec.tokens_per_image

    def readable(self) -> npt.NDArray[np.bool_]:
        """(n_images,) bool: False where the image could not be read and its rows are empty."""
        return np.array(readable(self.images))

    @property
    def n_dropped(self) -> int:
        """Number of values below `min_activation` that encoding left out."""
        return int((self.header.summary or {}).get("n_dropped", 0))

    @property
    def rows(self) -> CsrReader:
        """The rows of all tokens."""
        return self._rows

    def read_images(self, start: int, stop: int) -> CsrRows:
        """The token rows of images `start` to `stop` - 1, checked (`CsrReader.read_rows`).

        Raises IndexError unless 0 <= start <= stop <= n_images.
        """
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start <= stop <= self.spec.n_images:
            raise IndexError(f"images {start} to {stop} outside 0..{self.spec.n_images}")
        tokens = self.spec.tokens_per_image
        try:
            return self._rows.read_rows(start * tokens, stop * tokens)
        except DamagedStore:
            require_unchanged(self.header)  # the store may have been replaced
            raise

    def _read_image_indptr(self) -> npt.NDArray[np.int64]:
        objects = self._rows.objects
        try:
            if objects is None:
                folder = Path(self.root) / "image_indptr"
                meta = self._check_starts(read_array(folder))
                for chunk in range(-(-meta.shape[0] // meta.chunks[0])):
                    check_chunk_header(folder / "c" / str(chunk), meta)
                starts = np.asarray(zarr.open_array(folder, mode="r", zarr_format=3)[:])
            else:
                with reachable(objects.url):
                    found = objects.small_object("image_indptr/zarr.json")
                    self._check_starts(array_meta(found, f"{self.root}/image_indptr/zarr.json"))
                    starts = np.asarray(zarr.open_array(objects, path="image_indptr", mode="r", zarr_format=3)[:])
        except CytoError:
            raise
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise DamagedStore(f"{self.root}/image_indptr cannot be read: {error}") from None
        rises = len(starts) == self.spec.n_images + 1 and starts[0] == 0 and bool((np.diff(starts) >= 0).all())
        if not rises or starts[-1] != self.nnz:
            raise DamagedStore(f"{self.root}/image_indptr disagrees with the {self.nnz:,} nonzeros of X")
        return starts

    def _check_starts(self, meta: ArrayMeta) -> ArrayMeta:
        if meta.shape != (self.spec.n_images + 1,) or meta.data_type != "int64":
            raise DamagedStore(
                f"{self.root}/image_indptr disagrees with the {self.nnz:,} nonzeros of X: it holds {meta.data_type} of "
                f"shape {meta.shape}, expected int64, one more than {self.spec.n_images:,} images"
            )
        return meta


def latents_info(store: Path | str, *, header_only: bool = False) -> LatentsInfo:
    """What is in the latent store at `store`, a local path or the URL of a complete one.

    header_only : leave out the number of nonzeros, for which the store is opened and checked

    Raises
    ------
    StoreNotFound, SpecMismatch, DamagedStore
        If there is no latent store that this program reads.
    """
    store = store_root(store) if isinstance(store, str) else store
    is_url = isinstance(store, str)
    with small_files(store) as folder:
        header = read_header(folder, LATENTS, complete=is_url)
        spec = read_latent_spec(header, folder)
        missing = () if header.complete else tuple(missing_images(folder, spec))
        n_bytes = None if is_url else size_on_disk(folder)
        runs = tuple(read_runs(folder))
    latents = LatentStore(store) if header.complete and not header_only else None
    return LatentsInfo(
        store=store,
        header=header,
        n_bytes=n_bytes,
        runs=runs,
        spec=spec,
        missing=missing,
        nnz=latents.nnz if latents else None,
        nnz_per_token=latents.nnz / max(1, latents.n_readable_tokens) if latents else None,
    )


@lru_cache(maxsize=16)  # shared by the tasks of a worker that read one store
def remote_rows(url: str, journal_sha256: str) -> CheckedObjects:
    """The rows of a latent store at a URL; chunk files are checked by the journal, which must have this hash.

    Raises
    ------
    SpecMismatch
        If the store is older than the checksums.
    DamagedStore
        If the journal has another hash.
    StoreUnreachable
        If the URL cannot be read, after some retries.
    """
    if not journal_sha256:
        raise SpecMismatch(
            f"{url} was made by an older cyto, which wrote no checksums; read it from a path, or make it again with "
            f"cyto sae encode"
        )
    folder = RemoteFolder(url)
    with tempfile.TemporaryDirectory(prefix="cyto-") as temporary:
        journal = Path(temporary) / "journal.jsonl"
        folder.copy(journal.name, journal)
        if not journal.is_file() or sha256_file(journal) != journal_sha256:
            raise DamagedStore(f"{url}/journal.jsonl is missing or was changed: its hash is not the one in the header")
        chunks = CsrCommit.from_json(read_lines(journal)).chunks
    try:
        promised: dict[str, tuple[int, bytes | int]] = {
            f"X/{name}/c/{number}": (size, int(crc, 16))
            for name, files in chunks.items()
            for number, (size, crc) in enumerate(files)
        }
    except ValueError:
        raise DamagedStore(f"{url}/journal.jsonl has a checksum that is none") from None
    return CheckedObjects(folder, promised)
