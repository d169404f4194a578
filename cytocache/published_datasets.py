"""Makes an image table from the folder of a published dataset: one function per dataset, which knows its layout.

Only file names are read, and AML Hehr's metadata file; nothing is moved or deleted. What is left out, or differs from
the publication (published_classes.py), is reported as a `Count` or a `Finding` with names.
"""

import csv
import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from stores.errors import BadInput
from stores.tables import column, image_table, listed
from stores.wording import Report, more_or_fewer, printable

from .archived_images import Archived, images_of_archive, images_of_archives
from .archives import as_unpacked, is_archive_name, split_path, without_suffix
from .datasets import Images, is_hidden_or_system, list_files, refuse_loop, refuse_unlistable
from .published_classes import (
    ACEVEDO,
    ACEVEDO_FOLDERS,
    AML_HEHR,
    BMC,
    BMC_BROKEN,
    CLASS_SETS,
    MATEK19,
    MLL23,
    CellClass,
)

NOT_AN_IMAGE = "files that are no images by their name, left out"
NO_CELLS = "folders that are hidden, of a network disk or system, or results of Cyto, passed over"
MAX_LEVELS = 4  # searched below the given folder: Matek19 from Kaggle nests data/data
MAX_FOLDERS = 10_000  # searched for the class folders; with more, the given folder is no dataset
ROWS_SHOWN = 5  # of a table that was made from names
MAX_SHOWN = 48  # characters of a cell of these
_NOT_SHOWN = ("image_id", "dataset", "duplicate_of")
MAX_METADATA_BYTES = 16 << 20  # AML Hehr's own has 189 lines
MAX_METADATA_COLUMNS = 64  # each becomes a string per image


@dataclass(frozen=True)
class Count:
    """How many images or patients of one class were found, and how many were published (None: not stated)."""

    name: str
    found: int
    published: int | None = None


@dataclass(frozen=True)
class Stated:
    """A total that a source states. It is printed for comparison and not checked, since the sources contradict."""

    n: int
    source: str


