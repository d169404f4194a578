"""What the overview says of every concept with a page: one row of short columns each, over all datasets together.

How they lie in files, and which of them a page reads before it is asked for more: gallery_files.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss

from cytosae.review import NOT_ASKED, OPEN, VERDICTS

from .cards import CARD_IMAGES, card_images
from .cohort import Cohort
from .inputs import Inputs
from .plan import Ints, Plan

LEAST_LABELLED = 5  # reference images with a label, below which a concept has no specificity
_MOST_PAIRS = 255


@dataclass(frozen=True, eq=False)
class Gallery:
    """Columns with a row for each latent of the plan, in its order."""

    images: list[Ints]  # of `card_images`
    frequency: npt.NDArray[np.float64]  # share of all readable images in which it is active
    mean: npt.NDArray[np.float64]  # image activation, over the images in which it is active; 0: never active
    labels: Sequence[str]  # of all reference images, sorted
    label: Ints  # number of the label with the largest share of their activation; -1: none has a label
    share: npt.NDArray[np.float64]  # of that label, of the activation of all reference images
    specificity: npt.NDArray[np.float64]  # nats, see `specificities`; NaN: too few labels
    dataset: Ints  # number of the dataset with the strongest image; -1: never active
    pair: Ints  # number of the comparison with the smallest q; -1: in none, or not tested
    g: npt.NDArray[np.float64]  # Hedges' g there
    q: npt.NDArray[np.float64]
    verdict: npt.NDArray[np.uint8]  # number in `VERDICTS` of opinions.py
    cells: Ints  # number of the set of its three strongest images: concepts with the same picture have the same
    names: dict[int, str]  # position -> the name that experts gave, or `cyto concept describe` tested


def make_gallery(inputs: Inputs, cohort: Cohort, plan: Plan) -> Gallery:
    """The columns of all concepts; memory grows with the concepts, and not with concepts times labels."""
    images = card_images(plan)
    n_active, frequency, mean = _activity(inputs, plan)
    labels, label, share, specificity = _labels(cohort, plan)
    best = np.array([int(numbers[0]) if len(numbers) else -1 for numbers in images], np.int64)
    dataset = np.where(best >= 0, np.append(plan.references.dataset, -1)[best], -1)
    pair, g, q = _differences(inputs, plan)
    verdict, names = _opinions(inputs, plan)
    return Gallery(
        images=images,
        frequency=frequency,
        mean=np.where(n_active > 0, mean, 0),
        labels=labels,
        label=label,
        share=share,
        specificity=specificity,
        dataset=dataset,
        pair=pair,
        g=g,
        q=q,
        verdict=verdict,
        cells=_cells(plan, images),
        names=names,
    )


def _cells(plan: Plan, images: list[Ints]) -> Ints:
    """Equal numbers for equal strongest images; those without any have a number of their own each."""
    shown = np.full((len(images), CARD_IMAGES), -1, np.int64)
    for at, numbers in enumerate(images):
        shown[at, : len(numbers)] = plan.references.image[numbers]
    shown[shown[:, 0] < 0, 1] = np.flatnonzero(shown[:, 0] < 0)
    return np.unique(shown, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _activity(inputs: Inputs, plan: Plan) -> tuple[Any, Any, Any]:
    """Images in which each is active, their share of all, and the mean activation in them; over all datasets."""
    n_readable = sum(int(found["n_readable"]) for found in inputs.concepts.by_dataset)
    n_active, total = np.zeros((2, len(plan.latents)))
    for dataset in inputs.concepts.datasets:
        table = inputs.concepts.latents(dataset)
        n_images = table["n_images"].to_numpy()[plan.latents]
        n_active += n_images
        total += n_images * table["mean_activation"].to_numpy()[plan.latents]
    return n_active, n_active / max(1, n_readable), total / np.maximum(1, n_active)


def _labels(cohort: Cohort, plan: Plan) -> tuple[list[str], Ints, Any, Any]:
    references, n_latents = plan.references, len(plan.latents)
    labels = sorted({*references.label} - {""})
    if not labels:
        nothing = np.full(n_latents, np.nan)
        return [], np.full(n_latents, -1, np.int64), nothing, nothing
    number = {name: n for n, name in enumerate(labels)}
    code = np.array([number.get(name, -1) for name in references.label], np.int64)
    at = np.searchsorted(plan.latents, references.latent)
    is_labelled = code >= 0
    place = (at[is_labelled], code[is_labelled])
    weights = ss.csr_matrix((references.value[is_labelled], place), (n_latents, len(labels)))
    counts = np.bincount(at[is_labelled], minlength=n_latents)
    base = np.zeros(len(labels))
    for name, is_readable in zip(cohort.labels, cohort.is_readable.tolist(), strict=True):
        if is_readable and name in number:
            base[number[name]] += 1
    label = np.where(counts > 0, np.asarray(weights.argmax(axis=1)).ravel(), -1)
    total = np.bincount(at, references.value, n_latents)
    largest = weights.max(axis=1).toarray().ravel()
    share = np.divide(largest, total, out=np.full(n_latents, np.nan), where=(total > 0) & (counts > 0))
    found = specificities(weights, base / max(1.0, base.sum()))
    found[counts < min(LEAST_LABELLED, int(counts.max(initial=0)))] = np.nan
    return labels, label.astype(np.int64), share, found


def specificities(weights: ss.csr_matrix, base: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How far the labels of each concept's images are from those of all images: Kullback-Leibler divergence, nats.

    0: its images have labels as all images have; the rarer the label that they share, the larger.

    Parameters
    ----------
    weights : (concepts, labels) activation of its reference images with each label
    base : (labels,) share of each label of all readable images with a label
    """
    rows = weights.tocsr()
    total = np.repeat(np.asarray(rows.sum(axis=1)).ravel(), np.diff(rows.indptr))
    part = np.divide(rows.data, total, out=np.zeros_like(rows.data), where=total > 0)
    known = (part > 0) & (base[rows.indices] > 0)
    terms = np.zeros_like(part)
    terms[known] = part[known] * np.log(part[known] / base[rows.indices][known])
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    return np.maximum(0, np.bincount(owner, terms, rows.shape[0]))


