"""Which images did an SAE train on? Told by the SHA-256 of the image files, whatever cache or name they come under.

A trained SAE's folder holds `trained_on.parquet`, the hashes of the images that its training drew from; its SHA-256 is
in `sae.json`. A copy of an image that was saved again (other bytes) has another hash and cannot be recognised.
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
    """What is known of some images, one entry each."""

    is_known: Bool  # it can be said whether the SAE trained on the image
    is_trained_on: Bool  # and it did; False where it is not known

    @property
    def n_known(self) -> int:
        """Images of which it is known."""
        return int(self.is_known.sum())

    @property
    def n_trained_on(self) -> int:
        """Images that the SAE is known to have trained on."""
        return int(self.is_trained_on.sum())

    @property
    def n_held_out(self) -> int:
        """Images that the SAE is known not to have trained on."""
        return self.n_known - self.n_trained_on

    def of(self, chosen: Bool) -> "TrainedOn":
        """The same of the `chosen` images only."""
        return TrainedOn(self.is_known[chosen], self.is_trained_on[chosen])


def content_hashes(images: pa.Table) -> list[str | None]:
    """The SHA-256 (64 lower-case hex digits) of the file of each row of an image table; None where there is none."""
    if "content_hash" not in images.column_names:
        return [None] * images.num_rows
    return [_clean(value) for value in column(images, "content_hash")]


def hash_table(hashes: Iterable[str | None]) -> pa.Table:
    """Each hash once, sorted, as 32 bytes: the table of `trained_on.parquet`."""
    known = sorted({value for value in hashes if value is not None})
    return pa.table({"content_hash": pa.array([bytes.fromhex(value) for value in known], pa.binary(32))})


def write_trained_on(root: Path, tables: Iterable[pa.Table]) -> dict[str, Any]:
    """Write `trained_on.parquet` into the folder of an SAE; gives what its header says of it.

    Each hash stands once, sorted, as 32 bytes: some 32 MB per million images.

    tables : rows of image tables, of the images that are trained on
    """
    hashes = [value for table in tables for value in content_hashes(table)]
    table = hash_table(hashes)
    data = parquet_bytes(table)
    write_atomic(root / FILE, data)
    n_without = sum(value is None for value in hashes)
    return {
        "n_images": len(hashes),
        "n_hashes": table.num_rows,
        "n_without_hash": n_without,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def read_trained_on(root: Path, header: Header) -> frozenset[str] | None:
    """Hashes of the image files that an SAE trained on; None where it does not say (an older or an imported one).

    Raises
    ------
    DamagedStore
        If the file is missing, or not the one that training wrote.
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
    """What is known of each readable row of an image table: did the SAE in the folder `root` train on this image?

    The hash decides. Where it cannot (an SAE made before training listed its images, images without a hash), names do,
    if this is the very cache that was trained on: what `held_out.parquet` names was not, the others were. Where images
    were also excluded, whose names the SAE does not hold, the others are not known.

    Parameters
    ----------
    images : of the cache with the content hash `cache_sha256`; unreadable rows are not known

    Raises
    ------
    DamagedStore
        As `read_trained_on`.
    """
    hashes = content_hashes(images)
    listed = read_trained_on(root, header)
    by_name = _by_name(root, header, images, cache_sha256)
    if listed is None:  # the images that are known by name stand for their hashes
        named = np.flatnonzero(by_name.is_trained_on)
        listed, is_whole = frozenset(value for row in named if (value := hashes[row]) is not None), False
    else:  # an image that was trained on without a hash may be any other
        is_whole = not (header.summary or {})["trained_on"]["n_without_hash"]
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
    has_excluded = bool(header.spec.get("images", {}).get("excluded"))
    return TrainedOn(is_held_out | (not has_excluded), ~is_held_out & (not has_excluded))


def _clean(value: str | None) -> str | None:
    found = (value or "").strip().lower()
    return found if len(found) == 64 and _HEX.issuperset(found) else None
