"""Does a name tell the cells of its latent? A judge sees one picture and one name, and says how well they fit.

Test images are those that no item shows: active ones and matched inactive ones, in an order that says nothing. The
judge learns neither the latent, nor the map, nor how many are active. The same images are also judged by another
latent's name ("shuffled"): what a name scores that does not belong here is the null of this latent and this judge.

Answers are kept in `OUT.answers/detection.jsonl`, so that nothing is asked twice.
"""

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cytosae.maps import Pixels
from stores.errors import DamagedStore
from stores.files import read_lines

from .answers import Answer, Unfit, append_record
from .config import ACTIVE, INACTIVE, LEAST, STRONG, AskConfig
from .scores import LEAST_GROUPS, auc, draw_groups, drawn_auc, drawn_interval, interval, wins
from .sheet import encoded

VERSION = 1
PIXELS = 256  # longer side of a picture that a judge sees
QUESTION = (
    "Each picture shows a cell under the microscope. How well does the name fit what is in the picture? For each "
    "picture give a number from 0 (it does not fit) to 1 (it fits), or true and false, or null if you cannot say."
)
Scores = dict[int, float | None]  # of the test images of a latent, by their number; None: the judge cannot say


@dataclass(frozen=True)
class Task:
    """A name that is judged on the test images of a latent."""

    latent: int  # whose images
    name: str


def shuffled_names(answers: Sequence[Answer], n: int, seed: int) -> dict[int, list[str]]:
    """latent -> the names of `n` other latents of the same source.

    The latents stand in a ring in an order of their hashes, and each takes the next names in it that differ from its
    own: a permutation if all names differ, and one that a further name hardly changes.

    Parameters
    ----------
    answers : of one source, one for each latent
    """

    def key(answer: Answer) -> bytes:
        return hashlib.sha256(f"{seed}\0{answer.latent}".encode()).digest()

    ring = sorted(answers, key=key)
    found: dict[int, list[str]] = {}
    for at, answer in enumerate(ring):
        own, others = {answer.name.casefold()}, list[str]()
        for other in ring[at + 1 :] + ring[:at]:
            if len(others) == n:
                break
            if other.name.casefold() not in own:
                own.add(other.name.casefold())
                others.append(other.name)
        found[answer.latent] = others
    return found


def detection_file(folder: Path) -> Path:
    """Where the answers of judges lie."""
    return folder / "detection.jsonl"


