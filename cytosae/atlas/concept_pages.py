"""A page per concept: a sentence, reference images with maps, examples of all deciles, near misses, patients, evidence.

What is shown is found by `examples.py`, what is said by `sentence.py`, what other commands say by `evidence.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.names import LatentName
from stores.errors import DamagedStore

from .cohort import Cohort, Values
from .comparisons import pair_of
from .concept_maps import packed_map, share_of
from .drawings import Bars, Strip, histogram_bars, strip_of, strip_ticks
from .evidence import Evidence
from .examples import BIN_EDGES, DECILES
from .frames import Frames
from .inputs import Inputs
from .lies_on import Maps8, Share
from .matched_concepts import Pairs
from .sentence import Clause, Facts, place_of, same_patch_of, sentence
from .site import Site, short, whole

_BATCH = 1024  # latents per chunk: dense barcodes of all patients are in memory for these
_LISTED_PATIENTS = 20


def write_concept_pages(
    site: Site, frames: Frames, *, pairs: Pairs | None = None, most: int | None = None
) -> Iterator[int]:
    """Write the pages of all latents of the plan (or the first `most`); yields the number written so far.

    Parameters
    ----------
    pairs : each concept's match in another atlas
    """
    inputs, cohort, plan = frames.inputs, frames.cohort, frames.plan
    latents = plan.latents if most is None else plan.latents[:most]
    statistics = {name: inputs.concepts.latents(name).to_pydict() for name in inputs.concepts.datasets}
    neighbours = _Neighbours(inputs)
    comparisons = [_comparison(inputs, cohort, number) for number in range(len(inputs.comparisons))]
    evidence = Evidence(
        inputs.evidence,
        sae_sha256=inputs.stores[0].spec.sae_sha256,
        n_latents=inputs.n_latents,
        pairs={each.header.identity: pair for each, (pair, _) in zip(inputs.comparisons, comparisons, strict=True)},
    )
    pages = _Pages(frames)
    for first in range(0, len(latents), _BATCH):
        batch = latents[first : first + _BATCH]
        values = cohort.values(batch)
        for at, latent in enumerate(batch.tolist(), start=first):
            rows = [
                {"dataset": name, **{key: column[latent] for key, column in columns.items() if key != "dataset"}}
                for name, columns in statistics.items()
            ]
            shown = pages.images(at)
            compared = [{"pair": pair, **table_row(table, latent)} for pair, table in comparisons]
            known = evidence.of(latent)
            site.page(
                f"concepts/{latent}.html",
                "concept.html",
                **frames.shared,
                latent=latent,
                cluster=plan.clusters.get(latent),
                before=int(latents[at - 1]) if at else None,
                after=int(latents[at + 1]) if at + 1 < len(latents) else None,
                sentence=_sentence(
                    *(rows, shown, pages.maps_of(at), values[:, at - first], compared, known),
                    share_of(plan, frames.maps, latent),
                ),
                facts=_facts(inputs, rows),
                statistics=rows,
                histograms=_histograms(inputs, plan.examples.histograms[:, at]),
                **shown,
                neighbours=[
                    {"by": by, "rows": [{**row, **pages.card(row["neighbour"])} for row in found]}
                    for by, found in neighbours.of(latent).items()
                ],
                has_neighbours=neighbours.is_given,
                strip=_strip(cohort, pages, values[:, at - first], latent, at),
                comparisons=compared,
                **known,
                opinion=(inputs.opinions or {}).get(latent),
                beside=None if pairs is None else pairs.of(latent),
            )
        yield min(first + _BATCH, len(latents))


class _Pages:
    """The images on the page of each latent, by the latent's position in the plan."""

    def __init__(self, frames: Frames) -> None:
        self._frames, self._plan, self._maps = frames, frames.plan, frames.maps
        self._datasets, plan = frames.inputs.concepts.datasets, frames.plan
        starts = np.searchsorted(plan.references.latent, [plan.latents, plan.latents + 1])
        self._references = [range(*each) for each in starts.T.tolist()]
        self._place = {latent: at for at, latent in enumerate(plan.latents.tolist())}

    def images(self, at: int) -> dict[str, Any]:
        """rows (reference images by dataset, with their labels), deciles, near, and the largest value of all maps."""
        plan, examples, references = self._plan, self._plan.examples, self._plan.references
        numbers = self._references[at]
        steps = self.maps_of(at)
        of_dataset: list[list[dict[str, Any]]] = [[] for _ in self._datasets]
        for number, map_ in zip(numbers, steps, strict=True):
            frame = self._frame(int(references.image[number]), float(references.value[number]), number, map_)
            of_dataset[references.dataset[number]].append({**frame, "rank": int(references.rank[number])})
        rows: list[dict[str, Any]] = [
            {"dataset": name, "frames": frames, "labels": _labels(frames)}
            for name, frames in zip(self._datasets, of_dataset, strict=True)
        ]
        known = plan.decile_maps[at]
        first, n_maps = int(known[known >= 0].min(initial=np.iinfo(np.int64).max)), int((known >= 0).sum())
        of_deciles = self._maps.read(first, n_maps) if n_maps else None
        deciles: list[dict[str, Any]] = [
            {
                "number": decile + 1,
                "frames": [
                    self._frame(image, value, number, of_deciles[number - first])
                    for image, value, number in zip(
                        *(each[at, decile].tolist() for each in (examples.deciles, examples.values)),
                        known[decile].tolist(),
                        strict=True,
                    )
                    if image >= 0 and of_deciles is not None
                ],
            }
            for decile in reversed(range(DECILES))
        ]
        near = [
            {**self._frame(image, 0.0), "cosine": cosine}
            for image, cosine in zip(examples.near[at].tolist(), examples.near_cosines[at].tolist(), strict=True)
            if image >= 0
        ]
        frames = [frame for row in (*rows, *deciles) for frame in row["frames"]]
        return {
            "rows": rows,
            "best": max(
                (frame for row in rows for frame in row["frames"]), key=lambda frame: frame["value"], default=None
            ),
            "deciles": [row for row in deciles if row["frames"]],
            "near": near,
            "largest": max((frame["largest"] for frame in frames), default=0.0),
        }

    def maps_of(self, at: int) -> Maps8:
        """(images, patches) the maps of its reference images."""
        numbers = self._references[at]
        return self._maps.read(numbers.start, len(numbers))

    def card(self, latent: int) -> dict[str, bool]:
        """Does a latent have a page, and that a picture?"""
        at = self._place.get(latent)
        return {"has_page": at is not None, "has_picture": at is not None and len(self._references[at]) > 0}

    def person(self, patient: int, at: int) -> dict[str, Any]:
        """A patient, and the number of the picture of the patient's own best cell; -1: there is none."""
        image = int(self._plan.examples.best[at, patient])
        cell = -1 if image < 0 or image in self._maps.unseen else self._plan.number_of[image]
        return {"number": patient, "name": self._frames.cohort.names[patient], "cell": cell}

    def _frame(self, image: int, value: float, number: int | None = None, steps: Maps8 | None = None) -> dict[str, Any]:
        """What a page says of an image: with the number of its map, the map and its largest value."""
        return self._frames.plain(image) | {
            "value": value,
            "dataset": self._frames.cohort.image_datasets[image],
            "map": None if steps is None else packed_map(steps),
            "largest": 0.0 if number is None else float(self._maps.largest[number]),
        }


