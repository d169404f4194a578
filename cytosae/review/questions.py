"""The questions of a review: their order, and which fields a reviewer may see. Reads review.json of an atlas."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stores.errors import DamagedStore
from stores.result_folder import ResultStore
from stores.spec import ATLAS
from stores.wording import plain_text

from .items import REVIEW_FILE, REVIEW_PICTURES

LISTED, DECOY = ("a", "b"), "decoy"
MEANINGFUL = {"meaningful": "meaningful", "not": "not meaningful", "unsure": "unsure"}  # answer -> as pages say it
ANSWERS = {"meaningful": tuple(MEANINGFUL), "specific": (*LISTED, "neither", "unsure")}


@dataclass(frozen=True, kw_only=True)
class Item:
    """A latent that is asked about; `group` is the hidden answer: the top list that contains it."""

    item: str
    latent: int
    cluster: int | None = None  # of the selection
    group: str = ""  # of a comparison: a, b or decoy
    n_images: int = 0  # of a comparison: images in which the latent is active


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, asked about many latents."""

    question: str  # meaningful, or specific
    concepts: str  # identities
    comparison: str | None = None
    a: str = ""  # the diseases of a comparison
    b: str = ""
    n_without_images: int = 0  # latents that are not asked about: there is nothing to show
    cluster_sizes: tuple[int, ...] = ()  # of the selection: latents of each cluster, drawn or not; none: not known
    items: tuple[Item, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """The possible verdicts."""
        return ANSWERS[self.question]

    @property
    def title(self) -> str:
        """A short title."""
        return "Meaningful concepts" if self.question == "meaningful" else f"{self.a} against {self.b}"


@dataclass(frozen=True)
class Review:
    """All questions of the review of an atlas."""

    atlas: str  # identity
    questions: tuple[Question, ...]
    evidence: dict[int, dict[str, Any]]  # by latent, as in review.json

    def find(self, item: str) -> tuple[Question, Item] | None:
        """An item by its id; None if the atlas does not ask about it."""
        return self._by_name.get(item)

    @cached_property
    def _by_name(self) -> dict[str, tuple[Question, Item]]:
        return {item.item: (question, item) for question in self.questions for item in question.items}


def read_review(site: Path) -> Review:
    """The review of the atlas in the folder `site`; without questions if it was built without any.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch
        If there is no finished atlas of a version that this program reads.
    DamagedStore
        If review.json is not what was written, or not a review.
    """
    results = ResultStore(site, ATLAS)
    if f"{REVIEW_FILE}.json" not in (results.header.summary or {}).get("files", {}):
        return Review(results.header.identity, (), {})
    content = results.json(REVIEW_FILE)
    try:
        questions = tuple(_question(found) for found in content["questions"])
        evidence = {int(latent): found for latent, found in content["latents"].items()}
        review = Review(results.header.identity, questions, evidence)
        for question in questions:
            sent(review, question, "", seed=0, shows_labels=True)  # raises if a field is missing
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        where = f"{results.root / REVIEW_FILE}.json"
        raise DamagedStore(
            f"{where} is not a review ({error!r}); cyto atlas build --overwrite makes it again"
        ) from None
    return review


def sent(review: Review, question: Question, reviewer: str, *, seed: int, shows_labels: bool) -> dict[str, Any]:
    """The part of a question that is sent to the page of a reviewer: plain JSON values, items in this reviewer's order.

    The order is a keyed hash: random, but equal at every visit, and new items do not change the order of the others.
    Without labels, latent, cluster, list, names of datasets and labels of images are not sent. The names of the two
    diseases are, as part of the question.
    """
    items = sorted(
        question.items, key=lambda item: hashlib.sha256(f"{seed}\0{reviewer}\0{item.item}".encode()).digest()
    )
    return {
        "question": question.question,
        "title": plain_text(question.title),
        "a": plain_text(question.a),
        "b": plain_text(question.b),
        "choices": question.choices,
        "items": [_sent_item(item, review.evidence[item.latent], shows_labels) for item in items],
    }


def _sent_item(item: Item, evidence: dict[str, Any], shows_labels: bool) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {
            "title": plain_text(str(row["dataset"])) if shows_labels else f"Set {number}",
            "images": [_sent_image(image, shows_labels) for image in row["images"]],
        }
        for number, row in enumerate(evidence["rows"], start=1)
    ]
    if evidence.get("range"):
        title = "From its whole range: an image of each tenth of its activation, the strongest first"
        images = [_sent_image(image, shows_labels) for image in evidence["range"]]
        rows.append({"title": title, "images": images, "is_range": True})
    latent = item.latent if shows_labels else None
    return {"item": item.item, "latent": latent, "largest": float(evidence["largest"]), "rows": rows}


def _sent_image(image: dict[str, Any], shows_labels: bool) -> dict[str, Any]:
    file = image["file"]
    return {
        "src": None if file is None else f"{REVIEW_PICTURES}/{file}",
        "patches": str(image["patches"]),
        "label": plain_text(image["label"] or "no label") if shows_labels else None,
    }


def _question(found: dict[str, Any]) -> Question:
    asked = found["question"]
    if asked not in ANSWERS:
        raise ValueError(f"unknown question {asked!r}")
    is_pair = asked == "specific"
    items = tuple(
        Item(
            item=str(item["item"]),
            latent=int(item["latent"]),
            cluster=None if is_pair else int(item["cluster"]),
            group=str(item["group"]) if is_pair else "",
            n_images=int(item["n_images"]) if is_pair else 0,
        )
        for item in found["items"]
    )
    return Question(
        question=asked,
        concepts=str(found["concepts"]),
        comparison=str(found["comparison"]) if is_pair else None,
        a=str(found["a"]) if is_pair else "",
        b=str(found["b"]) if is_pair else "",
        n_without_images=int(found["n_without_images"]),
        cluster_sizes=() if is_pair else tuple(int(size) for size in found.get("cluster_sizes", ())),
        items=items,
    )
