"""cyto compare: what differs between two diseases."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, progress_line, say_done
from stores.wording import cell, counted, printable

if TYPE_CHECKING:
    from cytosae.compare import CompareConfig, Comparison


@click.command("compare")
@click.argument("barcodes", type=FILE)
@click.argument("a")
@click.argument("b")
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the comparison.")
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--permutations",
    "n_permutations",
    type=COUNT,
    default=10_000,
    show_default=True,
    help="Of the diseases among the patients; where there are no more ways than that, each is taken once.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of permutations and bootstraps.")
@click.option("--top", type=COUNT, default=50, show_default=True, help="Latents of each top list.")
@click.option(
    "--min-patients",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Test only latents above 0 in so many patients of both groups together.",
)
@click.option(
    "--min-mean",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Test only latents whose mean barcode over the patients of both groups is so large.",
)
@click.option(
    "--latents", type=FILE, help="Test only those in the column `latent` of this CSV or Parquet, made on other data."
)
@click.option(
    "--bootstraps",
    "n_bootstraps",
    type=click.IntRange(min=0),
    default=1_000,
    show_default=True,
    help="How often patients are drawn anew, to see which latents stay in the top lists.",
)
@click.option(
    "--images-per-patient",
    metavar="N|all|auto",
    default="auto",
    show_default=True,
    help="Thin every patient to so many images, for p, g and AUC; auto: if the groups' medians differ by a quarter.",
)
@click.option("--strata", metavar="COLUMN", help="Of the image table: permute patients within its values only.")
@click.option(
    "--adjust", metavar="COLUMN", multiple=True, help="Of the image table, numbers or categories; may repeat."
)
@click.option("--within-label", metavar="LABEL", help="Count only images with this label.")
@click.option(
    "--standardize", metavar="COLUMN", help="Average each patient's means per label (`label`) with the same weights."
)
@overwrite_option
@json_option
def compare_diseases(
    barcodes: Path, out: Path, latents: Path | None, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Which latents differ between the patients of diseases A and B, by how much, and by more than chance?

    A and B are spelled as in disease.zarr; B may be `rest`: all other diseases. The unit is the patient. What the
    columns and figures mean: docs/compare.md.

    \b
    Example: cyto compare cells.barcodes CBFB::MYH11 PML::RARA -o cbfb_against_pml
    """
    from cytosae.compare import CompareConfig, compare

    config = CompareConfig(**settings)
    with progress_line("compare", "permutation") as progress:
        done = compare(barcodes, out, config, latents=latents, overwrite=overwrite, progress=progress)
    say_done(out, done.was_complete)
    if as_json:
        click.echo(
            json.dumps(
                {"comparison": str(out), **done.summary, "top": done.top(5), "supported": done.supported(5)}, indent=1
            )
        )
    else:
        _print_comparison(out, config, done)


def _print_comparison(out: Path, config: "CompareConfig", done: "Comparison") -> None:
    from cytosae.compare import describe_left_out

    found = done.summary
    for group in ("a", "b"):
        about = found[group]
        per_patient = "{min:,} to {max:,}, median {median:,g}".format(**about["images_per_patient"])
        click.echo(
            f"{group.upper()}: {printable(about['name'])}, {counted(about['n_patients'], 'patient')} with "
            f"{counted(about['n_images'], 'image')} ({per_patient} each)"
        )
    normalized = "" if found["normalize"] == "images" else f", normalised as {found['normalize']}"
    not_tested = describe_left_out(found["left_out"], config)
    click.echo(
        f"tested: {found['n_tested']:,} of {found['n_latents']:,} latents at tau {found['tau']:g}{normalized}"
        + (f"; not: {not_tested}" if not_tested else "")
    )
    how = f"all {found['n_permutations']:,} ways" if found["is_exact"] else f"{found['n_permutations']:,} permutations"
    chance = "" if found["is_exact"] else f", seed {found['seed']}"
    click.echo(f"{how} to share out the patients{chance}; no p can be below {found['p_floor']:.2g}")
    click.echo(
        f"p <= 0.05: {found['n_p_at_most_0.05']:,} latents; q <= 0.05: {found['n_q_at_most_0.05']:,}; "
        f"p_max_t <= 0.05: {found['n_p_max_t_at_most_0.05']:,}; step-down {found['n_p_step_down_at_most_0.05']:,}"
        + (f"; without adjusting, p <= 0.05: {found['n_p_crude_at_most_0.05']:,}" if config.is_adjusted else "")
    )
    for group, rows in done.supported(5).items():
        click.echo(f"higher in {printable(found[group]['name'])}: {found['n_higher'][group]:,}; best supported first")
        click.echo(
            "    latent    mean A    mean B       g   (95% interval)    AUC         p         q   p_max_t stable"
        )
        for row in rows:
            limits = f"({cell(row['hedges_g_low'], '.2f')} to {cell(row['hedges_g_high'], '.2f')})"
            click.echo(
                f"  {row['latent']:>8} {row['mean_a']:>9.4g} {row['mean_b']:>9.4g} {cell(row['hedges_g'], '7.2f')} "
                f"{limits:>16} {row['auc']:>6.3f} {row['p']:>9.3g} {row['q']:>9.3g} {row['p_max_t']:>9.3g} "
                f"{cell(row['stability'], '6.0%')}"
            )
    if found["stability_no_effect"]:
        least, most = min(found["stability_no_effect"]), max(found["stability_no_effect"])
        click.echo(f"stable: with shuffled groups, the first five of a list have {least:.0%} to {most:.0%}")
    for warning in found["warnings"]:
        click.echo(f"warning: {printable(warning)}", err=True)
    click.echo(f"{out}: differential, patients and correlation.parquet; scatter, patients and correlation.png, .svg")
