"""How the columns of the overview lie in files, so that a page reads little before somebody asks for more.

Up to `_WHOLE` concepts all columns are in data/gallery.js. Of more, gallery.js has the rows of the first cards and what
the chips count; data/gallery-plot.js has what the plot draws, and data/gallery-rest.js the rest, which the page reads
when one scrolls, filters, searches, or orders anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.review import VERDICTS
from stores.wording import plain_text

from .concept_maps import Maps, share_of
from .evidence import EvidenceStores
from .gallery import Gallery
from .lies_on import ON, ONE_PLACE, TURN, on
from .plan import Ints, Plan
from .sentence import PLACES, SAME_PATCH, agrees, place_word
from .site import Site, packed

MAPS_PER_FILE = 16  # a card in view brings those of 15 others: some kilobytes
NEVER = 255  # in a column of bytes: there is none
IS_DIFFERENT = 0.05  # q, as gallery.js
_UNDEFINED = 65535  # in a column of 16 bits
_WHOLE = 4_096  # concepts whose columns are one file: 115 kB
_FIRST = 240  # cards whose rows come first: several screens
_OF_PLOT = ("frequency", "mean", "label")
_Column = npt.NDArray[Any]


def first_order(gallery: Gallery, on: npt.NDArray[np.uint8] | None = None) -> tuple[Ints, Ints]:
    """Positions of the concepts as the overview shows them first, the same cells once; and how many more have them.

    First those on cells, then those on both or not told, then on background, then at one place. Among these of each
    label in turn (the commonest first, none last) the concept with the largest specificity times mean activation:
    strong, and the label's own; those with too few labels for a specificity behind all others. Without labels by mean
    activation. Ties by mean activation, then by number. A concept that is never active has no picture: the end.

    on : (concepts,) of `on_of`; None: not told
    """
    n = len(gallery.mean)
    turn = np.zeros(n, np.int64) if on is None else np.array(TURN, np.int64)[on]
    mean = _mean(gallery).astype(np.float64)  # as the page has it
    key = gallery.specificity.astype(np.float16).astype(np.float64) * mean if gallery.labels else mean
    is_unknown = np.isnan(key)
    key = np.where(is_unknown, -1, key)
    has_picture = np.array([len(numbers) > 0 for numbers in gallery.images], bool)
    best = np.lexsort((np.arange(n), -mean, -key, turn, ~has_picture)).astype(np.int64)
    counts = np.bincount(gallery.label[gallery.label >= 0], minlength=len(gallery.labels))
    place_of = np.append(np.argsort(np.argsort(-counts, kind="stable")), len(counts))[gallery.label]
    rank, seen = np.zeros(n, np.int64), dict[tuple[bool, int, int], int]()
    for at in best.tolist():
        among = (bool(has_picture[at]), int(turn[at]), int(place_of[at]))
        rank[at] = seen[among] = seen.get(among, -1) + 1
    order = np.lexsort((place_of, rank, is_unknown, turn, ~has_picture)).astype(np.int64)
    _, first, repeats = np.unique(gallery.cells[order], return_index=True, return_counts=True)
    by_place = np.argsort(first)
    return order[first[by_place]], repeats[by_place].astype(np.int64) - 1


def write_gallery_data(
    site: Site,
    gallery: Gallery,
    latents: Ints,
    n_latents: int,
    datasets: Sequence[str],
    pairs: Sequence[Mapping[str, str]],
    places: npt.NDArray[np.uint8] | None = None,
    on: npt.NDArray[np.uint8] | None = None,
    parts: tuple[Sequence[str], npt.NDArray[np.uint8]] | None = None,
) -> None:
    """Write data/gallery.js and, of more concepts than it holds, data/gallery-plot.js and data/gallery-rest.js.

    Parameters
    ----------
    latents : the number of each row's latent
    n_latents : of the SAE
    datasets, pairs : names of the datasets, and of the comparisons as of `pair_of`
    places, on : of `places_of` and `on_of`; None: they are not told
    parts : of `parts_of`; None: no masks
    """
    columns, code = _columns(gallery, latents, n_latents, len(datasets), bool(pairs))
    if places is not None:
        columns["place"] = places
    if on is not None:
        columns["on"] = on
    if parts is not None:
        columns["part"] = parts[1]
    names = [[at, plain_text(name)] for at, name in gallery.names.items()]
    facts = {
        "largest": float(gallery.mean.max(initial=0)),
        "labels": [plain_text(name) for name in gallery.labels],
        "no_label": code,
        "datasets": [plain_text(name) for name in datasets],
        "parts": [plain_text(name) for name in ([] if parts is None else parts[0])],
        "pairs": [{key: plain_text(pair[key]) for key in ("a", "b", "file")} for pair in pairs],
    }
    if len(latents) <= _WHOLE:
        site.data("gallery", {**_all_packed(columns), **facts, "names": names})
        return
    order, alike = first_order(gallery, on)
    first = order[:_FIRST]
    rows = _all_packed({name: values[first] for name, values in columns.items()})
    seen = {
        "at": packed(first.astype(np.uint32)),
        "alike": packed(alike[:_FIRST].astype(np.uint32)),
        "n": len(latents),
        "n_different": len(order),
        "counts": _counts(columns, facts, len(names)),
        "names": [[at, plain_text(gallery.names[at])] for at in first.tolist() if at in gallery.names],
    }
    site.data("gallery", {**rows, **facts, **seen})
    site.data("gallery-plot", _all_packed({name: columns[name] for name in _OF_PLOT if name in columns}))
    rest = {name: values for name, values in columns.items() if name not in _OF_PLOT}
    site.data("gallery-rest", {**_all_packed(rest), "names": names})


def _all_packed(columns: Mapping[str, _Column]) -> dict[str, Any]:
    return {name: packed(values) for name, values in columns.items()}


def _mean(gallery: Gallery) -> npt.NDArray[np.float16]:
    """(concepts,) mean activation as a share of the largest."""
    return (gallery.mean / (float(gallery.mean.max(initial=0)) or 1)).astype(np.float16)


def _columns(
    gallery: Gallery, latents: Ints, n_latents: int, n_datasets: int, has_pairs: bool
) -> tuple[dict[str, _Column], int]:
    """The columns as a page reads them, and the code of no label."""
    number = np.uint16 if n_latents <= 1 << 16 else np.uint32
    code = np.uint8 if len(gallery.labels) < NEVER else np.uint16
    no_label = NEVER if code is np.uint8 else _UNDEFINED
    columns: dict[str, _Column] = {
        "latents": latents.astype(number),
        "frequency": gallery.frequency.astype(np.float16),
        "mean": _mean(gallery),
        "has_picture": np.array([len(numbers) > 0 for numbers in gallery.images], np.uint8),
        "verdict": gallery.verdict,
        "cells": gallery.cells.astype(np.uint16 if len(latents) <= 1 << 16 else np.uint32),
    }
    if gallery.labels:
        columns["label"] = np.where(gallery.label >= 0, gallery.label, no_label).astype(code)
        columns["share"] = np.round(254 * np.nan_to_num(gallery.share)).astype(np.uint8)
        columns["specificity"] = gallery.specificity.astype(np.float16)  # NaN stays
    if n_datasets > 1:
        columns["dataset"] = np.where(gallery.dataset >= 0, gallery.dataset, NEVER).clip(0, NEVER).astype(np.uint8)
    if has_pairs:
        columns["pair"] = np.where(gallery.pair >= 0, gallery.pair, NEVER).astype(np.uint8)
        columns["g"] = (
            np.nan_to_num(np.round(100 * gallery.g), nan=0.0, posinf=32000, neginf=-32000)
            .clip(-32000, 32000)
            .astype(np.int16)
        )
        columns["q"] = gallery.q.astype(np.float16)
    return columns, no_label


def _counts(columns: Mapping[str, _Column], facts: Mapping[str, Any], n_named: int) -> list[Any]:
    """Of each group of chips its choices with the number of concepts, [group, [[text, n], ...]], in their order.

    A group without choices is left out.
    """
    found: dict[str, list[list[Any]]] = {}
    of_codes = [("label", facts["labels"], facts["no_label"]), ("dataset", facts["datasets"], NEVER)]
    for group, texts, none in (*of_codes, ("part", facts["parts"], NEVER)):
        if group in columns:
            codes, counts = np.unique(columns[group][columns[group] != none], return_counts=True)
            order = np.argsort(-counts, kind="stable")
            found[group] = [[texts[at] if at < len(texts) else "", int(n)] for at, n in _both(codes, counts, order)]
    if "pair" in columns:
        differs = (columns["pair"] != NEVER) & (columns["q"].astype(np.float64) <= IS_DIFFERENT)
        keys, counts = np.unique(
            2 * columns["pair"][differs].astype(np.int64) + (columns["g"][differs] > 0), return_counts=True
        )
        sides: dict[str, int] = {}
        for key, n in zip(keys.tolist(), counts.tolist(), strict=True):
            side = _side(facts["pairs"][key // 2], is_higher=bool(key % 2))
            sides[side] = sides.get(side, 0) + n
        found["in"] = [[side, sides[side]] for side in sorted(sides)]
    if "place" in columns:
        counts = np.bincount(columns["place"], minlength=len(PLACES)).tolist()
        told = PLACES[:SAME_PATCH] if "on" in columns else PLACES  # else the same patch is among what it lies on
        found["place"] = [[text, n] for text, n in zip(told, counts, strict=False) if text and n]
    if "on" in columns:
        counts = np.bincount(columns["on"], minlength=len(ON)).tolist()
        found["on"] = [[text, n] for text, n in zip(ON, counts, strict=True) if text and n]
    kinds, counts = np.unique(columns["verdict"], return_counts=True)
    if len(kinds) > 1:
        found["verdict"] = [
            [VERDICTS[kind], n] for kind, n in zip(kinds.tolist(), counts.tolist(), strict=True) if kind
        ]
    found["named"] = [["yes", n_named]] if n_named else []
    return [[group, choices] for group, choices in found.items() if choices]


def _both(codes: _Column, counts: _Column, order: _Column) -> list[tuple[int, int]]:
    return list(zip(codes[order].tolist(), counts[order].tolist(), strict=True))


def _side(pair: Mapping[str, str], *, is_higher: bool) -> str:
    """Where a concept is stronger, in the words of gallery.js."""
    if pair["b"] == "all others":
        return f"{'higher' if is_higher else 'lower'} in {pair['a']}"
    return f"higher in {pair['a'] if is_higher else pair['b']}"


def places_of(plan: Plan, maps: Maps) -> npt.NDArray[np.uint8]:
    """(concepts,) where in its reference images each is active: number in `PLACES`."""
    starts = np.searchsorted(plan.references.latent, plan.latents)
    stops = np.searchsorted(plan.references.latent, plan.latents, side="right")
    words = [
        place_word(maps.read(start, stop - start)) if stop > start else 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]
    return np.array(words, np.uint8)


def on_of(plan: Plan, maps: Maps, places: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(concepts,) does each lie on nuclei, cells or background, or at one place of every image? Number in `ON`."""
    found = [
        ONE_PLACE if place == SAME_PATCH else on(share_of(plan, maps, latent))
        for latent, place in zip(plan.latents.tolist(), places.tolist(), strict=True)
    ]
    return np.array(found, np.uint8)


