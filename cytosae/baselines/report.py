"""What `cyto sae versus` has found, in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.notebook import figure_html
from stores.wording import Report, counted, decimals, printable

WORDS = {
    "explained_variance": "explained variance",
    "label_purity_above_chance": "label purity above chance",
}


@dataclass(frozen=True, kw_only=True)
class VersusResult(Report):
    """An SAE beside its baselines, on the same held-out images."""

    out: Path  # the folder
    saes: list[dict[str, Any]]  # rows of saes.parquet: the SAE, then the baselines
    differences: list[dict[str, Any]]  # rows of differences.parquet
    summary: dict[str, Any]  # n_images, n_groups, unit, label, ...
    was_complete: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the comparison doubtful, and leads that are no sign of learning."""
        return tuple(doubts_of(self.summary, self.differences))

    def beaten(self, metric: str = "explained_variance") -> dict[str, bool]:
        """For each kind of baseline: has the SAE a lead over it that is of learning? Where there is an interval.

        The whole interval of SAE minus baseline is above 0, and where `random` is among the baselines, that of SAE
        minus random is, too: a lead that untrained directions have as well does not count.

        metric : explained_variance or label_purity_above_chance
        """
        return {
            row["baseline"]: row["is_better"]
            for row in self.differences
            if row["metric"] == metric and row["is_better"] is not None
        }

    def lines(self) -> Iterator[str]:
        """A line for each SAE, then SAE minus baseline for each metric that is judged."""
        s = self.summary
        held_out = "held-out images" if s["is_held_out"] else "images"
        of = f" of {s['n_images_in_all']:,}" if s["n_images"] < s["n_images_in_all"] else ""
        yield f"{s['run']} and {counted(len(self.saes) - 1, 'baseline')} on {s['n_images']:,}{of} {held_out}"
        yield f"  {'':<20} {'latents':>8} {'L0':>7} {'dead':>6} {'explained':>10} {'purity':>7} {'by chance':>10}"
        for row in self.saes:
            name = "SAE" if row is self.saes[0] else printable(row["kind"])
            yield (
                f"  {name:<20} {row['n_latents']:>8,} {row['l0']:>7.1f} {row['dead_share']:>6.1%} "
                f"{decimals(row['explained_variance']):>10} {decimals(row['label_purity']):>7} "
                f"{decimals(row['label_purity_by_chance']):>10}"
            )
        for metric, words in WORDS.items():
            rows = [row for row in self.differences if row["metric"] == metric and row["low"] is not None]
            if not rows:
                continue
            yield f"{words}: SAE minus baseline, 95% interval over {counted(s['n_groups'], s['unit'])}"
            for row in rows:
                yield f"  {printable(row['baseline']):<20} {difference_text(row)}"
            for row in rows:
                if row["is_better"] and (row.get("random_lead_low") or 0) > 0:
                    yield (
                        f"  random directions are ahead of {printable(row['baseline'])} by {row['random_lead']:+.3f}, "
                        f"too; the SAE is ahead of both by {row['beyond_random']:+.3f} "
                        f"({row['beyond_random_low']:+.3f} to {row['beyond_random_high']:+.3f})"
                    )
            n_better = sum(row["is_better"] for row in rows)
            n_left = sum(row.get("is_ahead", row["is_better"]) for row in rows) - n_better
            left = f"; not counted: {counted(n_left, 'lead')} that random directions may have as well" if n_left else ""
            yield f"  above 0 for {n_better} of {counted(len(rows), 'baseline')}{left}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "differences.png")


def difference_text(row: dict[str, Any]) -> str:
    """`+0.213 (+0.201 to +0.225)`, and how many baselines it is the mean of."""
    mean = f", mean of {row['n_baselines']}" if row["n_baselines"] > 1 else ""
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}){mean}"


def lead_not_of_learning(row: dict[str, Any]) -> str:
    """Why a lead over a baseline does not count. row : of differences.parquet, `is_ahead` and not `is_better`."""
    name, words = printable(row["baseline"]), WORDS[row["metric"]]
    lead = f"the SAE's lead over {name} of {row['difference']:+.3f}"
    if (row["random_lead_low"] or 0) > 0:
        by = f"{row['random_lead']:+.3f} ({row['random_lead_low']:+.3f} to {row['random_lead_high']:+.3f})"
        return f"{words}: random directions are ahead of {name} by {by}, too, so {lead} is no sign of learning"
    beyond = f"{row['beyond_random']:+.3f}, {row['beyond_random_low']:+.3f} to {row['beyond_random_high']:+.3f}"
    return f"{words}: {lead} does not count, since the SAE is not clearly ahead of random directions ({beyond})"


def doubts_of(summary: dict[str, Any], differences: Sequence[dict[str, Any]]) -> list[str]:
    """Warnings of a folder of results; of one by an earlier cyto also that its leads are judged as they were then."""
    found = [*map(str, summary["warnings"])]
    if any(row["is_better"] and "is_ahead" not in row for row in differences):
        found.append(
            "an earlier cyto judged these leads: they were not held against those of random directions; "
            "the same command with --overwrite does it"
        )
    return found