@dataclass(frozen=True)
class Finding:
    """Something unexpected, and the names of the files, patients or classes concerned."""

    what: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Index(Report):
    """An image table made from a folder, its counts compared with the published ones, and what is unexpected."""

    dataset: str
    class_set: str | None
    images: Images
    unit: str  # what `counts` counts: images or patients
    counts: tuple[Count, ...]
    stated: tuple[Stated, ...] = ()
    findings: tuple[Finding, ...] = ()
    known_duplicates: int | None = None  # groups of byte-identical files that others have reported
    source: Path | None = None  # the folder that was given
    out: Path | None = None  # the table's file; None: not written
    was_complete: bool = False  # it was there already, equal in every cell
    shows_rows: bool = False  # `lines` has the first rows: what was read from names is to be looked at

    @property
    def root(self) -> Path:
        """The folder that paths are relative to, written as a path from `source`."""
        return self.source / self.images.root.relative_to(self.source.absolute()) if self.source else self.images.root

    @property
    def next_command(self) -> str:
        """The command that makes a cache of the images; empty without `out`."""
        if self.out is None:
            return ""
        command = ["cyto", "cache", "extract", self.out, self.out.with_suffix(".acts.zarr")]
        command += [] if self.images.root == self.out.absolute().parent else ["--root", self.root]
        return shlex.join(str(word) for word in command)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values, but for the table itself."""
        return {
            "dataset": self.dataset,
            "class_set": self.class_set,
            "n_images": self.images.table.num_rows,
            "unit": self.unit,
            "counts": [vars(count) for count in self.counts],
            "stated": [vars(stated) for stated in self.stated],
            "findings": [
                {"what": finding.what, "n": len(finding.names), "names": finding.names} for finding in self.findings
            ],
            "root": str(self.root),
            "table": None if self.out is None else str(self.out),
            "next": self.next_command,
        }

    def lines(self) -> Iterator[str]:
        """Found and published counts side by side, each difference in words; then what is odd."""
        class_set = f", class set {self.class_set}" if self.class_set else ""
        n_images = self.images.table.num_rows
        yield f"{self.dataset}{class_set}: {n_images:,} images in {printable(str(self.root))}"
        rows = [(printable(count.name), count.found, count.published) for count in self.counts]
        published = [number for _, _, number in rows if number is not None]
        rows.append(("total", sum(found for _, found, _ in rows), sum(published) if published else None))
        width = max(len(name) for name, _, _ in rows)
        yield f"  {'':<{width}}  {self.unit:>9}{'  published' if published else ''}"
        for name, found, number in rows:
            beside = "" if number is None else f"  {number:>9,}  {more_or_fewer(found, number)}"
            yield f"  {name:<{width}}  {found:>9,}{beside}".rstrip()
        if self.shows_rows:
            yield from _first_rows(self.images.table)
        for remark in self.images.remarks if self.shows_rows else ():
            yield f"  {printable(remark)}"
        for stated in self.stated:
            yield f"  stated elsewhere: {stated.n:,} ({stated.source})"
        for finding in self.findings:
            yield f"  {finding.what}: {len(finding.names):,} ({listed([printable(name) for name in finding.names])})"
        if any(len(finding.names) > 3 for finding in self.findings):
            yield "  (--json names all of them)"
        groups = {
            kind: len({value for value in column(self.images.table, name) if value is not None})
            for name, kind in (("label", "classes"), ("patient", "patients"), ("disease", "diseases"))
        }
        words = ", ".join([f"{n_images:,} images", *(f"{n:,} {kind}" for kind, n in groups.items() if n)])
        yield f"{self.out}: {words}" if self.out else words
        if self.next_command:
            yield f"next: {printable(self.next_command)}"


def _first_rows(table: pa.Table) -> Iterator[str]:
    """The first rows, with the columns that have values, aligned."""
    names = [name for name in table.column_names if name not in _NOT_SHOWN and any(column(table, name))]
    cells = [names, *(["-" if cell is None else cell for cell in row] for row in _rows(table, names))]
    shown = [[_shortened(printable(cell)) for cell in row] for row in cells]
    widths = [max(map(len, each)) for each in zip(*shown, strict=True)]
    yield "  first rows:"
    for row in shown:
        yield "    " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _rows(table: pa.Table, names: list[str]) -> Iterator[tuple[str | None, ...]]:
    yield from zip(*(column(table.slice(0, ROWS_SHOWN), name) for name in names), strict=True)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"…{text[1 - MAX_SHOWN :]}"


_ClassOf = Callable[[PurePosixPath], CellClass | None]


def index_mll23(source: Path, class_set: str | None = None) -> Index:
    """MLL23, Zenodo record 14277609: `<class>/<class>_<nnnn>.TIF`, one archive per class."""
    stated = (
        Stated(41_621, "the classes of the MLL23 article"),
        Stated(41_906, "the CytoSAE paper; MLL23's README"),
    )
    return _index_cells("mll23", source, MLL23, class_set, _by_folder(MLL23), stated)


def index_acevedo(source: Path, class_set: str | None = None) -> Index:
    """Acevedo, Mendeley snkd93bnjr: `<folder>/<PREFIX>_<number>.jpg`; two folders hold several classes."""
    stated = (
        Stated(17_092, "all 13 classes; the CytoSAE paper"),
        Stated(16_891, "the 11 classes that the CytoSAE paper names: no immature_granulocyte, no neutrophil"),
        Stated(14_543, "the 10 classes of DinoBloom: also no platelet"),
    )
    folders = {_key(name): codes for name, codes in ACEVEDO_FOLDERS.items()}
    by_code = {cell.code: cell for cell in ACEVEDO}

    def class_of(path: PurePosixPath) -> CellClass | None:
        codes = folders.get(_key(path.parts[0]), ())
        if len(codes) == 1:  # the folder decides; not every copy has known prefixes
            return by_code[codes[0]]
        prefix = path.name.split("_")[0].upper()  # the whole prefix: MY is part of MMY and PMY
        return by_code[prefix] if prefix in codes else None

    return _index_cells(
        "acevedo", source, ACEVEDO, class_set, class_of, stated, folders=tuple(ACEVEDO_FOLDERS), known_duplicates=17
    )


def index_matek19(source: Path, class_set: str | None = None) -> Index:
    """Matek19, TCIA 2019.36f5o9ld: `<CLASS>/<CLASS>_<nnnn>.tiff`; Kaggle's copy adds a folder `augmented`."""
    stated = (Stated(18_365, "the classes; the CytoSAE paper"),)
    return _index_cells("matek19", source, MATEK19, class_set, _by_folder(MATEK19), stated)