def parts_of(plan: Plan, evidence: EvidenceStores) -> tuple[list[str], npt.NDArray[np.uint8]] | None:
    """The classes of the masks, and (concepts,) the one that each agrees with best and more than by chance; or None.

    The number of the class, `NEVER` for none, as the sentence of a concept has it.
    """
    if evidence.masks is None:
        return None
    rows = evidence.masks.table("agreement").to_pylist()
    names = sorted({str(row["class"]) for row in rows})[:NEVER]
    best: dict[int, tuple[float, str]] = {}
    for row in rows:
        if row["auroc"] is not None and row["auroc"] > best.get(row["latent"], (0.5, ""))[0] and agrees(row):
            best[row["latent"]] = (row["auroc"], str(row["class"]))
    code = {name: number for number, name in enumerate(names)}
    found = [code.get(best[latent][1], NEVER) if latent in best else NEVER for latent in plan.latents.tolist()]
    return names, np.array(found, np.uint8)


def write_map_files(site: Site, gallery: Gallery, maps: Maps) -> None:
    """Write in data/maps-<n>.js the maps of the cards, `MAPS_PER_FILE` in each."""
    for first in range(0, len(gallery.images), MAPS_PER_FILE):
        chosen = [int(numbers[0]) if len(numbers) else -1 for numbers in gallery.images[first : first + MAPS_PER_FILE]]
        blank = np.zeros(maps.n_patches, np.uint8)
        steps = [maps.read(n, 1)[0] if n >= 0 else blank for n in chosen]
        shapes = [maps.aspect[n] if n >= 0 else 1.0 for n in chosen]
        site.data(
            f"maps-{first // MAPS_PER_FILE}",
            {"maps": packed(np.concatenate(steps)), "aspect": packed(np.array(shapes, np.float32))},
        )
