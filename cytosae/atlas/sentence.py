"""A latent in one sentence of plain words, made from its numbers; each part says where on the page its evidence is.

A part is there only if its numbers are: no artefact, no claim. What was looked for and not found is said as well.
Twin: test_sentence.py has every part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .lies_on import ON, Share, on
from .site import share, short

ALPHA = 0.05  # of p and q
_ALMOST, _MOSTLY = 0.85, 0.6  # shares of the labelled reference images
_LEAST_LABELS = 5  # labelled reference images from which on "mostly" is said
_WIDE, _FEW = 0.6, 0.1  # shares of the patches
_MIDDLE, _BORDER = 0.5, 0.75  # shares of the activation; by area a quarter, and seven sixteenths
PLACES = ("", "middle", "border", "here and there", "all over", "same patch")  # as in gallery.js
SAME_PATCH = 5  # in `PLACES`
_SAME_PATCH = 0.8  # of the reference images
_LEAST_PATCHES = 64  # of a map; in fewer the same one is no wonder
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Clause:
    """A part of the sentence."""

    text: str
    link: str  # of its evidence: "#..." on the page


@dataclass(frozen=True)
class Place:
    """Where in its reference images a latent is active, means over these images."""

    patches: float  # share of the patches with at least a quarter of the image's largest value
    middle: float  # share of the activation in the middle half of both directions
    border: float  # share outside the middle three quarters of both directions


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a latent. Empty or None: there is no such artefact, or it does not have the latent."""

    statistics: Sequence[Row]  # by dataset: dataset, n_images, frequency, label_divergence_q
    labels: Sequence[str]  # of the reference images of all datasets; "" without a label
    place: Place | None = None
    same_patch: tuple[int, int] | None = None  # of `same_patch_of`
    lies_on: Share | None = None  # of `PatchKinds.share`
    masks: Sequence[Row] = ()  # class, auroc, auroc_p_any
    n_patients: int = 0  # with a barcode
    n_above: int = 0  # of these, with a value above 0
    comparisons: Sequence[Row] = ()  # pair (a, b, mix), mean_a, mean_b, q
    replications: Sequence[Row] = ()  # p_holm, same_sign, is_replicated
    n_found: int | None = None  # other SAEs that have it, too
    n_others: int = 0
    causes: Sequence[Row] = ()  # quantity, p
    morans_i: float | None = None
    morans_chance: float = 0.0  # what 95% of shuffled maps are below
    name: Row | None = None  # name, given_by, is_tested, is_supported


def sentence(facts: Facts) -> list[Clause]:
    """The parts of the sentence, in the order in which they are read; of a latent that is never active only this."""
    active = [row for row in facts.statistics if row["n_images"]]
    if not active:
        return [Clause("Never active", "#activation")]
    parts = [Clause(_activity(facts.statistics, active), "#activation")]
    for make, link in (
        (_labels, "#references"),
        (_place, "#references"),
        (_lies_on, "#references"),
        (_same_patch, "#references"),
        (_masks, "#masks"),
        (_patients, "#patients"),
        (_diseases, "#diseases"),
        (_replication, "#replication"),
        (_stability, "#stability"),
        (_cause, "#causes"),
        (_pieces, "#score"),
        (_name, "#names"),
    ):
        parts += [Clause(text, link) for text in make(facts)]
    return parts


def place_of(maps: npt.NDArray[np.uint8]) -> Place | None:
    """From the maps of reference images, (images, patches) with the patches of a square row by row; None: all are 0."""
    values = maps[maps.any(axis=1)].astype(np.float64)
    side = round(maps.shape[1] ** 0.5)
    if not len(values):
        return None
    at = (np.arange(side) + 0.5) / side
    distance = np.maximum(*np.meshgrid(abs(at - 0.5), abs(at - 0.5))).ravel()  # from the centre, in sides
    weight = values / values.sum(axis=1, keepdims=True)
    return Place(
        patches=float((values >= values.max(axis=1, keepdims=True) / 4).mean()),
        middle=float((weight @ (distance < 0.25)).mean()),
        border=float((weight @ (distance > 0.375)).mean()),
    )


