"""What `cyto compare replicate` has found, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.notebook import figure_html, table_html
from stores.wording import Report, cell, counted, printable

_SHOWN = ("latent", "discovery_hedges_g", "replication_hedges_g", "same_sign", "p_one_sided", "p_holm", "ratio")


@dataclass(frozen=True, kw_only=True)
class Replication(Report):
    """The discovery's latents in another cohort: rows of replication.parquet, and the summary of the header."""

    out: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    was_complete: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the cohort may not be another one, and who was left out."""
        return tuple(self.summary["warnings"])

    def lines(self) -> Iterator[str]:
        """How many latents were tested, agree and are replicated; how effects compare; the first latents."""
        said = self.summary
        names, sizes = said["names"], said["n_patients"]
        yield (
            f"{counted(said['n_latents'], 'latent')} of {printable(said['discovery'])} ({said['rule']}) tested in "
            f"{sizes['a']:,} patients with {printable(names['a'])} and {sizes['b']:,} with {printable(names['b'])}"
        )
        yield (
            f"same direction: {said['n_same_sign']:,} of {said['n_latents']:,} (p {said['p_same_sign']:.3g} by "
            f"permutation of the patients)"
        )
        yield (
            f"replicated (one-sided, Holm p <= 0.05): {said['n_replicated']:,}; one-sided p <= 0.05: "
            f"{said['n_p_at_most_0.05']:,}; no p can be below {said['p_floor']:.2g}"
        )
        limits = f"({cell(said['correlation_low'], '.2f')} to {cell(said['correlation_high'], '.2f')})"
        chance = "" if said["p_correlation"] is None else f", p {said['p_correlation']:.3g} by permutation"
        yield f"correlation of effect sizes: {cell(said['correlation'], '.2f')} {limits}{chance}"
        limits = f"({cell(said['ratio_low'], '.2f')} to {cell(said['ratio_high'], '.2f')})"
        yield (
            f"effects here are {cell(said['ratio'], '.2f')} {limits} times those of the discovery; below 1 is the "
            f"winner's curse"
        )
        yield "    latent  g there   g here  (95% interval)   one-sided p     Holm p"
        for row in self.rows[:10]:
            yield _line(row)
        yield f"{self.out}: replication.parquet; replication.png, .svg"

    def to_json(self) -> dict[str, Any]:
        """The summary and all rows, in plain values: what `--json` prints."""
        return {"replication": str(self.out), **self.summary, "latents": self.rows}

    def _repr_html_(self) -> str:
        return super()._repr_html_() + table_html(self.rows, _SHOWN) + figure_html(self.out / "replication.png")


def _line(row: dict[str, Any]) -> str:
    limits = f"({cell(row['replication_hedges_g_low'], '.2f')} to {cell(row['replication_hedges_g_high'], '.2f')})"
    return (
        f"  {row['latent']:>8} {cell(row['discovery_hedges_g'], '8.2f')} {cell(row['replication_hedges_g'], '8.2f')} "
        f"{limits:>16} {row['p_one_sided']:>12.3g} {row['p_holm']:>10.3g}"
    )
