"""Checks every byte of any store or folder of results that Cyto has written; its kind is in its header."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from .barcode_store import BarcodeStore
from .errors import CytoError, DamagedStore, IncompleteStore, StoreNotFound, StoreReplaced
from .files import sha256_file, sha256_json
from .progress import Progress
from .result_folder import ADDED_LATER, LISTED, ResultStore
from .runlog import damaged_runs
from .spec import ACTIVATIONS, BARCODES, FORMATS, LATENTS, SAE, find_header, read_header, read_object, require_unchanged
from .tables import read_sealed
from .verify import verify_activations, verify_barcodes, verify_latents
from .wording import Report

_WEIGHTS = "sae.safetensors"
_HEALTH = "health.json"  # beside the weights, by cyto sae train or eval --keep


@dataclass(frozen=True)
class VerifyReport(Report):
    """What was found in one folder."""

    root: Path
    kind: str  # of the store or results; `unknown` if its header cannot be read
    problems: list[str] = field(default_factory=list)  # empty: no damage
    unrecorded: list[str] = field(default_factory=list)  # files without a recorded hash (of an older cyto): not checked

    @property
    def is_whole(self) -> bool:
        """No damage was found."""
        return not self.problems

    def lines(self) -> Iterator[str]:
        """A line for each problem, or that there is none, and what could not be checked."""
        yield from self.problems
        if self.unrecorded:
            yield f"{self.root}: no hash recorded, so not checked: {', '.join(self.unrecorded)}"
        if not self.problems:
            yield f"{self.root}: {'no damage found' if self.unrecorded else 'whole'} ({self.kind})"

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {**vars(self), "root": str(self.root), "ok": self.is_whole}


def verify_folder(root: Path | str, *, progress: Progress = lambda done, total, state: None) -> VerifyReport:
    """Check every byte of the store or folder of results at `root`, of whatever kind.

    Memory: one chunk or one table. Order of the problems: as found.

    Raises
    ------
    StoreNotFound
        If there is no store or folder of results of Cyto.
    IncompleteStore, SpecMismatch
        If it is not finished, or of a newer program.
    """
    root = Path(root)
    if read_object(root / "sweep.json").get("format") == "sweep":
        return _verify_sweep(root, progress)
    try:
        header = find_header(root)
    except DamagedStore as error:
        return VerifyReport(root, "unknown", [str(error)])
    if header is None:
        raise StoreNotFound(f"no store or results of cyto at {root}; give the folder that a cyto command has written")
    format = FORMATS[header.kind]
    header = read_header(root, format)
    report = VerifyReport(root, format.kind)
    check = {ACTIVATIONS: _activations, LATENTS: _latents, SAE: _sae, BARCODES: _barcodes}.get(format, _results)
    try:
        for problem in check(root, report):
            if problem is not None:
                report.problems.append(problem)
            progress(0, 0, f"{len(report.problems)} bad" if report.problems else "")
        report.problems.extend(damaged_runs(root))
        require_unchanged(header)  # else the problems are of two stores
    except StoreReplaced:
        raise
    except (CytoError, OSError) as error:
        report.problems.append(str(error))
    return report


verify = verify_folder  # the old name

Check = Callable[[Path, VerifyReport], Iterator[str | None]]


def _activations(root: Path, report: VerifyReport) -> Iterator[str | None]:
    for problem in verify_activations(root):
        yield None if problem is None else str(problem)


def _latents(root: Path, report: VerifyReport) -> Iterator[str | None]:
    for problem in verify_latents(root):
        yield None if problem is None else str(problem)


def _barcodes(root: Path, report: VerifyReport) -> Iterator[str | None]:
    yield from verify_barcodes(root)
    if not BarcodeStore(root).records_files:  # of an older cyto, without checksums of chunks
        report.unrecorded.extend(sorted(path.name for path in root.glob("*.zarr")))


def _sae(root: Path, report: VerifyReport) -> Iterator[str | None]:
    header = read_header(root, SAE)
    summary = header.summary or {}
    again = f"{'cyto sae import' if 'imported' in header.spec else SAE.command} --overwrite makes it again"
    known = {_WEIGHTS: summary.get("sae_sha256"), **summary.get("files", {})}
    yield from _compared(root, known, again)
    for path in sorted(path for path in root.glob("*.parquet") if path.name not in known):
        yield from _sealed(path, report, "it names the course of training only; remove it")
    health = read_object(root / _HEALTH)
    if (root / _HEALTH).exists() and health.pop("sha256", None) != sha256_json(health):
        yield f"{root / _HEALTH} is not what was written; remove it, or cyto sae eval --keep measures it again"
    left = sorted(path.name for path in (root / "state").glob("state-*"))
    if left:
        yield f"{root / 'state'} holds {len(left)} saved states that a finished run needs no more; remove them"


def _results(root: Path, report: VerifyReport) -> Iterator[str | None]:
    header = find_header(root)
    assert header is not None
    store = ResultStore(root, FORMATS[header.kind])
    yield from store.problems()
    report.unrecorded.extend(store.unrecorded())
    for name, again in ADDED_LATER.items():
        if (root / name).is_file() and name not in store.recorded():
            yield from _sealed(root / name, report, again)
    if (root / LISTED).is_file() and LISTED in (header.summary or {}).get("files", {}):
        table = store.table(LISTED.removesuffix(".parquet"))
        known = dict(zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True))
        yield from _compared(root, known, f"{FORMATS[header.kind].command} --overwrite makes it again")


def _sealed(path: Path, report: VerifyReport, again: str) -> Iterator[str | None]:
    """Check a table that holds its own hash; one of an older cyto may have none."""
    try:
        if "sha256" not in read_sealed(path)[1]:
            report.unrecorded.append(path.name)
    except (OSError, ValueError, pa.ArrowException) as error:
        yield f"{path} is not the table that was written ({' '.join(str(error).split())[:160]}); {again}"


def _compared(root: Path, known: dict[str, str | None], again: str) -> Iterator[str | None]:
    for name, sha256 in known.items():
        path = root / name
        if not path.is_file():
            yield f"{path} is missing; {again}"
        else:
            yield None if sha256_file(path) == sha256 else f"{path} is not the file that was written; {again}"


def _verify_sweep(root: Path, progress: Progress) -> VerifyReport:
    """Check the tables and figures of a sweep, and its SAEs."""
    report = VerifyReport(root, "sweep")
    record = read_object(root / "sweep.json")
    if record.get("sha256", sweep_sha256(record)) != sweep_sha256(record):
        report.problems.append(
            f"{root / 'sweep.json'} is not the file that was written; choose another -o for a new sweep"
        )
    files = record.get("files")
    known = files if isinstance(files, dict) else {}
    found = _compared(root, known, "the same cyto sae sweep makes it again")
    report.problems.extend(each for each in found if each)
    report.problems.extend(damaged_runs(root))
    tables = [*root.glob("*.parquet"), *root.glob("table.md"), *root.glob("sweep.png"), *root.glob("sweep.svg")]
    report.unrecorded.extend(sorted(path.name for path in tables if path.name not in known))
    for run in sorted((root / "runs").glob("*")):
        try:
            member = verify_folder(run, progress=progress)
        except IncompleteStore:  # an SAE that diverged, or was not trained yet: sweep.json says which
            continue
        except StoreReplaced:
            raise
        except CytoError as error:
            report.problems.append(str(error))
            continue
        report.problems.extend(member.problems)
        report.unrecorded.extend(f"runs/{run.name}/{name}" for name in member.unrecorded)
    return report


def sweep_sha256(record: dict[str, Any]) -> str:
    """The hash of the content of `sweep.json`, without the entry `sha256`."""
    return sha256_json({name: value for name, value in record.items() if name != "sha256"})