def read_scores(folder: Path, items: str, judge: str) -> dict[Task, Scores]:
    """What a judge has said about these items; later lines replace earlier ones.

    Raises
    ------
    DamagedStore
        If a line is none of ours.
    """
    found: dict[Task, Scores] = {}
    path = detection_file(folder)
    for number, record in enumerate(read_lines(path), start=1):
        try:
            if record["items"] != items or record["judge"] != judge:
                continue
            task = Task(int(record["latent"]), str(record["name"]))
            scores = scores_of({"scores": record["scores"]}, len(record["numbers"]))
            found.setdefault(task, {}).update(zip(map(int, record["numbers"]), scores, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStore(
                f"line {number} of {path} is no answer of a judge ({error!s:.80}); remove that line"
            ) from None
    return found


def keep_scores(
    folder: Path, items: str, judge: str, task: Task, numbers: Sequence[int], scores: Sequence[float | None]
) -> None:
    """Append one answer of a judge."""
    record = {"version": VERSION, "items": items, "judge": judge, "latent": task.latent, "name": task.name}
    append_record(detection_file(folder), {**record, "numbers": [*numbers], "scores": [*scores]})


def request_of(task: Task, pictures: Sequence[Pixels]) -> dict[str, Any]:
    """What a judge is asked: a name, and pictures without maps."""
    return {
        "task": "detect",
        "version": VERSION,
        "question": QUESTION,
        "name": task.name,
        "pictures": [
            {"number": n, "media_type": "image/jpeg", "base64": _jpeg(each)} for n, each in enumerate(pictures, start=1)
        ],
        "answer": {"scores": "a list with a number from 0 to 1, true, false or null for each picture, in order"},
    }


def scores_of(answer: Mapping[str, Any], n: int) -> list[float | None]:
    """The scores in a judge's answer.

    Raises
    ------
    Unfit
        If there is not one number from 0 to 1, true, false or null for each of `n` pictures.
    """
    said = answer.get("scores")
    if not isinstance(said, list):
        raise Unfit("it has no list 'scores'")
    if len(said) != n:
        raise Unfit(f"it has {len(said):,} scores for {n:,} pictures")
    found: list[float | None] = []
    for each in said:
        if each is not None and not isinstance(each, bool | int | float):
            raise Unfit(f"a score is {each!r:.20}, expected 0 to 1, true, false or null")
        if each is not None and not 0 <= each <= 1:
            raise Unfit(f"a score is {each!r:.20}, expected 0 to 1")
        found.append(None if each is None else float(each))
    return found


def missing(task: Task, known: Mapping[Task, Scores], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The test images of a task that the judge has not been asked about."""
    scores = known.get(task, {})
    return [row for row in rows if row["number"] not in scores]


def _jpeg(picture: Pixels) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    return base64.b64encode(encoded(image, "JPEG")).decode()


# ------------------------------------------------------------------------------------------------------ figures


def detection_rows(
    named: Sequence[Answer],
    others: Mapping[tuple[str, int], Sequence[str]],
    tests: Mapping[int, Sequence[dict[str, Any]]],
    reasons: Mapping[int, str | None],
    known: Mapping[Task, Scores],
    judge: str,
    config: AskConfig,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row for each name, a row for each source) with scores, their intervals, and those of other latents' names.

    Parameters
    ----------
    named : current answers that have a name
    others : (given_by, latent) -> names of other latents
    tests : latent -> its test images; without those whose picture is lost
    """
    found: list[dict[str, Any]] = []
    tested: dict[str, list[tuple[_Figures, _Null | None]]] = {}
    for answer in named:
        rows = tests.get(answer.latent, ())
        said = known.get(Task(answer.latent, answer.name), {})
        own = _figures(rows, said, config)
        reason = reasons.get(answer.latent) or (own.reason if said else "not tested yet")
        names = others.get((answer.given_by, answer.latent), ())
        null = _null_of([_figures(rows, known.get(Task(answer.latent, name), {}), config) for name in names])
        row = {"latent": answer.latent, "given_by": answer.given_by, "name": answer.name, "judge": judge}
        row |= own.to_row() | {"reason": reason}
        row["against"] = LEAST if any(each["row"] == LEAST for each in rows) else INACTIVE
        row |= {f"{what}{end}": None for what in ("shuffled", "difference") for end in ("", "_low", "_high")}
        if reason is None:
            tested.setdefault(answer.given_by, []).append((own, null))
        if reason is None and null is not None:
            row |= {"shuffled": null.auc, "difference": own.auc - null.auc}
            if own.has_interval:
                row["shuffled_low"], row["shuffled_high"] = interval(null.auc, null.drawn, own.n_active, own.n_inactive)
                row["difference_low"], row["difference_high"] = drawn_interval(own.drawn - null.drawn) or (None, None)
        found.append(row)
    sources = [
        _source_row(name, judge, tested[name], [row for row in found if row["given_by"] == name], config)
        for name in sorted(tested)
    ]
    return found, sources


@dataclass(frozen=True)
class _Figures:
    """The scores of one name on the test images of one latent."""

    n_active: int = 0
    n_inactive: int = 0
    n_groups: int = 0
    n_failed: int = 0
    auc: float = math.nan
    auc_strong: float | None = None
    drawn: Any = None
    has_interval: bool = False
    reason: str | None = None

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"n_active": self.n_active, "n_inactive": self.n_inactive, "n_patients": self.n_groups}
        row |= {"auc": None, "auc_low": None, "auc_high": None, "auc_strong": None, "n_failed": self.n_failed}
        if self.reason is None:
            row |= {"auc": self.auc, "auc_strong": self.auc_strong}
            if self.has_interval:
                row["auc_low"], row["auc_high"] = interval(self.auc, self.drawn, self.n_active, self.n_inactive)
        return row


@dataclass(frozen=True)
class _Null:
    """What other latents' names score on the same images, on average."""

    auc: float
    drawn: Any


def _figures(rows: Sequence[dict[str, Any]], said: Scores, config: AskConfig) -> _Figures:
    judged = [row for row in rows if said.get(row["number"]) is not None]
    scores = np.array([said[row["number"]] for row in judged], np.float64)
    groups, group = np.unique([row["patient_group"] for row in judged], return_inverse=True)
    is_active = np.array([row["row"] in ACTIVE for row in judged], bool)
    is_strong = np.array([row["row"] == STRONG for row in judged], bool)
    n_active, n_inactive = int(is_active.sum()), int((~is_active).sum())
    counted = _Figures(n_active, n_inactive, len(groups), len(rows) - len(judged))
    if n_active < 2 or n_inactive < 2:
        why = f"{n_active} active and {n_inactive} inactive images were judged, 2 of each are needed"
        return replace(counted, reason=why)
    won = wins(scores[is_active], scores[~is_active])
    draws = draw_groups(groups, config.n_bootstraps, config.seed)
    drawn = drawn_auc(won, group[is_active], group[~is_active], draws)
    return replace(
        counted,
        auc=float(won.mean()),
        auc_strong=auc(scores[is_strong], scores[~is_active]) if is_strong.any() else None,
        drawn=drawn,
        has_interval=len(groups) >= LEAST_GROUPS,
    )


def _null_of(figures: Sequence[_Figures]) -> "_Null | None":
    """The mean over other latents' names; None if none of them was judged."""
    judged = [each for each in figures if each.reason is None]
    if not judged:
        return None
    return _Null(float(np.mean([each.auc for each in judged])), np.mean([each.drawn for each in judged], axis=0))


def _source_row(
    name: str,
    judge: str,
    tested: Sequence[tuple[_Figures, "_Null | None"]],
    rows: Sequence[dict[str, Any]],
    config: AskConfig,
) -> dict[str, Any]:
    """Means over the latents of a source; intervals from draws of patients and of latents together."""
    row: dict[str, Any] = {"given_by": name, "judge": judge, "n_names": len(tested)}
    row["n_supported"] = sum(map(row_is_supported, rows))
    pairs = [(own, null) for own, null in tested if null is not None]
    of = {
        "auc": [(own.auc, own.drawn) for own, _ in tested],
        "shuffled": [(null.auc, null.drawn) for _, null in pairs],
        "difference": [(own.auc - null.auc, own.drawn - null.drawn) for own, null in pairs],
    }
    has_interval = all(own.has_interval for own, _ in tested)
    for what, figures in of.items():
        row |= dict.fromkeys((what, f"{what}_low", f"{what}_high"))
        if figures:
            row[what] = float(np.mean([value for value, _ in figures]))
        if figures and has_interval:
            drawn = np.array([each for _, each in figures])  # (latents, draws)
            picked = np.random.default_rng([config.seed, 2]).integers(len(drawn), size=drawn.T.shape)
            means = _mean(drawn.T[np.arange(drawn.shape[1])[:, None], picked])
            row[f"{what}_low"], row[f"{what}_high"] = drawn_interval(means) or (None, None)
    return row


def _mean(values: Any) -> Any:
    """Mean over the columns, of those that are defined."""
    known = np.isfinite(values)
    return np.divide(
        np.where(known, values, 0).sum(1), known.sum(1), out=np.full(len(values), np.nan), where=known.any(1)
    )


def row_is_supported(row: Mapping[str, Any]) -> bool:
    """Are both lower ends above what guessing and other latents' names give?"""
    low, difference = row["auc_low"], row["difference_low"]
    return low is not None and difference is not None and low > 0.5 and difference > 0


def batches(rows: Sequence[dict[str, Any]], size: int) -> Iterator[Sequence[dict[str, Any]]]:
    """The rows in groups of `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
