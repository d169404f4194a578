"""cyto sae: sparse autoencoders."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import activation_of, training_line
from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
    TOKEN_SETS,
    assume_option,
    device_option,
    json_option,
    overwrite_option,
    print_page,
    progress_line,
    readers_option,
    say_done,
)
from stores.devices import resolve_device
from stores.wording import decimals, describe_latents, printable, size_on_disk, state_of

if TYPE_CHECKING:
    from cytosae.training import Evaluation
    from stores import Header

    from .shared import Bridges


@click.command("train")
@click.argument("stores", type=STORE, nargs=-1, required=True)
@click.option("-o", "--out", "run", type=FILE, required=True, help="Folder of the run.")
@click.option(
    "--preset", type=click.Choice(["cytosae", "paper"]), help="cytosae (the released run) or paper (Eq. 1 as printed)."
)
@click.option("--config", "config_file", type=FILE, help="TOML file with settings; options win over it.")
@click.option("--expansion", type=int, help="Latents per channel  [default: 64].")
@click.option(
    "--activation",
    type=click.Choice(["relu", "topk", "batchtopk", "jumprelu", "gated"]),
    help="What makes a latent active  [default: relu].",
)
@click.option("--k", type=COUNT, help="Active latents per token, of topk and batchtopk.")
@click.option("--l1", type=float, help="Weight of the sparsity term  [default: 8e-5].")
@click.option("--lr", type=float, help="Learning rate of Adam  [default: 4e-4].")
@click.option("--warmup-steps", type=int, help="Steps of linear warm-up  [default: 500].")
@click.option(
    "--schedule", type=click.Choice(["constant", "cosine", "linear"]), help="Afterwards  [default: constant]."
)
@click.option("--batch-tokens", type=int, help="Tokens per step  [default: 16448, which is 64 images].")
@click.option("--tokens", type=int, help="Budget in tokens  [default: 257000000].")
@click.option("--epochs", type=float, help="Budget in passes over the caches, instead of --tokens.")
@click.option("--token-set", type=TOKEN_SETS, help="Which tokens are trained on  [default: all].")
@click.option("--mix", type=float, multiple=True, help="Share of the tokens that a cache gives, once for each STORE.")
@click.option("--exclude", type=FILE, help="Parquet or text file with ids of images to leave out.")
@click.option("--holdout", type=float, help="Fraction of the images to measure on, not to train on  [default: 0].")
@click.option("--holdout-by", type=click.Choice(["image", "patient"]), help="What is held out  [default: image].")
@click.option(
    "--dead-latents",
    type=click.Choice(["ghost", "auxk", "resample", "none"]),
    help="What is done for silent latents  [default: ghost].",
)
@click.option("--ghost/--no-ghost", default=None, help="Short for --dead-latents ghost, and none.")
@click.option(
    "--b-dec-init",
    type=click.Choice(["geometric-median", "geometric-median-per-position", "mean", "zeros"]),
    help="Where b_dec begins  [default: geometric-median].",
)
@click.option("--seed", type=SEED, help="Seed of weights and order  [default: 0].")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of products: bf16 on a GPU  [default: fp32].")
@device_option
@click.option("--checkpoint-every", type=COUNT, default=500, show_default=True, help="Steps between two saved states.")
@click.option("--keep-states", type=COUNT, default=2, show_default=True, help="Saved states that stay.")
@click.option("--logger", type=click.Choice(["tensorboard", "wandb"]), help="Also send the metrics there.")
@overwrite_option
def sae_train(
    stores: tuple[Path | str, ...],
    run: Path,
    preset: str | None,
    config_file: Path | None,
    exclude: Path | None,
    ghost: bool | None,
    device: str,
    checkpoint_every: int,
    keep_states: int,
    logger: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train a sparse autoencoder on one or several activation caches. The same command again resumes.

    STORES are paths or URLs (s3://, gs://, https://, ...). Settings without an option of their own go into --config
    (docs/training.md lists them all). On several GPUs: torchrun --nproc-per-node 4 --no-python cyto sae train ...

    \b
    Example: cyto sae train cells.acts.zarr -o cells.sae --expansion 16 --tokens 20000000
    """
    from cytosae import train
    from cytosae.sae import make_config
    from stores import find_header, read_image_ids

    options = {name: value for name, value in options.items() if value not in (None, ())}
    _take_ghost(options, ghost)
    config = make_config(preset=preset, config_file=config_file, options=options)
    if config.warning:
        click.echo(f"warning: {config.warning}", err=True)
    before = find_header(run)
    with progress_line("train", "token") as progress:
        header = train(
            stores,
            run,
            config,
            exclude=read_image_ids(exclude) if exclude else (),
            device=resolve_device(device),
            checkpoint_every=checkpoint_every,
            keep_states=keep_states,
            overwrite=overwrite,
            inputs=tuple(path for path in (config_file, exclude) if path),
            logger=logger,
            progress=lambda done, total, metrics: progress(done, total, training_line(metrics)),
        )
    if os.environ.get("RANK", "0") != "0":  # of several processes, which torchrun numbers, the first one speaks
        return
    say_done(run, before is not None and before.complete and not overwrite)
    _print_trained(run, header)


