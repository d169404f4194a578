"""Which images lie in an archive, or in the archives of a folder, and which class each has by its place.

Paths inside one archive are written as in its unpacked folder, and the archive (or the one folder that holds all of its
content) is the root: the same images give the same table, packed or not. In a folder of archives, a path is
`class.zip::a/b.tif`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stores.errors import BadInput
from stores.tables import listed
from stores.wording import counted

from .archive_member import BadArchive
from .archives import SEPARATOR, list_archive, without_suffix
from .image_names import is_hidden_or_system, is_image_name


@dataclass(frozen=True)
class Archived:
    """The images of archives: where, which class each has by its place, and what was not taken."""

    root: Path  # the archive, a folder inside it, or the folder of the archives
    paths: list[str]  # relative to it, sorted
    labels: list[str | None]
    others: list[str]  # files that are no images by their name
    passed_over: list[str]  # folders that are hidden or of a system
    refused: list[str]  # members, each with the reason
    note: str  # how classes were taken, in words


def images_of_archive(archive: Path, inside: str = "", *, suffixes: Sequence[str] = ()) -> Archived:
    """The images of one archive, or of the folder `inside` it. The class is the first folder below the root.

    If one folder holds all images in folders of its own (`cells/NGS/1.tif`), it is the root.

    Raises
    ------
    BadInput
        If the archive cannot be read, or has no such folder, or no image in it.
    """
    found = _list(archive, inside, suffixes)
    if not found.paths:
        where = f"{archive}{SEPARATOR}{inside}" if inside else str(archive)
        refused = f"; refused: {listed(found.refused)}" if found.refused else ""
        raise BadInput(f"no images in {where}: found {len(found.others):,} other files{refused}")
    folder = _common_folder(found.paths)
    paths = [path[len(folder) :] for path in found.paths]
    root = Path(archive, *inside.split("/"), *folder.split("/"))
    note = ""
    if folder:
        note = f"all images of {archive.name} lie in {folder.rstrip('/')}: the folders below it are the classes"
    return Archived(root, paths, [_first(path) for path in paths], found.others, found.passed_over, found.refused, note)


def images_of_archives(folder: Path, archives: list[str], *, suffixes: Sequence[str] = ()) -> Archived:
    """The images of the archives `folder / name`, which together are one data set.

    An archive in a folder below `folder` is of the class of that folder. Else each archive is a class, called like it
    without suffix; but if archives hold folders of several classes, these are the classes.

    Raises
    ------
    BadInput
        If an archive cannot be read. (No image at all is no error here.)
    """
    found = {name: _list(folder / name, "", suffixes) for name in sorted(archives)}
    held = {name: each.paths for name, each in found.items() if each.paths}
    at_top = {name: paths for name, paths in held.items() if "/" not in name}
    common = {name: _common_folder(paths) for name, paths in at_top.items()}
    is_of_classes = _is_one_for_each_class(at_top, common)
    paths: list[str] = []
    labels: list[str | None] = []
    for name, inside in held.items():
        own = _first(name) or (without_suffix(name) if is_of_classes else None)
        paths += [f"{name}{SEPARATOR}{path}" for path in inside]
        labels += [own or _first(path[len(common.get(name, "")) :]) for path in inside]
    what = f"each of the {len(at_top):,} archives is a class"
    if not at_top:
        what = "the folders of the archives are the classes"
    elif not is_of_classes:
        what = "the folders inside the archives are the classes"
    holds = {name: each.paths or each.others or each.passed_over or each.refused for name, each in found.items()}
    if empty := [name for name in found if not holds[name]]:
        what += f"; {counted(len(empty), 'archive')} ({listed(empty)}) with nothing inside"
    return Archived(
        folder,
        paths,
        labels,
        [f"{name}{SEPARATOR}{path}" for name, each in found.items() for path in each.others],
        [f"{name}{SEPARATOR}{path}" for name, each in found.items() for path in each.passed_over],
        [f"{name}{SEPARATOR}{path}" for name, each in found.items() for path in each.refused],
        what if paths else "",
    )


def _is_one_for_each_class(held: dict[str, list[str]], common: dict[str, str]) -> bool:
    """Is there an archive for each class, or do archives hold several?"""
    if len(held) == 1 or any(len({_first(path) for path in paths} - {None}) > 1 for paths in held.values()):
        return False
    folders = {*common.values()}
    return not (len(folders) == 1 and folders != {""})  # not parts of one folder, packed separately


def _list(archive: Path, inside: str, suffixes: Sequence[str]) -> Archived:
    try:
        listing = list_archive(archive)
    except BadArchive as error:
        raise BadInput(f"{archive} cannot be read: {error}") from None
    start = f"{inside}/" if inside else ""
    paths, others, passed_over = list[str](), list[str](), set[str]()
    for name in listing.members:
        if not name.startswith(start):
            continue
        path = name[len(start) :]
        *folders, file = path.split("/")
        ignored = next((n for n, each in enumerate(folders, start=1) if is_hidden_or_system(each)), None)
        if ignored is not None:
            passed_over.add("/".join(folders[:ignored]))
        else:
            (paths if is_image_name(file, suffixes) else others).append(path)
    if inside and not paths and not others:
        raise BadInput(f"{archive} holds no folder {inside}; give the archive, or a folder in it")
    refused = [f"{name[len(start) :]} ({why})" for name, why in listing.refused.items() if name.startswith(start)]
    return Archived(archive, sorted(paths), [], sorted(others), sorted(passed_over), sorted(refused), "")


def _common_folder(paths: Iterable[str]) -> str:
    """`data/cells/` if all paths lie in folders of this folder; empty if not. Folders inside each other are one."""
    folder, rest = "", [*paths]
    while len(first := {path.split("/", 1)[0] for path in rest}) == 1 and all(path.count("/") > 1 for path in rest):
        top = f"{first.pop()}/"
        folder, rest = folder + top, [path[len(top) :] for path in rest]
    return folder


def _first(path: str) -> str | None:
    return path.split("/", 1)[0] if "/" in path else None
