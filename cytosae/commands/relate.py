"""cyto concept stability, neighbours and patient: latents beside latents, a patient beside others."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from cytosae.commands.shared import dask_client, dask_options
from stores.console import COUNT, FILE, SEED, STORE, TOKEN_SETS, json_option, overwrite_option, progress_line, say_done
from stores.wording import counted, decimals, printable


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
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of what chance gives.")
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
    each decoder matched with itself. Directions alone are compared: the SAEs may differ in the number of latents, in
    the scale of their tokens and in their centre. Train them from different seeds.

    \b
    Example: cyto concept stability seed0.sae seed1.sae seed2.sae -o cells.stability
    """
    from cytosae.relations import write_stability

    with progress_line("match", "block") as progress:
        done = write_stability(runs, out, progress=progress, **settings)
    say_done(out, done.was_complete)
    for warning in done.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if as_json:
        click.echo(json.dumps({"saes": [str(run) for run in runs], "pairs": done.pairs}, indent=1))
        return
    for run, n_without in zip(runs, done.n_without_direction, strict=True):
        if n_without:
            click.echo(f"{run}: {counted(n_without, 'latent')} left out: without a direction, the decoder row is zero")
    for pair in done.pairs:
        click.echo(f"{runs[pair['sae_a']]} and {runs[pair['sae_b']]}: {_matching_line(pair)}")
    click.echo(f"{out}: matches, stability of each latent, pairs, figure")


def _matching_line(pair: dict[str, Any]) -> str:
    proof = "the best there is" if pair["is_optimal"] else f"the best sum is larger by at most {pair['gap']:.3g}"
    return (
        f"{pair['n_matched']:,} of {min(pair['n_latents_a'], pair['n_latents_b']):,} latents matched ({proof}), "
        f"mean cosine {pair['mean_cosine']:.3f} (by chance {pair['null_mean_cosine']:.3f}), "
        f"{pair['share_above_0.7']:.1%} above 0.7, {pair['share_above_0.9']:.1%} above 0.9, "
        f"{pair['share_above_null_p99']:.1%} above 99% of those by chance ({pair['null_p99']:.3f}, {pair['chance']})"
    )


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
    "--latent", "chosen", type=int, multiple=True, metavar="N", help="Of this latent; may repeat  [default: all]."
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
    from cytosae.relations import Coactivation, find_neighbours, write_neighbours

    config = Coactivation(**settings)
    if out is None:
        if not chosen:
            raise click.UsageError("give -o DIR for the neighbours of all latents, or --latent N to print those of one")
        found = find_neighbours(run, latents, chosen=chosen, settings=config).table.to_pylist()
        click.echo(json.dumps(found, indent=1) if as_json else "\n".join(_neighbour_lines(found, chosen)))
        return
    cluster = dask_client(scheduler, workers, memory_limit) if latents else nullcontext()
    with cluster as client, progress_line("neighbours", "step") as progress:
        was_complete = write_neighbours(
            run, out, latents, chosen=chosen, settings=config, client=client, overwrite=overwrite, progress=progress
        )
    say_done(out, was_complete)
    summary = _result_summary(out, "neighbours")
    if as_json:
        click.echo(json.dumps(summary, indent=1))
        return
    by = f" and activity at {summary['n_tokens']:,} tokens of {summary['n_images']:,} images" if latents else ""
    click.echo(f"{out}: neighbours of {summary['n_latents']:,} latents by direction{by}")
    if summary["n_without_direction"]:
        click.echo(f"{counted(summary['n_without_direction'], 'latent')} without a direction: the decoder row is zero")


def _result_summary(out: Path, kind: str) -> dict[str, Any]:
    from stores import read_header
    from stores.spec import FORMATS

    return read_header(out, FORMATS[kind]).summary or {}


