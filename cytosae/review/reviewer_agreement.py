"""Agreement of reviewers (kappas), the share of meaningful concepts, and verdicts on listed latents against decoys.

The last verdict of a reviewer on an item is used. For a kappa, `unsure` is a category like the others; for a share it
counts as not meaningful. If nearly all verdicts are equal, chance agreement is nearly 1, and a kappa is near 0 or not
defined even if reviewers agree (Feinstein and Cicchetti 1990); so Gwet's AC1 is given, too. Intervals are from a
bootstrap over items: they generalise to other latents, not to other reviewers.

Cohen's kappa equals `sklearn.metrics.cohen_kappa_score` (test_review.py); the array form here computes the
2,000 bootstrap draws in about a millisecond. scikit-learn has neither Fleiss' kappa nor AC1.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, fisher_exact, norm

from .questions import DECOY, LISTED, Question, Review
from .verdicts import Verdict, current

Answers = dict[str, dict[str, str]]  # reviewer -> item -> verdict
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_DRAWS = 2_000  # bootstrap draws
_SEED = 0  # of the bootstrap
_LEAST_DEFINED = 0.5  # share of draws in which a value must be defined to have an interval
EXTREME = 0.8  # share of one verdict from which a kappa is hard to interpret, and AC1 is shown


def agreement(verdicts: Sequence[Verdict], review: Review) -> dict[str, Any]:
    """Counts, kappas and shares as plain values: the JSON of `cyto atlas agreement`; keys: docs/review.md.

    A kappa, share or p that is not defined is None. `review_agreement` reads verdicts and review from an atlas.
    """
    counting = current(verdicts)
    is_asked = [review.find(item) is not None for _, item in counting]
    return {
        "n_verdicts": len(counting),
        "n_superseded": len(verdicts) - len(counting),
        "n_not_asked": len(counting) - sum(is_asked),  # left out: the atlas does not ask about the item (any more)
        "n_seen_with_labels": sum(not verdict.is_blinded for verdict in counting.values()),
        "questions": [_question(question, counting) for question in review.questions],
    }


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa from the verdicts (first, second) on each item; None if chance agreement is 1, or without items.

    (p_o - p_e) / (1 - p_e), with p_o the share of equal verdicts, p_e that of chance, from each rater's own shares.
    """
    names = sorted({name for pair in pairs for name in pair})
    return _defined(_cohen(_crossed(pairs, names)[None])[0])


def fleiss_kappa(counts: Ints) -> float | None:
    """Fleiss' kappa of two raters or more; None where chance agreement is 1, or no item has two verdicts.

    Raters may have skipped items, as in Gwet (Handbook of Inter-Rater Reliability, 2014, chapter 2): p_o is the mean
    share of equal pairs over items with two or more verdicts, p_e = sum_k pi_k^2, and pi_k is the mean share of verdict
    k over all items with a verdict. Without skipped items this is Fleiss (1971).

    Parameters
    ----------
    counts : shape (items, verdicts): how many raters said what
    """
    return _defined(_fleiss_draws(counts[None])[0])


def gwet_ac1(counts: Ints) -> float | None:
    """Gwet's AC1 (Br. J. Math. Stat. Psychol. 61, 2008) of two raters or more; None if no item has two verdicts.

    (p_o - p_e) / (1 - p_e), with p_o and pi_k as of `fleiss_kappa`, p_e = sum_k pi_k (1 - pi_k) / (K - 1), and K the
    number of possible verdicts, including those that nobody gave.

    counts : as of `fleiss_kappa`, with K columns
    """
    return _defined(_ac1_draws(counts[None])[0])


def _crossed(pairs: Sequence[tuple[str, str]], names: Sequence[str]) -> Ints:
    """(K, K) contingency table: items by the verdicts of the two raters."""
    number = {name: at for at, name in enumerate(names)}
    crossed = np.zeros((len(names), len(names)), np.int64)
    for a, b in pairs:
        crossed[number[a], number[b]] += 1
    return crossed