def place_word(maps: npt.NDArray[np.uint8]) -> int:
    """Number in `PLACES` of where a latent is active, of maps as of `place_of`; 0: nowhere."""
    place = place_of(maps)
    if place is None:
        return 0
    if same_patch_of(maps) is not None:
        return SAME_PATCH
    if place.patches >= _WIDE:
        return 4
    return 1 if place.middle >= _MIDDLE else 2 if place.border >= _BORDER else 3


def same_patch_of(maps: npt.NDArray[np.uint8]) -> tuple[int, int] | None:
    """In how many reference images, of how many, the largest value is at one and the same patch, and there only.

    None if these are too few (of fewer than five images, or less than four fifths) to speak for a place in the picture
    and not for what is there. Where several patches have the largest value, as over an empty slide, none is the
    strongest. `maps` as of `place_of`.
    """
    values = maps[maps.any(axis=1)]
    if len(values) < _LEAST_LABELS or maps.shape[1] < _LEAST_PATCHES:
        return None
    is_one = (values == values.max(axis=1, keepdims=True)).sum(axis=1) == 1
    most = int(np.bincount(values[is_one].argmax(axis=1), minlength=1).max())
    return (most, len(values)) if most >= _SAME_PATCH * len(values) else None


def _activity(rows: Sequence[Row], active: Sequence[Row]) -> str:
    shares = sorted(row["frequency"] for row in active)
    if len(rows) == 1:
        return f"Active in {share(shares[0])} of the images"
    if len(active) == 1:
        others = "the other dataset" if len(rows) == 2 else f"the other {len(rows) - 1} datasets"
        return f"Active in {share(shares[0])} of the images of {active[0]['dataset']}, in none of {others}"
    span = share(shares[0]) if share(shares[0]) == share(shares[-1]) else f"{share(shares[0])} to {share(shares[-1])}"
    silent = f", and in none of {len(rows) - len(active)} more" if len(active) < len(rows) else ""
    return f"Active in {span} of the images in {len(active)} datasets{silent}"


def _labels(facts: Facts) -> Iterator[str]:
    known = [label for label in facts.labels if label]
    if not known:
        return
    best = min({*known}, key=lambda label: (-known.count(label), label))
    n = known.count(best)
    if len(known) < _LEAST_LABELS:
        of = f"{len(known)} labelled reference image{'s' if len(known) > 1 else ''}"
        which = "the" if len(known) == 1 else "all" if n == len(known) else f"{n} of the"
        yield f"{best} in {which} {of}"
        return
    how = next(
        (word for least, word in ((_ALMOST, "almost only"), (_MOSTLY, "mostly")) if n / len(known) >= least),
        "",
    )
    of = f"({n} of {len(known)} labelled reference images"
    q = [row["label_divergence_q"] for row in facts.statistics if row.get("label_divergence_q") is not None]
    chance = ""
    if q:
        chance = f"; q {short(min(q))}" if min(q) <= ALPHA else f"; chance may give this as well, q {short(min(q))}"
    yield f"strongest {how} in {best} {of}{chance})" if how else f"of several labels, most often {best} {of}{chance})"


def _place(facts: Facts) -> Iterator[str]:
    place = facts.place
    if place is None:
        return
    if place.patches >= _WIDE:
        yield "all over the image"
        return
    size = "at a few patches" if place.patches <= _FEW else f"at {share(round(place.patches, 2))} of the patches"
    where = "mostly in the middle" if place.middle >= _MIDDLE else "mostly at the border"
    yield f"{size}, {where}" if place.middle >= _MIDDLE or place.border >= _BORDER else f"{size} of the image"