def _differences(inputs: Inputs, plan: Plan) -> tuple[Ints, Any, Any]:
    """Of each latent the comparison in which its q is smallest; of equal ones that with the larger difference."""
    pair, g, q = np.full(len(plan.latents), -1, np.int64), *np.full((2, len(plan.latents)), np.nan)
    for number in range(min(len(inputs.comparisons), _MOST_PAIRS)):
        table = inputs.comparison_table(number)
        its_g, its_q = (table[name].to_numpy(zero_copy_only=False)[plan.latents] for name in ("hedges_g", "q"))
        is_better = ~np.isnan(its_q) & (
            np.isnan(q) | (its_q < q) | ((its_q == q) & (np.abs(np.nan_to_num(its_g)) > np.abs(np.nan_to_num(g))))
        )
        pair[is_better], g[is_better], q[is_better] = number, its_g[is_better], its_q[is_better]
    return pair, g, q


def _opinions(inputs: Inputs, plan: Plan) -> tuple[npt.NDArray[np.uint8], dict[int, str]]:
    """The verdict on each latent, and the names that were given, by position."""
    latents, opinions = plan.latents.tolist(), inputs.opinions or {}
    asked = {*plan.selection}
    said = [opinions[n].verdict if n in opinions else OPEN if n in asked else NOT_ASKED for n in latents]
    tested = inputs.evidence.names
    names: dict[int, str] = {}
    for at, latent in enumerate(latents):
        given = opinions[latent].name if latent in opinions else ""
        others = () if tested is None else tested.of(latent)
        if given or others:
            names[at] = given or others[0].name  # of experts, else the one that told the images apart best
    return np.array([VERDICTS.index(one) for one in said], np.uint8), names
