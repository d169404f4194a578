"""What sets a patient apart: latents whose barcode is far from that of the other patients of the disease.

The score is z of `patient_z.py`, against the others of the same disease and dataset (at least 5); the atlas
shows the same. A latent sets a patient apart if

- |z| is 3 or more over all its images, and in both halves of them (by their own N) in 95% of the splits into halves
  (seeded), and
- no other patient is as far out on its side. (Of 741 others or more: at most 0.135%, what a z of 3 has on one side.)
  Whatever the distribution, of n + 1 exchangeable patients one is the highest and one the lowest: so at most
  2 / (n + 1) of the latents set one of them apart, and where levels spread as in docs/benchmarks.md far fewer.

No p- or q-values of the patient. What is usual is shown by the other patients: how many latents set each of
THEM apart, by the same rule. A stain or a scanner can set a patient apart too.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as ss
from scipy import stats

from cytosae.barcodes import IMAGE_COLUMNS, PATIENT_COLUMNS
from cytosae.plotting import plain
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput, DamagedStore
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import PATIENT_CONCEPTS, as_floats
from stores.tables import STATUS_OK, listed

from .figures import plot_all_patients, plot_patient
from .patient_z import LEAST_OTHERS, Others, as_z, describe_others, dispersion_of, own_variance, prediction_t
from .report import PatientResult

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
LEAST_IMAGES = 4  # two in each half
Z_FROM = 3.0  # a latent sets a patient apart from here on, if both halves do so too
REPLICATED = 0.95  # share of the splits
AS_FAR = 0.00135  # share of the others that may be as far out: what a normal distribution has beyond 3 on one side
RULE = (  # of the header: older folders have another
    "t prediction on the plain and the log scale, clumped tokens; |z| of 3 in all images and in both halves; "
    "no other as far"
)
_LEAST_DRAWN, _MOST_DRAWN = 12, 40  # latents in the figure


@dataclass(frozen=True, kw_only=True)
class PatientConfig:
    """How a patient is compared with the others.

    Attributes
    ----------
    tau : which barcodes, where there are several; None: the only ones
    min_images : fewest images of the patient in which a latent must be above tau, to be called raised
    n_splits : times that the patient's images are split into halves
    seed : of the splits
    """

    tau: float | None = None
    min_images: int = 3
    n_splits: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.min_images, self.n_splits) < 1:
            raise BadInput(f"min_images and n_splits must be at least 1; found {self.min_images} and {self.n_splits}")
        as_floats(self, "tau")


PatientSettings = PatientConfig  # its name in 0.1; stays for one release


@dataclass(frozen=True, eq=False)
class PatientConcepts:
    """The latents of one patient that differ from the others' mean and have support, by falling |z|.

    All arrays are (n,), but `others` and `others_z` (n_others, n).
    """

    latent: Ints
    barcode: Floats  # mean tokens above tau per image
    median: Floats  # of the others' barcodes
    mad: Floats
    mean: Floats
    sd: Floats
    se: Floats  # of the patient's own mean
    z: Floats
    n_images_active: Ints  # of the patient's images
    n_others_active: Ints  # others with a barcode above 0
    n_others_beyond: Ints  # others at least as far on the patient's side
    replicated: Floats  # share of the splits in which both halves have a |z| of 3 or more, on the patient's side
    others: Floats
    others_z: Floats  # theirs, against the same mean and spread, had they as many images as the patient
    halves_correlation: float  # of the two halves' deviations over the latents that the others have; NaN if undefined

    @property
    def sets_apart(self) -> npt.NDArray[np.bool_]:
        """|z| of 3 or more in all images, and in both halves in 95% of the splits; no other patient is as far out."""
        is_far = (np.abs(self.z) >= Z_FROM) & (self.replicated >= REPLICATED)
        found: npt.NDArray[np.bool_] = is_far & (self.n_others_beyond <= AS_FAR * len(self.others))
        return found


def write_patient_concepts(
    barcodes: Path | str,
    patient: str | None,
    out: Path | str,
    config: PatientConfig = PatientConfig(),
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> PatientResult:
    """patient_concepts.parquet, patients.parquet and a figure for one patient, or for all (None), in the folder `out`.

    The images of all patients of the disease are read, one patient at a time. Memory: the patient barcodes, sparse;
    dense those of the patient's disease, for the latents that any of them has.

    Parameters
    ----------
    barcodes : a folder of `cyto barcode`
    patient : its name, as in the index of the patient barcodes; None: every patient

    Raises
    ------
    BadInput
        If there is no such patient, or none at all; if it has no disease, fewer than 4 readable images or fewer than 5
        others (of all patients: if none can be compared).
    DamagedStore
        If the barcodes lack a chunk or cannot be read.
    """
    barcodes, out = Path(barcodes), Path(out)
    cohort = _Cohort(BarcodeStore(barcodes), config)
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
        "rule": RULE,
        **{**asdict(config), "tau": cohort.tau},
    }
    writer = begin_results(out, PATIENT_CONCEPTS, spec, overwrite=overwrite, inputs=[barcodes])
    writer.watch(cohort.store.header)
    if writer.is_complete:
        return _read_result(out, patient)
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
    for row in rows:
        if row["skipped"] is None:
            row |= _usual(row, rows, cohort)
    progress(len(reasons), len(reasons), "")
    table = pa.concat_tables(tables)
    writer.write_table("patient_concepts", table)
    writer.write_table("patients", pa.Table.from_pylist(rows, schema=_PATIENTS))
    if patient is None:
        plot_all_patients([row for row in rows if row["skipped"] is None], writer.root / "patients")
    writer.finish({"n_patients": len(rows), "n_skipped": sum(row["skipped"] is not None for row in rows)})
    return _result(out, rows, table, patient, was_complete=False)


class _Cohort:
    """The patients of a barcodes folder, and the images of each."""

    def __init__(self, store: BarcodeStore, config: PatientConfig) -> None:
        if store.header.spec["normalize"] != "images":
            raise BadInput(
                f"{store.root} is normalised by {store.header.spec['normalize']}: its patients with more images have "
                f"larger barcodes. Count with cyto barcode --normalize images"
            )
        store.check()
        self.store, self.config = store, config
        self.tau = store.taus[0] if config.tau is None else config.tau
        obs = store.read_obs("patient", config.tau, needed=PATIENT_COLUMNS)
        self._matrix = ss.csr_matrix(store.read_element("patient", "X", config.tau))
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
        self._images = store.read_obs("image", config.tau, needed=IMAGE_COLUMNS)
        self._dispersions: dict[tuple[str, str], Floats] = {}

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
        """Why this patient cannot be compared; None if it can."""
        if not self._diseases[number]:
            return "no disease"
        if self._n_images[number] < LEAST_IMAGES:
            return f"{self._n_images[number]} readable images"
        n_others = len(self.others(number))
        return f"{n_others} others with {self._diseases[number]}" if n_others < LEAST_OTHERS else None

    def describe(self, number: int) -> dict[str, Any]:
        """Name, dataset and disease of a patient, and the numbers of its images and of the others."""
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
        # latents that none of these patients has cannot differ
        latents = np.union1d(self._matrix[others].indices, np.unique(images.indices)).astype(np.int64)
        return compare_patient(
            latents,
            images[:, latents],
            self._matrix[others][:, latents].toarray().astype(np.float64),
            dispersion=self._dispersion_of(number)[latents],
            images_per_patient=float(self._n_images[[number, *others]].mean()),
            min_images=self.config.min_images,
            n_splits=self.config.n_splits,
            rng=_rng(self.config.seed, self.names[number]),
        )

    def _dispersion_of(self, number: int) -> Floats:
        """(n_latents,) C of `prediction_t`, of all patients of this one's disease and dataset."""
        key = (str(self._datasets[number]), str(self._diseases[number]))
        if key not in self._dispersions:
            squares, levels = np.zeros((2, self._matrix.shape[1]))
            for member in (number, *self.others(number)):
                squared, level = image_spread(self._images_of(int(member)))
                squares += squared
                levels += level
            self._dispersions[key] = dispersion_of(squares, levels)
        return self._dispersions[key]

    def counts_of(self, number: int) -> dict[str, Any]:
        """How many latents set a patient apart, by `n_raised` and `n_lowered`."""
        return _counts(self.concepts_of(number))

    def _images_of(self, number: int) -> Any:
        """(N_p, L) counts of the patient's readable images; they must be those that its barcode was made of."""
        is_its = np.asarray(self._images["patient"], object) == self._ids[number]
        is_its &= np.asarray(self._images["dataset"], object) == self._datasets[number]
        is_its &= np.asarray(self._images["status"], object) == STATUS_OK
        rows = self.store.read_rows("image", np.flatnonzero(is_its), self.config.tau)
        mean = np.asarray(rows.sum(axis=0, dtype=np.float64)).ravel() / max(1, rows.shape[0])
        barcode = self._matrix[[number]].toarray().ravel()
        if rows.shape[0] != self._n_images[number] or not np.allclose(mean, barcode, rtol=1e-5, atol=0):
            raise DamagedStore(
                f"{self.store.root}: the images of patient {self.names[number]!r} do not give its barcode; "
                f"count again with cyto barcode --overwrite"
            )
        return rows


