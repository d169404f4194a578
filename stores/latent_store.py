"""The latent store: the sparse latents of every token, one CSR row per token, and the image table.

Format "latent store", version 1: docs/formats.md. Row `i * tokens_per_image + t` is token t of image i (CLS first);
an unreadable image has empty rows. Values are float32, rounded to `value_bits` mantissa bits. Whether a latent is zero
is decided before rounding; thresholds are compared with the stored, rounded value.
"""

import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr
from zarr.codecs import ZstdCodec

from .csr import CsrCommit, CsrReader, CsrRows, CsrWriter, index_dtype, tail_files
from .errors import BadInput, CytoError, DamagedStore, SpecMismatch
from .files import append_line, read_lines, sha256_file, sweep_partials, sync_tree, write_new
from .remote import CheckedObjects, RemoteFolder, reachable, small_files, store_root
from .runlog import join_runs
from .seal import travelling
from .shards import ONE_WRITER, Shard
from .spec import LATENTS, Header, begin_header, new_header, read_header, require_unchanged, stated, write_header
from .tables import listed, parquet_bytes, read_image_table, readable, table_sha256, write_image_table
from .token_layout import TokenLayout, read_layout
from .zarr_meta import ArrayMeta, array_meta, check_chunk_header, read_array

if TYPE_CHECKING:
    from .info import LatentsInfo


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """All settings that decide the numbers in a latent store; its identity is their hash."""

    sae_sha256: str  # of sae.safetensors
    cache_sha256: str  # of the activation cache's identity and chunk checksums
    cache: dict[str, Any]  # the spec of the cache
    images_sha256: str  # of the image table, with the outcome columns
    n_images: int
    tokens_per_image: int
    n_latents: int
    precision: str  # of the encoder product
    value_bits: int  # mantissa bits kept: 10 or 23
    min_activation: float  # smaller values were dropped; 0: none

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return dict(vars(self))

    @property
    def n_rows(self) -> int:
        """Number of CSR rows: one per token."""
        return self.n_images * self.tokens_per_image


def read_latent_spec(header: Header, root: Path) -> LatentSpec:
    """The spec in a header. Raises DamagedStore if it has other fields, other types, or impossible sizes."""
    return stated(LatentSpec, header.spec, root, positive=("n_images", "tokens_per_image", "n_latents"))


