"""Names that others have given: from a command, a table of a colleague, or the review of an atlas; and their journal.

Every answer is one JSON line in `OUT.answers/names.jsonl`, beside the folder of items, so that items can be made again
without losing what people have said. The last answer of a source on a latent counts; sources stand side by side.

An answer is text of strangers: one printable line of bounded length, without control or bidirectional characters.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.files import append_line, parse_json, read_lines, read_regular, sync_folder
from stores.tables import column, listed, read_table_file

COMMAND, TABLE, REVIEW = "command", "table", "review"  # kinds of sources
ITEM, ELSEWHERE = "item", "elsewhere"  # what the source has seen
VERSION = 1
KEY = 16  # letters of an identity, in a table that people fill in
LONGEST = {"name": 200, "text": 2_000, "given_by": 80, "judge": 80, "given_at": 40}  # letters
_MOST_BYTES = 64 << 20  # of a table of answers
_FORMULA = re.compile(r"^'(?=\s*[=+\-@\t\r])")  # the apostrophe that a .csv of ours puts before a formula


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one source says about one latent: a line of the journal. An empty name: nothing in common was seen."""

    latent: int
    name: str
    text: str
    given_by: str
    source: str  # command, table or review
    given_at: str | None  # ISO 8601
    confidence: int | None  # 1 (a guess) to 5 (certain)
    saw: str  # item: the source was shown this folder's item; elsewhere: another page, or unknown
    items: str  # identity of the folder of items


class Unfit(ValueError):
    """An answer that is not taken; the text says why."""


def answer_of(
    said: dict[str, Any], *, latent: int, given_by: str, source: str, given_at: str | None, saw: str, items: str
) -> Answer:
    """A checked answer.

    Raises
    ------
    Unfit
        If the name is missing, too long or holds control characters; or text or confidence are not as asked.
    """
    if "name" not in said:
        raise Unfit("it has no 'name'")
    return Answer(
        latent=latent,
        name=one_line("name", said["name"] if said["name"] is not None else ""),
        text=one_line("text", said.get("text") or "", folds=True),
        given_by=source_name(given_by),
        source=source,
        given_at=given_at,
        confidence=_confidence(said.get("confidence")),
        saw=saw,
        items=items,
    )


def one_line(what: str, said: object, *, folds: bool = False) -> str:
    """A text of others as one printable line in NFC with single spaces.

    folds : line breaks and tabs become spaces; else they are refused as all other control characters are

    Raises
    ------
    Unfit
        If it is no text, too long, or not printable.
    """
    if not isinstance(said, str):
        raise Unfit(f"its {what} is {type(said).__name__}, expected a text")
    if len(said) > LONGEST[what]:
        raise Unfit(f"its {what} has {len(said):,} letters, at most {LONGEST[what]:,} are taken")
    text = unicodedata.normalize("NFC", said.strip())
    if not folds and any(unicodedata.category(letter) == "Cc" for letter in text):
        raise Unfit(f"its {what} holds control characters")
    text = " ".join(text.split())
    if not text.isprintable():
        raise Unfit(f"its {what} holds characters that are not printable")
    if len(text) > LONGEST[what]:  # NFC lengthens a few letters
        raise Unfit(f"its {what} has {len(text):,} letters, at most {LONGEST[what]:,} are taken")
    return text


def source_name(said: object) -> str:
    """The name of who answers.

    Raises
    ------
    Unfit
        If it is empty, too long or not printable.
    """
    name = one_line("given_by", said)
    if not name:
        raise Unfit("its given_by is empty")
    return name


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ----------------------------------------------------------------------------------------------------- journal


def journal_file(folder: Path) -> Path:
    """Where the answers lie."""
    return folder / "names.jsonl"


def default_answers(out: Path) -> Path:
    """The folder of the journals: beside that of the items."""
    out = out.absolute()
    return out.with_name(f"{out.name}.answers")


def keep(folder: Path, answers: Iterable[Answer]) -> None:
    """Append answers to the journal, each synced to disk. Only one process may write at a time."""
    for answer in answers:
        append_record(journal_file(folder), {"version": VERSION, **asdict(answer)})


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a line to a journal, which begins with its folder."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        sync_folder(path.parent.parent)
    append_line(path, record)


def read_answers(folder: Path) -> list[Answer]:
    """All answers in the order in which they came.

    Raises
    ------
    DamagedStore
        If a line is no answer.
    SpecMismatch
        If a newer version of cyto wrote it.
    """
    path = journal_file(folder)
    return [_answer(record, f"line {n} of {path}") for n, record in enumerate(read_lines(path), start=1)]


def current(answers: Iterable[Answer]) -> dict[tuple[int, str], Answer]:
    """(latent, given_by) -> the last answer, the one that counts."""
    return {(answer.latent, answer.given_by): answer for answer in answers}