def _cohen(crossed: Ints) -> Floats:
    """(draws, K, K) -> (draws,); NaN where it is not defined."""
    n = crossed.sum((1, 2))
    n_equal = np.trace(crossed, axis1=1, axis2=2)
    by_chance = (crossed.sum(1) * crossed.sum(2)).sum(1)  # integers: exact
    return _ratio(n_equal * n - by_chance, n * n - by_chance)


def _fleiss_draws(counts: Ints) -> Floats:
    """(draws, items, K) -> (draws,)."""
    observed, share = _observed_and_shares(counts)
    by_chance = (share**2).sum(1)
    return _ratio(observed - by_chance, 1 - by_chance)


def _ac1_draws(counts: Ints) -> Floats:
    """(draws, items, K) -> (draws,)."""
    observed, share = _observed_and_shares(counts)
    by_chance = (share * (1 - share)).sum(1) / (counts.shape[2] - 1)
    return _ratio(observed - by_chance, 1 - by_chance)


def _observed_and_shares(counts: Ints) -> tuple[Floats, Floats]:
    """(draws,) p_o, NaN without an item with two verdicts, and (draws, K) pi; see `fleiss_kappa`."""
    n_raters = counts.sum(2)  # (draws, items)
    n_pairs = n_raters * (n_raters - 1)
    equal = (counts * (counts - 1)).sum(2) / np.maximum(1, n_pairs)
    observed = _ratio(equal.sum(1), (n_pairs > 0).sum(1))
    # integers as long as possible: a share of all is exactly 1, and chance agreement with it
    share = (counts / np.maximum(1, n_raters)[:, :, None]).sum(1) / np.maximum(1, (n_raters > 0).sum(1))[:, None]
    return observed, share


