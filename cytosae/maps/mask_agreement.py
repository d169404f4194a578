"""Does a latent's map agree with a segmentation? Place within images (AUROC) and overlap (IoU), per latent and class.

AUROC of an image: the probability that a patch of the class has a larger value than another patch of the SAME image;
ties count half. Within a unit (a patient, or an image without a patient) images are averaged, weighted by their number
of pairs; then the units are averaged with equal weights. Only images in which the latent is active are used, since an
inactive latent says nothing about place. So neither the size of a class nor the frequency of a latent moves the AUROC
away from 0.5.

IoU: the patches at or above a threshold against the patches of the class, summed over all images. The threshold is
cross-fitted: it is chosen on one half of the units and applied to the other half, and the other way round.

Two questions, both with two-sided tests:

    place: does the AUROC differ from 0.5? There are two null distributions, and the larger p counts. (1) Sign flips:
        the distance of each unit from 0.5 changes its sign at random. This is valid for any spread between units if
        the distances are symmetric around 0, which they are not where a class or a latent has few patches. (2) Shifts:
        the masks of a unit are all shifted by one random step of 0 to 255 patches, with wrap-around. Their mean AUROC
        is 0.5, with the skewness of the data. A latent that marks the centre of the picture passes this test for the
        nucleus of centred cells.
    own mask: does the latent follow the mask of its own image more than that of another cell? Units exchange their
        masks as a whole. Each statistic is scaled by its mean and standard deviation over all shuffles, the observed
        one included. An effect that is the same for all cells, such as the centre, is not significant here.

Both tests keep every map and every mask as it is, so neighbouring patches, and images of one patient, may be
correlated. `p_any` (family-wise) uses the largest absolute scaled value among all tested latents and classes of a
shuffle. Slow reference code and measured false positive rates: test_masks.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.plotting import COLORS, new_figure, plain, save_both
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

MAX_NONZEROS = 1 << 28  # of the masked images together: about 12 GiB
LEAST_IMAGES = 5  # in which a latent must be active to be tested; of fewer images: all
STATISTIC = "within images, averaged over patients; IoU cross-fitted; place by two nulls"  # of the header, older: other
Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
_ONE_CLASS = (("mask", ("above 0",)),)
_TOP = 5  # latents named in the figure
_LEVEL = 0.05  # of the p among all latents that a value is needed for
_CELLS = 1 << 22  # of units x latents that are dense at a time


@dataclass(frozen=True)
class RankedValues:
    """The stored values of all latents at some patches, in two orders; the patches of an image are contiguous.

    An image has `n_per_image` patches. The images of a unit are contiguous (`unit_of` increases from 0).
    """

    n_per_image: int
    unit_of: Int  # (n_images,)
    starts: Int  # (n_latents + 1,) first entry of each latent, in both orders
    patches: npt.NDArray[np.int32]  # (nnz,) by latent, then image
    ranks: npt.NDArray[np.float32]  # (nnz,) rank of each among the patches of its image, from 1; ties get the mean rank
    by_value: npt.NDArray[np.float32]  # (nnz,) by latent, then value rising
    patches_by_value: npt.NDArray[np.int32]  # (nnz,) of these

    @property
    def n_images(self) -> int:
        """Images with a mask."""
        return len(self.unit_of)

    @property
    def n_units(self) -> int:
        """Patients, and images without one."""
        return int(self.unit_of[-1]) + 1


@dataclass(frozen=True)
class MaskAgreement:
    """Per latent, (n_latents,); NaN where it is not defined.

    auroc : probability that a patch of the class has a larger value than another patch of the same image
    iou : intersection over union of the class with the patches at or above a threshold of the other half
    threshold : the stored value that is best over all images (the largest, if several are)
    """

    auroc: Float
    iou: Float
    threshold: Float


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Null means and p-values, (n_classes, n_latents); NaN for latents that were not tested."""

    mean_auroc: Float  # under exchanged masks
    mean_iou: Float
    p_auroc: Float  # own mask
    p_iou: Float
    p_any_auroc: Float
    p_any_iou: Float
    p_place: Float
    p_any_place: Float
    expected_max_auroc: Float  # (n_classes,) the best latent's mean over the shuffles
    expected_max_iou: Float
    needed_auroc: Float  # (n_classes, n_latents) the value from which on p_any is at most 0.05; NaN: none of 1 or less
    needed_iou: Float


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
    enough = "" if needed is None else f", {_LEVEL:g} from {needed:.3f}"
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
    side, left_out = latents.layout.side, dict[str, list[str]]()
    inputs = [Path(latents.root)]
    if isinstance(masks, Path | str):
        if not isinstance(classes, str | None):
            raise BadInput(f"with masks that are read, classes must be a text such as '1=nucleus'; found {classes!r}")
        inputs += [Path(each) for each in (masks, root) if each]
        shares, named, left_out = require_stage_one(stage_one).read_masks(
            Path(masks),
            latents,
            side,
            root=None if root is None else Path(root),
            classes=classes,
            progress=reading_progress,
        )
    elif isinstance(classes, str):
        raise BadInput(f"with shares, classes must be a list of (name, values); found {classes!r}")
    else:
        shares, named = dict(masks), [(name, tuple(values)) for name, values in classes or _ONE_CLASS]
    if not shares:
        raise BadInput("no readable image has a mask: there is nothing to compare")
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
        _plot(table, result, said[number], writer.root / ("agreement" if not number else f"agreement_{number}"))
    writer.finish({"result": result.stored()})
    return result


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


