"""cyto data: image tables."""

import json
from pathlib import Path
from typing import Any

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
@click.option(
    "--patient-from",
    metavar="PATTERN",
    help="Where in the path of an image the patient is: '{patient}/*', '*/{patient}_*.tif', "
    "'{disease}/{patient}/**'. * is any characters in one folder or file name, ** any folders; other {names} become "
    "columns, too. Or regex:EXPRESSION with groups (?P<patient>...).",
)
@click.option(
    "--label-from",
    metavar="PATTERN",
    help="The same for the label, with {label}  [default: the first folder, if no pattern takes it].",
)
@click.option(
    "--suffix",
    "suffixes",
    multiple=True,
    metavar="SUFFIX",
    help="Only files whose names end so: .tif, or _rgb.png. Repeat it for several.",
)
@click.option(
    "--masks",
    is_flag=True,
    help="Leave out files that are masks of others by their names (a_mask.png, masks/a.png), and write them in the "
    "column mask, which cyto concept masks reads.",
)
@click.option("--no-hash", is_flag=True, help="Do not read the files to find those that are byte-identical.")
@overwrite_option
@json_option
def data_index(source: Path, out: Path, no_hash: bool, as_json: bool, **settings: Any) -> None:
    """One row per image of SOURCE: path, label, patient, disease; and what differs from the published dataset.

    SOURCE is the dataset, unpacked or in .zip or .tar archives, or a folder above it. Nothing in it is moved, changed
    or deleted.

    \b
    Example: cyto data index PBC_dataset_normal_DIB -o acevedo.parquet --dataset acevedo --class-set 11
    Example: cyto data index cells -o cells.parquet --patient-from '{patient}/*/*' --label-from '*/{label}/*'
    """
    from cytocache.index import index_images

    with progress_line("compare", "file") as progress:
        done = index_images(source, out, compare_files=not no_hash, progress=progress, **settings)
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
