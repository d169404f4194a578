"""What the labels of a latent's top images say: how mixed they are, which weighs most, and what chance would give.

Pure functions of arrays. A label is a number from 0, -1 where there is none; each top image weighs as much as its image
activation. Twins: test_concepts.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.doors import make_callable
from stores.errors import BadInput

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_LEAST_GIVEN = 10  # labels that a shuffle gives to a patient before it repeats them
_EQUAL = 1e-9  # nats: sums in another order differ in the last bits


def label_entropy(top_values: npt.ArrayLike, top_labels: npt.ArrayLike, *, min_support: int = 1) -> Floats:
    """Activation-weighted entropy of the labels of each latent's top images, in nats (docs/reference/paper.md 6).

        p_l = (sum of the values with label l) / (sum of all values),    H = - sum_l p_l ln p_l

    Padding (value 0 or label -1) is ignored. 0 means one label only, which a single image always has.

    Parameters
    ----------
    top_values : (S, k) image activations, finite, at least 0
    top_labels : (S, k) whole numbers, -1 for no label
    min_support : least number of images with a value and a label

    Returns
    -------
    (S,) float64 in [0, ln k]; NaN where there are fewer than `min_support` such images, and where there are none.

    Raises
    ------
    BadInput
        If the shapes differ, or a value is negative, NaN or infinite.
    """
    values, labels = _checked(top_values, top_labels)
    support = ((values > 0) & (labels >= 0)).sum(axis=1)
    return np.where(support >= max(1, min_support), _weigh(values, labels)[0], np.nan)


def shuffled_entropy(
    top_values: npt.ArrayLike,
    top_images: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    shuffles: int,
    seed: int,
    min_support: int = 1,
) -> Floats:
    """The mean of `label_entropy` when the labels are shuffled among the images that have one.

    So the labels of a latent's top images are drawn without replacement from all labels of the dataset, and weighted
    with the latent's own values. One shuffle serves all latents: two with the same top images get the same labels.

    Parameters
    ----------
    top_images : (S, k) positions in `labels`, -1 for no image
    labels : (n_images,) -1 for no label

    Returns
    -------
    (S,) float64; NaN where `label_entropy` is, and everywhere without shuffles.
    """
    images, given = np.asarray(top_images), np.asarray(labels, np.int64)
    labelled = np.flatnonzero(given >= 0)
    rng = np.random.default_rng(seed)
    total = np.zeros(len(images))
    for _ in range(shuffles):
        shuffled = np.full(len(given) + 1, -1)  # the last one is that of no image
        shuffled[labelled] = rng.permutation(given[labelled])
        total += label_entropy(top_values, shuffled[images], min_support=min_support)
    return total / shuffles if shuffles else np.full(len(images), np.nan)


def label_divergence(
    top_values: npt.ArrayLike, top_labels: npt.ArrayLike, shares: npt.ArrayLike, *, min_support: int = 1
) -> Floats:
    """How far the labels of each latent's top images are from those of the dataset, in nats.

        D = sum_l p_l ln (p_l / b_l)        p_l as in `label_entropy`, b_l the share of label l in the dataset

    An entropy cannot tell a latent of a rare label from one that has only the common label, as anything would: both
    have 0. D is ln(1 / b_l) for them: at 90 to 10, 2.30 and 0.11.

    Parameters
    ----------
    shares : (n_labels,) b_l, above 0 for every label in `top_labels`

    Returns
    -------
    (S,) float64, at least 0; NaN where `label_entropy` is.
    """
    values, labels = _checked(top_values, top_labels)
    entropy = label_entropy(values, labels, min_support=min_support)
    return np.maximum(0.0, _mean_surprise(values, labels, -np.log(np.asarray(shares, np.float64))) - entropy)


@dataclass(frozen=True, eq=False)
class LabelTests:
    """By chance (1 + shuffles that do as well) / (1 + shuffles); (S,) each, NaN where `label_entropy` is."""

    entropy_p: Floats  # of an entropy as small
    divergence: Floats  # `label_divergence`
    divergence_p: Floats  # of a divergence as large


def label_tests(
    top_values: npt.ArrayLike,
    top_images: npt.ArrayLike,
    labels: npt.ArrayLike,
    patients: npt.ArrayLike,
    *,
    shuffles: int,
    seed: int,
    min_support: int = 1,
) -> LabelTests:
    """Permutation test of the labels of each latent's top images: p-values of their entropy and of their divergence.

    Images of one patient are not independent: a latent may stand for the patient, and the patient has few labels. So
    labels move from patient to patient (`shuffled_labels`). A latent whose top images are all of one patient is
    compared with the labels that one patient has; where one label is common, the null has small entropies too. One
    shuffle serves all latents. With few patients p cannot become small, rightly. Without shuffles p is NaN.

    Parameters
    ----------
    top_images : (S, k) positions in `labels`, -1 for no image
    labels, patients : (n_images,) numbers, -1 for none; an image without a patient counts as one by itself
    """
    images, given = np.asarray(top_images), np.asarray(labels, np.int64)
    shares = np.bincount(given[given >= 0]) / max(1, int((given >= 0).sum()))
    shares[shares == 0] = 1  # no image has it

    surprise = -np.log(shares)
    of_top = np.where(images >= 0, given[images], -1)
    values, _ = _checked(top_values, of_top)
    entropy = label_entropy(values, of_top, min_support=min_support)
    divergence = label_divergence(values, of_top, shares, min_support=min_support)
    n_small, n_large = np.zeros(len(images), np.int64), np.zeros(len(images), np.int64)
    for shuffled in shuffled_labels(given, patients, shuffles=shuffles, seed=seed):
        of_top = np.where(images >= 0, shuffled[images], -1)
        other = _weigh(values, of_top)[0]
        n_small += other <= entropy + _EQUAL
        n_large += _mean_surprise(values, of_top, surprise) - other >= divergence - _EQUAL
    has_none = np.isnan(entropy) | (shuffles == 0)
    return LabelTests(
        np.where(has_none, np.nan, (1 + n_small) / (1 + shuffles)),
        divergence,
        np.where(has_none, np.nan, (1 + n_large) / (1 + shuffles)),
    )


def shuffled_labels(labels: npt.ArrayLike, patients: npt.ArrayLike, *, shuffles: int, seed: int) -> Iterator[Ints]:
    """Labels after shuffles from patient to patient, (n_images,) each; images without a label keep none.

    The patients stand in a ring, in random order, with their labels in random order. Each patient gets those that
    begin with another's (or, by chance, with its own), and gets them again and again if the other has fewer; below 10
    it goes on with the next in the ring first. So a patient's images get labels that belong together as a patient's do,
    also if it has most of them: a mixture over several patients would be nearer to the average than any real one.
    Without patients, or with one label each, it is a plain shuffle of images, or of patients.

    Parameters
    ----------
    labels, patients : as in `label_tests`
    """
    given = np.asarray(labels, np.int64)
    group = np.array(patients, np.int64)
    alone = np.flatnonzero(group < 0)
    group[alone] = group.max(initial=0) + 1 + np.arange(len(alone))
    labelled = np.flatnonzero(given >= 0)
    _, of_image, sizes = np.unique(group[labelled], return_inverse=True, return_counts=True)
    targets = labelled[np.argsort(of_image, kind="stable")]  # patient by patient
    within = np.arange(len(labelled)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rng = np.random.default_rng(seed)
    for _ in range(shuffles):
        place = rng.permutation(len(sizes))  # of each patient in the ring
        order = rng.permutation(len(labelled))
        ring = given[labelled[order[np.argsort(place[of_image[order]], kind="stable")]]]
        begins = np.empty(len(sizes), np.int64)
        in_ring = np.argsort(place)
        begins[in_ring] = np.cumsum(sizes[in_ring]) - sizes[in_ring]
        source = rng.permutation(len(sizes))
        n_given = np.repeat(np.maximum(sizes[source], _LEAST_GIVEN), sizes)
        shuffled = np.full(len(given), -1, np.int64)
        shuffled[targets] = ring[(np.repeat(begins[source], sizes) + within % n_given) % max(1, len(ring))]
        yield shuffled


def top_label(top_values: npt.ArrayLike, top_labels: npt.ArrayLike) -> Ints:
    """(S,) the label with the largest sum of values among each latent's top images; -1 without any.

    Of labels with equal sums the one with the smaller number.
    """
    heaviest: Ints = _weigh(*_checked(top_values, top_labels))[1]
    return heaviest


@dataclass(frozen=True, kw_only=True)
class LabelAgreement:
    """How often latents have the same top label in two datasets, and how often by chance."""

    n_compared: int  # latents with enough labelled top images in both
    n_agreeing: int
    share: float  # NaN without a latent to compare, as the next two
    share_expected: float  # if it were chance which latent has which label: the mean over all such shuffles
    share_shuffled_95: float  # 95th percentile of seeded shuffles


def label_agreement(first: npt.ArrayLike, second: npt.ArrayLike, *, shuffles: int, seed: int) -> LabelAgreement:
    """Compare the top labels of latents in two datasets, (S,) each; -1 in either: not compared.

    Expected by chance: with n_1(l) and n_2(l) latents of label l, sum_l n_1(l) n_2(l) / n^2. Latents are not
    independent of each other (several may respond to the same thing), so this is no test.
    """
    a, b = np.asarray(first, np.int64), np.asarray(second, np.int64)
    is_compared = (a >= 0) & (b >= 0)
    a, b = a[is_compared], b[is_compared]
    n = len(a)
    if not n:
        return LabelAgreement(n_compared=0, n_agreeing=0, share=np.nan, share_expected=np.nan, share_shuffled_95=np.nan)
    size = int(max(a.max(), b.max())) + 1
    expected = int(np.bincount(a, minlength=size) @ np.bincount(b, minlength=size)) / n**2
    rng = np.random.default_rng(seed)
    shuffled = [float((a == rng.permutation(b)).mean()) for _ in range(shuffles)]
    return LabelAgreement(
        n_compared=n,
        n_agreeing=int((a == b).sum()),
        share=float((a == b).mean()),
        share_expected=expected,
        share_shuffled_95=float(np.quantile(shuffled, 0.95)) if shuffles else np.nan,
    )


def _checked(top_values: npt.ArrayLike, top_labels: npt.ArrayLike) -> tuple[Floats, Ints]:
    values, labels = np.asarray(top_values, np.float64), np.asarray(top_labels)
    if values.ndim != 2 or values.shape != labels.shape:
        raise BadInput(f"top_values and top_labels must both be (S, k); found {values.shape} and {labels.shape}")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise BadInput("top_values must be finite and at least 0; found a value that is not")
    if not np.issubdtype(labels.dtype, np.integer):
        raise BadInput(f"top_labels must be whole numbers, -1 for no label; found {labels.dtype}")
    return values, labels.astype(np.int64)


@numba.njit(cache=True)
def _mean_surprise(values: Any, labels: Any, surprise: Any) -> Any:
    """Per row: the mean of what its labels tell, -ln of their share in the dataset; 0 without any."""
    mean = np.zeros(len(values))
    for s in range(len(values)):
        total = 0.0
        for k in range(values.shape[1]):
            if labels[s, k] >= 0 and values[s, k] > 0:
                total += values[s, k]
                mean[s] += values[s, k] * surprise[labels[s, k]]
        if total > 0:
            mean[s] /= total
    return mean


@numba.njit(cache=True)
def _weigh(values: Any, labels: Any) -> Any:
    """Per row: entropy of its labels (0 without any), and the label of the largest sum (-1 without any)."""
    entropy, heaviest = np.zeros(len(values)), np.full(len(values), -1, np.int64)
    for s in range(len(values)):
        total, largest = 0.0, 0.0
        for k in range(values.shape[1]):
            if labels[s, k] >= 0:
                total += values[s, k]
        for k in range(values.shape[1]):
            label, weight = labels[s, k], 0.0
            if label < 0 or values[s, k] == 0:
                continue
            for other in range(values.shape[1]):
                if labels[s, other] == label:
                    if other < k and values[s, other] > 0:
                        weight = 0.0  # this label was counted already
                        break
                    weight += values[s, other]
            share = weight / total
            if share > 0:
                entropy[s] -= share * np.log(share)
                if weight > largest or (weight == largest and label < heaviest[s]):
                    largest, heaviest[s] = weight, label
    return entropy, heaviest


make_callable(__name__, "label_entropy")  # cytosae.concepts.label_entropy(...)
