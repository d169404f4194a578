"""Segmentation masks of images: which file belongs to which image, and what fraction of each patch each class covers.

A mask is read by value: 0 is background, and every other value (a number, a palette entry, a colour) is one class.
Ambiguous masks are refused until `--classes` names the classes: see `_choose`.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.errors import BadInput
from stores.progress import Progress
from stores.tables import column, image_table, listed, read_table_file

from .archived_images import images_of_archive
from .archives import as_unpacked, split_path
from .datasets import list_files
from .images import read_labels
from .preprocess import Box, Preprocess

Float = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
MOST_CLASSES = 12  # found by value alone: more are probably single objects, or an image that is no mask
_MOST_VALUES = 256  # of a file, of which each is examined
_LEAST_INSIDE = 0.05  # of a value's pixels with four equal neighbours: fewer mean a blurred edge between other values
ANY = "any"
_GREY = 0x010101  # a grey as a colour, in steps of brightness


@dataclass(frozen=True)
class MaskFiles:
    """The mask file of each image that has one."""

    paths: dict[int, Path]  # by image_index
    unknown: list[str]  # masks of no image here


@dataclass(frozen=True)
class MaskClass:
    """One class of the masks: its name and its pixel values, written as in `--classes`."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class MaskShares:
    """What the masks of images cover, and the masks that were left out."""

    classes: list[MaskClass]
    shares: dict[int, Float]  # by image_index: (n_classes, side, side) fraction of each patch that each class covers
    unreadable: list[str]  # names of mask files, each with the reason
    of_unreadable_images: list[str]  # names of mask files, which were not looked at


@dataclass(frozen=True)
class _MaskFile:
    """One mask file: what each value covers. `shares` is empty if there are too many values."""

    name: str
    mode: str  # number, grey (only grey colours, whose number is the brightness) or color
    shares: dict[int, Float]  # by value, 0 included
    above_zero: Float
    pixels: dict[int, tuple[int, int]]  # by value: pixels, and pixels with four neighbours of the same value


def find_masks(source: Path, images: pa.Table, *, root: Path | None = None) -> MaskFiles:
    """The masks that `source` names, for the images of an image table.

    Parameters
    ----------
    source : a .csv or .parquet table with the columns `image_id` and `mask` (a path; rows without are left out), or a
        folder or archive of masks that are named like the images: `a/b.png` for the image `a/b.jpg`, or just `b.png`
        if only one image is called `b`
    root : what paths in a table are relative to; default: the table's folder

    Raises
    ------
    BadInput
        If there is no such source, a column or every image is missing, a path leads out of `root`, or names are
        ambiguous.
    """
    if source.is_dir():
        if root is not None:
            raise BadInput(f"--root belongs to a table of masks; {source} is a folder, and its own root")
        return _of_folder(source.absolute(), list_files(source.absolute())[0], images)
    packed = split_path(source.absolute())
    if packed is not None:
        found_in = images_of_archive(*packed)
        return _of_folder(found_in.root, found_in.paths, images)
    if not source.exists():
        raise BadInput(f"no masks at {source}: expected a folder, or a .csv or .parquet table")
    table = read_table_file(source)
    missing = [name for name in ("image_id", "mask") if name not in table.column_names]
    if missing:
        raise BadInput(
            f"{source} has no column {missing[0]!r} (found: {', '.join(table.column_names)}); "
            f"expected the columns image_id and mask"
        )
    # the path of a mask follows the same rules as that of an image; some images have none
    rows = [*zip(column(table, "image_id"), column(table, "mask"), strict=True)]
    rows = [row for row in rows if row[1]] or rows
    checked = image_table(
        {"image_id": [name for name, _ in rows], "path": [mask for _, mask in rows]}, source=str(source), dataset=""
    )
    root = (root or source.parent).absolute()
    indices = {name: index for index, name in enumerate(column(images, "image_id"))}
    pairs = list(zip(column(checked, "image_id"), column(checked, "path"), strict=True))
    found = {indices[name]: root / str(path) for name, path in pairs if name in indices}
    return _not_empty(MaskFiles(found, [str(name) for name, _ in pairs if name not in indices]), source)


def parse_classes(text: str | None) -> list[MaskClass] | str | None:
    """`1=cytoplasm,2=nucleus` (also `#ff0000=nucleus`; a name given twice unites two values), `any`, or None.

    Raises
    ------
    BadInput
        If the text has another form, or a value is given twice.
    """
    if text is None or text.strip() == ANY:
        return None if text is None else ANY
    found, seen = dict[str, list[str]](), set[int]()
    for part in text.split(","):
        value, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name or _number(value) is None:
            raise BadInput(
                f"--classes: expected VALUE=NAME,VALUE=NAME,... such as 1=cytoplasm,2=nucleus or #ff0000=nucleus, or "
                f"{ANY!r}; found {part.strip()!r}"
            )
        if _number(value) in seen:
            raise BadInput(f"--classes: the value {value} is given twice")
        seen.add(_number(value) or 0)
        found.setdefault(name, []).append(value.lower())
    return [MaskClass(name, tuple(values)) for name, values in found.items()]


