"""Makes the damaged chunks of a finished cache again, from the same images with the same weights.

The cache is verified, and the image files of its damaged chunks are compared with their recorded hashes. Then the cache
is marked incomplete without these chunks, and continued like an interrupted one. If the repair itself is interrupted,
the same command continues it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.activation_spec import ActivationSpec, read_spec, records_of
from stores.activation_writer import written_records
from stores.destination import claimed
from stores.devices import resolve_device
from stores.doors import make_callable
from stores.errors import BadInput, SpecMismatch
from stores.machine import n_cores
from stores.progress import Progress
from stores.runlog import read_runs
from stores.shards import ONE_WRITER
from stores.spec import ACTIVATIONS, Header, describe_difference, read_header
from stores.tables import column, listed, read_image_table, table_sha256, without_outcome
from stores.verify import Problem, verify_activations
from stores.wording import Report, counted

from .datasets import Images, open_images
from .extract import ExtractConfig, fill, make_spec, open_writer
from .image_files import hash_of
from .sample import load_for_spec


@dataclass(frozen=True, kw_only=True)
class RepairResult(Report):
    """The problems that were found, and the chunks that were made again."""

    out: Path  # the cache
    problems: list[Problem]  # empty if nothing was wrong, or if an interrupted repair was continued
    chunks: list[int]  # made again
    other_bits: list[int]  # of these, chunks whose checksum differs from the journal's
    other_images: bool = False  # the image table has changed: other files, or others of them can be read

    @property
    def was_complete(self) -> bool:
        """Nothing was damaged."""
        return not self.problems and not self.chunks

    @property
    def warnings(self) -> tuple[str, ...]:
        """Tokens or images that differ from those before the damage."""
        found = []
        if self.other_bits:
            found.append(
                f"{len(self.other_bits):,} of them differ in the last bits from what was there (another device, "
                f"version, thread count or batch size): SAEs trained on this cache before name other numbers"
            )
        if self.other_images:
            found.append("other image files are there, or can be read, than when the cache was made")
        return tuple(found)

    def lines(self) -> Iterator[str]:
        """Each problem, and how much was made again."""
        for problem in self.problems:
            yield f"was: {problem}"
        if self.was_complete:
            yield f"{self.out}: whole; nothing to repair"
        else:
            yield f"{self.out}: repaired; {counted(len(self.chunks), 'chunk')} made again"


def repair(
    store: Path | str,
    *,
    images: Images | Path | str | None = None,
    root: Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    verify_progress: Progress = lambda done, total, state: None,
    progress: Progress = lambda done, total, state: None,
    download_progress: Progress = lambda done, total, state: None,
    stop: Callable[[], bool] = lambda: False,
) -> RepairResult:
    """Verify the cache at `store` and make what is damaged again. Memory: as `extract`.

    Parameters
    ----------
    images : what the cache was made from (see `open_images`); needed only if its own image table was changed or lost
    root : folder of the images now; default: as recorded when the cache was written
    weights : the file of the trained backbone; an untrained one needs none
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    batch_size : default: that of the run that wrote the cache, so that the last bits are equal
    workers : processes that read images; default: one for each core

    Raises
    ------
    BadInput
        If the images cannot be found, or an image file of a damaged chunk is not the one that was cached.
    SpecMismatch
        If weights or manifest are not those of the cache.
    IncompleteStore, StoreNotFound
        If there is no finished cache.
    """
    store, device = Path(store), resolve_device(device)
    given = open_images(images, root=root) if isinstance(images, Path | str) else images
    header = read_header(store, ACTIVATIONS, complete=False)
    spec, problems = read_spec(header, store), list[Problem]()
    if header.complete or header.summary is None:
        problems = _verify(store, spec, verify_progress, stop)
        damaged = sorted({problem.chunk for problem in problems if problem.chunk is not None})
        if not problems:
            return RepairResult(out=store, problems=[], chunks=[], other_bits=[])
    else:  # a repair was interrupted
        whole = written_records(store, spec, range(spec.n_chunks))
        damaged = [chunk for chunk in range(spec.n_chunks) if chunk not in whole]

    runs = read_runs(store)
    found = _find_images(store, spec, given, root, runs)
    before = _first_crcs(store)
    _refuse_other_files(spec, found, damaged, _recorded_hashes(store, spec, header))
    config = ExtractConfig(
        backbone=spec.backbone,
        weights=weights if spec.trained else "random",
        blocks=(spec.block,),
        precision=spec.precision,
        chunk_images=spec.chunk_images,
        device=device,
        batch_size=batch_size or _batch_size(runs),
        workers=workers or n_cores(),
        allow_truncated=spec.allow_truncated,
    )
    backbone = load_for_spec(spec, str(store), weights=weights, progress=download_progress) if damaged else None
    wanted = make_spec(backbone, found, config, spec.block) if backbone else spec
    if wanted != spec:
        difference = describe_difference(spec.to_dict(), wanted.to_dict())
        raise SpecMismatch(f"{store} was made with other settings ({difference}); repair it with what it was made from")

    with ExitStack() as stack:
        stack.enter_context(claimed(store, shared=True))
        writer = open_writer(stack, store, spec, found, config, ONE_WRITER, damaged=damaged)
        if backbone:
            fill(backbone, found, [writer], config, progress=progress, stop=stop)
        repaired = writer.finish()
    after = _first_crcs(store)
    return RepairResult(
        out=store,
        problems=problems,
        chunks=damaged,
        other_bits=[chunk for chunk in damaged if before.get(chunk) not in (None, after.get(chunk))],
        other_images=repaired is not None and repaired.summary != header.summary,
    )


def _verify(store: Path, spec: ActivationSpec, progress: Progress, stop: Callable[[], bool]) -> list[Problem]:
    problems = []
    for n_done, problem in enumerate(verify_activations(store), start=1):
        if problem is not None:
            problems.append(problem)
        if stop():
            raise KeyboardInterrupt
        progress(min(n_done, spec.n_chunks), spec.n_chunks, f"{len(problems)} bad" if problems else "")
    return problems


def _find_images(
    store: Path, spec: ActivationSpec, given: Images | None, root: Path | None, runs: list[dict[str, Any]]
) -> Images:
    """The images of the cache: the given ones, else by its own image table and run log."""
    if given is None:
        given = Images(_own_manifest(store), root or Path(str((runs or [{}])[-1].get("images_root", "."))))
    if table_sha256(given.table) != spec.manifest_sha256:
        raise SpecMismatch(
            f"the images do not have the table that {store} was made from (sha256 {spec.manifest_sha256[:12]}…, found "
            f"{table_sha256(given.table)[:12]}…); give the folder, CSV or Parquet file that it was made from: --images"
        )
    return given


def _own_manifest(store: Path) -> Any:
    try:
        return without_outcome(read_image_table(store / "images.parquet"))
    except BadInput as error:
        raise BadInput(f"{error}. Give the folder, CSV or Parquet file that it was made from: --images") from None


def _batch_size(runs: list[dict[str, Any]]) -> int:
    found = (runs or [{}])[-1].get("batch_size")
    return found if isinstance(found, int) and found > 0 else 32


def _first_crcs(store: Path) -> dict[int, str]:
    """Chunk -> its checksum by the journal, also where a started repair has withdrawn it."""
    found: dict[int, str] = {}
    for record in records_of(store, skip_damaged=True):
        crc = record.get("crc32c") or record.get("crc32c_before")
        if isinstance(record.get("chunk"), int) and isinstance(crc, str):
            found.setdefault(record["chunk"], crc)
    return found


def _recorded_hashes(store: Path, spec: ActivationSpec, header: Header) -> list[str | None]:
    """The hash of each image file when it was cached; None where it is unknown, or there was no file.

    From the image table, if its hash is the one in the header; else from the undamaged lines of the journal.
    """
    try:
        table = read_image_table(store / "images.parquet")
    except BadInput:
        table = None
    if table is not None and table_sha256(table) == (header.summary or {}).get("images_sha256"):
        return column(table, "content_hash")
    hashes: list[str | None] = [None] * spec.n_images
    for record in records_of(store, skip_damaged=True):
        chunk, found = record.get("chunk"), record.get("content_hash")
        if isinstance(chunk, int) and 0 <= chunk < spec.n_chunks and isinstance(found, list):
            rows = spec.chunk_rows(chunk)
            if len(found) == len(rows):
                hashes[rows.start : rows.stop] = found
    return hashes


def _refuse_other_files(spec: ActivationSpec, images: Images, damaged: list[int], recorded: list[str | None]) -> None:
    """Raise BadInput if an image file of the damaged chunks is missing or has changed."""
    paths = column(images.table, "path")
    rows = [row for chunk in damaged for row in spec.chunk_rows(chunk)]
    changed = [str(paths[row]) for row in rows if recorded[row] not in (None, hash_of(images.root / str(paths[row])))]
    if changed:
        raise BadInput(
            f"{len(changed):,} image files of the damaged chunks are missing below {images.root} or are not those that "
            f"were cached ({listed(changed)}); put them back, or say where they are with --root"
        )


make_callable(__name__, "repair")  # cytocache.repair(...)