def _neighbour_lines(rows: list[dict[str, Any]], chosen: tuple[int, ...]) -> Iterator[str]:
    """One block per latent: its neighbours by direction, then those by activity."""
    for latent in sorted(set(chosen)):
        mine = [row for row in rows if row["latent"] == latent]
        n_tokens = next((row["n_tokens"] for row in mine if row["n_tokens"] is not None), None)
        yield f"latent {latent}" + ("" if n_tokens is None else f", active at {counted(n_tokens, 'token')}")
        for by, title in (("direction", "nearest direction"), ("tokens", "active at the same tokens")):
            some = [row for row in mine if row["by"] == by]
            if by == "direction" or n_tokens is not None:
                yield f"  {title}: {'' if some else 'none'}".rstrip()
            for row in some:
                together = ""
                if row["n_tokens_both"] is not None:
                    together = (
                        f"  phi {decimals(row['phi'])}  lift {row['lift'] or 0:.1f}  together at "
                        f"{counted(row['n_tokens_both'], 'token')} of {counted(row['n_images_both'], 'image')}"
                    )
                yield f"    {row['rank']:>3}  latent {row['neighbour']:<6}  cosine {decimals(row['cosine'])}{together}"


@click.command("patient")
@click.argument("barcodes", type=FILE)
@click.argument("patient", required=False)
@click.option("--all", "is_all", is_flag=True, help="Every patient instead of one.")
@click.option("-o", "--out", type=FILE, required=True, help="Folder for the tables and the figure.")
@click.option("--tau", type=float, help="Which barcodes, where there are several.")
@click.option(
    "--min-images",
    type=COUNT,
    default=3,
    show_default=True,
    help="Of the patient's images in which a raised latent must be above tau.",
)
@click.option("--splits", "n_splits", type=COUNT, default=200, show_default=True, help="Times the images are halved.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the splits.")
@overwrite_option
@json_option
def concept_patient(
    barcodes: Path, patient: str | None, is_all: bool, out: Path, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Latents that set PATIENT apart from the other patients of its disease, and hold in both halves of its images.

    z predicts one more patient from the others (Student's t, the patient's own error added; on the plain and on the
    logarithmic scale, the smaller counts), at least 5 others of the same disease and dataset. Set apart: |z| of 3 or
    more in all images and in both halves, and no other patient is as far out. It ranks and describes, without p- or
    q-values: how many latents set the other patients apart by the same rule is the yardstick.

    \b
    Example: cyto concept patient cells.barcodes P07 -o P07.concepts
    """
    from cytosae.relations import PatientSettings, write_patient_concepts

    if (patient is None) != is_all:
        raise click.UsageError("name one PATIENT, or give --all")
    with progress_line("compare", "patient") as progress:
        done = write_patient_concepts(
            barcodes, patient, out, PatientSettings(**settings), overwrite=overwrite, progress=progress
        )
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps({"patients": done.patients, "top": done.top}, indent=1))
        return
    for row in done.patients:
        click.echo(_patient_line(row))
    for row in done.top:
        click.echo(_patient_concept_line(row))
    usual = "" if is_all else "; what is usual among patients: --all"
    click.echo(f"{out}: a description without p- or q-values, which so few patients cannot support{usual}")


def _patient_line(row: dict[str, Any]) -> str:
    name = printable(row["patient"])
    if row["skipped"]:
        return f"{name}: left out ({printable(row['skipped'])})"
    usual = "no other patient could be counted"
    if row["n_others_counted"]:
        usual = (
            f"of the other patients, {row['n_others_counted']:,} counted in the same way, each has "
            f"{row['others_least']:,} to {row['others_most']:,}, median {row['others_median']:g}"
        )
    return (
        f"{name}: {counted(row['n_images'], 'image')} against {row['n_others']:,} others with "
        f"{printable(row['disease'])}; "
        f"{counted(row['n_raised'], 'latent')} raised and {row['n_lowered']:,} lowered (|z| of 3 or more in all "
        f"images and in both halves, no other as far) of {row['n_latents']:,} looked at; {usual}; halves correlate "
        f"{decimals(row['halves_correlation'])}"
    )


def _patient_concept_line(row: dict[str, Any]) -> str:
    return (
        f"  latent {row['latent']:<6} z {row['z']:>7.1f}  {row['barcode']:.3g} against {row['others_mean']:.3g} "
        f"tokens per image, in {counted(row['n_images_active'], 'image')}; {row['n_others_beyond']:,} others as far; "
        f"|z| of 3 in both halves in {row['replicated']:.0%} of the splits"
    )
