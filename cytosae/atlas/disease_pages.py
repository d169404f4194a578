"""Pages of diseases, and their list with the pairs that were compared."""

from typing import Any

import numpy as np

from .comparisons import pair_of
from .drawings import barcode_picture, composition_picture
from .frames import Frames
from .patient_pages import columns_of, listed_concepts, listed_patient
from .site import Site

_FACES = 8  # patients of a disease in the list of diseases


def write_disease_pages(site: Site, frames: Frames) -> None:
    """Write the pages of diseases and their list."""
    cohort, inputs = frames.cohort, frames.inputs
    means = cohort.disease_means.astype(np.float64)
    pairs = [
        {**pair_of(inputs, cohort, number), "number": number}
        | {"n_q": (inputs.comparisons[number].header.summary or {}).get("n_q_at_most_0.05")}
        for number in range(len(inputs.comparisons))
    ]
    composition, columns, families = frames.composition, columns_of(frames), frames.families()
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(cohort.diseases):
        members = np.flatnonzero(cohort.disease_of == number)
        others = np.flatnonzero((cohort.disease_of >= 0) & (cohort.disease_of != number))
        rest = np.delete(means, number, axis=0).mean(axis=0) if len(means) > 1 else np.zeros(means.shape[1])
        sides = [(np.flatnonzero(each), each[each > 0].astype(np.float32)) for each in (means[number], rest)]
        patients = [listed_patient(frames, int(member)) for member in members]
        rows.append(
            {"number": number, "name": name, "n_patients": len(members), "n_active": len(sides[0][0])}
            | {"n_images": int(cohort.n_images[members].sum())}
        )
        site.page(
            f"diseases/{number}.html",
            "disease.html",
            **frames.shared,
            **rows[-1],
            n_diseases=len(cohort.diseases),
            barcode=barcode_picture(columns, sides[0], sides[1], cohort.log_k),
            families=families,
            characteristic=listed_concepts(frames, frames.choice.disease_lists[number], frames.choice.diseases[number]),
            composition=composition_picture(composition, members, others),
            n_rest=len(others),
            datasets=sorted({cohort.datasets[each] for each in (*members.tolist(), *others.tolist())}),
            patients=patients,
            pairs=[pair for pair in pairs if name in (pair["a"], pair["b"])],
        )
        rows[-1]["faces"] = [each for each in patients if each["portrait"]][:_FACES]
    site.page("diseases.html", "diseases.html", **frames.shared, diseases=rows, pairs=pairs)


def write_families(site: Site, frames: Frames) -> None:
    """Write families.html: what the colours of barcodes stand for."""
    order = frames.choice.order
    n_silent = len(order.family_of) - len(order.order)
    site.page(
        "families.html",
        "families.html",
        **frames.shared,
        families=frames.families(24),
        n_silent=n_silent,
    )
