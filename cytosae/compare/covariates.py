"""Columns of the image table as properties of patients: strata, covariates, and imbalances between two groups."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2_contingency, mannwhitneyu

from stores.errors import BadInput
from stores.tables import ALL_MISSING, OUTCOME_COLUMNS, listed

if TYPE_CHECKING:
    import pandas as pd

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
NUMERIC_LEVELS = 5  # columns of numbers with more different values are numeric; with fewer, categorical
NAMED = 5  # most columns that a warning names
_LARGEST = 1e100  # number of a covariate
_NO_PROPERTY = {*OUTCOME_COLUMNS, "path", "source", "patient", "patient_id", "disease", "n_images", "n_unreadable"}


def is_missing(value: object) -> bool:
    """Whether a cell of the image table is missing; caches of an older cyto keep texts such as `NA`."""
    text = str(value).strip()
    return not text or text in ALL_MISSING


def of_patients(column: npt.NDArray[np.object_], owner: Ints, names: list[str], title: str) -> list[str | None]:
    """The one value of each patient; None where no image has any.

    Raises
    ------
    BadInput
        If a patient's images have two.
    """
    found: list[set[str]] = [set() for _ in names]
    for value, patient in zip(column, owner, strict=True):
        if patient >= 0 and not is_missing(value):
            found[patient].add(str(value).strip())
    several = [f"{name} ({listed(sorted(each))})" for name, each in zip(names, found, strict=True) if len(each) > 1]
    if several:
        raise BadInput(
            f"column {title!r} differs between images of one patient, so it is none of patients: {len(several):,} have "
            f"several values: {listed(several)}; correct the image table, or give another with cyto barcode --table"
        )
    return [next(iter(each), None) for each in found]


def column_of(images: "pd.DataFrame", name: str) -> npt.NDArray[np.object_]:
    """A column of the image table.

    Raises
    ------
    BadInput
        If there is none; the message names the columns that exist.
    """
    if name == "disease" or name not in images.columns:
        there = sorted({*map(str, images.columns)} - {"disease", *OUTCOME_COLUMNS})
        raise BadInput(
            f"the image table of these barcodes has no column {name!r} to go by; there are {listed(there, 30)}"
        )
    return np.array(images[name], object)


def numbers(values: list[str | None]) -> Floats | None:
    """(patients,) as numbers, NaN where missing; None if the column is not numeric (NUMERIC_LEVELS)."""
    try:
        found = np.array([np.nan if value is None else float(value) for value in values])
    except ValueError:
        return None
    known = found[np.isfinite(found)]
    return found if len(np.unique(known)) > NUMERIC_LEVELS else None


def design(columns: dict[str, list[str | None]]) -> Floats:
    """(patients, k) design matrix: numbers as they are, categories as dummies of all but the first; none missing.

    Raises
    ------
    BadInput
        If a number is infinite, or so large that its square is: nothing could be adjusted for it.
    """
    parts: list[Floats] = []
    for name, values in columns.items():
        scale = numbers(values)
        if scale is not None:
            wrong = sorted({str(value) for value, one in zip(values, scale, strict=True) if not abs(one) < _LARGEST})
            if wrong:
                raise BadInput(
                    f"column {name!r} holds {listed(wrong)}, and only finite numbers below {_LARGEST:g} can be "
                    f"adjusted for; correct the image table, or give another with cyto barcode --table"
                )
            parts.append(scale[:, None])
            continue
        levels = sorted({str(value) for value in values})
        parts.append(np.array([[value == level for level in levels[1:]] for value in values], np.float64))
    return np.hstack(parts)


def imbalances(images: "pd.DataFrame", owner: Ints, names: list[str], is_a: Bools) -> list[str]:
    """Columns that differ between the groups, in words, the largest difference first.

    Numbers: means that are a standard deviation apart, or a quarter of one with p <= 0.05 (Mann-Whitney). Categories,
    "not known" being one: a total variation distance of 0.5, or of 0.2 with p <= 0.05 (chi square). Columns that differ
    within a patient, and identifiers (more than half as many values as patients), are left out.
    """
    found: list[tuple[float, str]] = []
    for name in map(str, images.columns):
        if name in _NO_PROPERTY:
            continue
        try:
            values = of_patients(np.array(images[name], object), owner, names, name)
        except BadInput:
            continue
        scale = numbers(values)
        if scale is not None:
            one, other = (scale[some & np.isfinite(scale)] for some in (is_a, ~is_a))
            if min(len(one), len(other)) < 2:
                continue
            spread = np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2)
            size = abs(one.mean() - other.mean()) / spread if spread > 0 else np.inf
            if size >= 1 or (size >= 0.25 and mannwhitneyu(one, other).pvalue <= 0.05):
                found.append((size / 2, f"{name} (mean {one.mean():.3g} against {other.mean():.3g})"))
            continue
        texts = ["not known" if value is None else value for value in values]
        levels = sorted({*texts})
        if len(levels) < 2 or 2 * len(levels) > max(4, len(texts)):
            continue
        table = np.array(
            [[sum(t == level for t in np.array(texts)[some]) for level in levels] for some in (is_a, ~is_a)]
        )
        shares = table / table.sum(1, keepdims=True)
        size = np.abs(shares[0] - shares[1]).sum() / 2
        if size >= 0.5 or (size >= 0.2 and chi2_contingency(table, correction=False).pvalue <= 0.05):
            most = int(np.abs(shares[0] - shares[1]).argmax())
            found.append((size, f"{name} ({levels[most]}: {shares[0, most]:.0%} against {shares[1, most]:.0%})"))
    found.sort(key=lambda each: -each[0])
    return [words for _, words in found]
