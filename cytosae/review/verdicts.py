"""Verdicts on disk: one journal per reviewer, in a folder beside the atlas, so that a new atlas keeps them.

Append-only JSON lines; each is synced to disk before the page confirms it. The last verdict of a reviewer on an item
counts; earlier ones are kept. A withdrawal is a line with the verdict "": none counts then. Format "reviews", version 2
(a line is of version 1 unless it is a withdrawal, which a program of version 1 would count): docs/formats.md.
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from stores.destination import claimed
from stores.errors import BadInput, DamagedStore, SpecMismatch, StoreNotFound
from stores.files import append_line, is_dropping, read_lines, sync_folder, write_atomic
from stores.tables import csv_bytes, parquet_bytes

from .questions import ANSWERS, Item, Question, Review

VERSION = 2  # of a withdrawal
_VERSION_OF_VERDICT = 1
WITHDRAWN = ""  # the verdict of a withdrawal
_LONGEST = {"reviewer": 80, "name": 200, "notes": 10_000}  # characters
_COLUMNS = {
    **{name: pa.string() for name in ("reviewer", "question", "a", "b", "item")},
    "latent": pa.int64(),
    "cluster": pa.int64(),  # of the selection
    "group": pa.string(),  # of a comparison: a, b or decoy
    **{name: pa.string() for name in ("verdict", "name")},
    "confidence": pa.int64(),
    **{name: pa.string() for name in ("notes", "time")},
    **{name: pa.bool_() for name in ("is_blinded", "is_current", "is_asked")},
    **{name: pa.string() for name in ("concepts", "comparison", "atlas")},
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict of one reviewer on one item at one time, with the context of the question: a line of a journal."""

    time: str  # ISO 8601, UTC
    reviewer: str
    item: str
    question: str
    latent: int
    concepts: str  # identities
    comparison: str | None
    a: str
    b: str
    atlas: str
    is_blinded: bool
    verdict: str  # "" of a withdrawal
    name: str  # the reviewer's name for the concept
    notes: str
    confidence: int | None  # 1 (a guess) to 5 (certain)


def new_verdict(said: dict[str, Any], review: Review, *, is_blinded: bool) -> Verdict:
    """A checked verdict from what a page sent, with the context of the question.

    Raises
    ------
    BadInput
        If a field is missing or not valid.
    """
    question, item = _asked(said, review)
    verdict, confidence = said.get("verdict"), said.get("confidence")
    if verdict not in question.choices:
        raise BadInput(f"verdict must be one of {', '.join(question.choices)}; found {str(verdict)[:40]!r}")
    if confidence is not None and (type(confidence) is not int or not 1 <= confidence <= 5):
        raise BadInput(f"confidence must be a whole number from 1 to 5, or null; found {str(confidence)[:40]!r}")
    return Verdict(
        **_context(said, review, question, item, is_blinded=is_blinded),
        verdict=str(verdict),
        name=_text("name", said.get("name", "")),
        notes=_text("notes", said.get("notes", "")),
        confidence=confidence,
    )


def withdrawal(said: dict[str, Any], review: Review, *, is_blinded: bool) -> Verdict:
    """What takes back the verdict of a reviewer on an item, from what a page sent.

    Raises
    ------
    BadInput
        If the atlas does not ask about that item, or the reviewer has no name.
    """
    question, item = _asked(said, review)
    context = _context(said, review, question, item, is_blinded=is_blinded)
    return Verdict(**context, verdict=WITHDRAWN, name="", notes="", confidence=None)


def _asked(said: dict[str, Any], review: Review) -> tuple[Question, Item]:
    found = review.find(str(said.get("item")))
    if found is None:
        raise BadInput("this atlas does not ask about that item; load the page again")
    return found


def _context(
    said: dict[str, Any], review: Review, question: Question, item: Item, *, is_blinded: bool
) -> dict[str, Any]:
    """When, by whom, about what, and of which atlas."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "reviewer": reviewer_name(said.get("reviewer")),
        "item": item.item,
        "question": question.question,
        "latent": item.latent,
        "concepts": question.concepts,
        "comparison": question.comparison,
        "a": question.a,
        "b": question.b,
        "atlas": review.atlas,
        "is_blinded": is_blinded,
    }


def reviewer_name(said: object) -> str:
    """The normalized name of a reviewer: Unicode NFC, single spaces.

    Raises
    ------
    BadInput
        If it is empty, too long or not printable.
    """
    name = " ".join(unicodedata.normalize("NFC", _text("reviewer", said)).split())
    if not name or not name.isprintable():
        raise BadInput(f"reviewer must be a name of printable letters; found {name!r}")
    return name


def journal(folder: Path, reviewer: str) -> Path:
    """The journal of a reviewer, named by a hash, since not every name is a valid file name."""
    return folder / f"{hashlib.sha256(reviewer.encode()).hexdigest()[:32]}.jsonl"


def default_reviews(site: Path) -> Path:
    """Where verdicts on an atlas lie unless another folder is named: beside it, so that a new atlas keeps them."""
    site = site.absolute()
    return site.with_name(f"{site.name}.reviews")


def save_verdict(folder: Path, verdict: Verdict) -> None:
    """Append a verdict to its reviewer's journal, synced to disk. Only one process may write at a time.

    Raises
    ------
    OSError
        If it could not be written: disk full, read-only or lost.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    path = journal(folder, verdict.reviewer)
    read_lines(path, mend=True, skip_damaged=True)  # an incomplete last line, from a crash, must not corrupt this one
    version = VERSION if verdict.verdict == WITHDRAWN else _VERSION_OF_VERDICT
    append_line(path, {"version": version, **asdict(verdict)})


