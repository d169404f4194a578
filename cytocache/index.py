"""`cyto data index`: makes an image table from a folder, marks byte-identical files, and writes it atomically."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stores.destination import claimed
from stores.errors import BadInput, SpecMismatch
from stores.progress import Progress
from stores.spec import FORMATS, find_header
from stores.tables import column, listed, read_image_table, write_image_table

from .datasets import list_files, open_images
from .duplicates import find_duplicates
from .published_datasets import INDEXERS, NO_CELLS, NOT_AN_IMAGE, Count, Finding, Index

DUPLICATE_OF = "duplicate_of"  # the column: image_id of the first image with the same bytes, else null
_MARK, _MADE_BY = b"cyto", "cyto data index"  # in the Parquet metadata: the program that wrote the file


def index_images(
    source: Path | str,
    out: Path | str | None = None,
    *,
    dataset: str = "folder",
    class_set: str | None = None,
    compare_files: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Index:
    """The image table of `source`, one row per image, and how it compares with the published dataset.

    Nothing but `out` is written, atomically; without it, nothing at all.

    Parameters
    ----------
    source : the unpacked dataset, or a folder above it
    out : the Parquet file to write
    dataset : a published dataset (`INDEXERS`), or "folder": one sub-folder per class
    class_set : of acevedo: "13" (default), "11" (the paper's) or "10" (DinoBloom's)
    compare_files : read the files, and mark those that are byte-identical to an earlier one
    progress : files compared, files in all

    Raises
    ------
    BadInput
        If there is nothing to index, or the name of `out` does not end in .parquet.
    SpecMismatch
        If `out` is something else, or another index and `overwrite` is not set.
    """
    source = Path(source)
    if out is None:
        index = index_dataset(source, dataset, class_set)
        return mark_duplicates(index, progress=progress) if compare_files else index
    out = Path(out)
    _find_before(out)  # first: reading all files may take an hour
    with claimed(out):
        return _write_index(source, out, _find_before(out), dataset, class_set, compare_files, overwrite, progress)


def make_index(source: Path, out: Path, **settings: Any) -> tuple[Index, bool]:
    """The old name of `index_images`, with its old result: (index, was `out` there already, equal in every cell?)."""
    index = index_images(source, out, **settings)
    return index, index.was_complete


def _write_index(
    source: Path,
    out: Path,
    before: pa.Table | None,
    dataset: str,
    class_set: str | None,
    compare_files: bool,
    overwrite: bool,
    progress: Progress,
) -> Index:
    index = replace(index_dataset(source, dataset, class_set), out=out)
    if compare_files:
        index = mark_duplicates(index, progress=progress)
    table = index.images.table
    mark = {"made_by": _MADE_BY, "dataset": index.dataset, "class_set": index.class_set}
    if before is not None:
        difference = _difference(before, table)
        if not difference:
            return replace(index, was_complete=True)
        if not overwrite:
            raise SpecMismatch(
                f"{out} holds another index: {difference}; choose another output, or add --overwrite to replace it"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image_table(table.replace_schema_metadata({_MARK: json.dumps(mark)}), out)
    return index


def index_dataset(source: Path, dataset: str = "folder", class_set: str | None = None) -> Index:
    """The image table of a published dataset (`INDEXERS`), or of any folder with one sub-folder per class.

    Paths are relative to the folder that holds the class folders, which lies at or below `source`. Only names are read.

    Raises
    ------
    BadInput
        If there is no such folder, dataset or class set, or no image in it.
    """
    if dataset in INDEXERS:
        return replace(INDEXERS[dataset](source, class_set), source=source)
    if dataset != "folder":
        raise BadInput(f"unknown dataset {dataset!r}; known: {', '.join(INDEXERS)}, folder")
    if class_set is not None:
        raise BadInput(f"a class set belongs to a published dataset ({', '.join(INDEXERS)}); found {class_set!r}")
    if not source.is_dir():
        raise BadInput(f"no folder at {source}: expected one sub-folder per class (a manifest needs no index)")
    images = open_images(source)
    found = Counter(column(images.table, "label"))
    counts = [
        Count(label or "(no sub-folder)", n) for label, n in sorted(found.items(), key=lambda item: item[0] or "")
    ]
    others = tuple(list_files(images.root)[1]) if images.n_skipped else ()
    findings: tuple[Finding, ...] = (Finding(NOT_AN_IMAGE, others),) if others else ()
    findings += (Finding(NO_CELLS, images.passed_over),) if images.passed_over else ()
    return Index("folder", None, images, "images", tuple(counts), findings=findings, source=source)


def mark_duplicates(index: Index, *, progress: Progress = lambda done, total, state: None) -> Index:
    """Read the files, add the column `duplicate_of`, and report the duplicates. Every image stays in the table."""
    table = index.images.table
    ids, paths = ([str(value) for value in column(table, name)] for name in ("image_id", "path"))
    compared = find_duplicates(index.images.root, paths, progress=progress)
    pairs = [(i, first) for i, first in enumerate(compared.first) if first is not None]
    findings = list(index.findings)
    if pairs or index.known_duplicates is not None:
        n_groups, known = len({first for _, first in pairs}), index.known_duplicates
        reported = f"; others report {known}" if known is not None else ""
        what = f"byte-identical to an earlier image ({n_groups:,} groups{reported}); kept, see column {DUPLICATE_OF}"
        findings.append(Finding(what, tuple(f"{paths[i]} = {paths[first]}" for i, first in pairs)))
    for name in ("label", "patient", "disease"):
        values = column(table, name)
        torn = tuple(
            f"{paths[i]} {values[i]} = {paths[first]} {values[first]}"
            for i, first in pairs
            if values[i] != values[first]
        )
        findings += [Finding(f"of these, under two {name}s", torn)] if torn else []
    if compared.not_compared:
        names = tuple(f"{paths[i]}: {why}" for i, why in compared.not_compared.items())
        findings.append(Finding("files that could not be compared with the others", names))
    marks = [None if first is None else ids[first] for first in compared.first]
    table = table.append_column(DUPLICATE_OF, pa.array(marks, pa.string()))
    return replace(index, images=replace(index.images, table=table), findings=tuple(findings))


def _find_before(out: Path) -> pa.Table | None:
    """The index at `out`, or None if nothing is there; refuses a file that is not an index made by Cyto."""
    if out.suffix.lower() != ".parquet":
        raise BadInput(f"an image table is a .parquet file; found {out}")
    for folder in out.absolute().parents:
        header = find_header(folder)
        if header is not None:
            raise SpecMismatch(f"{out} lies inside {FORMATS[header.kind].a_kind} ({folder}); choose another output")
    if out.is_symlink():
        raise SpecMismatch(f"{out} is a link; give the path that it points to")
    if not out.exists():
        return None
    if not _is_ours(out):
        raise SpecMismatch(f"{out} was not made by {_MADE_BY}; it is left alone. Choose another output")
    return read_image_table(out)


def _is_ours(path: Path) -> bool:
    try:
        metadata = pq.read_schema(path).metadata if path.is_file() else None
        mark = json.loads((metadata or {}).get(_MARK, b"null"))
    except (pa.ArrowException, OSError, ValueError):
        return False
    return isinstance(mark, dict) and mark.get("made_by") == _MADE_BY


def _difference(before: pa.Table, table: pa.Table) -> str:
    """How two image tables differ, in a few words; empty if they are equal."""
    if before.num_rows != table.num_rows:
        return f"{before.num_rows:,} images against {table.num_rows:,}"
    names = [name for name in dict.fromkeys([*before.column_names, *table.column_names])]
    changed = [name for name in names if not _equal(before, table, name)]
    return f"other values in {listed(changed)}" if changed else ""


def _equal(before: pa.Table, table: pa.Table, name: str) -> bool:
    both = name in before.column_names and name in table.column_names
    return both and column(before, name) == column(table, name)
