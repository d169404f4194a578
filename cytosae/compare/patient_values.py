"""Values of patients from their images: of one cell type, standardised to one mixture, or thinned to equal numbers.

Means of few images are noisier and more skewed. So patients with different numbers of images are not exchangeable, and
a permutation test of their means is not valid. Thinned to n images of each type, in each of DRAWS random draws, they
are.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss

from stores.barcode_store import BarcodeStore
from stores.errors import BadInput
from stores.tables import listed
from stores.wording import counted

DRAWS = 10  # random draws of images, if patients are thinned
UNEVEN = 1.25  # ratio of medians, or of harmonic means (variance is 1 / images), above which "auto" thins
MOST_DROPPED = 0.1  # share of a group's patients that may have too few images, or lack a type
_ROWS = 256  # images that are read together
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ImagePlan:
    """Which images count for which patient, and with what weight."""

    owner: Ints  # (images,): the patient's number; -1: of another patient
    kind: Ints  # (images,): the number of the cell type; -1: a type that is not counted
    counts: Ints  # (patients, types)
    weights: npt.NDArray[np.float64]  # (types,), of a patient's mean: they add up to 1
    types: list[str]
    per_type: Ints | None  # (types,) images that each patient is thinned to
    kept: Bools  # (patients,)
    notes: list[str]  # patients, images and types that were left out, and why


def plan_images(
    owner: Ints,
    labels: npt.NDArray[np.object_],
    is_a: Bools,
    names: list[str],
    *,
    within: str | None,
    standardize: bool,
    images_per_patient: int | str,
) -> ImagePlan:
    """Decide which images are counted, and to what number of each type patients are thinned.

    Parameters
    ----------
    owner : (images,) patient of each readable image, -1: another's
    labels : (images,) cell type, "" where unknown; used with `within` and `standardize`
    images_per_patient : a number, "all" or "auto"

    Raises
    ------
    BadInput
        If there is no such type, or a group is left with fewer than two patients.
    """
    notes: list[str] = []
    types = [within] if within is not None else sorted({*labels[owner >= 0]} - {""}) if standardize else [""]
    if within is not None and within not in labels[owner >= 0]:
        raise BadInput(
            f"no image of these patients has the label {within!r}; there are "
            f"{listed(sorted({*labels[owner >= 0]} - {''}), 20) or 'none'}"
        )
    if not types:
        raise BadInput("no image of these patients has a label to standardize by")
    number = {name: at for at, name in enumerate(types)}
    uses_labels = within is not None or standardize
    kind = np.array([number.get(label, -1) for label in labels]) if uses_labels else np.zeros(len(owner), np.int64)
    counts = _count(owner, kind, len(names), len(types))
    weights = np.ones(len(types))
    if standardize:
        has = counts > 0
        common = np.minimum(has[is_a].mean(0), has[~is_a].mean(0)) >= 1 - MOST_DROPPED
        if not common.any():
            raise BadInput(
                f"no label is found in {1 - MOST_DROPPED:.0%} of the patients of each group, so there is nothing to "
                f"standardize by; compare within one label (--within-label)"
            )
        unlabelled = int(((owner >= 0) & (kind < 0)).sum())
        if unlabelled:
            notes.append(f"{unlabelled:,} images without a label are not counted")
        if not common.all():
            share = counts[:, ~common].sum() / counts.sum()
            notes.append(
                f"labels that more than {MOST_DROPPED:.0%} of a group's patients lack are not counted "
                f"({share:.1%} of the images): {listed([types[t] for t in np.flatnonzero(~common)], 20)}"
            )
        renumber = np.where(common, np.cumsum(common) - 1, -1)
        kind = np.where(kind >= 0, renumber[kind], -1)
        types, counts = [types[t] for t in np.flatnonzero(common)], counts[:, common]
        some = counts.sum(1) > 0
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        weights = (shares[some & is_a].mean(0) + shares[some & ~is_a].mean(0)) / 2
        weights /= weights.sum()
    kept: Bools = np.asarray((counts > 0).all(1), bool)
    if uses_labels and not kept.all():
        lacking = [
            f"{names[i]} ({listed([types[t] for t in np.flatnonzero(counts[i] == 0)])})" for i in np.flatnonzero(~kept)
        ]
        notes.append(
            f"{counted(len(lacking), 'patient')} without an image of each label, left out: {listed(lacking, 20)}"
        )
    _need_two(kept, is_a, "an image of each label")
    per_type = choose_number(counts[kept], is_a[kept], weights, images_per_patient)
    if per_type is not None:
        enough = (counts >= per_type).all(1)
        few = np.flatnonzero(kept & ~enough)
        if len(few):
            notes.append(
                f"{counted(len(few), 'patient')} with fewer images than the others are thinned to, left out: "
                f"{listed([names[i] for i in few], 20)}"
            )
        kept &= enough
        _need_two(kept, is_a, f"{' + '.join(map(str, per_type))} images")
    return ImagePlan(owner, kind, counts, weights, types, per_type, kept, notes)


def choose_number(
    counts: Ints, is_a: Bools, weights: npt.NDArray[np.float64], images_per_patient: int | str
) -> Ints | None:
    """(types,) images that every patient is thinned to; None: all are counted. Barcodes are not used.

    "auto" thins if medians or harmonic means differ by more than UNEVEN in any type, to the largest numbers (a quantile
    over all patients, the same one for each type) that at most MOST_DROPPED of each group's patients do not have.
    A given number is divided between the types by their weights, at least one each.
    """
    if images_per_patient == "all":
        return None
    if isinstance(images_per_patient, int):
        return np.maximum(1, np.rint(images_per_patient * weights)).astype(np.int64)
    if not is_uneven(counts, is_a):
        return None
    chosen = counts.min(0)
    for quantile in np.linspace(0, MOST_DROPPED, 21):
        tried = np.quantile(counts, quantile, axis=0, method="lower")
        enough = (counts >= tried).all(1)
        if all((~enough[some]).sum() <= MOST_DROPPED * some.sum() for some in (is_a, ~is_a)):
            chosen = np.maximum(chosen, tried)
    return chosen.astype(np.int64)


def is_uneven(counts: Ints, is_a: Bools) -> bool:
    """Whether images per patient (patients, types) differ between the groups by more than UNEVEN in any type."""
    for middle in (lambda n: np.median(n, 0), lambda n: 1 / (1 / n).mean(0)):
        one, other = middle(counts[is_a]), middle(counts[~is_a])
        if (np.maximum(one, other) > UNEVEN * np.minimum(one, other)).any():
            return True
    return False


def read_values(
    store: BarcodeStore, tau: float | None, plan: ImagePlan, seed: int
) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
    """(patients kept, latents) from all images, and from each draw (none if patients are not thinned).

    Images are read once, 256 at a time. Memory: a patients x latents matrix for each draw and one more.

    Raises
    ------
    DamagedStore
        If the barcodes of images cannot be read.
    """
    rng = np.random.default_rng([seed, 2])
    reader = store.matrix("image", tau)
    n_images, n_latents = reader.shape
    order = np.full(len(plan.kept), -1)
    order[plan.kept] = np.arange(plan.kept.sum())
    row = np.where(plan.owner >= 0, order[plan.owner], -1)
    used = (row >= 0) & (plan.kind >= 0)
    # with one type, counts are summed exactly and divided once at the end
    share = plan.weights / np.maximum(plan.counts, 1) if len(plan.types) > 1 else np.ones(plan.counts.shape)
    full = np.where(used, share[plan.owner, plan.kind], 0)
    layers = [full]
    if plan.per_type is not None:
        one = plan.weights / plan.per_type if len(plan.types) > 1 else np.ones(1)
        layers += [np.where(_drawn(plan, rng), one[plan.kind], 0) for _ in range(DRAWS)]
    sums = np.zeros((len(layers), int(plan.kept.sum()), n_latents), np.float32)
    for first in (np.unique(np.flatnonzero(used) // _ROWS) * _ROWS).tolist():
        last = min(first + _ROWS, n_images)
        images = np.arange(first, last)[used[first:last]]
        matrix = store.read_rows("image", images, tau)
        patients, local = np.unique(row[images], return_inverse=True)
        for layer, weight in zip(sums, layers, strict=True):
            shares = ss.csr_matrix((weight[images], (local, np.arange(len(images)))), (len(patients), len(images)))
            layer[patients] += (shares @ matrix).toarray().astype(np.float32)
    if len(plan.types) == 1:
        sums[0] /= plan.counts[plan.kept].astype(np.float32)
        if plan.per_type is not None:
            sums[1:] /= np.float32(plan.per_type[0])
    return sums[0], list(sums[1:])


def _drawn(plan: ImagePlan, rng: np.random.Generator) -> Bools:
    """The first `per_type` images of each patient and type in a random order."""
    assert plan.per_type is not None
    n_types = len(plan.types)
    used = (plan.owner >= 0) & (plan.kind >= 0)
    used[used] = plan.kept[plan.owner[used]]
    images = np.flatnonzero(used)
    cell = plan.owner[images] * n_types + plan.kind[images]
    order = np.lexsort((rng.random(len(images)), cell))
    cell = cell[order]
    place = np.arange(len(cell)) - np.searchsorted(cell, cell)
    chosen = np.zeros(len(plan.owner), bool)
    chosen[images[order[place < plan.per_type[cell % n_types]]]] = True
    return chosen


def _count(owner: Ints, kind: Ints, n_patients: int, n_types: int) -> Ints:
    used = (owner >= 0) & (kind >= 0)
    return np.bincount(owner[used] * n_types + kind[used], minlength=n_patients * n_types).reshape(n_patients, n_types)


def _need_two(kept: Bools, is_a: Bools, what: str) -> None:
    for members, name in ((is_a, "A"), (~is_a, "B")):
        if (kept & members).sum() < 2:
            raise BadInput(
                f"{int((kept & members).sum())} of {int(members.sum())} patients of {name} have {what}, and a "
                f"comparison needs at least 2 on each side"
            )
