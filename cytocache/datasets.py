"""Makes an image table from a folder, an archive, a CSV or a Parquet file: which images there are, in which order."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import pyarrow as pa

from stores.errors import BadInput, CytoError
from stores.spec import FORMATS, find_header, read_object
from stores.tables import column, image_table, listed, read_table_file, warn_of_names_alike
from stores.wording import counted, printable

from .archive_member import BadArchive
from .archived_images import Archived, images_of_archive, images_of_archives
from .archives import ARCHIVE_SUFFIXES, is_archive_name, locate, split_path, without_suffix
from .image_files import is_there
from .image_names import IMAGE_SUFFIXES, is_image_name
from .image_names import is_hidden_or_system as is_hidden_or_system
from .masks_beside import find_masks_beside


@dataclass(frozen=True)
class Images:
    """An image table and the folder that its paths are relative to."""

    table: pa.Table  # the manifest: stores/tables.py
    root: Path  # may be an archive, or a folder inside one
    n_skipped: int = 0  # files below a folder whose names are not those of images
    skipped: tuple[str, ...] = ()  # these
    passed_over: tuple[str, ...] = ()  # folders below it without cells: hidden, of a system, or results of Cyto
    refused: tuple[str, ...] = ()  # members of archives that are not read, each with the reason
    masks: tuple[str, ...] = ()  # images of the table that are masks of others by their names
    remarks: tuple[str, ...] = ()  # how the table was made, where that could be another way, in words
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
            which = f" ({listed([printable(each) for each in self.skipped])})" if self.skipped else ""
            found.append(f"{counted(self.n_skipped, 'file')} passed over in {place}{which}: not images by their name")
        tables = [printable(name) for name in self.skipped if name.casefold().endswith(_TABLES)]
        if tables:
            found.append(
                f"a folder gives labels only, by its sub-folders; if {' or '.join(tables[:3])} is a table of these "
                f"images, with patients or diseases, give that file instead"
            )
        if self.refused:
            said = listed([printable(each) for each in self.refused])
            found.append(f"{counted(len(self.refused), 'file')} of the archives not read: {said}")
        found += self.remarks
        if self.masks:
            found.append(
                f"{counted(len(self.masks), 'file')} may be masks of other images ({listed([*self.masks])}), and are "
                f"taken as images; cyto data index --masks makes a table without them"
            )
        return tuple(found)


_TABLES = (".csv", ".tsv", ".parquet")
_HEADER_FILES = {format.header_file for format in FORMATS.values()} | {"sweep.json"}


def open_images(source: Path | str, *, root: Path | str | None = None, suffixes: Sequence[str] = ()) -> Images:
    """The images that `source` names.

    Parameters
    ----------
    source : a folder (one sub-folder per class; the first folder below it is the label); a .zip or .tar(.gz) with the
        same inside; a folder of such archives (`images_of_archives`); or a .csv or .parquet table with a column
        `path`, whose paths may lead into archives (`class.zip::a/b.tif`)
    root : what paths in a table are relative to, a folder or an archive; default: the table's own folder
    suffixes : of a folder or archives only the files whose names end so; none: all names of images

    Raises
    ------
    BadInput
        If there is no such source, no image in it, a faulty table, or none of its files is there; if an archive
        cannot be read.
    """
    source = Path(source)
    packed = split_path(source.absolute())
    if source.is_dir() or packed is not None:
        if root is not None:
            what = "a folder" if packed is None else "an archive"
            raise BadInput(f"--root belongs to a table of images; {source} is {what}, and its own root")
        if packed is None:
            images = _list_folder(source, suffixes)
        else:
            images = _of_archives(images_of_archive(*packed, suffixes=suffixes), source)
        return replace(images, source=source)
    if not source.exists():
        raise BadInput(
            f"no images at {source}: expected a folder, or a .csv or .parquet table, or an archive "
            f"({', '.join(ARCHIVE_SUFFIXES)})"
        )
    root = Path(root or source.parent).absolute()
    raw = read_table_file(source)
    columns = {name: column(raw, name) for name in raw.column_names}
    if "path" in columns:
        columns["path"] = [_below(path, root) for path in columns["path"]]
    table = image_table(columns, source=str(source), dataset=source.stem)
    _check_some_exist(table, root, source)
    return Images(table, root, source=source)


def list_files(folder: Path, suffixes: Sequence[str] = ()) -> tuple[list[str], list[str], list[str]]:
    """(image files, other files, folders passed over) below an absolute `folder`: sorted relative paths.

    suffixes : see `is_image_name`
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
            (images if is_image_name(name, suffixes) else others).append(
                (Path(place) / name).relative_to(folder).as_posix()
            )
    images.sort()
    _refuse_undecodable(images, folder)
    return images, sorted(others), sorted(passed_over)


