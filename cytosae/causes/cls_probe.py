"""A probe of the final CLS embedding: what an edit does to the classes that can be read off the backbone's own output.

A logistic regression of a column of the image table on standardised embeddings of unedited images. It is fitted in
folds of patients, and an image is read by the fit that saw no image of its patient. `balanced_accuracy` says how well
such a reading works at all: an effect on a class that cannot be read means nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.probe import ColumnFit, fit_columns
from stores.errors import BadInput
from stores.tables import column, listed

from .places import Ints, Owners

Floats = npt.NDArray[np.float64]
_FOLDS = 5
_TRIES = 100  # draws of folds, until each class is in the training of each


@dataclass(frozen=True)
class Labels:
    """(n_images,) the class of each image of a cache, -1 without one, and the names of the classes."""

    of_image: Ints
    classes: list[str]


@dataclass(frozen=True)
class ClsProbe:
    """A fit for each fold of patients."""

    classes: list[str]
    fits: list[ColumnFit]
    mean: Floats  # (width,)
    sd: Floats  # (width,)
    fold_of: Ints  # (patients,)
    balanced_accuracy: float  # of images by the fits that did not see their patients; chance is 1 / classes

    def logits(self, owner: int, embedded: Floats) -> Floats:
        """(n, classes) of embeddings (n, width) of images of one patient."""
        fit = self.fits[int(self.fold_of[owner])]
        found: Floats = (embedded - self.mean) / self.sd @ fit.weights + fit.intercept
        return found


def read_labels(images: pa.Table, target: str, owners: Owners) -> Labels:
    """The classes in a column of the image table; those of a single patient are left out.

    Raises
    ------
    BadInput
        If there is no such column, or fewer than two classes with images of two patients.
    """
    if target not in images.column_names:
        raise BadInput(f"the image table has no column {target!r}; it has {', '.join(images.column_names)}")
    names = column(images, target)
    patients: dict[str, set[int]] = {}
    for name, owner in zip(names, owners.of_image.tolist(), strict=True):
        if name:
            patients.setdefault(str(name), set()).add(owner)
    classes = sorted(name for name, of_class in patients.items() if len(of_class) > 1)
    if len(classes) < 2:
        found = listed([f"{name} of {len(those):,}" for name, those in sorted(patients.items())])
        raise BadInput(
            f"a probe of {target!r} needs two classes with images of two patients each; found "
            f"{f'classes and their patients: {found}' if patients else 'no value'}"
        )
    number = {name: k for k, name in enumerate(classes)}
    return Labels(np.array([number.get(str(name), -1) for name in names], np.int64), classes)


def fit_probe(embedded: Floats, images: Ints, labels: Labels, owners: Owners, seed: int) -> ClsProbe:
    """The probe of labelled images.

    Parameters
    ----------
    embedded : (n, width) final CLS embeddings of `images`

    Raises
    ------
    BadInput
        If folds of patients cannot be drawn so that every class is in the training of each.
    """
    y, owner = labels.of_image[images], owners.of_image[images]
    there = np.unique(owner)
    fold_of = _folds(y, owner, there, len(owners.names), len(labels.classes), seed)
    mean, sd = embedded.mean(0), embedded.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    x, folds = (embedded - mean) / sd, fold_of[owner]
    fits, said = [], np.zeros(len(y), np.int64)
    for fold in range(int(fold_of.max()) + 1):
        is_left_out = folds == fold
        fit = fit_columns(x[~is_left_out], y[~is_left_out], len(labels.classes), 1.0)
        said[is_left_out] = fit.probabilities(x[is_left_out]).argmax(1)
        fits.append(fit)
    right = [float((said[y == k] == k).mean()) for k in range(len(labels.classes)) if (y == k).any()]
    return ClsProbe(labels.classes, fits, mean, sd, fold_of, float(np.mean(right)))


def _folds(y: Ints, owner: Ints, there: Ints, n_owners: int, n_classes: int, seed: int) -> Ints:
    """(patients,) the fold of each; those without a labelled image are in the first."""
    n_folds = min(_FOLDS, len(there))
    rng = np.random.default_rng([seed, 6])
    for _ in range(_TRIES if n_folds > 1 else 0):
        fold_of = np.zeros(n_owners, np.int64)
        fold_of[rng.permutation(there)] = np.arange(len(there)) % n_folds
        folds = fold_of[owner]
        if all(len(np.unique(y[folds != fold])) == n_classes for fold in range(n_folds)):
            return fold_of
    raise BadInput(
        f"the {len(y):,} labelled images of {len(there):,} patients cannot be divided so that every class is in the "
        f"training of each fold; take a column with fewer classes, or more images: --probe-images, --sample"
    )