def _take_ghost(options: dict[str, Any], ghost: bool | None) -> None:
    """--ghost and --no-ghost as the setting that they are short for."""
    if ghost is not None:
        meant = "ghost" if ghost else "none"
        if options.setdefault("dead_latents", meant) != meant:
            raise click.UsageError("--ghost and --no-ghost are short for --dead-latents: give one of them")


def _print_trained(run: Path, header: "Header") -> None:
    summary = header.summary or {}
    click.echo(f"{run}: {header.spec['n_latents']:,} latents after {summary['tokens']:,} tokens")
    click.echo(training_line(summary["final"]))
    if "held_out" in summary:
        click.echo(f"held out: {_held_out_line(summary['held_out'])}")


@click.command("sweep")
@click.argument("grid", type=FILE)
@click.argument("stores", type=STORE, nargs=-1, required=True)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the sweep: SAEs in runs/, tables, a figure.")
@click.option(
    "--at-once",
    type=click.IntRange(1, 256),
    help="SAEs in one pass over the data  [default: as many as fit in half of the free memory].",
)
@click.option("--exclude", type=FILE, help="Parquet or text file with ids of images to leave out.")
@device_option
@click.option("--checkpoint-every", type=COUNT, default=500, show_default=True, help="Steps between two saved states.")
@click.option("--keep-states", type=COUNT, default=2, show_default=True, help="Saved states of an SAE that stay.")
@json_option
def sae_sweep(
    grid: Path,
    stores: tuple[Path | str, ...],
    out: Path,
    exclude: Path | None,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train every SAE of a grid from shared passes over the data, and tabulate them. The same command again resumes.

    GRID is a TOML file: [base] settings of all; [grid] setting = [values], all combinations; [[runs]] settings that
    belong together (docs/training.md). STORES of one kind are trained on together; the grid is trained for each kind,
    so for each block. An SAE whose loss stops being finite is listed as failed, and the others go on: exit code 0.

    \b
    Example: cyto sae sweep ablation.toml cells.acts.zarr -o ablation
    """
    from cytosae.sweep import sweep
    from stores import read_image_ids
    from stores.tables import listed

    with progress_line("sweep", "token") as progress:
        done = sweep(
            grid,
            stores,
            out,
            exclude=read_image_ids(exclude) if exclude else (),
            device=resolve_device(device),
            say=lambda line: click.echo(line, err=True),
            progress=progress,
            **settings,
        )
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps({"sweep": str(out), "members": done.members, "table": done.table}, indent=1))
    else:
        click.echo(done.markdown, nl=False)
        click.echo(f"\n{out}: {len(done.members):,} SAEs in runs/, tables, sweep.png", err=True)
    if done.failed:
        names = listed([f"{row['name']} at step {row['failed_at_step']:,}" for row in done.failed])
        click.echo(f"warning: {len(done.failed):,} of {len(done.members):,} SAEs failed: {names}", err=True)


@click.command("info")
@click.argument("run", type=FILE)
@json_option
def sae_info(run: Path, as_json: bool) -> None:
    """What an SAE is, and what it was trained on.

    \b
    Example: cyto sae info cells.sae
    """
    from stores import SAE, read_header, read_runs

    header = read_header(run, SAE, complete=False)
    if as_json:
        click.echo(json.dumps({**header.to_json(), "runs": read_runs(run)}, indent=1))
        return
    rows = _imported_rows(header) if "imported" in header.spec else _trained_rows(header)
    print_page(f"{run}: {header.kind}, version {header.version}, {state_of(header.complete)}", rows)


def _trained_rows(header: "Header") -> dict[str, str]:
    """The page of `cyto sae info`."""
    spec, summary, config = header.spec, header.summary or {}, header.spec["config"]
    return {
        "latents": f"{spec['n_latents']:,} ({activation_of(spec)}) on tokens of width {spec['width']}",
        "backbone": f"{spec['tokens']['backbone']}{'' if spec['trained_backbone'] else ' (UNTRAINED)'}, "
        f"block {spec['tokens']['block']}",
        "caches": ", ".join(cache["identity"][:12] for cache in spec["caches"]),
        "objective": f"loss {config['loss']}, "
        + (f"l1 {config['l1']:g}, " if spec["activation"] not in ("topk", "batchtopk") else "")
        + f"dead latents: {config['dead_latents']}"
        + (f" ({config['ghost_scale']})" if config["dead_latents"] == "ghost" else ""),
        "training": f"{spec['n_steps']:,} steps of {config['batch_tokens']:,} tokens, lr {config['lr']:g}, "
        f"order {config['order']}, token set {config['token_set']}, seed {config['seed']}",
        "weights": f"sha256 {summary.get('sae_sha256', '(not finished)')}",
        "images": f"{spec['images']['trained_on']:,} trained on, {spec['images']['held_out']:,} held out, "
        f"{spec['images']['excluded']:,} excluded",
        "last batch": training_line(summary["final"]) if summary else "(not finished)",
        **({"held out": _held_out_line(summary["held_out"])} if "held_out" in summary else {}),
        "identity": header.identity,
    }


@click.command("eval")
@click.argument("run", type=FILE)
@click.argument("store", type=STORE)
@click.option("--token-set", type=TOKEN_SETS, help="Tokens that count  [default: what RUN was trained on].")
@click.option(
    "--dead-window",
    type=COUNT,
    help="Dead latents are also counted over the last so many tokens  [default: 1052672].",
)
@click.option(
    "--only", type=FILE, help="Parquet or text file with ids of images to measure on, such as RUN/held_out.parquet."
)
@click.option(
    "--images", type=FILE, help="Where the images lie: measure what a reconstruction does to the final CLS embedding."
)
@click.option(
    "--weights", help="With --images: the weights that STORE was made with; an untrained backbone needs none."
)
@click.option("--sample", "n_images", type=COUNT, default=64, show_default=True, help="With --images: how many.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="With --images: seed of the sample.")
@device_option
@readers_option
@assume_option
@click.option("--per-latent", is_flag=True, help="With --json: also the two counts of every latent.")
@json_option
@click.pass_obj
def sae_eval(
    bridges: "Bridges",
    run: Path,
    store: Path | str,
    images: Path | None,
    device: str,
    per_latent: bool,
    as_json: bool,
    token_set: str | None,
    dead_window: int | None,
    only: Path | None,
    assume_compatible: bool,
    **sampling: Any,
) -> None:
    """How good the SAE in RUN is on every readable image of STORE (a path or a URL): error, sparsity, dead latents.

    Writes nothing. With --images, a sample of them goes through the backbone again, with and without the SAE.

    \b
    Example: cyto sae eval cells.sae cells.acts.zarr --json
    """
    from cytosae import evaluate
    from cytosae.training import DEAD_WINDOW, BackboneSample
    from stores import read_image_ids

    if sampling["weights"] and not images:
        raise click.UsageError("--weights is of use only with --images, which says where the images lie")
    device = resolve_device(device)
    with (
        progress_line("download", "byte") as downloading,
        progress_line("sample", "image") as sampled,
        progress_line("decoder", "block") as comparing,
        progress_line("evaluate", "image") as progress,
    ):
        sample = None
        if images:
            outputs, final_cls = bridges.stage_one.backbone_sample(
                store, images, device=device, download_progress=downloading, progress=sampled, **sampling
            )
            sample = BackboneSample(outputs=outputs, final_cls=final_cls, seed=sampling["seed"])
        found = evaluate(
            store,
            run,
            token_set=token_set,
            dead_window=dead_window or DEAD_WINDOW,
            only=read_image_ids(only) if only else None,
            sample=sample,
            assume_compatible=assume_compatible,
            device=device,
            progress=progress,
            decoder_progress=comparing,
        )
    if as_json:
        values = found.to_json(per_latent=per_latent)
        click.echo(json.dumps({"sae": str(run), "store": str(store), **values}, indent=1))
    else:
        _print_evaluation(f"{run} on {store}{'' if found.trained_backbone else ' (UNTRAINED backbone)'}", found)


def _print_evaluation(title: str, found: "Evaluation") -> None:
    window = f"{found.dead_fraction_window:.1%} over the last {found.dead_window_tokens:,} tokens"
    coherence, substitution = found.coherence, found.substitution
    rows = {
        "images": f"{found.n_images:,} readable, {found.n_unreadable:,} not (left out); "
        f"{found.n_tokens:,} tokens (token set {found.token_set})",
        "trained on": found.trained_on_line,
        "MSE": f"{found.mse:.4g} as trained (loss {found.loss}), {found.mse_plain:.4g} plain",
        "explained": f"{_known(found.explained_variance)} of the variance about the mean token, "
        f"{_known(found.explained_variance_uncentered)} uncentred",
        "L0": f"{found.l0:.1f} per token; percentiles {_percentiles(found.l0_percentiles)}",
        "per image": f"{found.latents_per_image:.1f} different latents; "
        f"percentiles {_percentiles(found.latents_per_image_percentiles)}",
        "dead": f"{found.dead_fraction_whole:.1%} of {found.n_latents:,} latents over all tokens, {window}",
        "decoder": f"nearest other row, |cosine|: mean {_known(coherence.mean)}, "
        f"percentiles {_percentiles(coherence.percentiles)}"
        + (f"; {coherence.n_zero_rows:,} rows are zero" if coherence.n_zero_rows else ""),
    }
    if substitution:
        rows["final CLS"] = (
            f"{_known(substitution.recovered)} recovered against zeros, "
            f"{_known(substitution.recovered_from_mean)} against the mean token (1: as without the SAE, 0: as with "
            f"these); {substitution.n_images:,} images, seed {substitution.seed}"
        )
        for name, change in {
            "  SAE": substitution.reconstruction,
            "  mean": substitution.mean_token,
            "  zeros": substitution.zeros,
        }.items():
            rows[name] = f"cosine {_known(change.cosine, 5)}, changed by {change.relative_l2:.2%} of its length"
    print_page(title, rows)
    histogram = found.histogram
    click.echo(f"  {'frequency':<10} latents by the share of images, and of tokens, in which they are active")
    click.echo(f"  {'':<10} {'never':<16} {histogram.n_never:>9,} {histogram.n_never:>9,}")
    for low, by_image, by_token in zip(histogram.edges, histogram.images, histogram.tokens, strict=False):
        if by_image or by_token:
            click.echo(f"  {'':<10} {f'10^{low:g} to 10^{low + 0.5:g}':<16} {by_image:>9,} {by_token:>9,}")


def _known(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if value == value else "n/a"  # NaN: it cannot be said


def _percentiles(values: dict[int, Any]) -> str:
    """`5: 3, 50: 12, 95: 40, 100: 80`: those that a page has room for."""
    shown = {p: values[p] for p in (5, 50, 95, 100) if p in values}
    return ", ".join(f"{p}: {v:,}" if isinstance(v, int) else f"{p}: {v:.3f}" for p, v in shown.items()) or "n/a"


@click.command("import")
@click.argument("file", type=FILE)
@click.option("-o", "--out", "run", type=FILE, required=True, help="Folder of the run.")
@overwrite_option
def sae_import(file: Path, run: Path, overwrite: bool) -> None:
    """Take over an SAE of another program (CytoSAE, PatchSAE, SAELens).

    FILE is a .pt of CytoSAE or PatchSAE, or a SAELens folder; nothing in it is executed. Which tokens it was trained
    on stays unknown: cyto sae encode, sae eval and cache fidelity ask for --assume-compatible. SAELens'
    architectures standard, topk, jumprelu and gated are taken, of the others relu.

    \b
    Example: cyto sae import final_sparse_autoencoder_dinov2_vitb14_-2_resid_49152.pt -o released.sae
    """
    from cytosae.sae import import_sae

    header, was_complete = import_sae(file, run, overwrite=overwrite)
    say_done(run, was_complete)
    spec = header.spec
    click.echo(
        f"{run}: {spec['n_latents']:,} latents ({activation_of(spec)}) on tokens of width {spec['width']}, "
        f"from {spec['imported']['format']}"
    )
    for note in (header.summary or {})["notes"]:
        click.echo(f"  {note}")
    click.echo("  which tokens it was trained on is not known: say --assume-compatible where it is used")


@click.command("export")
@click.argument("run", type=FILE)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["cytosae", "saelens"]),
    required=True,
    help="cytosae: one .pt, which PyTorch loads with weights_only; saelens: a folder.",
)
@click.option("-o", "--out", type=FILE, required=True, help="The file or folder to write; nothing is replaced.")
def sae_export(run: Path, layout: str, out: Path) -> None:
    """Write the SAE in RUN as CytoSAE (relu only) or SAELens stores it. Latents and reconstruction stay the same.

    batchtopk becomes what SAELens makes of it: jumprelu with one threshold for all.

    \b
    Example: cyto sae export cells.sae --format saelens -o cells.saelens
    """
    from cytosae.sae import export_sae

    say_done(out, export_sae(run, out, format=layout))
    n_bytes = size_on_disk(out) if out.is_dir() else out.stat().st_size
    click.echo(f"{out}: {run} in the {layout} layout, {n_bytes / 1e6:,.1f} MB")


@click.command("encode")
@click.argument("store", type=STORE)
@click.argument("run", type=FILE)
@click.option("-o", "--out", "latents", type=FILE, required=True, help="The latent store to write.")
@click.option("--value-bits", default=10, show_default=True, help="Mantissa bits kept of each value: 10 or 23 (all).")
@click.option(
    "--min-activation",
    default=0.0,
    metavar="X",
    help="Do not store values below X: a smaller store, and the same barcodes at every tau of X or more  [default: 0].",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the encoder's product; bf16 is faster and makes other latents (docs/log.md).",
)
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    default="0/1",
    help="Encode part I of N (I from 0): run N such commands on as many GPUs or nodes, in any order; the last one to "
    "end joins the parts and completes the store.",
)
@assume_option
@device_option
@overwrite_option
def sae_encode(
    store: Path | str,
    run: Path,
    latents: Path,
    device: str,
    shard_text: str,
    **settings: Any,
) -> None:
    """Write the sparse latents of every token of STORE (a path or a URL) under the SAE in RUN.

    \b
    Example: cyto sae encode cells.acts.zarr cells.sae -o cells.latents.zarr
    """
    from cytosae import encode
    from stores.shards import Shard

    shard = Shard.parse(shard_text)
    with progress_line("encode", "image") as progress:
        done = encode(store, run, latents, device=resolve_device(device), shard=shard, progress=progress, **settings)
    if not done.is_complete:
        click.echo(
            f"{latents}: shard {shard} is done, {done.n_readable:,} readable images; other shards are not, or are "
            f"being joined. The last one completes the store; if all have ended: cyto latents merge {latents}"
        )
        return
    say_done(latents, done.was_complete)
    click.echo(describe_latents(latents))


def _imported_rows(header: "Header") -> dict[str, str]:
    spec, summary = header.spec, header.summary or {}
    says = summary.get("says", {})
    names = ("model_name", "block_layer", "module_name", "class_token", "hook_name", "dataset_path", "l1_coefficient")
    metadata = says.get("metadata")
    claims = {**(metadata if isinstance(metadata, dict) else {}), **says}
    shown = [f"{name} {printable(str(claims[name]))}" for name in names if claims.get(name) is not None]
    return {
        "latents": f"{spec['n_latents']:,} ({activation_of(spec)}) on tokens of width {spec['width']}",
        "imported": f"from {spec['imported']['format']}, sha256 {spec['imported']['files']['weights']}",
        "tokens": f"not known: {', '.join(name for name, value in spec['tokens'].items() if value is None)}",
        "says": ", ".join(shown) or "nothing of where it comes from",
        "notes": "; ".join(summary.get("notes", [])) or "none",
        "weights": f"sha256 {summary.get('sae_sha256', '(not finished)')}",
        "identity": header.identity,
    }


def _held_out_line(found: dict[str, Any]) -> str:
    return (
        f"{found['n_images']:,} images: mse {found['mse']:.4g}, L0 {found['l0']:.1f}, "
        f"explained variance {decimals(found['explained_variance'])}"
    )
