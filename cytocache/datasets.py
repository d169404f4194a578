"""From what the user has (a folder, a CSV, a Parquet table) to an image table: which images, in which order."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

import pyarrow as pa

from stores.errors import BadInput
from stores.tables import column, image_table, listed, read_table_file

from .images import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Images:
    """An image table and the folder that its paths are relative to."""

    table: pa.Table  # the manifest: stores/tables.py
    root: Path
    n_skipped: int = 0  # files below a folder that are no images by their name


def open_images(source: Path, *, root: Path | None = None) -> Images:
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
    if source.is_dir():
        if root is not None:
            raise BadInput(f"--root belongs to a manifest; {source} is a folder, and its own root")
        return _list_folder(source)
    if not source.exists():
        raise BadInput(f"no images at {source}: expected a folder, or a .csv or .parquet manifest")
    root = (root or source.parent).absolute()
    raw = read_table_file(source)
    columns = {name: column(raw, name) for name in raw.column_names}
    if "path" in columns:
        columns["path"] = [_below(path, root) for path in columns["path"]]
    table = image_table(columns, source=str(source), dataset=source.stem)
    _check_some_exist(table, root, source)
    return Images(table, root)


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """(image files, other files) below an absolute `folder`: sorted relative paths. Hidden folders are passed over.

    Raises
    ------
    BadInput
        If a link leads back up, a folder cannot be listed, or the name of an image is not UTF-8.
    """
    images: list[str] = []
    others: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse_unlistable):
        refuse_loop(Path(place), folder)
        folders[:] = sorted(name for name in folders if not is_leaving(name))
        for name in names:
            is_image = name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
            (images if is_image else others).append((Path(place) / name).relative_to(folder).as_posix())
    images.sort()
    _refuse_undecodable(images, folder)
    return images, sorted(others)


def is_leaving(name: str) -> bool:
    """A folder that a system or another program left: hidden, or of an archive made on a Mac."""
    return name.startswith(".") or name == "__MACOSX"


def _list_folder(folder: Path) -> Images:
    folder = folder.absolute()
    found, others = list_files(folder)
    if not found:
        raise BadInput(
            f"no images in {folder}: expected files ending in {', '.join(IMAGE_SUFFIXES)}; "
            f"found {len(others):,} other files"
        )
    labels: list[str | None] = [path.split("/")[0] if "/" in path else None for path in found]
    paths: list[str | None] = [*found]
    table = image_table({"path": paths, "label": labels}, source=str(folder), dataset=folder.resolve().name)
    return Images(table, folder, len(others))


def refuse_loop(place: Path, folder: Path) -> None:
    """Links to image folders are welcome; a link back to a folder above itself would list for ever."""
    if place != folder and place.is_symlink() and place.resolve() in (parent.resolve() for parent in place.parents):
        raise BadInput(f"{place} links back to a folder that contains it; remove the link")


def refuse_unlistable(error: OSError) -> None:
    """A folder that may not be read would otherwise be left out without a word."""
    raise BadInput(f"the folder {error.filename} cannot be listed: {error.strerror}; make it readable, or move it")


def _refuse_undecodable(paths: list[str], folder: Path) -> None:
    """A name that is not UTF-8 (an old archive, unpacked) cannot be written into a table."""
    bad = [path for path in paths if path.encode(errors="ignore").decode() != path]
    if bad:
        raise BadInput(
            f"{len(bad):,} file names in {folder} are not UTF-8 ({listed([ascii(path) for path in bad])}); rename them"
        )


def _below(path: str | None, root: Path) -> str | None:
    """An absolute path inside `root` becomes relative; others stay as they are, to be checked."""
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
