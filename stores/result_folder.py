"""Folders of results: the tables, JSON and figures of one command, and a header with its settings and inputs.

The header is written last and holds the SHA-256 of every file, so a folder is either complete or marked incomplete. A
repeated command with the same settings finds its folder complete; an interrupted one writes it again, from what it has
kept in part files (`ResultWriter.parts`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from .destination import Output, plan_output
from .errors import BadInput, CytoError, DamagedStore
from .files import (
    LOCK_SUFFIX,
    is_dropping,
    parse_json,
    read_regular,
    readable_json,
    sha256_file,
    sweep_partials,
    sync_tree,
    write_atomic,
)
from .part_files import KeptParts
from .runlog import append_run
from .seal import Seal
from .spec import (
    FORMATS,
    Format,
    Header,
    find_header,
    new_header,
    read_header,
    require_unchanged,
    seal_of,
    stated,
    write_header,
)
from .tables import parquet_bytes, parquet_table

LISTED = "files.parquet"  # of an atlas: name, bytes and sha256 of every page and image
# the log, and tables that commands add later, each with its own hash, and what makes them again
ADDED_LATER = {
    "selection.parquet": "cyto concept select --overwrite makes it again",
    **dict.fromkeys(
        ("names.parquet", "detection.parquet", "sources.parquet"),
        "remove it: the same cyto concept describe makes it again from the answers",
    ),
}
_UNRECORDED = ("runs.jsonl", *ADDED_LATER)
_MOST_BYTES = 1 << 36  # of a table
_PARTS = "parts"  # folder of what an interrupted command has computed so far
_T = TypeVar("_T")


@dataclass(frozen=True)
class ResultWriter:
    """A folder of results that is being written; it is complete after `finish`."""

    output: Output
    header: Header
    seals: list[Seal] = field(default_factory=list)  # of the inputs, checked again at the end

    @property
    def root(self) -> Path:
        """The folder to write to; a temporary one if an old folder is to be replaced."""
        return self.output.work

    @property
    def is_complete(self) -> bool:
        """The same results exist already."""
        return self.output.is_complete

    @property
    def parts(self) -> KeptParts:
        """What this command, if it was interrupted, had computed before; `finish` removes it."""
        return KeptParts(self.root / _PARTS, self.header.identity)

    def watch(self, *headers: Header) -> None:
        """Add stores that were opened before the results were started: they must be unchanged at the end, too."""
        self.seals.extend(header.seal for header in headers if header.seal is not None)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write `name`.parquet, with the identity of these results in its metadata."""
        metadata = {**(table.schema.metadata or {}), b"cyto": self.header.identity.encode()}
        write_atomic(self.root / f"{name}.parquet", parquet_bytes(table.replace_schema_metadata(metadata)))

    def write_json(self, name: str, value: Any) -> None:
        """Write `name`.json; the caller must have replaced NaN by None."""
        write_atomic(self.root / f"{name}.json", readable_json(value))

    def finish(self, summary: dict[str, Any]) -> Header:
        """Write the header with the summary and the checksums of all files, and move the folder into place.

        Raises
        ------
        StoreReplaced
            If an input was replaced in the meantime.
        """
        for seal in self.seals:
            seal.check()
        self.parts.remove()
        names = sorted(path.name for path in self.root.iterdir() if _is_result(path))
        own = FORMATS[self.header.kind].header_file
        files = {name: sha256_file(self.root / name) for name in names if name != own}
        figures = {}
        if LISTED not in files:  # an atlas lists its thousands of files in this table
            figures = {name: sha256_file(self.root / name) for name in other_files(self.root, own) if name not in files}
        sync_tree(self.root)
        header = replace(self.header, complete=True, summary={**summary, "files": files, "figures": figures})
        write_header(self.root, header)
        self.output.publish()
        return header


def _is_result(path: Path) -> bool:
    return path.suffix in (".parquet", ".json") and not is_dropping(path.name)


def begin_results(
    target: Path,
    format: Format,
    spec: dict[str, Any],
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    packages: Sequence[str] = ("numpy", "scipy"),
) -> ResultWriter:
    """Decide about the folder of these results (see `plan_output`), and start it unless it is complete.

    Parameters
    ----------
    spec : all settings that decide the numbers, with the identities of the inputs; plain JSON values
    inputs : files and folders that this command reads, which `target` must not contain
    packages : the packages whose versions the run log (runs.jsonl) records

    Raises
    ------
    SpecMismatch
        If `target` holds other settings (and not `overwrite`), or something else.
    DamagedStore
        If it is complete, but one of its files has changed or is missing.
    """
    header = new_header(format, spec)
    output = plan_output(target, header, overwrite=overwrite, inputs=tuple(inputs))
    if output.is_complete:
        output.publish()
        ResultStore(target, format).check()
        return ResultWriter(output, read_header(target, format))
    output.work.mkdir(parents=True, exist_ok=True)
    seals = [seal for path in inputs if (seal := seal_of(path)) is not None]
    sweep_partials(output.work)
    write_header(output.work, header)
    append_run(output.work, packages=tuple(packages))
    return ResultWriter(output, header, seals)