def _result_of_cyto(place: Path) -> str | None:
    """Which result of Cyto a folder holds, with its article ("an SAE"); None if there is none."""
    try:
        header = find_header(place)
    except CytoError:
        return "a damaged store of Cyto's"
    if header is not None:
        return FORMATS[header.kind].a_kind
    return "a sweep" if read_object(place / "sweep.json").get("format") == "sweep" else None


def _list_folder(folder: Path, suffixes: Sequence[str]) -> Images:
    folder = folder.absolute()
    found, others, passed_over = list_files(folder, suffixes)
    archives = [path for path in others if is_archive_name(path) and not path.rsplit("/", 1)[-1].startswith(".")]
    if not found:
        if archives:
            archived = images_of_archives(folder, archives, suffixes=suffixes)
            if archived.paths:
                others = [path for path in others if path not in {*archives}] + archived.others
                archived = replace(archived, others=others, passed_over=passed_over + archived.passed_over)
                return _of_archives(archived, folder)
        raise BadInput(
            f"no images in {folder}: expected files ending in {', '.join(suffixes or IMAGE_SUFFIXES)}; "
            f"found {len(others):,} other files"
        )
    labels: list[str | None] = [path.split("/")[0] if "/" in path else None for path in found]
    paths: list[str | None] = [*found]
    warn_of_names_alike(labels, "folders", folder)
    name = os.fsencode(folder.resolve().name).decode(errors="replace")  # a table holds UTF-8 only
    table = image_table({"path": paths, "label": labels}, source=str(folder), dataset=name)
    remarks: tuple[str, ...] = ()
    if archives:
        named = f"{counted(len(archives), 'archive')} ({listed(archives)})"
        remarks = (f"among these files {named}: not looked into, since the folder has images itself",)
    return Images(
        table,
        folder,
        len(others),
        tuple(others),
        tuple(passed_over),
        masks=tuple(find_masks_beside(found)),
        remarks=remarks,
    )


def _of_archives(found: Archived, source: Path) -> Images:
    name = found.root.name if found.root.is_dir() else without_suffix(found.root.name)
    paths: list[str | None] = [*found.paths]
    warn_of_names_alike(found.labels, "classes", found.root)
    table = image_table({"path": paths, "label": found.labels}, source=str(source), dataset=name)
    return Images(
        table,
        found.root,
        len(found.others),
        tuple(found.others),
        tuple(found.passed_over),
        refused=tuple(found.refused),
        masks=tuple(find_masks_beside(found.paths)),
        remarks=(found.note,) if found.note else (),
    )


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
    if any(is_there(root / path) for path in paths):
        return
    turned = next((path for path in paths if "\\" in path and is_there(root / path.replace("\\", "/"))), None)
    if turned is not None:
        meant = turned.replace("\\", "/")
        raise BadInput(f"the paths in {source} have \\ between folders, as on Windows ({turned}); write / ({meant})")
    why = ""
    try:
        locate(root / paths[0])
    except BadArchive as error:
        why = f": {error}"
    raise BadInput(
        f"none of the {len(paths):,} files that {source} lists is below {root} ({listed(paths)}{why}); "
        f"say where they are with --root"
    )
