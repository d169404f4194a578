"""Does a latent's map agree with a segmentation? AUROC and best-threshold IoU per latent, over all patches with a mask.

The null shuffles which image has which mask: a latent that always fires at the centre, where cells are, agrees with
any mask of a centred cell, and the null knows. Only stored values are looked at: they are ranked once, what is not
stored is zero and ties with itself, and each shuffle is one pass over them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.errors import BadInput
from stores.files import sha256_json
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.results import ResultStore, begin_results
from stores.spec import MASKS
from stores.tables import column

from .drawing import COLORS, new_figure, save_both
from .patch_maps import patch_side

MAX_NONZEROS = 1 << 28  # of the masked images together: about 10 GiB
Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
_TOP = 5  # latents named in the figure


@dataclass(frozen=True)
class RankedValues:
    """The stored values of all latents at some patches, by latent, then value rising; `n_patches` in all."""

    n_patches: int
    starts: Int  # (n_latents + 1,) where the values of each latent begin
    values: npt.NDArray[np.float32]  # (nnz,)
    patches: npt.NDArray[np.int32]  # (nnz,) from 0 over all images
    ranks: Float  # (nnz,) among all patches, from 1; ties, and what is not stored, averaged


@dataclass(frozen=True)
class MaskAgreement:
    """Per latent, (n_latents,), NaN for a latent that is active at no patch.

    auroc : chance that a foreground patch has the larger value than a background patch, ties counting half
    iou : the best intersection over union of the foreground with the patches at or above a threshold
    threshold : the stored value that gives it (the largest, if several do)
    """

    auroc: Float
    iou: Float
    threshold: Float


@dataclass(frozen=True, kw_only=True)
class Null:
    """The same under shuffled masks. p: (1 + shuffles that do as well) / (1 + shuffles), of the latent itself.

    `p_any`: of the best latent of each shuffle, which allows for having looked at all of them. `expected_max`: the best
    latent's mean over the shuffles.
    """

    mean_auroc: Float  # (n_latents,)
    mean_iou: Float
    p_auroc: Float
    p_iou: Float
    p_any_auroc: Float
    p_any_iou: Float
    expected_max_auroc: float
    expected_max_iou: float


@dataclass(frozen=True, kw_only=True)
class MaskResult:
    """What was compared, and the latents that agree most."""

    n_images: int
    n_patches: int
    n_foreground: int  # of the patches
    n_silent: int  # latents that are active at no patch
    expected_max_auroc: float | None  # None: nothing could be shuffled
    expected_max_iou: float | None
    best_by_auroc: list[dict[str, Any]]  # rows of agreement.parquet
    best_by_iou: list[dict[str, Any]]
    was_complete: bool = False


def write_mask_agreement(
    latents: LatentStore,
    shares: dict[int, Float],
    out: Path,
    *,
    min_share: float = 0.5,
    n_shuffles: int = 200,
    seed: int = 0,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    progress: Progress = lambda done, total, state: None,
) -> MaskResult:
    """Write `agreement.parquet`, a row per latent, and a figure.

    Memory: about 40 bytes for each stored value of the masked images.

    Parameters
    ----------
    shares : image_index -> (side, side) share of each patch that its mask covers
    min_share : a patch is foreground from this share on
    n_shuffles : 0: no null

    Raises
    ------
    BadInput
        If there is no mask, no foreground or nothing else, or the masked images hold too many values.
    SpecMismatch
        If `out` holds something else.
    """
    if not 0 < min_share <= 1:
        raise BadInput(f"min_share must be above 0 and at most 1; found {min_share!r}")
    side = patch_side(latents.spec.tokens_per_image)
    images = sorted(shares)
    foreground = np.array([(shares[image] >= min_share).ravel() for image in images]).reshape(-1, side * side)
    _check_foreground(foreground, min_share)
    names = column(latents.images, "image_id")
    n_shuffles = n_shuffles if len(images) > 1 else 0  # one image can have no other mask
    spec = {
        "latents": latents.identity,
        "masks_sha256": sha256_json(
            [[names[image], mask.tolist()] for image, mask in zip(images, foreground, strict=True)]
        ),
        "min_share": min_share,
        "n_shuffles": n_shuffles,
        "seed": seed,
    }
    writer = begin_results(out, MASKS, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "numba"))
    if writer.is_complete:
        return ResultStore(out, MASKS).result(MaskResult, was_complete=True)

    ranked = read_ranked(latents, images, progress=progress)
    found = mask_agreement(ranked, foreground.ravel())
    null = shuffled_agreement(ranked, foreground, found, n_shuffles=n_shuffles, seed=seed, progress=progress)
    table = _table(ranked, found, null)
    writer.write_table("agreement", table)
    result = MaskResult(
        n_images=len(images),
        n_patches=foreground.size,
        n_foreground=int(foreground.sum()),
        n_silent=int(np.isnan(found.auroc).sum()),
        expected_max_auroc=null.expected_max_auroc if null else None,
        expected_max_iou=null.expected_max_iou if null else None,
        best_by_auroc=_best(table, "auroc"),
        best_by_iou=_best(table, "iou"),
    )
    _plot(table, result, writer.root / "agreement")
    kept = {name: value for name, value in asdict(result).items() if name != "was_complete"}
    writer.finish({"result": kept})
    return result


def read_ranked(
    latents: LatentStore, images: Sequence[int], *, progress: Progress = lambda done, total, state: None
) -> RankedValues:
    """The values at all patches of these images, patch p of the i-th at number i * 256 + p; CLS is left out.

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
    n_patches = latents.spec.tokens_per_image - 1
    indices, values, patches = [], [], []
    for number, image in enumerate(images):
        rows = latents.read_images(image, image + 1)
        after_cls = int(rows.indptr[1])
        of_image = np.repeat(np.arange(n_patches), np.diff(rows.indptr[1:]))
        indices.append(rows.indices[after_cls:])
        values.append(rows.values[after_cls:])
        patches.append((number * n_patches + of_image).astype(np.int32))
        progress(number + 1, len(images), "reading")
    return rank(
        np.concatenate(indices),
        np.concatenate(values),
        np.concatenate(patches),
        n_latents=latents.spec.n_latents,
        n_patches=len(images) * n_patches,
    )


