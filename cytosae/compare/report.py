"""A finished comparison: its tables, the first rows of its lists, and what `cyto compare` says of it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stores.notebook import figure_html, table_html
from stores.result_folder import ResultStore
from stores.wording import Report, cell, counted, printable

from .config import CompareConfig, describe_left_out

_SHOWN = ("latent", "mean_a", "mean_b", "difference", "hedges_g", "auc", "p", "q", "p_max_t", "stability")
_ORDER = "first those with p_max_t, then q, then p of at most 0.05, each by difference; then the others by p"
_HEAD = "    latent    mean A    mean B       g   (95% interval)    AUC         p         q   p_max_t stable"


@dataclass(frozen=True, kw_only=True)
class Comparison(Report):
    """A finished comparison: `results` holds its tables, `lines()` says what was found."""

    out: Path  # the folder, as it was named
    results: ResultStore
    was_complete: bool

    @property
    def config(self) -> CompareConfig:
        """What was asked; `tau` is the one that was used."""
        spec = self.results.header.spec
        asked = {field.name: spec[field.name] for field in fields(CompareConfig) if field.name in spec}
        return CompareConfig(**{**asked, "adjust": tuple(asked.get("adjust", ()))})

    @property
    def summary(self) -> dict[str, Any]:
        """What was compared, tested and found, in plain values: docs/formats.md."""
        return dict(self.results.header.summary or {})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What beside the disease may make the groups differ, and what so few patients cannot show."""
        return tuple(self.summary["warnings"])

    def top(self, n: int) -> dict[str, list[dict[str, Any]]]:
        """The first `n` rows of each top list ("a", "b") of `differential.parquet`."""
        rows = self.results.table("differential").to_pylist()
        return {
            group: sorted(
                (row for row in rows if row[f"rank_{group}"] is not None and row[f"rank_{group}"] <= n),
                key=lambda row: row[f"rank_{group}"],
            )
            for group in ("a", "b")
        }

    def supported(self, n: int) -> dict[str, list[dict[str, Any]]]:
        """`n` rows of each side: p_max_t <= 0.05 first, then q, then p, each by rank; then the others by p."""
        rows = self.results.table("differential").to_pylist()
        return {
            group: sorted(
                (row for row in rows if row[f"rank_{group}"] is not None),
                key=lambda row: (
                    *(row[name] > 0.05 for name in ("p_max_t", "q", "p")),
                    row["p"] if row["p"] > 0.05 else 0,
                    row[f"rank_{group}"],
                ),
            )[:n]
            for group in ("a", "b")
        }

    def to_json(self) -> dict[str, Any]:
        """The summary and the first five rows of each list, in plain values: what `--json` prints."""
        return {"comparison": str(self.out), **self.summary, "top": self.top(5), "supported": self.supported(5)}

    def lines(self) -> Iterator[str]:
        """The two groups, what was tested and how, and the five best supported latents of each side."""
        found = self.summary
        for group in ("a", "b"):
            yield _group_line(group, found[group])
        yield from _test_lines(found, self.config)
        for group, rows in self.supported(5).items():
            name = printable(found[group]["name"])
            yield f"higher in {name}: {found['n_higher'][group]:,}; {_ORDER}"
            yield _HEAD
            yield from map(_latent_line, rows)
        if found["stability_no_effect"]:
            least, most = min(found["stability_no_effect"]), max(found["stability_no_effect"])
            yield f"stable: with shuffled groups, the first five of a list have {least:.0%} to {most:.0%}"
        yield f"{self.out}: differential, patients and correlation.parquet; scatter, patients and correlation.png, .svg"

    def _repr_html_(self) -> str:
        tables = "".join(
            f"<p>higher in {group.upper()}, {_ORDER}</p>{table_html(rows, _SHOWN)}"
            for group, rows in self.supported(5).items()
        )
        return super()._repr_html_() + tables + figure_html(self.results.root / "scatter.png")


def _group_line(group: str, about: dict[str, Any]) -> str:
    per_patient = "{min:,} to {max:,}, median {median:,g}".format(**about["images_per_patient"])
    return (
        f"{group.upper()}: {printable(about['name'])}, {counted(about['n_patients'], 'patient')} with "
        f"{counted(about['n_images'], 'image')} ({per_patient} each)"
    )


def _test_lines(found: dict[str, Any], config: CompareConfig) -> Iterator[str]:
    """Which latents were tested, by how many permutations, and how many have small p-values."""
    normalized = "" if found["normalize"] == "images" else f", normalised as {found['normalize']}"
    not_tested = describe_left_out(found["left_out"], config)
    yield (
        f"tested: {found['n_tested']:,} of {found['n_latents']:,} latents at tau {found['tau']:g}{normalized}"
        + (f"; not: {not_tested}" if not_tested else "")
    )
    how = f"all {found['n_permutations']:,} ways" if found["is_exact"] else f"{found['n_permutations']:,} permutations"
    chance = "" if found["is_exact"] else f", seed {found['seed']}"
    yield f"{how} to share out the patients{chance}; no p can be below {found['p_floor']:.2g}"
    yield (
        f"p <= 0.05: {found['n_p_at_most_0.05']:,} latents; q <= 0.05: {found['n_q_at_most_0.05']:,}; "
        f"p_max_t <= 0.05: {found['n_p_max_t_at_most_0.05']:,}; step-down {found['n_p_step_down_at_most_0.05']:,}"
        + (f"; without adjusting, p <= 0.05: {found['n_p_crude_at_most_0.05']:,}" if config.is_adjusted else "")
    )


def _latent_line(row: dict[str, Any]) -> str:
    limits = f"({cell(row['hedges_g_low'], '.2f')} to {cell(row['hedges_g_high'], '.2f')})"
    return (
        f"  {row['latent']:>8} {row['mean_a']:>9.4g} {row['mean_b']:>9.4g} {cell(row['hedges_g'], '7.2f')} "
        f"{limits:>16} {row['auc']:>6.3f} {row['p']:>9.3g} {row['q']:>9.3g} {row['p_max_t']:>9.3g} "
        f"{cell(row['stability'], '6.0%')}"
    )