def read_verdicts(folder: Path) -> list[Verdict]:
    """All verdicts of all reviewers, including replaced ones; for each reviewer in the order of saving.

    Raises
    ------
    StoreNotFound
        If there is no such folder.
    DamagedStore
        If a journal contains a line that is no verdict; an incomplete last line is left out.
    SpecMismatch
        If a newer version of cyto wrote it.
    """
    if not folder.is_dir():
        raise StoreNotFound(f"no reviews at {folder}; cyto atlas serve takes some")
    journals = [path for path in sorted(folder.glob("*.jsonl")) if not is_dropping(path.name)]
    return [verdict for path in journals for verdict in _read_journal(path, folder)]


def read_verdicts_of(folder: Path, reviewer: str) -> list[Verdict]:
    """The verdicts of one reviewer; see `read_verdicts`."""
    return _read_journal(journal(folder, reviewer), folder)


def current(verdicts: Iterable[Verdict]) -> dict[tuple[str, str], Verdict]:
    """(reviewer, item) -> the last verdict, the one that counts; nothing of an item whose verdict was withdrawn."""
    last = {(verdict.reviewer, verdict.item): verdict for verdict in verdicts}
    return {key: verdict for key, verdict in last.items() if verdict.verdict != WITHDRAWN}


def verdict_table(verdicts: list[Verdict], review: Review, *, history: bool = False) -> pa.Table:
    """The current verdicts, or with `history` all, joined with the hidden answers; columns: docs/review.md.

    Ordered by reviewer; `is_asked` is false if the atlas does not ask about the item (any more).
    """
    counting = current(verdicts)
    rows = []
    for verdict in sorted(verdicts, key=lambda verdict: verdict.reviewer):  # stable: else in the order of saving
        is_current = counting.get((verdict.reviewer, verdict.item)) is verdict
        if history or is_current:
            rows.append(asdict(verdict) | {"is_current": is_current} | _key(review.find(verdict.item)))
    return pa.Table.from_pylist(rows, pa.schema(list(_COLUMNS.items())))


def write_verdict_table(table: pa.Table, path: Path, *, overwrite: bool = False) -> None:
    """Write the table as .csv (cells that look like formulas are escaped) or .parquet.

    Raises
    ------
    BadInput
        If the name ends otherwise, or the file is there (and not `overwrite`).
    """
    if path.suffix not in (".csv", ".parquet"):
        raise BadInput(f"{path} must end with .csv or .parquet")
    with claimed(path):
        if path.exists() and not overwrite:
            raise BadInput(f"{path} is there already; choose another output, or add --overwrite to replace it")
        write_atomic(path, csv_bytes(table) if path.suffix == ".csv" else parquet_bytes(table))


def _key(found: tuple[Question, Item] | None) -> dict[str, Any]:
    if found is None:
        return {"cluster": None, "group": None, "is_asked": False}
    return {"cluster": found[1].cluster, "group": found[1].group or None, "is_asked": True}


def _text(name: str, said: object) -> str:
    if not isinstance(said, str) or len(said) > _LONGEST[name]:
        found = f"{len(said):,} letters" if isinstance(said, str) else f"{said!r:.40}"
        raise BadInput(f"{name} must be a text of at most {_LONGEST[name]:,} letters; found {found}")
    try:
        said.encode()
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
        raise BadInput(f"{name} holds what is no letter: half of a surrogate pair") from None
    return said.strip()


def _read_journal(path: Path, folder: Path) -> list[Verdict]:
    found = []
    for number, record in enumerate(read_lines(path), start=1):
        where = f"line {number} of {path}"
        version = record.get("version")
        if type(version) is int and version > VERSION:
            raise SpecMismatch(f"{where}: reviews version {version} are newer than this cyto; upgrade cyto")
        verdict = _verdict(record, where)
        if journal(folder, verdict.reviewer) != path:
            raise DamagedStore(f"{where} is by {verdict.reviewer!r}, whose reviews are in another file; remove one")
        found.append(verdict)
    return found


def _verdict(record: dict[str, Any], where: str) -> Verdict:
    for field in fields(Verdict):
        value = record.get(field.name)
        if field.name not in record or not isinstance(value, field.type):  # type: ignore[arg-type]  # plain types only
            raise DamagedStore(
                f"{where} is not a review: its {field.name} is {value!r:.40}; repair or remove that line"
            )
    verdict = Verdict(**{field.name: record[field.name] for field in fields(Verdict)})
    answers = ANSWERS.get(verdict.question)
    if answers is not None and verdict.verdict not in (*answers, WITHDRAWN):  # it would count nowhere, without a word
        raise DamagedStore(
            f"{where} is not a review: its verdict is {verdict.verdict!r:.40}, not one of {', '.join(answers)}; repair "
            f"or remove that line"
        )
    return verdict