def _lies_on(facts: Facts) -> Iterator[str]:
    found = facts.lies_on
    if found is None:
        return
    where = ON[on(found)]
    if where == "the nucleus" and found.nucleus is not None:
        strongest, beside = found.nucleus, f"{share(round(found.nucleus_of_cells, 2))} of all patches on cells"
        yield f"on the nucleus ({share(round(strongest, 2))} of its strongest patches, {beside} in these images)"
        return
    where = "cells and background" if where == "both" else where
    of_all = f"{share(round(found.all, 2))} of all patches of these images"
    yield f"on {where} (background: {share(round(found.strongest, 2))} of its strongest patches, {of_all})"


def _same_patch(facts: Facts) -> Iterator[str]:
    if facts.same_patch is not None:
        how = f"{facts.same_patch[0]} of {facts.same_patch[1]} reference images"
        yield f"strongest at the same patch in {how}, so perhaps a place and nothing in the cell"


def _masks(facts: Facts) -> Iterator[str]:
    if not facts.masks:
        return
    found = [row for row in facts.masks if agrees(row)]
    if found:
        best = max(found, key=lambda row: row["auroc"])
        yield f"on {best['class']} (area under ROC {short(best['auroc'])}, p {short(best['auroc_p_any'])})"
    else:
        yield "on no masked part more than by chance"


def agrees(row: Row) -> bool:
    """Does a latent mark a class of the masks more than by chance? A row of `cyto concept masks`."""
    return row["auroc_p_any"] is not None and row["auroc_p_any"] <= ALPHA and (row["auroc"] or 0) > 0.5


def _patients(facts: Facts) -> Iterator[str]:
    if facts.n_patients:
        yield f"in {facts.n_above:,} of {facts.n_patients:,} patients"


def _diseases(facts: Facts) -> Iterator[str]:
    tested = [row for row in facts.comparisons if row["q"] is not None and row["q"] == row["q"]]
    if not tested:
        return
    best = min(tested, key=lambda row: row["q"])
    if best["q"] > ALPHA:
        yield f"no difference between diseases found (smallest q {short(best['q'])})"
        return
    a, b = (best["mean_a"], best["pair"]["a"]), (best["mean_b"], best["pair"]["b"])
    (high, more), (low, less) = (a, b) if a[0] >= b[0] else (b, a)
    mix = f", {best['pair']['mix']}" if best["pair"].get("mix") else ""
    if low <= 0:
        yield f"in {more} but not in {less} (q {short(best['q'])}{mix})"
        return
    times = high / low
    how = f"{times:.0f} times" if times >= 3 else "twice" if abs(times - 2) < 0.05 else f"{times:.1f} times"
    yield f"{how} as much in {more} as in {less} (q {short(best['q'])}{mix})"


def _replication(facts: Facts) -> Iterator[str]:
    for row in facts.replications:
        p = short(row["p_holm"])
        if row["is_replicated"]:
            yield f"the difference is there in another cohort, too (p {p})"
        elif row["same_sign"]:
            yield f"in another cohort the difference has the same direction, but chance may give it (p {p})"
        else:
            yield "in another cohort the difference has the other direction"


def _stability(facts: Facts) -> Iterator[str]:
    if facts.n_found is not None and facts.n_others:
        yield f"found again in {facts.n_found} of {facts.n_others} other SAE{'s' if facts.n_others > 1 else ''}"


def _cause(facts: Facts) -> Iterator[str]:
    row = next((row for row in facts.causes if row["quantity"] == "cls_change"), None)
    if row is None or row["p"] is None:
        return
    how = "more" if row["p"] <= ALPHA else "no more"
    yield f"changing it changes the backbone's output {how} than changing latents like it does (p {short(row['p'])})"


def _pieces(facts: Facts) -> Iterator[str]:
    if facts.morans_i is not None:
        piece = "in one piece" if facts.morans_i > facts.morans_chance else "scattered"
        yield f"its maps are {piece} (Moran's I {short(facts.morans_i)})"


def _name(facts: Facts) -> Iterator[str]:
    if facts.name is None:
        return
    tested = "the name tells its images" if facts.name["is_supported"] else "the name does not tell its images"
    tested = tested if facts.name["is_tested"] else "the name is not tested"
    yield f"called “{facts.name['name']}” by {facts.name['given_by']}: {tested}"
