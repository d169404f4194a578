"""What is special about a patient: latents whose barcode is far from that of the other patients of the disease.

For patient p and latent s, with the others of the same disease and dataset (at least 5):

    z = (a_p[s] - median of the others) / sqrt((1.4826 MAD of the others)^2 + se^2)
    se^2 = phi max(a_p[s], median) / N_p, at least (1 / N_p)^2: one token in one of the N_p images
    phi = variance / mean of the patient's own images, at least 1 (Poisson)

se is the error of a mean over the patient's images; where the patient lies below the others it is taken at their level,
as few tokens would seem too certain. MAD is 0 where most others lack the latent; se then keeps a find in a single image
at a z of about 1, one of the same strength in k images at sqrt(k).

Whether a difference holds within the patient is asked of its images: split into halves again and again (seeded), how
often do both halves lie on the patient's side of the others' median? By chance, half the times.

No p- or q-values: n others can at best say "1 of n + 1", once per latent, and thousands of latents are looked at. What
stands here describes and ranks; a stain or a scanner can make a patient special too.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as ss

from stores.barcode_store import BarcodeStore
from stores.errors import BadInput, DamagedStore
from stores.progress import Progress
from stores.results import ResultStore, begin_results
from stores.spec import PATIENT_CONCEPTS
from stores.tables import STATUS_OK, listed

from .barcode_checks import IMAGE_COLUMNS, PATIENT_COLUMNS
from .drawing import plain
from .relation_figures import plot_all_patients, plot_patient

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
LEAST_OTHERS = 5  # below, a median and a MAD say nothing
LEAST_IMAGES = 4  # two in each half
Z_FROM = 3.0  # a latent sets a patient apart from here on, if it replicates
REPLICATED = 0.95  # share of the splits
_MAD_TO_SD = 1.4826  # of a normal distribution
_LEAST_DRAWN, _MOST_DRAWN = 12, 40  # latents in the figure


@dataclass(frozen=True, kw_only=True)
class PatientSettings:
    """What decides the numbers."""

    tau: float | None = None  # of barcodes at several tau
    min_images: int = 3  # of the patient's in which a latent must be above tau, to be called raised
    n_splits: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.min_images, self.n_splits) < 1:
            raise BadInput(f"min_images and n_splits must be at least 1; found {self.min_images} and {self.n_splits}")


@dataclass(frozen=True, eq=False)
class PatientConcepts:
    """The latents of one patient that differ from the others' median and have support, by falling |z|.

    All arrays are (n,), but `others` (n_others, n).
    """

    latent: Ints
    barcode: Floats  # mean tokens above tau per image
    median: Floats  # of the others' barcodes
    mad: Floats
    se: Floats
    z: Floats
    n_images_active: Ints  # of the patient's images
    n_others_active: Ints  # others with a barcode above 0
    n_others_beyond: Ints  # others at least as far on the patient's side
    replicated: Floats  # share of the splits in which both halves lie on the patient's side of the median
    others: Floats
    halves_correlation: float  # of the two halves' deviations over the latents that the others have; NaN if undefined

    @property
    def sets_apart(self) -> npt.NDArray[np.bool_]:
        """|z| of 3 or more, and replicated in 95% of the splits."""
        found: npt.NDArray[np.bool_] = (np.abs(self.z) >= Z_FROM) & (self.replicated >= REPLICATED)
        return found


@dataclass(frozen=True, kw_only=True)
class PatientResult:
    """Rows of patients.parquet (`skipped`: the reason in words, or None), and the ten largest |z| of a single one."""

    patients: list[dict[str, Any]]
    top: list[dict[str, Any]]
    was_complete: bool


def write_patient_concepts(
    barcodes: Path,
    patient: str | None,
    out: Path,
    settings: PatientSettings = PatientSettings(),
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> PatientResult:
    """patient_concepts.parquet, patients.parquet and a figure for one patient, or for all (None), in the folder `out`.

    Of the image barcodes only the patient's own images are read. Memory: the patient barcodes, sparse; dense those of
    the patient's disease, for the latents that somebody there has.

    Raises
    ------
    BadInput
        If there is no such patient, or none at all; if it has no disease, fewer than 4 readable images or fewer than 5
        others (of all patients: if nobody has enough).
    DamagedStore
        If the barcodes lack a chunk or cannot be read.
    """
    cohort = _Cohort(BarcodeStore(barcodes), settings)
    chosen = range(len(cohort.names)) if patient is None else [cohort.number(patient)]
    reasons = [cohort.why_not(number) for number in chosen]
    if all(reasons):
        who = (
            f"{patient!r} has"
            if patient is not None
            else f"none of {len(reasons):,} patients can be compared; the first has"
        )
        raise BadInput(
            f"{who} {reasons[0]} in {barcodes}: patient-specific concepts need a disease, {LEAST_IMAGES} readable "
            f"images and {LEAST_OTHERS} other patients of the same disease and dataset"
        )
    spec = {
        "barcodes": cohort.store.header.identity,
        "patient": patient,
        **{**asdict(settings), "tau": cohort.tau},
    }
    writer = begin_results(out, PATIENT_CONCEPTS, spec, overwrite=overwrite, inputs=[barcodes])
    if writer.is_complete:
        return _read_result(writer.root, patient)
    tables, rows = [], []
    for n_done, (number, reason) in enumerate(zip(chosen, reasons, strict=True)):
        progress(n_done, len(reasons), cohort.names[number])
        row: dict[str, Any] = {**cohort.describe(number), "skipped": reason}
        if reason is None:
            found = cohort.concepts_of(number)
            tables.append(_table(cohort.names[number], found))
            row |= _counts(found)
            if patient is not None:
                _draw(cohort, number, found, writer.root / "patient_concepts")
        rows.append(row)
    progress(len(reasons), len(reasons), "")
    table = pa.concat_tables(tables)
    writer.write_table("patient_concepts", table)
    writer.write_table("patients", pa.Table.from_pylist(rows, schema=_PATIENTS))
    if patient is None:
        plot_all_patients([row for row in rows if row["skipped"] is None], writer.root / "patients")
    writer.finish({"n_patients": len(rows), "n_skipped": sum(row["skipped"] is not None for row in rows)})
    return _result(rows, table, patient, was_complete=False)


class _Cohort:
    """The patients of a barcodes folder, and the images of each."""

    def __init__(self, store: BarcodeStore, settings: PatientSettings) -> None:
        if store.header.spec["normalize"] != "images":
            raise BadInput(
                f"{store.root} is normalised by {store.header.spec['normalize']}: its patients with more images have "
                f"larger barcodes. Count with cyto barcode --normalize images"
            )
        store.check()
        self.store, self.settings = store, settings
        self.tau = store.taus[0] if settings.tau is None else settings.tau
        obs = store.read_obs("patient", settings.tau, needed=PATIENT_COLUMNS)
        self._matrix = ss.csr_matrix(store.read_element("patient", "X", settings.tau))
        if not len(obs):
            raise BadInput(
                f"{store.root} has no patient: no image has one; count again with a column 'patient' (cyto barcode "
                f"--table)"
            )
        self.names = [str(name) for name in obs.index]
        self._ids, self._datasets, self._diseases = (
            np.asarray(obs[name], object) for name in ("patient_id", "dataset", "disease")
        )
        self._n_images = np.asarray(obs["n_images"], np.int64)
        self._images = store.read_obs("image", settings.tau, needed=IMAGE_COLUMNS)

    def number(self, patient: str) -> int:
        """The row of a patient."""
        if patient not in self.names:
            raise BadInput(
                f"no patient {patient!r} in {self.store.root}; it has {len(self.names):,}: {listed(self.names)}"
            )
        return self.names.index(patient)

    def others(self, number: int) -> Ints:
        """Rows of the other patients of the same disease and dataset."""
        same = (self._diseases == self._diseases[number]) & (self._datasets == self._datasets[number])
        same[number] = False
        return np.flatnonzero(same)

    def why_not(self, number: int) -> str | None:
        """What stands against comparing this patient, in words."""
        if not self._diseases[number]:
            return "no disease"
        if self._n_images[number] < LEAST_IMAGES:
            return f"{self._n_images[number]} readable images"
        n_others = len(self.others(number))
        return f"{n_others} others with {self._diseases[number]}" if n_others < LEAST_OTHERS else None

    def describe(self, number: int) -> dict[str, Any]:
        """Who it is, and whom it is compared with."""
        return {
            "patient": self.names[number],
            "dataset": str(self._datasets[number]),
            "disease": str(self._diseases[number]),
            "n_images": int(self._n_images[number]),
            "n_others": len(self.others(number)),
        }

    def concepts_of(self, number: int) -> PatientConcepts:
        """Compare one patient with the others, latent by latent."""
        others = self.others(number)
        images = self._images_of(number)
        # latents that nobody here has cannot differ
        latents = np.union1d(self._matrix[others].indices, np.unique(images.indices)).astype(np.int64)
        return compare_patient(
            latents,
            images[:, latents],
            self._matrix[others][:, latents].toarray().astype(np.float64),
            min_images=self.settings.min_images,
            n_splits=self.settings.n_splits,
            rng=_rng(self.settings.seed, self.names[number]),
        )

    def _images_of(self, number: int) -> Any:
        """(N_p, L) counts of the patient's readable images; they must be those that its barcode was made of."""
        is_its = np.asarray(self._images["patient"], object) == self._ids[number]
        is_its &= np.asarray(self._images["dataset"], object) == self._datasets[number]
        is_its &= np.asarray(self._images["status"], object) == STATUS_OK
        rows = self.store.read_rows("image", np.flatnonzero(is_its), self.settings.tau)
        mean = np.asarray(rows.sum(axis=0, dtype=np.float64)).ravel() / max(1, rows.shape[0])
        barcode = self._matrix[[number]].toarray().ravel()
        if rows.shape[0] != self._n_images[number] or not np.allclose(mean, barcode, rtol=1e-5, atol=0):
            raise DamagedStore(
                f"{self.store.root}: the images of patient {self.names[number]!r} do not give its barcode; "
                f"count again with cyto barcode --overwrite"
            )
        return rows


