"""Which tokens of which images may be edited, whose images they are, and in which order images are taken.

Images are taken round the patients: one of each patient, then a second one of each, so that a few images are of many
patients. An image without a patient counts as a patient of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.errors import BadInput
from stores.tables import column, listed, read_table_file
from stores.token_layout import TokenLayout

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Places:
    """The tokens that may be edited: the same of every image, or those of the images in a table."""

    tokens: Bools  # (T,) of every image
    of_image: dict[int, Bools] | None = None  # (T,) by image index; None: `tokens`, of every image

    def mask(self, image: int) -> Bools:
        """(T,): the tokens of this image that may be edited."""
        return self.tokens if self.of_image is None else self.of_image[image]

    def images(self, readable: Bools) -> Ints:
        """The readable images with a token that may be edited, rising."""
        found = np.flatnonzero(readable)
        return found if self.of_image is None else found[np.isin(found, np.fromiter(self.of_image, np.int64))]


@dataclass(frozen=True)
class Owners:
    """(n_images,) the patient of each image, as a number; `names` of the patients, "" where an image has none."""

    of_image: Ints
    names: list[str]
    n_without: int  # images without a patient


def read_patches(path: Path, images: pa.Table, layout: TokenLayout, tokens: Bools) -> Places:
    """The patches of a table with the columns image_id and patch (0 is the top left, row by row), a row for each.

    Raises
    ------
    BadInput
        If a column or an image is missing, or a patch does not exist or is none of the chosen tokens.
    """
    table = read_table_file(path)
    if not {"image_id", "patch"} <= {*table.column_names}:
        raise BadInput(
            f"{path} must have the columns image_id and patch, a row for each patch; found "
            f"{', '.join(table.column_names)}"
        )
    index = {str(name): number for number, name in enumerate(column(images, "image_id"))}
    names = [str(name) for name in column(table, "image_id")]
    unknown = sorted({name for name in names if name not in index})
    if unknown:
        raise BadInput(
            f"{len(unknown):,} of {len({*names}):,} images in {path} are not in the cache: {listed(unknown)}"
        )
    of_image: dict[int, Bools] = {}
    for name, text in zip(names, column(table, "patch"), strict=True):
        patch = int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else -1
        if not 0 <= patch < layout.n_patches:
            raise BadInput(f"{path}: patches are numbered 0 to {layout.n_patches - 1:,}; found {text!r} for {name}")
        at = layout.patches[patch]
        if not tokens[at]:
            raise BadInput(f"{path} names patches, but the SAE reads no patches here; give --token-set patch or all")
        of_image.setdefault(index[name], np.zeros(len(tokens), bool))[at] = True
    if not of_image:
        raise BadInput(f"{path} names no patch")
    return Places(tokens, of_image)


def owners_of(images: pa.Table) -> Owners:
    """Whose each image is: a patient is a name within a dataset, as for barcodes."""
    pairs = zip(column(images, "patient"), column(images, "dataset"), strict=True)
    keys: list[tuple[str, ...]] = [
        (str(patient), dataset or "") if patient else ("", "", str(number))
        for number, (patient, dataset) in enumerate(pairs)
    ]
    number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return Owners(
        np.array([number_of[key] for key in keys], np.int64),
        [key[0] for key in number_of],
        sum(len(key) == 3 for key in keys),
    )


def round_the_patients(images: Ints, owners: Owners, seed: Sequence[int]) -> Ints:
    """The same images in a seeded order: one of each patient, then a second of each that has one, and so on."""
    rng = np.random.default_rng(list(seed))
    drawn = images[rng.permutation(len(images))]
    owner = owners.of_image[drawn]
    order = np.argsort(owner, kind="stable")
    begins = np.flatnonzero(np.diff(owner[order], prepend=-1))
    turn = np.empty(len(drawn), np.int64)
    turn[order] = np.arange(len(drawn)) - np.repeat(begins, np.diff(np.append(begins, len(drawn))))
    return drawn[np.lexsort((rng.permutation(len(owners.names))[owner], turn))]
