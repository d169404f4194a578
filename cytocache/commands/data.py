"""cyto data: image tables."""

import json
from pathlib import Path

import click

from stores.console import FILE, json_option, overwrite_option, progress_line, say_done, tell


@click.command("index")
@click.argument("source", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="The image table to write, a .parquet file.")
@click.option(
    "--dataset",
    type=click.Choice(["mll23", "acevedo", "matek19", "bmc", "aml-hehr", "folder"]),
    default="folder",
    show_default=True,
    help="The dataset whose layout SOURCE has; folder: one sub-folder per class.",
)
@click.option("--class-set", help="Class set of acevedo: 13 (default), 11 (the paper's) or 10 (DinoBloom's).")
@click.option("--no-hash", is_flag=True, help="Do not read the files to find those that are byte-identical.")
@overwrite_option
@json_option
def data_index(
    source: Path, out: Path, dataset: str, class_set: str | None, no_hash: bool, overwrite: bool, as_json: bool
) -> None:
    """One row per image of SOURCE: path, label, patient, disease; and what differs from the published dataset.

    SOURCE is the unpacked dataset, or a folder above it. Nothing in it is moved, changed or deleted.

    \b
    Example: cyto data index PBC_dataset_normal_DIB -o acevedo.parquet --dataset acevedo --class-set 11
    """
    from cytocache.index import index_images

    with progress_line("compare", "file") as progress:
        done = index_images(
            source,
            out,
            dataset=dataset,
            class_set=class_set,
            compare_files=not no_hash,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
