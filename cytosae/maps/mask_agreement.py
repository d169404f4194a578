"""Which latents mark what segmentation masks mark? A row per class and latent, the best ones, and a figure.

How agreement is measured: mask_ranks.py. Whether it is more than chance: mask_chance.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cytosae.stage_one import StageOne, require_stage_one
from stores.errors import BadInput
from stores.files import sha256_json
from stores.latent_store import LatentStore
from stores.notebook import figure_html
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import MASKS
from stores.tables import column, listed
from stores.wording import Report, counted, left_out_text, printable

from .figures import plot_agreement
from .mask_chance import LEAST_IMAGES, LEVEL, Chance, chance_agreement
from .mask_ranks import Bool, Float, Int, MaskAgreement, RankedValues, count_images, halves, mask_agreement, read_ranked

STATISTIC = "within images, averaged over patients; IoU cross-fitted; place by two nulls"  # of the header, older: other
_ONE_CLASS = (("mask", ("above 0",)),)
_TOP = 5  # latents named in the figure


@dataclass(frozen=True, kw_only=True)
class MaskResult(Report):
    """What was compared, and the latents that agree most. Counts with the default None are missing in older folders."""

    out: Path  # the folder
    n_latents: int  # of the SAE
    left_out: Mapping[str, Sequence[str]]  # kind -> names of the masks that were not used
    n_images: int
    n_patches: int
    n_foreground: int  # of the patches, in any class that is not made of the value 0 alone
    n_silent: int  # latents that are active at no patch
    expected_max_auroc: float | None  # None: nothing could be shuffled; of the first class
    expected_max_iou: float | None
    best_by_auroc: list[dict[str, Any]]  # rows of agreement.parquet
    best_by_iou: list[dict[str, Any]]
    classes: list[dict[str, Any]] | None = None  # name, values, n_patches, best_by_auroc, best_by_iou, expected_max_*
    n_units: int | None = None
    n_without_patient: int | None = None  # images that are units of their own
    unit: str | None = None  # patient or image
    was_complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `cyto concept masks --json` prints: `left_out` counted, and what the folder itself says."""
        counts = {what: len(names) for what, names in self.left_out.items()}
        return {"out": str(self.out), "left_out": counts, **self.stored(), "was_complete": self.was_complete}

    def stored(self) -> dict[str, Any]:
        """What the header of the folder says of the result."""
        values = asdict(self)
        return {field.name: values[field.name] for field in fields(self) if field.name not in _NOT_STORED}

    def lines(self) -> Iterator[str]:
        """What was left out, the images and units, then the best latents of each class beside chance."""
        for what, names in self.left_out.items():
            if names:
                yield (f"left out: {left_out_text(len(names), what)} ({listed([printable(name) for name in names])})")
        n_units, classes = self.n_units or 0, self.classes or []
        who = "" if self.unit == "image" else f" of {counted(n_units, 'unit')} (patients, and images without one)"
        yield (
            f"{self.out}: {counted(self.n_images, 'image')} with masks{who}, "
            f"{self.n_foreground / self.n_patches:.1%} of the patches are foreground; {self.n_silent:,} of "
            f"{self.n_latents:,} latents are active at none"
        )
        for one in classes:
            yield from _class_lines(one, self.n_patches)
        if any(one["expected_max_auroc"] is not None for one in classes):
            yield "  p: the mask of its own image, against those of others, and for having looked at all latents"
        if all(one["expected_max_auroc"] is None for one in classes):
            yield "  no p-values: nothing was shuffled (one image, --shuffles 0, or no latent active in enough images)"
        elif self.unit == "image":
            yield "  p-values take each image for a patient: no two patients are known, and those of one are alike"
        elif n_units < 6:
            yield f"  {n_units} patients: p-values cannot be small, however well a latent agrees"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "agreement.png")


_NOT_STORED = ("out", "n_latents", "left_out", "was_complete")


