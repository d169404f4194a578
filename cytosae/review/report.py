"""The review of an atlas, read from paths: the verdicts as one table, and whether reviewers agree. Results in words."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from stores.notebook import table_html
from stores.wording import Report, cell, counted, decimals, percent, printable

from .questions import read_review
from .reviewer_agreement import EXTREME, agreement
from .verdicts import default_reviews, read_verdicts, verdict_table, write_verdict_table

_SHOWN = ("reviewer", "question", "a", "b", "latent", "verdict", "name", "confidence", "is_asked")  # in a notebook


@dataclass(frozen=True, kw_only=True)
class VerdictsResult(Report):
    """The table of verdicts that was written."""

    out: Path
    table: pa.Table = field(repr=False)

    def lines(self) -> Iterator[str]:
        """How many verdicts, of how many reviewers."""
        n_reviewers = len(set(self.table["reviewer"].to_pylist()))
        yield f"{self.out}: {counted(self.table.num_rows, 'verdict')} of {counted(n_reviewers, 'reviewer')}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + table_html(self.table.to_pylist(), _SHOWN)


def write_verdicts(
    site: Path | str,
    out: Path | str,
    *,
    reviews: Path | str | None = None,
    history: bool = False,
    overwrite: bool = False,
) -> VerdictsResult:
    """Write the verdicts of all reviewers as one table, .csv or .parquet, with what was hidden from them beside each.

    Ordered by reviewer, then by time of saving. In the .csv no text is taken for a formula.

    Parameters
    ----------
    site : the folder of an atlas
    reviews : the folder of the verdicts; None: `site`.reviews, beside the atlas
    history : also verdicts that a later one of the same reviewer replaced

    Raises
    ------
    StoreNotFound
        If there is no atlas, or there are no reviews.
    DamagedStore, SpecMismatch
        If the atlas or a journal of verdicts cannot be read.
    BadInput
        If `out` ends otherwise, or exists already (and not `overwrite`).
    """
    site, out = Path(site), Path(out)
    review = read_review(site)
    table = verdict_table(read_verdicts(_folder(site, reviews)), review, history=history)
    write_verdict_table(table, out, overwrite=overwrite)
    return VerdictsResult(out=out, table=table)


@dataclass(frozen=True, kw_only=True)
class AgreementResult(Report):
    """Whether reviewers agree, and what they found; `found` holds plain values, docs/review.md says which."""

    site: Path
    found: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `cyto atlas agreement --json` prints."""
        return self.found

    def lines(self) -> Iterator[str]:
        """Counts, then kappas, shares and tests for each question."""
        found = self.found
        yield (
            f"{counted(found['n_verdicts'], 'verdict')} ({found['n_superseded']:,} earlier ones replaced), of them "
            f"{found['n_seen_with_labels']:,} with labels shown"
        )
        if found["n_not_asked"]:
            yield f"left out: {found['n_not_asked']:,} on concepts that {self.site} does not ask about"
        for question in found["questions"]:
            yield from _question_lines(question)

    def _repr_html_(self) -> str:
        pairs = [
            {
                "question": question["title"],
                "reviewers": " and ".join(pair["reviewers"]),
                "concepts": pair["n_items"],
                "equal": percent(pair["agreement"]),
                "Cohen's kappa (95%)": _kappa(pair, "kappa"),
                "Gwet's AC1 (95%)": _kappa(pair, "ac1"),
            }
            for question in self.found["questions"]
            for pair in question["cohen"]
        ]
        return super()._repr_html_() + table_html(pairs)


def review_agreement(site: Path | str, *, reviews: Path | str | None = None) -> AgreementResult:
    """Do the reviewers of an atlas agree, which share of concepts is meaningful, are diseases told from decoys?

    Only the last verdict of a reviewer on a concept counts. Intervals are 95% bootstrap intervals over the concepts.

    Parameters
    ----------
    site : the folder of an atlas
    reviews : the folder of the verdicts; None: `site`.reviews, beside the atlas

    Raises
    ------
    StoreNotFound
        If there is no atlas, or there are no reviews.
    DamagedStore, SpecMismatch
        If the atlas or a journal of verdicts cannot be read.
    """
    site = Path(site)
    review = read_review(site)
    return AgreementResult(site=site, found=agreement(read_verdicts(_folder(site, reviews)), review))


