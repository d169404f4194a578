"""A page per concept: statistics, histogram, reference images with maps, labels, neighbours, patients and diseases."""

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.errors import DamagedStore

from .cohort import Cohort, Values, positions
from .drawings import Bars, Strip, histogram_bars, strip_of
from .inputs import Inputs
from .plan import Ints, Plan
from .site import Site

_BATCH = 1024  # latents per chunk: dense barcodes of all patients are in memory for these
_LISTED_PATIENTS = 20
_CAUSES = {
    "cls_change": "final CLS, share of its norm",
    "cls_gain": "final CLS, per unit of what was changed",
    "probability": "probability, by the probe of barcodes, of",
    "cls_probability": "probability, by the probe of the final CLS, of",
}
BIN_EDGES = np.arange(-7, 3.01, 0.125)  # log10 of image activation; values outside are counted in the outermost bins


class Maps:
    """The patch map of each reference image, quantised to 8 bits relative to its own largest value."""

    def __init__(self, n_references: int, n_patches: int) -> None:
        self.shares = np.zeros((n_references, n_patches), np.uint8)
        self.largest = np.zeros(n_references, np.float32)
        self.aspect = np.ones(n_references, np.float32)  # width by height of the image
        self.unseen: dict[int, str] = {}  # image index -> why it cannot be shown

    def set(self, number: int, patches: npt.NDArray[np.float32], *, aspect: float = 1.0) -> None:
        """Store the map of one reference image."""
        self.aspect[number] = aspect
        largest = patches.max(initial=0)
        self.largest[number] = largest
        self.shares[number] = np.round(patches / (largest or 1) * 255)

    def packed(self, number: int) -> str:
        """A map as base64, one byte per patch."""
        return base64.b64encode(self.shares[number].tobytes()).decode()


def activation_histograms(inputs: Inputs, cohort: Cohort, latents: Ints) -> npt.NDArray[np.int32]:
    """(n_datasets, n_latents, n_bins): counts of images by image activation above 0. One pass over all images."""
    n_bins = len(BIN_EDGES) - 1
    codes = {name: number for number, name in enumerate(inputs.concepts.datasets)}
    dataset_of = [codes.get(name, -1) for name in cohort.image_datasets]
    position = positions(latents, inputs.n_latents)
    counts = np.zeros((len(codes), len(latents), n_bins), np.int32)
    for image, row in cohort.image_activations():
        at = position[row.latents]
        is_shown = at >= 0
        bins = np.searchsorted(BIN_EDGES, np.log10(row.values[is_shown]), side="right") - 1
        if dataset_of[image] >= 0:
            counts[dataset_of[image], at[is_shown], np.clip(bins, 0, n_bins - 1)] += 1  # a latent occurs once per image
    return counts


def write_concept_pages(
    site: Site,
    inputs: Inputs,
    cohort: Cohort,
    plan: Plan,
    maps: Maps,
    shared: dict[str, Any],
    *,
    most: int | None = None,
) -> Iterator[int]:
    """Write the pages of all latents of the plan (or the first `most`); yields the number written so far."""
    latents = plan.latents if most is None else plan.latents[:most]
    histograms = activation_histograms(inputs, cohort, latents)
    statistics = {name: inputs.concepts.latents(name).to_pydict() for name in inputs.concepts.datasets}
    neighbours = _Neighbours(inputs)
    causes = _causes(inputs)
    comparisons = [_comparison(inputs, cohort, number) for number in range(len(inputs.comparisons))]
    starts = np.searchsorted(plan.references.latent, [latents, latents + 1])
    for first in range(0, len(latents), _BATCH):
        batch = latents[first : first + _BATCH]
        values = cohort.values(batch)
        for at, latent in enumerate(batch.tolist(), start=first):
            site.page(
                f"concepts/{latent}.html",
                "concept.html",
                **shared,
                latent=latent,
                cluster=plan.clusters.get(latent),
                before=int(latents[at - 1]) if at else None,
                after=int(latents[at + 1]) if at + 1 < len(latents) else None,
                statistics=[
                    {"dataset": name, **{key: column[latent] for key, column in columns.items() if key != "dataset"}}
                    for name, columns in statistics.items()
                ],
                histograms=_histograms(inputs, histograms[:, at]),
                **_reference_rows(inputs, plan, maps, range(*starts[:, at].tolist()), shared),
                neighbours=neighbours.of(latent, plan),
                has_neighbours=neighbours.is_given,
                causes=causes.get(latent, []),
                strip=_strip(cohort, values[:, at - first], latent),
                comparisons=[{"pair": pair, **table_row(table, latent)} for pair, table in comparisons],
            )
        yield min(first + _BATCH, len(latents))


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