def halves(n_units: int, seed: int) -> npt.NDArray[np.int64]:
    """(n_units,) 0 or 1: the half of each, drawn with `seed`."""
    half = np.zeros(n_units, np.int64)
    half[np.random.default_rng([seed, 1]).permutation(n_units)[: n_units // 2]] = 1
    return half


def read_ranked(
    latents: LatentStore,
    images: Sequence[int],
    unit_of: Int,
    *,
    progress: Progress = lambda done, total, state: None,
) -> RankedValues:
    """The values at all patches of these images, patch p of the i-th at number i * n_patches + p; others are left out.

    Raises
    ------
    BadInput
        If they are more than `MAX_NONZEROS`.
    """
    nnz = int(np.diff(latents.image_indptr)[list(images)].sum())
    if nnz > MAX_NONZEROS:
        raise BadInput(
            f"the {len(images):,} masked images hold {nnz:,} values, more than {MAX_NONZEROS:,}; take fewer masks"
        )
    n_patches, first_patch = latents.layout.n_patches, latents.layout.first_patch
    indices, values, patches = [], [], []
    for number, image in enumerate(images):
        rows = latents.read_images(image, image + 1)
        begin = int(rows.indptr[first_patch])
        of_image = np.repeat(np.arange(n_patches), np.diff(rows.indptr[first_patch:]))
        indices.append(rows.indices[begin:])
        values.append(rows.values[begin:])
        patches.append((number * n_patches + of_image).astype(np.int32))
        progress(number + 1, len(images), "reading")
    return rank(
        np.concatenate(indices),
        np.concatenate(values),
        np.concatenate(patches),
        n_latents=latents.spec.n_latents,
        n_per_image=n_patches,
        unit_of=unit_of,
    )


def rank(
    indices: npt.NDArray[Any],
    values: npt.NDArray[np.float32],
    patches: npt.NDArray[np.int32],
    *,
    n_latents: int,
    n_per_image: int,
    unit_of: Int,
) -> RankedValues:
    """Sort entries (latent, value, patch), and rank each among the patches of its image, the zeros lowest.

    Parameters
    ----------
    indices : (nnz,) latents
    values : (nnz,) above 0
    patches : (nnz,) from 0 to n_images * n_per_image - 1, each at most once per latent
    unit_of : (n_images,) rising
    """
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(indices, minlength=n_latents))])
    # positive floats have the same order as their bit patterns
    order = np.argsort(indices.astype(np.uint64) << np.uint64(32) | values.view(np.uint32), kind="stable")
    by_value, patches_by_value = values[order], patches[order]
    run = indices[order].astype(np.int64) * len(unit_of) + patches_by_value // n_per_image
    order = np.argsort(run, kind="stable")  # stable: within a run values still increase
    run, own = run[order], by_value[order]
    is_first = np.ones(len(run), bool)
    is_first[1:] = run[1:] != run[:-1]
    position, length = _positions(is_first)
    is_new = is_first.copy()
    is_new[1:] |= own[1:] != own[:-1]
    tie_position, ties = _positions(is_new)
    ranks = n_per_image - length + position - tie_position + (ties - 1) / 2 + 1
    return RankedValues(
        n_per_image,
        unit_of,
        starts,
        patches_by_value[order],
        ranks.astype(np.float32),
        by_value,
        patches_by_value,
    )