def index_bmc(source: Path, class_set: str | None = None) -> Index:
    """BMC, TCIA AXH3-T579: `<CLASS>/<0001-1000>/<CLASS>_<nnnnn>.jpg`.

    Images reported as broken stay in the table: `cyto cache extract` tells whether each can be read.
    """
    stated = (
        Stated(171_374, "the classes"),
        Stated(171_373, "the CytoSAE paper; its code deletes MYB_05527"),
        Stated(171_375, "TCIA's page"),
    )
    index = _index_cells("bmc", source, BMC, class_set, _by_folder(BMC), stated)
    here = {PurePosixPath(str(path)).stem: str(path) for path in column(index.images.table, "path")}
    broken = [here[stem] for stem in BMC_BROKEN if stem in here]
    absent = [stem for stem in BMC_BROKEN if stem not in here]
    return _found(
        index,
        ("reported as broken by others; kept as rows, cyto cache extract finds out", broken),
        ("reported as broken by others, and not here", absent),
    )


def index_aml_hehr(source: Path, class_set: str | None = None) -> Index:
    """AML Hehr, TCIA 6ppe-4020: `data/<disease>/<patient>/*.tif`, and `metadata.csv` beside `data`.

    Cells have no class, so `label` is null. What metadata.csv says of a patient is kept in the columns
    `patient_sex`, `patient_age`, `patient_leucocytes_per_ul` and `patient_pb_*` (differential count, percent).

    Raises
    ------
    BadInput
        Also if metadata.csv is not what was published.
    """
    class_set, _ = _class_set("aml-hehr", class_set)
    diseases = {_key(disease.code): disease.name for disease in AML_HEHR}
    root, passed_over = _find_root(source, "aml-hehr", tuple(disease.code for disease in AML_HEHR))
    files, others, leavings = list_files(root)
    rows, outside = [], []
    for path in files:
        parts = path.split("/")
        disease = diseases.get(_key(parts[0])) if len(parts) > 1 else None
        if disease is None:
            outside.append(path)
        else:
            rows.append((path, parts[1] if len(parts) > 2 else None, disease))
    _refuse_nothing(rows, root, len(outside))
    metadata_file = next((place for place in (root.parent, root) if (place / "metadata.csv").is_file()), None)
    metadata = _read_hehr_metadata(metadata_file / "metadata.csv") if metadata_file else {}
    columns: dict[str, list[str | None]] = {
        "path": [path for path, _, _ in rows],
        "patient": [patient for _, patient, _ in rows],
        "disease": [disease for _, _, disease in rows],
    }
    for name in {name: None for patient in metadata.values() for name in patient if name.startswith("patient_")}:
        columns[name] = [metadata.get(patient or "", {}).get(name) for _, patient, _ in rows]
    groups = {(patient, disease) for _, patient, disease in rows if patient is not None}
    index = Index(
        "aml-hehr",
        class_set,
        Images(image_table(columns, source=str(root), dataset="aml-hehr"), root, len(others)),
        "patients",
        tuple(Count(d.name, sum(name == d.name for _, name in groups), d.published) for d in AML_HEHR),
        (Stated(81_214, "images: third parties, unverified"), Stated(101_949, "images: DinoBloom's README")),
    )
    index = _found(
        index, *_left_out([name for name in others if name != "metadata.csv"], outside, passed_over, leavings)
    )
    loose = [path for path, patient, _ in rows if patient is None]
    torn = sorted(name for name, n in Counter(name for name, _ in groups).items() if n > 1)
    index = _found(
        index,
        ("images in a disease's folder but in no patient's; kept, without a patient", loose),
        ("patients with folders under two diseases, which cyto barcode will refuse", torn),
    )
    if metadata_file is None:
        return _found(index, ("expected beside the folder of the diseases, and not there", ["metadata.csv"]))
    return _found(index, *_hehr_differences(rows, metadata, diseases))


