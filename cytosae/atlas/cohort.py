"""Patients and diseases: their numbers and names in the atlas, and their barcodes.

Barcodes are read in chunks of patients. A dense patients x latents array is never held: dense are diseases x latents,
and patients x some latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.relations import Others, dispersion_of, log_scale
from stores.barcode_store import BarcodeStore
from stores.csr import CsrRows
from stores.errors import DamagedStore
from stores.tables import STATUS_OK

from .pseudonyms import Pseudonyms

_ROWS = 256  # patients, or images, per read
_IMAGES = 1024  # images of a block
Floats = npt.NDArray[np.float64]
Values = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """The nonzero latents of one patient or image, and their values."""

    latents: npt.NDArray[Any]
    values: Values


class Cohort:
    """The patients and diseases of a barcodes folder; each has a number, which is also in the name of its page."""

    def __init__(self, barcodes: BarcodeStore, tau: float, *, pseudonyms: Pseudonyms | None) -> None:
        """With `pseudonyms`, patients are numbered in the order that these give, and named P0001, P0002, ..."""
        self.barcodes, self.tau = barcodes, tau
        self._tau = tau if len(barcodes.taus) > 1 else None
        obs = barcodes.read_obs("patient", self._tau, needed=("patient_id", "dataset", "disease", "n_images"))
        stored = [str(name) for name in obs.index]
        order = np.arange(len(obs)) if pseudonyms is None else pseudonyms.order(stored)
        self._rows_of = order  # number of a patient -> row in the store
        self._number_of = np.argsort(order)
        self.real_names = [stored[row] for row in order]
        self.names = self.real_names if pseudonyms is None else [f"P{n + 1:04d}" for n in range(len(obs))]
        self.datasets = [str(name) for name in np.asarray(obs["dataset"], object)[order]]
        self.n_images: Ints = np.asarray(obs["n_images"], np.int64)[order]
        self.diseases = [str(name) for name in barcodes.read_obs("disease", self._tau).index]
        numbers = {name: number for number, name in enumerate(self.diseases)}
        stated = [str(name) for name in np.asarray(obs["disease"], object)[order]]
        unknown = sorted({name for name in stated if name} - numbers.keys())
        if unknown:
            raise DamagedStore(f"{barcodes.root}: no barcode of the disease {unknown[0]!r}, which patients have")
        self.disease_of: Ints = np.array([numbers.get(name, -1) for name in stated], np.int64)  # -1: none
        keys = zip(self.datasets, np.asarray(obs["patient_id"], object)[order], strict=True)
        self._by_key = {(dataset, str(patient)): number for number, (dataset, patient) in enumerate(keys)}

    @property
    def n_patients(self) -> int:
        """Number of patients with a readable image."""
        return len(self.names)

    def disease_name(self, patient: int) -> str:
        """The disease of a patient; "" without one."""
        number = int(self.disease_of[patient])
        return "" if number < 0 else self.diseases[number]

    @cached_property
    def patient_of(self) -> Ints:
        """(n_images,) number of the patient of each image; -1 without a patient."""
        datasets, patients = (np.asarray(self._images[name], object) for name in ("dataset", "patient"))
        pairs = zip(datasets, patients, strict=True)
        return np.array([self._by_key.get((str(dataset), str(patient)), -1) for dataset, patient in pairs], np.int64)

    @cached_property
    def is_readable(self) -> npt.NDArray[np.bool_]:
        """(n_images,) could the image be read?"""
        return np.asarray(np.asarray(self._images["status"], object) == STATUS_OK, bool)

    @cached_property
    def labels(self) -> list[str]:
        """(n_images,) label of each image; "" without a label."""
        return [str(label) for label in np.asarray(self._images["label"], object)]

    @cached_property
    def image_datasets(self) -> list[str]:
        """(n_images,) dataset of each image."""
        return [str(name) for name in np.asarray(self._images["dataset"], object)]

    @cached_property
    def contents(self) -> Ints:
        """(n_images,) a number for each content of an image file; without a recorded hash every image has its own."""
        n_images = len(self.labels)
        if "content_hash" not in self._images.columns:
            return np.arange(n_images)
        hashes = [str(text) or f"image {n}" for n, text in enumerate(np.asarray(self._images["content_hash"], object))]
        return np.unique(hashes, return_inverse=True)[1].astype(np.int64)

    def cells(self, n_images: int, *, seed: int) -> list[list[int]]:
        """Per patient: increasing indices of at most `n_images` readable images, drawn at random."""
        members: list[list[int]] = [[] for _ in self.names]
        for image in np.flatnonzero((self.patient_of >= 0) & self.is_readable):
            members[self.patient_of[image]].append(int(image))
        drawn = []
        for number, images in enumerate(members):
            rng = np.random.default_rng([seed, int(self._rows_of[number])])
            drawn.append(sorted(int(image) for image in rng.permutation(images)[:n_images]))
        return drawn

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(number, barcode) of every patient, in the order of the store."""
        for row, found in _rows(self.barcodes, "patient", self._tau, "X"):
            yield int(self._number_of[row]), found

    def image_blocks(self, matrix: str, *, of: npt.NDArray[np.bool_] | None = None) -> Iterator[tuple[int, CsrRows]]:
        """(first image, rows) of all images, in order: `X`, tokens above tau, or `mean`, image activations.

        of : (n_images,) blocks without one of these are not read
        """
        reader = self.barcodes.matrix("image", self._tau, matrix)
        for start in range(0, reader.shape[0], _IMAGES):
            if of is None or of[start : start + _IMAGES].any():
                yield start, reader.read_rows(start, min(start + _IMAGES, reader.shape[0]))

    @cached_property
    def rarity(self) -> Values:
        """(n_latents,) what a latent weighs where images are compared: 0 if it is above tau in every readable image.

        ln((n + 1) / (images with it + 1)), as `cyto concept search` weighs, but of what barcodes count.
        """
        weights: Values = np.log((self.is_readable.sum() + 1) / (self.groups.n_images_with + 1)).clip(0)
        return weights.astype(np.float32)

    def values(self, latents: Ints) -> Values:
        """(n_patients, len(latents)) barcode values of some latents."""
        found = np.zeros((self.n_patients, len(latents)), np.float32)
        position = positions(latents, self.n_latents)
        for number, row in self.rows():
            at = position[row.latents]
            found[number, at[at >= 0]] = row.values[at >= 0]
        return found

    @cached_property
    def disease_means(self) -> Values:
        """(n_diseases, n_latents) disease barcodes."""
        means = np.zeros((len(self.diseases), self.n_latents), np.float32)
        for number, row in _rows(self.barcodes, "disease", self._tau, "X"):
            means[number, row.latents] = row.values
        return means

    @cached_property
    def n_latents(self) -> int:
        """Latents of the SAE."""
        return self.barcodes.matrix("patient", self._tau).shape[1]

    @cached_property
    def peers_of(self) -> Ints:
        """(n_patients,) number of the group of the same disease and dataset; -1 for a patient without a disease."""
        keys = list(zip(self.disease_of.tolist(), self.datasets, strict=True))
        number = {key: n for n, key in enumerate(sorted({key for key in keys if key[0] >= 0}))}
        return np.array([number.get(key, -1) for key in keys], np.int64)

    @cached_property
    def log_k(self) -> float:
        """K of ln(1 + K a), with which barcodes are drawn: 1 / K is one token in all images of a patient."""
        is_mean = self.barcodes.header.spec["normalize"] == "images"
        return max(1.0, float(self.n_images.mean())) if is_mean and self.n_patients else float(self.n_latents)

    def groups_of(self, disease: int) -> list[int]:
        """The groups of `peers_of` that have a disease, one for each dataset."""
        return sorted({int(group) for group in self.peers_of[self.disease_of == disease]}) if disease >= 0 else []

    @cached_property
    def groups(self) -> "Groups":
        """Sums over the patients of each disease and dataset; reads all images once."""
        n_groups = int(self.peers_of.max(initial=-1)) + 2  # the last is for patients without a disease
        n_patients = np.bincount(self.peers_of % n_groups, minlength=n_groups)
        n_images = np.bincount(self.peers_of % n_groups, self.n_images, minlength=n_groups)
        per_patient = n_images / np.maximum(1, n_patients)
        sums, squares, logs, log_squares, levels, spread = np.zeros((6, n_groups, self.n_latents))
        for number, row in self.rows():
            values, group = row.values.astype(np.float64), int(self.peers_of[number])
            log_values = log_scale(values, float(per_patient[group]))
            sums[group, row.latents] += values
            squares[group, row.latents] += values**2
            logs[group, row.latents] += log_values
            log_squares[group, row.latents] += log_values**2
            levels[group, row.latents] += (self.n_images[number] - 1) * values
            spread[group, row.latents] -= self.n_images[number] * values**2
        n_images_with = np.zeros(self.n_latents, np.int64)
        for image, row in _rows(self.barcodes, "image", self._tau, "X"):
            if self.is_readable[image]:
                n_images_with[row.latents] += 1
            if self.is_readable[image] and self.patient_of[image] >= 0:
                spread[self.peers_of[self.patient_of[image]], row.latents] += row.values.astype(np.float64) ** 2
        return Groups(
            n_patients, per_patient, sums, squares, logs, log_squares, dispersion_of(spread, levels), n_images_with
        )

    @cached_property
    def _images(self) -> Any:
        return self.barcodes.read_obs("image", self._tau)


