"""What cyto sae score has found, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.wording import Report, cell, counted, printable

MEASURES = {  # in the order of the table -> in words
    "sparse_probe_auroc": "labels told apart by k latents (area under ROC)",
    "dense_probe_auroc": "labels told apart by the mean token (area under ROC)",
    "share_of_dense": "share of the mean token's performance that k latents recover",
    "best_average_precision": "average precision of the best latent for a label",
    "best_one_latent_probe": "share of a label's log loss that the best latent removes",
    "monosemanticity": "images of a latent look alike (weighted mean cosine)",
    "monosemantic_latents": "share of latents more monosemantic than in every shuffle",
    "morans_i": "maps of a latent in one piece (Moran's I)",
    "coherent_latents": "share of latents whose maps are above 95% of shuffled ones",
    "absorption": "share of a coarse label's images taken over by latents of finer ones",
    "splitting": "average precision of the best latents for finer labels within a coarse one",
    "final_cls": "final CLS embedding preserved (0: by the mean token)",
    "matched_over_seeds": "share of latents found again from another seed",
    "cosine_over_seeds": "mean cosine of matched latents over seeds",
}


@dataclass(frozen=True, kw_only=True)
class ScorePlan(Report):
    """What a scorecard will take; an upper bound of memory, and a rough time."""

    n_images: int
    n_candidates: int
    n_latents: int
    n_entries: int  # nonzeros that are read
    memory_bytes: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """One line."""
        minutes = max(1, round(self.seconds / 60))
        yield (
            f"{self.n_images:,} of {self.n_candidates:,} images, {self.n_latents:,} latents, "
            f"{self.n_entries:,} nonzeros: about {counted(minutes, 'minute')}, at most {self.memory_bytes / 1e9:.1f} GB"
        )


@dataclass(frozen=True, kw_only=True)
class ScoreResult(Report):
    """The scorecard: a row for each figure."""

    out: Path
    rows: list[dict[str, Any]]  # measure, label, k, value, low, high, null, null_high, n, baseline_...
    baselines: tuple[str, ...]
    n_images: int
    n_patients: int
    classes: tuple[str, ...]
    said: tuple[str, ...]  # what could not be measured, and why
    was_complete: bool
    doubts: tuple[str, ...] = ()
    unit: str = ""  # that intervals are over: patient or image; none: of an older cyto, without intervals

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the figures doubtful."""
        return self.doubts

    def lines(self) -> Iterator[str]:
        """The figures over all labels; those of single labels stand in the table."""
        patients = f", {counted(self.n_patients, 'patient')}" if self.n_patients else ", no patients known"
        yield f"{self.out}: {self.n_images:,} images{patients}, {counted(len(self.classes), 'label')}"
        baselines = "".join(f" {printable(name)[:14]:>14}" for name in self.baselines)
        yield f"  {'':<72} {'k':>4} {'value':>8} {'95% interval':>16} {'null':>8} {'null up to':>10}{baselines}"
        for row in self.rows:
            if row["label"] is not None:
                continue
            others = "".join(f" {cell(row.get(f'baseline_{name}'), '14.3f')}" for name in self.baselines)
            yield (
                f"  {MEASURES[row['measure']]:<72} {cell(row['k'], '4')} {cell(row['value'], '8.3f')} "
                f"{_between(row):>16} {cell(row['null'], '8.3f')} {cell(row['null_high'], '10.3f')}{others}"
            )
        if self.unit:
            yield (
                f"intervals are over {self.unit}s, with fits and choices as they are: that a latent is the best of "
                f"many is in the null, not in the interval"
            )
        for each in self.said:
            yield f"not measured: {printable(each)}"
        yield "read each value beside its null (shuffled labels, embeddings or patches); there is no overall rank"


def _between(row: dict[str, Any]) -> str:
    return "" if row.get("low") is None else f"{row['low']:.3f} to {row['high']:.3f}"