INDEXERS: dict[str, Callable[[Path, str | None], Index]] = {
    "mll23": index_mll23,
    "acevedo": index_acevedo,
    "matek19": index_matek19,
    "bmc": index_bmc,
    "aml-hehr": index_aml_hehr,
}


def _index_cells(
    dataset: str,
    source: Path,
    classes: tuple[CellClass, ...],
    class_set: str | None,
    class_of: _ClassOf,
    stated: tuple[Stated, ...],
    *,
    folders: tuple[str, ...] = (),
    known_duplicates: int | None = None,
) -> Index:
    """A dataset of labelled cells: a row for every image file to which `class_of` gives a class of the class set."""
    class_set, excluded = _class_set(dataset, class_set)
    files_of = _files_of(source, dataset, folders or tuple(cell.code for cell in classes))
    root, passed_over, files, others, leavings, refused = files_of
    rows: list[tuple[str, CellClass]] = []
    outside: list[str] = []
    unwanted: dict[str, list[str]] = {}
    for path in files:
        unpacked = as_unpacked(path)
        cell = class_of(PurePosixPath(unpacked)) if "/" in unpacked else None
        if cell is None:
            outside.append(path)
        elif cell.code in excluded:
            unwanted.setdefault(cell.label, []).append(path)
        else:
            rows.append((path, cell))
    _refuse_nothing(rows, root, len(files))
    columns: dict[str, list[str | None]] = {
        "path": [path for path, _ in rows],
        "label": [cell.label for _, cell in rows],
        "label_common": [cell.common for _, cell in rows],
    }
    found = Counter(cell.code for _, cell in rows)
    index = Index(
        dataset,
        class_set,
        Images(image_table(columns, source=str(root), dataset=dataset), root, len(others)),
        "images",
        tuple(Count(cell.label, found[cell.code], cell.published) for cell in classes if cell.code not in excluded),
        stated,
        known_duplicates=None if excluded else known_duplicates,
    )
    named = _class_named(classes)
    misplaced = [path for path, cell in rows if (named(as_unpacked(path)) or cell.code) != cell.code]
    outside_set = [(f"{label}: not in class set {class_set}, left out", paths) for label, paths in unwanted.items()]
    return _found(
        index,
        *outside_set,
        *_left_out(others, outside, passed_over, leavings),
        ("files of archives that are not read", refused),
        ("images whose file name begins with another class than their folder's, which is taken", misplaced),
    )


def _by_folder(classes: tuple[CellClass, ...]) -> _ClassOf:
    by_key = {_key(cell.code): cell for cell in classes}
    return lambda path: by_key.get(_key(path.parts[0]))


def _class_named(classes: tuple[CellClass, ...]) -> Callable[[str], str | None]:
    """path -> the longest class code that the file name begins with (some codes of MLL23 are prefixes of others)."""
    prefixes = sorted(((_key(cell.code) + "_", cell.code) for cell in classes), key=lambda item: -len(item[0]))

    def named(path: str) -> str | None:
        name = _key(path.rsplit("/", 1)[-1])
        return next((code for prefix, code in prefixes if name.startswith(prefix)), None)

    return named


def _key(name: str) -> str:
    """Folder names in the form in which they are compared: without case and separators, which differ between copies."""
    return re.sub(r"[\W_]+", "_", name.casefold())


def _class_set(dataset: str, name: str | None) -> tuple[str, tuple[str, ...]]:
    sets = CLASS_SETS[dataset]
    name = name or next(iter(sets))
    if name not in sets:
        raise BadInput(f"{dataset} has no class set {name!r}; known: {', '.join(sets)}")
    return name, sets[name]


def _files_of(
    source: Path, dataset: str, class_folders: tuple[str, ...]
) -> tuple[Path, list[str], list[str], list[str], list[str], list[str]]:
    """Where the class folders are, and the files in them, also in archives: one for all classes, or one for each.

    Returns
    -------
    Root, `augmented` folders, images, other files, folders passed over, and members of archives that are refused.
    """
    wanted = {_key(name) for name in class_folders}
    packed = split_path(source.absolute())
    if packed is not None:
        return _files_of_archive(images_of_archive(*packed), source, dataset, class_folders)
    try:
        root, augmented = _find_root(source, dataset, class_folders)
    except NoClassFolders:
        archives: dict[Path, list[str]] = {}
        for place, folders, names in os.walk(source.absolute()):
            folders[:] = [name for name in folders if not is_hidden_or_system(name)]
            of_classes = [each for each in names if is_archive_name(each) and _key(without_suffix(each)) in wanted]
            if of_classes:
                archives[Path(place)] = of_classes
            if len(Path(place).relative_to(source.absolute()).parts) >= MAX_LEVELS:
                folders.clear()
        if len(archives) != 1:
            raise
        ((root, names),) = archives.items()
        found = images_of_archives(root, names)
        others = [name for name in list_files(root)[1] if name not in {*names}]
        return root, [], found.paths, others + found.others, found.passed_over, found.refused
    return root, augmented, *list_files(root), []