def _number(value: str) -> int | None:
    """The value of a pixel that `12` or `#ff0000` stands for."""
    is_color = value.startswith("#")
    digits = value[1:] if is_color else value
    if (is_color and len(digits) != 6) or not digits.isascii() or not digits.isalnum() or len(digits) > 12:
        return None
    try:
        return int(digits, 16 if is_color else 10)
    except ValueError:
        return None


def read_all_shares(
    masks: MaskFiles,
    is_readable: npt.NDArray[np.bool_],
    side: int,
    classes: str | None = None,
    *,
    preprocess: Preprocess | None = None,
    progress: Progress = lambda done, total, state: None,
) -> MaskShares:
    """The fraction of each of side x side patches that each class covers, read file by file.

    Parameters
    ----------
    is_readable : (n_images,); the mask of an image that could not be read is left out
    classes : see `parse_classes`; None: every value is a class, unless that is ambiguous
    preprocess : of the backbone, which may cut off a border before it cuts the image into patches; None: it does not
    progress : masks done, masks in all

    Raises
    ------
    BadInput
        If it is not clear what the values mean, or `classes` names a value that no mask has.
    """
    asked = parse_classes(classes)
    files, unreadable, of_unreadable = dict[int, _MaskFile](), list[str](), list[str]()
    for n_done, (image_index, path) in enumerate(sorted(masks.paths.items()), start=1):
        if not is_readable[image_index]:
            of_unreadable.append(path.name)
        elif isinstance(found := _read_file(path, side, preprocess or Preprocess()), str):
            unreadable.append(f"{path.name}: {found}")
        else:
            files[image_index] = found
        progress(n_done, len(masks.paths), f"{len(unreadable):,} unreadable" if unreadable else "")
    if not files:
        return MaskShares([], {}, unreadable, of_unreadable)
    if asked == ANY:
        above = [MaskClass("mask", ("above 0",))]
        return MaskShares(above, {at: file.above_zero[None] for at, file in files.items()}, unreadable, of_unreadable)
    is_color = _unify(files)
    values = sorted({value for file in files.values() for value in file.pixels})
    if isinstance(asked, list):
        crowded = [file.name for file in files.values() if not file.shares]
        if crowded:
            raise BadInput(
                f"{crowded[0]} has more than {_MOST_VALUES} values: an image, not a mask of classes; save one value "
                f"for each class, or give --classes {ANY} for all that is above 0"
            )
        _check_asked(asked, values, is_color)
    else:
        asked = _choose(list(files.values()), is_color)
    of_class = [[_number(value) for value in one.values] for one in asked]
    nothing = np.zeros((side, side))
    shares = {
        at: np.stack([sum((file.shares.get(value or 0, nothing) for value in own), nothing) for own in of_class])
        for at, file in files.items()
    }
    return MaskShares(asked, shares, unreadable, of_unreadable)


def _read_file(path: Path, side: int, preprocess: Preprocess) -> _MaskFile | str:
    found = read_labels(path)
    if isinstance(found, str):
        return found
    labels, is_color = found
    mode = "color" if is_color else "number"
    if is_color and (labels == (labels & 255) * _GREY).all():
        labels, mode = labels & 255, "grey"
    values, counts = np.unique(labels, return_counts=True)
    view = preprocess.view(labels.shape[1], labels.shape[0])
    above_zero = _shares(labels > 0, side, view)
    if len(values) > _MOST_VALUES:
        return _MaskFile(path.name, mode, {}, above_zero, {})
    is_inside = np.zeros(labels.shape, bool)
    middle = labels[1:-1, 1:-1]
    is_inside[1:-1, 1:-1] = (
        (middle == labels[:-2, 1:-1])
        & (middle == labels[2:, 1:-1])
        & (middle == labels[1:-1, :-2])
        & (middle == labels[1:-1, 2:])
    )
    inside = dict(zip(*np.unique(labels[is_inside], return_counts=True), strict=True))
    return _MaskFile(
        path.name,
        mode,
        {int(value): _shares(labels == value, side, view) for value in values},
        above_zero,
        {int(value): (int(n), int(inside.get(value, 0))) for value, n in zip(values, counts, strict=True)},
    )


def _unify(files: dict[int, _MaskFile]) -> bool:
    """Are the masks coloured? If so, grey values become colours too, so that equal values mean the same."""
    if not any(file.mode == "color" for file in files.values()):
        return False
    for at, file in files.items():
        if file.mode == "number" and any(file.pixels):
            color = next(other.name for other in files.values() if other.mode == "color")
            raise BadInput(
                f"{file.name} has numbers and {color} has colours: it is not clear which belong together; save all "
                f"masks in one way, or give --classes {ANY} for all that is above 0"
            )
        if file.mode == "grey":
            shares = {value * _GREY: share for value, share in file.shares.items()}
            files[at] = replace(file, shares=shares, pixels={value * _GREY: n for value, n in file.pixels.items()})
    return True


def _shown(value: int, is_color: bool) -> str:
    return f"#{value:06x}" if is_color else str(value)


