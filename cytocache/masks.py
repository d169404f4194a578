"""Segmentation masks of images: which file belongs to which image, and how much of each patch it covers."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.errors import BadInput
from stores.progress import Progress
from stores.tables import column, image_table, listed, read_table_file

from .datasets import list_files
from .images import read_mask

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MaskFiles:
    """The mask file of each image that has one."""

    paths: dict[int, Path]  # by image_index
    unknown: list[str]  # masks of no image here


@dataclass(frozen=True)
class MaskShares:
    """What the masks of images cover, and those that say nothing."""

    shares: dict[int, Float]  # by image_index: (side, side) share of each patch that is covered
    unreadable: list[str]  # names of mask files, each with the reason
    of_unreadable_images: list[str]  # names of mask files, which were not looked at


def find_masks(source: Path, images: pa.Table, *, root: Path | None = None) -> MaskFiles:
    """The masks that `source` names, for the images of an image table.

    Parameters
    ----------
    source : a .csv or .parquet table with the columns `image_id` and `mask` (a path), or a folder of masks that are
        named like the images: `a/b.png` for the image `a/b.jpg`, or just `b.png` if only one image is called `b`
    root : what paths in a table are relative to; default: the table's folder

    Raises
    ------
    BadInput
        If there is no such source, a column or every image is missing, a path leaves `root`, or two masks or images
        cannot be told apart.
    """
    if source.is_dir():
        if root is not None:
            raise BadInput(f"--root belongs to a table of masks; {source} is a folder, and its own root")
        return _of_folder(source.absolute(), images)
    if not source.exists():
        raise BadInput(f"no masks at {source}: expected a folder, or a .csv or .parquet table")
    table = read_table_file(source)
    missing = [name for name in ("image_id", "mask") if name not in table.column_names]
    if missing:
        raise BadInput(
            f"{source} has no column {missing[0]!r} (found: {', '.join(table.column_names)}); "
            f"expected the columns image_id and mask"
        )
    # a mask's path obeys the rules of an image's
    checked = image_table(
        {"image_id": column(table, "image_id"), "path": column(table, "mask")}, source=str(source), dataset=""
    )
    root = (root or source.parent).absolute()
    indices = {name: index for index, name in enumerate(column(images, "image_id"))}
    pairs = list(zip(column(checked, "image_id"), column(checked, "path"), strict=True))
    found = {indices[name]: root / str(path) for name, path in pairs if name in indices}
    return _some(MaskFiles(found, [str(name) for name, _ in pairs if name not in indices]), source)


def read_all_shares(
    masks: MaskFiles,
    is_readable: npt.NDArray[np.bool_],
    side: int,
    *,
    progress: Progress = lambda done, total, state: None,
) -> MaskShares:
    """What each mask covers of side x side patches, one file after the other.

    Parameters
    ----------
    is_readable : (n_images,); the mask of an image that could not be read is left out
    progress : masks done, masks in all
    """
    found = MaskShares({}, [], [])
    for n_done, (image_index, path) in enumerate(sorted(masks.paths.items()), start=1):
        if not is_readable[image_index]:
            found.of_unreadable_images.append(path.name)
        elif isinstance(shares := read_shares(path, side), str):
            found.unreadable.append(f"{path.name}: {shares}")
        else:
            found.shares[image_index] = shares
        progress(n_done, len(masks.paths), f"{len(found.unreadable):,} unreadable" if found.unreadable else "")
    return found


def read_shares(path: Path, side: int) -> Float | str:
    """(side, side) share of each patch that the mask covers, by area, whatever its size; or why it cannot be read."""
    mask, error = read_mask(path)
    return str(error) if mask is None else _shares(mask, side)


def _shares(mask: npt.NDArray[np.bool_], side: int) -> Float:
    """Exact areas: pixels on the edge between two patches count in parts."""
    down, right = (_overlap(n, side) for n in mask.shape)
    return (down @ mask @ right.T) * (side * side / mask.size)


def _overlap(n: int, side: int) -> Float:
    """(side, n) length of each pixel, 1 long, that lies in each patch along one side."""
    edges = np.arange(side + 1) * n / side
    low, high = np.maximum(edges[:-1, None], np.arange(n)), np.minimum(edges[1:, None], np.arange(1, n + 1))
    return np.maximum(0, high - low)


def _of_folder(folder: Path, images: pa.Table) -> MaskFiles:
    files, _, _ = list_files(folder)
    by_path, by_name = dict[str, list[int]](), dict[str, list[int]]()
    for index, path in enumerate(column(images, "path")):
        by_path.setdefault(_stem(str(path)), []).append(index)
        by_name.setdefault(PurePosixPath(str(path)).stem, []).append(index)
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
    return _some(MaskFiles(found, unknown), folder)


def _stem(path: str) -> str:
    return PurePosixPath(path).with_suffix("").as_posix()


def _some(masks: MaskFiles, source: Path) -> MaskFiles:
    if not masks.paths:
        raise BadInput(
            f"none of the {len(masks.unknown):,} masks of {source} is of an image here ({listed(masks.unknown)}); "
            f"expected values of the column image_id, or files named like the images"
        )
    return masks
