"""Makes an image table from a folder, a CSV or a Parquet file: which images there are, in which order."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import pyarrow as pa

from stores.errors import BadInput, CytoError
from stores.files import is_dropping
from stores.spec import FORMATS, find_header, read_object
from stores.tables import column, image_table, listed, read_table_file
from stores.wording import counted

from .images import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Images:
    """An image table and the folder that its paths are relative to."""

    table: pa.Table  # the manifest: stores/tables.py
    root: Path
    n_skipped: int = 0  # files below a folder whose names are not those of images
    passed_over: tuple[str, ...] = ()  # folders below it without cells: hidden, of a system, or results of Cyto
    source: Path | None = field(default=None, compare=False)  # the folder or file that they were opened from

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, in words."""
        found = []
        if self.passed_over:
            said = f"{counted(len(self.passed_over), 'folder')} passed over ({listed(list(self.passed_over))})"
            found.append(f"{said}: hidden, of a network disk or system, or results of Cyto: no cells")
        if self.n_skipped:
            place = self.source or self.root
            found.append(f"{counted(self.n_skipped, 'file')} passed over in {place}: not images by their name")
        return tuple(found)


_HEADER_FILES = {format.header_file for format in FORMATS.values()} | {"sweep.json"}


def open_images(source: Path | str, *, root: Path | None = None) -> Images:
    """The images that `source` names.

    Parameters
    ----------
    source : a folder (one sub-folder per class; the first folder below it is the label), or a .csv or .parquet
        manifest with a column `path`
    root : what paths in a manifest are relative to; default: the manifest's own folder

    Raises
    ------
    BadInput
        If there is no such source, no image in it, a faulty manifest, or none of its files is there.
    """
    source = Path(source)
    if source.is_dir():
        if root is not None:
            raise BadInput(f"--root belongs to a manifest; {source} is a folder, and its own root")
        return replace(_list_folder(source), source=source)
    if not source.exists():
        raise BadInput(f"no images at {source}: expected a folder, or a .csv or .parquet manifest")
    root = (root or source.parent).absolute()
    raw = read_table_file(source)
    columns = {name: column(raw, name) for name in raw.column_names}
    if "path" in columns:
        columns["path"] = [_below(path, root) for path in columns["path"]]
    table = image_table(columns, source=str(source), dataset=source.stem)
    _check_some_exist(table, root, source)
    return Images(table, root, source=source)


def list_files(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """(image files, other files, folders passed over) below an absolute `folder`: sorted relative paths.

    Passed over, with all their content: hidden folders, folders of a network disk or system, results of Cyto.

    Raises
    ------
    BadInput
        If a link leads to a folder above it, a folder cannot be listed, or an image's name is not UTF-8.
    """
    images: list[str] = []
    others: list[str] = []
    passed_over: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse_unlistable):
        refuse_loop(Path(place), folder)
        if _HEADER_FILES & {*names} and (what := _result_of_cyto(Path(place))):
            if Path(place) == folder:
                raise BadInput(f"{folder} holds {what}, and no images of cells; give the folder of the images")
            passed_over.append(Path(place).relative_to(folder).as_posix())
            folders.clear()
            continue
        ignored = [name for name in folders if is_hidden_or_system(name)]
        passed_over += [(Path(place) / name).relative_to(folder).as_posix() for name in ignored]
        folders[:] = sorted({*folders} - {*ignored})
        for name in names:
            is_image = name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
            (images if is_image else others).append((Path(place) / name).relative_to(folder).as_posix())
    images.sort()
    _refuse_undecodable(images, folder)
    return images, sorted(others), sorted(passed_over)


def is_hidden_or_system(name: str) -> bool:
    """Is this a hidden folder, or one that a system, a network disk or another program has made?"""
    return name.startswith(".") or is_dropping(name)


def _result_of_cyto(place: Path) -> str | None:
    """Which result of Cyto a folder holds, with its article ("an SAE"); None if there is none."""
    try:
        header = find_header(place)
    except CytoError:
        return "a damaged store of Cyto's"
    if header is not None:
        return FORMATS[header.kind].a_kind
    return "a sweep" if read_object(place / "sweep.json").get("format") == "sweep" else None


def _list_folder(folder: Path) -> Images:
    folder = folder.absolute()
    found, others, passed_over = list_files(folder)
    if not found:
        raise BadInput(
            f"no images in {folder}: expected files ending in {', '.join(IMAGE_SUFFIXES)}; "
            f"found {len(others):,} other files"
        )
    labels: list[str | None] = [path.split("/")[0] if "/" in path else None for path in found]
    paths: list[str | None] = [*found]
    table = image_table({"path": paths, "label": labels}, source=str(folder), dataset=folder.resolve().name)
    return Images(table, folder, len(others), tuple(passed_over))


def refuse_loop(place: Path, folder: Path) -> None:
    """Links to image folders are followed; a link to a folder above itself would be listed without end."""
    if place != folder and place.is_symlink() and place.resolve() in (parent.resolve() for parent in place.parents):
        raise BadInput(f"{place} links back to a folder that contains it; remove the link")


def refuse_unlistable(error: OSError) -> None:
    """Raise an error for a folder that cannot be read, which `os.walk` would leave out silently."""
    raise BadInput(f"the folder {error.filename} cannot be listed: {error.strerror}; make it readable, or move it")


def _refuse_undecodable(paths: list[str], folder: Path) -> None:
    """A name that is not UTF-8 (from an old archive) cannot be written into a table."""
    bad = [path for path in paths if path.encode(errors="ignore").decode() != path]
    if bad:
        raise BadInput(
            f"{len(bad):,} file names in {folder} are not UTF-8 ({listed([ascii(path) for path in bad])}); rename them"
        )


def _below(path: str | None, root: Path) -> str | None:
    """An absolute path inside `root` becomes relative; others stay as they are and are checked later."""
    for base in (root, root.resolve()):  # the root may have been given through a link or with `..`
        if path and PurePath(path).is_absolute() and PurePath(path).is_relative_to(base):
            return PurePath(path).relative_to(base).as_posix()
    return path


def _check_some_exist(table: pa.Table, root: Path, source: Path) -> None:
    paths = [str(path) for path in column(table, "path")]
    if not any((root / path).is_file() for path in paths):
        raise BadInput(
            f"none of the {len(paths):,} files that {source} lists is below {root} ({listed(paths)}); "
            f"say where they are with --root"
        )
