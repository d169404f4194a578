"""Who is compared with whom, by which values, and what else differs between the two groups?

The patients of both groups; those that strata and covariates leave; their values from all images that count, and from
equal numbers of images (patient_values.py). The warnings say what a difference may come from, other than the disease.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss

from cytosae.barcodes import PATIENT_COLUMNS
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput, DamagedStore
from stores.tables import STATUS_OK, listed

from .config import REST, CompareConfig
from .covariates import NAMED, column_of, design, imbalances, is_missing, of_patients
from .freedman_lane import adjustment
from .patient_values import ImagePlan, is_uneven, plan_images, read_values
from .permutation import in_both_groups

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

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
    owner = _owners(images, groups)
    known = {
        name: of_patients(column_of(images, name), owner, groups.names, name)
        for name in (*([config.strata] if config.strata else []), *config.adjust)
    }
    kept, notes = _complete_patients(groups, known, config)
    complete = groups.only(kept)
    plain = config.within_label is None and config.standardize is None
    is_divided = store.header.spec["normalize"] == "images"
    if not is_divided and not (plain and config.images_per_patient in ("all", "auto")):
        raise BadInput(
            f"these barcodes are normalised as {store.header.spec['normalize']}, and only means over images can be "
            f"thinned or taken within a label; count them with cyto barcode without --normalize"
        )
    thins = is_divided and (
        isinstance(config.images_per_patient, int)
        or (config.images_per_patient == "auto" and is_uneven(complete.n_images[:, None], complete.is_a))
    )
    used: dict[str, Any] = {"per_patient": None, "n_draws": 1, "weights": None, "rule": config.images_per_patient}
    if plain and not thins:
        compared, draws = complete, [complete.values]
    else:
        _require_their_images(store, owner, groups, config)
        compared, draws, plan = _values_of_images(store, images, complete, config)
        notes += plan.notes
        used["n_draws"] = len(draws)
        if plan.per_type is not None:
            used["per_patient"] = dict(zip(plan.types, plan.per_type.tolist(), strict=True))
        if config.standardize:
            used["weights"] = dict(zip(plan.types, plan.weights.tolist(), strict=True))
    crude = (compared.values, draws, compared.is_a)
    if not plain:
        same = complete.only(np.isin(complete.names, compared.names))
        whole, of_whole, _ = _values_of_images(
            store, images, same, replace(config, within_label=None, standardize=None)
        )
        crude = (whole.values, of_whole, whole.is_a)
    place = {name: i for i, name in enumerate(groups.names)}
    rows = [place[name] for name in compared.names]
    strata = covariates = None
    if config.strata:
        strata = np.unique([known[config.strata][i] or "" for i in rows], return_inverse=True)[1].astype(np.int64)
        if not in_both_groups(strata, compared.is_a).all():
            raise BadInput(
                f"too few images leave a {config.strata} with one group only; ask for fewer images per patient"
            )
    if config.adjust:
        covariates = design({name: [known[name][i] for i in rows] for name in config.adjust})
    if strata is not None or covariates is not None:
        adjustment(compared.is_a, strata, covariates)  # raises if this cannot be adjusted for
    return Prepared(compared, draws, crude, strata, covariates, tuple(notes), used)


def _complete_patients(
    groups: TwoGroups, known: dict[str, list[str | None]], config: CompareConfig
) -> tuple[Bools, list[str]]:
    """(patients,) those with a value in each needed column and, with strata, one of the other group in theirs; notes.

    known : column -> the value of each patient
    """
    notes: list[str] = []
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
    return kept, notes


def _require_their_images(
    store: BarcodeStore, owner: npt.NDArray[np.int64], groups: TwoGroups, config: CompareConfig
) -> None:
    """Raise DamagedStore unless the barcodes of images are those of the patients, by number; owner : of `_owners`"""
    n_there = np.bincount(owner[owner >= 0], minlength=len(groups.names))
    if not np.array_equal(n_there, groups.n_images):
        raise DamagedStore(
            f"{store.path('image', config.tau)} does not have the images of these patients "
            f"({int(n_there.sum()):,}; patient.zarr says {int(groups.n_images.sum()):,}); count again with "
            f"cyto barcode --overwrite"
        )


def _values_of_images(
    store: BarcodeStore, images: "pd.DataFrame", groups: TwoGroups, config: CompareConfig
) -> tuple[TwoGroups, list[npt.NDArray[np.float32]], ImagePlan]:
    """The groups with the values of the images that count, these values in each draw, and which images count."""
    uses_labels = config.within_label is not None or config.standardize is not None
    labels = np.full(len(images), "", object)
    if uses_labels:
        cells = column_of(images, config.standardize or "label")
        labels = np.array(["" if is_missing(cell) else str(cell).strip() for cell in cells], object)
    plan = plan_images(
        *(_owners(images, groups), labels, groups.is_a, groups.names),
        within=config.within_label,
        standardize=config.standardize is not None,
        images_per_patient=config.images_per_patient,
    )
    if plan.per_type is None and not uses_labels:
        return groups, [groups.values], plan
    values, drawn = read_values(store, config.tau, plan, config.seed)
    left = groups.only(plan.kept)
    return replace(left, values=values, n_images=plan.counts[plan.kept].sum(1)), drawn or [values], plan


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


def warn_of_groups(prepared: Prepared, config: CompareConfig, images: "pd.DataFrame", *, normalize: str) -> list[str]:
    """Warnings on other reasons why the groups may differ; `images` and `normalize` are those of the barcodes."""
    return [
        *_warn_of_numbers(prepared, config, normalize),
        *_warn_of_imbalance(prepared.groups, config, images),
        *_warn_of_shared_images(prepared.groups, images),
    ]


def _warn_of_numbers(prepared: Prepared, config: CompareConfig, normalize: str) -> list[str]:
    """Warnings on numbers of images, normalisation, datasets."""
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