def _answer(record: dict[str, Any], where: str) -> Answer:
    version = record.get("version")
    if type(version) is int and version > VERSION:
        raise SpecMismatch(f"{where}: answers version {version} are newer than this cyto; upgrade cyto")
    try:
        found = Answer(**{field.name: record[field.name] for field in fields(Answer)})
        if type(found.latent) is not int or found.latent < 0:
            raise Unfit(f"its latent is {found.latent!r:.40}")
        checked = answer_of(asdict(found), **{name: getattr(found, name) for name in _CONTEXT})
        if checked != found or not isinstance(found.items, str):
            raise Unfit("its texts are not as they are written")
    except (KeyError, Unfit, TypeError) as error:
        raise DamagedStore(f"{where} is no answer ({error!s:.100}); repair or remove that line") from None
    return found


_CONTEXT = ("latent", "given_by", "source", "given_at", "saw", "items")


def _confidence(said: object) -> int | None:
    if said is None or said == "":
        return None
    if isinstance(said, str) and said.strip().isdecimal() and len(said) <= 9:  # of thousands of digits int() makes none
        said = int(said)
    if type(said) is not int or not 1 <= said <= 5:
        raise Unfit(f"its confidence is {said!r:.20}, expected 1 to 5")
    return said


# ------------------------------------------------------------------------------------------------ tables of others


@dataclass(frozen=True)
class TableAnswers:
    """What a file holds: answers, and rows that are not taken, each with the reason."""

    answers: list[Answer]
    n_empty: int  # rows without a name
    unfit: list[str]


def read_table(path: Path, *, given_by: str | None, items: str, concepts: str, latents: Sequence[int]) -> TableAnswers:
    """The names in a .csv, .parquet or .json file of a colleague, or in what `cyto atlas export` has written.

    Parameters
    ----------
    given_by : for rows that do not say it
    items : identity of the items; rows that begin with it in a column items, as `answers.csv` has, are of who saw them
    concepts : identity of the concepts; names of a review of others are not taken
    latents : those of the items; names of others are not taken

    Raises
    ------
    BadInput
        If it cannot be read, or lacks a column.
    """
    rows = _rows(path)
    is_review = bool(rows) and {"reviewer", "verdict"} <= rows[0].keys()
    known = {*latents}
    answers: list[Answer] = []
    unfit: list[str] = []
    n_empty = 0
    for number, row in enumerate(rows, start=1):
        name = row.get("name")
        if name is None or (isinstance(name, str) and not name.strip()):
            n_empty += 1
            continue
        try:
            if is_review and str(row.get("concepts") or concepts) != concepts:
                raise Unfit("it is about latents of other concepts")
            if is_review and str(row.get("is_current") or "true").lower() in ("false", "0"):
                continue
            latent = _latent(row.get("latent"))
            if latent not in known:
                raise Unfit(f"latent {latent} is none of these items")
            who = row.get("reviewer" if is_review else "given_by") or given_by
            if who is None:
                raise Unfit("it does not say who gave the name: add a column given_by, or give --by")
            when = row.get("time" if is_review else "given_at")
            answers.append(
                answer_of(
                    {
                        "name": _unescaped(name),
                        "text": _unescaped(row.get("notes" if is_review else "text") or ""),
                        "confidence": row.get("confidence"),
                    },
                    latent=latent,
                    given_by=_unescaped(who),
                    source=REVIEW if is_review else TABLE,
                    given_at=None if when is None else one_line("given_at", str(when)),
                    saw=ITEM if not is_review and row.get("items") == items[:KEY] else ELSEWHERE,
                    items=items,
                )
            )
        except Unfit as error:
            unfit.append(f"row {number} of {path.name}: {error}")
    return TableAnswers(answers, n_empty, unfit)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".json":
        try:
            found = parse_json(read_regular(path, most_bytes=_MOST_BYTES))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise BadInput(f"{path} is no list of answers; expected [{{'latent': 17, 'name': ..., 'given_by': ...}}]")
        names = {name for row in found for name in row}
    else:
        table = read_table_file(path)
        names = {*table.column_names}
        cells = {name: column(table, name) for name in table.column_names}
        found = [{name: values[n] for name, values in cells.items()} for n in range(table.num_rows)]
    if found and not {"latent", "name"} <= names:
        raise BadInput(f"{path} has {listed(sorted(names))}; expected the columns latent and name")
    return list(found)


def _latent(said: object) -> int:
    text = str(said).strip().removesuffix(".0")
    if isinstance(said, bool) or not text.isdecimal() or len(text) > 9:
        raise Unfit(f"its latent is {said!r:.40}, expected a number")
    return int(text)


def _unescaped(text: object) -> Any:
    return _FORMULA.sub("", text) if isinstance(text, str) else text
