"""cyto probe: how well barcodes predict diseases or cell types."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, progress_line, say_done, tell
from stores.machine import n_cores
from stores.wording import printable

if TYPE_CHECKING:
    from cytosae.probe import ProbeResult, ProbeTest


@click.command()
@click.argument("barcodes", type=FILE, required=False)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the results.")
@click.option(
    "--test",
    type=FILE,
    help="Barcodes of another cohort: the model that is fitted on all of BARCODES is applied to them.",
)
@click.option(
    "--test-where",
    "test_where",
    metavar="COLUMN=VALUE",
    multiple=True,
    help="Or: patients (images) of BARCODES with this value are kept out of all fitting, and the model is tried on "
    "them; may repeat, for more values of the column.",
)
@click.option(
    "--model",
    type=FILE,
    help="Folder of an earlier probe, in place of BARCODES: its saved model is tried on --test, nothing is fitted.",
)
@click.option(
    "--cache",
    "caches",
    type=FILE,
    multiple=True,
    help="Activation cache of the same images, for baselines; may repeat.",
)
@click.option("--sae", type=FILE, help="Folder of the SAE: says whether it was trained on these images.")
@click.option(
    "--level",
    type=click.Choice(["patient", "image"]),
    default="patient",
    show_default=True,
    help="Units that are classified.",
)
@click.option("--target", default="", help="Column of classes  [default: disease of patients, label of images].")
@click.option("--class", "classes", multiple=True, help="Keep this class; may repeat  [default: all].")
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--group-by", help="Column of the images: patients (images) with a common value are never on both sides of a fold."
)
@click.option(
    "--min-images", type=COUNT, default=1, show_default=True, help="Leave out patients with fewer readable images."
)
@click.option(
    "--max-images",
    type=COUNT,
    default=1000,
    show_default=True,
    help="At level image: a random sample of so many; a large number for all.",
)
@click.option("--folds", type=int, default=5, show_default=True, help="Folds of whole groups.")
@click.option(
    "--inner-folds",
    type=int,
    default=3,
    show_default=True,
    help="Folds within each training side, by which threshold and C are chosen.",
)
@click.option(
    "--null",
    type=click.Choice(["auto", "within", "between"]),
    default="auto",
    show_default=True,
    help="How labels are shuffled: rows exchange them within their group, or whole groups exchange theirs; auto: "
    "within, if that changes at least half as many labels as a shuffle without groups would.",
)
@click.option("--repeats", type=int, help="Times that new folds are drawn  [default: 10; at level image 3].")
@click.option("--permutations", type=int, help="Shuffles of the labels; 0: none  [default: 99; at level image 19].")
@click.option(
    "--regularization",
    type=click.Choice(["latents", "backbone", "samples", "samples-inverse"]),
    default="latents",
    show_default=True,
    help="Rule for scikit-learn's C: M c / 100 (M latents, c classes: it grows with the SAE's width), W c / 100 (W the "
    "backbone's width), n c / 100 (n training rows), or 100 / (n c).",
)
@click.option(
    "--c-factor",
    "c_factors",
    type=float,
    multiple=True,
    help="Multiple of the rule's C; one is chosen inside each training side, for every method alike; may repeat, and "
    "1 alone keeps the rule's C  [default: 1e-6, 1e-4, 1e-2, 1, 100].",
)
@click.option(
    "--threshold",
    "thresholds",
    type=float,
    multiple=True,
    help="Mean activation below which a latent is left out; may repeat  [default: 0 and 1e-6 to 1 by decades].",
)
@click.option(
    "--mil/--no-mil",
    default=True,
    show_default=True,
    help="With --cache, at level patient: also an attention-MIL head.",
)
@click.option(
    "--mil-repeats",
    type=click.IntRange(min=0),
    default=0,
    show_default="0: all",
    help="The head is trained in so many of the repeats.",
)
@click.option("--mil-epochs", type=COUNT, default=40, show_default=True, help="Its passes over the training patients.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of folds, shuffles and the MIL head.")
@click.option("--workers", type=COUNT, default=n_cores(), show_default="cores", help="Threads.")
@overwrite_option
@json_option
@click.pass_context
def probe(
    context: click.Context,
    barcodes: Path | None,
    out: Path,
    test: Path | None,
    test_where: tuple[str, ...],
    model: Path | None,
    caches: tuple[Path, ...],
    sae: Path | None,
    thresholds: tuple[float, ...],
    c_factors: tuple[float, ...],
    workers: int,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How well barcodes predict diseases (or cell types) of patients that no fit has seen, and how well by chance.

    The model that is fitted on all of BARCODES is saved beside the scores. With --test or --test-where it is applied
    once to patients that are in no fold; with --model and --test at any later time. Images that the model is fitted on
    (same content hash) are refused in a test.

    \b
    Example: cyto probe cells.barcodes -o cells.probe --cache cells.acts.zarr
             cyto probe --model cells.probe --test other.barcodes -o other.test
    """
    if model is not None or barcodes is None:
        _show(out, _apply_saved(context, barcodes, model, test, out, sae=sae, overwrite=overwrite), as_json)
        return
    from cytosae.probe import C_FACTORS, THRESHOLDS, MilConfig, ProbeConfig, UnitConfig
    from cytosae.probe import probe as run_probe

    of_units = ("level", "target", "classes", "tau", "group_by", "min_images", "max_images")
    units = UnitConfig(**{name: settings.pop(name) for name in of_units})
    mil = MilConfig(repeats=settings.pop("mil_repeats"), epochs=settings.pop("mil_epochs"))
    config = ProbeConfig(
        units=units,
        thresholds=tuple(sorted(thresholds)) or THRESHOLDS,
        c_factors=tuple(sorted(c_factors)) or C_FACTORS,
        mil=mil if settings.pop("mil") else None,
        **settings,
    )
    with progress_line("tokens", "image") as token_progress, progress_line("probe", "step") as progress:
        done = run_probe(
            barcodes,
            out,
            config,
            caches=caches,
            sae=sae,
            test=test,
            test_where=test_where,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
            token_progress=token_progress,
        )
    _show(out, done, as_json)


def _show(out: Path, done: "ProbeResult | ProbeTest", as_json: bool) -> None:
    """Lines or JSON to stdout, warnings to stderr."""
    say_done(out, done.was_complete)
    if not as_json:
        tell(done)
        return
    click.echo(json.dumps(done.to_json(), indent=1, allow_nan=False))
    for warning in done.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


_WITH_MODEL = ("out", "test", "model", "sae", "target", "group_by", "min_images", "seed", "overwrite", "as_json")


def _apply_saved(
    context: click.Context, barcodes: Path | None, model: Path | None, test: Path | None, out: Path, **more: Any
) -> "ProbeTest":
    """`cyto probe --model`: refuses options that change nothing there, and applies the saved model to the test."""
    from cytosae.probe import apply_model

    if model is None:
        raise click.UsageError("name the BARCODES to fit on, or with --model the folder of an earlier cyto probe")
    if barcodes is not None or test is None:
        raise click.UsageError(
            "a saved model (--model) is tried on --test BARCODES, and on nothing else; name these alone"
        )
    given = {
        str(option.name): max(option.opts, key=len)
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    }
    idle = [option for name, option in given.items() if name not in _WITH_MODEL]
    if idle:
        raise click.UsageError(f"{', '.join(idle)}: a saved model (--model) is as it was fitted; leave it out")
    changes = {name: context.params[name] for name in ("target", "group_by", "min_images") if name in given}
    return apply_model(model, test, out, seed=context.params["seed"], **more, **changes)
