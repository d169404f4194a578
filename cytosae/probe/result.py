"""A finished probe, and a saved model that was tried on a test: their scores, and what `cyto probe` says of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.notebook import figure_html, table_html
from stores.wording import Report, counted, left_out_lines, printable


@dataclass(frozen=True, kw_only=True)
class ProbeTest(Report):
    """What a fitted model is worth on rows that no fit has seen."""

    out: Path  # the folder
    scores: dict[str, Any]  # test_scores.json: docs/formats.md
    was_complete: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """Classes, images and labels that make the test say less than it seems to."""
        return tuple(f"test: {warning}" for warning in self.scores["warnings"])

    def to_json(self) -> dict[str, Any]:
        """The scores, in plain values: what `--json` prints."""
        return dict(self.scores)

    def lines(self) -> Iterator[str]:
        """Rows that were scored, what was left out, the model, and a line of scores for each method."""
        scores = self.scores
        level, model = scores["level"], scores["model"]
        yield (
            f"test ({self.out}): {scores['n_scored']:,} of {counted(scores['n_units'], level)} scored, in "
            f"{counted(scores['n_groups'], 'group')}; {_classes_text(scores)}"
        )
        yield from left_out_lines(scores["left_out"])
        yield (
            f"fitted once on {counted(sum(model['n_training'].values()), level)}: "
            f"{counted(model['n_latents_kept'], 'latent')} from a mean activation of {model['threshold']:g}, "
            f"C = {model['C']:.4g}"
        )
        yield (
            f"{'on the test':<18} {'weighted F1, 95% interval':>26} {'AUROC, 95% interval':>26} {'AUPRC':>6} "
            f"{'Brier':>6}"
        )
        for name, found in scores["methods"].items():
            limits = {key: _interval_text(found["interval"][key]) for key in ("weighted_f1", "auroc")}
            f1 = f"{found['weighted_f1']:.3f} {limits['weighted_f1']}"
            auroc = "" if found["auroc"] is None else f"{found['auroc']:.3f} {limits['auroc']}"
            auprc = "" if found["auprc"] is None else f"{found['auprc']:.3f}"
            yield f"  {name:<16} {f1:>26} {auroc:>26} {auprc:>6} {found['brier']:>6.3f}"

    def _repr_html_(self) -> str:
        rows = [
            {
                "method": name,
                "weighted F1": found["weighted_f1"],
                "95% interval": _interval_text(found["interval"]["weighted_f1"]),
                "AUROC": found["auroc"],
                "AUPRC": found["auprc"],
                "log-loss": found["log_loss"],
                "Brier": found["brier"],
            }
            for name, found in self.scores["methods"].items()
        ]
        return super()._repr_html_() + table_html(rows) + figure_html(self.out / "test_confusion.png")


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Report):
    """How well each method classifies rows of folds that it was not fitted on; and the test, if there was one."""

    out: Path  # the folder
    scores: dict[str, Any]  # scores.json: docs/formats.md
    was_complete: bool
    test: ProbeTest | None = None  # of the model that was fitted on all rows

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the scores doubtful; then the same of the test."""
        return (*self.scores["warnings"], *(self.test.warnings if self.test is not None else ()))

    def to_json(self) -> dict[str, Any]:
        """The scores, under `test` those of the test, in plain values: what `--json` prints."""
        return dict(self.scores) | ({} if self.test is None else {"test": self.test.to_json()})

    def lines(self) -> Iterator[str]:
        """Rows and classes, what was left out, C, a line of scores for each method, chance; then the test."""
        scores = self.scores
        rule, chance = scores["regularization"], scores["permutation"]
        yield (
            f"{self.out}: {scores['n_units']:,} {scores['level']}s in {scores['n_groups']:,} groups; "
            f"{_classes_text(scores)}"
        )
        yield from left_out_lines(scores["left_out"])
        factors = ", ".join(f"{factor:g}" for factor in rule["c_factors"])
        chosen = f", chosen inside: {rule['C_chosen']:.4g} on average" if len(rule["c_factors"]) > 1 else ""
        yield f"C = {rule['C']:.4g} ({rule['formula']}) times {factors}{chosen}"
        yield f"{'on the same folds':<18} {'weighted F1, 95% interval':>26} {'AUROC':>6} {'barcode minus this':>24}"
        for name, found in scores["methods"].items():
            f1 = f"{found['weighted_f1']['mean']:.3f} {_interval_text(found['interval']['weighted_f1'])}"
            paired = found.get("barcode_minus_this", {}).get("weighted_f1")
            minus = "" if paired is None else f"{paired['difference']:+.3f} {_interval_text(paired)}"
            auroc = "" if found["auroc"] is None else f"{found['auroc']:.3f}"
            yield f"  {name:<16} {f1:>26} {auroc:>6} {minus:>24}".rstrip()
        if chance:
            yield (
                f"null: {scores['null']['what']}; a shuffle changes {chance['share_of_labels_changed']:.0%} of the "
                f"labels"
            )
            f1 = chance["weighted_f1"]
            yield (
                f"chance: weighted F1 {f1['mean']:.3f}, 5 to 95% {f1['q05']:.3f} to {f1['q95']:.3f}, of "
                f"{counted(chance['n'], 'shuffle')}; first repeat {f1['observed']:.3f}, p = {f1['p']:.3g} "
                f"(no p can be below {chance['p_floor']:.3g})"
            )
        if self.test is not None:
            yield from self.test.lines()

    def _repr_html_(self) -> str:
        rows = [
            {
                "method": name,
                "weighted F1": found["weighted_f1"]["mean"],
                "95% interval": _interval_text(found["interval"]["weighted_f1"]),
                "AUROC": found["auroc"],
                "log-loss": found["log_loss"],
                "Brier": found["brier"],
            }
            for name, found in self.scores["methods"].items()
        ]
        return super()._repr_html_() + table_html(rows) + figure_html(self.out / "methods.png")


def _classes_text(scores: dict[str, Any]) -> str:
    """`disease: AML 12, well 30`"""
    shown = ", ".join(f"{printable(name)} {n:,}" for name, n in scores["classes"].items())
    return f"{printable(scores['target'])}: {shown}"


def _interval_text(interval: dict[str, float | None]) -> str:
    """`(0.512 to 0.731)`; the empty string where there is no interval."""
    return "" if interval["low"] is None else f"({interval['low']:.3f} to {interval['high']:.3f})"
