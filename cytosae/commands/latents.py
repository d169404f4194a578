"""cyto latents: show, verify and complete latent stores."""

import json
from pathlib import Path

import click

from stores.console import FILE, json_option, print_check, progress_line, tell


@click.command("info")
@click.argument("store", type=FILE)
@json_option
def latents_info(store: Path, as_json: bool) -> None:
    """Show what is in a latent store, complete or not.

    \b
    Example: cyto latents info cells.latents.zarr
    """
    from stores import latents_info as info_of

    info = info_of(store, header_only=as_json)
    if as_json:
        click.echo(json.dumps(info.to_json(), indent=1))
    else:
        tell(info)


@click.command("verify")
@click.argument("store", type=FILE)
@json_option
def latents_verify(store: Path, as_json: bool) -> None:
    """Verify a latent store: the checksum of every chunk file, and every index and value.

    Exit code 1, and a line for each problem, if it is damaged.

    \b
    Example: cyto latents verify cells.latents.zarr
    """
    from stores import check_latents

    with progress_line("verify", "chunk") as progress:
        report = check_latents(store, progress=progress)
    print_check(report, as_json)


@click.command("merge")
@click.argument("store", type=FILE)
def latents_merge(store: Path) -> None:
    """Complete a latent store whose shards have all ended. The last shard does so itself, unless it was killed.

    No GPU, SAE or cache is needed: existing rows are joined.

    \b
    Example: cyto latents merge cells.latents.zarr
    """
    from stores import merge_latents

    with progress_line("join", "image") as progress:
        done = merge_latents(store, progress=progress)
    tell(done)