def _ratio(above: npt.NDArray[Any], below: npt.NDArray[Any]) -> Floats:
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _with_interval(name: str, value: float | None, draws: Floats) -> dict[str, Any]:
    """The value and the 2.5% and 97.5% quantiles of the defined draws; None if few are defined, or all are equal."""
    found = draws[~np.isnan(draws)]
    has_one = value is not None and len(found) > _LEAST_DEFINED * len(draws) and np.ptp(found) > 0
    low, high = np.quantile(found, [0.025, 0.975]).tolist() if has_one else (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def wilson(n_yes: int, n: int) -> dict[str, Any]:
    """A share, with its 95% Wilson interval; all None for 0 of 0."""
    if not n:
        return {"n": 0, "n_yes": 0, "share": None, "low": None, "high": None}
    interval = binomtest(n_yes, n).proportion_ci(method="wilson")
    return {"n": n, "n_yes": n_yes, "share": n_yes / n, "low": float(interval.low), "high": float(interval.high)}


def _question(question: Question, counting: dict[tuple[str, str], Verdict]) -> dict[str, Any]:
    names = {item.item for item in question.items}
    answers: Answers = {}
    for (reviewer, item), verdict in sorted(counting.items()):
        if item in names:
            answers.setdefault(reviewer, {})[item] = verdict.verdict
    found = {
        "question": question.question,
        "title": question.title,
        "comparison": question.comparison,
        "a": question.a,
        "b": question.b,
        "n_items": len(question.items),
        "n_without_images": question.n_without_images,
        "reviewers": {
            reviewer: {"n": len(given), "verdicts": _counted(given.values(), question.choices)}
            for reviewer, given in answers.items()
        },
        "cohen": [pair_agreement(answers, *pair, question.choices) for pair in combinations(answers, 2)],
        "fleiss": _fleiss(answers, question.choices),
    }
    if question.question == "meaningful":
        return found | {"meaningful": _meaningful(question, answers)}
    by_group = {group: [item.n_images for item in question.items if item.group == group] for group in (*LISTED, DECOY)}
    return found | {
        "median_images": {group: float(np.median(some)) if some else None for group, some in by_group.items()},
        "specific": {reviewer: _specific(question, given) for reviewer, given in answers.items()},
    }


def _counted(verdicts: Any, choices: Sequence[str]) -> dict[str, int]:
    counts = Counter(verdicts)
    return {choice: counts[choice] for choice in choices}


def pair_agreement(answers: Answers, first: str, second: str, choices: Sequence[str]) -> dict[str, Any]:
    """Kappa and AC1 of two reviewers over the items that both judged, with 95% intervals."""
    a, b = answers[first], answers[second]
    pairs = [(a[item], b[item]) for item in a if item in b]
    n = len(pairs)
    crossed = _crossed(pairs, choices)
    counts = np.array([[(x, y).count(name) for name in choices] for x, y in pairs], np.int64).reshape(n, len(choices))
    # drawing items with replacement is the same as drawing the contingency table from a multinomial
    drawn = (
        np.random.default_rng(_SEED)
        .multinomial(n, crossed.ravel() / max(1, n), size=_DRAWS if n else 0)
        .reshape(-1, *crossed.shape)
    )
    rows = np.arange(len(choices))
    of_cell = (rows[:, None, None] == rows).astype(np.int64) + (rows[None, :, None] == rows)  # (K, K, K) counts
    n_equal = np.trace(drawn, axis1=1, axis2=2)
    share = np.einsum("dij,ijk->dk", drawn, of_cell) / max(1, 2 * n)
    by_chance = (share * (1 - share)).sum(1) / (len(choices) - 1)
    return {
        "reviewers": [first, second],
        "n_items": n,  # judged by both
        "agreement": sum(x == y for x, y in pairs) / n if n else None,
        **_with_interval("kappa", cohen_kappa(pairs), _cohen(drawn)),
        **_with_interval("ac1", gwet_ac1(counts), _ratio(n_equal / max(1, n) - by_chance, 1 - by_chance)),
        "largest_share": _largest_share(counts),
    }


def _fleiss(answers: Answers, choices: Sequence[str]) -> dict[str, Any]:
    """Over all items with a verdict; items with a single verdict contribute to chance agreement only."""
    items = sorted({item for given in answers.values() for item in given})
    counts = np.array(
        [
            list(_counted((given[item] for given in answers.values() if item in given), choices).values())
            for item in items
        ],
        np.int64,
    ).reshape(len(items), len(choices))
    n_verdicts = counts.sum(1)
    n_items = int((n_verdicts > 1).sum())
    drawn = counts[np.random.default_rng(_SEED).integers(len(items), size=(_DRAWS, len(items)))] if n_items else None
    nothing = np.empty(0)
    return {
        "n_reviewers": len(answers),
        "n_items": n_items,  # judged by two or more
        "n_left_out": len(items) - n_items,
        "n_by_all": int((n_verdicts == len(answers)).sum()),
        **_with_interval("kappa", fleiss_kappa(counts), nothing if drawn is None else _fleiss_draws(drawn)),
        **_with_interval("ac1", gwet_ac1(counts), nothing if drawn is None else _ac1_draws(drawn)),
        "largest_share": _largest_share(counts),
    }


def _largest_share(counts: Ints) -> float | None:
    """The share of the most frequent verdict; None without verdicts."""
    return float(counts.sum(0).max() / counts.sum()) if counts.size else None


# ------------------------------------------------------------------------------------------- is it a concept at all?


def _meaningful(question: Question, answers: Answers) -> list[dict[str, Any]]:
    """Shares by reviewer and cluster; cluster None: all clusters; reviewer None: the majority of several reviewers."""
    voters: list[tuple[str | None, dict[str, str]]] = [*answers.items()]
    voters += [(None, _majority(answers))] if len(answers) > 1 else []
    clusters = sorted({item.cluster for item in question.items if item.cluster is not None})
    rows = []
    for voter, given in voters:
        for cluster in [*clusters, None]:
            of_it = [item.item for item in question.items if cluster is None or item.cluster == cluster]
            said = [given[item] == "meaningful" for item in of_it if item in given]
            share = wilson(sum(said), len(said))
            rows.append({"reviewer": voter, "cluster": cluster, "n_items": len(of_it), **share})
        rows[-1]["of_all_latents"] = weighted_share(rows[-1 - len(clusters) : -1], question.cluster_sizes)
    return rows


def weighted_share(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """The share among all latents that the selection was drawn from: clusters are weighted by their number of latents.

    The selection has equally many latents of each cluster, whatever its size, so the unweighted share describes no
    population. Interval: Wilson, with Kish's effective sample size 1 / sum(W_c^2 / n_c), for weights W_c and n_c judged
    latents. Clusters without a judged latent are left out; `covers` is the share of latents in the other clusters. All
    values are None if cluster sizes are not known (an atlas of an older version).
    """
    judged = [row for row in rows if row["n"] and row["cluster"] < len(sizes)]
    of_judged = sum(sizes[row["cluster"]] for row in judged)
    if not of_judged:
        return {"share": None, "low": None, "high": None, "covers": None, "n_effective": None}
    weights = [sizes[row["cluster"]] / of_judged for row in judged]
    share = sum(weight * row["share"] for weight, row in zip(weights, judged, strict=True))
    n_effective = 1 / sum(weight**2 / row["n"] for weight, row in zip(weights, judged, strict=True))
    low, high = _wilson_bounds(share, n_effective)
    covers = of_judged / sum(sizes)
    return {"share": share, "low": low, "high": high, "covers": covers, "n_effective": n_effective}


def _wilson_bounds(share: float, n: float) -> tuple[float, float]:
    """The 95% Wilson interval; n may be fractional."""
    z = float(norm.ppf(0.975))
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def _majority(answers: Answers) -> dict[str, str]:
    """`meaningful` if more than half of the verdicts on an item say so, else `not`."""
    votes: dict[str, list[bool]] = {}
    for given in answers.values():
        for item, verdict in given.items():
            votes.setdefault(item, []).append(verdict == "meaningful")
    return {item: "meaningful" if 2 * sum(said) > len(said) else "not" for item, said in votes.items()}


# --------------------------------------------------------------------------------------- of which disease is it?


def _specific(question: Question, given: dict[str, str]) -> dict[str, Any]:
    """How often a blinded reviewer gave a latent the disease of its top list.

    One-sided Fisher's exact tests, which condition on the lengths of the lists and on how often a reviewer gives each
    verdict. `p_lists`: the disease of a list is named more often for its latents than for decoys. `p_sides`: among
    listed latents for which a disease was named, it is the disease of the list more often than by chance.
    """
    said = {
        group: _counted(
            (given[item.item] for item in question.items if item.group == group and item.item in given),
            question.choices,
        )
        for group in (*LISTED, DECOY)
    }
    totals = {group: sum(counts.values()) for group, counts in said.items()}
    return {
        "said": said,
        "confirmed": {group: wilson(said[group][group], totals[group]) for group in LISTED},
        "decoys_called": {group: wilson(said[DECOY][group], totals[DECOY]) for group in LISTED},
        "p_lists": {
            group: fisher(
                *(said[group][group], totals[group] - said[group][group]),
                *(said[DECOY][group], totals[DECOY] - said[DECOY][group]),
            )
            for group in LISTED
        },
        "p_sides": fisher(*(said["a"]["a"], said["a"]["b"]), *(said["b"]["a"], said["b"]["b"])),
    }


def fisher(yes: int, no: int, other_yes: int, other_no: int) -> float | None:
    """One-sided p: share of `yes` larger than in the other row, given the margins; None if a row is empty."""
    if not (yes + no and other_yes + other_no):
        return None
    return float(fisher_exact([[yes, no], [other_yes, other_no]], alternative="greater").pvalue)
