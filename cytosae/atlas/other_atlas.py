"""An atlas that is shown beside the one that is built: its concepts, its pictures, which latent is which."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from stores.errors import DamagedStore, SpecMismatch
from stores.files import read_regular
from stores.result_folder import ResultStore
from stores.spec import ATLAS, MATCH

NAME = "concepts"
SHOWN = 3  # images of a concept
SCHEMA = pa.schema(
    [
        ("latent", pa.int64()), ("label", pa.string()), ("frequency", pa.float64()), ("mean_activation", pa.float64()),
        ("images", pa.list_(pa.int64())), ("labels", pa.list_(pa.string())), ("maps", pa.list_(pa.binary())),
        ("largest", pa.list_(pa.float64())),
    ]
)  # fmt: skip
_LISTS = ("images", "labels", "maps", "largest")
_MOST_BYTES = 1 << 24  # of a picture
_MOST_PATCHES = 1 << 14
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True, eq=False)
class OtherAtlas:
    """An atlas that is shown beside the one that is built."""

    store: ResultStore
    match: ResultStore | None  # of `cyto concept match`; None: both are of one SAE, and a latent is its own match

    @property
    def identities(self) -> list[str | None]:
        """Of the atlas and of the match, for the spec of the atlas that shows it."""
        return [self.store.header.identity, None if self.match is None else self.match.header.identity]

    @cached_property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Latent -> its row of `concept_table`."""
        table = self.store.table(NAME)
        if not table.schema.remove_metadata().equals(SCHEMA):
            raise DamagedStore(f"{self.store.root}/{NAME}.parquet has other columns than an atlas of this cyto")
        rows = {row["latent"]: row for row in table.to_pylist()}
        if not all(_is_whole(row) for row in rows.values()):
            raise DamagedStore(f"{self.store.root}/{NAME}.parquet has rows that no cyto writes")
        return rows

    @cached_property
    def _hashes(self) -> dict[str, str]:
        table = self.store.table("files")
        return dict(zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True))

    def has_picture(self, image: int) -> bool:
        """Has that atlas a picture of an image?"""
        return f"pictures/{int(image)}.jpg" in self._hashes

    def picture(self, image: int) -> bytes | None:
        """The picture of an image of that atlas; None if it has none.

        Raises
        ------
        DamagedStore
            If it is not the file that was written.
        """
        name = f"pictures/{int(image)}.jpg"
        if not self.has_picture(image):
            return None
        path = self.store.root / name
        try:
            content = read_regular(path, most_bytes=_MOST_BYTES)
        except (OSError, ValueError):
            raise DamagedStore(f"{path} is missing or no plain file; cyto atlas build --overwrite makes it") from None
        if hashlib.sha256(content).hexdigest() != self._hashes[name] or not content.startswith(_JPEG):
            raise DamagedStore(f"{path} is not the file that was written; cyto atlas build --overwrite makes it again")
        return content


def open_other(atlas: Path, match: Path | None, *, barcodes: str, sae_sha256: str) -> OtherAtlas:
    """Open an atlas to be shown beside another.

    Parameters
    ----------
    match : a folder of `cyto concept match`; None: the atlas must be of the same SAE
    barcodes, sae_sha256 : identity of the barcodes of the atlas that is built, and its SAE

    Raises
    ------
    SpecMismatch
        If the match is not of these two, or the SAE is another one.
    """
    store = ResultStore(atlas, ATLAS)
    files = (store.header.summary or {}).get("files", {})
    if f"{NAME}.parquet" not in files:
        raise SpecMismatch(f"{atlas} is an atlas of an older cyto; build it again with cyto atlas build --overwrite")
    if match is None:
        stated = str((store.header.summary or {}).get("sae_sha256"))
        if stated != sae_sha256:
            raise SpecMismatch(
                f"{atlas} is of another SAE ({stated:.12}…) than this atlas ({sae_sha256:.12}…); say which of its "
                f"latents is which with --match, a folder of cyto concept match"
            )
        return OtherAtlas(store, None)
    found = ResultStore(match, MATCH)
    sides = [list(map(str, found.header.spec[side])) for side in "ab"]
    if sides != [[barcodes], [str(store.header.spec["barcodes"])]]:
        raise SpecMismatch(
            f"{match} does not match the barcodes of this atlas with those of {atlas}; give cyto concept match the "
            f"barcodes of both, in this order"
        )
    return OtherAtlas(store, found)


def _is_whole(row: dict[str, Any]) -> bool:
    """Are all cells there, and as many of each list, none too large?"""
    if any(value is None for value in row.values()):
        return False
    lists = [row[name] for name in _LISTS]
    return (
        {len(each) for each in lists} <= {len(lists[0])}
        and len(lists[0]) <= SHOWN
        and all(value is not None and len(value) <= _MOST_PATCHES for value in row["maps"])
    )
