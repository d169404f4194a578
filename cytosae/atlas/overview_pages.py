"""The overview, the table of all latents, and the data behind both."""

from typing import Any

import numpy as np

from .cohort import Cohort
from .concept_pages import pair_of
from .inputs import Inputs
from .plan import Plan
from .site import Site, packed, plain_text

_NUMBERS = ("frequency", "mean_activation", "max_activation", "label_entropy")


def write_overview(site: Site, inputs: Inputs, cohort: Cohort, plan: Plan, shared: dict[str, Any]) -> None:
    """Write index.html, latents.html, data/latents-<dataset>.js for each dataset and data/built.js."""
    for number, dataset in enumerate(inputs.concepts.datasets):
        site.data(f"latents-{number}", _dataset_data(inputs, dataset))
    site.data("built", _built_data(inputs, plan))
    pairs = [pair_of(inputs, cohort, number) for number in range(len(inputs.comparisons))]
    summary = {found["dataset"]: found for found in inputs.concepts.by_dataset}
    common = {**shared, "datasets": inputs.concepts.datasets, "pairs": pairs, "n_built": len(plan.latents)}
    site.page(
        "index.html",
        "overview.html",
        **common,
        summary=[summary[name] for name in inputs.concepts.datasets],
        n_latents=inputs.n_latents,
        n_patients=cohort.n_patients,
        n_diseases=len(cohort.diseases),
        n_images=int(inputs.first_images[-1]),
        n_image_pages=len(plan.images),
        n_selected=len(plan.selection),
    )
    site.page("latents.html", "latents.html", **common)


def _dataset_data(inputs: Inputs, dataset: str) -> dict[str, Any]:
    """The statistics of all latents in one dataset, as columns."""
    table = inputs.concepts.latents(dataset)
    labels = table["top_label"].to_pylist()
    names = sorted({label for label in labels if label is not None})
    code = {name: number for number, name in enumerate(names)}
    codes = np.array([code[label] if label is not None else len(names) for label in labels], np.uint32)
    numbers = {name: table[name].to_numpy(zero_copy_only=False).astype(np.float32) for name in _NUMBERS}
    return {
        "n_images": packed(table["n_images"].to_numpy().astype(np.uint32)),
        **{name: packed(values) for name, values in numbers.items()},  # a null entropy becomes NaN
        "top_label": packed(codes),
        "labels": [plain_text(name) for name in names],
    }


def _built_data(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """The latents with a page; for each its cluster (-1: none) and the thumbnail of its first image (-1: none)."""
    references = plan.references
    first = np.searchsorted(references.latent, plan.latents)
    last = np.searchsorted(references.latent, plan.latents, side="right")
    thumbs = [
        plan.thumb_of[int(references.image[at])] if at < stop else -1 for at, stop in zip(first, last, strict=True)
    ]
    return {
        "n_latents": inputs.n_latents,
        "latents": packed(plan.latents.astype(np.uint32)),
        "thumbs": packed(np.array(thumbs, np.int32)),
        "clusters": packed(np.array([plan.clusters.get(latent, -1) for latent in plan.latents.tolist()], np.int32)),
        "n_thumbs": len(plan.images),
    }
