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


def shuffle_labels(labels: Ints, groups: Ints, rng: np.random.Generator) -> Ints:
    """(n,) labels as they might as well be if they had nothing to do with the images.

    If no group has two labels, the groups exchange theirs. Else rows of a group exchange theirs, and groups of the same
    size exchange all theirs: what differs between rows of one patient is shuffled within the patient.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rows_of = np.split(order, starts[1:])
    if all((labels[rows] == labels[rows[0]]).all() for rows in rows_of):
        first = rng.permutation(labels[[rows[0] for rows in rows_of]])
        return first[np.unique(groups, return_inverse=True)[1]]
    shuffled = labels.copy()
    sizes = np.array([len(rows) for rows in rows_of])
    for size in np.unique(sizes):
        alike = np.flatnonzero(sizes == size)
        for taker, giver in zip(alike, rng.permutation(alike), strict=True):
            shuffled[rows_of[taker]] = rng.permutation(labels[rows_of[giver]])
    return shuffled
