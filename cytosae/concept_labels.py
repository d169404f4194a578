"""What the labels of a latent's top images say: how mixed they are, which weighs most, and what chance would give.

Pure functions of arrays. A label is a number from 0, -1 where there is none; each top image weighs as much as its image
activation. Twins: tests/test_concepts.py.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.errors import BadInput

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def label_entropy(top_values: npt.ArrayLike, top_labels: npt.ArrayLike, *, min_support: int = 1) -> Floats:
    """Activation-weighted entropy of the labels of each latent's top images, in nats (REFERENCE.md, section 6).

        p_l = (sum of the values with label l) / (sum of all values),    H = - sum_l p_l ln p_l

    Padding (value 0 or label -1) is ignored. 0 means one label only, which one image alone has by necessity.

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
    independent of each other (several may answer to the same thing), so this is no test.
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
                        weight = 0.0  # this label has had its turn
                        break
                    weight += values[s, other]
            share = weight / total
            if share > 0:
                entropy[s] -= share * np.log(share)
                if weight > largest or (weight == largest and label < heaviest[s]):
                    largest, heaviest[s] = weight, label
    return entropy, heaviest