def _facts(inputs: Inputs, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Of all datasets together: (name, text) of the numbers in large type."""
    n_active = sum(row["n_images"] for row in rows)
    n_readable = sum(int(found["n_readable"]) for found in inputs.concepts.by_dataset)
    mean = sum(row["n_images"] * row["mean_activation"] for row in rows) / max(1, n_active)
    return [
        ("images", f"{whole(n_active)} of {whole(n_readable)}"),
        ("mean activation", short(mean)),
        ("largest token", short(max(row["max_activation"] for row in rows))),
    ]


def _sentence(
    statistics: list[dict[str, Any]],
    shown: dict[str, Any],
    maps: Maps8,
    values: Values,
    comparisons: list[dict[str, Any]],
    known: dict[str, Any],
    lies_on: Share | None,
) -> list[Clause]:
    score, stability = known["score"] or {}, known["stability"] or {}
    return sentence(
        Facts(
            statistics=statistics,
            labels=[frame["label"] for row in shown["rows"] for frame in row["frames"]],
            place=place_of(maps),
            same_patch=same_patch_of(maps),
            lies_on=lies_on,
            masks=known["masks"],
            n_patients=len(values),
            n_above=int((values > 0).sum()),
            comparisons=comparisons,
            replications=known["replications"],
            n_found=stability.get("n_found"),
            n_others=stability.get("n_others", 0),
            causes=known["causes"],
            morans_i=score.get("morans_i"),
            morans_chance=score.get("morans_i_null_high") or 0.0,
            name=_name(known["names"]),
        )
    )


def table_row(columns: dict[str, list[Any]], row: int) -> dict[str, Any]:
    """One row of a table that was read by columns."""
    return {name: values[row] for name, values in columns.items()}


def _histograms(inputs: Inputs, counts: npt.NDArray[np.int32]) -> list[dict[str, Any]]:
    """One per dataset, all on the same axis."""
    filled = np.flatnonzero(counts.sum(axis=0))
    if not len(filled):
        return []
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges = BIN_EDGES[first : last + 1]
    found: list[dict[str, Any]] = []
    for name, of_dataset in zip(inputs.concepts.datasets, counts, strict=True):
        bars: Bars = histogram_bars(of_dataset[first:last], edges)
        found.append({"dataset": name, "n_images": int(of_dataset.sum()), "bars": bars})
    return found


def _labels(frames: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labels of some reference images by their share of the image activation, the largest first."""
    total = sum(frame["value"] for frame in frames)
    sums: dict[str, float] = {}
    for frame in frames:
        sums[frame["label"]] = sums.get(frame["label"], 0.0) + frame["value"]
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    counts = {name: sum(frame["label"] == name for frame in frames) for name in sums}
    return [{"label": name, "share": value / (total or 1), "n_images": counts[name]} for name, value in ordered]


def _name(names: Sequence[LatentName]) -> dict[str, Any] | None:
    """The first name, for the sentence."""
    if not names:
        return None
    first = names[0]
    return {
        "name": first.name,
        "given_by": first.given_by,
        "is_tested": first.best is not None,
        "is_supported": any(score.is_supported for score in first.scores),
    }


class _Neighbours:
    """The table of `cyto concept neighbours`, by latent."""

    def __init__(self, inputs: Inputs) -> None:
        self.is_given = inputs.neighbours is not None
        if inputs.neighbours is None:
            return
        table = inputs.neighbours.table("neighbours").sort_by(
            [("latent", "ascending"), ("by", "ascending"), ("rank", "ascending")]
        )
        self._latents = table["latent"].to_numpy()
        self._table = table
        if len(self._latents) and not 0 <= self._latents[0] <= self._latents[-1] < inputs.n_latents:
            raise DamagedStore(f"{inputs.neighbours.root} names latents that the SAE does not have")

    def of(self, latent: int) -> dict[str, list[dict[str, Any]]]:
        """The nearest and the co-active latents of a latent: kind -> list."""
        if not self.is_given:
            return {}
        first, last = np.searchsorted(self._latents, [latent, latent + 1])
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self._table.slice(first, last - first).to_pylist():
            found.setdefault(row["by"], []).append(row)
        return found


def _strip(cohort: Cohort, pages: _Pages, values: Values, latent: int, at: int) -> dict[str, Any]:
    """The barcode values of a latent: one point per patient, by disease, and the patients with the largest values."""
    groups = [(name, number) for number, name in enumerate(cohort.diseases)]
    groups += [("no disease stated", -1)] if (cohort.disease_of == -1).any() else []
    largest = float(values.max(initial=0))
    rows = []
    for name, number in groups:
        members = np.flatnonzero(cohort.disease_of == number)
        drawn: Strip = strip_of(values[members], largest)
        mean = None if number < 0 else float(cohort.disease_means[number, latent])
        points = [{**point, **pages.person(int(members[point["at"]]), at)} for point in drawn.points]
        rows.append(
            {"disease": name, "number": number, "mean": mean, "n_patients": len(members)}
            | {"n_above": int((values[members] > 0).sum()), "points": points, "n_left_out": drawn.n_left_out}
        )
    largest_first = np.argsort(-values, kind="stable")[:_LISTED_PATIENTS].tolist()
    order = [patient for patient in largest_first if values[patient] > 0]
    patients = [
        {**pages.person(patient, at), "disease": cohort.disease_name(patient), "value": float(values[patient])}
        for patient in order
    ]
    return {"largest": largest, "ticks": strip_ticks(largest), "groups": rows, "patients": patients}


def _comparison(inputs: Inputs, cohort: Cohort, number: int) -> tuple[dict[str, str], dict[str, list[Any]]]:
    return pair_of(inputs, cohort, number), inputs.comparison_table(number).to_pydict()
