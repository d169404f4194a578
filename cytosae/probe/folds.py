"""Grouped, stratified cross-validation: groups of units, folds of whole groups, and labels shuffled for the null.

A group is a connected component: two patients with an identical image, or with a common value of a column that the
user names, are in one group, and so are patients that are linked through others. In every fit, all units of a group
are either in the training side or in the predicted side.
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
    "between": "whole groups exchange their labels with groups of about their size",
}
FEW_CHANGED = 0.4  # share of labels that shuffles change, below which p says little


def connected_groups(columns: Sequence[Sequence[str]]) -> Ints:
    """(n_rows,) group numbers from 0: rows with a common value in any column are one group; "" is no value."""
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
    """Warnings where classes have few groups.

    Parameters
    ----------
    labels, groups : (n,)
    were_drawn : these rows are a random sample, so that more can be had

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
    """(n,) fold of each row: whole groups, stratified by class.

    Groups are taken in random order, large ones first. Each goes to the fold where its classes are rarest; of several,
    to the one with fewest rows; of several, to a random one. Depends on labels, groups and rng alone.
    """
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    sizes, totals = counts.sum(1), np.maximum(counts.sum(0), 1)
    order = rng.permutation(len(sizes))
    held = np.zeros((n_folds, counts.shape[1]))
    random_order = rng.permutation(n_folds)
    fold_of = np.zeros(len(sizes), np.int64)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        rarity = np.round((held * counts[group] / totals).sum(1), 9)  # rounded: equal is equal
        fold = np.lexsort((random_order, held.sum(1), rarity))[0]
        fold_of[group] = fold
        held[fold] += counts[group]
    return fold_of[groups]


def choose_null(labels: Ints, groups: Ints, asked: str = "auto") -> str:
    """Which labels are exchangeable under the null: those "within" a group, or those of whole groups ("between").

    With "auto": within, if that changes at least half as many labels as a shuffle without groups would; else (most
    groups have one label) between. The rule uses labels and groups alone, no score.

    Raises
    ------
    BadInput
        If "within" is asked for and no group has two labels.
    """
    counts = _compositions(labels, groups)
    sizes, totals = counts.sum(1), counts.sum(0)
    within = 1 - float(((counts**2).sum(1) / sizes).sum() / sizes.sum())  # expected share that changes
    if asked == "within" and not (counts > 0).sum(1).max() > 1:
        raise BadInput("--null within exchanges labels within groups, but no group has two labels; try --null between")
    if asked != "auto":
        return asked
    return "within" if within >= 0.5 * free_share(totals) else "between"


def free_share(totals: npt.NDArray[np.float64]) -> float:
    """Expected share of labels that a shuffle of all rows would change; totals : (n_classes,) rows of each class"""
    return 1 - float(((totals / totals.sum()) ** 2).sum())


def shuffle_labels(labels: Ints, groups: Ints, rng: np.random.Generator, null: str = "between") -> Ints:
    """(n,) labels under the null hypothesis that they have nothing to do with the images.

    Within: rows of a group exchange their labels. Between: whole groups exchange the shares of their labels with groups
    of similar size (`_similar_sizes`; otherwise the frequencies of the classes would change, and scores with them). A
    group of another size takes the shares as nearly as its number of rows allows, and its rows get them at random.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rows_of = np.split(order, starts[1:])
    shuffled = labels.copy()
    if null == "within":
        for rows in rows_of:
            shuffled[rows] = rng.permutation(labels[rows])
        return shuffled
    counts = _compositions(labels, groups)
    for similar in _similar_sizes(counts.sum(1)):
        for to, source in zip(similar, rng.permutation(similar), strict=True):
            dealt = _apportion(counts[source], len(rows_of[to]), rng)
            shuffled[rows_of[to]] = rng.permutation(np.repeat(np.arange(len(dealt)), dealt))
    return shuffled


def _compositions(labels: Ints, groups: Ints) -> npt.NDArray[np.float64]:
    """(n_groups, n_classes) rows of each class, groups in rising order."""
    numbers = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((numbers.max() + 1, labels.max() + 1))
    np.add.at(counts, (numbers, labels), 1)
    return counts


def _similar_sizes(sizes: npt.NDArray[np.float64]) -> list[Ints]:
    """Groups sorted by size, in bins: no group has more than twice the rows of the smallest in its bin.

    A bin with one group is merged with its neighbour.
    """
    order = np.argsort(sizes, kind="stable")
    bins: list[list[int]] = []
    for group in order.tolist():
        if not bins or sizes[group] > 2 * sizes[bins[-1][0]]:
            if bins and len(bins[-1]) == 1:
                bins[-1].append(group)
                continue
            bins.append([])
        bins[-1].append(group)
    if len(bins) > 1 and len(bins[-1]) == 1:
        last = bins.pop()
        bins[-1] += last
    return [np.array(each) for each in bins]


def _apportion(counts: npt.NDArray[np.float64], n: int, rng: np.random.Generator) -> Ints:
    """(n_classes,) rows of each class: n in the shares of `counts`, by largest remainders; equal ones at random."""
    exact = counts * n / counts.sum()
    dealt = np.floor(np.round(exact, 9)).astype(np.int64)
    order = np.lexsort((rng.random(len(counts)), -np.round(exact - dealt, 9)))
    dealt[order[: n - int(dealt.sum())]] += 1
    return dealt
