"""Divides images into training images, held-out images and excluded images.

The division depends only on the seed and on the names in the image table: it does not change with the order of images,
the chunks or the caches.
"""

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import BadInput, DamagedStore
from .files import decode_text, sha256_json
from .spec import check_choice
from .tables import column, folded, listed, read_table_file

if TYPE_CHECKING:
    from .activation_store import ActivationStore

_log = logging.getLogger(__name__)

Bool = npt.NDArray[np.bool_]
Group = tuple[str, str | None, str]  # (image or patient, dataset, name)
_MOST_BYTES = 64 << 20  # of a list of image ids: a million long names


@dataclass(frozen=True, eq=False)
class Chosen:
    """A choice of images; unreadable and excluded ones are in neither `train` nor `held_out`."""

    train: list[Bool]  # per cache (n_images,)
    held_out: list[Bool]  # per cache (n_images,)
    n_excluded: int  # readable images that were excluded by name
    n_without_patient: int  # images that count as a patient each; 0 unless held out by patient
    n_groups: int  # images or patients to choose from; 0 if nothing is held out
    n_groups_held_out: int

    @property
    def n_train(self) -> int:
        """Images to train on."""
        return sum(int(mask.sum()) for mask in self.train)

    @property
    def n_held_out(self) -> int:
        """Images held out."""
        return sum(int(mask.sum()) for mask in self.held_out)


def chosen_images(
    stores: list["ActivationStore"],
    *,
    holdout: float = 0.0,
    by: str = "image",
    seed: int = 0,
    exclude: Collection[str] = (),
) -> Chosen:
    """Hold out a fraction of the readable images, by image or by patient, and exclude named images.

    Images or patients are held out in an order given by a hash of (seed, name), until the fraction is reached (the last
    patient may exceed it) or only one is left. Equal dataset and name in two caches mean the same image or patient. An
    image without a patient counts as a patient of its own, with a warning.

    Parameters
    ----------
    holdout : fraction of the readable images that are not excluded, from 0 to below 1
    exclude : `image_id`s, in any cache

    Raises
    ------
    BadInput
        If an excluded image is in no cache, no image is left to train on or to hold out, two caches name different
        patients for one image, or images are held out by patient and no patient is known.
    """
    check_choice("by", by, ("image", "patient"))
    if not 0 <= holdout < 1:
        raise BadInput(f"holdout must be a fraction from 0 to below 1; found {holdout}")
    ids = [column(store.images, "image_id") for store in stores]
    excluded = _excluded(ids, exclude)
    readable = [store.readable() for store in stores]
    left = [mask & ~out for mask, out in zip(readable, excluded, strict=True)]
    n_left = sum(int(mask.sum()) for mask in left)
    n_excluded = sum(int(mask.sum()) for mask in readable) - n_left
    if not n_left:
        raise BadInput(f"no image is left to train on: all {n_excluded:,} readable images are excluded")
    if holdout == 0:
        return Chosen(left, [np.zeros_like(mask) for mask in left], n_excluded, 0, 0, 0)

    groups = _image_groups(stores, left) if by == "image" else _patient_groups(stores, left, excluded)
    n_alone = sum(group[0] == "image" for group in groups) if by == "patient" else 0
    if n_alone == n_left:
        raise BadInput(
            f"cannot hold out by patient: of none of the {n_left:,} images a patient is known. Give the images a "
            f"column 'patient' and make the cache again, or hold out by image"
        )
    if n_alone:
        _log.warning("%s of %s images have no patient: each is held out by itself", f"{n_alone:,}", f"{n_left:,}")
    n_of: dict[Group, int] = {}
    for group in groups:
        n_of[group] = n_of.get(group, 0) + 1
    if len(n_of) == 1:
        raise BadInput(f"cannot hold out a part: all {n_left:,} readable images are of one {by}, {_name(*n_of)}")
    taken = _first_of(n_of, Fraction(str(holdout)) * n_left, seed)

    is_held_out = np.array([group in taken for group in groups])
    held_out, first = [], 0
    for mask in left:
        out, n_images = np.zeros_like(mask), int(mask.sum())
        out[mask] = is_held_out[first : first + n_images]
        held_out.append(out)
        first += n_images
    return Chosen(
        train=[mask & ~out for mask, out in zip(left, held_out, strict=True)],
        held_out=held_out,
        n_excluded=n_excluded,
        n_without_patient=n_alone,
        n_groups=len(n_of),
        n_groups_held_out=len(taken),
    )


