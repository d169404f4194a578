"""Pages of patients, of diseases, and of the pairs of diseases that were compared."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cytosae.relations import LEAST_OTHERS, Others, as_z, prediction_t

from .cohort import Cohort, Floats, Row
from .concept_pages import disease_name, image_name, pair_of
from .drawings import stripes
from .inputs import Inputs
from .pictures import thumb_place
from .plan import LISTED, Plan
from .site import Site, packed

_TOP = 12  # latents of each list
_PAIR_COLUMNS = ("mean_a", "mean_b", "difference", "q", "hedges_g")


def write_patient_pages(
    site: Site, inputs: Inputs, cohort: Cohort, plan: Plan, shared: dict[str, Any], *, most: int | None = None
) -> Iterator[int]:
    """Write the pages of all patients (or the first `most` of the store); yields the number written so far."""
    groups = cohort.groups
    overall = groups.sums.sum(axis=0) / max(1, cohort.n_patients)
    # the other normalization grows with the number of images
    is_mean = cohort.barcodes.header.spec["normalize"] == "images"
    for n_done, (number, row) in enumerate(cohort.rows(), start=1):
        if most is not None and n_done > most:
            return
        disease = int(cohort.disease_of[number])
        peers = int(cohort.peers_of[number])
        n_others = int(groups.n_patients[peers]) - 1
        unusual = None
        if is_mean and disease >= 0 and n_others >= LEAST_OTHERS:
            barcode = np.zeros(cohort.n_latents)
            barcode[row.latents] = row.values
            unusual = _unusual(barcode, groups.others(peers, barcode), int(cohort.n_images[number]), plan)
        site.page(
            f"patients/{number}.html",
            "patient.html",
            **shared,
            number=number,
            name=cohort.names[number],
            dataset=cohort.datasets[number],
            disease=disease_name(cohort, number),
            disease_number=disease,
            n_images=int(cohort.n_images[number]),
            n_patients=cohort.n_patients,
            n_others=n_others,
            is_mean=is_mean,
            least_others=LEAST_OTHERS,
            before=number - 1 if number else None,
            after=number + 1 if number + 1 < cohort.n_patients else None,
            n_active=len(row.latents),
            stripes=stripes(row.latents, row.values, cohort.n_latents),
            characteristic=_characteristic(row, overall, plan),
            unusual=unusual,
            cells=[
                _cell(inputs, cohort, plan, image, shared)
                for image in sorted(plan.cells[number], key=plan.number_of.__getitem__)
            ],
        )
        yield n_done


def write_patient_list(site: Site, cohort: Cohort, shared: dict[str, Any]) -> None:
    """Write patients.html."""
    groups = [(name, n) for n, name in enumerate(cohort.diseases)] + [("no disease stated", -1)]
    members = [
        {
            "disease": name,
            "number": n,
            "patients": [_listed_patient(cohort, int(p)) for p in np.flatnonzero(cohort.disease_of == n)],
        }
        for name, n in groups
    ]
    site.page("patients.html", "patients.html", **shared, groups=[group for group in members if group["patients"]])


def _listed_patient(cohort: Cohort, number: int) -> dict[str, Any]:
    return {
        "number": number,
        "name": cohort.names[number],
        "dataset": cohort.datasets[number],
        "n_images": int(cohort.n_images[number]),
    }


def _cell(inputs: Inputs, cohort: Cohort, plan: Plan, image: int, shared: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": plan.number_of[image],
        "name": image_name(inputs, plan, image, is_hidden=shared["pseudonyms"]),
        "label": cohort.labels[image],
        "thumb": thumb_place(plan.thumb_of[image], len(plan.images)),
    }


def _characteristic(row: Row, overall: Floats, plan: Plan) -> list[dict[str, Any]]:
    """The latents whose barcode value exceeds the mean of all patients most."""
    excess = row.values - overall[row.latents]
    order = np.lexsort((row.latents, -excess))[:_TOP]
    return [
        {"latent": int(row.latents[at]), "value": float(row.values[at]), "mean": float(overall[row.latents[at]])}
        | {"difference": float(excess[at]), "has_page": plan.has_page(int(row.latents[at]))}
        for at in order
        if excess[at] > 0
    ]


def _unusual(barcode: Floats, others: Others, n_images: int, plan: Plan) -> list[dict[str, Any]]:
    """Latents with the largest |z| against other patients of the disease and dataset (as `cyto concept patient`)."""
    z = as_z(prediction_t(barcode, others, n_images), others.n)
    order = np.argsort(-np.abs(z), kind="stable")[:_TOP]
    return [
        {"latent": latent, "value": float(barcode[latent]), "mean": float(others.mean[latent]), "z": float(z[latent])}
        | {"has_page": plan.has_page(latent)}
        for latent in order.tolist()
        if z[latent] != 0
    ]


def write_disease_pages(site: Site, inputs: Inputs, cohort: Cohort, plan: Plan, shared: dict[str, Any]) -> None:
    """Write the pages of diseases and their list."""
    means = cohort.disease_means.astype(np.float64)
    pairs = [{**pair_of(inputs, cohort, number), "number": number} for number in range(len(inputs.comparisons))]
    counts = np.bincount(cohort.disease_of[cohort.disease_of >= 0], minlength=len(cohort.diseases))
    rows = []
    for number, name in enumerate(cohort.diseases):
        members = np.flatnonzero(cohort.disease_of == number)
        others = np.delete(means, number, axis=0).mean(axis=0) if len(means) > 1 else np.zeros(means.shape[1])
        latents = np.flatnonzero(means[number])
        mean = Row(latents, means[number, latents].astype(np.float32))
        rows.append({"number": number, "name": name, "n_patients": int(counts[number]), "n_active": len(latents)})
        site.page(
            f"diseases/{number}.html",
            "disease.html",
            **shared,
            **rows[-1],
            n_diseases=len(cohort.diseases),
            stripes=stripes(mean.latents, mean.values, cohort.n_latents),
            characteristic=_characteristic(mean, others, plan),
            patients=[_listed_patient(cohort, int(member)) for member in members],
            pairs=[pair for pair in pairs if name in (pair["a"], pair["b"])],
        )
    site.page("diseases.html", "diseases.html", **shared, diseases=rows, pairs=pairs)


def write_pair_pages(site: Site, inputs: Inputs, cohort: Cohort, plan: Plan, shared: dict[str, Any]) -> None:
    """Write a page for each comparison, and its columns as data, which the filters of other pages also use."""
    for number, comparison in enumerate(inputs.comparisons):
        table, pair = inputs.comparison_table(number), pair_of(inputs, cohort, number)
        columns = {name: table[name].to_numpy(zero_copy_only=False).astype(np.float32) for name in _PAIR_COLUMNS}
        site.data(f"pair-{pair['file']}", {name: packed(values) for name, values in columns.items()})
        tops = {}
        for side in "ab":
            ranks = table[f"rank_{side}"].to_numpy(zero_copy_only=False)
            chosen = np.flatnonzero(ranks <= LISTED)
            rows = table.take(chosen[np.argsort(ranks[chosen])]).to_pylist()
            tops[side] = [{**row, "has_page": plan.has_page(row["latent"])} for row in rows]
        site.page(
            f"pairs/{pair['file']}.html",
            "pair.html",
            **shared,
            **pair,
            summary=comparison.header.summary or {},
            tau=comparison.header.spec["tau"],
            tops=tops,
        )
