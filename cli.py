"""The command line: the table of commands, error messages, and what one stage needs of the other.

Commands are beside their stage (cytocache/commands, cytosae/commands) and are imported on call, so `cyto --help` stays
quick. Data goes to stdout, progress to stderr. Exit codes: 0 done, 1 an expected error in one line, 2 wrong usage, 130
interrupted.
"""

import atexit
import errno
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stores.console import FILE, SEED, json_option, progress_line, tell
from stores.machine import bound_threads
from stores.version import VERSION, missing_package

# group -> (help text, command -> module with the function GROUP_COMMAND)
GROUPS = {
    "data": ("Stage one: image tables.", {"index": "cytocache.commands.data"}),
    "cache": (
        "Stage one: activation caches.",
        dict.fromkeys(("extract", "merge", "info", "verify", "repair", "fidelity"), "cytocache.commands.cache"),
    ),
    "sae": (
        "Stage two: sparse autoencoders.",
        dict.fromkeys(("train", "sweep", "info", "eval", "import", "export", "encode"), "cytosae.commands.sae")
        | dict.fromkeys(("baseline", "versus"), "cytosae.commands.baselines")
        | {"score": "cytosae.commands.score"},
    ),
    "latents": ("Latent stores.", dict.fromkeys(("info", "verify", "merge"), "cytosae.commands.latents")),
    "concept": (
        "Concepts: what single latents answer to, in numbers and pictures.",
        {
            **dict.fromkeys(("stats", "top", "thresholds", "select"), "cytosae.commands.concept"),
            **dict.fromkeys(("stability", "neighbours", "patient"), "cytosae.commands.relate"),
            **dict.fromkeys(("sheet", "map", "masks"), "cytosae.commands.maps"),
            "search": "cytosae.commands.search",
            "match": "cytosae.commands.match",
            "ablate": "cytosae.commands.ablate",
            "describe": "cytosae.commands.describe",
        },
    ),
    "atlas": (
        "Web pages of a run, and the review of its concepts by experts.",
        dict.fromkeys(("build", "serve", "export", "agreement"), "cytosae.commands.atlas"),
    ),
}
# commands without a group -> (module, function)
COMMANDS = {
    "barcode": ("cytosae.commands.barcode", "barcode"),
    "compare": ("cytosae.commands.compare", "compare_diseases"),
    "probe": ("cytosae.commands.probe", "probe"),
    "run": ("cytosae.commands.run", "run_all"),
    "report": ("cytosae.commands.run", "run_report"),
}
_FREE, _MAY, _OTHER = (
    "free some space, and run the same command again: it continues",
    "choose a place where you may write",
    "choose another path: there is a file where a folder is needed, or a folder where a file is",
)
# errors of a path that the user can correct -> what to do
_USERS_DISK = {
    **{errno.ENOSPC: _FREE, errno.EDQUOT: _FREE, errno.EROFS: _MAY, errno.EACCES: _MAY, errno.EPERM: _MAY},
    **{errno.ENOTDIR: _OTHER, errno.EEXIST: _OTHER, errno.EISDIR: _OTHER},
    errno.ENAMETOOLONG: "choose a shorter name",
}


def _is_folder_gone() -> bool:
    """Is the working directory no longer there?"""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