def _class_lines(one: dict[str, Any], n_patches: int) -> Iterator[str]:
    """A class of the masks: how much it covers, and the best latents by AUROC and by IoU."""
    values = ", ".join(one["values"])
    yield f"  {printable(one['name'])} (value {values}), {one['n_patches'] / n_patches:.1%} of the patches"
    for name, words in (("auroc", "AUROC"), ("iou", "IoU")):
        rows = [(f"{row['latent']} ({row[name]:.3f})", _beside(row, name)) for row in one[f"best_by_{name}"]]
        top = ("; " if any(beside for _, beside in rows) else ", ").join(map("".join, rows))
        yield f"  {words:<6} latents {top or '(none)'}"


def _beside(row: dict[str, Any], name: str) -> str:
    """What the masks of others give, p among all latents, and from which value on it is 0.05: all of this latent."""
    if row.get(f"{name}_p_any") is None:
        return ""
    needed = row.get(f"{name}_needed")
    enough = "" if needed is None else f", {LEVEL:g} from {needed:.3f}"
    return f" others' masks {row[f'{name}_null']:.3f}, p {row[f'{name}_p_any']:.2g}{enough}"


def write_mask_agreement(
    latents: LatentStore | Path | str,
    masks: Path | str | Mapping[int, Float],
    out: Path | str,
    *,
    classes: str | Sequence[tuple[str, Sequence[str]]] | None = None,
    min_share: float = 0.5,
    n_shuffles: int = 200,
    seed: int = 0,
    stage_one: StageOne | None = None,
    root: Path | str | None = None,
    overwrite: bool = False,
    reading_progress: Progress = lambda done, total, state: None,
    progress: Progress = lambda done, total, state: None,
) -> MaskResult:
    """Write `agreement.parquet`, a row per class and latent, and a figure.

    Memory: about 48 bytes for each stored value of the masked images; 24 for each shuffle, class and latent.

    Parameters
    ----------
    latents : a latent store, or its path
    masks : a table with image_id and mask (a path), or a folder of files named like the images, which `stage_one`
        reads; or what was read: image_index -> (n_classes, side, side) share of each patch that each class covers
    classes : as `--classes` of `cyto concept masks`: `1=cytoplasm,2=nucleus`, or `any`; None: each value is a class,
        where that is clear. With shares: (name, values of the masks that it is made of), for each
    min_share : a patch is of a class from this share on
    n_shuffles : of either kind; 0: no p-values
    stage_one : `cytocache.bridge`, which reads masks
    root : what paths in a table of masks are relative to; None: the table's folder
    reading_progress : masks read, masks in all
    progress : images ranked, then shuffles done, of all

    Raises
    ------
    BadInput
        If there is no mask, one cannot be understood, a class is nowhere or everywhere, or the masked images hold too
        many values.
    SpecMismatch
        If `out` holds something else, also an agreement of an older Cyto.
    """
    if not 0 < min_share <= 1:
        raise BadInput(f"min_share must be above 0 and at most 1; found {min_share!r}")
    out = Path(out)
    latents = latents if isinstance(latents, LatentStore) else LatentStore(latents)
    side = latents.layout.side
    shares, named, left_out = _shares_of(masks, latents, classes, stage_one, root, reading_progress)
    if not shares:
        raise BadInput("no readable image has a mask: there is nothing to compare")
    for image, share in shares.items():
        if share.shape not in {(side, side), (len(named), side, side)}:
            raise BadInput(
                f"the shares of image {image} have shape {share.shape}; expected {(len(named), side, side)}: a number "
                f"for each class and patch"
            )
    images, unit_of, n_without = _units(latents, sorted(shares))
    covered = np.array([shares[image] >= min_share for image in images]).reshape(len(images), -1, side * side)
    foreground = np.ascontiguousarray(covered.transpose(1, 0, 2))  # (n_classes, n_images, n_patches)
    for (name, _), mask in zip(named, foreground, strict=True):
        _check_class(name, mask, min_share)
    names, n_units = column(latents.images, "image_id"), int(unit_of[-1]) + 1
    n_shuffles = n_shuffles if n_units > 1 else 0  # one unit can have no other mask
    spec = {
        "latents": latents.identity,
        "statistic": STATISTIC,
        "classes": [[name, list(values)] for name, values in named],
        "masks_sha256": sha256_json(
            [[names[image], mask.tolist()] for image, mask in zip(images, foreground.transpose(1, 0, 2), strict=True)]
        ),
        "min_share": float(min_share),  # 1 and 1.0 are the same settings
        "n_shuffles": n_shuffles,
        "seed": seed,
    }
    read = [masks, root] if isinstance(masks, Path | str) else []
    inputs = [Path(latents.root), *(Path(each) for each in read if each)]
    writer = begin_results(out, MASKS, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "numba"))
    writer.watch(latents.header)
    known: dict[str, Any] = {"out": out, "n_latents": latents.spec.n_latents, "left_out": left_out}
    if writer.is_complete:
        return ResultStore(out, MASKS).result(MaskResult, was_complete=True, **known)

    ranked = read_ranked(latents, images, unit_of, progress=progress)
    half = halves(n_units, seed)
    found = [mask_agreement(ranked, mask, half) for mask in foreground]
    chance = chance_agreement(ranked, foreground, found, n_shuffles=n_shuffles, seed=seed, progress=progress)
    tables = [
        _table(name, ranked, one, chance, number)
        for number, ((name, _), one) in enumerate(zip(named, found, strict=True))
    ]
    writer.write_table("agreement", pa.concat_tables(tables))
    said: list[dict[str, Any]] = [
        {
            "name": name,
            "values": list(values),
            "n_patches": int(mask.sum()),
            "expected_max_auroc": float(chance.expected_max_auroc[number]) if chance else None,
            "expected_max_iou": float(chance.expected_max_iou[number]) if chance else None,
            "best_by_auroc": _best(tables[number], "auroc"),
            "best_by_iou": _best(tables[number], "iou"),
        }
        for number, ((name, values), mask) in enumerate(zip(named, foreground, strict=True))
    ]
    inside = [mask for (_, values), mask in zip(named, foreground, strict=True) if not set(values) <= {"0", "#000000"}]
    result = MaskResult(
        **known,
        n_images=len(images),
        n_patches=foreground[0].size,
        n_foreground=int(np.any(inside or foreground, axis=0).sum()),
        n_silent=int((np.diff(ranked.starts) == 0).sum()),
        classes=said,
        n_units=n_units,
        n_without_patient=n_without,
        unit="image" if n_units == len(images) else "patient",
        expected_max_auroc=said[0]["expected_max_auroc"],
        expected_max_iou=said[0]["expected_max_iou"],
        best_by_auroc=said[0]["best_by_auroc"],
        best_by_iou=said[0]["best_by_iou"],
    )
    for number, table in enumerate(tables):
        path = writer.root / ("agreement" if not number else f"agreement_{number}")
        plot_agreement(table, said[number], path, n_images=result.n_images, n_patches=result.n_patches)
    writer.finish({"result": result.stored()})
    return result