def rank(
    indices: npt.NDArray[Any],
    values: npt.NDArray[np.float32],
    patches: npt.NDArray[np.int32],
    *,
    n_latents: int,
    n_patches: int,
) -> RankedValues:
    """Sort entries (latent, value, patch) and rank each among all patches of its latent, the zeros lowest.

    Parameters
    ----------
    indices : (nnz,) latents
    values : (nnz,) above 0
    patches : (nnz,) from 0 to `n_patches` - 1, each at most once per latent
    """
    # floats above 0 are ordered as their bits are
    key = indices.astype(np.uint64) << np.uint64(32) | values.view(np.uint32)
    order = np.argsort(key, kind="stable")
    key = key[order]
    counts = np.bincount(indices, minlength=n_latents)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    is_new = np.ones(len(key), bool)
    is_new[1:] = key[1:] != key[:-1]
    first = np.flatnonzero(is_new)
    length = np.diff(np.append(first, len(key)))
    middle = np.repeat(first + (length - 1) / 2, length)  # of the tied values, as a place among all entries
    n_zeros = n_patches - counts
    ranks = middle + 1 + np.repeat(n_zeros - starts[:-1], counts)
    return RankedValues(n_patches, starts, values[order], patches[order], ranks)


def mask_agreement(ranked: RankedValues, foreground: Bool) -> MaskAgreement:
    """AUROC and best IoU of every latent with a foreground, (n_patches,) bool, neither empty nor everything.

    Ties count half in the AUROC; what is not stored is 0, below all that is.
    """
    assert 0 < foreground.sum() < len(foreground) == ranked.n_patches
    n_latents = len(ranked.starts) - 1
    auroc, iou, threshold = (np.full(n_latents, np.nan) for _ in range(3))
    _agree(ranked.starts, ranked.values, ranked.patches, ranked.ranks, foreground, auroc, iou, threshold)
    return MaskAgreement(auroc, iou, threshold)


def shuffled_agreement(
    ranked: RankedValues,
    foreground: Bool,
    found: MaskAgreement,
    *,
    n_shuffles: int,
    seed: int,
    progress: Progress = lambda done, total, state: None,
) -> Null | None:
    """What chance gives: the masks permuted among the images; None without shuffles, or where no latent is active.

    Parameters
    ----------
    foreground : (n_images, 256) bool, the images in the order of the patches of `ranked`
    found : the agreement with the masks as they are, against which each shuffle is held
    n_shuffles : times that whole masks are permuted, drawn with `seed`
    progress : shuffles done, shuffles in all
    """
    if not n_shuffles or np.isnan(found.auroc).all():
        return None
    rng = np.random.default_rng(seed)
    observed = np.stack([found.auroc, found.iou])  # (2, n_latents)
    total, n_as_good, n_any_as_good = (np.zeros(observed.shape) for _ in range(3))
    largest = np.zeros(2)
    for n_done in range(n_shuffles):
        shuffled = mask_agreement(ranked, foreground[rng.permutation(len(foreground))].ravel())
        values = np.stack([shuffled.auroc, shuffled.iou])
        best = np.nanmax(values, axis=1)
        total += values
        n_as_good += values >= observed
        n_any_as_good += best[:, None] >= observed
        largest += best
        progress(n_done + 1, n_shuffles, "shuffling")
    is_silent = np.isnan(observed)
    p, p_any = (np.where(is_silent, np.nan, (1 + n) / (1 + n_shuffles)) for n in (n_as_good, n_any_as_good))
    mean, largest = total / n_shuffles, largest / n_shuffles
    return Null(
        mean_auroc=mean[0],
        mean_iou=mean[1],
        p_auroc=p[0],
        p_iou=p[1],
        p_any_auroc=p_any[0],
        p_any_iou=p_any[1],
        expected_max_auroc=float(largest[0]),
        expected_max_iou=float(largest[1]),
    )


