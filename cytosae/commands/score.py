"""cyto sae score: the scorecard of an SAE."""

from pathlib import Path
from typing import Any

import click

from cytosae.commands.shared import tell_or_json
from stores.console import COUNT, FILE, SEED, STORE, json_option, overwrite_option, progress_line, say_done


@click.command("score")
@click.argument("run", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder for the tables.")
@click.option(
    "--latents", type=STORE, multiple=True, required=True, metavar="STORE", help="Latents by this SAE. May repeat."
)
@click.option(
    "--cache",
    "caches",
    type=STORE,
    multiple=True,
    metavar="STORE",
    help="The cache of each of --latents: what the dense mean token does, and monosemanticity by it.",
)
@click.option("--label", default="label", show_default=True, metavar="COLUMN", help="Column of the image table.")
@click.option(
    "--parent",
    default="label_common",
    show_default=True,
    metavar="COLUMN",
    help="Coarser label, for absorption and splitting; none is measured where no image has it.",
)
@click.option(
    "--embedding",
    type=FILE,
    help="Parquet or CSV of another image encoder, for monosemanticity: image_id, and columns of numbers.",
)
@click.option("--stability", type=FILE, help="Folder of cyto concept stability that has this SAE.")
@click.option(
    "--baseline",
    "baselines",
    type=FILE,
    multiple=True,
    metavar="DIR",
    help="Folder of cyto sae score of another SAE, on the same images: its values stand beside. May repeat.",
)
@click.option(
    "-k",
    "ks",
    type=COUNT,
    multiple=True,
    default=(1, 2, 5, 10, 50),
    show_default=True,
    help="Latents of a sparse probe; may repeat.",
)
@click.option("--folds", default=5, show_default=True, help="Folds of whole patients, 3 or more.")
@click.option("--shuffles", type=COUNT, default=9, show_default=True, help="Shuffles of every null.")
@click.option(
    "--max-images", default=10_000, show_default=True, help="Images, drawn at random where there are more; 0: all."
)
@click.option(
    "--min-images",
    default=5,
    show_default=True,
    help="In which a latent must be active, to have a monosemanticity or a Moran's I.",
)
@click.option(
    "--map-images", type=COUNT, default=5, show_default=True, help="Images of each latent whose maps are measured."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the images, the folds and the nulls.")
@overwrite_option
@json_option
def sae_score(
    run: Path,
    out: Path,
    latents: tuple[Path | str, ...],
    caches: tuple[Path | str, ...],
    embedding: Path | None,
    stability: Path | None,
    baselines: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Scorecard of the SAE in RUN: does it hold concepts? Each figure beside its null, and beside baselines.

    Labels told apart by k latents, on held-out patients, and as a share of what the dense mean token does; the best
    latents for each label; do a latent's images look alike; are its maps in one piece; absorption and splitting. There
    is no overall rank.

    \b
    Example: cyto sae score cells.sae --latents cells.latents.zarr --cache cells.acts.zarr -o cells.score
    """
    from cytosae import ScoreConfig, plan_score, score_sae

    config = ScoreConfig(**settings)
    for line in plan_score(run, latents, config).lines():
        click.echo(line, err=True)
    with progress_line("score", "step") as progress:
        done = score_sae(
            run,
            out,
            config,
            latents=latents,
            caches=caches,
            embedding=embedding,
            stability=stability,
            baselines=baselines,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, done.was_complete)
    tell_or_json(done, {"rows": done.rows, "baselines": done.baselines, "not_measured": done.said}, as_json=as_json)