def compare_patient(
    latents: Ints, images: Any, others: Floats, *, min_images: int, n_splits: int, rng: np.random.Generator
) -> PatientConcepts:
    """One patient against the others, as the module says; of the latents those that differ and have support.

    Parameters
    ----------
    latents : (n,) their numbers
    images : (N_p, n) scipy CSR: tokens above tau in each of the patient's images, N_p of 2 or more
    others : (n_others, n) barcodes, in mean tokens above tau per image
    min_images : of the patient's images in which a raised latent must be above tau
    n_splits : times that the images are halved, drawn from `rng`
    """
    n_images = images.shape[0]
    total = np.asarray(images.sum(axis=0, dtype=np.float64)).ravel()
    squares = np.asarray(images.multiply(images).sum(axis=0, dtype=np.float64)).ravel()
    barcode, median = total / n_images, np.median(others, axis=0)
    mad = np.median(np.abs(others - median), axis=0)
    variance = np.maximum(0, squares - n_images * barcode**2) / (n_images - 1)
    dispersion = np.maximum(1, variance / np.where(barcode > 0, barcode, 1))
    se = np.maximum(np.sqrt(dispersion * np.maximum(barcode, median) / n_images), 1 / n_images)
    scale = np.hypot(_MAD_TO_SD * mad, se)
    side = _side(barcode, median)
    n_active = images.getnnz(axis=0)
    both = np.zeros(len(latents), np.int64)
    others_have = (others > 0).any(axis=0)  # chosen without a look at the patient
    correlations = []
    for _ in range(n_splits):
        first = rng.permutation(n_images)[: n_images // 2]
        sum_first = np.asarray(images[np.sort(first)].sum(axis=0, dtype=np.float64)).ravel()
        halves = sum_first / len(first), (total - sum_first) / (n_images - len(first))
        both += (_side(halves[0], median) == side) & (_side(halves[1], median) == side)
        correlations.append(_correlation(*(((half - median) / scale)[others_have] for half in halves)))
    has_support = (side < 0) | ((side > 0) & (n_active >= min_images))
    z = (barcode - median) / scale
    kept = np.flatnonzero(has_support)
    kept = kept[np.lexsort((latents[kept], -np.abs(z[kept])))]
    beyond = np.where(side > 0, _side(others, barcode) >= 0, _side(others, barcode) <= 0).sum(axis=0)
    return PatientConcepts(
        latent=latents[kept],
        barcode=barcode[kept],
        median=median[kept],
        mad=mad[kept],
        se=se[kept],
        z=z[kept],
        n_images_active=n_active[kept],
        n_others_active=(others > 0).sum(axis=0)[kept],
        n_others_beyond=beyond[kept],
        replicated=both[kept] / n_splits,
        others=others[:, kept],
        halves_correlation=float(np.mean(correlations)),
    )


def _side(value: Floats, of: Floats) -> npt.NDArray[np.int64]:
    """-1, 0 or 1: below, at or above; both as float32, in which barcodes are stored."""
    found: npt.NDArray[np.int64] = np.sign(value.astype(np.float32).astype(np.float64) - of.astype(np.float32)).astype(
        np.int64
    )
    return found


def _correlation(a: Floats, b: Floats) -> float:
    if len(a) < 2 or not (a.std() > 0 and b.std() > 0):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _rng(seed: int, name: str) -> np.random.Generator:
    """Of the patient alone, so that it is split in the same way whoever else is looked at."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])])


_PATIENTS = pa.schema(
    [
        *((name, pa.string()) for name in ("patient", "dataset", "disease", "skipped")),
        *((name, pa.int64()) for name in ("n_images", "n_others", "n_latents", "n_raised", "n_lowered")),
        ("halves_correlation", pa.float64()),
    ]
)


def _counts(found: PatientConcepts) -> dict[str, Any]:
    correlation = found.halves_correlation
    return {
        "n_latents": len(found.latent),
        "n_raised": int((found.sets_apart & (found.z > 0)).sum()),
        "n_lowered": int((found.sets_apart & (found.z < 0)).sum()),
        "halves_correlation": None if np.isnan(correlation) else correlation,
    }


def _table(name: str, found: PatientConcepts) -> pa.Table:
    return pa.table(
        {
            "patient": pa.array([name] * len(found.latent), pa.string()),
            "rank": np.arange(1, len(found.latent) + 1),
            "latent": found.latent,
            "z": found.z,
            "barcode": found.barcode,
            "others_median": found.median,
            "others_mad": found.mad,
            "se": found.se,
            "n_images_active": found.n_images_active.astype(np.int64),
            "n_others_active": found.n_others_active.astype(np.int64),
            "n_others_beyond": found.n_others_beyond.astype(np.int64),
            "replicated": found.replicated,
            "sets_apart": found.sets_apart,
        }
    )


def _draw(cohort: _Cohort, number: int, found: PatientConcepts, path: Path) -> None:
    """The latents with the largest |z|: all that set the patient apart, or some."""
    some = np.arange(len(found.latent))[: min(_MOST_DRAWN, max(_LEAST_DRAWN, int(found.sets_apart.sum())))]
    who = cohort.describe(number)
    names = [
        f"{latent}: {barcode:.3g} against {median:.3g} tokens per image, in {n_active} images"
        for latent, barcode, median, n_active in zip(
            found.latent[some], found.barcode[some], found.median[some], found.n_images_active[some], strict=True
        )
    ]
    scale = np.hypot(_MAD_TO_SD * found.mad, found.se)[some]
    compared = f"against {who['n_others']} others with {plain(who['disease'])}"
    plot_patient(
        f"{plain(who['patient'])}: {who['n_images']} images, {compared}",
        names,
        found.z[some],
        (found.others[:, some] - found.median[some]) / scale,
        found.sets_apart[some],
        path,
    )


def _result(rows: list[dict[str, Any]], table: pa.Table, patient: str | None, *, was_complete: bool) -> PatientResult:
    top = [] if patient is None else table.slice(0, 10).to_pylist()
    return PatientResult(patients=rows, top=top, was_complete=was_complete)


def _read_result(root: Path, patient: str | None) -> PatientResult:
    store = ResultStore(root, PATIENT_CONCEPTS)
    return _result(store.table("patients").to_pylist(), store.table("patient_concepts"), patient, was_complete=True)
