"""Of which types are the cells? Shares of labels, of a patient beside the others, of a disease beside the others.

Each patient counts once. Images that are unreadable or without a label are left out. Labels beyond the eleven commonest
are added up.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .cohort import Cohort, Ints

OTHER = "other labels"
_MOST = 11
_QUARTILES = 4  # patients, at least, for a range


@dataclass(frozen=True, eq=False)
class Composition:
    """Counts of labels; `shares` has rows of nan for patients without a labelled image."""

    labels: list[str]  # the commonest first; the last may be `OTHER`
    counts: Ints  # (n_patients, n_labels)

    @cached_property
    def shares(self) -> npt.NDArray[np.float64]:
        """(n_patients, n_labels) shares of each patient's labelled images."""
        totals = self.counts.sum(axis=1, keepdims=True)
        return np.where(totals > 0, self.counts / np.maximum(1, totals), np.nan)

    def of(self, members: Ints, others: Ints) -> list[dict[str, Any]]:
        """For each label that occurs: mean share of some patients, and of others, with the middle half of both.

        members, others : numbers of patients; those without a label are left out
        """
        mine, theirs = (self.shares[some][~np.isnan(self.shares[some, :1]).ravel()] for some in (members, others))
        rows = []
        for at, label in enumerate(self.labels):
            n = int(self.counts[members, at].sum())
            if not n and not self.counts[others, at].any():
                continue
            (low, high), (own_low, own_high) = _middle_half(theirs[:, at]), _middle_half(mine[:, at])
            rows.append(
                {"label": label, "n": n, "share": float(mine[:, at].mean()) if len(mine) else None}
                | {"others": float(theirs[:, at].mean()) if len(theirs) else None}
                | {"low": low, "high": high, "own_low": own_low, "own_high": own_high}
            )
        return rows


def _middle_half(shares: npt.NDArray[np.float64]) -> tuple[float, float] | tuple[None, None]:
    """The quartiles of the shares of patients; None of too few."""
    if len(shares) < _QUARTILES:
        return None, None
    low, high = np.quantile(shares, (0.25, 0.75)).tolist()
    return low, high


def compositions(cohort: Cohort) -> Composition:
    """Count the labels of each patient's readable images."""
    chosen = np.flatnonzero((cohort.patient_of >= 0) & cohort.is_readable)
    texts = np.array([cohort.labels[at] for at in chosen.tolist()], object)
    has_label = np.array([bool(text) for text in texts], bool)
    chosen, texts = chosen[has_label], texts[has_label]
    if not len(chosen):
        return Composition([], np.zeros((cohort.n_patients, 0), np.int64))
    names, codes = np.unique(texts.astype(str), return_inverse=True)
    order = np.lexsort((names, -np.bincount(codes)))
    kept = order if len(order) <= _MOST + 1 else order[:_MOST]
    column = np.full(len(names), len(kept), np.int64)
    column[kept] = np.arange(len(kept))
    labels = [str(names[at]) for at in kept] + ([OTHER] if len(kept) < len(names) else [])
    counts = np.zeros((cohort.n_patients, len(labels)), np.int64)
    np.add.at(counts, (cohort.patient_of[chosen], column[codes]), 1)
    return Composition(labels, counts)
