"""The overview (a gallery of concepts), the table of all latents, and the data behind both."""

from typing import Any

import numpy as np

from stores.wording import counted, plain_text

from .comparisons import pair_of
from .frames import Frames
from .gallery import Gallery
from .gallery_files import first_order, on_of, parts_of, places_of, write_gallery_data, write_map_files
from .inputs import Inputs
from .lies_on import ON
from .plan import Plan
from .site import Site, packed, share

_NUMBERS = ("frequency", "mean_activation", "max_activation", "label_entropy")
_FEW_IMAGES = 10  # are told as a number, as in gallery.js
_FIRST = 12  # cards that stand in the page itself: seen at once, and without a script


def write_overview(site: Site, frames: Frames, gallery: Gallery) -> None:
    """Write index.html, latents.html, and their data: latents-<dataset>, built, gallery and its parts, maps-<n>."""
    inputs, cohort, plan, maps = frames.inputs, frames.cohort, frames.plan, frames.maps
    for number, dataset in enumerate(inputs.concepts.datasets):
        site.data(f"latents-{number}", _dataset_data(inputs, dataset))
    site.data("built", _built_data(inputs, plan, gallery))
    pairs = [pair_of(inputs, cohort, number) for number in range(len(inputs.comparisons))]
    places = places_of(plan, maps)
    on = on_of(plan, maps, places)
    parts = parts_of(plan, inputs.evidence)
    write_gallery_data(
        *(site, gallery, plan.latents, inputs.n_latents, inputs.concepts.datasets, pairs, places),
        on=on,
        parts=parts,
    )
    write_map_files(site, gallery, maps)
    summary = {found["dataset"]: found for found in inputs.concepts.by_dataset}
    common = {**frames.shared, "datasets": inputs.concepts.datasets, "pairs": pairs, "n_built": len(plan.latents)}
    order, _ = first_order(gallery, on)
    site.page(
        "index.html",
        "gallery.html",
        **common,
        n_latents=inputs.n_latents,
        n_patients=cohort.n_patients,
        n_diseases=len(cohort.diseases),
        n_readable=sum(int(found["n_readable"]) for found in inputs.concepts.by_dataset),
        n_images=int(inputs.first_images[-1]),
        has_labels=bool(gallery.labels),
        has_selection=bool(plan.selection),
        is_told=maps.kinds.rules.ground is not None,
        has_places=bool((on > 0).any()),
        has_masks=parts is not None,
        cards=[_card(inputs, plan, gallery, at) | {"on": ON[on[at]]} for at in order[:_FIRST].tolist()],
    )
    site.page("latents.html", "latents.html", **common, summary=[summary[name] for name in inputs.concepts.datasets])


def _card(inputs: Inputs, plan: Plan, gallery: Gallery, at: int) -> dict[str, Any]:
    """What a card says before its script runs."""
    label, frequency = int(gallery.label[at]), float(gallery.frequency[at])
    n = round(frequency * sum(int(found["n_readable"]) for found in inputs.concepts.by_dataset))
    return {
        "latent": int(plan.latents[at]),
        "name": gallery.names.get(at, ""),
        "has_picture": len(gallery.images[at]) > 0,
        "label": gallery.labels[label] if label >= 0 else "",
        "share": float(gallery.share[at]) if label >= 0 else None,
        "often": counted(n, "image") if n < _FEW_IMAGES else f"{share(frequency)} of images",
    }


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


def _built_data(inputs: Inputs, plan: Plan, gallery: Gallery) -> dict[str, Any]:
    """The latents with a page; for each its cluster (-1: none) and whether it has a picture."""
    return {
        "n_latents": inputs.n_latents,
        "latents": packed(plan.latents.astype(np.uint32)),
        "has_picture": packed(np.array([len(numbers) > 0 for numbers in gallery.images], np.uint8)),
        "clusters": packed(np.array([plan.clusters.get(latent, -1) for latent in plan.latents.tolist()], np.int32)),
    }