def _check_asked(asked: list[MaskClass], values: list[int], is_color: bool) -> None:
    known = {_shown(value, is_color) for value in values}
    for one in asked:
        for value in one.values:
            if _number(value) not in values or value.startswith("#") != is_color:
                raise BadInput(
                    f"--classes: no mask has the value {value} ({one.name}); found {listed(sorted(known, key=_order))}"
                )


def _order(shown: str) -> tuple[bool, int]:
    return shown.startswith("#"), _number(shown) or 0


def _choose(files: list[_MaskFile], is_color: bool) -> list[MaskClass]:
    """The classes if none are named: 0, and each other value as one class; ambiguous masks are refused."""
    crowded = [file.name for file in files if not file.pixels]
    pixels = dict[int, list[int]]()
    for file in files:
        for value, (n, n_inside) in file.pixels.items():
            total = pixels.setdefault(value, [0, 0])
            total[0] += n
            total[1] += n_inside
    above = sorted(value for value in pixels if value)
    hint = f"name those that count with --classes VALUE=NAME,..., or give --classes {ANY} for all that is above 0"
    if not above and not crowded:
        raise BadInput(f"all {len(files):,} masks are 0 everywhere: there is nothing to compare; look at the masks")
    if crowded or len(above) > MOST_CLASSES:
        what = (
            f"{crowded[0]} has more than {_MOST_VALUES} values"
            if crowded
            else f"the masks have {len(above):,} values above 0 ({listed([_shown(n, is_color) for n in above])})"
        )
        raise BadInput(
            f"{what}: smoothed edges, single objects or an image, and not up to {MOST_CLASSES} classes; {hint}"
        )
    if len(above) == 1:
        return [MaskClass("mask", (_shown(above[0], is_color),))]
    if not any(sum(value > 0 for value in file.pixels) > 1 for file in files):
        raise BadInput(
            f"each mask has one value above 0, but not all the same ({listed([_shown(n, is_color) for n in above])}): "
            f"it is not clear whether these are classes; {hint}"
        )
    for value in above:
        n, n_inside = pixels[value]
        if n_inside < _LEAST_INSIDE * n:
            raise BadInput(
                f"the value {_shown(value, is_color)} of the masks lies only at the edges of others, as by smoothing "
                f"({n_inside:,} of its {n:,} pixels have four neighbours of it); save masks without it, or {hint}"
            )
    names = [_shown(value, is_color) for value in above]
    return [*(MaskClass(name, (name,)) for name in names), *_background(pixels, is_color)]


def _background(pixels: dict[int, list[int]], is_color: bool) -> list[MaskClass]:
    return [MaskClass("background", (_shown(0, is_color),))] if 0 in pixels else []


def _shares(mask: npt.NDArray[np.bool_], side: int, view: Box | None = None) -> Float:
    """(side, side) exact fractions: a pixel that two patches share counts proportionally.

    view : the part of the mask that the patches divide; None: all of it
    """
    height, width = mask.shape
    left, top, right, bottom = view or (0.0, 0.0, float(width), float(height))
    down, across = _overlap(height, side, top, bottom), _overlap(width, side, left, right)
    return (down @ mask @ across.T) * (side * side / ((bottom - top) * (right - left)))


def _overlap(n: int, side: int, first: float, last: float) -> Float:
    """(side, n) length of each pixel (of length 1) inside each patch, along one axis; patches: `first` to `last`."""
    edges = first + np.arange(side + 1) * (last - first) / side
    low, high = np.maximum(edges[:-1, None], np.arange(n)), np.minimum(edges[1:, None], np.arange(1, n + 1))
    return np.maximum(0, high - low)


def _of_folder(folder: Path, files: list[str], images: pa.Table) -> MaskFiles:
    by_path, by_name = dict[str, list[int]](), dict[str, list[int]]()
    for index, path in enumerate(column(images, "path")):
        unpacked = as_unpacked(str(path))
        by_path.setdefault(_stem(unpacked), []).append(index)
        by_name.setdefault(PurePosixPath(unpacked).stem, []).append(index)
    found, unknown = dict[int, Path](), list[str]()
    for file in files:
        images_so_called = by_path.get(_stem(file)) or by_name.get(PurePosixPath(file).stem, [])
        if not images_so_called:
            unknown.append(file)
            continue
        if len(images_so_called) > 1 or images_so_called[0] in found:
            what = f"{len(images_so_called)} images are" if len(images_so_called) > 1 else "another mask is"
            raise BadInput(
                f"{folder / file} cannot be assigned: {what} called {PurePosixPath(file).stem!r}; give a table with "
                f"the columns image_id and mask"
            )
        found[images_so_called[0]] = folder / file
    return _not_empty(MaskFiles(found, unknown), folder)


def _stem(path: str) -> str:
    return PurePosixPath(path).with_suffix("").as_posix()


def _not_empty(masks: MaskFiles, source: Path) -> MaskFiles:
    if not masks.paths:
        raise BadInput(
            f"none of the {len(masks.unknown):,} masks of {source} is of an image here ({listed(masks.unknown)}); "
            f"expected values of the column image_id, or files named like the images"
        )
    return masks
