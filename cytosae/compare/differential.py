"""Which latents set the patients of one disease apart from those of another? (CytoSAE, Fig. 5)

The unit is the patient: each counts once, whatever the number of images. For each latent there are the difference of
mean barcodes (by which the paper ranks latents), effect sizes, permutation p-values, their Benjamini-Hochberg q-values
and max-T adjustment (permutation.py), intervals (intervals.py), and the share of bootstraps in which the latent stays
in the top list. Filters do not use the diseases, so that the p-values of the remaining latents stay valid. Which images
count for a patient: patient_values.py; strata and covariates: covariates.py, freedman_lane.py. Figures: figures.py.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as ss
from scipy.stats import false_discovery_control

from cytosae.barcodes import IMAGE_COLUMNS, PATIENT_COLUMNS
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput, DamagedStore
from stores.files import sha256_json
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import COMPARISON
from stores.tables import STATUS_OK, column, listed, read_table_file

from .config import REST, CompareConfig, describe_left_out
from .covariates import NAMED, column_of, design, imbalances, is_missing, of_patients
from .figures import plot_correlation, plot_patients, plot_scatter
from .freedman_lane import residual_group, residual_permutation_test
from .intervals import SUPPORT, intervals, is_supported
from .patient_values import is_uneven, plan_images, read_values
from .permutation import PermutationTest, combine_draws, in_both_groups, permutation_test
from .report import Comparison

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_COLUMNS = 1 << 12  # latents of one chunk in float64
_BOOTSTRAPS = 64  # bootstraps that are computed together
_METHOD = 3  # version of the statistics: results of older versions are not taken for these
_NULLS = 20  # shuffles of the groups behind the stability under no effect
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TwoGroups:
    """The patients of both groups, sorted by disease and name, so that their order in the store has no effect."""

    values: npt.NDArray[np.float32]  # (patients, latents)
    names: list[str]
    ids: list[str]  # as in the image table; names also say the dataset where two datasets have the same id
    diseases: list[str]
    datasets: list[str]
    n_images: npt.NDArray[np.int64]
    is_a: Bools
    n_without_disease: int  # left out
    n_of_others: int  # patients of further diseases: left out

    def only(self, kept: Bools) -> "TwoGroups":
        """The groups with these patients alone; kept : (patients,)"""
        places = np.flatnonzero(kept)
        if len(places) == len(kept):
            return self
        names, ids, diseases, datasets = (
            [texts[i] for i in places] for texts in (self.names, self.ids, self.diseases, self.datasets)
        )
        return replace(
            self,
            values=self.values[kept],
            names=names,
            ids=ids,
            diseases=diseases,
            datasets=datasets,
            n_images=self.n_images[kept],
            is_a=self.is_a[kept],
        )


@dataclass(frozen=True)
class Prepared:
    """What is compared: patients, their values from all images that count, and those from equal numbers of images."""

    groups: TwoGroups
    draws: list[npt.NDArray[np.float32]]  # (patients, latents) each, for p, g and AUC; `groups.values` if not thinned
    crude: tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]], Bools]  # values, draws, is_a; all images
    strata: npt.NDArray[np.int64] | None = None
    covariates: Floats | None = None
    notes: tuple[str, ...] = ()
    images_used: dict[str, Any] | None = None  # for the summary


def compare(
    barcodes: Path | str,
    out: Path | str,
    config: CompareConfig,
    *,
    latents: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Comparison:
    """Compare the patients of two diseases latent by latent, and write tables and figures to the folder `out`.

    Memory: the barcodes of the patients that are compared, dense in float32, three times; 11 times more if patients are
    thinned, and another 11 for p_crude if only some images count.

    Parameters
    ----------
    latents : a table with a column `latent`: only these are tested. They must be chosen on other data, or p-values are
        not valid

    Raises
    ------
    BadInput
        If a disease does not exist or has fewer than two patients, or no latent is left to be tested.
    DamagedStore
        If the barcodes cannot be read, or hold what no barcode is.
    SpecMismatch
        If `out` holds a comparison with other settings (and not `overwrite`), or something else.
    """
    barcodes, out = Path(barcodes), Path(out)
    latents = None if latents is None else Path(latents)
    store = BarcodeStore(barcodes)
    patients = read_patients(store, config.tau)
    images = store.read_obs("image", config.tau, needed=IMAGE_COLUMNS)
    chosen = choose_groups(patients, config.a, config.b)
    prepared = prepare(store, images, chosen, config)
    groups = prepared.groups
    only = None if latents is None else read_latents(latents, n_latents=groups.values.shape[1])
    is_tested, left_out = choose_tested(groups.values, config, only)
    spec = {
        "barcodes": store.header.identity,
        **asdict(config),
        "tau": store.taus[0] if config.tau is None else config.tau,
        "adjust": [*config.adjust],
        "method": _METHOD,
        "b_is_rest": config.b not in groups.diseases,
        "latents": None if only is None else sha256_json(only),
    }
    inputs = [path for path in (barcodes, latents) if path is not None]
    packages = ("numpy", "scipy", "numba", "anndata")
    writer = begin_results(out, COMPARISON, spec, overwrite=overwrite, inputs=inputs, packages=packages)
    writer.watch(store.header)
    if writer.is_complete:
        return Comparison(out=out, results=ResultStore(out, COMPARISON), was_complete=True)

    table, summary = differential(prepared, config, is_tested, progress=progress)
    summary |= {
        "images": prepared.images_used,
        "left_out": left_out,
        "tau": spec["tau"],
        "normalize": store.header.spec["normalize"],
        "sae_sha256": sae_of(store),
        "warnings": [
            *_warnings(prepared, config, store.header.spec["normalize"]),
            *_warn_of_imbalance(prepared.groups, config, images),
            *_warn_of_shared_images(groups, images),
            *prepared.notes,
            *summary["warnings"],
        ],
    }
    shown = {group: _first(table, f"rank_{group}", config.top) for group in ("a", "b")}
    correlation = correlate(groups.values[:, is_tested])
    writer.write_table("differential", table)
    writer.write_table("patients", _patient_table(groups, sorted({*shown["a"], *shown["b"]})))
    writer.write_table("correlation", _correlation_table(groups, correlation))
    titles = (config.a, config.b)
    plot_scatter(table, shown, titles, writer.root / "scatter")
    plot_patients(groups.values, groups.is_a, shown, titles, writer.root / "patients")
    plot_correlation(correlation, groups.diseases, groups.names, writer.root / "correlation")
    writer.finish(summary)
    return Comparison(out=out, results=ResultStore(out, COMPARISON), was_complete=False)


# ------------------------------------------------------------------------------------------------- who and what


def choose_groups(patients: "AnnData", a: str, b: str) -> TwoGroups:
    """The patients of disease `a`, and those of disease `b`; or of all others, if `b` is "rest" and no disease is.

    Parameters
    ----------
    patients : (patients, latents) barcodes; `obs` has `disease` ("": unknown), `patient_id`, `dataset` and `n_images`

    Raises
    ------
    BadInput
        If there is no such disease, it is the same one twice, or a group has fewer than two patients.
    """
    disease = np.array([str(name) for name in patients.obs["disease"]], object)
    known = sorted({*disease} - {""})
    for name in (a,) if b == REST else (a, b):
        if name not in known:
            raise BadInput(f"no disease {name!r} in these barcodes; there are {listed(known, 20) or 'none'}")
    if a == b:
        raise BadInput(f"both groups are {a!r}; name two diseases, or {REST} for all others")
    of_a = disease == a
    of_b = disease == b if b in known else ~of_a & (disease != "")
    for name, members in ((a, of_a), (b, of_b)):
        if members.sum() < 2:
            n = "1 patient" if members.any() else "no patient"
            raise BadInput(
                f"{name!r} has {n}, and a comparison needs at least 2 on each side: the patient is the unit. "
                f"The mean barcodes themselves are in disease.zarr"
            )
    chosen = np.flatnonzero(of_a | of_b)
    names = np.array(patients.obs_names, object)
    chosen = chosen[np.lexsort((names[chosen], disease[chosen]))]
    obs = patients.obs.iloc[chosen]
    return TwoGroups(
        values=ss.csr_matrix(patients.X)[chosen].toarray(),
        names=[str(name) for name in names[chosen]],
        ids=[str(name) for name in obs["patient_id"]],
        diseases=[*disease[chosen]],
        datasets=[str(name) for name in obs["dataset"]],
        n_images=np.asarray(obs["n_images"], np.int64),
        is_a=of_a[chosen],
        n_without_disease=int((disease == "").sum()),
        n_of_others=int((~of_a & ~of_b & (disease != "")).sum()),
    )


def read_latents(path: Path, *, n_latents: int) -> list[int]:
    """The latents that a CSV or Parquet table names in its column `latent`, rising, each once.

    Raises
    ------
    BadInput
        If there is no such column, or in it nothing, or what is no latent of these barcodes.
    """
    table = read_table_file(path)
    if "latent" not in table.column_names:
        raise BadInput(f"{path} has no column 'latent' (found: {listed(table.column_names)})")
    cells = column(table, "latent")
    wrong = [repr(cell) for cell in cells if not (cell or "").isdecimal() or len(cell or "") > 9]
    wrong = wrong or [cell for cell in cells if cell and int(cell) >= n_latents]
    if wrong or not cells:
        found = f"{len(wrong):,} that are not ({listed(wrong)})" if cells else "none"
        raise BadInput(f"{path} must name latents from 0 to {n_latents - 1:,}; found {found}")
    return sorted({int(cell) for cell in cells if cell})


def read_patients(store: BarcodeStore, tau: float | None) -> "AnnData":
    """The patients' barcodes, checked. Raises DamagedStore if they cannot be read, or hold what no barcode is."""
    store.check()
    store.read_obs("patient", tau, needed=PATIENT_COLUMNS)
    patients = store.read("patient", tau)
    values = ss.csr_matrix(patients.X).data
    if not (np.isfinite(values) & (values >= 0)).all():
        raise DamagedStore(
            f"{store.path('patient', tau)} has values that are negative or not finite; count again with "
            f"cyto barcode --overwrite"
        )
    return patients


