"""Which latents set a patient or a disease apart: lists of latents with their numbers, without pages or pictures."""

from typing import Any

import numpy as np

from cytosae.relations import LEAST_OTHERS, Others, as_z, prediction_t

from .cohort import Cohort, Floats, Row

TOP = 12  # latents of each list


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
    is_mean = cohort.barcodes.header.spec["normalize"] == "images"  # the other way grows with the number of images
    if not is_mean or n_others(cohort, number) < LEAST_OTHERS:
        return None
    barcode = np.zeros(cohort.n_latents)
    barcode[row.latents] = row.values
    others = cohort.groups.others(int(cohort.peers_of[number]), barcode)
    return unusual(barcode, others, int(cohort.n_images[number]))
