"""The units of a probe: patients or images of barcodes, their classes, and the groups that folds must not split."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cytosae.barcodes import IMAGE_COLUMNS, PATIENT_COLUMNS
from stores.activation_store import one_or_more
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput
from stores.spec import as_floats, check_choice
from stores.tables import STATUS_OK, listed

from .folds import connected_groups

if TYPE_CHECKING:
    import pandas as pd

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LEVELS = ("patient", "image")
TARGETS = {"patient": "disease", "image": "label"}  # what is predicted, unless a column is named
BY_LOT = "images by lot (--max-images)"  # why images are left out: a random sample is taken
_MOST_BYTES = 8 << 30  # of barcodes and sums, while they are read
_ENTRY_BYTES = 24  # of a nonzero: its value and column, twice


@dataclass(frozen=True, kw_only=True)
class UnitConfig:
    """Which units (patients or images) are classified, and by which column.

    Raises
    ------
    BadInput
        If there is no such level, or a number is below 1.
    """

    level: str = "patient"
    target: str = ""  # a column of the patients or the images; "": disease of patients, label of images
    tau: float | None = None  # None: the only one
    classes: tuple[str, ...] = ()  # keep these only; (): all
    group_by: str | None = None  # a column of the images: units with a common value lie on one side of every fold
    min_images: int = 1  # patients with fewer readable images are left out, and their images
    max_images: int = 1000  # at level "image": size of the random sample

    def __post_init__(self) -> None:
        check_choice("level", self.level, LEVELS)
        object.__setattr__(self, "classes", tuple(one_or_more(self.classes)))
        for name in ("min_images", "max_images"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1; found {getattr(self, name)}")
        object.__setattr__(self, "target", self.target or TARGETS[self.level])
        as_floats(self, "tau")


@dataclass(frozen=True)
class Where:
    """Units that are kept out of all fitting: those whose images have one of these values of a column."""

    column: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Where | None":
        """From `COLUMN=VALUE`, once or several times, of one column; None from nothing.

        Raises
        ------
        BadInput
            If a text has another form, or there are two columns.
        """
        if not texts:
            return None
        pairs = [text.partition("=") for text in texts]
        wrong = [text for text, (column, _, value) in zip(texts, pairs, strict=True) if not (column.strip() and value)]
        columns = list(dict.fromkeys(column.strip() for column, _, _ in pairs))
        if wrong or len(columns) > 1:
            found = wrong[0] if wrong else " and ".join(columns)
            raise BadInput(f"--test-where takes COLUMN=VALUE, and one column only; found {found}; e.g. site=Munich")
        return cls(columns[0], tuple(dict.fromkeys(value.strip() for _, _, value in pairs)))


@dataclass(frozen=True)
class Units:
    """n patients or images in the order of their names."""

    names: list[str]
    labels: Ints  # (n,) in 0..len(classes)-1
    classes: list[str]
    groups: Ints  # (n,) units of one group lie on one side of every fold
    image_ids: list[list[str]]  # of each unit's readable images
    values: Any  # (n, m) barcodes, CSR in float64, a column per latent that is not zero everywhere
    sums: Any  # (n, m) sum of image activations, likewise
    counts: Any  # (n, m) images with any activation, likewise
    latents: Ints  # (m,) their numbers
    n_latents: int  # all of them
    left_out: dict[str, int]
    warnings: list[str]

    @property
    def n_images(self) -> Ints:
        """(n,) readable images of each."""
        return np.array([len(ids) for ids in self.image_ids], np.int64)


@dataclass(frozen=True)
class NewUnits:
    """n patients or images that a fitted model is tried on, in the order of their names; nothing is fitted on them."""

    names: list[str]
    true: list[str]  # what the table says; "" where it says nothing
    labels: Ints  # (n,) in 0..len(classes)-1 of the model; -1 where it has no such class
    groups: Ints  # (n,) the bootstrap of the intervals draws whole groups
    image_ids: list[list[str]]
    values: Any  # (n, k) barcodes of the model's latents, CSR in float64
    left_out: dict[str, int]
    warnings: list[str]

    @property
    def n_images(self) -> Ints:
        """(n,) readable images of each."""
        return np.array([len(ids) for ids in self.image_ids], np.int64)


@dataclass(frozen=True)
class _Unit:
    name: str
    row: int  # of the level's matrices
    label: str
    group: int
    image_ids: list[str]
    n_of_patient: int  # readable images


@dataclass(frozen=True)
class _All:
    """Every unit of a folder, labelled or not."""

    units: list[_Unit]
    left_out: dict[str, int]
    warnings: list[str]


def read_units(store: BarcodeStore, config: UnitConfig, *, seed: int = 0, without: Where | None = None) -> Units:
    """The units of a probe. Units without a class or with too few images are left out and counted.

    Rows are sampled before barcodes are read. Memory: three sparse matrices of them in float64, twice while they are
    made.

    Parameters
    ----------
    seed : of the sample of `config.max_images` images
    without : units that are kept for a test

    Raises
    ------
    BadInput
        If a column does not exist, a patient has two values of it, or nothing is left; or if a group has units on
        both sides of the test.
    """
    found = _read_all(store, config, without, is_test=False)
    units, left_out = found.units, found.left_out
    chosen = [unit for unit in units if unit.label]
    left_out[f"{config.level}s without {config.target}"] = len(units) - len(chosen)
    if config.classes:
        there = {unit.label for unit in chosen}
        unknown = sorted(set(config.classes) - there)
        if unknown:
            raise BadInput(
                f"no {config.level} has {config.target} {listed(unknown)}; there are {listed(sorted(there), 12)}"
            )
        n_labelled = len(chosen)
        chosen = [unit for unit in chosen if unit.label in config.classes]
        left_out[f"{config.level}s of other classes"] = n_labelled - len(chosen)
    chosen = _with_enough(chosen, config, left_out)
    if config.level == "image" and len(chosen) > config.max_images:
        drawn = np.sort(np.random.default_rng([seed, 2]).choice(len(chosen), config.max_images, replace=False))
        left_out[BY_LOT] = len(chosen) - config.max_images
        chosen = [chosen[k] for k in drawn]
    if not chosen:
        raise BadInput(f"no {config.level} of {store.root} with {config.target} is left; see its `obs`")
    return _with_barcodes(store, config, chosen, {what: n for what, n in left_out.items() if n}, found.warnings)


def read_test_units(
    store: BarcodeStore, config: UnitConfig, classes: list[str], latents: Ints, *, where: Where | None = None
) -> NewUnits:
    """The units that a model with these classes and latents is tried on.

    Units without a label, or with a label that the model does not know, are included; no random sample is taken.

    Raises
    ------
    BadInput
        As `read_units`; or if no unit has a class of the model.
    """
    found = _read_all(store, config, where, is_test=True)
    chosen = _with_enough(found.units, config, found.left_out)
    labels = np.array([classes.index(unit.label) if unit.label in classes else -1 for unit in chosen], np.int64)
    if not (labels >= 0).any():
        there = sorted({unit.label for unit in chosen} - {""})
        raise BadInput(
            f"no {config.level} of the test in {store.root} has a {config.target} that the model knows "
            f"({listed(classes, 12)}); it has {listed(there, 12) or 'none at all'}; name its column with --target, or "
            f"correct the table"
        )
    rows = np.array([unit.row for unit in chosen], np.int64)
    _check_size(store, config, rows, ("X",))
    values = _read_rows(store, config, rows, "X")[:, latents].astype(np.float64)
    values.sort_indices()  # sums in one order, whatever other rows there are
    return NewUnits(
        names=[unit.name for unit in chosen],
        true=[unit.label for unit in chosen],
        labels=labels,
        groups=np.unique([unit.group for unit in chosen], return_inverse=True)[1].astype(np.int64),
        image_ids=[unit.image_ids for unit in chosen],
        values=values,
        left_out={what: n for what, n in found.left_out.items() if n},
        warnings=found.warnings,
    )


def _with_enough(units: list[_Unit], config: UnitConfig, left_out: dict[str, int]) -> list[_Unit]:
    """The units with enough images, in the order of their names."""
    chosen = [unit for unit in units if unit.n_of_patient >= config.min_images]
    whose = "patients with" if config.level == "patient" else "images of patients with"
    left_out[f"{whose} fewer than {config.min_images} images"] = len(units) - len(chosen)
    return sorted(chosen, key=lambda unit: unit.name)


def _read_all(store: BarcodeStore, config: UnitConfig, where: Where | None, *, is_test: bool) -> _All:
    """Every unit; with `where`, those of the test or those of the training."""
    images = store.read_obs("image", config.tau, needed=IMAGE_COLUMNS).reset_index(names="image_id")
    columns = [name for name in images.columns if name != "image_id"]
    images["row"] = np.arange(len(images))
    images = images[images["status"] == STATUS_OK]
    pairs = zip(images["patient"], images["dataset"], strict=True)
    images["owner"] = [f"{patient}\0{dataset}" if patient else "" for patient, dataset in pairs]
    keys = ["owner", "content_hash", *([] if config.group_by is None else [_checked(config.group_by, columns, store)])]
    images["group"] = connected_groups([[*map(str, images[name])] for name in keys])
    if config.level == "patient":
        found = _All(_patients(store, config, images, columns), {}, [])
    else:
        found = _All(*_images(config, images, _checked(config.target, columns, store)))
    if where is None:
        return found
    _checked(where.column, columns, store)
    is_kept_out = _sides(found.units, images, where, config)
    units = [unit for unit, kept_out in zip(found.units, is_kept_out, strict=True) if kept_out == is_test]
    return _All(units, found.left_out if not is_test else {}, found.warnings)


def _sides(units: list[_Unit], images: "pd.DataFrame", where: Where, config: UnitConfig) -> list[bool]:
    """Whether each unit is kept for the test.

    Raises
    ------
    BadInput
        If a group has units on both sides, or a patient images on both sides.
    """
    value_of = dict(zip(images["image_id"], map(str, images[where.column]), strict=True))
    found = [{value_of[image_id] for image_id in unit.image_ids} for unit in units]
    there = set[str]().union(*found) - {""}
    unknown = sorted(set(where.values) - there)
    if unknown:
        raise BadInput(
            f"no {config.level} has {where.column} {listed(unknown)} (--test-where); there are "
            f"{listed(sorted(there), 12)}"
        )
    wanted = set(where.values)
    split = [unit.name for unit, values in zip(units, found, strict=True) if values & wanted and values - wanted]
    if split:
        raise BadInput(
            f"{len(split):,} patients have images in the test and in the training ({listed(split)}): {where.column} is "
            f"no property of patients; correct the image table, or name another column"
        )
    is_kept_out = [bool(values & wanted) for values in found]
    if all(is_kept_out):
        raise BadInput(f"--test-where keeps every {config.level} out of the fit; name fewer values of {where.column}")
    sides: dict[int, set[bool]] = {}
    for unit, kept_out in zip(units, is_kept_out, strict=True):
        sides.setdefault(unit.group, set()).add(kept_out)
    crossing = [unit for unit, out in zip(units, is_kept_out, strict=True) if out and len(sides[unit.group]) > 1]
    if crossing:
        hash_of = dict(zip(images["image_id"], map(str, images["content_hash"]), strict=True))
        seen = {
            hash_of[image_id]
            for unit, out in zip(units, is_kept_out, strict=True)
            for image_id in unit.image_ids
            if not out
        }
        ids = [image_id for unit in crossing for image_id in unit.image_ids]
        shared = [image_id for image_id in ids if hash_of[image_id] and hash_of[image_id] in seen]
        if shared:
            raise BadInput(shared_images(len(shared), len(ids), shared, "--test-where"))
        by = " or ".join(["a patient", *([] if config.group_by is None else [f"a value of {config.group_by}"])])
        raise BadInput(
            f"{len(crossing):,} {config.level}s of the test share {by} with the training "
            f"({listed([unit.name for unit in crossing])}): choose --test-where so that nobody is on both sides"
        )
    return is_kept_out


def shared_images(n_shared: int, n_images: int, image_ids: list[str], place: object) -> str:
    """The error message for images that are in the training and in the test."""
    return (
        f"{n_shared:,} of {n_images:,} images of the test ({place}) are images that the model is fitted on, by their "
        f"content ({listed(image_ids)}): a test must not know them; take their patients out (cyto barcode --table, "
        f"without a patient for them)"
    )


def _patients(store: BarcodeStore, config: UnitConfig, images: "pd.DataFrame", columns: list[str]) -> list[_Unit]:
    obs = store.read_obs("patient", config.tau, needed=PATIENT_COLUMNS)
    owners = [f"{patient}\0{data}" for patient, data in zip(obs["patient_id"], obs["dataset"], strict=True)]
    images_of = {str(owner): rows for owner, rows in images.groupby("owner")}
    if config.target in obs.columns:
        labels = [str(value) for value in obs[config.target]]
    else:
        name = _checked(config.target, columns, store)
        values = [sorted({*map(str, images_of[owner][name])} - {""}) for owner in owners]
        several = [str(obs.index[k]) for k, found in enumerate(values) if len(found) > 1]
        if several:
            raise BadInput(
                f"{len(several):,} patients have images of several {name} ({listed(several)}): "
                f"it is no class of patients; use --level image"
            )
        labels = [found[0] if found else "" for found in values]
    return [
        _Unit(str(obs.index[k]), k, labels[k], int(mine["group"].iloc[0]), [*map(str, mine["image_id"])], len(mine))
        for k, mine in enumerate(images_of[owner] for owner in owners)
    ]


def _images(config: UnitConfig, images: "pd.DataFrame", target: str) -> tuple[list[_Unit], dict[str, int], list[str]]:
    """Images with a patient; all images, with a warning, if none has a patient."""
    is_owned = images["owner"] != ""
    left_out, warnings = {}, []
    if is_owned.any():
        left_out["images without a patient"] = int((~is_owned).sum())
        images = images[is_owned]
    else:
        warnings.append("no image has a patient: images of one patient may lie on both sides of a fold")
    n_of = images.groupby("owner")["row"].transform("size")
    units = [
        _Unit(str(image_id), int(row), str(label), int(group), [str(image_id)], int(n))
        for image_id, row, label, group, n in zip(
            images["image_id"], images["row"], images[target], images["group"], n_of, strict=True
        )
    ]
    return units, left_out, warnings


def _with_barcodes(
    store: BarcodeStore, config: UnitConfig, units: list[_Unit], left_out: dict[str, int], warnings: list[str]
) -> Units:
    rows = np.array([unit.row for unit in units], np.int64)
    layers = ("X", "activation_sum", "n_active_images") if config.level == "patient" else ("X", "mean")
    _check_size(store, config, rows, layers)
    barcodes = _read_rows(store, config, rows, layers[0])
    there = np.unique(barcodes.indices)
    if not len(there):
        warnings = [*warnings, "every barcode is empty: no latent exceeds tau in these units"]
    sums, *counts = (_read_rows(store, config, rows, layer)[:, there].astype(np.float64) for layer in layers[1:])
    classes = sorted({unit.label for unit in units})
    groups = np.unique([unit.group for unit in units], return_inverse=True)[1]
    return Units(
        names=[unit.name for unit in units],
        labels=np.array([classes.index(unit.label) for unit in units], np.int64),
        classes=classes,
        groups=groups.astype(np.int64),
        image_ids=[unit.image_ids for unit in units],
        values=barcodes[:, there].astype(np.float64),
        sums=sums,
        counts=counts[0] if counts else (sums > 0).astype(np.float64),
        latents=there.astype(np.int64),
        n_latents=barcodes.shape[1],
        left_out=left_out,
        warnings=warnings,
    )


def _check_size(store: BarcodeStore, config: UnitConfig, rows: Ints, layers: Sequence[str]) -> None:
    n_entries = sum(int(store.row_lengths(config.level, rows, config.tau, layer=layer).sum()) for layer in layers)
    if (n_bytes := _ENTRY_BYTES * n_entries) > _MOST_BYTES:
        raise BadInput(
            f"the barcodes of {len(rows):,} {config.level}s need {n_bytes / 2**30:.0f} GiB; "
            f"at most {_MOST_BYTES >> 30} are taken: choose a smaller --max-images or a larger tau"
        )


def _read_rows(store: BarcodeStore, config: UnitConfig, rows: Ints, layer: str) -> Any:
    """Rows of a matrix in this order, CSR in float32."""
    order = np.argsort(rows)
    found = store.read_rows(config.level, rows[order], config.tau, layer=layer)
    return found[np.argsort(order)]


def shared_groups(units: Units) -> int:
    """Number of units that share their group with another one."""
    times = Counter(units.groups.tolist())
    return sum(times[group] > 1 for group in units.groups.tolist())


def _checked(name: str, columns: list[str], store: BarcodeStore) -> str:
    if name not in columns:
        raise BadInput(f"{store.root} has no column {name!r} of images; it has {', '.join(columns)}")
    return name
