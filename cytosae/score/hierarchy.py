"""Absorption and splitting: does one latent stand for a coarse label, or several for its finer ones?

For each coarse label with two or more finer labels, its own latent is that of the largest average precision, and it is
on where it is above the threshold of the best F1; so is the own latent of each finer label, among all images.

absorption   share of the coarse label's images where its own latent is off and the own latent of the image's finer
             label, another latent, is on (Chanin et al., arXiv 2409.14507, describe the effect on letters). By chance:
             the finer latents' on and off are exchanged among the coarse label's images
splitting    within the coarse label's images alone, the best average precision of a latent for each finer label,
             averaged. By chance: finer labels are exchanged among these images
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_matrix

from stores.part_files import Arrays, Keep, computed

from .images import some_rows
from .intervals import Blocks
from .label_null import exchanged_labels
from .single_latents import single_latents, single_without

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
LEAST_IMAGES = 5  # of a finer label, to count


@dataclass(frozen=True)
class Lineage:
    """One coarse label."""

    parent: int
    latent: int  # its own latent
    children: tuple[int, ...]
    child_latents: tuple[int, ...]
    absorbed: float
    absorbed_null: float
    split: float
    split_null: tuple[float, ...]  # one for each shuffle
    n_images: int
    n_blocks: int  # patients with such an image
    taken_of_block: Floats  # (blocks,) images that are taken over
    images_of_block: Floats  # (blocks,)
    split_without: Floats  # (blocks,) without each block


def lineages(
    values: csc_matrix,
    labels: Ints,
    parents: Ints,
    groups: Ints,
    n_labels: int,
    n_parents: int,
    *,
    of_labels: Floats,
    of_parents: Floats,
    shuffles: int,
    seed: int,
    blocks: Blocks,
    keep: Keep = computed,
) -> list[Lineage]:
    """Every coarse label that has two finer ones of LEAST_IMAGES images or more.

    Parameters
    ----------
    values : (n, n_latents)
    labels, parents, groups : (n,) numbers of the finer and the coarse label (-1: none), and of the group
    of_labels, of_parents : average precision (n_latents, n_labels) and (n_latents, n_parents)
    blocks : for what each would be without these images
    keep : the splitting of each coarse label is kept
    """
    found = []
    for parent in range(n_parents):
        inside = parents == parent
        counts = np.bincount(labels[inside & (labels >= 0)], minlength=n_labels)
        children = np.flatnonzero(counts >= LEAST_IMAGES)
        if len(children) < 2:
            continue
        own = int(np.argmax(of_parents[:, parent]))
        is_on = _is_on(values, own, inside)
        on_of, latents = {}, []
        for child in children.tolist():
            ranked = np.argsort(-of_labels[:, child], kind="stable")
            latent = int(ranked[0] if ranked[0] != own or len(ranked) == 1 else ranked[1])
            latents.append(latent)
            on_of[child] = _is_on(values, latent, labels == child) & (latent != own)
        n = int(inside.sum())
        missed = inside & ~is_on
        taken = np.any([missed & (labels == child) & on for child, on in on_of.items()], axis=0)
        expected = sum(
            int((missed & (labels == child)).sum()) * float(on[inside].mean()) for child, on in on_of.items()
        )
        number_of = np.full(n_labels, -1, np.int64)
        number_of[children] = np.arange(len(children))
        kept = np.flatnonzero(inside & (labels >= 0))
        kept = kept[number_of[labels[kept]] >= 0]
        within, finer = some_rows(values, kept), number_of[labels[kept]]
        of_groups = np.unique(groups[kept], return_inverse=True)[1].astype(np.int64)
        split = keep(
            f"splitting_{parent}",
            partial(
                _splitting, within, finer, of_groups, blocks.of_image[kept], len(children), blocks.n, shuffles, seed
            ),
        )
        found.append(
            Lineage(
                parent=parent,
                latent=own,
                children=tuple(children.tolist()),
                child_latents=tuple(latents),
                absorbed=int(taken.sum()) / n,
                absorbed_null=expected / n,
                split=float(split["value"][0]),
                split_null=tuple(split["null"].tolist()),
                n_images=n,
                n_blocks=blocks.having(inside),
                taken_of_block=np.bincount(blocks.of_image[taken], minlength=blocks.n).astype(np.float64),
                images_of_block=np.bincount(blocks.of_image[inside], minlength=blocks.n).astype(np.float64),
                split_without=split["without"],
            )
        )
    return found


def best_threshold(values: Floats, truth: Bools) -> float:
    """The value above or at which calling `truth` has the largest F1; of equal ones the largest value."""
    order = np.argsort(-values, kind="stable")
    hits, called = np.cumsum(truth[order]), np.arange(1, len(values) + 1)
    is_end = np.append(np.diff(values[order]) != 0, True)
    f1 = np.where(is_end, 2 * hits / (called + truth.sum()), -1)
    return float(values[order][int(np.argmax(np.round(f1, 12)))])


def _is_on(values: csc_matrix, latent: int, truth: Bools) -> Bools:
    column = values[:, [latent]].toarray().ravel().astype(np.float64)
    return np.asarray((column >= best_threshold(column, truth)) & (column != 0))


def _splitting(
    values: csc_matrix,
    finer: Ints,
    groups: Ints,
    block_of: Ints,
    n_classes: int,
    n_blocks: int,
    shuffles: int,
    seed: int,
) -> Arrays:
    """Mean average precision of the best latents, under the null, and of the same latents without each block."""
    precision = single_latents(values, finer, n_classes).average_precision
    null = [
        float(np.nanmean(single_latents(values, each, n_classes).average_precision.max(0)))
        for each in exchanged_labels(finer, groups, shuffles, seed)
    ]
    without, _ = single_without(values, finer, block_of, n_blocks, precision.argmax(0))
    known = np.isfinite(without)
    mean = np.where(known, without, 0).sum(0) / np.maximum(1, known.sum(0))
    return {
        "value": np.array([np.nanmean(precision.max(0))]),
        "null": np.array(null),
        "without": np.where(known.any(0), mean, np.nan),
    }
