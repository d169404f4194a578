"""What `cyto sae versus` has found, in words."""

from collections.abc import Iterator
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
        """What makes the comparison doubtful."""
        return tuple(self.summary["warnings"])

    def beaten(self, metric: str = "explained_variance") -> dict[str, bool]:
        """For each kind of baseline: is the whole interval of SAE minus baseline above 0? Where there is an interval.

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
            n_better = sum(row["is_better"] for row in rows)
            yield f"  above 0 for {n_better} of {counted(len(rows), 'baseline')}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "differences.png")


def difference_text(row: dict[str, Any]) -> str:
    """`+0.213 (+0.201 to +0.225)`, and how many baselines it is the mean of."""
    mean = f", mean of {row['n_baselines']}" if row["n_baselines"] > 1 else ""
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}){mean}"