def _shares_of(
    masks: Path | str | Mapping[int, Float],
    latents: LatentStore,
    classes: str | Sequence[tuple[str, Sequence[str]]] | None,
    stage_one: StageOne | None,
    root: Path | str | None,
    progress: Progress,
) -> tuple[dict[int, Any], list[tuple[str, tuple[str, ...]]], dict[str, list[str]]]:
    """Shares by image_index, classes as (name, values), masks left out by reason: read, or as they were given."""
    if not isinstance(masks, Path | str):
        if isinstance(classes, str):
            raise BadInput(f"with shares, classes must be a list of (name, values); found {classes!r}")
        return dict(masks), [(name, tuple(values)) for name, values in classes or _ONE_CLASS], {}
    if not isinstance(classes, str | None):
        raise BadInput(f"with masks that are read, classes must be a text such as '1=nucleus'; found {classes!r}")
    return require_stage_one(stage_one).read_masks(
        Path(masks),
        latents,
        latents.layout.side,
        root=None if root is None else Path(root),
        classes=classes,
        progress=progress,
    )


def _units(latents: LatentStore, images: Sequence[int]) -> tuple[list[int], Int, int]:
    """The images in the order of their units, the unit of each, and how many have no patient.

    Patients of two datasets are two patients. If all images are of one patient, each image is a unit: p-values are then
    about that patient alone, and `MaskResult.unit` is `image`.
    """
    patients = column(latents.images, "patient") if "patient" in latents.images.column_names else []
    datasets = column(latents.images, "dataset")
    keys = [
        (0, str(datasets[image]), str(patients[image])) if patients and patients[image] else (1, "", str(image))
        for image in images
    ]
    if len(set(keys)) == 1:
        keys = [(1, "", str(image)) for image in images]
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    order = sorted(range(len(images)), key=lambda at: (number[keys[at]], images[at]))
    unit_of = np.array([number[keys[at]] for at in order], np.int64)
    return [images[at] for at in order], unit_of, sum(key[0] for key in keys)


