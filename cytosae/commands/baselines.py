"""cyto sae baseline and versus: what an SAE must do better than, and whether it does."""

from pathlib import Path
from typing import Any

import click

from cytosae.commands.shared import tell_or_json
from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
    assume_option,
    device_option,
    json_option,
    overwrite_option,
    progress_line,
    say_done,
)

KINDS = ("random", "frozen-decoder", "frozen-encoder", "tokens", "pca", "ica", "nmf", "neurons", "kmeans")


@click.command("baseline")
@click.argument("stores", type=STORE, nargs=-1, required=True)
@click.option("-o", "--out", "run", type=FILE, required=True, help="Folder of the baseline.")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What it is (docs/howto/baselines.md).")
@click.option(
    "--like",
    type=FILE,
    help="Folder of the SAE that it is compared with: its tokens, held-out images, latents, L0 and, for what is "
    "trained, settings and budget  [default: what cyto sae train would choose].",
)
@click.option("--config", "config_file", type=FILE, help="Without --like: TOML file with the settings of an SAE.")
@click.option("--exclude", type=FILE, help="Parquet or text file with ids of images that the SAE was trained without.")
@click.option("--seed", type=SEED, help="Seed of initial weights, drawn tokens and fits  [default: that of the SAE].")
@click.option(
    "--sample-tokens",
    type=COUNT,
    help="Training tokens that are looked at  [default: 50 million numbers; more for tokens and kmeans].",
)
@click.option(
    "--components", type=COUNT, help="For pca, ica and nmf: directions  [default: as many as tokens have channels]."
)
@click.option(
    "--iterations", type=COUNT, default=100, show_default=True, help="For ica and nmf: passes over the sample, at most."
)
@device_option
@assume_option
@overwrite_option
def sae_baseline(
    stores: tuple[Path | str, ...],
    run: Path,
    like: Path | None,
    config_file: Path | None,
    exclude: Path | None,
    assume_compatible: bool,
    device: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Write an SAE that learnt nothing, or less, with the data, latents and L0 of another: what that one must beat.

    The folder is that of an ordinary SAE: encode, barcode, concept, compare, probe and versus take it. STORES are those
    that the SAE was trained on. The same command again continues it, or finds it complete.

    \b
    Example: cyto sae baseline cells.acts.zarr -o pca.sae --kind pca --like cells.sae
    """
    from cytosae import BaselineConfig, write_baseline
    from cytosae.sae import make_config
    from stores import read_image_ids

    if like and config_file:
        raise click.UsageError("--like has the settings of its SAE; leave out --config")
    with progress_line("baseline", "token") as progress:
        done = write_baseline(
            stores,
            run,
            BaselineConfig(**settings),
            like=like,
            settings=make_config(config_file=config_file) if config_file else None,
            exclude=read_image_ids(exclude) if exclude else (),
            assume_compatible=assume_compatible,
            device=device,
            overwrite=overwrite,
            say=lambda line: click.echo(line, err=True),
            progress=progress,
        )
    say_done(run, done.was_complete)
    tell_or_json(done, {}, as_json=False)


@click.command("versus")
@click.argument("run", type=FILE)
@click.argument("store", type=STORE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder for the tables and the figure.")
@click.option(
    "--baseline",
    "baselines",
    type=FILE,
    multiple=True,
    help="Folder of cyto sae baseline; may repeat, also with seeds.",
)
@click.option(
    "--untrained",
    type=(FILE, STORE),
    multiple=True,
    metavar="RUN STORE",
    help="An SAE and its cache of the same images through an untrained backbone; may repeat.",
)
@click.option(
    "--label",
    type=click.Choice(["label", "label_common"]),
    default="label",
    show_default=True,
    help="Column of the image table that latents are asked about.",
)
@click.option(
    "--most-images",
    type=click.IntRange(min=0),
    default=2048,
    show_default=True,
    help="Held-out images to measure on, drawn at random; 0: all.",
)
@click.option("--all-images", is_flag=True, help="Measure on all images, also those that an SAE was trained on.")
@click.option("--draws", type=click.IntRange(min=100), default=1000, show_default=True, help="Of the bootstrap.")
@click.option(
    "--least-images",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Labelled images in which a latent must be active to have a purity.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of drawn images, bootstrap and shuffled labels.")
@device_option
@assume_option
@overwrite_option
@json_option
def sae_versus(
    run: Path,
    store: Path | str,
    out: Path,
    baselines: tuple[Path, ...],
    untrained: tuple[tuple[Path, Path | str], ...],
    assume_compatible: bool,
    device: str,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Has the SAE in RUN more than baselines? Measure all on the same held-out images of STORE (a path or a URL).

    Explained variance, L0, dead latents, and how far latents keep to one label beyond chance; SAE minus baseline with
    paired 95% intervals over patients, or over images where no patients are known. A lead counts only if the SAE is
    ahead of random directions, too: give baselines of the kind random. Interrupted, it continues.

    \b
    Example: cyto sae versus cells.sae cells.acts.zarr --baseline pca.sae --baseline random.sae -o cells.versus
    """
    from cytosae import VersusConfig, compare_with_baselines

    with progress_line("versus", "image") as progress:
        done = compare_with_baselines(
            run,
            store,
            baselines,
            out,
            VersusConfig(**settings),
            untrained=untrained,
            assume_compatible=assume_compatible,
            device=device,
            overwrite=overwrite,
            say=lambda line: click.echo(line, err=True),
            progress=progress,
        )
    say_done(out, done.was_complete)
    tell_or_json(done, {"saes": done.saes, "differences": done.differences, **done.summary}, as_json=as_json)