def _reference_rows(inputs: Inputs, plan: Plan, maps: Maps, numbers: range, shared: dict[str, Any]) -> dict[str, Any]:
    """The reference images of one latent by dataset, on one scale, and the labels that they have."""
    references = plan.references
    rows: list[dict[str, Any]] = []
    for code, dataset in enumerate(inputs.concepts.datasets):
        frames = [
            {
                "image": plan.number_of[int(references.image[number])],
                "name": image_name(inputs, plan, int(references.image[number]), is_hidden=shared["pseudonyms"]),
                "rank": int(references.rank[number]),
                "value": float(references.value[number]),
                "label": references.label[number],
                "map": maps.packed(number),
                "largest": float(maps.largest[number]),
                "unseen": maps.unseen.get(int(references.image[number])),
            }
            for number in numbers
            if references.dataset[number] == code
        ]
        rows.append({"dataset": dataset, "frames": frames, "labels": _labels(frames)})
    largest = max((frame["largest"] for row in rows for frame in row["frames"]), default=0.0)
    return {"rows": rows, "largest": largest}


def image_name(inputs: Inputs, plan: Plan, image: int, *, is_hidden: bool) -> str:
    """The name of an image on a page; its id often contains the patient's name, so it can be hidden."""
    return f"image {plan.number_of[image]}" if is_hidden else inputs.image_ids[image]


def _labels(frames: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labels of some reference images by their share of the image activation, the largest first."""
    total = sum(frame["value"] for frame in frames)
    sums: dict[str, float] = {}
    for frame in frames:
        sums[frame["label"]] = sums.get(frame["label"], 0.0) + frame["value"]
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    counts = {name: sum(frame["label"] == name for frame in frames) for name in sums}
    return [{"label": name, "share": value / (total or 1), "n_images": counts[name]} for name, value in ordered]


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

    def of(self, latent: int, plan: Plan) -> dict[str, list[dict[str, Any]]]:
        """The nearest and the co-active latents of a latent: kind -> list."""
        if not self.is_given:
            return {}
        first, last = np.searchsorted(self._latents, [latent, latent + 1])
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self._table.slice(first, last - first).to_pylist():
            found.setdefault(row["by"], []).append({**row, "has_page": plan.has_page(row["neighbour"])})
        return found


def _causes(inputs: Inputs) -> dict[int, list[dict[str, Any]]]:
    """The effects of `cyto concept ablate` by latent: on the final CLS, and on each class of its probe."""
    found: dict[int, list[dict[str, Any]]] = {}
    if inputs.causes is not None:
        for row in inputs.causes.table("effects").to_pylist():
            kind, _, label = row["quantity"].partition(":")
            if kind in _CAUSES:
                name = f"{_CAUSES[kind]} {label}".strip()
                found.setdefault(int(row["latent"]), []).append({**row, "name": name})
    return found


def _strip(cohort: Cohort, values: Values, latent: int) -> dict[str, Any]:
    """The barcode values of a latent: one point per patient, by disease, and a table of the largest values."""
    groups = [(name, number) for number, name in enumerate(cohort.diseases)]
    groups += [("no disease stated", -1)] if (cohort.disease_of == -1).any() else []
    largest = float(values.max(initial=0))
    rows = []
    for name, number in groups:
        members = np.flatnonzero(cohort.disease_of == number)
        of_group = values[members]
        drawn: Strip = strip_of(of_group, [cohort.names[member] for member in members], largest)
        mean = None if number < 0 else float(cohort.disease_means[number, latent])
        rows.append(
            {"disease": name, "number": number, "mean": mean, "n_patients": len(members)}
            | {"n_above": int((of_group > 0).sum()), "strip": drawn}
        )
    order = [int(at) for at in np.argsort(-values, kind="stable")[:_LISTED_PATIENTS] if values[at] > 0]
    patients = [
        {"number": at, "name": cohort.names[at], "disease": disease_name(cohort, at), "value": float(values[at])}
        for at in order
    ]
    return {"largest": largest, "groups": rows, "patients": patients}


def disease_name(cohort: Cohort, patient: int) -> str:
    """The disease of a patient; "" without one."""
    number = int(cohort.disease_of[patient])
    return "" if number < 0 else cohort.diseases[number]


def _comparison(inputs: Inputs, cohort: Cohort, number: int) -> tuple[dict[str, str], dict[str, list[Any]]]:
    return pair_of(inputs, cohort, number), inputs.comparison_table(number).to_pydict()


def pair_of(inputs: Inputs, cohort: Cohort, number: int) -> dict[str, str]:
    """The names of the two groups of a comparison, and the file name of its page."""
    spec = inputs.comparisons[number].header.spec
    sides = [str(spec["a"]), "rest" if spec["b_is_rest"] else str(spec["b"])]
    known = [str(cohort.diseases.index(name)) if name in cohort.diseases else "" for name in sides]
    if spec["b_is_rest"]:
        known[1] = "rest"
    if not all(known):
        raise DamagedStore(f"{inputs.comparisons[number].root} compares a disease that the barcodes do not have")
    return {"a": sides[0], "b": "all others" if spec["b_is_rest"] else sides[1], "file": "-".join(known)}