class _Commands(dict[str, click.Command]):
    """The commands of a group by name, each imported when it is asked for."""

    def __init__(self, places: dict[str, tuple[str, str]]) -> None:
        super().__init__()
        self.places = places

    def __missing__(self, name: str) -> click.Command:
        module, function = self.places[name]
        self[name] = getattr(importlib.import_module(module), function)
        return self[name]


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]] | None = None, **settings: Any) -> None:
        """lazy : command -> (module, function)"""
        super().__init__(*args, **settings)
        self.commands: _Commands = _Commands(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted({*self.commands, *self.commands.places})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now if need be; None if there is none of this name."""
        is_known = cmd_name in self.commands or cmd_name in self.commands.places
        return self.commands[cmd_name] if is_known else None


class _Entry(LazyGroup):
    """Prints errors that the user can correct as one line; any other error keeps its traceback, since it is a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            from stores.errors import CytoError

            if not isinstance(error, CytoError):
                raise
            raise click.ClickException(_one_line(str(error))) from None
        except ModuleNotFoundError as error:
            if not (advice := missing_package(error.name or "")):
                raise
            raise click.ClickException(advice) from None
        except OSError as error:
            if error.errno == errno.ENOENT and _is_folder_gone():
                raise click.ClickException(
                    "the folder that this command was started in was removed or replaced; cd to it, or to another one"
                ) from None
            if error.errno not in _USERS_DISK:
                raise
            place, advice = error.filename or "the output", _USERS_DISK[error.errno]
            raise click.ClickException(f"cannot use {_one_line(str(place))}: {error.strerror}; {advice}") from None
        except KeyboardInterrupt:
            click.echo("\ninterrupted; run the same command again to continue", err=True)
            ctx.exit(130)


class Bridges:
    """What one stage needs of the other: click's context object, imported on first use."""

    @property
    def stage_one(self) -> Any:
        """Images and the backbone, for commands of stage two (`cytosae.stage_one.StageOne`)."""
        import cytocache.bridge

        return cytocache.bridge

    def load_sae(self, sae: Path, device: str) -> Any:
        """An SAE, for commands of stage one (`cytocache.fidelity.Sae`)."""
        from cytosae.sae import load_sae

        return load_sae(sae, device=device)


@click.group(
    cls=_Entry,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(VERSION, message="cyto %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Sparse-autoencoder concepts and barcodes of blood-cell images.

    \b
    images --extract--> activation cache --train--> SAE --encode--> latents --count--> barcodes

    \b
    Example: cyto demo
    """
    context.obj = Bridges()


for _group, (_about, _modules) in GROUPS.items():
    _lazy = {name: (module, f"{_group}_{name}") for name, module in _modules.items()}
    cli.add_command(LazyGroup(_group, help=_about, lazy=_lazy))


def _one_line(text: str) -> str:
    """A message without escape sequences, which names from a damaged file may contain."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def main() -> None:
    """Entry point of the console script."""
    end = _end_without_native_threads()
    bound_threads()
    signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's SIGTERM is treated like Ctrl-C
    for name in ("stores", "cytocache", "cytosae"):  # not Dask's loggers
        logging.getLogger(name).addHandler(_warnings_to_stderr())
    try:
        cli()
    except SystemExit as stop:
        end(stop.code)
        raise
    except BaseException as error:
        end(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


def _end_without_native_threads() -> Callable[[object], None]:
    """End the process directly after all exit handlers of Python; the result sets the exit code.

    While the interpreter is finalised, a native thread that releases a Python object needs the GIL, is ended by Python
    in the middle of C++ code, and aborts the process: exit code 134 after a finished command. Arrow's threads did so
    with tables read from bytes (`stores.tables.parquet_table`), and other libraries have threads, too. The handler is
    registered first, so it runs last; Python has joined its own worker threads by then.
    """
    code: object = None

    def tell(found: object) -> None:
        nonlocal code
        code = found

    def end() -> None:
        status = code if isinstance(code, int) else 0 if code is None else 1
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # as Python does if stdout is closed
                status = status or 120
        os._exit(status)

    atexit.register(end)
    return tell


def _warnings_to_stderr() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    return handler


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


@cli.command("verify")
@click.argument("places", metavar="PATH...", type=FILE, nargs=-1, required=True)
@json_option
def verify_any(places: tuple[Path, ...], as_json: bool) -> None:
    """Check every byte of any folder that cyto has written: caches, SAEs, latents, barcodes, results, an atlas.

    Prints a line per problem; exit code 1 if there is one. Files without a recorded hash (of an older cyto) are named.

    \b
    Example: cyto verify cells.acts.zarr run cells.latents.zarr barcodes concepts comparison
    """
    from stores import verify_folder

    with progress_line("verify", "part") as progress:
        reports = [verify_folder(place, progress=progress) for place in places]
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports], indent=1))
    else:
        for report in reports:
            tell(report)
    damaged = [str(report.root) for report in reports if report.problems]
    if damaged:
        raise click.ClickException(f"damaged: {', '.join(damaged)}")


# Settings with which the demo ends in a minute; chosen on this backbone and these drawn cells (docs/log.md).
_DEMO: dict[str, dict[str, Any]] = {
    "sae": {
        **{"activation": "topk", "k": 8, "expansion": 4, "lr": 1e-3, "warmup_steps": 30},
        **{"batch_tokens": 4096, "tokens": 1_000_000},
    },
    "probe": {"repeats": 1, "permutations": 3, "max_images": 150, "thresholds": [0.01], "c_factors": [0.01]},
}


@cli.command()
@click.option("--out", type=FILE, default=Path("cyto-demo"), show_default=True, help="Folder for everything.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the drawn cells.")
def demo(out: Path, seed: int) -> None:
    """`cyto run` on drawn cells, up to an atlas and a report: no download, one to two minutes on two cores.

    Cells, patients and diseases are invented, and the backbone is untrained: this shows the machinery, not medicine.

    \b
    Example: cyto demo --out cyto-demo
    """
    import cytocache.bridge
    from cytocache.demo_cells import write_demo_images
    from cytosae.commands.run import tell_run
    from cytosae.pipeline import RunConfig
    from stores.destination import claimed
    from stores.devices import resolve_device

    resolve_device("cpu")  # where torch is missing, that is told before anything is begun
    with claimed(out):
        _claim_demo_folder(out, seed)
        write_demo_images(out, seed=seed)
    click.echo(f"{out / 'images.csv'}: drawn cells of 18 invented patients with 3 invented diseases")
    options = [
        f"--set {section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section, of in _DEMO.items()
        for name, value in of.items()
    ]
    click.echo(f"\n$ cyto run {out / 'images.csv'} -o {out} --device cpu {' '.join(options)}")
    tell_run(out / "images.csv", out, RunConfig(settings=_DEMO), stage_one=cytocache.bridge, device="cpu")
    click.echo(
        f"\nLook at:\n"
        f"  {out / 'report.html'}   what went in, what was found, what speaks against it\n"
        f"  {out / 'atlas' / 'index.html'}   every latent, image and patient\n"
        f"  {out / 'patients_by_latents.png'}   which latents tell the patients apart\n"
        f"  {out / 'reference_images.png'}      the cells that a latent answers to, and where in the cell\n"
        f"  {out / 'cells.barcodes' / 'patient.zarr'}   anndata.read_zarr opens it, scanpy takes it\n"
        f"  {out / 'commands.sh'}   the same by hand\n"
        f"Next: cyto run on your own images, README.md\n"
        f"The atlas, for a browser: {(out / 'atlas' / 'index.html').absolute().as_uri()}"
    )


def _claim_demo_folder(out: Path, seed: int) -> None:
    """The demo writes into a folder of its own: a new one, or one that it made with the same seed."""
    from stores.errors import SpecMismatch
    from stores.files import is_dropping, write_json

    marker, claim = out / "demo.json", {"made_by": "cyto demo", "seed": seed}
    if out.is_dir() and not all(is_dropping(path.name) for path in out.iterdir()):
        try:
            found = json.loads(marker.read_text())
        except (OSError, ValueError):
            raise SpecMismatch(f"{out} holds something else; give an empty or new folder with --out") from None
        if found != claim:
            raise SpecMismatch(f"{out} holds a demo with other settings ({found}); give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(marker, claim)


if __name__ == "__main__":
    main()
