"""Which latents set a patient or a disease apart: lists of latents with their numbers, without pages or pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.relations import LEAST_OTHERS, Others, as_z, prediction_t

from .cohort import Cohort, Floats, Row
from .sentence import ALPHA

TOP = 12  # latents of each list
_SAME = 0.8  # correlation above which two latents would show the same cells


def characteristic(row: Row, overall: Floats, most: int = TOP) -> list[dict[str, Any]]:
    """The latents whose barcode value exceeds the mean of all patients most: latent, value, mean, difference."""
    excess = row.values - overall[row.latents]
    order = np.lexsort((row.latents, -excess))[:most]
    return [
        {"latent": int(row.latents[at]), "value": float(row.values[at]), "mean": float(overall[row.latents[at]])}
        | {"difference": float(excess[at])}
        for at in order
        if excess[at] > 0
    ]


def unusual(barcode: Floats, others: Others, n_images: int, most: int = TOP) -> list[dict[str, Any]]:
    """Latents with the largest |z| against other patients of the disease and dataset (as `cyto concept patient`)."""
    z = as_z(prediction_t(barcode, others, n_images), others.n)
    order = np.argsort(-np.abs(z), kind="stable")[:most]
    return [
        {"latent": latent, "value": float(barcode[latent]), "mean": float(others.mean[latent]), "z": float(z[latent])}
        for latent in order.tolist()
        if z[latent] != 0
    ]


def n_others(cohort: Cohort, number: int) -> int:
    """Other patients of the disease and dataset of a patient; 0 without a disease."""
    return int(cohort.groups.n_patients[cohort.peers_of[number]]) - 1 if cohort.disease_of[number] >= 0 else 0


def unusual_of(cohort: Cohort, number: int, row: Row) -> list[dict[str, Any]] | None:
    """`unusual` of a patient of the cohort; None where it cannot be asked (few others, or barcodes are sums)."""
    compared = _compared(cohort, number, row)
    return None if compared is None else unusual(*compared, int(cohort.n_images[number]))


def n_asked(cohort: Cohort, number: int, row: Row) -> int:
    """Among how many latents `unusual_of` looks: those above 0 in the patient or in the others; 0 where it cannot."""
    compared = _compared(cohort, number, row)
    return 0 if compared is None else int(((compared[0] > 0) | (compared[1].mean > 0)).sum())


def _compared(cohort: Cohort, number: int, row: Row) -> tuple[Floats, Others] | None:
    """The patient's barcode, and the others of its disease and dataset."""
    is_mean = cohort.barcodes.header.spec["normalize"] == "images"  # the other way grows with the number of images
    if not is_mean or n_others(cohort, number) < LEAST_OTHERS:
        return None
    barcode = np.zeros(cohort.n_latents)
    barcode[row.latents] = row.values
    return barcode, cohort.groups.others(int(cohort.peers_of[number]), barcode)


def distinct(latents: Sequence[int], vectors: npt.NDArray[np.float32], most: int) -> dict[int, list[int]]:
    """The first latents of a list that are not active in the same images as one before: latent -> those left to it.

    vectors : (n_latents, n) sketches of norm 1, whose products are correlations
    """
    shown: dict[int, list[int]] = {}
    for latent in latents:
        same = next((other for other in shown if vectors[latent] @ vectors[other] > _SAME), None)
        if same is not None:
            shown[same].append(latent)
        elif len(shown) < most:
            shown[latent] = []
    return shown


def higher_on(table: pa.Table, side: str, most: int) -> list[int]:
    """The latents that a comparison finds higher on a side, a or b: first those with q of at most `ALPHA`, by rank."""
    rank, q = (table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in (f"rank_{side}", "q"))
    listed = np.flatnonzero(~np.isnan(rank))
    found: list[int] = listed[np.lexsort((rank[listed], ~(q[listed] <= ALPHA)))][:most].tolist()
    return found
