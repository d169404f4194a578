"""Any folder of ours, checked byte by byte: what it is stands in its header, what it must hold as well."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .barcode_store import BarcodeStore
from .errors import CytoError, DamagedStore, IncompleteStore, StoreNotFound
from .files import sha256_file
from .progress import Progress
from .result_folder import LISTED, ResultStore
from .spec import ACTIVATIONS, BARCODES, FORMATS, LATENTS, SAE, find_header, read_header, read_object
from .verify import verify_activations, verify_barcodes, verify_latents

_WEIGHTS = "sae.safetensors"


@dataclass
class Report:
    """What was found in one folder."""

    root: Path
    kind: str
    problems: list[str] = field(default_factory=list)  # empty: whole
    unrecorded: list[str] = field(default_factory=list)  # files that an older cyto wrote no hash of: not checked


def verify(root: Path, *, progress: Progress = lambda done, total, state: None) -> Report:
    """Check every byte of the store or folder of results at `root`, of whatever kind.

    Raises
    ------
    StoreNotFound
        If nothing of ours is there.
    IncompleteStore, SpecMismatch
        If it is not finished, or of a newer program.
    """
    if read_object(root / "sweep.json").get("format") == "sweep":
        return _verify_sweep(root, progress)
    try:
        header = find_header(root)
    except DamagedStore as error:
        return Report(root, "unknown", [str(error)])
    if header is None:
        raise StoreNotFound(f"no store or results of cyto at {root}; give the folder that a cyto command has written")
    format = FORMATS[header.kind]
    read_header(root, format)
    report = Report(root, format.kind)
    check = {ACTIVATIONS: _activations, LATENTS: _latents, SAE: _sae, BARCODES: _barcodes}.get(format, _results)
    try:
        for problem in check(root, report):
            if problem is not None:
                report.problems.append(problem)
            progress(0, 0, f"{len(report.problems)} bad" if report.problems else "")
    except (CytoError, OSError) as error:
        report.problems.append(str(error))
    return report


Check = Callable[[Path, Report], Iterator[str | None]]


def _activations(root: Path, report: Report) -> Iterator[str | None]:
    for problem in verify_activations(root):
        yield None if problem is None else str(problem)


def _latents(root: Path, report: Report) -> Iterator[str | None]:
    for problem in verify_latents(root):
        yield None if problem is None else str(problem)


def _barcodes(root: Path, report: Report) -> Iterator[str | None]:
    yield from verify_barcodes(root)
    if not BarcodeStore(root).records_files:  # of an older cyto: chunks are there, and nothing says what was in them
        report.unrecorded = sorted(path.name for path in root.glob("*.zarr"))


def _sae(root: Path, report: Report) -> Iterator[str | None]:
    header = read_header(root, SAE)
    summary = header.summary or {}
    again = f"{'cyto sae import' if 'imported' in header.spec else SAE.command} --overwrite makes it again"
    known = {_WEIGHTS: summary.get("sae_sha256"), **summary.get("files", {})}
    yield from _compared(root, known, again)
    report.unrecorded = sorted(path.name for path in root.glob("*.parquet") if path.name not in known)
    left = sorted(path.name for path in (root / "state").glob("state-*"))
    if left:
        yield f"{root / 'state'} holds {len(left)} saved states that a finished run needs no more; remove them"


def _results(root: Path, report: Report) -> Iterator[str | None]:
    header = find_header(root)
    assert header is not None
    store = ResultStore(root, FORMATS[header.kind])
    yield from store.problems()
    report.unrecorded = store.unrecorded()
    if (root / LISTED).is_file() and LISTED in (header.summary or {}).get("files", {}):
        table = store.table(LISTED.removesuffix(".parquet"))
        known = dict(zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True))
        yield from _compared(root, known, f"{FORMATS[header.kind].command} --overwrite makes it again")


def _compared(root: Path, known: dict[str, str | None], again: str) -> Iterator[str | None]:
    for name, sha256 in known.items():
        path = root / name
        if not path.is_file():
            yield f"{path} is missing; {again}"
        else:
            yield None if sha256_file(path) == sha256 else f"{path} is not the file that was written; {again}"


def _verify_sweep(root: Path, progress: Progress) -> Report:
    """Its SAEs; the tables over them are made again by the sweep itself and have no hashes."""
    report = Report(root, "sweep", unrecorded=sorted(path.name for path in root.glob("*.parquet")))
    for run in sorted((root / "runs").glob("*")):
        try:
            report.problems += verify(run, progress=progress).problems
        except IncompleteStore:  # a member that diverged, or is still to come: sweep.json says which
            continue
        except CytoError as error:
            report.problems.append(str(error))
    return report