def _files_of_archive(
    found: Archived, source: Path, dataset: str, class_folders: tuple[str, ...]
) -> tuple[Path, list[str], list[str], list[str], list[str], list[str]]:
    """The same for one archive, inside which the class folders may lie at any depth."""
    wanted = {_key(name) for name in class_folders}
    before: set[str] = set()
    for path in found.paths:
        folders = path.split("/")[:-1]
        at = next((n for n, folder in enumerate(folders) if _key(folder) in wanted), None)
        if at is not None:
            before.add("".join(f"{folder}/" for folder in folders[:at]))
    if not before:
        raise NoClassFolders(f"no class folders of {dataset} in {source}: expected {listed(list(class_folders))}")
    if len(before) > 1:
        places = listed([str(found.root / each) for each in sorted(before)])
        raise BadInput(f"{source} holds class folders of {dataset} in {len(before)} places ({places}); unpack it")
    (start,) = before
    inside = [path[len(start) :] for path in found.paths if path.startswith(start)]
    outside = [f"{path} (outside {start})" for path in found.paths if not path.startswith(start)]
    root = Path(found.root, *start.split("/"))
    return root, [], inside, found.others + outside, found.passed_over, found.refused


class NoClassFolders(BadInput):
    """A dataset's class folders are not there, as far as was searched."""


def _find_root(source: Path, dataset: str, class_folders: tuple[str, ...]) -> tuple[Path, list[str]]:
    """(the one folder at or below `source` that holds the class folders, the `augmented` folders that were found)."""
    if not source.is_dir():
        raise BadInput(f"no folder at {source}: expected {dataset}, unpacked")
    source = source.absolute()
    wanted = {_key(name) for name in class_folders}
    roots: list[Path] = []
    augmented: list[str] = []
    seen: list[str] = []
    level, n_folders = [source], 0
    for depth in range(MAX_LEVELS + 1):
        below: list[Path] = []
        for place in level:
            refuse_loop(place, source)
            names = _folders_in(place)
            n_folders += len(names)
            if n_folders > MAX_FOLDERS:
                raise BadInput(f"{source} has more than {MAX_FOLDERS:,} folders; give the folder of {dataset} itself")
            is_root = any(_key(name) in wanted for name in names)
            if is_root:
                roots.append(place)
            for name in names:
                if name.casefold() == "augmented":
                    augmented += [] if is_root else [str((place / name).relative_to(source))]  # in a root it is listed
                elif _key(name) not in wanted:
                    below.append(place / name)
        seen += [place.name for place in below] if depth == 0 else []
        level = below
    if len(roots) > 1:
        places = listed([str(root) for root in roots])
        raise BadInput(f"{source} holds class folders of {dataset} in {len(roots)} places ({places}); give one of them")
    if not roots:
        hint = "; this looks like one class: give the folder above" if _key(source.name) in wanted else ""
        met = listed([ascii(name) for name in seen]) or "no folders"
        raise NoClassFolders(
            f"no class folders of {dataset} in {source} or {MAX_LEVELS} levels below it: "
            f"expected {listed(list(class_folders))}; found {met}{hint}"
        )
    return roots[0], augmented


def _folders_in(place: Path) -> list[str]:
    try:
        with os.scandir(place) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden_or_system(entry.name))
    except OSError as error:
        refuse_unlistable(error)
        raise


def _refuse_nothing(rows: list, root: Path, n_others: int) -> None:
    if not rows:
        raise BadInput(f"no images in the class folders of {root}; found {n_others:,} images outside the classes")


