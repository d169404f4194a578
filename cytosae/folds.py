"""Who may be told apart from whom: groups that stay together, folds of whole groups, and labels shuffled between them.

A group is a connected component: two patients with an identical image, or with a common value of a column that the
user names, are one, and so are all that hang together through others. Whatever is fitted, a group lies on one side.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from stores.errors import BadInput
from stores.tables import listed

Ints = npt.NDArray[np.int64]
FEW_GROUPS = 10  # per class, below which scores say little
NULLS = {
    "within": "labels are exchanged within each group",
    "between": "whole groups exchange their labels",
}
MOST_UNCHANGED = 0.6  # share of labels that a shuffle may leave as they are before p says little


def connected_groups(columns: Sequence[Sequence[str]]) -> Ints:
    """(n_rows,) numbers from 0: rows that have a value of some column in common are one group; "" is no value."""
    n_rows = len(columns[0])
    rows, values, n_values = [], [], 0
    for column in columns:
        numbers: dict[str, int] = {}
        for row, value in enumerate(column):
            if value:
                rows.append(row)
                values.append(n_rows + n_values + numbers.setdefault(value, len(numbers)))
        n_values += len(numbers)
    size = n_rows + n_values
    links = coo_matrix((np.ones(len(rows), np.int8), (rows, values)), shape=(size, size))
    found = connected_components(links, directed=False)[1][:n_rows]
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def check_groups(
    labels: Ints, groups: Ints, classes: Sequence[str], *, n_folds: int, target: str, were_drawn: bool = False
) -> list[str]:
    """Warnings on what so few groups can say; `were_drawn`: there are more rows than these.

    Raises
    ------
    BadInput
        With fewer than two classes, or fewer groups of a class than folds.
    """
    if len(classes) < 2:
        raise BadInput(f"{target} has one class only ({classes[0]!r}); a probe needs two or more to tell apart")
    n_groups = [len(np.unique(groups[labels == k])) for k in range(len(classes))]
    short = [f"{name}: {n}" for name, n in zip(classes, n_groups, strict=True) if n < n_folds]
    if short:
        fewest = min(n_groups)
        first = f"choose --folds {fewest}, or " if fewest >= 2 else ""
        first = f"raise --max-images, or {first}" if were_drawn else first
        raise BadInput(
            f"{n_folds} folds need at least {n_folds} independent groups of each class of {target}; found "
            f"{listed(short)} (all {len(labels):,} rows form {len(np.unique(groups)):,} groups); "
            f"{first}name the classes to keep with --class"
        )
    few = [f"{name}: {n}" for name, n in zip(classes, n_groups, strict=True) if n < FEW_GROUPS]
    if few:
        return [f"few independent groups ({listed(few)}): scores will hardly hold for other patients"]
    return []


def assign_folds(labels: Ints, groups: Ints, n_folds: int, rng: np.random.Generator) -> Ints:
    """(n,) fold of each row: whole groups, the classes spread evenly.

    Groups in random order, large ones first; each goes where its classes are rarest, then where there are fewest rows,
    then by lot. Depends on labels, groups and rng alone.
    """
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    sizes, totals = counts.sum(1), np.maximum(counts.sum(0), 1)
    order = rng.permutation(len(sizes))
    held = np.zeros((n_folds, counts.shape[1]))
    lot = rng.permutation(n_folds)
    fold_of = np.zeros(len(sizes), np.int64)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        rarity = np.round((held * counts[group] / totals).sum(1), 9)  # rounded: equal is equal
        fold = np.lexsort((lot, held.sum(1), rarity))[0]
        fold_of[group] = fold
        held[fold] += counts[group]
    return fold_of[groups]


def share_changed_within(labels: Ints, groups: Ints) -> float:
    """The expected share of labels that an exchange within groups changes: 0 if no group has two labels."""
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    sizes = np.maximum(counts.sum(1), 1)
    return float((counts.sum(1) - (counts**2).sum(1) / sizes).sum() / len(labels))


def choose_null(labels: Ints, groups: Ints, null: str = "auto") -> str:
    """Which of NULLS the labels are shuffled by; "auto" looks at labels and groups alone.

    "within" asks whether the label of a row says more than its group does, "between" whether labels have anything to
    do with the rows at all. Where groups are (nearly) of one label, an exchange within them changes (nearly) nothing,
    so that shuffled labels would be predicted as well as the true ones: "auto" takes "within" only where it changes
    at least 40% of the labels.

    Raises
    ------
    BadInput
        If "within" is asked for and no group has two labels.
    """
    changed = share_changed_within(labels, groups)
    if null == "within" and changed == 0:
        raise BadInput(
            "--null within exchanges labels within each group, and here no group has two labels; choose --null between"
        )
    if null != "auto":
        return null
    return "within" if changed >= 1 - MOST_UNCHANGED else "between"


def shuffle_labels(labels: Ints, groups: Ints, rng: np.random.Generator, *, null: str = "between") -> Ints:
    """(n,) labels as they might as well be if they had nothing to do with the rows.

    Parameters
    ----------
    null : "within": rows of a group exchange their labels. "between": groups exchange theirs; a group that is larger
        than the one whose labels it gets repeats them, a smaller one gets as many, drawn from them without replacement
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rows_of = np.split(order, starts[1:])
    givers = rng.permutation(len(rows_of)) if null == "between" else np.arange(len(rows_of))
    shuffled = labels.copy()
    for rows, giver in zip(rows_of, givers, strict=True):
        given = labels[rows_of[giver]]
        n_whole, n_more = divmod(len(rows), len(given))
        dealt = np.concatenate([np.tile(given, n_whole), rng.choice(given, n_more, replace=False)])
        shuffled[rows] = rng.permutation(dealt)
    return shuffled