def _positions(is_first: Bool) -> tuple[Int, Int]:
    """For entries in runs: the position of each in its run, from 0, and the length of the run."""
    first = np.flatnonzero(is_first)
    length = np.diff(np.append(first, len(is_first)))
    return np.arange(len(is_first)) - np.repeat(first, length), np.repeat(length, length)


def mask_agreement(ranked: RankedValues, foreground: Bool, half: Int) -> MaskAgreement:
    """AUROC, IoU and best threshold of every latent with a class.

    Parameters
    ----------
    foreground : (n_images, n_per_image)
    half : (n_units,) 0 or 1, see `halves`; the IoU is NaN if all are 0
    """
    n_latents = len(ranked.starts) - 1
    auroc, iou, threshold = (np.full(n_latents, np.nan) for _ in range(3))
    nothing = np.zeros((0, 0))
    _fill_auroc(ranked.starts, ranked.patches, ranked.ranks, foreground, ranked.unit_of, 0, auroc, nothing)
    _fill_iou(ranked.starts, ranked.by_value, ranked.patches_by_value, foreground, half[ranked.unit_of], iou, threshold)
    return MaskAgreement(auroc, iou if half.any() else np.full(n_latents, np.nan), threshold)


def exchanged_masks(foreground: Bool, unit_of: Int, order: Int) -> Bool:
    """(n_images, n_per_image): the masks after unit u received those of unit order[u], repeated if these are fewer."""
    first = np.searchsorted(unit_of, np.arange(len(order)))
    count = np.bincount(unit_of, minlength=len(order))
    within = np.arange(len(unit_of)) - first[unit_of]
    source = order[unit_of]
    found: Bool = foreground[first[source] + within % count[source]]
    return found


def shifted_masks(foreground: Bool, steps: Int) -> Bool:
    """(n_images, n_per_image): each mask shifted by its own step, (n_images,), with wrap-around over all patches."""
    n_per_image = foreground.shape[1]
    found: Bool = np.take_along_axis(foreground, (np.arange(n_per_image) - steps[:, None]) % n_per_image, axis=1)
    return found


def chance_agreement(
    ranked: RankedValues,
    foreground: Bool,
    found: Sequence[MaskAgreement],
    *,
    n_shuffles: int,
    seed: int,
    progress: Progress = lambda done, total, state: None,
) -> Chance | None:
    """Null distributions and p-values; None without shuffles, or if no latent is tested.

    Parameters
    ----------
    foreground : (n_classes, n_images, n_per_image), the images in the order of the patches of `ranked`
    found : the agreement with each class's masks as they are
    n_shuffles : number of exchanges of masks, of shifts, and of sign flips, each drawn with `seed`
    progress : shuffles done, shuffles in all
    """
    n_active = _count_images(ranked.starts, ranked.patches, ranked.n_per_image)
    tested = n_active >= min(LEAST_IMAGES, ranked.n_images)
    if not n_shuffles or not tested.any():
        return None
    rng, half = np.random.default_rng(seed), halves(ranked.n_units, seed)
    n_classes = len(foreground)
    # [AUROC, IoU] of the observed and every shuffle
    drawn = np.empty((2, n_shuffles + 1, n_classes, len(tested)), np.float32)
    shifted = np.full((n_shuffles + 1, n_classes, len(tested)), np.nan, np.float32)  # AUROC under shifted masks
    steps = np.random.default_rng([seed, 3]).integers(ranked.n_per_image, size=(n_shuffles, ranked.n_units))
    for number, one in enumerate(found):
        drawn[0, 0, number], drawn[1, 0, number] = one.auroc, one.iou
        shifted[0, number] = one.auroc
    for n_done in range(n_shuffles):
        order = rng.permutation(ranked.n_units)
        for number, masks in enumerate(foreground):
            one = mask_agreement(ranked, exchanged_masks(masks, ranked.unit_of, order), half)
            drawn[0, n_done + 1, number], drawn[1, n_done + 1, number] = one.auroc, one.iou
            other = shifted_masks(masks, steps[n_done][ranked.unit_of])
            nothing = np.zeros((0, 0))
            _fill_auroc(
                ranked.starts,
                ranked.patches,
                ranked.ranks,
                other,
                ranked.unit_of,
                0,
                shifted[n_done + 1, number],
                nothing,
            )
        progress(n_done + 1, n_shuffles, "shuffling")
    own = [_scaled_p(values, tested) for values in drawn]
    mean, largest = zip(*(_mean_and_largest(values[1:], tested) for values in drawn), strict=True)
    by_sign = _place_p(ranked, foreground, tested, n_shuffles=n_shuffles, seed=seed)
    p_place, p_any_place = (np.maximum(a, b) for a, b in zip(by_sign, _scaled_p(shifted, tested)[:2], strict=True))
    return Chance(
        mean_auroc=mean[0],
        mean_iou=mean[1],
        p_auroc=own[0][0],
        p_iou=own[1][0],
        p_any_auroc=own[0][1],
        p_any_iou=own[1][1],
        p_place=p_place,
        p_any_place=p_any_place,
        expected_max_auroc=largest[0],
        expected_max_iou=largest[1],
        needed_auroc=own[0][2],
        needed_iou=own[1][2],
    )


