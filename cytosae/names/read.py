"""Names and their scores, read from a folder of `cyto concept describe`: for the atlas and for notebooks. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from stores.errors import DamagedStore
from stores.result_folder import ResultStore
from stores.spec import NAMES, Header
from stores.tables import read_sealed

from .answers import Unfit, one_line
from .detection import row_is_supported

NAMES_FILE, DETECTION_FILE, SOURCES_FILE = "names.parquet", "detection.parquet", "sources.parquet"  # added to the items
NAME_COLUMNS = {
    "latent": pa.int64(),
    **dict.fromkeys(("name", "text", "given_by", "source", "given_at"), pa.string()),
    "confidence": pa.int64(),
    "saw": pa.string(),
}
DETECTION_COLUMNS = {
    "latent": pa.int64(),
    **dict.fromkeys(("given_by", "name", "judge"), pa.string()),
    **dict.fromkeys(("n_active", "n_inactive", "n_patients"), pa.int64()),
    **dict.fromkeys(("auc", "auc_low", "auc_high", "auc_strong"), pa.float64()),
    **dict.fromkeys(("shuffled", "shuffled_low", "shuffled_high"), pa.float64()),
    **dict.fromkeys(("difference", "difference_low", "difference_high"), pa.float64()),
    "n_failed": pa.int64(),
    "against": pa.string(),  # not active; or least active, where a latent is active nearly everywhere
    "reason": pa.string(),
}
_UNTESTED = float("inf")
SOURCE_COLUMNS = {
    **dict.fromkeys(("given_by", "judge"), pa.string()),
    **dict.fromkeys(("n_names", "n_supported"), pa.int64()),
    **{f"{what}{end}": pa.float64() for what in ("auc", "shuffled", "difference") for end in ("", "_low", "_high")},
}


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well one judge tells the cells of a latent by a name; None where it is not known."""

    judge: str
    n_active: int  # images that were judged
    n_inactive: int
    n_patients: int
    auc: float | None  # 0.5: guessing
    auc_low: float | None
    auc_high: float | None
    auc_strong: float | None  # of strongly active images only
    shuffled: float | None  # by other latents' names, on average
    shuffled_low: float | None
    shuffled_high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    n_failed: int
    against: str  # not active; or least active, where a latent is active nearly everywhere
    reason: str | None  # there is no score

    @property
    def is_supported(self) -> bool:
        """Is it better than guessing and than other latents' names, by the lower ends of both intervals?"""
        return row_is_supported(vars(self))


@dataclass(frozen=True, kw_only=True)
class LatentName:
    """A name of a latent, with who or what gave it. The text is of strangers: escape it."""

    latent: int
    name: str
    text: str
    given_by: str
    source: str  # command, table or review
    given_at: str | None  # ISO 8601
    confidence: int | None  # 1 to 5
    saw: str  # item, or elsewhere
    scores: tuple[Detection, ...] = ()

    @property
    def best(self) -> Detection | None:
        """The score of the judge by which the name does best; None if it was not tested."""
        tested = [each for each in self.scores if each.auc is not None]
        return max(tested, key=lambda each: each.auc or 0.0, default=None)


@dataclass(frozen=True)
class LatentNames:
    """All names in a folder."""

    header: Header
    by_latent: Mapping[int, tuple[LatentName, ...]]
    sources: tuple[dict[str, Any], ...] = ()  # means over the latents of each source and judge: `SOURCE_COLUMNS`

    def of(self, latent: int) -> tuple[LatentName, ...]:
        """The names of a latent, the best tested first, untested ones last; () if there is none."""
        return self.by_latent.get(latent, ())


def read_names(folder: Path | str) -> LatentNames:
    """The names in a folder of `cyto concept describe`, with their scores.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch
        If there is no finished folder of a version that this program reads.
    DamagedStore
        If a table was changed, is of other items, or holds a text that is not one printable line.
    """
    store = ResultStore(folder, NAMES)
    rows = {
        name: read_added(store, name, columns)
        for name, columns in (
            (NAMES_FILE, NAME_COLUMNS),
            (DETECTION_FILE, DETECTION_COLUMNS),
            (SOURCES_FILE, SOURCE_COLUMNS),
        )
    }
    scores: dict[tuple[int, str], list[Detection]] = {}
    wanted = [field.name for field in fields(Detection)]
    for row in rows[DETECTION_FILE]:
        _check_text(row, ("judge",), store)
        scores.setdefault((row["latent"], row["given_by"]), []).append(Detection(**{n: row[n] for n in wanted}))
    found: dict[int, list[LatentName]] = {}
    for row in rows[NAMES_FILE]:
        _check_text(row, ("name", "text", "given_by"), store)
        name = LatentName(**row, scores=tuple(scores.get((row["latent"], row["given_by"]), ())))
        found.setdefault(name.latent, []).append(name)
    ordered = {latent: tuple(sorted(names, key=_rank)) for latent, names in found.items()}
    return LatentNames(store.header, ordered, tuple(rows[SOURCES_FILE]))


def read_added(store: ResultStore, name: str, columns: Mapping[str, pa.DataType]) -> list[dict[str, Any]]:
    """The rows of a table that was added to a folder of items; none if it is not there.

    Raises
    ------
    DamagedStore
        If it was changed, lacks a column, or was made for other items.
    """
    path = store.root / name
    if not path.is_file():
        return []
    try:
        table, said = read_sealed(path)
        if said.get("items") != store.header.identity:
            raise ValueError("it is of other items")
        return list(table.select(list(columns)).to_pylist())
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DamagedStore(
            f"{path} is not the table that was written ({' '.join(str(error).split())[:160]}); remove it, and run the "
            f"same cyto concept describe again"
        ) from None


def _rank(name: LatentName) -> tuple[float, str]:
    best = name.best
    return (_UNTESTED if best is None or best.auc is None else -best.auc, name.given_by)


def _check_text(row: Mapping[str, Any], columns: tuple[str, ...], store: ResultStore) -> None:
    for name in columns:
        try:
            if one_line(name, row[name]) != row[name]:
                raise Unfit("it is not as it was written")
        except Unfit as error:
            raise DamagedStore(f"{store.root}: {name} of latent {row['latent']}: {error}") from None
