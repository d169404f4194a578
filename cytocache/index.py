"""`cyto data index`: makes an image table from a folder or archives, and writes it atomically.

Columns may come from folder and file names (`name_patterns`); masks beside the images are named, and byte-identical
files marked.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stores.destination import claimed
from stores.errors import BadInput, SpecMismatch
from stores.progress import Progress
from stores.spec import FORMATS, find_header
from stores.tables import column, listed, read_image_table, write_image_table

from .archives import SEPARATOR, split_path
from .datasets import Images, open_images
from .duplicates import find_duplicates
from .image_names import is_image_name
from .masks_beside import find_masks_beside
from .name_patterns import NamePattern, columns_from_names, parse_pattern
from .published_datasets import INDEXERS, NO_CELLS, NOT_AN_IMAGE, Count, Finding, Index

DUPLICATE_OF = "duplicate_of"  # the column: image_id of the first image with the same bytes, else null
_MARK, _MADE_BY = b"cyto", "cyto data index"  # in the Parquet metadata: the program that wrote the file


def index_images(
    source: Path | str,
    out: Path | str | None = None,
    *,
    dataset: str = "folder",
    class_set: str | None = None,
    patient_from: str | None = None,
    label_from: str | None = None,
    suffixes: Sequence[str] = (),
    masks: bool = False,
    compare_files: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Index:
    """The image table of `source`, one row per image, and how it compares with the published dataset.

    Nothing but `out` is written, atomically; without it, nothing at all.

    Parameters
    ----------
    source : the dataset, unpacked or in archives, or a folder above it
    out : the Parquet file to write
    dataset : a published dataset (`INDEXERS`), or "folder": one sub-folder per class
    class_set : of acevedo: "13" (default), "11" (the paper's) or "10" (DinoBloom's)
    patient_from, label_from : patterns that say where in a path patient and label are, such as `{patient}/*`; they may
        name further columns (`name_patterns`). Without, the first folder is the label, unless a pattern takes it
    suffixes : only files whose names end so, such as `.tif` or `_rgb.png`; none: all names of images
    masks : leave out files that are masks of others by their names, and write them in the column `mask`
    compare_files : read the files, and mark those that are byte-identical to an earlier one
    progress : files compared, files in all

    Raises
    ------
    BadInput
        If there is nothing to index, a pattern fits no path, or the name of `out` does not end in .parquet.
    SpecMismatch
        If `out` is something else, or another index and `overwrite` is not set.
    """
    source, names = Path(source), _Names(patient_from, label_from, tuple(suffixes), masks)

    def make() -> Index:
        index = index_dataset(source, dataset, class_set, names)
        return mark_duplicates(index, progress=progress) if compare_files else index

    if out is None:
        return make()
    out = Path(out)
    _find_before(out)  # first: reading all files may take an hour
    with claimed(out):
        return _write_index(make, out, _find_before(out), overwrite)


@dataclass(frozen=True)
class _Names:
    """What names of folders and files say: the options of the same name of `index_images`."""

    patient_from: str | None = None
    label_from: str | None = None
    suffixes: tuple[str, ...] = ()
    masks: bool = False

    def patterns(self) -> list[NamePattern]:
        given = (("--patient-from", "patient", self.patient_from), ("--label-from", "label", self.label_from))
        return [parse_pattern(text, option, column) for option, column, text in given if text is not None]


def make_index(source: Path, out: Path, **settings: Any) -> tuple[Index, bool]:
    """The old name of `index_images`, with its old result: (index, was `out` there already, equal in every cell?)."""
    index = index_images(source, out, **settings)
    return index, index.was_complete


def _write_index(make: Callable[[], Index], out: Path, before: pa.Table | None, overwrite: bool) -> Index:
    index = replace(make(), out=out)
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


def index_dataset(
    source: Path, dataset: str = "folder", class_set: str | None = None, names: _Names | None = None
) -> Index:
    """The image table of a published dataset (`INDEXERS`), or of any folder or archive with one sub-folder per class.

    Paths are relative to the folder that holds the class folders, which lies at or below `source`. Only names are read.

    Raises
    ------
    BadInput
        If there is no such folder, dataset or class set, or no image in it.
    """
    names = names or _Names()
    if dataset in INDEXERS:
        if names != _Names():
            raise BadInput(
                f"{dataset} has a layout that is known; --patient-from, --label-from, --suffix and --masks belong to "
                f"--dataset folder"
            )
        return replace(INDEXERS[dataset](source, class_set), source=source)
    if dataset != "folder":
        raise BadInput(f"unknown dataset {dataset!r}; known: {', '.join(INDEXERS)}, folder")
    if class_set is not None:
        raise BadInput(f"a class set belongs to a published dataset ({', '.join(INDEXERS)}); found {class_set!r}")
    if not source.is_dir() and split_path(source.absolute()) is None:
        raise BadInput(
            f"no folder at {source}: expected one sub-folder per class, or a .zip or .tar with them (a table needs "
            f"no index)"
        )
    patterns = names.patterns()
    images = open_images(source, suffixes=names.suffixes)
    taken = {str(path): None for path in column(images.table, "path")}
    others = [path for path in images.skipped if is_image_name(path.rsplit("/", 1)[-1])]  # of another --suffix
    beside = {mask: image for mask, image in find_masks_beside([*taken, *others]).items() if image in taken}
    images, unfit = _with_columns(_with_masks(images, beside) if names.masks and beside else images, patterns)
    found = Counter(column(images.table, "label"))
    nothing = "(no label)" if patterns else "(no sub-folder)"
    counts = [Count(label or nothing, n) for label, n in sorted(found.items(), key=lambda item: item[0] or "")]
    findings = [
        Finding(f"paths that {pattern!r} does not fit; kept, without its columns", (*paths,))
        for pattern, paths in unfit.items()
    ]
    if beside:
        done = "not taken"
        if names.masks:
            done = "left out; the column mask names them"
        elif {*beside} & {*taken}:
            done = "taken as images; --masks leaves them out"
        named = tuple(f"{mask} of {image}" for mask, image in beside.items())
        findings.append(Finding(f"files that are masks of others by their names, {done}", named))
    if images.n_skipped:
        findings.append(Finding(NOT_AN_IMAGE, images.skipped))
    if images.passed_over:
        findings.append(Finding(NO_CELLS, images.passed_over))
    if images.refused:
        findings.append(Finding("files of archives that are not read", images.refused))
    return Index(
        "folder",
        None,
        images,
        "images",
        tuple(counts),
        findings=tuple(findings),
        source=source,
        shows_rows=names != _Names() or not source.is_dir() or any(SEPARATOR in path for path in taken),
    )


def _with_masks(images: Images, masks: dict[str, str]) -> Images:
    """Without the images that are masks of others, which are in the column `mask` of these."""
    of_image = {image: mask for mask, image in masks.items()}
    paths = [str(path) for path in column(images.table, "path")]
    table = images.table.filter(pa.array([path not in masks for path in paths]))
    kept = [of_image.get(path) for path in paths if path not in masks]
    return replace(images, table=table.append_column("mask", pa.array(kept, pa.string())), masks=())


def _with_columns(images: Images, patterns: list[NamePattern]) -> tuple[Images, dict[str, list[str]]]:
    """With the columns that patterns read from the paths; and by pattern the paths that it does not fit."""
    if not patterns:
        return images, {}
    table = images.table
    found = columns_from_names([str(path) for path in column(table, "path")], patterns)
    labels = [None if taken else label for taken, label in zip(found.takes_folder, column(table, "label"), strict=True)]
    for name, values in {"label": labels, **found.columns}.items():
        values_of = pa.array(values, pa.string())
        at = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, values_of) if at is None else table.set_column(at, name, values_of)
    return replace(images, table=table), found.unfit


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