def image_spread(images: Any) -> tuple[Floats, Floats]:
    """What one patient adds to the two sums of `dispersion_of`, (L,) each; images (N, L) scipy CSR, N of 1 or more."""
    n_images = images.shape[0]
    counts = images.astype(np.float64)  # integers: their sums are exact
    total = np.asarray(counts.sum(axis=0)).ravel()
    squares = np.asarray(counts.multiply(counts).sum(axis=0)).ravel() - total**2 / n_images
    return np.maximum(0, squares), (n_images - 1) * total / n_images


def compare_patient(
    latents: Ints,
    images: Any,
    others: Floats,
    *,
    dispersion: Floats,
    images_per_patient: float,
    min_images: int,
    n_splits: int,
    rng: np.random.Generator,
) -> PatientConcepts:
    """One patient against the others, as the module says; of the latents those that differ and have support.

    Parameters
    ----------
    latents : (n,) their numbers
    images : (N_p, n) scipy CSR: tokens above tau in each of the patient's images, N_p of 2 or more
    others : (n_others, n) barcodes, in mean tokens above tau per image
    dispersion : (n,) C of `prediction_t`, of the patient and the others
    images_per_patient : K of `prediction_t`
    min_images : of the patient's images in which a raised latent must be above tau
    n_splits : times that the images are halved, drawn from `rng`
    """
    n_images, n_others = images.shape[0], len(others)
    total = np.asarray(images.sum(axis=0, dtype=np.float64)).ravel()
    barcode, median = total / n_images, np.median(others, axis=0)
    mad = np.median(np.abs(others - median), axis=0)
    among = describe_others(others, dispersion, images_per_patient)
    t = prediction_t(barcode, among, n_images)
    side, n_active = _side(barcode, among.mean), images.getnnz(axis=0)
    far = float(stats.t.isf(stats.norm.sf(Z_FROM), n_others - 1))  # the t of a z of 3
    both = np.zeros(len(latents), np.int64)
    others_have = (others > 0).any(axis=0)  # chosen without a look at the patient
    correlations = []
    for _ in range(n_splits):
        first = rng.permutation(n_images)[: n_images // 2]
        sum_first = np.asarray(images[np.sort(first)].sum(axis=0, dtype=np.float64)).ravel()
        n_first, n_second = len(first), n_images - len(first)
        halves = (
            prediction_t(sum_first / n_first, among, n_first),
            prediction_t((total - sum_first) / n_second, among, n_second),
        )
        both += (halves[0] * side >= far) & (halves[1] * side >= far)
        correlations.append(_correlation(*(half[others_have] for half in halves)))
    has_support = (side < 0) | ((side > 0) & (n_active >= min_images))
    z = as_z(t, n_others)
    kept = np.flatnonzero(has_support)
    kept = kept[np.lexsort((latents[kept], -np.abs(z[kept])))]
    beyond = np.where(side > 0, _side(others, barcode) >= 0, _side(others, barcode) <= 0).sum(axis=0)
    return PatientConcepts(
        latent=latents[kept],
        barcode=barcode[kept],
        median=median[kept],
        mad=mad[kept],
        mean=among.mean[kept],
        sd=among.sd[kept],
        se=np.sqrt(own_variance(barcode, among, n_images))[kept],
        z=z[kept],
        n_images_active=n_active[kept],
        n_others_active=(others > 0).sum(axis=0)[kept],
        n_others_beyond=beyond[kept],
        replicated=both[kept] / n_splits,
        others=others[:, kept],
        others_z=as_z(prediction_t(others[:, kept], _of(among, kept), n_images), n_others),
        halves_correlation=float(np.mean(correlations)),
    )


def _of(others: Others, latents: Ints) -> Others:
    """Some of the latents."""
    names = ("mean", "sd", "log_mean", "log_sd", "dispersion")
    return replace(others, **{name: getattr(others, name)[latents] for name in names})


def _usual(row: dict[str, Any], rows: list[dict[str, Any]], cohort: _Cohort) -> dict[str, Any]:
    """How many latents set each other patient of the disease and dataset apart, by the same rule."""
    known = {other["patient"]: other for other in rows if other["skipped"] is None}
    counts = []
    for other in cohort.others(cohort.number(row["patient"])):
        name = cohort.names[other]
        if cohort.why_not(int(other)) is None:
            found = known.get(name) or cohort.counts_of(int(other))
            counts.append(found["n_raised"] + found["n_lowered"])
    if not counts:
        return {"n_others_counted": 0}
    return {
        "n_others_counted": len(counts),
        "others_least": min(counts),
        "others_median": float(np.median(counts)),
        "others_most": max(counts),
    }


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
    """Depends on the seed and the patient only: the splits are the same whichever patients are compared."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])])


_PATIENTS = pa.schema(
    [
        *((name, pa.string()) for name in ("patient", "dataset", "disease", "skipped")),
        *((name, pa.int64()) for name in ("n_images", "n_others", "n_latents", "n_raised", "n_lowered")),
        ("halves_correlation", pa.float64()),
        *((name, pa.int64()) for name in ("n_others_counted", "others_least", "others_most")),
        ("others_median", pa.float64()),
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
            "others_mean": found.mean,
            "others_sd": found.sd,
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
    about = cohort.describe(number)
    names = [
        f"{latent}: {barcode:.3g} against {mean:.3g} tokens per image, in {n_active} images"
        for latent, barcode, mean, n_active in zip(
            found.latent[some], found.barcode[some], found.mean[some], found.n_images_active[some], strict=True
        )
    ]
    compared = f"against {about['n_others']} others with {plain(about['disease'])}"
    plot_patient(
        f"{plain(about['patient'])}: {about['n_images']} images, {compared}",
        names,
        found.z[some],
        found.others_z[:, some],
        found.sets_apart[some],
        path,
    )


def _result(
    out: Path, rows: list[dict[str, Any]], table: pa.Table, patient: str | None, *, was_complete: bool
) -> PatientResult:
    top = [] if patient is None else table.slice(0, 10).to_pylist()
    return PatientResult(out=out, patient=patient, patients=rows, top=top, was_complete=was_complete)


def _read_result(out: Path, patient: str | None) -> PatientResult:
    store = ResultStore(out, PATIENT_CONCEPTS)
    tables = store.table("patients").to_pylist(), store.table("patient_concepts")
    return _result(out, *tables, patient, was_complete=True)