def read_image_ids(path: Path | str) -> list[str]:
    """The `image_id`s in a text file, one per line, or in that column of a Parquet file.

    In a text file, blank lines and blanks around an id are ignored.

    Raises
    ------
    BadInput
        If there is no such file, or it is neither, larger than 64 MiB, or without a single id.
    """
    expected = "expected a text file with one image_id per line, or a Parquet file with that column"
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no list of images at {path}: {expected}")
    if path.suffix.lower() == ".parquet" or (path.suffix.lower() in (".csv", ".tsv") and _has_header(path)):
        table = read_table_file(path)
        if "image_id" not in table.column_names:
            raise BadInput(f"{path} has no column image_id; {expected}")
        ids = [name for name in column(table, "image_id") if name is not None]
    else:
        ids = _lines(path, expected)
    if not ids:
        raise BadInput(f"{path} names no image; {expected}")
    return ids


def _lines(path: Path, expected: str) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise BadInput(f"{path} is larger than {_MOST_BYTES >> 20} MiB; {expected}")
        lines = decode_text(content).replace("\r", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 text ({error}); {expected}") from None
    ids = [_unquoted(line.strip()) for line in lines if line.strip()]
    return ids[1:] if ids and folded(ids[0]) == "image_id" else ids


def _has_header(path: Path) -> bool:
    """Is a text file a table with a column image_id and further columns?"""
    with path.open("rb") as file:
        begin = file.read(1 << 16)
    text = begin.decode("utf-16" if begin[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="replace")
    names = re.split(r"[,;\t]", next(iter(text.lstrip("\ufeff").splitlines()), ""))
    return len(names) > 1 and "image_id" in [folded(_unquoted(name.strip())) for name in names]


def _unquoted(text: str) -> str:
    """Without quotes as of R and spreadsheets, where a quote inside is doubled."""
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if is_quoted else text


def _excluded(ids: list[list[str | None]], exclude: Collection[str]) -> list[Bool]:
    wanted = set(exclude)
    unknown = sorted(wanted.difference(*ids))
    if unknown:
        shown = listed([_short(name) for name in unknown])
        raise BadInput(
            f"{len(unknown):,} of {len(wanted):,} images to exclude are in none of the caches: {shown}. "
            f"Expected values of the column image_id of images.parquet"
        )
    return [np.array([name in wanted for name in of_store], bool) for of_store in ids]


def _image_groups(stores: list["ActivationStore"], left: list[Bool]) -> list[Group]:
    """The group of every image in `left`, cache by cache: the image as a group of its own."""
    groups: list[Group] = []
    for store, mask in zip(stores, left, strict=True):
        for dataset, name in zip(_cells(store, "dataset", mask), _cells(store, "image_id", mask), strict=True):
            if name is None:
                raise DamagedStore(f"{store.root}/images.parquet has a row without image_id; make the cache again")
            groups.append(("image", dataset, name))
    return groups


def _patient_groups(stores: list["ActivationStore"], left: list[Bool], excluded: list[Bool]) -> list[Group]:
    """The group of every image in `left`, cache by cache: its patient, if one of the caches names one."""
    named = [~out for out in excluded]  # also unreadable ones: an image may be readable in another cache
    patients = [name for store, mask in zip(stores, named, strict=True) for name in _cells(store, "patient", mask)]
    known: dict[Group, str] = {}
    for image, patient in zip(_image_groups(stores, named), patients, strict=True):
        if patient is not None and known.setdefault(image, patient) != patient:
            raise BadInput(
                f"the caches name two patients, {_short(known[image])} and {_short(patient)}, for {_name(image)}; "
                f"nobody can be held out for sure. Exclude the image, or hold out by image"
            )
    return [("patient", image[1], known[image]) if image in known else image for image in _image_groups(stores, left)]


def _first_of(n_of: dict[Group, int], n_wanted: Fraction, seed: int) -> set[Group]:
    """The first groups, ordered by hash, that together have `n_wanted` images; never all groups."""
    taken: set[Group] = set()
    n_taken = 0
    for group in sorted(n_of, key=lambda group: sha256_json([seed, *group]))[:-1]:
        if n_taken >= n_wanted:
            break
        taken.add(group)
        n_taken += n_of[group]
    return taken


def _cells(store: "ActivationStore", name: str, mask: Bool) -> list[str | None]:
    return [cell for cell, is_left in zip(column(store.images, name), mask, strict=True) if is_left]


def _name(group: Group) -> str:
    kind, dataset, name = group
    return f"{kind} {_short(name)} of dataset {_short(dataset)}"


def _short(name: str | None) -> str:
    """A name from a file, safe to print."""
    return repr(name if name is None or len(name) <= 60 else name[:59] + "…")