def _mean_and_largest(shuffled: Any, tested: Bool) -> tuple[Float, Float]:
    """(n_classes, n_latents) means over (n_shuffles, n_classes, n_latents), and the mean of the largest, by class."""
    is_known = ~np.isnan(shuffled)
    n_known = is_known.sum(axis=0)
    mean = np.where(n_known > 0, np.where(is_known, shuffled, 0).sum(axis=0, dtype=np.float64), np.nan)
    mean = mean / np.maximum(1, n_known)
    largest = np.where(is_known, shuffled, -np.inf)[:, :, tested].max(axis=2).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return mean, np.where(np.isfinite(largest).all(axis=0), largest.mean(axis=0), np.nan)


def _scaled_p(drawn: Any, tested: Bool) -> tuple[Float, Float, Float]:
    """p and p_any (n_classes, n_latents) of the first of (1 + n_shuffles, n_classes, n_latents), two-sided.

    All 1 + n_shuffles are treated alike, so the rank of the observed one is exact if they are exchangeable.
    Also the value from which on p_any of a latent is at most 0.05: p_any and values have one scale with it, while the
    largest value of a shuffle is that of whichever latent varies most.
    """
    n_drawn, shape = len(drawn), drawn.shape[1:]
    p, p_any, needed = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    largest = np.zeros(n_drawn)
    for number in range(shape[0]):
        values = drawn[:, number].astype(np.float64)
        distance = np.abs(_scaled(values))
        usable = tested & ~np.isnan(values[0])
        # tolerance: equal masks give equal values only up to rounding
        p[number, usable] = (distance >= distance[0] - 1e-6).sum(axis=0)[usable] / n_drawn
        largest = np.maximum(largest, distance[:, usable].max(axis=1, initial=0))
    n_allowed = int(_LEVEL * n_drawn + 1e-9)
    for number in range(shape[0]):
        values = drawn[:, number].astype(np.float64)
        distance = np.abs(_scaled(values))[0]
        usable = ~np.isnan(p[number])
        n_beyond = n_drawn - np.searchsorted(np.sort(largest), distance[usable] - 1e-6)
        p_any[number, usable] = n_beyond / n_drawn
        if n_allowed:
            known = ~np.isnan(values[:, usable])
            sizes, held = known.sum(axis=0), np.where(known, values[:, usable], 0)
            mean = held.sum(axis=0) / sizes
            sd = np.sqrt((np.where(known, held - mean, 0) ** 2).sum(axis=0) / sizes)
            from_here = mean + sd * (np.sort(largest)[n_drawn - 1 - n_allowed] + 1e-6)
            needed[number, usable] = np.where((sd > 1e-6) & (from_here <= 1), from_here, np.nan)
    return p, p_any, needed


def _scaled(values: Float) -> Float:
    """Each column minus its mean, divided by its standard deviation; 0 if it does not vary, or a value is unknown."""
    known = ~np.isnan(values)
    n = np.maximum(1, known.sum(axis=0))
    centred = np.where(known, values - np.where(known, values, 0).sum(axis=0) / n, 0)
    sd = np.sqrt((centred**2).sum(axis=0) / n)
    scaled: Float = centred / np.where(sd > 1e-6, sd, np.inf)
    return scaled