class LatentWriter:
    """Appends the latents of images in order; committed rows survive a crash.

    One of several writers (`Shard`) writes its rows into a folder of its own; `latent_shards.py` joins them.
    """

    def __init__(self, root: Path, spec: LatentSpec, images: pa.Table, shard: Shard = ONE_WRITER) -> None:
        """Create the store, or continue it after its last commit (at image `n_images`).

        Raises
        ------
        DamagedStore
            If committed rows are missing or damaged.
        """
        self.root, self.spec, self.images = root, spec, shard_images(spec, shard)
        self._folder = root if shard.is_only else part_folder(root, shard)
        self._journal, rows = self._folder / "journal.jsonl", self._folder / "X"
        _begin(root, spec, images)
        self._folder.mkdir(exist_ok=True)
        records = read_lines(self._journal, mend=True)
        sweep_partials(self._folder)
        last = records[-1] if records else {}
        if not records:
            _remove_rows(rows)
        self.n_images: int = last.get("n_images", self.images.start)
        self.n_dropped: int = last.get("n_dropped", 0)  # values that were pruned
        try:
            at = CsrCommit.from_json(records) if records else None
        except DamagedStore as error:
            raise DamagedStore(
                f"{self._journal}: {error}, so the job cannot go on from it; begin again with --overwrite"
            ) from None
        self._rows = CsrWriter(rows, n_columns=spec.n_latents, indices=index_dtype(spec.n_latents), at=at)

    @property
    def nnz(self) -> int:
        """Nonzeros appended so far."""
        return self._rows.nnz

    def append_tokens(
        self,
        indices: npt.NDArray[Any],
        values: npt.NDArray[np.float32],
        row_lengths: npt.NDArray[Any],
        *,
        n_dropped: int = 0,
    ) -> None:
        """Append the rows of some tokens, in order; indices strictly increasing in each row, values rounded.

        n_dropped : values of these tokens that were below `min_activation`
        """
        self._rows.append(indices, values, row_lengths)
        self.n_dropped += n_dropped

    def commit(self, n_images: int) -> None:
        """Make the rows of the images before image `n_images` durable and record it."""
        assert self._rows.n_rows == (n_images - self.images.start) * self.spec.tokens_per_image
        self.n_images = n_images
        self._record(self._rows.commit())

    def finish(self) -> Header | None:
        """Write the shape of the rows; for the whole store also the row starts of the images, and mark it complete.

        None for a shard: its part is finished, but not the store.
        """
        assert self.n_images == self.images.stop
        was_finished = self._rows.is_finished
        commit = self._rows.finish()
        if not was_finished:
            self._record(commit)
        if self._folder != self.root:
            self._sync_and_tidy()
            return None
        reader = CsrReader(self.root / "X", shape=(self.spec.n_rows, self.spec.n_latents))
        starts = reader.row_starts(0, self.spec.n_rows + 1, self.spec.tokens_per_image)
        array = zarr.create_array(
            self.root,
            name="image_indptr",
            shape=starts.shape,
            dtype="int64",
            chunks=(max(1, len(starts)),),
            compressors=[ZstdCodec(level=0, checksum=True)],
            fill_value=-1,
            zarr_format=3,
            overwrite=True,
        )
        array[:] = starts
        join_runs(self.root)
        self._sync_and_tidy()
        header = new_header(LATENTS, self.spec.to_dict())
        summary = {"nnz": self.nnz, "n_dropped": self.n_dropped, "journal_sha256": sha256_file(self._journal)}
        header = Header(**{**vars(header), "complete": True, "summary": summary})
        write_header(self.root, header)
        return header

    def close(self) -> None:
        """End the threads; rows that were not committed are lost."""
        self._rows.close()

    def _sync_and_tidy(self) -> None:
        sync_tree(self._folder)
        for path in tail_files(self._folder / "X"):  # no valid record names one any more
            path.unlink()

    def _record(self, commit: CsrCommit) -> None:
        append_line(self._journal, {"n_images": self.n_images, "n_dropped": self.n_dropped, **commit.to_json()})


def part_folder(root: Path, shard: Shard) -> Path:
    """The folder of one of several writers, until the parts are joined."""
    return root / f"part-{shard.file_part}"


def shard_images(spec: LatentSpec, shard: Shard) -> range:
    """The images of a shard: consecutive whole chunks of the cache."""
    if shard.is_only:
        return range(spec.n_images)
    size = int(spec.cache["chunk_images"])
    chunks = shard.chunks(-(-spec.n_images // size))
    return range(min(chunks.start * size, spec.n_images), min(chunks.stop * size, spec.n_images))


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

    def describe(self) -> "LatentsInfo":
        """Size, settings and runs of the store, as `cyto latents info` prints them."""
        from .info import latents_info

        return latents_info(self.root)

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
        """The token rows of images start..stop, checked (`CsrReader.read_rows`)."""
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


def _begin(root: Path, spec: LatentSpec, images: pa.Table) -> None:
    """Write the initial files, unless another writer has; every writer makes the same bytes."""
    root.mkdir(parents=True, exist_ok=True)
    begin_header(root, new_header(LATENTS, spec.to_dict()))
    table = root / "images.parquet"
    if not write_new(table, parquet_bytes(images)) and not _is_table(table, spec):
        write_image_table(images, table)


def _is_table(path: Path, spec: LatentSpec) -> bool:
    try:
        return table_sha256(read_image_table(path)) == spec.images_sha256
    except BadInput:
        return False


def _remove_rows(path: Path) -> None:
    """Remove rows that a killed writer left before its first commit (our own folder, never a link)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