def _folder(site: Path, reviews: Path | str | None) -> Path:
    return default_reviews(site) if reviews is None else Path(reviews)


def _question_lines(found: dict[str, Any]) -> Iterator[str]:
    """What was found for one question."""
    yield ""
    yield f"{printable(found['title'])}: {counted(found['n_items'], 'concept')}"
    for reviewer, given in found["reviewers"].items():
        said = ", ".join(f"{count:,} {verdict}" for verdict, count in given["verdicts"].items())
        yield f"  {printable(reviewer)}: {given['n']:,} judged ({said})"
    for pair in found["cohen"]:
        names = " and ".join(printable(name) for name in pair["reviewers"])
        yield (
            f"  {names}: Cohen's kappa {_kappa(pair, 'kappa')} over {counted(pair['n_items'], 'concept')}, "
            f"{percent(pair['agreement'])} equal, Gwet's AC1 {_kappa(pair, 'ac1')}"
        )
    all_of = found["fleiss"]
    if all_of["n_reviewers"] > 2:
        yield (
            f"  all {all_of['n_reviewers']:,}: Fleiss' kappa {_kappa(all_of, 'kappa')} over {all_of['n_items']:,} "
            f"concepts that two or more judged (all judged {all_of['n_by_all']:,}), Gwet's AC1 {_kappa(all_of, 'ac1')}"
        )
    if any((each["largest_share"] or 0) >= EXTREME for each in (*found["cohen"], all_of)):
        yield f"  {EXTREME:.0%} or more of the verdicts are one and the same: a kappa says little there, AC1 more"
    for row in found.get("meaningful", ()):
        cluster = "all" if row["cluster"] is None else f"cluster {row['cluster']}"
        who = "most reviewers" if row["reviewer"] is None else printable(row["reviewer"])
        if row["n"]:
            yield f"  {who}, {cluster}: meaningful {_interval(row)}"
        weighted = row.get("of_all_latents")
        if weighted and weighted["share"] is not None:
            yield (
                f"  {who}, of all latents (clusters weighted by size): meaningful {weighted['share']:.1%} "
                f"({100 * weighted['low']:.1f} to {100 * weighted['high']:.1f})"
                + (f", of the {weighted['covers']:.1%} in judged clusters" if weighted["covers"] < 1 else "")
            )
    if found.get("specific"):
        medians = {group: cell(found["median_images"][group], "1,.0f") for group in ("a", "b", "decoy")}
        yield (
            f"  images with a latent, median: list of {printable(found['a'])} {medians['a']}, "
            f"of {printable(found['b'])} {medians['b']}, decoys {medians['decoy']}"
        )
    for reviewer, said in found.get("specific", {}).items():
        for group, name in (("a", found["a"]), ("b", found["b"])):
            yield (
                f"  {printable(reviewer)}: called specific to {printable(name)} "
                f"{_interval(said['confirmed'][group])} of its list, "
                f"{_interval(said['decoys_called'][group])} of the decoys "
                f"(p {cell(said['p_lists'][group], '1.3g')})"
            )
        yield f"  {printable(reviewer)}: the right side of the two, p {cell(said['p_sides'], '1.3g')}"


def _kappa(found: dict[str, Any], name: str) -> str:
    """`0.412 (0.120 to 0.655)`"""
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{decimals(found[name])}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _interval(row: dict[str, Any]) -> str:
    """`5 of 8 (62.5%, 30.6 to 86.3)`"""
    if not row["n"]:
        return "0 of 0"
    return f"{row['n_yes']:,} of {row['n']:,} ({row['share']:.1%}, {100 * row['low']:.1f} to {100 * row['high']:.1f})"