def _place_p(
    ranked: RankedValues, foreground: Bool, tested: Bool, *, n_shuffles: int, seed: int
) -> tuple[Float, Float]:
    """p and p_any (n_classes, n_latents) of the null hypothesis AUROC = 0.5, by sign flips of the units' distances.

    The statistic |sum of d| / sqrt(sum of d^2) over the units is a monotone function of that of a one-sample t test.
    Its denominator does not depend on signs, so it has one scale for latents of few and of many units.
    """
    rng = np.random.default_rng([seed, 2])
    signs = rng.choice(np.array([-1.0, 1.0]), (n_shuffles, ranked.n_units))
    shape = (len(foreground), len(tested))
    observed, n_beyond, largest = np.full(shape, np.nan), np.zeros(shape), np.zeros(n_shuffles)
    step = max(1, _CELLS // max(ranked.n_units, n_shuffles))
    for number, masks in enumerate(foreground):
        for first in range(0, len(tested), step):
            stop = min(first + step, len(tested))
            units = np.full((stop - first, ranked.n_units), 0.5)
            starts = ranked.starts[first : stop + 1]
            _fill_auroc(
                starts, ranked.patches, ranked.ranks, masks, ranked.unit_of, first, np.empty(stop - first), units
            )
            distance = units - 0.5
            scale = np.sqrt((distance**2).sum(axis=1))
            use = np.flatnonzero(tested[first:stop] & (scale > 1e-9))
            unit = distance[use] / scale[use, None]
            now = np.abs(unit.sum(axis=1))
            shuffled = np.abs(signs @ unit.T)  # (n_shuffles, n)
            observed[number, first + use] = now
            n_beyond[number, first + use] = (shuffled >= now - 1e-9).sum(axis=0)
            largest = np.maximum(largest, shuffled.max(axis=1, initial=0))
    known = ~np.isnan(observed)
    p = np.where(known, (1 + n_beyond) / (1 + n_shuffles), np.nan)
    p_any = np.full(shape, np.nan)
    n_any = n_shuffles - np.searchsorted(np.sort(largest), observed[known] - 1e-9)
    p_any[known] = (1 + n_any) / (1 + n_shuffles)
    exactly_half = tested & ~known  # 0.5 in every unit: p is 1
    p[exactly_half] = p_any[exactly_half] = 1
    return p, p_any


@numba.njit(cache=True)
def _count_images(starts: Any, patches: Any, n_per_image: int) -> Any:
    """(n_latents,) images in which each latent is active."""
    found = np.zeros(len(starts) - 1, np.int64)
    for latent in range(len(starts) - 1):
        last = -1
        for k in range(starts[latent], starts[latent + 1]):
            image = patches[k] // n_per_image
            if image != last:
                found[latent] += 1
                last = image
    return found


@numba.njit(cache=True)
def _fill_auroc(
    starts: Any, patches: Any, ranks: Any, foreground: Any, unit_of: Any, first_latent: int, auroc: Any, units: Any
) -> None:
    """Fill auroc (n_latents,), and units (n_latents, n_units) unless that is empty; unknown entries stay unchanged.

    The entries of a latent are sorted by image, and so by unit: one pass.
    """
    n_per_image = foreground.shape[1]
    n_inside = np.zeros(len(foreground), np.int64)
    for image in range(len(foreground)):
        for patch in range(n_per_image):
            n_inside[image] += foreground[image, patch]
    for latent in range(len(starts) - 1):
        k, stop = starts[latent], starts[latent + 1]
        total, n_units, won, pairs, unit = 0.0, 0, 0.0, 0.0, -1
        while k < stop:
            image = patches[k] // n_per_image
            if unit_of[image] != unit:
                if pairs > 0:
                    total += won / pairs
                    n_units += 1
                    if len(units):
                        units[latent, unit] = won / pairs
                unit, won, pairs = unit_of[image], 0.0, 0.0
            begin, n_hit, rank_sum = k, 0, 0.0
            while k < stop and patches[k] // n_per_image == image:
                if foreground[image, patches[k] % n_per_image]:
                    n_hit += 1
                    rank_sum += ranks[k]
                k += 1
            inside = n_inside[image]
            rank_sum += (inside - n_hit) * (n_per_image - (k - begin) + 1) / 2  # the zeros share a mean rank
            won += rank_sum - inside * (inside + 1) / 2
            pairs += inside * (n_per_image - inside)
        if pairs > 0:
            total += won / pairs
            n_units += 1
            if len(units):
                units[latent, unit] = won / pairs
        if n_units:
            auroc[latent] = total / n_units


@numba.njit(cache=True)
def _fill_iou(starts: Any, values: Any, patches: Any, foreground: Any, half_of: Any, iou: Any, threshold: Any) -> None:
    """Fill iou and threshold (n_latents,); entries of latents without a value stay unchanged."""
    n_per_image = foreground.shape[1]
    n_inside = np.zeros(2, np.int64)
    for image in range(len(foreground)):
        for patch in range(n_per_image):
            n_inside[half_of[image]] += foreground[image, patch]
    for latent in range(len(starts) - 1):
        first, stop = starts[latent], starts[latent + 1]
        if first == stop:
            continue
        n_hit, n_on = np.zeros(2, np.int64), np.zeros(2, np.int64)
        best, at = np.zeros(2), np.full(2, np.inf)  # of each half; without an overlap no patch is chosen
        best_of_all, at_of_all = -1.0, 0.0
        for k in range(stop - 1, first - 1, -1):  # from the largest value down
            image = patches[k] // n_per_image
            n_on[half_of[image]] += 1
            n_hit[half_of[image]] += foreground[image, patches[k] % n_per_image]
            if k == first or values[k - 1] != values[k]:  # equal values are on the same side of a threshold
                for half in range(2):
                    union = n_inside[half] + n_on[half] - n_hit[half]
                    if union > 0 and n_hit[half] / union > best[half]:
                        best[half], at[half] = n_hit[half] / union, values[k]
                hit, union = n_hit.sum(), n_inside.sum() + n_on.sum() - n_hit.sum()
                if union > 0 and hit / union > best_of_all:
                    best_of_all, at_of_all = hit / union, values[k]
        hit, on = 0, 0
        for k in range(first, stop):
            image = patches[k] // n_per_image
            if values[k] >= at[1 - half_of[image]]:
                on += 1
                hit += foreground[image, patches[k] % n_per_image]
        if n_inside.sum() + on - hit > 0:
            iou[latent] = hit / (n_inside.sum() + on - hit)
        threshold[latent] = at_of_all


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
    n_images = _count_images(ranked.starts, ranked.patches, ranked.n_per_image)
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


def _plot(table: pa.Table, result: MaskResult, said: dict[str, Any], path: Path) -> None:
    """AUROC and IoU against the number of active patches; the best latents marked, with what each needs as a dash."""
    figure, grid = new_figure(width=9, height=4, columns=2)
    known = table.filter(table["auroc"].is_valid())
    for axes, (name, label, best) in zip(
        grid[0],
        (
            ("auroc", "AUROC within images", said["best_by_auroc"]),
            ("iou", "IoU (threshold from the other half)", said["best_by_iou"]),
        ),
        strict=True,
    ):
        axes.set_xscale("log")
        sizes, values = known["n_active_patches"].to_numpy(), known[name].to_numpy()
        axes.scatter(sizes, values, s=5, color=COLORS[0], alpha=0.5, rasterized=True)
        at = [row["n_active_patches"] for row in best], [row[name] for row in best]
        axes.scatter(*at, s=22, facecolors="none", edgecolors=COLORS[5])
        words = ["circles: latents " + ", ".join(str(row["latent"]) for row in best)]
        needing = [row for row in best if row[f"{name}_needed"] is not None]
        if needing:
            at = [row["n_active_patches"] for row in needing], [row[f"{name}_needed"] for row in needing]
            axes.scatter(*at, s=60, marker="_", color="black", linewidth=1)
            words.append(f"dashes: what each needs for p {_LEVEL:g} among all latents, against masks of other images")
        axes.set_title("\n".join(words), fontsize=7, loc="left")
        axes.set_xlabel("patches in which the latent is active", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
    figure.suptitle(
        f"{plain(said['name'])}: {known.num_rows:,} latents and the masks of {result.n_images:,} images "
        f"({said['n_patches'] / result.n_patches:.0%} of the patches)",
        fontsize=9,
    )
    save_both(figure, path)
