"""cyto compare: what differs between two diseases; and cyto compare replicate: whether it does in others."""

import json
from pathlib import Path
from typing import Any, ClassVar

import click

from cytosae.commands.shared import CommandWithCommands
from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, progress_line, say_done, tell


@click.command("replicate")
@click.argument("discovery", type=FILE)
@click.argument("replication", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the replication.")
@click.option(
    "--rule",
    type=click.Choice(["q", "p_max_t", "p_step_down"]),
    default="q",
    show_default=True,
    help="Column of DISCOVERY that says which latents it found.",
)
@click.option(
    "--most",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="Latents with at most this in that column are tested.",
)
@click.option("--top", type=COUNT, help="Instead: the first so many of both top lists of DISCOVERY, whatever their p.")
@click.option("--a", metavar="DISEASE", help="What group A is called in REPLICATION  [default: as in DISCOVERY].")
@click.option("--b", metavar="DISEASE", help="What group B is called in REPLICATION  [default: as in DISCOVERY].")
@click.option(
    "--permutations",
    "n_permutations",
    type=COUNT,
    default=10_000,
    show_default=True,
    help="Permutations of patients; the smallest p is 1 / (this + 1).",
)
@click.option(
    "--bootstraps",
    "n_bootstraps",
    type=COUNT,
    default=1_000,
    show_default=True,
    help="Bootstraps of the patients, for the intervals of correlation and ratio.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of permutations and bootstraps.")
@overwrite_option
@json_option
def compare_replicate(
    discovery: Path, replication: Path, out: Path, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Do the latents of a comparison differ in another cohort, too, and in the same direction?

    DISCOVERY is a folder of cyto compare, REPLICATION the barcodes of other patients by the same SAE. Only the latents
    that DISCOVERY found are tested, one-sided, adjusted after Holm; the other settings are those of DISCOVERY.

    \b
    Example: cyto compare replicate cbfb_against_pml others.barcodes -o cbfb_replicated
    """
    from cytosae.compare import ReplicateConfig, replicate

    config = ReplicateConfig(**settings)
    with progress_line("replicate", "permutation") as progress:
        done = replicate(
            discovery,
            replication,
            out,
            config,
            overwrite=overwrite,
            say=lambda line: click.echo(line, err=True),
            progress=progress,
        )
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)


class _Compare(CommandWithCommands):
    commands: ClassVar[dict[str, click.Command]] = {"replicate": compare_replicate}


@click.command("compare", cls=_Compare)
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
    help="Permutations of the diseases among the patients; if there are no more different ones, each is taken once.",
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
    "--latents", type=FILE, help="Test only those in the column `latent` of this CSV or Parquet, chosen on other data."
)
@click.option(
    "--bootstraps",
    "n_bootstraps",
    type=click.IntRange(min=0),
    default=1_000,
    show_default=True,
    help="Bootstraps of the patients, for how often a latent stays in its top list.",
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
    columns and figures mean: docs/compare.md. `cyto compare replicate` tests what was found in another cohort.

    \b
    Example: cyto compare cells.barcodes CBFB::MYH11 PML::RARA -o cbfb_against_pml
    """
    from cytosae.compare import CompareConfig, compare

    config = CompareConfig(**settings)
    with progress_line("compare", "permutation") as progress:
        done = compare(barcodes, out, config, latents=latents, overwrite=overwrite, progress=progress)
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