def sae_of(store: BarcodeStore) -> list[str]:
    """SHA-256 of the SAE behind barcodes; empty where the header does not say it."""
    specs = store.header.spec.get("latents_spec", [])
    return sorted({str(spec["sae_sha256"]) for spec in (specs if isinstance(specs, list) else [specs])})


def prepare(store: BarcodeStore, images: "pd.DataFrame", groups: TwoGroups, config: CompareConfig) -> Prepared:
    """Leave out patients without a needed column, and read values: from all images that count, from equal numbers.

    Raises
    ------
    BadInput
        If a column or label does not exist or cannot be used, or a group is left with fewer than two patients.
    DamagedStore
        If the barcodes of images cannot be read, or are not those of the patients' images.
    """
    notes: list[str] = []
    owner = _owners(images, groups)
    place = {name: i for i, name in enumerate(groups.names)}
    known = {
        name: of_patients(column_of(images, name), owner, groups.names, name)
        for name in (*([config.strata] if config.strata else []), *config.adjust)
    }
    kept = np.ones(len(groups.names), bool)
    for name, values in known.items():
        lacking = [i for i, value in enumerate(values) if value is None]
        if lacking:
            notes.append(
                f"{len(lacking):,} patients have no {name} and are left out: "
                f"{listed([groups.names[i] for i in lacking], 20)}"
            )
            kept[lacking] = False
    if config.strata:
        levels = np.array([value or "" for value in known[config.strata]], object)
        numbers = np.unique(levels, return_inverse=True)[1].astype(np.int64)
        alone = kept & ~np.isin(numbers, np.unique(numbers[kept][in_both_groups(numbers[kept], groups.is_a[kept])]))
        kept &= ~alone
        if not kept.any():
            raise BadInput(
                f"no {config.strata} has patients of both groups, so nothing can be compared within one; choose "
                f"another column for --strata"
            )
        if alone.any():
            notes.append(
                f"{int(alone.sum()):,} patients stand in a {config.strata} with one group only, say nothing, and are "
                f"left out: {listed(sorted({*levels[alone]}), 20)}"
            )
    _need_two(kept, groups.is_a, config)
    plain = config.within_label is None and config.standardize is None
    is_divided = store.header.spec["normalize"] == "images"
    if not is_divided and not (plain and config.images_per_patient in ("all", "auto")):
        raise BadInput(
            f"these barcodes are normalised as {store.header.spec['normalize']}, and only means over images can be "
            f"thinned or taken within a label; count them with cyto barcode without --normalize"
        )
    thins = is_divided and (
        isinstance(config.images_per_patient, int)
        or (config.images_per_patient == "auto" and is_uneven(groups.n_images[kept, None], groups.is_a[kept]))
    )
    used: dict[str, Any] = {"per_patient": None, "n_draws": 1, "weights": None, "rule": config.images_per_patient}
    draws: list[npt.NDArray[np.float32]] = []
    complete = groups.only(kept)
    if thins or not plain:
        n_there = np.bincount(owner[owner >= 0], minlength=len(kept))
        if not np.array_equal(n_there, groups.n_images):
            raise DamagedStore(
                f"{store.path('image', config.tau)} does not have the images of these patients "
                f"({int(n_there.sum()):,}; patient.zarr says {int(groups.n_images.sum()):,}); count again with "
                f"cyto barcode --overwrite"
            )
    if not plain:
        labels = column_of(images, config.standardize or "label")
        labels = np.array(["" if is_missing(cell) else str(cell).strip() for cell in labels], object)
    else:
        labels = np.full(len(owner), "", object)

    def read(some: TwoGroups, within: str | None, standardize: bool) -> tuple[TwoGroups, list[Any], Any]:
        ours = _owners(images, some)
        plan = plan_images(
            ours,
            labels,
            some.is_a,
            some.names,
            within=within,
            standardize=standardize,
            images_per_patient=config.images_per_patient if is_divided else "all",
        )
        if plan.per_type is None and within is None and not standardize:
            return some, [some.values], plan
        values, drawn = read_values(store, config.tau, plan, config.seed)
        left = some.only(plan.kept)
        return replace(left, values=values, n_images=plan.counts[plan.kept].sum(1)), drawn or [values], plan

    if thins or not plain:
        groups, draws, plan = read(complete, config.within_label, config.standardize is not None)
        notes += plan.notes
        used |= {
            "per_patient": None
            if plan.per_type is None
            else dict(zip(plan.types, plan.per_type.tolist(), strict=True)),
            "n_draws": len(draws),
            "weights": dict(zip(plan.types, plan.weights.tolist(), strict=True)) if config.standardize else None,
        }
    else:
        groups, draws = complete, [complete.values]
    crude = (groups.values, draws, groups.is_a)
    if not plain:
        whole, whole_draws, _ = read(complete.only(np.isin(complete.names, groups.names)), None, False)
        crude = (whole.values, whole_draws, whole.is_a)
    rows = [place[name] for name in groups.names]
    strata = covariates = None
    if config.strata:
        strata = np.unique([known[config.strata][i] or "" for i in rows], return_inverse=True)[1].astype(np.int64)
        if not in_both_groups(strata, groups.is_a).all():
            raise BadInput(
                f"too few images leave a {config.strata} with one group only; ask for fewer images per patient"
            )
    if config.adjust:
        covariates = design({name: [known[name][i] for i in rows] for name in config.adjust})
    if strata is not None or covariates is not None:
        _adjustment(groups.is_a, strata, covariates)  # raises if this cannot be adjusted for
    return Prepared(groups, draws, crude, strata, covariates, tuple(notes), used)


