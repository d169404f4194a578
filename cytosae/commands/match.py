"""cyto concept match: latents of two SAEs, matched by the images that they answer to."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cytosae.commands.shared import tell_or_json
from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, progress_line, say_done


@click.command("match")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder for the tables and the figure.")
@click.option(
    "--by",
    type=click.Choice(["activation", "within"]),
    default="activation",
    show_default=True,
    help="Correlation of activations over images; within: after the mean of each stratum is taken off.",
)
@click.option(
    "--n-images", type=COUNT, default=2_000, show_default=True, help="Images to draw; the last stratum as a whole."
)
@click.option("--images", "old_n_images", type=COUNT, hidden=True, help="Old name of --n-images, for one release.")
@click.option(
    "--only", type=FILE, help="List of image ids: draw these only, such as images held out in both trainings."
)
@click.option(
    "--strata",
    metavar="COLUMN",
    multiple=True,
    default=("label", "patient"),
    help="Of the image table; may repeat: chance permutes images within its values  [default: label and patient].",
)
@click.option("--per-stratum", type=COUNT, default=16, show_default=True, help="Images of a stratum, at most.")
@click.option("--min-images", type=COUNT, default=5, show_default=True, help="Images in which a latent must be active.")
@click.option(
    "--permutations",
    "n_permutations",
    type=COUNT,
    default=99,
    show_default=True,
    help="Permutations of the images of B, which say what chance is.",
)
@click.option("--sae-a", type=FILE, help="SAE of A: with --sae-b the cosine of decoder rows stands beside.")
@click.option("--sae-b", type=FILE, help="SAE of B.")
@click.option(
    "--comparison", type=FILE, help="Folder of cyto compare on A: how many differential latents have a counterpart?"
)
@click.option(
    "--comparison-b", type=FILE, help="The same on B: how many counterparts differ in the same direction, too?"
)
@click.option(
    "--most",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="With --comparison: largest q of a differential latent.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of images and permutations.")
@overwrite_option
@json_option
def concept_match(
    a: Path,
    b: Path,
    out: Path,
    as_json: bool,
    overwrite: bool,
    sae_a: Path | None,
    sae_b: Path | None,
    only: Path | None,
    comparison: Path | None,
    comparison_b: Path | None,
    old_n_images: int | None,
    **settings: Any,
) -> None:
    """Which latents of two SAEs answer to the same images? A and B are barcodes of the same images.

    The SAEs may differ in seed, width, block or backbone. Latents are matched one to one by the correlation of their
    activations. Chance: images of B are permuted within label and patient, so what follows from cell types and patients
    alone is no match.

    \b
    Example: cyto concept match seed0.barcodes seed1.barcodes --by activation -o cells.match
    """
    from cytosae.relations import MatchConfig, match_latents, match_scale

    if old_n_images is not None:
        if click.get_current_context().get_parameter_source("n_images") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--images is the old name of --n-images: give one of them")
        click.echo("--images is now --n-images; the old name works for one release", err=True)
        settings["n_images"] = old_n_images
    config = MatchConfig(**settings)
    click.echo(match_scale(a, b, config), err=True)
    with progress_line("match", "step") as progress:
        done = match_latents(
            a,
            b,
            out,
            config,
            sae_a=sae_a,
            sae_b=sae_b,
            only=only,
            comparison=comparison,
            comparison_b=comparison_b,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, done.was_complete)
    for note in done.notes:
        click.echo(note, err=True)
    tell_or_json(done, done.to_json(), as_json=as_json)
