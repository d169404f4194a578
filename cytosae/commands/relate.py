"""cyto concept stability, neighbours and patient: latents compared with latents, a patient with others."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from cytosae.commands.shared import dask_client, dask_options, tell_or_json
from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
    TOKEN_SETS,
    json_option,
    overwrite_option,
    progress_line,
    say_done,
    typed_options,
)


@click.command("stability")
@click.argument("runs", type=FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=FILE, required=True, help="Folder for the tables and the figure.")
@click.option(
    "--concepts",
    type=FILE,
    multiple=True,
    help="Folder of cyto concept stats, one for each RUN: compare latents of some activity only.",
)
@click.option(
    "--min-mean-activation",
    default=1e-3,
    show_default=True,
    metavar="X",
    help="With --concepts: mean activation from which a latent counts, in some dataset.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the matchings expected by chance.")
@click.option(
    "--assume-compatible", is_flag=True, help="Take imported SAEs, which do not say which tokens they were trained on."
)
@click.option(
    "--allow-same-seed",
    is_flag=True,
    help="Compare SAEs that were trained from one seed, which begin with equal weights.",
)
@overwrite_option
@json_option
def concept_stability(runs: tuple[Path, ...], out: Path, as_json: bool, **settings: Any) -> None:
    """Do SAEs agree? Match the latents of every two RUNs one to one by the cosine of their decoder rows.

    The matching has the largest possible sum of cosines. Beside it stands what chance gives: random directions, and
    each decoder matched with itself. Only directions are compared: the SAEs may differ in the number of latents, in
    the scale of their tokens and in their centre. Train them from different seeds.

    \b
    Example: cyto concept stability seed0.sae seed1.sae seed2.sae -o cells.stability
    """
    from cytosae.relations import write_stability

    with progress_line("match", "chunk") as progress:
        done = write_stability(runs, out, progress=progress, **settings)
    say_done(out, done.was_complete)
    tell_or_json(done, {"saes": [str(run) for run in runs], "pairs": done.pairs}, as_json=as_json)


@click.command("neighbours")
@click.argument("run", type=FILE)
@click.option("-o", "--out", type=FILE, help="Folder for the table  [default: print the neighbours of --latent].")
@click.option(
    "--latents",
    type=STORE,
    multiple=True,
    metavar="STORE",
    help="Latent store (path or URL) by this SAE: also tells which latents are active together. May repeat.",
)
@click.option(
    "--latent",
    "chosen",
    type=int,
    multiple=True,
    metavar="N",
    help="Neighbours of this latent; may repeat  [default: all].",
)
@click.option("--top", "n_top", type=COUNT, default=10, show_default=True, help="Neighbours of each kind.")
@click.option("--tau", default=0.0, show_default=True, help="Active at a token: stored value above this.")
@click.option("--token-set", type=TOKEN_SETS, default="all", show_default=True, help="Tokens that count.")
@click.option(
    "--min-images",
    type=COUNT,
    default=5,
    show_default=True,
    help="Images in which two latents must be active at one token, to be neighbours by activity.",
)
@dask_options
@overwrite_option
@json_option
def concept_neighbours(
    run: Path,
    out: Path | None,
    latents: tuple[Path | str, ...],
    chosen: tuple[int, ...],
    scheduler: str | None,
    workers: int,
    memory_limit: str,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Latents near a latent: decoder rows of large cosine, and with --latents those active at the same tokens.

    Active together is said by phi, the correlation of being active at a token: 0 by chance, 1 always together. Counts
    are exact. All latents of a large store take one pass over it for each few hundred latents.

    \b
    Example: cyto concept neighbours cells.sae --latents cells.latents.zarr --latent 17
    """
    from cytosae.relations import NeighbourConfig, find_neighbours, write_neighbours

    if not latents and (given := typed_options("tau", "token_set", "min_images")):
        raise click.UsageError(f"{', '.join(given)}: only with --latents, which tells what is active together")
    config = NeighbourConfig(**settings)
    if out is None:
        if not chosen:
            raise click.UsageError("give -o DIR for the neighbours of all latents, or --latent N to print those of one")
        found = find_neighbours(run, config, latents=latents, chosen=chosen)
        tell_or_json(found, found.table.to_pylist(), as_json=as_json)
        return
    cluster = dask_client(scheduler, workers, memory_limit) if latents else nullcontext()
    with cluster as client, progress_line("neighbours", "step") as progress:
        done = write_neighbours(
            run,
            out,
            config,
            latents=latents,
            chosen=chosen,
            client=client,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, done.was_complete)
    tell_or_json(done, done.summary, as_json=as_json)


@click.command("patient")
@click.argument("barcodes", type=FILE)
@click.argument("patient", required=False)
@click.option("--all", "is_all", is_flag=True, help="Every patient instead of one.")
@click.option("-o", "--out", type=FILE, required=True, help="Folder for the tables and the figure.")
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--min-images",
    type=COUNT,
    default=3,
    show_default=True,
    help="Of the patient's images in which a raised latent must be above tau.",
)
@click.option("--splits", "n_splits", type=COUNT, default=200, show_default=True, help="Times the images are halved.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the splits.")
@overwrite_option
@json_option
def concept_patient(
    barcodes: Path, patient: str | None, is_all: bool, out: Path, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Latents that set PATIENT apart from the other patients of its disease, and hold in both halves of its images.

    z predicts one more patient from the others (Student's t, the patient's own error added; on the plain and on the
    logarithmic scale, the smaller counts), at least 5 others of the same disease and dataset. Set apart: |z| of 3 or
    more in all images and in both halves, and no other patient is as far out. It ranks and describes, without p- or
    q-values: compare with how many latents set the other patients apart by the same rule.

    \b
    Example: cyto concept patient cells.barcodes P07 -o P07.concepts
    """
    from cytosae.relations import PatientConfig, write_patient_concepts

    if (patient is None) != is_all:
        raise click.UsageError("name one PATIENT, or give --all")
    with progress_line("compare", "patient") as progress:
        done = write_patient_concepts(
            barcodes, patient, out, PatientConfig(**settings), overwrite=overwrite, progress=progress
        )
    say_done(out, done.was_complete)
    tell_or_json(done, {"patients": done.patients, "top": done.top}, as_json=as_json)