def _left_out(
    others: list[str], outside: list[str], passed_over: list[str], leavings: list[str]
) -> list[tuple[str, list[str]]]:
    return [
        ("images of no class of this dataset by folder and name, left out", outside),
        ("folders of augmented copies, passed over", passed_over),
        (NOT_AN_IMAGE, others),
        (NO_CELLS, leavings),
    ]


def _found(index: Index, *findings: tuple[str, list[str]]) -> Index:
    more = tuple(Finding(what, tuple(names)) for what, names in findings if names)
    return replace(index, findings=index.findings + more)


def _read_hehr_metadata(path: Path) -> dict[str, dict[str, str | None]]:
    """Patient -> `bag_label`, `instance_count` and the columns `patient_*` of the image table."""
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise BadInput(f"{path} has more than {MAX_METADATA_BYTES:,} bytes; expected AML Hehr's, with 189 patients")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")  # cannot fail; at most the micro sign of one column name is wrong
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise BadInput(f"{path} cannot be read as CSV: {error}; get it again, or move it away") from None
    header = [name.strip().casefold() for name in lines[0]] if lines else []
    names = {position: _hehr_column(name) for position, name in enumerate(header)}
    known = [name for name in names.values() if name is not None]
    absent = {"patient_id", "bag_label", "instance_count"} - {*known}
    if absent or len(known) > len({*known}) or len(known) > MAX_METADATA_COLUMNS:
        what = f"without {', '.join(sorted(absent))}" if absent else "two of one name, or too many"
        found = listed([ascii(name) for name in header]) or "none"
        raise BadInput(f"{path} is not AML Hehr's by its columns ({found}): {what}; get it again, or move it away")
    patients: dict[str, dict[str, str | None]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not any(line):
            continue
        if len(line) != len(header):
            raise BadInput(f"row {number} of {path} has {len(line)} fields, the header has {len(header)}")
        row = {name: line[position].strip() or None for position, name in names.items() if name is not None}
        if "patient_sex" in row:
            row["patient_sex"] = {"1": "female", "2": "male"}.get(row["patient_sex"] or "", row["patient_sex"])
        patient = row.pop("patient_id")
        if patient is None or patient in patients:
            raise BadInput(f"row {number} of {path} has {'no patient_id' if patient is None else f'{patient} again'}")
        patients[patient] = row
    return patients


def _hehr_column(name: str) -> str | None:
    """What a column of metadata.csv is called in the image table; None for one that is not AML Hehr's."""
    if name.startswith("leucocytes_per_"):  # followed by a micro sign, in many encodings, some of them invalid
        return "patient_leucocytes_per_ul"
    if re.fullmatch(r"pb_[a-z0-9_]+", name):
        return f"patient_{name}"
    known = {"sex_1f_2m": "patient_sex", "age": "patient_age"}
    return known.get(name, name if name in ("patient_id", "bag_label", "instance_count") else None)


def _hehr_differences(
    rows: list[tuple[str, str | None, str]], metadata: dict[str, dict[str, str | None]], diseases: dict[str, str]
) -> list[tuple[str, list[str]]]:
    """Where folders and metadata.csv disagree."""
    n_images = Counter(patient for _, patient, _ in rows if patient is not None)
    disease_of = {patient: disease for _, patient, disease in rows if patient is not None}
    both = [patient for patient in sorted(n_images) if patient in metadata]
    stated = {patient: metadata[patient].get("instance_count") or "?" for patient in both}
    labels = {patient: metadata[patient].get("bag_label") or "?" for patient in both}
    counts = [f"{p}: {n_images[p]} here, {stated[p]} stated" for p in both if not _is_number(stated[p], n_images[p])]
    torn = [
        f"{p}: {disease_of[p]} by folder, {labels[p]} stated"
        for p in both
        if diseases.get(_key(labels[p])) != disease_of[p]
    ]
    return [
        ("patients in metadata.csv without an image here", sorted({*metadata} - {*n_images})),
        ("patients with images here who are not in metadata.csv", sorted({*n_images} - {*metadata})),
        ("patients whose images differ in number from instance_count in metadata.csv", counts),
        ("patients whose disease differs between folder and metadata.csv; the folder's is taken", torn),
    ]


def _is_number(text: str, number: int) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False
