"""cyto run and cyto report: the whole way in one command, and its page."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import dask_options
from stores.console import (
    FILE,
    SEED,
    device_option,
    overwrite_option,
    progress_line,
    say_done,
    stopping_gently,
    tell,
)

if TYPE_CHECKING:
    from cytosae.pipeline import RunConfig

    from .shared import Bridges


@click.command("run")
@click.argument("source", metavar="IMAGES", type=FILE)
@click.option("-o", "--out", type=FILE, help="Folder of the run  [default, with a recipe: its own].")
@click.option("--root", type=FILE, help="Folder that paths in a table are relative to  [default: the table's].")
@click.option(
    "--backbone",
    default="random-vit-tiny",
    show_default=True,
    help="As of cyto cache extract: dinobloom-s, -b, -l or -g; another one, such as timm:NAME; or random-vit-tiny: "
    "small, untrained, no download.",
)
@click.option("--weights", metavar="FILE|auto|hf:OWNER/NAME|random", help="As of cyto cache extract.")
@click.option("--block", type=int, default=-2, show_default=True, help="Transformer block whose output is used.")
@click.option(
    "--sae", type=FILE, help="Use this SAE (a folder, or a file that cyto sae import takes) instead of training one."
)
@click.option("--stability", is_flag=True, help="Train a second SAE from another seed, and compare the two.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the SAE, of all draws and folds.")
@click.option(
    "--set",
    "given",
    metavar="SECTION.NAME=VALUE",
    multiple=True,
    help="Another value for a setting of the recipe, such as sae.expansion=16 or barcode.tau=0.2; may repeat. "
    "compare.top=5 is for all comparisons, compare.NAME.top=5 for one; probe likewise.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, with expected time and disk; write nothing.")
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    default="0/1",
    help="Extract and encode share I of N (I from 0): run N such commands on as many machines, and again until all "
    "are done. Share 0 does what cannot be shared.",
)
@device_option
@dask_options
@overwrite_option
@click.pass_context
def run_all(
    context: click.Context,
    source: Path,
    out: Path | None,
    given: tuple[str, ...],
    shard_text: str,
    **options: Any,
) -> None:
    """From a folder of images to an atlas and a report, with settings that fit the data.

    IMAGES is a folder (one sub-folder per class); a .zip or .tar(.gz) with the same inside; a folder of such archives;
    or a .csv or .parquet table with a column `path` and, where known, label, patient, disease. Or the recipe.toml of a
    run: then the run is repeated, and what depends on a changed line is done again. Interrupted, the same command
    continues. DIR/commands.sh says how to do the same by hand.

    \b
    Example: cyto run cells/ -o out --backbone dinobloom-b --weights auto
             cyto run out/recipe.toml
    """
    from cytosae.pipeline import RunConfig
    from stores.shards import Shard

    asked = {name: options.pop(name) for name in ("root", "backbone", "weights", "block", "sae", "stability", "seed")}
    config: RunConfig | None = RunConfig(**asked, settings=_settings(given))
    if source.suffix == ".toml":
        _refuse_beside_recipe(context, source)
        config = None
    bridges: Bridges = context.obj
    tell_run(source, out, config, stage_one=bridges.stage_one, shard=Shard.parse(shard_text), **options)


def tell_run(source: Path, out: Path | None, config: "RunConfig | None", **settings: Any) -> None:
    """The plan, one progress line over all stages, the result."""
    from cytosae.pipeline import run_pipeline

    with progress_line("download", "byte") as downloading, progress_line("run", None) as progress:
        done = run_pipeline(
            source,
            out,
            config,
            tell_plan=tell,
            progress=progress,
            download_progress=downloading,
            graceful_stop=lambda: stopping_gently("the chunk"),
            **settings,
        )
    say_done(done.out, done.was_complete)
    tell(done)


@click.command("report")
@click.argument("run", metavar="DIR", type=FILE)
@click.pass_obj
def run_report(bridges: "Bridges", run: Path) -> None:
    """Write DIR/report.html: what went in, the SAE, pictures with their numbers and caveats, where every file is.

    DIR is the folder of cyto run. The page is one file that loads nothing, and prints.

    \b
    Example: cyto report out
    """
    from cytosae.pipeline import write_run_report

    tell(write_run_report(run, stage_one=bridges.stage_one))


def _settings(given: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`sae.expansion=16` as {"sae": {"expansion": 16}}; a value is TOML, and a bare word a text.

    `compare.NAME.top=5` as {"compare": {NAME: {"top": 5}}}.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, is_given, value = text.partition("=")
        section, _, key = name.strip().partition(".")
        if not (is_given and section and key):
            raise click.UsageError(f"--set takes SECTION.NAME=VALUE, such as sae.expansion=16; found {text!r}")
        try:
            parsed = tomllib.loads(f"value = {value.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()
        settings = found.setdefault(section, {})
        if section in ("compare", "probe") and "." in key:  # of one of several: its name may have dots, too
            one, _, key = key.rpartition(".")
            settings = settings.setdefault(one, {})
            if not isinstance(settings, dict):
                raise click.UsageError(f"--set {section}.{one} is a setting and cannot be the name of a {section}, too")
        settings[key] = parsed
    return found


_OF_MACHINE = ("source", "out", "dry_run", "shard_text", "device", "scheduler", "workers", "memory_limit", "overwrite")


def _refuse_beside_recipe(context: click.Context, recipe: Path) -> None:
    """A recipe says every setting: an option beside it would say something else."""
    idle = [
        max(option.opts, key=len)
        for option in context.command.params
        if option.name not in _OF_MACHINE
        and context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    if idle:
        raise click.UsageError(f"{recipe} says every setting: change its lines, and leave out {', '.join(idle)}")
