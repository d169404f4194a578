"""Pages of patients: the barcode, the cells, what is characteristic and unusual, and the list of all patients."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.stats import norm

from cytosae.relations import LEAST_OTHERS
from stores.wording import counted

from .cell_choice import Beside, PatientCells
from .cell_reasons import Reason, least_images
from .cell_types import LEAST_CELLS
from .cohort import Cohort, Ints, Row
from .drawings import Columns, barcode_columns, barcode_picture, composition_picture
from .frames import Frames
from .latent_lists import n_asked, n_others
from .odd_cells import OddCell
from .site import Site, whole

_LISTED = 3  # types of cell of a patient, in lists


def columns_of(frames: Frames) -> Columns:
    """Where latents stand in the barcodes of all pages."""
    order = frames.choice.order
    return barcode_columns(order.order, order.starts, len(order.family_of))


def write_patient_pages(site: Site, frames: Frames, *, most: int | None = None) -> Iterator[int]:
    """Write the pages of all patients (or the first `most` of the store); yields the number written so far."""
    cohort = frames.cohort
    columns, composition = columns_of(frames), frames.composition
    families = frames.families()
    is_mean = cohort.barcodes.header.spec["normalize"] == "images"
    for n_done, (number, row) in enumerate(cohort.rows(), start=1):
        if most is not None and n_done > most:
            return
        peers, n_compared = _peers(cohort, number), n_asked(cohort, number, row)
        cells = frames.choice.patients[number]
        shares = composition_picture(composition, np.array([number]), peers)
        site.page(
            f"patients/{number}.html",
            "patient.html",
            **frames.shared,
            number=number,
            name=cohort.names[number],
            dataset=cohort.datasets[number],
            disease=cohort.disease_name(number),
            disease_number=int(cohort.disease_of[number]),
            n_images=int(cohort.n_images[number]),
            n_patients=cohort.n_patients,
            n_others=n_others(cohort, number),
            is_mean=is_mean,
            least_others=LEAST_OTHERS,
            before=number - 1 if number else None,
            after=number + 1 if number + 1 < cohort.n_patients else None,
            n_active=len(row.latents),
            n_asked=n_compared,
            z_by_chance=z_by_chance(n_compared),
            against=_against(cohort, number),
            barcode=barcode_picture(
                columns, (row.latents, row.values), _mean_of_others(cohort, number, row), cohort.log_k
            ),
            families=families,
            characteristic=listed_concepts(frames, cells.characteristic, cells.beside),
            unusual=None if cells.unusual is None else listed_concepts(frames, cells.unusual, cells.beside_peers),
            types=_types(frames, cells, shares["rows"]),
            odd=_odd(frames, cells, cohort.disease_name(number)),
            composition=shares,
            cells=[
                frames.plain(image)
                for image in sorted(frames.plan.cells[number], key=frames.plan.number_of.__getitem__)
            ],
        )
        yield n_done


def z_by_chance(n_latents: int) -> float:
    """The |z| that one of so many latents exceeds by chance, on average, if z were normal; 0 of none."""
    return float(norm.isf(0.5 / n_latents)) if n_latents else 0.0


def write_patient_list(site: Site, frames: Frames) -> None:
    """Write patients.html."""
    cohort = frames.cohort
    groups = [(name, n) for n, name in enumerate(cohort.diseases)] + [("no disease stated", -1)]
    members = [
        {
            "disease": name,
            "number": n,
            "patients": [listed_patient(frames, int(p)) for p in np.flatnonzero(cohort.disease_of == n)],
        }
        for name, n in groups
    ]
    site.page(
        "patients.html",
        "patients.html",
        **frames.shared,
        groups=[group for group in members if group["patients"]],
        several=len({*cohort.datasets}) > 1,
    )


def listed_patient(frames: Frames, number: int) -> dict[str, Any]:
    """A patient as lists show one: number, name, dataset, images, the most typical cell, the types of its cells."""
    cohort = frames.cohort
    return {
        "number": number,
        "name": cohort.names[number],
        "dataset": cohort.datasets[number],
        "n_images": int(cohort.n_images[number]),
        "portrait": frames.portrait(number),
        "types": _in_words(frames.composition.labels, frames.composition.counts[number]),
    }


def _in_words(labels: list[str], counts: Ints) -> str:
    """How many images of each label, the most first: of many labels the first three."""
    order = [at for at in np.argsort(-counts, kind="stable").tolist() if counts[at]]
    words = ", ".join(f"{whole(int(counts[at]))} {labels[at]}" for at in order[:_LISTED])
    n_more = len(order) - _LISTED
    return f"{words}, and {counted(n_more, 'type')} more" if n_more > 0 else words


def listed_concepts(frames: Frames, rows: list[dict[str, Any]], beside: dict[int, Beside]) -> list[dict[str, Any]]:
    """Rows of a list of latents, each with what names the concept, and its cells where these were looked for."""
    return [
        {**row, **frames.concept(row["latent"]), **frames.doubts(row["latent"])}
        | {"cells": frames.beside(row["latent"], beside[row["latent"]]) if row["latent"] in beside else None}
        for row in rows
    ]


def _types(frames: Frames, cells: PatientCells, shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The patient's types of cell, the commonest first: images, share in the others, the most typical cells."""
    others = {row["label"]: row["others"] for row in shares}
    return [
        {"label": each.label, "n": each.n, "others": others.get(each.label)}
        | {"cells": [frames.plain(image) | {"alike": cosine} for image, cosine in each.typical]}
        for each in cells.types
    ]


