"""Checks every byte of a store against its format; each problem names its chunk and images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .activation_spec import ActivationSpec, chunk_path, read_spec
from .activation_store import check_layout
from .barcode_store import LEVELS, BarcodeStore
from .checksum import CRC_BYTES
from .csr import CsrCommit, check_chunk, crc32
from .errors import BadInput, CytoError, DamagedStore
from .files import is_dropping, read_lines, sha256_file
from .latent_spec import read_latent_spec
from .latent_store import LatentStore
from .progress import Progress
from .spec import ACTIVATIONS, LATENTS, read_header, require_unchanged
from .tables import column, listed, read_image_table, table_sha256, truncated_images
from .wording import Report, counted
from .zarr_meta import check_tree

_FINITE_BELOW = 0x7C00  # float16 bits without the sign: exponents below all-ones
_IMAGES_AT_ONCE = 256  # of a latent store


@dataclass(frozen=True)
class Problem:
    """One violation of the format: its chunk (None: the whole store), its images, and what is wrong."""

    chunk: int | None
    images: str
    what: str

    def __str__(self) -> str:
        place = "store" if self.chunk is None else f"chunk {self.chunk} (images {self.images})"
        return f"{place}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class CheckReport(Report):
    """What a check of every byte of a cache or latent store has found."""

    store: Path
    n_checked: int  # chunks of a cache; groups of 256 images of a latent store
    problems: tuple[Problem, ...]  # empty: no damage

    @property
    def is_whole(self) -> bool:
        """No damage was found."""
        return not self.problems

    def lines(self) -> Iterator[str]:
        """A line for each problem, or that there is none."""
        yield from map(str, self.problems)
        if not self.problems:
            yield f"{self.store}: whole ({counted(self.n_checked, 'chunk')} checked)"

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {"store": str(self.store), "ok": self.is_whole, "problems": [vars(each) for each in self.problems]}


def check_cache(root: Path | str, *, progress: Progress = lambda done, total, state: None) -> CheckReport:
    """Read every byte of the activation cache at `root`, and list what is damaged (`verify_activations`).

    Memory: one chunk. Raises StoreNotFound, IncompleteStore or SpecMismatch if there is no finished cache.
    """
    root = Path(root)
    return _checked(root, verify_activations(root), read_spec(read_header(root, ACTIVATIONS), root).n_chunks, progress)


def check_latents(root: Path | str, *, progress: Progress = lambda done, total, state: None) -> CheckReport:
    """Read every byte and every index of the latent store at `root`, and list what is damaged (`verify_latents`).

    Memory: the rows of 256 images. Raises StoreNotFound, IncompleteStore or SpecMismatch if there is no finished store.
    """
    root = Path(root)
    n_images = read_latent_spec(read_header(root, LATENTS), root).n_images
    return _checked(root, verify_latents(root), -(-n_images // _IMAGES_AT_ONCE), progress)


def _checked(root: Path, checks: Iterator[Problem | None], total: int, progress: Progress) -> CheckReport:
    problems: list[Problem] = []
    for n_done, problem in enumerate(checks, start=1):
        if problem is not None:
            problems.append(problem)
        progress(min(n_done, total), total, f"{len(problems)} bad" if problems else "")
    return CheckReport(store=root, n_checked=total, problems=tuple(problems))


def verify_activations(root: Path) -> Iterator[Problem | None]:
    """Check every byte of an activation cache; yields None for each undamaged chunk, so progress can be shown.

    Detected: missing, empty, truncated or too long chunk files; flipped bits; chunks that were swapped or do not
    fit the journal; NaN or infinity in a readable image; a changed image table; a wrong layout.
    """
    header = read_header(root, ACTIVATIONS)
    spec, summary = read_spec(header, root), header.summary or {}
    try:
        check_layout(root, spec)
    except DamagedStore as error:
        yield Problem(None, "all", str(error))

    table = None  # stays None if it is damaged: then the journal is not compared with it
    try:
        images = read_image_table(root / "images.parquet")
        if table_sha256(images) == summary.get("images_sha256"):
            table = images
        else:
            yield Problem(None, "all", "images.parquet was changed: its hash is not the one in the header")
    except BadInput as error:
        yield Problem(None, "all", str(error))

    journal = root / "journal.jsonl"
    try:
        read_lines(journal)
    except DamagedStore as error:
        yield Problem(None, "all", str(error))
    lines = read_lines(journal, skip_damaged=True)
    records = {line["chunk"]: line for line in lines if isinstance(line.get("chunk"), int)}
    if [line.get("chunk") for line in lines] != [*range(spec.n_chunks)]:
        yield Problem(
            None,
            "all",
            f"the journal names {len(records):,} chunks in {len(lines):,} lines, expected {spec.n_chunks:,} in order",
        )

    for chunk in range(spec.n_chunks):
        rows = spec.chunk_rows(chunk)
        what = _check_chunk(root, spec, chunk, records, table)
        yield Problem(chunk, f"{rows.start:,} to {rows.stop - 1:,}", what) if what else None
    require_unchanged(header)  # else the problems are of two stores


def verify_latents(root: Path, *, images_at_once: int = _IMAGES_AT_ONCE) -> Iterator[Problem | None]:
    """Check every byte and every index of a latent store; yields None for each undamaged group of images.

    Detected: missing, empty, truncated, changed or swapped chunk files, by the checksums in the journal; foreign files;
    indices out of range, not increasing or repeated; values that are not finite, not above 0 or below
    `min_activation`; an indptr or image_indptr that decreases or has a wrong end; latents of an unreadable image; a
    changed image table or journal.
    """
    try:
        store = LatentStore(root, check_files=False)
    except (DamagedStore, BadInput) as error:
        yield Problem(None, "all", str(error))
        return
    spec = store.spec
    if table_sha256(store.images) != spec.images_sha256:
        yield Problem(None, "all", "images.parquet was changed: its hash is not the one in the header")
    files, problems = _named_chunks(root, store)
    yield from (Problem(None, "all", what) for what in problems)
    is_readable, starts = store.readable(), store.image_indptr
    is_whole: dict[tuple[str, int], bool] = {}
    for group, start in enumerate(range(0, spec.n_images, images_at_once)):
        stop = min(start + images_at_once, spec.n_images)
        rows = range(start * spec.tokens_per_image, stop * spec.tokens_per_image)
        needed = store.rows.chunks_of(range(int(starts[start]), int(starts[stop])), rows)
        for name, chunk in needed:
            if (name, chunk) not in is_whole:
                what = _check_latent_chunk(root, name, chunk, files)
                is_whole[name, chunk] = what is None
                if what:
                    yield Problem(chunk, _chunk_images(store, name, chunk), f"X/{name}/c/{chunk} {what}")
        if all(is_whole[each] for each in needed):
            what = _check_latents(store, start, stop, is_readable[start:stop])
            yield Problem(group, f"{start:,} to {stop - 1:,}", what) if what else None
    require_unchanged(store.header)


def verify_barcodes(root: Path) -> list[str]:
    """Check every byte of the barcodes in a folder: a line for each problem, none if they are undamaged.

    Detected: missing, changed, swapped or foreign files of a level, missing or changed exports, rows that violate an
    invariant. Barcodes of an older cyto have no checksums of files: there, only matrices and exports are checked.
    """
    try:
        store = BarcodeStore(root)
    except CytoError as error:
        return [str(error)]
    problems = []
    for tau in store.taus:
        for level in LEVELS:
            try:
                path = store.path(level, tau)
                found = [*store.file_problems(path.name, all_bytes=True)] if store.records_files else []
                problems += found
                layers = [folder.name for folder in sorted((path / "layers").glob("*")) if folder.is_dir()]
                for layer in () if found else ("X", *layers):
                    rows = store.matrix(level, tau, layer)
                    for start in range(0, rows.shape[0], 256):
                        rows.read_rows(start, min(start + 256, rows.shape[0]))
                if not found:
                    check_tree(path)
            except CytoError as error:
                problems.append(str(error))
    for name, sha256 in (store.header.summary or {}).get("exports", {}).items():
        export = store.root / name
        if not export.is_file():
            problems.append(f"{name} is missing")
        elif sha256_file(export) != sha256:
            problems.append(f"{name} is damaged: its hash is not the one in the header")
    return problems


def _named_chunks(root: Path, store: LatentStore) -> tuple[dict[str, list[tuple[int, str]]] | None, list[str]]:
    """(size and checksum of every chunk file by the journal, or None; problems of the journal).

    A store of an older cyto, without checksums, has no journal hash in its header.
    """
    summary, journal = store.header.summary or {}, root / "journal.jsonl"
    if "journal_sha256" not in summary:
        return None, []
    try:
        if sha256_file(journal) != summary["journal_sha256"]:
            return None, ["journal.jsonl was changed: its hash is not the one in the header"]
        files = CsrCommit.from_json(read_lines(journal)).chunks
    except (DamagedStore, OSError) as error:
        return None, [f"journal.jsonl cannot be used: {error}"]
    problems = []
    for name, n_chunks in store.rows.chunk_counts().items():
        if len(files[name]) != n_chunks:
            problems.append(f"the journal names {len(files[name]):,} chunks of X/{name}, expected {n_chunks:,}")
        there = {path.name for path in (root / "X" / name / "c").glob("*") if not is_dropping(path.name)}
        extra = sorted(there - {str(chunk) for chunk in range(n_chunks)})
        if extra:
            problems.append(f"X/{name}/c holds {len(extra):,} files that do not belong there ({listed(extra)})")
    return (None if problems else files), problems


def _check_latent_chunk(
    root: Path, name: str, chunk: int, files: dict[str, list[tuple[int, str]]] | None
) -> str | None:
    """What is wrong with the file of one chunk, or None."""
    path = root / "X" / name / "c" / str(chunk)
    if files is None:
        return None if path.is_file() and path.stat().st_size else "is missing or empty"
    size, crc = files[name][chunk]
    what = check_chunk(path, size, crc)
    if what and path.is_file():
        found = crc32(path.read_bytes())
        owners = [f"X/{other}/c/{n}" for other in files for n, (_, crc) in enumerate(files[other]) if crc == found]
        what += f": it is {listed(owners)}" if owners else ""
    return what


def _check_latents(store: LatentStore, start: int, stop: int, is_readable: npt.NDArray[np.bool_]) -> str | None:
    """What is wrong with the rows of some images, or None. Memory: these rows."""
    try:
        rows = store.read_images(start, stop)
    except CytoError as error:
        return str(error)
    starts = rows.indptr[:: store.spec.tokens_per_image]
    if (starts + store.image_indptr[start] != store.image_indptr[start : stop + 1]).any():
        return "image_indptr disagrees with indptr"
    if np.diff(starts)[~is_readable].any():
        return "an unreadable image has latents"
    if (rows.values < np.float32(store.spec.min_activation)).any():
        return f"a value lies below {store.spec.min_activation:g}, where such values were dropped"
    return None


def _chunk_images(store: LatentStore, name: str, chunk: int) -> str:
    """The images whose rows a chunk holds, in words."""
    entries = store.rows.chunk_entries(name, chunk)
    if name == "indptr":
        first, last = (row // store.spec.tokens_per_image for row in (entries.start, entries.stop - 1))
    else:
        first, last = np.searchsorted(store.image_indptr, [entries.start, entries.stop - 1], side="right") - 1
    return f"{first:,} to {min(int(last), store.spec.n_images - 1):,}"


def _check_chunk(
    root: Path, spec: ActivationSpec, chunk: int, records: dict[int, dict[str, Any]], table: pa.Table | None
) -> str | None:
    """What is wrong with one chunk, or None. Memory: one chunk."""
    path = chunk_path(root, chunk)
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error}"
    if len(raw) != spec.chunk_bytes:
        return f"{len(raw):,} bytes, expected {spec.chunk_bytes:,}"
    body, stored = raw[:-CRC_BYTES], int.from_bytes(raw[-CRC_BYTES:].tobytes(), "little")
    crc = google_crc32c.value(body)
    if crc != stored:
        return "fails its checksum: bits have changed"
    record, rows = records.get(chunk), spec.chunk_rows(chunk)
    if record is None:
        return "not named in the journal"
    if record.get("crc32c") != f"{crc:08x}":
        owners = [str(other) for other, line in records.items() if line.get("crc32c") == f"{crc:08x}"]
        found = f"it is chunk {listed(owners)}" if owners else "written by another run"
        return f"is not the chunk that the journal names: {found}"
    if (record.get("first_image"), record.get("n_images"), record.get("size")) != (rows.start, len(rows), len(raw)):
        return "the journal gives it other images, or another size"
    errors, hashes = record.get("errors"), record.get("content_hash")
    if not isinstance(errors, dict) or not isinstance(hashes, list) or len(hashes) != len(rows):
        return "the journal does not say what became of its images"
    ids: list[str | None] = ["?"] * len(rows)
    if table is not None:
        part = table.slice(rows.start, len(rows))
        ids = column(part, "image_id")
        named_errors = zip(rows, column(part, "error"), strict=True)
        if errors != {str(row): error for row, error in named_errors if error is not None}:
            return "the journal and images.parquet disagree about which images could be read"
        if hashes != column(part, "content_hash"):
            return "the journal and images.parquet disagree about the hashes of its images"
        truncated = zip(rows, truncated_images(part), strict=True)
        if record.get("truncated", {}) != {str(row): what for row, what in truncated if what is not None}:
            return "the journal and images.parquet disagree about which images are cut off"
    bits = body.view("<u2").reshape(spec.chunk_images, -1) & np.uint16(0x7FFF)
    for position, row in enumerate(rows):
        if str(row) not in errors and (bits[position] >= _FINITE_BELOW).any():
            return f"NaN or infinity in readable image {row:,} ({ids[position]})"
        if str(row) in errors and (bits[position] < _FINITE_BELOW).any():
            return f"numbers instead of NaN in unreadable image {row:,} ({ids[position]})"
    return None
