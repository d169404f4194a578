"""Do reviewers agree, and what did they find? Kappas, the share of meaningful concepts, answers against decoys.

Only the verdict that counts is used: each reviewer's last on an item. `unsure` is a verdict like any other for a
kappa; for a share it is not meaningful.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, fisher_exact

from .questions import DECOY, LISTED, Question, Review
from .reviews import Verdict, current

Answers = dict[str, dict[str, str]]  # reviewer -> item -> verdict


def agreement(verdicts: Sequence[Verdict], review: Review) -> dict[str, Any]:
    """What `cyto atlas agreement --json` prints: counts, kappas and shares, in plain values; docs/review.md.

    A kappa, share or p that is not defined is None.
    """
    counting = current(verdicts)
    is_asked = [review.find(item) is not None for _, item in counting]
    return {
        "n_verdicts": len(counting),
        "n_superseded": len(verdicts) - len(counting),
        "n_not_asked": len(counting) - sum(is_asked),  # the atlas does not ask about the item (any more): left out
        "n_seen_with_labels": sum(not verdict.is_blinded for verdict in counting.values()),
        "questions": [_question(question, counting) for question in review.questions],
    }


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two raters, from their verdicts on the same items; None where chance agreement is 1, or nothing.

    (p_o - p_e) / (1 - p_e), with p_o the share of equal verdicts, p_e that of chance, from each rater's own shares.
    """
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    n = len(pairs)
    n_equal, by_chance = sum(a == b for a, b in pairs), sum(first[name] * second[name] for name in first)
    return (n_equal * n - by_chance) / (n * n - by_chance) if n * n > by_chance else None


def fleiss_kappa(counts: npt.NDArray[np.int64]) -> float | None:
    """Fleiss' kappa of at least two raters; None where chance agreement is 1, or without items.

    Parameters
    ----------
    counts : shape (items, verdicts): how many raters said what; each row has the same sum
    """
    if not len(counts):
        return None
    n_items, n_raters = len(counts), int(counts[0].sum())
    if np.count_nonzero(counts.sum(0)) == 1:
        return None
    observed = (counts * (counts - 1)).sum() / (n_items * n_raters * (n_raters - 1))
    by_chance = ((counts.sum(0) / (n_items * n_raters)) ** 2).sum()
    return float((observed - by_chance) / (1 - by_chance))


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
        "cohen": [_pair(answers, *pair) for pair in combinations(answers, 2)],
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


def _pair(answers: Answers, first: str, second: str) -> dict[str, Any]:
    a, b = answers[first], answers[second]
    pairs = [(a[item], b[item]) for item in a if item in b]
    return {
        "reviewers": [first, second],
        "n_items": len(pairs),  # judged by both
        "agreement": sum(x == y for x, y in pairs) / len(pairs) if pairs else None,
        "kappa": cohen_kappa(pairs),
    }


def _fleiss(answers: Answers, choices: Sequence[str]) -> dict[str, Any]:
    """Over the items that every reviewer judged who judged any."""
    of_any = {item for given in answers.values() for item in given}
    of_all = sorted(item for item in of_any if all(item in given for given in answers.values()))
    counts = [list(_counted((given[item] for given in answers.values()), choices).values()) for item in of_all]
    kappa = fleiss_kappa(np.array(counts, np.int64)) if len(answers) > 1 else None
    return {
        "n_reviewers": len(answers),
        "n_items": len(of_all),
        "n_left_out": len(of_any) - len(of_all),
        "kappa": kappa,
    }


# ------------------------------------------------------------------------------------------- is it a concept at all?


def _meaningful(question: Question, answers: Answers) -> list[dict[str, Any]]:
    """Shares by reviewer and cluster; cluster None is all, reviewer None what most of several said."""
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
    return rows


def _majority(answers: Answers) -> dict[str, str]:
    """`meaningful` where more than half of those who judged an item say so, else `not`."""
    votes: dict[str, list[bool]] = {}
    for given in answers.values():
        for item, verdict in given.items():
            votes.setdefault(item, []).append(verdict == "meaningful")
    return {item: "meaningful" if 2 * sum(said) > len(said) else "not" for item, said in votes.items()}


# --------------------------------------------------------------------------------------- of which disease is it?


def _specific(question: Question, given: dict[str, str]) -> dict[str, Any]:
    """How often a reviewer, not knowing where a latent stood, called it as the comparison did.

    Fisher's exact test, one-sided, because lists differ in length and reviewers in how often they say what: the margins
    are taken as given. `p_lists` of a list: its disease is named more often there than for decoys. `p_sides`: of the
    latents of both lists for which a disease was named, it is the right one more often than by chance.
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
    """P of a share of `yes` at least as large beside that of the others, the margins given; None if a row is empty."""
    if not (yes + no and other_yes + other_no):
        return None
    return float(fisher_exact([[yes, no], [other_yes, other_no]], alternative="greater").pvalue)
