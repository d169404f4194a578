"""The types of cell of each patient: a cell is called typical or unlike others among cells of its own type only.

Compared over all types, the few cells of a patient's rarest type would be the least typical. A type is a label of the
dataset; images without a label are one type more.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .cohort import Cohort, Ints

LEAST_CELLS = 5  # of a type: with fewer of them it is not known what is usual


@dataclass(frozen=True, eq=False, kw_only=True)
class CellTypes:
    """Each label of each patient has a number, patient by patient; `type_of` gives it for each image."""

    type_of: Ints  # (n_images,) -1: of nobody, or unreadable
    patients: Ints  # (n_types,) rising
    labels: list[str]  # (n_types,) "" without one
    groups: Ints  # (n_types,) the same label in patients with the disease in the dataset; -1: no disease stated
    n_images: Ints  # (n_types,)
    starts: Ints  # (n_patients + 1,) where the types of each patient begin

    @property
    def n_types(self) -> int:
        """Labels of patients, one after the other."""
        return len(self.labels)

    @property
    def n_groups(self) -> int:
        """Labels of diseases in datasets."""
        return int(self.groups.max(initial=-1)) + 1

    def of_patient(self, patient: int) -> list[int]:
        """The types of a patient: the commonest first, then by name; images without a label last."""
        numbers = range(int(self.starts[patient]), int(self.starts[patient + 1]))
        return sorted(numbers, key=lambda n: (self.labels[n] == "", -int(self.n_images[n]), self.labels[n]))

    def images_by_type(self) -> list[Ints]:
        """The images of each type, rising."""
        order = np.argsort(self.type_of, kind="stable")
        bounds = np.searchsorted(self.type_of[order], np.arange(self.n_types + 1))
        return [order[first:last] for first, last in pairwise(bounds.tolist())]

    def groups_of_images(self) -> Ints:
        """(n_images,) the group of each image; -1: none."""
        return np.append(self.groups, -1)[self.type_of]  # the last: of images without a type


def cell_types(cohort: Cohort) -> CellTypes:
    """Count the labels of the readable images of each patient."""
    names, codes = np.unique(np.array([*cohort.labels, ""]).astype(str), return_inverse=True)
    is_in = cohort.is_readable & (cohort.patient_of >= 0)
    keys = np.where(is_in, cohort.patient_of * len(names) + codes[:-1], -1)
    found, type_of = np.unique(np.append(keys, -1), return_inverse=True)  # the first: of nobody
    found, type_of = found[1:], type_of[:-1].astype(np.int64) - 1
    patients, labels = np.divmod(found, len(names))
    peers = cohort.peers_of[patients]
    groups = np.full(len(found), -1, np.int64)
    groups[peers >= 0] = np.unique((peers * len(names) + labels)[peers >= 0], return_inverse=True)[1]
    return CellTypes(
        type_of=type_of,
        patients=patients.astype(np.int64),
        labels=[str(names[label]) for label in labels.tolist()],
        groups=groups,
        n_images=np.bincount(type_of[type_of >= 0], minlength=len(found)).astype(np.int64),
        starts=np.searchsorted(patients, np.arange(cohort.n_patients + 1)).astype(np.int64),
    )


def means_by_type(values: npt.NDArray[np.float32], types: CellTypes) -> npt.NDArray[np.float64]:
    """(n_types,) mean over the images of each type that have a value; nan where none has."""
    is_in = (types.type_of >= 0) & ~np.isnan(values)
    sums, counts = (
        np.bincount(types.type_of[is_in], weights, minlength=types.n_types)
        for weights in (values[is_in].astype(np.float64), None)
    )
    with np.errstate(invalid="ignore"):
        return sums / np.where(counts > 0, counts, np.nan)