def is_finished(target: Path, format: Format, spec: dict[str, Any]) -> bool:
    """`target` holds these results, complete: then a command need not read its inputs again before `begin_results`."""
    found = find_header(target.absolute())
    return found is not None and found.complete and found.identity == new_header(format, spec).identity


def kept_before(target: Path, format: Format, spec: dict[str, Any]) -> KeptParts:
    """What an interrupted command with this spec has kept, for one that reads its inputs before `begin_results`."""
    return KeptParts(target / _PARTS, new_header(format, spec).identity)


def other_files(root: Path, header_file: str) -> list[str]:
    """Names of all files in a folder of results, without header, run log, locks and later additions."""
    places = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    names = (
        path.relative_to(root).as_posix()
        for path in places
        if path.suffix != LOCK_SUFFIX and not is_dropping(path.name)
    )
    return sorted(name for name in names if name not in (header_file, *_UNRECORDED))


class ResultStore:
    """A complete folder of results, open for reading."""

    def __init__(self, root: Path | str, format: Format) -> None:
        """Open the folder at `root`.

        Raises
        ------
        StoreNotFound, IncompleteStore, SpecMismatch
            If there are no finished results of this kind and of a version that this program reads.
        """
        self.root = Path(root).absolute()
        self.header = read_header(self.root, format)
        self._command, self._own = format.command, format.header_file

    def table(self, name: str) -> pa.Table:
        """The table `name`.parquet.

        Raises
        ------
        DamagedStore
            If it is missing or has changed.
        """
        data = self._checked(f"{name}.parquet")
        try:
            return parquet_table(data)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DamagedStore(f"{self.root / name}.parquet cannot be read ({error})") from None

    def content(self, name: str) -> bytes:
        """The content of any file of the folder, by its full name, checked in the same way."""
        return self._checked(name)

    def json(self, name: str) -> Any:
        """The value in `name`.json, checked in the same way."""
        try:
            return parse_json(self._checked(f"{name}.json"))
        except ValueError as error:
            raise (
                error
                if isinstance(error, CytoError)
                else DamagedStore(f"{self.root / name}.json cannot be read ({error})")
            ) from None

    def result(self, cls: type[_T], **more: Any) -> _T:
        """The result object of the command, from the summary in the header; `more`: fields that it does not hold.

        Raises
        ------
        DamagedStore
            If the summary lacks a field, or has another type.
        """
        return stated(cls, dict(self.header.summary or {}).get("result"), self.root, **more)

    def check(self) -> None:
        """Raise DamagedStore if a table, a JSON file or a figure has changed or is missing."""
        for problem in self.problems():
            raise DamagedStore(problem)

    def problems(self) -> Iterator[str]:
        """The messages that `check` would raise, for every file. Memory: one table."""
        for name in self._files:
            try:
                self._checked(name)
            except DamagedStore as error:
                yield str(error)
        for name, sha256 in self._figures.items():
            path = self.root / name
            if not path.is_file():
                yield f"{path} is missing; {self._command} --overwrite makes it again"
            elif sha256_file(path) != sha256:
                yield f"{path} is not the file that was written; {self._command} --overwrite makes it again"

    def recorded(self) -> set[str]:
        """Files whose hash is in the header."""
        return {*self._files, *self._figures}

    def unrecorded(self) -> list[str]:
        """Files without a recorded hash: an older cyto recorded tables and JSON files only."""
        known = self.recorded()
        listed = {LISTED} & known
        return [] if listed else [name for name in other_files(self.root, self._own) if name not in known]

    @property
    def _figures(self) -> dict[str, str]:
        return dict((self.header.summary or {}).get("figures", {}))

    @property
    def _files(self) -> dict[str, str]:
        return dict((self.header.summary or {}).get("files", {}))

    def _checked(self, name: str) -> bytes:
        known = {**self._figures, **self._files}
        if name not in known:
            there = ", ".join(self._files) or "nothing"
            raise BadInput(f"{self.root} has no {name}; it holds {there}")
        try:
            data = read_regular(self.root / name, most_bytes=_MOST_BYTES)
        except (OSError, ValueError):
            require_unchanged(self.header)  # the store may have been replaced
            raise DamagedStore(f"{self.root / name} is missing; {self._command} --overwrite makes it again") from None
        if hashlib.sha256(data).hexdigest() != known[name]:
            require_unchanged(self.header)
            raise DamagedStore(
                f"{self.root / name} is not the file that was written; {self._command} --overwrite makes it again"
            )
        return data