def _need_two(kept: Bools, is_a: Bools, config: CompareConfig) -> None:
    for name, members in ((config.a, is_a), (config.b, ~is_a)):
        if (kept & members).sum() < 2:
            raise BadInput(
                f"{int((kept & members).sum())} patients of {name!r} are left with --strata and --adjust, and a "
                f"comparison needs at least 2 on each side"
            )


def _owners(images: "pd.DataFrame", groups: TwoGroups) -> npt.NDArray[np.int64]:
    """(images,) the number of the image's patient; -1: of a patient that is not compared, or not readable."""
    number = {owner: at for at, owner in enumerate(zip(groups.ids, groups.datasets, strict=True))}
    rows = zip(images["patient"], images["dataset"], images["status"], strict=True)
    found = [number.get((str(p), str(d)), -1) if status == STATUS_OK else -1 for p, d, status in rows]
    return np.array(found, np.int64)


def _adjustment(
    is_a: Bools, strata: npt.NDArray[np.int64] | None, covariates: Floats | None
) -> tuple[Callable[[npt.NDArray[Any]], npt.NDArray[Any]], float]:
    """A function that adjusts values (patients, latents) for strata and covariates, and the variance inflation.

    The difference of means of adjusted values is the coefficient of the group in the regression on group, strata and
    covariates.

    Raises
    ------
    BadInput
        If strata and covariates determine the group.
    """
    strata = np.zeros(len(is_a), np.int64) if strata is None else strata
    group, base = residual_group(is_a, np.zeros((len(is_a), 0)) if covariates is None else covariates, strata)
    members = np.eye(strata.max() + 1)[strata]
    outside = np.linalg.qr(np.column_stack([members / np.sqrt(members.sum(0)), base]))[0]

    def adjusted(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        found = np.empty_like(values)
        for first in range(0, values.shape[1], _COLUMNS):
            chunk = values[:, first : first + _COLUMNS].astype(np.float64)
            left = chunk - outside @ (outside.T @ chunk)
            slope = group @ chunk / (group @ group)
            found[:, first : first + _COLUMNS] = (
                chunk.mean(0) + np.outer(is_a - is_a.mean(), slope) + left - np.outer(group, slope)
            )
        return found

    return adjusted, float(1 / (group @ group) / (1 / is_a.sum() + 1 / (~is_a).sum()))


def _warnings(prepared: Prepared, config: CompareConfig, normalize: str) -> list[str]:
    """Warnings on other reasons why the groups may differ: numbers of images, normalisation, datasets."""
    found = []
    groups, used = prepared.groups, prepared.images_used or {}
    medians = [float(np.median(groups.n_images[some])) for some in (groups.is_a, ~groups.is_a)]
    is_thinned = used.get("per_patient") is not None
    if is_thinned:
        each = ", ".join(f"{n:,} {label}".strip() for label, n in used["per_patient"].items())
        found.append(
            f"images per patient: median {medians[0]:g} in {config.a}, {medians[1]:g} in {config.b}; for p, g and AUC "
            f"each patient is thinned to {each} images, {used['n_draws']} times; means and differences count all"
        )
    elif is_uneven(groups.n_images[:, None], groups.is_a):
        found.append(
            f"images per patient differ: median {medians[0]:g} in {config.a}, {medians[1]:g} in {config.b}; fewer "
            f"images make noisier means, so p, q and p_max_t are too small even where nothing differs; "
            + (
                "--images-per-patient auto makes them right"
                if normalize == "images"
                else "cyto barcode without --normalize lets cyto compare thin patients to equal numbers"
            )
        )
    if normalize != "images":
        found.append(
            f"these barcodes are normalised as {normalize}: patients with more images have larger values, whatever the "
            f"disease; cyto barcode without --normalize divides by each patient's own number"
        )
    of_a, of_b = ({groups.datasets[i] for i in np.flatnonzero(some)} for some in (groups.is_a, ~groups.is_a))
    if not of_a & of_b:
        found.append(
            f"no dataset has patients of both groups ({listed(sorted(of_a))} against {listed(sorted(of_b))}): "
            f"a difference may be one of laboratory, stain or camera"
        )
    return found


def _warn_of_imbalance(groups: TwoGroups, config: CompareConfig, images: "pd.DataFrame") -> list[str]:
    """A warning on columns of the image table in which the groups differ and that are not adjusted for."""
    of_a, of_b = ({groups.datasets[i] for i in np.flatnonzero(some)} for some in (groups.is_a, ~groups.is_a))
    names = {config.strata, *config.adjust} | (set() if of_a & of_b else {"dataset"})
    others = images.drop(columns=[name for name in names if name in images.columns])
    found = imbalances(others, _owners(images, groups), groups.names, groups.is_a)
    if not found:
        return []
    more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return [
        f"the groups also differ in {'; '.join(found[:NAMED])}{more}: a difference of latents may come from these; "
        f"--strata COLUMN compares within, --adjust COLUMN takes it out"
    ]


def _warn_of_shared_images(groups: TwoGroups, images: "pd.DataFrame") -> list[str]:
    """A warning on patients with a common image: one person under two names would count twice."""
    compared = dict(zip(zip(groups.ids, groups.datasets, strict=True), groups.names, strict=True))
    owners: dict[str, set[str]] = {}
    columns = (images[name] for name in ("content_hash", "status", "patient", "dataset"))
    for content_hash, status, *owner in zip(*columns, strict=True):
        name = compared.get((owner[0], owner[1]))
        if name is not None and content_hash and status == STATUS_OK:
            owners.setdefault(content_hash, set()).add(name)
    shared = sorted({name for names in owners.values() if len(names) > 1 for name in names})
    if not shared:
        return []
    return [
        f"{len(shared):,} patients have an image that is also another's ({listed(shared)}): whoever stands here under "
        f"two names counts twice, and p is too small; give one name with cyto barcode --table"
    ]


# ------------------------------------------------------------------------------------------------- the numbers


def choose_tested(
    values: npt.NDArray[np.float32], config: CompareConfig, only: list[int] | None
) -> tuple[Bools, dict[str, int]]:
    """Which latents are tested, and how many are left out, by the first reason that applies. Groups are not used.

    Parameters
    ----------
    values : shape (patients, latents)
    only : these latents; None: all

    Raises
    ------
    BadInput
        If none is left.
    """
    n_latents = values.shape[1]
    is_listed = np.ones(n_latents, bool) if only is None else np.isin(np.arange(n_latents), only)
    reasons = {
        "not_listed": ~is_listed,
        "equal_in_all": values.min(0) == values.max(0),
        "few_patients": (values > 0).sum(0) < config.min_patients,
        "low_mean": values.mean(0, dtype=np.float64) < config.min_mean,
    }
    is_tested, left_out = np.ones(n_latents, bool), {}
    for reason, applies in reasons.items():
        left_out[reason] = int((is_tested & applies).sum())
        is_tested &= ~applies
    if not is_tested.any():
        raise BadInput(
            f"none of {n_latents:,} latents is left to be tested ({describe_left_out(left_out, config)}); "
            f"ask for fewer patients or a smaller mean, or count barcodes at a smaller tau"
        )
    return is_tested, left_out


def differential(
    prepared: Prepared,
    config: CompareConfig,
    is_tested: Bools,
    *,
    progress: Progress = lambda done, total, state: None,
) -> tuple[pa.Table, dict[str, Any]]:
    """One row per latent, and what was done in plain values; the columns are those of docs/compare.md.

    Columns of latents that are not tested are null where they would come of a test: p, q, p_max_t, stability, ranks.

    Parameters
    ----------
    is_tested : (latents,), not all False (`choose_tested`)
    progress : permutations done, permutations in all
    """
    strata, covariates = prepared.strata, prepared.covariates
    positive = [(prepared.groups.values[some] > 0).sum(0) for some in (prepared.groups.is_a, ~prepared.groups.is_a)]
    supported = is_supported(prepared.groups.values, prepared.draws)
    groups, described = _adjusted_description(prepared)
    columns = described | {
        "n_patients_a": positive[0],
        "n_patients_b": positive[1],
    }
    n_a, n_b = int(groups.is_a.sum()), int((~groups.is_a).sum())
    n_latents, tested = len(is_tested), np.flatnonzero(is_tested)
    values = groups.values[:, tested]
    n_tests = len(prepared.draws) + (len(prepared.crude[1]) if config.is_adjusted else 0)
    n_run = 0

    def run(
        draw: npt.NDArray[np.float32], is_a: Bools, strata: npt.NDArray[np.int64] | None, others: Floats | None
    ) -> PermutationTest:
        nonlocal n_run

        def tell(done: int, total: int, state: str) -> None:
            progress(n_run * total + done, n_tests * total, state)

        shared: dict[str, Any] = {"n_permutations": config.n_permutations, "seed": config.seed, "progress": tell}
        chosen = np.ascontiguousarray(draw[:, tested])
        if others is None:
            test = permutation_test(chosen, is_a, strata=strata, **shared)
        else:
            test = residual_permutation_test(chosen, is_a, others, strata=strata, **shared)
        n_run += 1
        return test

    test = combine_draws([run(draw, groups.is_a, strata, covariates) for draw in prepared.draws])
    crude_p, crude_difference = test.p, columns["difference"]
    if config.is_adjusted:
        whole, whole_draws, is_a = prepared.crude
        crude_p = combine_draws([run(draw, is_a, None, None) for draw in whole_draws]).p
        crude_difference = whole[is_a].mean(0, dtype=np.float64) - whole[~is_a].mean(0, dtype=np.float64)
    q = false_discovery_control(test.p)
    difference = columns["difference"][tested]
    settings: dict[str, Any] = {"top": config.top, "seed": config.seed}
    stability = bootstrap_stability(values, groups.is_a, n_bootstraps=config.n_bootstraps, **settings)
    by_rank = stability_without_effect(values, groups.is_a, n_bootstraps=config.n_bootstraps, **settings)
    ranks = {"rank_a": _ranks(difference), "rank_b": _ranks(-difference)}
    place = np.fmin(ranks["rank_a"], ranks["rank_b"])
    no_effect = np.full(len(tested), np.nan)
    no_effect[~np.isnan(place)] = by_rank[place[~np.isnan(place)].astype(np.int64) - 1]
    is_explained = config.is_adjusted and config.within_label is None
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = (1 - columns["difference"] / crude_difference)[tested]
    explained[~np.isfinite(explained) | (not is_explained)] = np.nan
    found = {
        "p": test.p,
        "q": q,
        "p_max_t": test.p_max_t,
        "p_step_down": test.p_step_down,
        "p_crude": crude_p,
        "difference_crude": crude_difference[tested],
        "explained": explained,
        "stability": stability,
        "stability_no_effect": no_effect,
    }
    table = pa.table(
        {
            "latent": np.arange(n_latents),
            **{name: pa.array(numbers, from_pandas=True) for name, numbers in columns.items()},
            "is_tested": is_tested,
            **{name: _spread(numbers, tested, n_latents) for name, numbers in found.items()},
            **{name: _spread(numbers, tested, n_latents).cast(pa.int64()) for name, numbers in ranks.items()},
        }
    )
    return table, {
        "a": _about(groups, groups.is_a, config.a),
        "b": _about(groups, ~groups.is_a, config.b),
        "n_patients_without_disease": groups.n_without_disease,
        "n_patients_of_other_diseases": groups.n_of_others,
        "n_latents": n_latents,
        "n_tested": len(tested),
        "n_permutations": test.n_permutations,
        "is_exact": test.is_exact,
        "p_floor": test.floor,
        "seed": config.seed,
        "n_bootstraps": config.n_bootstraps,
        "n_p_at_most_0.05": int((test.p <= 0.05).sum()),
        "n_q_at_most_0.05": int((q <= 0.05).sum()),
        "n_p_max_t_at_most_0.05": int((test.p_max_t <= 0.05).sum()),
        "n_p_step_down_at_most_0.05": int((test.p_step_down <= 0.05).sum()),
        "n_p_crude_at_most_0.05": int((crude_p <= 0.05).sum()),
        "n_without_interval": int((is_tested & ~supported).sum()),
        "stability_no_effect": [round(float(share), 4) for share in by_rank[:5] if np.isfinite(share)],
        "n_higher": {"a": int((difference > 0).sum()), "b": int((difference < 0).sum())},
        "warnings": [*_floor_warnings(test, n_a, n_b), *_support_warnings(is_tested & ~supported)],
    }


def describe_groups(prepared: Prepared) -> dict[str, npt.NDArray[Any]]:
    """Means, effect sizes and limits, (latents,) each, adjusted for strata and covariates if there are any."""
    return _adjusted_description(prepared)[1]


def _adjusted_description(prepared: Prepared) -> tuple[TwoGroups, dict[str, npt.NDArray[Any]]]:
    """The groups with adjusted values, and what `describe_groups` returns."""
    groups, draws, inflation, counted = prepared.groups, prepared.draws, 1.0, None
    if prepared.strata is not None or prepared.covariates is not None:
        adjusted, inflation = _adjustment(groups.is_a, prepared.strata, prepared.covariates)
        is_one = len(draws) == 1 and draws[0] is groups.values
        counted = (groups.values, prepared.draws)
        groups = replace(groups, values=adjusted(groups.values))
        draws = [groups.values] if is_one else [adjusted(draw) for draw in draws]
    return groups, _describe(groups, draws, inflation, counted)


def _describe(
    groups: TwoGroups,
    draws: list[npt.NDArray[np.float32]],
    inflation: float,
    counted: tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]] | None,
) -> dict[str, npt.NDArray[Any]]:
    """Means, effect sizes and intervals of every latent, tested or not."""
    chunks = []
    for first in range(0, groups.values.shape[1], _COLUMNS):
        some = slice(first, first + _COLUMNS)
        values, *drawn = (each[:, some].astype(np.float64) for each in (groups.values, *draws))
        before = None
        if counted is not None:
            whole, *of_draws = (each[:, some].astype(np.float64) for each in (counted[0], *counted[1]))
            before = whole, of_draws
        found = intervals(values, drawn, groups.is_a, inflation=inflation, counted=before)
        # rounding gives equal values a tiny variance, and an effect size divided by it would be huge
        equal = np.ones(values.shape[1], bool)
        for members in (groups.is_a, ~groups.is_a):
            low, high = values[members].min(0), values[members].max(0)
            equal &= high - low <= 1e-6 * np.abs(high) if inflation != 1 else high == low
        for name in ("hedges_g", "hedges_g_low", "hedges_g_high"):
            found[name][equal] = np.nan
        chunks.append({"mean_a": values[groups.is_a].mean(0), "mean_b": values[~groups.is_a].mean(0), **found})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def stability_without_effect(
    values: npt.NDArray[np.floating], is_a: Bools, *, top: int, n_bootstraps: int, seed: int
) -> Floats:
    """(latents,): for each rank, the mean stability of the latents of that rank when groups are shuffled; else NaN.

    Over both sides of 20 shuffles, with a twentieth of the bootstraps each: it takes as long as `bootstrap_stability`.
    """
    rng = np.random.default_rng([seed, 3])
    sums, times = np.zeros((2, values.shape[1]))
    for number in range(_NULLS if n_bootstraps else 0):
        shuffled = rng.permuted(is_a)
        found = bootstrap_stability(
            values, shuffled, top=top, n_bootstraps=-(-n_bootstraps // _NULLS), seed=seed + 1 + number
        )
        weights = np.where(shuffled, 1 / shuffled.sum(), -1 / (~shuffled).sum())
        difference = _products(weights[None], values)[0]
        for sign in (1, -1):
            ranks = _ranks(sign * difference)
            has = ~np.isnan(ranks) & ~np.isnan(found)
            np.add.at(sums, ranks[has].astype(np.int64) - 1, found[has])
            np.add.at(times, ranks[has].astype(np.int64) - 1, 1)
    by_rank = np.full(values.shape[1], np.nan)
    np.divide(sums, times, out=by_rank, where=times > 0)
    return by_rank


def _ranks(difference: Floats) -> Floats:
    """1 for the largest positive difference, and so on; ties in the order of latents; NaN where not positive."""
    order = np.argsort(-difference, kind="stable")
    ranks = np.full(len(difference), np.nan)
    n_positive = int((difference > 0).sum())
    ranks[order[:n_positive]] = np.arange(1, n_positive + 1)
    return ranks


def bootstrap_stability(
    values: npt.NDArray[np.floating], is_a: Bools, *, top: int, n_bootstraps: int, seed: int
) -> Floats:
    """(latents,) share of bootstraps in which a latent is among the `top` largest differences in its direction.

    Patients are drawn with replacement within each group. All latents that tie for the last place are counted. NaN
    without bootstraps, or where the groups' means are equal.

    Parameters
    ----------
    values : shape (patients, latents)
    """
    rng = np.random.default_rng([seed, 1])  # independent of the permutations
    n_latents, top = values.shape[1], min(top, values.shape[1])
    observed = np.where(is_a, 1 / is_a.sum(), -1 / (~is_a).sum())
    direction = np.sign(_products(observed[None], values)[0])
    hits = np.zeros(n_latents, np.int64)
    for done in range(0, n_bootstraps, _BOOTSTRAPS):
        weights = np.empty((min(_BOOTSTRAPS, n_bootstraps - done), len(is_a)))
        for members in (is_a, ~is_a):
            n = int(members.sum())
            weights[:, members] = rng.multinomial(n, np.full(n, 1 / n), len(weights)) * observed[members]
        differences = _products(weights, values)
        for sign in (1, -1):
            ours = sign * differences
            last = np.partition(ours, n_latents - top, axis=1)[:, n_latents - top, None]
            hits += ((ours >= last) & (ours > 0) & (direction == sign)).sum(0)
    shares = np.full(n_latents, np.nan)
    np.divide(hits, n_bootstraps, out=shares, where=(direction != 0) & (n_bootstraps > 0))
    return shares


def _products(weights: Floats, values: npt.NDArray[np.floating]) -> Floats:
    """weights @ values in float64, some latents at a time."""
    starts = range(0, values.shape[1], _COLUMNS)
    return np.hstack([weights @ values[:, first : first + _COLUMNS].astype(np.float64) for first in starts])


def correlate(values: npt.NDArray[np.floating]) -> Floats:
    """Pearson correlation of every two patients over the latents; NaN where a patient's values are all equal.

    Parameters
    ----------
    values : shape (patients, latents)
    """
    n_patients, n_latents = values.shape
    varies = values.min(1) < values.max(1)
    mean = values.mean(1, dtype=np.float64, keepdims=True)
    products = np.zeros((n_patients, n_patients))
    for first in range(0, n_latents, _COLUMNS):
        centred = values[:, first : first + _COLUMNS] - mean
        products += centred @ centred.T
    length = np.sqrt(np.diagonal(products))
    correlation = np.full_like(products, np.nan)
    np.divide(products, np.outer(length, length), out=correlation, where=np.outer(varies, varies))
    return np.clip(correlation, -1, 1)


# ------------------------------------------------------------------------------------------------- tables


def _spread(numbers: Floats, tested: npt.NDArray[np.int64], n_latents: int) -> pa.Array:
    """A column of all latents from values of the tested ones; null for the others, and for NaN."""
    all_of_them = np.full(n_latents, np.nan)
    all_of_them[tested] = numbers
    return pa.array(all_of_them, from_pandas=True)


def _about(groups: TwoGroups, members: Bools, name: str) -> dict[str, Any]:
    n_images = groups.n_images[members]
    return {
        "name": name,
        "n_patients": int(members.sum()),
        "n_images": int(n_images.sum()),
        "images_per_patient": {
            "min": int(n_images.min()),
            "median": float(np.median(n_images)),
            "max": int(n_images.max()),
        },
    }


def _floor_warnings(test: PermutationTest, n_a: int, n_b: int) -> list[str]:
    """Warnings where so few patients, or permutations, allow no small p or q."""
    n_tested = len(test.p)
    if test.floor > 0.05:
        remedy = "more patients" if test.is_exact else "more --permutations"
        return [f"no p can be below {test.floor:.2g} with {n_a} against {n_b} patients: it takes {remedy} to say more"]
    n_needed = math.ceil(round(n_tested * test.floor / 0.05, 6))
    if n_needed == 1:
        return []
    n_permutations = math.ceil(n_tested / 0.05)
    # with fewer splits of the patients than that, each is taken once, and no p can be so small
    one_is_enough = not test.is_exact and math.comb(n_a + n_b, n_a) > n_permutations
    remedy = (f"--permutations {n_permutations}, or with " if one_is_enough else "") + "fewer tested (--min-patients)"
    return [
        f"q <= 0.05 takes {n_needed:,} latents at the smallest p that is possible ({test.floor:.2g}); a single one can "
        f"have it with {remedy}"
    ]


def _support_warnings(is_rare: Bools) -> list[str]:
    """A warning on latents without intervals."""
    if not is_rare.any():
        return []
    return [
        f"{int(is_rare.sum()):,} tested latents are above 0 in fewer than {SUPPORT} patients, or after thinning in "
        f"nearly none: too few for an interval of difference and g, which is left empty"
    ]


def _first(table: pa.Table, rank: str, n: int) -> list[int]:
    """The latents of a top list, in its order."""
    ranks = np.asarray(table[rank].to_pandas(), np.float64)
    order = np.argsort(ranks, kind="stable")  # NaN comes last
    return [int(latent) for latent in order[:n] if ranks[latent] <= n]


def _patient_table(groups: TwoGroups, latents: list[int]) -> pa.Table:
    """A row for every chosen latent and patient."""
    n_patients = len(groups.names)
    return pa.table(
        {
            "latent": np.repeat(np.array(latents, np.int64), n_patients),
            "patient": groups.names * len(latents),
            "disease": groups.diseases * len(latents),
            "group": ["a" if is_a else "b" for is_a in groups.is_a] * len(latents),
            "n_images": np.tile(groups.n_images, len(latents)),
            "value": groups.values[:, latents].T.ravel(),
        }
    )


def _correlation_table(groups: TwoGroups, correlation: Floats) -> pa.Table:
    """A row for every pair of patients, in the order of the figure."""
    n_patients = len(groups.names)
    return pa.table(
        {
            "patient": np.repeat(np.array(groups.names, object), n_patients).tolist(),
            "other": groups.names * n_patients,
            "correlation": pa.array(correlation.ravel(), from_pandas=True),
        }
    )
