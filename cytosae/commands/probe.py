"""cyto probe: what a barcode can tell."""

import json
from pathlib import Path
from typing import Any

import click

from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, print_left_out, progress_line, say_done
from stores.machine import n_cores
from stores.wording import counted, printable


@click.command()
@click.argument("barcodes", type=FILE, required=False)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the results.")
@click.option(
    "--test", type=FILE, help="Barcodes of another cohort: the model that is fitted on all of BARCODES is tried there."
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
    "--level", type=click.Choice(["patient", "image"]), default="patient", show_default=True, help="What is told apart."
)
@click.option("--target", default="", help="Column of classes  [default: disease of patients, label of images].")
@click.option("--class", "classes", multiple=True, help="Keep this class; may repeat  [default: all].")
@click.option("--tau", type=float, help="Which barcodes, where there are several tau.")
@click.option("--group-by", help="Column of the images: patients (images) with a common value stay together.")
@click.option(
    "--min-images", type=COUNT, default=1, show_default=True, help="Leave out patients with fewer readable images."
)
@click.option(
    "--max-images",
    type=COUNT,
    default=1000,
    show_default=True,
    help="At level image: so many, drawn at random; a large number for all.",
)
@click.option("--folds", type=int, default=5, show_default=True, help="Folds of whole groups.")
@click.option("--inner-folds", type=int, default=3, show_default=True, help="Folds that choose the threshold inside.")
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
    help="It runs in the first so many repeats.",
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
    repeats: int | None,
    permutations: int | None,
    workers: int,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How well barcodes tell diseases (or cell types) apart, on patients that no fit has seen; and what chance gives.

    The model that is fitted on all of BARCODES is saved beside the scores. With --test or --test-where it is tried
    once on patients that no fold has; with --model and --test at any later time. Images that the model is fitted on
    (same content hash) are refused in a test.

    \b
    Example: cyto probe cells.barcodes -o cells.probe --cache cells.acts.zarr
             cyto probe --model cells.probe --test other.barcodes -o other.test
    """
    if model is not None or barcodes is None:
        scores, was_complete = _apply_saved(context, barcodes, model, test, out, sae=sae, overwrite=overwrite)
        say_done(out, was_complete)
        _print_test(out, scores, as_json=as_json)
        return
    from cytosae.probe import C_FACTORS, REPETITIONS, THRESHOLDS, MilConfig, ProbeConfig, UnitConfig, write_probe

    of_units = ("level", "target", "classes", "tau", "group_by", "min_images", "max_images")
    units = UnitConfig(**{name: settings.pop(name) for name in of_units})
    mil = MilConfig(repeats=settings.pop("mil_repeats"), epochs=settings.pop("mil_epochs"))
    usual_repeats, usual_permutations = REPETITIONS[units.level]
    config = ProbeConfig(
        units=units,
        thresholds=tuple(sorted(thresholds)) or THRESHOLDS,
        c_factors=tuple(sorted(c_factors)) or C_FACTORS,
        repeats=usual_repeats if repeats is None else repeats,
        permutations=usual_permutations if permutations is None else permutations,
        mil=mil if settings.pop("mil") else None,
        **settings,
    )
    with progress_line("tokens", "image") as token_progress, progress_line("probe", "step") as progress:
        scores, was_complete = write_probe(
            barcodes,
            out,
            config,
            caches=caches,
            sae=sae,
            test=test,
            test_where=_where(test_where),
            workers=workers,
            overwrite=overwrite,
            progress=progress,
            token_progress=token_progress,
        )
    say_done(out, was_complete)
    for warning in scores["warnings"]:
        click.echo(f"warning: {printable(warning)}", err=True)
    if as_json:
        click.echo(json.dumps(scores, indent=1, allow_nan=False))
    else:
        _print_probe(out, scores)
    if "test" in scores:
        _print_test(out, scores["test"], as_json=None if as_json else False)


def _where(said: tuple[str, ...]) -> Any:
    """`--test-where COLUMN=VALUE`, once or several times, of one column; None where it is not given."""
    from cytosae.probe import Where
    from stores.errors import BadInput

    if not said:
        return None
    pairs = [text.partition("=") for text in said]
    wrong = [text for text, (column, _, value) in zip(said, pairs, strict=True) if not (column.strip() and value)]
    columns = list(dict.fromkeys(column.strip() for column, _, _ in pairs))
    if wrong or len(columns) > 1:
        found = wrong[0] if wrong else " and ".join(columns)
        raise BadInput(f"--test-where takes COLUMN=VALUE, and one column only; found {found}; e.g. site=Munich")
    return Where(columns[0], tuple(dict.fromkeys(value.strip() for _, _, value in pairs)))


_WITH_MODEL = ("out", "test", "model", "sae", "target", "group_by", "min_images", "seed", "overwrite", "as_json")


def _apply_saved(
    context: click.Context, barcodes: Path | None, model: Path | None, test: Path | None, out: Path, **more: Any
) -> tuple[dict[str, Any], bool]:
    """`cyto probe --model`: the options that mean something there, and the saved model on the test."""
    from cytosae.probe import apply_model
    from stores.errors import BadInput

    if model is None:
        raise BadInput("name the BARCODES to fit on, or with --model the folder of an earlier cyto probe")
    if barcodes is not None or test is None:
        raise BadInput("a saved model (--model) is tried on --test BARCODES, and on nothing else; name these alone")
    given = [
        option
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    idle = [max(option.opts, key=len) for option in given if option.name not in _WITH_MODEL]
    if idle:
        raise BadInput(f"{', '.join(idle)}: a saved model (--model) is as it was fitted; leave it out")
    named = {str(option.name) for option in given}
    changes = {name: context.params[name] for name in ("target", "group_by", "min_images") if name in named}
    if changes.get("group_by") == "":
        changes["group_by"] = None
    return apply_model(model, test, out, seed=context.params["seed"], **more, **changes)


def _print_probe(out: Path, scores: dict[str, Any]) -> None:
    level, rule, chance = scores["level"], scores["regularization"], scores["permutation"]
    shown = ", ".join(f"{printable(name)} {n:,}" for name, n in scores["classes"].items())
    click.echo(
        f"{out}: {scores['n_units']:,} {level}s in {scores['n_groups']:,} groups; "
        f"{printable(scores['target'])}: {shown}"
    )
    print_left_out(scores["left_out"])
    factors = ", ".join(f"{factor:g}" for factor in rule["c_factors"])
    click.echo(
        f"C = {rule['C']:.4g} ({rule['formula']}) times {factors}"
        + (f", chosen inside: {rule['C_chosen']:.4g} on average" if len(rule["c_factors"]) > 1 else "")
    )
    click.echo(f"{'on the same folds':<18} {'weighted F1, 95% interval':>26} {'AUROC':>6} {'barcode minus this':>24}")
    for name, found in scores["methods"].items():
        f1 = f"{found['weighted_f1']['mean']:.3f} {_span(found['interval']['weighted_f1'])}"
        paired = found.get("barcode_minus_this", {}).get("weighted_f1")
        minus = "" if paired is None else f"{paired['difference']:+.3f} {_span(paired)}"
        auroc = "" if found["auroc"] is None else f"{found['auroc']:.3f}"
        click.echo(f"  {name:<16} {f1:>26} {auroc:>6} {minus:>24}".rstrip())
    if chance:
        click.echo(
            f"null: {scores['null']['what']}; a shuffle changes {chance['share_of_labels_changed']:.0%} of the labels"
        )
        found = chance["weighted_f1"]
        click.echo(
            f"chance: weighted F1 {found['mean']:.3f}, 5 to 95% {found['q05']:.3f} to {found['q95']:.3f}, of "
            f"{counted(chance['n'], 'shuffle')}; first repeat {found['observed']:.3f}, p = {found['p']:.3g} "
            f"(no p can be below {chance['p_floor']:.3g})"
        )


def _span(interval: dict[str, float | None]) -> str:
    """A 95% interval."""
    return "" if interval["low"] is None else f"({interval['low']:.3f} to {interval['high']:.3f})"


def _print_test(out: Path, scores: dict[str, Any], *, as_json: bool | None) -> None:
    """What a fitted model is worth on rows that no fit has seen; `as_json` None: the warnings alone."""
    for warning in scores["warnings"]:
        click.echo(f"warning: test: {printable(warning)}", err=True)
    if as_json:
        click.echo(json.dumps(scores, indent=1, allow_nan=False))
    if as_json is not False:
        return
    level, model = scores["level"], scores["model"]
    shown = ", ".join(f"{printable(name)} {n:,}" for name, n in scores["classes"].items())
    click.echo(
        f"test ({out}): {scores['n_scored']:,} of {counted(scores['n_units'], level)} scored, in "
        f"{counted(scores['n_groups'], 'group')}; {printable(scores['target'])}: {shown}"
    )
    print_left_out(scores["left_out"])
    n_training = counted(sum(model["n_training"].values()), level)
    click.echo(
        f"fitted once on {n_training}: {counted(model['n_latents_kept'], 'latent')} from a mean activation of "
        f"{model['threshold']:g}, C = {model['C']:.4g}"
    )
    click.echo(
        f"{'on the test':<18} {'weighted F1, 95% interval':>26} {'AUROC, 95% interval':>26} {'AUPRC':>6} {'Brier':>6}"
    )
    for name, found in scores["methods"].items():
        f1 = f"{found['weighted_f1']:.3f} {_span(found['interval']['weighted_f1'])}"
        auroc = "" if found["auroc"] is None else f"{found['auroc']:.3f} {_span(found['interval']['auroc'])}"
        auprc = "" if found["auprc"] is None else f"{found['auprc']:.3f}"
        click.echo(f"  {name:<16} {f1:>26} {auroc:>26} {auprc:>6} {found['brier']:>6.3f}")