def _check_class(name: str, mask: Bool, min_share: float) -> None:
    inside = mask.sum(axis=1)
    if not ((inside > 0) & (inside < mask.shape[1])).any():
        what = "every patch" if inside.any() and mask.all() else "no patch" if not inside.any() else "all or nothing"
        raise BadInput(
            f"{what} of {len(mask):,} masked images is of class {name!r} (covered to {min_share:g} or more): there is "
            f"nothing to compare; look at the masks, or choose another --min-share"
        )


def _table(name: str, ranked: RankedValues, found: MaskAgreement, chance: Chance | None, number: int) -> pa.Table:
    """Row i is latent i; null where a latent is active at no patch, or was not tested."""
    nothing = np.full(len(found.auroc), np.nan)
    columns = {
        "auroc": found.auroc,
        "iou": found.iou,
        "threshold": found.threshold,
        "auroc_null": chance.mean_auroc[number] if chance else nothing,
        "auroc_p": chance.p_auroc[number] if chance else nothing,
        "auroc_p_any": chance.p_any_auroc[number] if chance else nothing,
        "place_p": chance.p_place[number] if chance else nothing,
        "place_p_any": chance.p_any_place[number] if chance else nothing,
        "iou_null": chance.mean_iou[number] if chance else nothing,
        "iou_p": chance.p_iou[number] if chance else nothing,
        "iou_p_any": chance.p_any_iou[number] if chance else nothing,
        "auroc_needed": chance.needed_auroc[number] if chance else nothing,
        "iou_needed": chance.needed_iou[number] if chance else nothing,
    }
    n_images = count_images(ranked.starts, ranked.patches, ranked.n_per_image)
    return pa.table(
        {
            "class": pa.array([name] * len(found.auroc), pa.string()),
            "latent": pa.array(np.arange(len(found.auroc)), pa.int64()),
            "n_active_patches": pa.array(np.diff(ranked.starts), pa.int64()),
            "n_active_images": pa.array(n_images, pa.int64()),
            **{name: pa.array(values, pa.float64(), mask=np.isnan(values)) for name, values in columns.items()},
        }
    )


def _best(table: pa.Table, name: str) -> list[dict[str, Any]]:
    """The rows with the largest values; latents that were tested come first."""
    known = table.filter(table[name].is_valid())
    not_tested = known["n_active_images"].to_numpy() < LEAST_IMAGES
    order = np.lexsort((known["latent"].to_numpy(), -known[name].to_numpy(), not_tested))[:_TOP]
    return list(known.take(order).to_pylist())
