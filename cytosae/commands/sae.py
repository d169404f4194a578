"""cyto sae: train, evaluate, exchange and apply sparse autoencoders."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

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
    progress_line,
    readers_option,
    say_done,
    tell,
    typed_options,
)
from stores.devices import resolve_device

if TYPE_CHECKING:
    from cytosae.sae import TrainConfig

    from .shared import Bridges


class Duration(click.ParamType):
    """A time with its unit, such as 90s, 2min or 1.5h; in seconds."""

    name = "time"
    _UNITS: ClassVar[dict[str, int]] = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds; fails for anything else."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(s|sec|m|min|h)", str(value).strip())
        if not found or not float(found[1]):
            self.fail(f"expected a time with its unit, such as 90s, 2min or 1h; found {value!r}", param, ctx)
        return float(found[1]) * self._UNITS[found[2]]


class NumberOrAuto(click.ParamType):
    """A number, or the word auto."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind
        self.name = "integer|auto" if kind is int else "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        try:
            return self._kind(value)
        except ValueError:
            self.fail(
                f"{value!r} is neither {'a whole number' if self._kind is int else 'a number'} nor auto", param, ctx
            )


def saving_options(help_of_keep: str) -> Callable[[Any], Any]:
    """When states are saved from which an interrupted run goes on, and how many stay."""
    options = (
        click.option(
            "--save-every", type=Duration(), help="Time between two saved states, such as 90s or 2min  [default: 2min]."
        ),
        click.option(
            "--checkpoint-every",
            type=COUNT,
            help="Steps between two saved states, instead of (or besides) --save-every.",
        ),
        click.option("--keep-states", type=COUNT, default=2, show_default=True, help=help_of_keep),
        click.option(
            "--most-state-gb",
            type=click.FloatRange(min=0, min_open=True),
            default=32.0,
            show_default=True,
            help="Fewer states are kept, at least one, where they take more GB.",
        ),
    )

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command("train")
@click.argument("stores", type=STORE, nargs=-1, required=True)
@click.option("-o", "--out", "run", type=FILE, required=True, help="Folder of the run.")
@click.option(
    "--preset",
    type=click.Choice(["cytosae", "paper"]),
    help="cytosae (settings of the released run) or paper (Eq. 1 as printed).",
)
@click.option("--config", "config_file", type=FILE, help="TOML file with settings; options override it.")
@click.option(
    "--expansion",
    type=NumberOrAuto(int),
    help="Latents per channel; auto: from the number of tokens and their width  [default: auto; presets: 64].",
)
@click.option(
    "--activation",
    type=click.Choice(["relu", "topk", "batchtopk", "jumprelu", "gated"]),
    help="Activation function: what makes a latent active  [default: relu].",
)
@click.option("--k", type=COUNT, help="Active latents per token, for topk and batchtopk.")
@click.option(
    "--target-l0",
    type=NumberOrAuto(float),
    help="Wanted number of active latents per token: the weight of the sparsity term is steered to it; for topk and "
    "batchtopk it is k; auto: from the width of the tokens  [default: auto; presets: none].",
)
@click.option(
    "--l1", type=float, help="Weight of the sparsity term, instead of --target-l0  [default: none; presets: 8e-5]."
)
@click.option("--lr", type=float, help="Learning rate of Adam  [default: 1e-3 with --tokens auto, else 4e-4].")
@click.option("--warmup-steps", type=int, help="Steps of linear warm-up  [default: 100 with --tokens auto, else 500].")
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine", "linear"]),
    help="Learning rate after the warm-up  [default: linear with --tokens auto, else constant].",
)
@click.option(
    "--batch-tokens",
    type=int,
    help="Tokens per step  [default: 4096 with --tokens auto, else 16448, which is 64 images].",
)
@click.option(
    "--tokens",
    type=NumberOrAuto(int),
    help="Budget in tokens; auto: until error and L0 of held-out images have settled, at most 257000000  [default: "
    "auto; presets: 257000000].",
)
@click.option(
    "--loss",
    type=click.Choice(["normed", "eq1", "mse"]),
    help="Squared error over the token's norm, summed over channels, or its mean  [default: by activation and L0].",
)
@click.option(
    "--init",
    type=click.Choice(["kaiming", "transpose"]),
    help="Initial matrices: drawn separately, or the encoder as the decoder's transpose  [default: by activation and "
    "L0].",
)
@click.option(
    "--clip-norm", type=float, help="Largest norm of the gradients of a step; 0: any  [default: by activation and L0]."
)
@click.option(
    "--nested",
    type=float,
    multiple=True,
    help="Matryoshka: share of the latents that must also reconstruct alone; give it once for each share.",
)
@click.option(
    "--init-from", type=FILE, help="Folder of a finished or imported SAE to go on from, with its weights and settings."
)
@click.option(
    "--background",
    type=click.Choice(["keep", "first-component"]),
    help="Leave out patch tokens that this rule calls background  [default: keep].",
)
@click.option("--epochs", type=float, help="Budget in passes over the caches, instead of --tokens.")
@click.option("--token-set", type=TOKEN_SETS, help="Tokens of an image to train on  [default: all].")
@click.option("--mix", type=float, multiple=True, help="Share of tokens from a cache; give it once for each STORE.")
@click.option("--exclude", type=FILE, help="Parquet or text file with ids of images to leave out.")
@click.option(
    "--holdout",
    type=float,
    help="Fraction of the images that is only measured on, not trained on  [default: 0.1 with --tokens auto, else 0].",
)
@click.option(
    "--holdout-by",
    type=click.Choice(["image", "patient"]),
    help="Hold out single images or whole patients  [default: image].",
)
@click.option(
    "--dead-latents",
    type=click.Choice(["ghost", "auxk", "resample", "none"]),
    help="Treatment of dead latents, which were not active for many steps  [default: by activation and L0].",
)
@click.option("--ghost/--no-ghost", default=None, help="Short for --dead-latents ghost and --dead-latents none.")
@click.option(
    "--b-dec-init",
    type=click.Choice(["geometric-median", "geometric-median-per-position", "mean", "zeros"]),
    help="Initial value of b_dec  [default: geometric-median].",
)
@click.option("--seed", type=SEED, help="Seed of initial weights and order of the tokens  [default: 0].")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    help="Operands of matrix products; tf32 and fp16 need a GPU, bf16 a GPU or a processor with AMX or AVX512-BF16  "
    "[default: fp32].",
)
@device_option
@saving_options("Number of saved states to keep.")
@click.option("--logger", type=click.Choice(["tensorboard", "wandb"]), help="Also send the metrics to this program.")
@assume_option
@overwrite_option
def sae_train(
    stores: tuple[Path | str, ...],
    run: Path,
    preset: str | None,
    config_file: Path | None,
    exclude: Path | None,
    init_from: Path | None,
    assume_compatible: bool,
    ghost: bool | None,
    device: str,
    save_every: float | None,
    checkpoint_every: int | None,
    keep_states: int,
    most_state_gb: float,
    logger: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train a sparse autoencoder on one or several activation caches. The same command again resumes.

    STORES are paths or URLs (s3://, gs://, https://, ...). Settings that have no option go into --config
    (docs/training.md lists all settings). Without a preset, budget, width and L0 fit the data. On several GPUs:
    torchrun --nproc-per-node 4 --no-python cyto sae train ...

    \b
    Example: cyto sae train cells.acts.zarr -o cells.sae
    """
    from cytosae import train
    from cytosae.sae import make_config
    from cytosae.training import init_settings, training_line
    from stores import read_image_ids

    options = {name: value for name, value in options.items() if value not in (None, ())}
    _take_ghost(options, ghost)
    start = init_settings(init_from) if init_from else None
    config = make_config(preset=preset, config_file=config_file, options=options, start=start)
    _refuse_without_effect(options, config, goes_on=start is not None)
    with progress_line("train", "token") as progress, progress_line("measure", "image") as measured:
        done = train(
            stores,
            run,
            config,
            exclude=read_image_ids(exclude) if exclude else (),
            init_from=init_from,
            assume_compatible=assume_compatible,
            device=device,
            save_every=save_every,
            checkpoint_every=checkpoint_every,
            keep_states=keep_states,
            most_state_gb=most_state_gb,
            overwrite=overwrite,
            inputs=tuple(path for path in (config_file, exclude) if path),
            logger=logger,
            say=lambda line: click.echo(line, err=True),
            progress=lambda done, total, metrics: progress(done, total, training_line(metrics)),
            measure_progress=measured,
        )
    if os.environ.get("RANK", "0") != "0":  # of several processes, which torchrun numbers, the first one speaks
        return
    say_done(run, done.was_complete)
    for line in done.lines():
        click.echo(line)
    for warning in done.warnings:
        if warning != config.warning:  # which was told before
            click.echo(f"warning: {warning}", err=True)


def _take_ghost(options: dict[str, Any], ghost: bool | None) -> None:
    """--ghost and --no-ghost as the setting that they are short for."""
    if ghost is not None:
        meant = "ghost" if ghost else "none"
        if options.setdefault("dead_latents", meant) != meant:
            raise click.UsageError("--ghost and --no-ghost are short for --dead-latents: give one of them")


def _refuse_without_effect(options: dict[str, Any], config: "TrainConfig", *, goes_on: bool) -> None:
    """Options that were typed and would change nothing."""
    if config.takes_k and "l1" in options:
        raise click.UsageError(
            f"--l1 weighs a sparsity term, and {config.activation} has none: leave it out; --k says how many latents "
            f"are active"
        )
    if not config.holdout and options.get("holdout_by") == "patient":
        raise click.UsageError("--holdout-by patient: no patient is held out; add --holdout 0.1, or leave it out")
    if goes_on and (given := [name for name in ("init", "b_dec_init") if name in options]):
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{names}: only for new weights, and --init-from has its own: leave out one")


@click.command("sweep")
@click.argument("grid", type=FILE)
@click.argument("stores", type=STORE, nargs=-1, required=True)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the sweep: SAEs in runs/, tables, a figure.")
@click.option(
    "--at-once",
    type=click.IntRange(1, 256),
    help="SAEs trained in one pass over the data  [default: as many as fit in half of the free memory].",
)
@click.option("--exclude", type=FILE, help="Parquet or text file with ids of images to leave out.")
@device_option
@saving_options("Number of saved states to keep for each SAE.")
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
    """Train every SAE of a grid in shared passes over the data, and tabulate them. The same command again resumes.

    GRID is a TOML file: [base] settings of all; [grid] setting = [values], all combinations; [[runs]] settings that
    belong together (docs/training.md). STORES of the same kind of tokens are trained on together; the whole grid is
    trained for each kind, so for each transformer block. An SAE whose loss becomes NaN or infinite is listed as failed
    and the others continue: exit code 0.

    \b
    Example: cyto sae sweep ablation.toml cells.acts.zarr -o ablation
    """
    from cytosae.sweep import sweep
    from stores import read_image_ids

    with progress_line("sweep", "token") as progress:
        done = sweep(
            grid,
            stores,
            out,
            exclude=read_image_ids(exclude) if exclude else (),
            device=device,
            say=lambda line: click.echo(line, err=True),
            progress=progress,
            **settings,
        )
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps({"sweep": str(out), "members": done.members, "table": done.table}, indent=1))
    else:
        for line in done.lines():
            click.echo(line)
        click.echo(f"\n{out}: {len(done.members):,} SAEs in runs/, tables, sweep.png", err=True)
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)


@click.command("info")
@click.argument("run", type=FILE)
@json_option
def sae_info(run: Path, as_json: bool) -> None:
    """Show what an SAE is and what it was trained on.

    \b
    Example: cyto sae info cells.sae
    """
    from cytosae import sae_info as info_of

    info = info_of(run)
    if as_json:
        click.echo(json.dumps(info.to_json(), indent=1))
    else:
        tell(info)


@click.command("eval")
@click.argument("run", type=FILE)
@click.argument("store", type=STORE)
@click.option("--token-set", type=TOKEN_SETS, help="Tokens to measure on  [default: those that RUN was trained on].")
@click.option(
    "--dead-window",
    type=COUNT,
    help="Also count dead latents over this many last tokens  [default: 1052672].",
)
@click.option(
    "--only", type=FILE, help="Parquet or text file with ids of images to measure on, such as RUN/held_out.parquet."
)
@click.option(
    "--images",
    type=FILE,
    help="Folder or table of the images: also measure how a reconstruction changes the final CLS embedding.",
)
@click.option("--weights", help="With --images: the weights that STORE was made with; not for an untrained backbone.")
@click.option(
    "--sample",
    "n_images",
    type=COUNT,
    default=64,
    show_default=True,
    help="With --images: number of images in the sample.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="With --images: seed of the sample.")
@device_option
@readers_option
@assume_option
@click.option(
    "--per-latent",
    is_flag=True,
    help="With --json: also the numbers of images and tokens in which each latent is active.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Keep the health in RUN/health.json, for cyto sae info and the report; not with --only.",
)
@json_option
@click.pass_obj
def sae_eval(
    bridges: "Bridges",
    run: Path,
    store: Path | str,
    images: Path | None,
    device: str,
    per_latent: bool,
    keep: bool,
    as_json: bool,
    token_set: str | None,
    dead_window: int | None,
    only: Path | None,
    assume_compatible: bool,
    **sampling: Any,
) -> None:
    """Measure the SAE in RUN on every readable image of STORE (a path or a URL): error, sparsity, dead latents.

    The last lines say whether the SAE is fit for barcodes. Writes nothing, but with --keep. With --images, a sample of
    them also passes through the backbone, with and without the SAE.

    \b
    Example: cyto sae eval cells.sae cells.acts.zarr --json
    """
    from cytosae import evaluate
    from cytosae.training import DEAD_WINDOW, BackboneSample, write_health
    from stores import read_image_ids

    if keep and only:
        raise click.UsageError("--keep is for all images of STORE; leave out --only")
    if not images and (given := typed_options("weights", "n_images", "seed", "workers")):
        raise click.UsageError(f"{', '.join(given)}: of use only with --images, which says where the images lie")
    device = resolve_device(device)
    with (
        progress_line("download", "byte") as downloading,
        progress_line("sample", "image") as sampled,
        progress_line("decoder", "tile") as comparing,
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
    if keep:
        write_health(run, found.health)
    if as_json:
        values = found.to_json(per_latent=per_latent)
        click.echo(json.dumps({"sae": str(run), "store": str(store), **values}, indent=1))
    else:
        tell(found)


@click.command("import")
@click.argument("file", type=FILE)
@click.option("-o", "--out", "run", type=FILE, required=True, help="Folder of the run.")
@overwrite_option
def sae_import(file: Path, run: Path, overwrite: bool) -> None:
    """Import an SAE of another program (CytoSAE, PatchSAE, SAELens).

    FILE is a .pt of CytoSAE or PatchSAE, or a SAELens folder; nothing in it is executed. The file does not say on which
    tokens the SAE was trained, so cyto sae encode, sae eval and cache fidelity need --assume-compatible. Of SAELens the
    architectures standard, topk, jumprelu and gated can be imported, of the others relu.

    \b
    Example: cyto sae import final_sparse_autoencoder_dinov2_vitb14_-2_resid_49152.pt -o released.sae
    """
    from cytosae.sae import import_sae

    done = import_sae(file, run, overwrite=overwrite)
    say_done(run, done.was_complete)
    tell(done)


@click.command("export")
@click.argument("run", type=FILE)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["cytosae", "saelens"]),
    required=True,
    help="cytosae: one .pt file, which PyTorch loads with weights_only; saelens: a folder.",
)
@click.option(
    "-o", "--out", type=FILE, required=True, help="The file or folder to write; an existing one is never replaced."
)
def sae_export(run: Path, layout: str, out: Path) -> None:
    """Export the SAE in RUN for CytoSAE (relu only) or SAELens. Latents and reconstructions stay the same.

    batchtopk becomes jumprelu with one threshold for all latents, as in SAELens itself.

    \b
    Example: cyto sae export cells.sae --format saelens -o cells.saelens
    """
    from cytosae.sae import export_sae

    done = export_sae(run, out, format=layout)
    say_done(out, done.was_complete)
    tell(done)


@click.command("encode")
@click.argument("store", type=STORE)
@click.argument("run", type=FILE)
@click.option("-o", "--out", "latents", type=FILE, required=True, help="The latent store to write.")
@click.option(
    "--value-bits", default=10, show_default=True, help="Mantissa bits to keep of each value: 10, or 23 (all)."
)
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
    help="Precision of the encoder's product; bf16 is faster and changes latents slightly (docs/log.md).",
)
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    default="0/1",
    help="Encode shard I of N (I from 0): run N such commands on as many GPUs or nodes, in any order; the last one to "
    "finish joins the shards and completes the store.",
)
@click.option(
    "--batch-size",
    type=COUNT,
    help="Images encoded together  [default: what fits 256 MiB of dense latents, on a GPU two times 512].",
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
    """Write the sparse latents of every token of STORE (a path or a URL), encoded by the SAE in RUN.

    \b
    Example: cyto sae encode cells.acts.zarr cells.sae -o cells.latents.zarr
    """
    from cytosae import encode
    from stores.shards import Shard

    shard = Shard.parse(shard_text)
    with progress_line("encode", "image") as progress:
        done = encode(store, run, latents, device=device, shard=shard, progress=progress, **settings)
    if done.is_complete:
        say_done(latents, done.was_complete)
    tell(done)