@numba.njit(cache=True)
def _agree(
    starts: Any, values: Any, patches: Any, ranks: Any, foreground: Any, auroc: Any, iou: Any, threshold: Any
) -> None:
    """Fill the outputs, latent by latent; those without a value keep what is there."""
    n_patches = len(foreground)
    n_inside = 0
    for patch in range(n_patches):
        n_inside += foreground[patch]
    n_outside = n_patches - n_inside
    for latent in range(len(starts) - 1):
        first, stop = starts[latent], starts[latent + 1]
        if first == stop:
            continue
        n_hit, rank_sum, best, best_value = 0, 0.0, -1.0, np.float32(0)
        for k in range(stop - 1, first - 1, -1):  # from the largest value down
            if foreground[patches[k]]:
                n_hit += 1
                rank_sum += ranks[k]
            if k == first or values[k - 1] != values[k]:  # ties fall on one side of a threshold together
                overlap = n_hit / (n_inside + (stop - k) - n_hit)
                if overlap > best:
                    best, best_value = overlap, values[k]
        n_zeros = n_patches - (stop - first)
        rank_sum += (n_inside - n_hit) * (n_zeros + 1) / 2
        auroc[latent] = (rank_sum - n_inside * (n_inside + 1) / 2) / (n_inside * n_outside)
        iou[latent] = best
        threshold[latent] = best_value


def _check_foreground(foreground: Bool, min_share: float) -> None:
    if not len(foreground):
        raise BadInput("no readable image has a mask: there is nothing to compare")
    if not foreground.any() or foreground.all():
        what = "every patch" if foreground.any() else "no patch"
        raise BadInput(
            f"{what} of {len(foreground):,} masked images is foreground (covered to {min_share:g} or more): there is "
            f"nothing to compare; look at the masks, or choose another --min-share"
        )


def _table(ranked: RankedValues, found: MaskAgreement, null: Null | None) -> pa.Table:
    """Row i is latent i; null where a latent is active at no patch, or nothing was shuffled."""
    nothing = np.full(len(found.auroc), np.nan)
    chance = {
        "auroc_null": null.mean_auroc if null else nothing,
        "auroc_p": null.p_auroc if null else nothing,
        "auroc_p_any": null.p_any_auroc if null else nothing,
        "iou_null": null.mean_iou if null else nothing,
        "iou_p": null.p_iou if null else nothing,
        "iou_p_any": null.p_any_iou if null else nothing,
    }
    columns = {"auroc": found.auroc, "iou": found.iou, "threshold": found.threshold, **chance}
    return pa.table(
        {
            "latent": pa.array(np.arange(len(found.auroc)), pa.int64()),
            "n_active_patches": pa.array(np.diff(ranked.starts), pa.int64()),
            **{name: pa.array(values, pa.float64(), mask=np.isnan(values)) for name, values in columns.items()},
        }
    )


def _best(table: pa.Table, name: str) -> list[dict[str, Any]]:
    known = table.filter(table[name].is_valid())
    order = np.lexsort((known["latent"].to_numpy(), -known[name].to_numpy()))[:_TOP]
    return list(known.take(order).to_pylist())


def _plot(table: pa.Table, result: MaskResult, path: Path) -> None:
    """AUROC and IoU against the number of active patches; the best latents marked, chance as a dashed line."""
    figure, grid = new_figure(width=9, height=4, columns=2)
    known = table.filter(table["auroc"].is_valid())
    for axes, (name, label, best, by_chance) in zip(
        grid[0],
        (
            ("auroc", "AUROC", result.best_by_auroc, result.expected_max_auroc),
            ("iou", "best-threshold IoU", result.best_by_iou, result.expected_max_iou),
        ),
        strict=True,
    ):
        axes.set_xscale("log")
        sizes, values = known["n_active_patches"].to_numpy(), known[name].to_numpy()
        axes.scatter(sizes, values, s=5, color=COLORS[0], alpha=0.5, rasterized=True)
        at = [row["n_active_patches"] for row in best], [row[name] for row in best]
        axes.scatter(*at, s=22, facecolors="none", edgecolors=COLORS[5])
        words = ["circles: latents " + ", ".join(str(row["latent"]) for row in best)]
        if by_chance is not None:
            axes.axhline(by_chance, color="black", linestyle="--", linewidth=1)
            words.append(f"dashed: the best latent under shuffled masks, {by_chance:.2f} on average")
        axes.set_title("\n".join(words), fontsize=7, loc="left")
        axes.set_xlabel("patches in which the latent is active", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
    figure.suptitle(
        f"{known.num_rows:,} latents and the masks of {result.n_images:,} images "
        f"({result.n_foreground / result.n_patches:.0%} of the patches are foreground)",
        fontsize=9,
    )
    save_both(figure, path)