def _odd(frames: Frames, cells: PatientCells, disease: str) -> list[dict[str, Any]]:
    """The least typical cells, and those unlike the other patients' cells, each with the latents that make it so."""
    own = "this patient's other cells of its type"
    peers = f"the cells of its type of the other patients with {disease} in the dataset"
    found = [
        ("Least typical for their type", ("least-typical", "Least typical"), own, cells.atypical),
        ("Unlike the others of their type", ("unlike", "Unlike"), peers, cells.unlike),
    ]
    listed = [{odd.image for odd in some} for _, _, _, some in found]
    in_both = listed[0] & listed[1]
    return [
        {"title": title, "place": place, "whom": whom, "least": least_images(frames.cohort), "least_cells": LEAST_CELLS}
        | {"cells": [_odd_cell(frames, odd) | {"in_both": odd.image in in_both} for odd in some]}
        for title, place, whom, some in found
        if some
    ]


def _odd_cell(frames: Frames, odd: OddCell) -> dict[str, Any]:
    """A cell with one map of all latents that are more here, how many these are, and its reasons one by one."""
    return {
        **frames.plain(odd.image),
        "map": frames.marks.together(odd.image, odd.more),
        "largest": 1.0 if odd.more else 0.0,
        "n_more": len(odd.more),
        "share_of_more": sum(share for _, share in odd.more),
        "alike": odd.alike,
        "usual": odd.usual,
        "reasons": [_reason(frames, odd.image, each) for each in odd.reasons],
    }


def _reason(frames: Frames, image: int, reason: Reason) -> dict[str, Any]:
    """A latent that makes a cell unlike others: its concept, its map on the cell (None: not active), its numbers."""
    mapped = frames.mapped(image, reason.latent)
    return {
        **frames.concept(reason.latent),
        **frames.doubts(reason.latent),
        "also": [frames.concept(latent) for latent in reason.also],
        "has_card": frames.has_card(reason.latent),
        "frame": mapped if mapped["largest"] > 0 else None,
        "here": reason.here,
        "others": reason.others,
        "share": reason.share,
    }


def _peers(cohort: Cohort, number: int) -> Ints:
    """The other patients that one is compared with: of the disease and dataset, or all if there are none."""
    same = (cohort.peers_of == cohort.peers_of[number]) & (cohort.disease_of[number] >= 0)
    same[number] = False
    if same.any():
        return np.flatnonzero(same)
    return np.delete(np.arange(cohort.n_patients), number)


def _against(cohort: Cohort, number: int) -> str:
    """Whom `_peers` names, in words."""
    n = n_others(cohort, number)
    if n:
        return f"the {n:,} other patients with {cohort.disease_name(number)} in the dataset"
    n = cohort.n_patients - 1
    return f"the {n:,} other patients" if n else "no other patient"


def _mean_of_others(cohort: Cohort, number: int, row: Row) -> tuple[Ints, Any]:
    """The mean barcode of `_peers`, as (latents, values)."""
    groups = cohort.groups
    n = n_others(cohort, number)
    sums = groups.sums[cohort.peers_of[number]].copy() if n else groups.sums.sum(axis=0)
    sums[row.latents] -= row.values
    mean = np.maximum(0, sums / max(1, n or cohort.n_patients - 1))
    mean[mean < 1e-6 * mean.max(initial=0)] = 0  # what is left of the patient's own by rounding
    latents = np.flatnonzero(mean)
    return latents, mean[latents].astype(np.float32)
