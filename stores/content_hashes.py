"""Finds the images that an SAE was trained on, by the SHA-256 of the image files, in any cache and under any name.

The folder of a trained SAE holds `trained_on.parquet`, the hashes of its training images; the SHA-256 of this file is
in `sae.json`. An image that was saved again (with other bytes) has another hash and is not recognised.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import DamagedStore
from .files import write_atomic
from .holdout import read_image_ids
from .spec import Header
from .tables import column, parquet_bytes, parquet_table, readable

FILE = "trained_on.parquet"
_HEX = frozenset("0123456789abcdef")
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TrainedOn:
    """For each of some images: is it known whether the SAE was trained on it, and was it?"""

    is_known: Bool  # it is known whether the SAE was trained on the image
    is_trained_on: Bool  # it was; False if not known

    @property
    def n_known(self) -> int:
        """Number of images for which it is known."""
        return int(self.is_known.sum())

    @property
    def n_trained_on(self) -> int:
        """Number of images that the SAE was trained on."""
        return int(self.is_trained_on.sum())

    @property
    def n_held_out(self) -> int:
        """Number of images that the SAE was not trained on."""
        return self.n_known - self.n_trained_on

    def of(self, chosen: Bool) -> "TrainedOn":
        """The same for the `chosen` images only."""
        return TrainedOn(self.is_known[chosen], self.is_trained_on[chosen])


def content_hashes(images: pa.Table) -> list[str | None]:
    """For each row of an image table the SHA-256 of the file (64 lower-case hex digits), or None."""
    if "content_hash" not in images.column_names:
        return [None] * images.num_rows
    return [_clean(value) for value in column(images, "content_hash")]


def hash_table(hashes: Iterable[str | None]) -> pa.Table:
    """The table of `trained_on.parquet`: each hash once, sorted, as 32 bytes."""
    known = sorted({value for value in hashes if value is not None})
    return pa.table({"content_hash": pa.array([bytes.fromhex(value) for value in known], pa.binary(32))})


def write_trained_on(
    root: Path, tables: Iterable[pa.Table], *, before: frozenset[str] | None = frozenset()
) -> dict[str, Any]:
    """Write `trained_on.parquet` into the folder of an SAE; returns its entry for the header.

    Each hash once, sorted, as 32 bytes: some 32 MB per million images.

    tables : rows of image tables, for the training images
    before : hashes of images that the SAE, from which this one went on, was trained on; None: not all are known
    """
    hashes = [value for table in tables for value in content_hashes(table)]
    table = hash_table([*hashes, *(before or ())])
    data = parquet_bytes(table)
    write_atomic(root / FILE, data)
    n_without = sum(value is None for value in hashes)
    return {
        "n_images": len(hashes),
        "n_hashes": table.num_rows,
        "n_without_hash": n_without,
        "sha256": hashlib.sha256(data).hexdigest(),
        **({} if before is not None else {"before_unknown": True}),
    }


def read_trained_on(root: Path, header: Header) -> frozenset[str] | None:
    """Hashes of the image files that an SAE was trained on; None if not recorded (an older or imported SAE).

    Raises
    ------
    DamagedStore
        If the file is missing or has changed.
    """
    said = (header.summary or {}).get("trained_on")
    if said is None:
        return None
    path = root / FILE
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != said["sha256"]:
            raise ValueError("its SHA-256 is not the one in sae.json")
        found = parquet_table(data)["content_hash"].to_pylist()
        return frozenset(value.hex() for value in found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedStore(
            f"{path} is not the list of images that training wrote ({reason}); train again with cyto sae train "
            f"--overwrite, or put the file back"
        ) from None


def find_trained_on(root: Path, header: Header, images: pa.Table, *, cache_sha256: str) -> TrainedOn:
    """For each readable row of an image table: was the SAE in the folder `root` trained on this image?

    Decided by hash. Without one (an older SAE, or images without a hash) it is decided by name, if this is the cache
    that was trained on: images in `held_out.parquet` were held out, the others were trained on. If images were also
    excluded, whose names the SAE does not record, the others are unknown.

    Parameters
    ----------
    images : image table of the cache with the content hash `cache_sha256`; unreadable rows are unknown

    Raises
    ------
    DamagedStore
        As `read_trained_on`.
    """
    hashes = content_hashes(images)
    listed = read_trained_on(root, header)
    by_name = _by_name(root, header, images, cache_sha256)
    if listed is None:  # use the hashes of the images that are known by name
        named = np.flatnonzero(by_name.is_trained_on)
        listed, is_whole = frozenset(value for row in named if (value := hashes[row]) is not None), False
    else:  # a training image without a hash could be any of these
        said = (header.summary or {})["trained_on"]
        is_whole = not (said["n_without_hash"] or said.get("before_unknown"))
    is_listed = np.array([value in listed for value in hashes], bool)
    by_hash = is_listed | (np.array([value is not None for value in hashes], bool) & is_whole)
    is_readable = np.array(readable(images), bool)
    return TrainedOn(
        is_known=(by_hash | by_name.is_known) & is_readable,
        is_trained_on=np.where(by_hash, is_listed, by_name.is_trained_on) & is_readable,
    )


def _by_name(root: Path, header: Header, images: pa.Table, cache_sha256: str) -> TrainedOn:
    nothing = np.zeros(images.num_rows, bool)
    if cache_sha256 not in [cache.get("sha256") for cache in header.spec.get("caches", [])]:
        return TrainedOn(nothing, nothing)
    path = root / "held_out.parquet"
    names = set(read_image_ids(path)) if path.exists() else set()
    is_held_out = np.array([name in names for name in column(images, "image_id")], bool)
    if "init_from" in header.spec:  # the SAE before it may have been trained on what was held out here
        return TrainedOn(~is_held_out & (not header.spec["images"]["excluded"]), ~is_held_out)
    has_excluded = bool(header.spec.get("images", {}).get("excluded"))
    return TrainedOn(is_held_out | (not has_excluded), ~is_held_out & (not has_excluded))


def _clean(value: str | None) -> str | None:
    found = (value or "").strip().lower()
    return found if len(found) == 64 and _HEX.issuperset(found) else None