@dataclass(frozen=True, eq=False)
class Groups:
    """For each disease and dataset: the number of patients, and sums over their barcodes, (n_groups, n_latents).

    Symbols of `prediction_t`: images_per_patient is K, dispersion is C; logs and log_squares are sums on `log_scale`.
    """

    n_patients: Ints
    images_per_patient: Floats  # (groups,)
    sums: Floats
    squares: Floats
    logs: Floats
    log_squares: Floats
    dispersion: Floats
    n_images_with: Ints  # (n_latents,) readable images in which each is above tau, of all groups and of nobody

    def others(self, group: int, barcode: Floats) -> Others:
        """Statistics of a group without one of its patients, whose barcode, (n_latents,), is given."""
        n, k = int(self.n_patients[group]) - 1, float(self.images_per_patient[group])
        mean, sd = _moments(n, self.sums[group], self.squares[group], barcode)
        log_mean, log_sd = _moments(n, self.logs[group], self.log_squares[group], log_scale(barcode, k))
        return Others(n, mean, sd, log_mean, log_sd, self.dispersion[group], k)


def _moments(n: int, sums: Floats, squares: Floats, less: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation (ddof 1) of n values, from sums over n + 1 values and the value to leave out."""
    mean = np.maximum(0, sums - less) / n
    return mean, np.sqrt(np.maximum(0, squares - less**2 - n * mean**2) / (n - 1))


def positions(latents: Ints, n_latents: int) -> Ints:
    """(n_latents,) position of each latent in `latents`; -1 for the others."""
    found = np.full(n_latents, -1, np.int64)
    found[latents] = np.arange(len(latents))
    return found


def _rows(barcodes: BarcodeStore, level: str, tau: float | None, matrix: str) -> Iterator[tuple[int, Row]]:
    reader = barcodes.matrix(level, tau, matrix)
    for start in range(0, reader.shape[0], _ROWS):
        found = reader.read_rows(start, min(start + _ROWS, reader.shape[0]))
        for row, (first, last) in enumerate(zip(found.indptr, found.indptr[1:], strict=False), start=start):
            yield row, Row(found.indices[first:last], found.values[first:last])
