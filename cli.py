"""The command line: the only module that knows both stages. A body opens, makes one call, and says what was done.

Heavy imports stand inside the bodies, so `cyto --help` stays quick. Data goes to stdout, progress to stderr; exit code
0 is done, 1 an expected failure in one line, 2 wrong usage, 130 interrupted.
"""

import atexit
import errno
import json
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cyto_machine import VERSION, bound_threads, missing_package, n_cores

if TYPE_CHECKING:
    from distributed import Client

    from cytocache.extract import ExtractResult
    from cytocache.fidelity import Fidelity
    from cytocache.published_datasets import Index
    from cytocache.repair import RepairResult
    from cytosae.barcodes import BarcodeConfig, BarcodeResult
    from cytosae.compare import CompareConfig, Comparison
    from cytosae.evaluate import BackboneSample, Evaluation
    from cytosae.maps import MapResult, Subject
    from cytosae.masks import MaskResult
    from cytosae.patch_maps import PatchQuery
    from cytosae.reference_images import Sources
    from cytosae.selection import Selection, SelectionConfig
    from stores import ActivationSpec, Header, LatentSpec


class _Place(click.Path):
    """A local path; a URL is refused (as a path it would lose a slash and mean a folder here), or taken as it is."""

    def __init__(self, *, urls: bool = False) -> None:
        super().__init__(path_type=Path)
        self.urls = urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" not in str(value):
            return super().convert(value, param, ctx)
        if not self.urls:
            readers = "cache info, sae train, sweep, eval and encode, barcode, and concept neighbours --latents"
            self.fail(f"{value!r} is a URL; only {readers} read from one", param, ctx)
        return str(value)


_FILE = _Place()
_STORE = _Place(urls=True)  # gives a Path, or the URL as a str
_COUNT = click.IntRange(min=1)
_SEED = click.IntRange(min=0, max=2**63 - 1)
_TOKEN_SETS = click.Choice(["all", "patch", "cls"])
# what a user can put right about a place on the disk: full, forbidden, below a file, a name too long
_USERS_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
)


class _Commands(click.Group):
    """Turns what a user can put right into one clean line; anything else keeps its traceback: it is our bug."""

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
            if error.errno not in _USERS_DISK:
                raise
            raise click.ClickException(f"cannot use {error.filename or 'the output'}: {error.strerror}") from None
        except KeyboardInterrupt:
            click.echo("\ninterrupted; run the same command again to continue", err=True)
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, message="cyto %(version)s")
def cli() -> None:
    """Sparse-autoencoder concepts and barcodes of blood-cell images.

    \b
    images --extract--> activation cache --train--> SAE --encode--> latents --count--> barcodes

    \b
    Example: cyto demo
    """


def _one_line(text: str) -> str:
    """A message without what a terminal would obey: names out of a damaged file may hold escape sequences."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def main() -> None:
    """Entry point of the console script."""
    end = _end_without_native_threads()
    bound_threads()
    signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's stop is treated like Ctrl-C
    for name in ("stores", "cytocache", "cytosae"):  # ours only: Dask has much to say
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
    """Have the process end at once when Python has said goodbye to everything, with the code told to the result.

    While the interpreter is taken apart, a thread of Arrow's (or another library's) that lets go of an object of
    Python's wants its lock, is ended by Python in the middle of C++, and aborts the process: exit code 134 after all
    is done, in some of a hundred runs of a busy machine. Registered first, so that it comes after all that others do
    at exit; worker threads of Python's own have been waited for before.
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
            except (OSError, ValueError):  # as Python does where nobody reads any more
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


_device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."
)
_assume_option = click.option(
    "--assume-compatible",
    is_flag=True,
    help="Take an imported SAE, which does not say which tokens it was trained on.",
)
_overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an output of the same kind; the old one stays until the new is complete."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_readers_option = click.option(
    "--workers", type=_COUNT, default=n_cores(), show_default="cores", help="Processes that read images."
)


def _dask_options(command: Any) -> Any:
    """Where a job of Dask tasks runs: a cluster that is there, or one that is started for it."""
    options = (
        click.option(
            "--scheduler",
            help="Address of a running Dask scheduler, tcp://HOST:PORT or tls://HOST:PORT  [default: start one].",
        ),
        click.option("--workers", type=_COUNT, default=n_cores(), show_default="cores", help="Local worker processes."),
        click.option("--memory-limit", default="2GiB", show_default=True, help="Memory limit of each local worker."),
    )
    for option in reversed(options):
        command = option(command)
    return command


# ---------------------------------------------------------------------------------------------------- stage one


@cli.group()
def data() -> None:
    """Stage one: image tables."""


@data.command("index")
@click.argument("source", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, help="The image table to write, a .parquet file.")
@click.option(
    "--dataset",
    type=click.Choice(["mll23", "acevedo", "matek19", "bmc", "aml-hehr", "folder"]),
    default="folder",
    show_default=True,
    help="Whose layout SOURCE has; folder: one sub-folder per class.",
)
@click.option("--class-set", help="Of acevedo: 13 (default), 11 (the paper's) or 10 (DinoBloom's).")
@click.option("--no-hash", is_flag=True, help="Do not read the files to find those that are byte-identical.")
@_overwrite_option
@_json_option
def data_index(
    source: Path, out: Path, dataset: str, class_set: str | None, no_hash: bool, overwrite: bool, as_json: bool
) -> None:
    """One row per image of SOURCE: path, label, patient, disease; and what differs from the published dataset.

    SOURCE is the unpacked dataset, or a folder above it. Nothing in it is moved, changed or deleted.

    \b
    Example: cyto data index PBC_dataset_normal_DIB -o acevedo.parquet --dataset acevedo --class-set 11
    """
    from cytocache.index import make_index

    with _progress("compare", "file") as progress:
        index, was_complete = make_index(
            source,
            out,
            dataset=dataset,
            class_set=class_set,
            compare_files=not no_hash,
            overwrite=overwrite,
            progress=progress,
        )
    _say_done(out, was_complete)
    root = source / index.images.root.relative_to(source.absolute())
    command = ["cyto", "cache", "extract", out, out.with_suffix(".acts.zarr")]
    command += [] if index.images.root == out.absolute().parent else ["--root", root]
    step = shlex.join(str(word) for word in command)
    if as_json:
        click.echo(json.dumps({**_index_json(index), "root": str(root), "table": str(out), "next": step}, indent=1))
    else:
        _print_index(index, root, out)
        click.echo(f"next: {_shown(step)}")


@cli.group()
def cache() -> None:
    """Stage one: activation caches."""


@cache.command("extract")
@click.argument("images", type=_FILE)
@click.argument("store", type=_FILE)
@click.option("--root", type=_FILE, help="What paths in a manifest are relative to [default: the manifest's folder].")
@click.option(
    "--backbone",
    default="random-vit-tiny",
    show_default=True,
    help="dinobloom-s, -b, -l or -g; or random-vit-tiny: small, untrained, needs no download.",
)
@click.option(
    "--weights",
    metavar="FILE|auto|hf:OWNER/NAME|random",
    help="A DinoBloom .pth file; 'auto': the published one, downloaded once and checked; hf:OWNER/NAME[/FILE]"
    "[@REVISION]: the same from Hugging Face; 'random': untrained.",
)
@click.option(
    "--block",
    "blocks",
    type=int,
    multiple=True,
    default=(-2,),
    help="Transformer block whose output is cached  [default: -2, the paper's]. Repeat it for several blocks in one "
    "pass: each gets its own store, STORE/block<k>.zarr.",
)
@_device_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the forward pass; auto: bf16 on a GPU, else fp32.",
)
@click.option("--batch-size", type=_COUNT, help="Images per forward pass  [default: 128 on a GPU, else 32].")
@_readers_option
@click.option("--chunk-images", type=_COUNT, default=256, show_default=True, help="Images per chunk file.")
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    default="0/1",
    help="Write part I of N (I from 0): run N such commands on as many GPUs or nodes, in any order; the last one to "
    "end completes the store.",
)
@_overwrite_option
def cache_extract(
    images: Path,
    store: Path,
    root: Path | None,
    device: str,
    batch_size: int | None,
    shard_text: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Run a backbone once over IMAGES and keep its tokens in STORE.

    IMAGES is a folder (one sub-folder per class), or a .csv or .parquet table with a column `path` and, where known,
    image_id, label, patient, disease, dataset.

    \b
    Example: cyto cache extract cells/ cells.acts.zarr --backbone dinobloom-b --weights DinoBloom-B.pth
    """
    from cytocache.datasets import open_images
    from cytocache.extract import ExtractConfig, extract
    from stores.shards import Shard
    from stores.tables import listed

    shard = Shard.parse(shard_text)
    found = open_images(images, root=root)
    inputs = tuple(Path(path) for path in (images, settings["weights"], found.root) if path and Path(path).exists())
    device = _resolve_device(device)
    batch_size = batch_size or (32 if device == "cpu" else 128)
    config = ExtractConfig(device=device, batch_size=batch_size, **settings)
    with (
        _stopping_gently("the chunk") as stop,
        _progress("download", "byte") as downloading,
        _progress("extract", "image") as progress,
    ):
        done = extract(
            found,
            store,
            config,
            shard=shard,
            overwrite=overwrite,
            inputs=inputs,
            progress=progress,
            download_progress=downloading,
            stop=stop,
        )
    if found.passed_over:
        said = f"{_count(len(found.passed_over), 'folder')} passed over ({listed(list(found.passed_over))})"
        click.echo(f"{said}: hidden, of a network disk or system, or results of Cyto: no cells", err=True)
    if found.n_skipped:
        click.echo(f"{_count(found.n_skipped, 'file')} passed over in {images}: not images by their name", err=True)
    _print_extracted(store, done, str(shard))


def _print_extracted(store: Path, done: "ExtractResult", shard: str) -> None:
    if not done.is_complete:
        click.echo(
            f"{store}: shard {shard} is done, {done.n_readable + done.n_unreadable:,} images; other shards are not. "
            f"The last one completes the store; if all have ended: cyto cache merge {store}"
        )
        return
    for place in done.stores:
        _say_done(place, done.was_complete)
        click.echo(_describe_cache(place))
    if done.n_unreadable:
        click.echo(f"warning: {_unreadable(done.stores[0])}", err=True)


@cache.command("merge")
@click.argument("store", type=_FILE)
def cache_merge(store: Path) -> None:
    """Complete an activation cache whose shards have all ended. The last shard does so itself, unless it was killed.

    \b
    Example: cyto cache merge cells.acts.zarr
    """
    from stores.activation_writer import complete_cache
    from stores.errors import StoreNotFound

    places = sorted(store.glob("block*.zarr")) or [store]
    for place in places:
        if complete_cache(place) is None:
            raise StoreNotFound(f"{place} is being completed by another process at this moment")
        click.echo(_describe_cache(place))


@cache.command("info")
@click.argument("store", type=_STORE)
@_json_option
def cache_info(store: Path | str, as_json: bool) -> None:
    """What is in an activation cache, complete or not. STORE may be a URL (s3://, gs://, https://, ...), if complete.

    \b
    Example: cyto cache info cells.acts.zarr
    """
    from stores import ACTIVATIONS, ActivationStore, read_header, read_runs
    from stores.activation_store import chunks_written, read_spec
    from stores.remote import small_files, store_root

    store = store_root(store) if isinstance(store, str) else store
    is_url = isinstance(store, str)
    with small_files(store) as folder:
        header = read_header(folder, ACTIVATIONS, complete=is_url)
        spec = read_spec(header, folder)
        chunks = chunks_written(folder, spec)
        n_bytes = _size(folder) + (len(chunks) * spec.chunk_bytes if is_url else 0)
        n_written = sum(len(spec.chunk_rows(chunk)) for chunk in chunks)
        info = {**header.to_json(), "n_images_written": n_written, "bytes": n_bytes, "runs": read_runs(folder)}
    if as_json:
        click.echo(json.dumps(info, indent=1))
        return
    title = f"{store}: {header.kind}, version {header.version}, {_state(header.complete)}"
    _print_page(title, _cache_rows(header, spec, info))
    if header.complete:
        _print_groups(ActivationStore(store).images)
        if (header.summary or {}).get("n_unreadable"):
            click.echo(f"  {_unreadable(store)}")


def _cache_rows(header: "Header", spec: "ActivationSpec", info: dict[str, Any]) -> dict[str, str]:
    """The page of `cyto cache info`; of the runs the last five."""
    n_written = info["n_images_written"]
    rows = {
        "images": f"{spec.n_images:,}" + (f" ({n_written:,} written)" if n_written != spec.n_images else ""),
        "tokens": f"{spec.tokens_per_image} per image ({spec.token_layout}), {spec.width} channels, float16",
        "backbone": f"{spec.backbone}, {'trained' if spec.trained else 'UNTRAINED (seeded random weights)'}",
        "block": f"{spec.block} of 0..{spec.n_blocks - 1}, {spec.precision}",
        "weights": f"sha256 {spec.weights_sha256}",
        "transform": f"{spec.transform['size']} px, {spec.transform['interpolation']}, "
        f"mean {spec.transform.get('mean')}, std {spec.transform.get('std')}",
        "chunks": f"{spec.n_chunks:,} of {spec.chunk_images} images",
        "size": f"{info['bytes'] / 1e6:,.1f} MB",
        "identity": header.identity,
        "written by": header.created_by,
    }
    for number, run in enumerate(info["runs"], start=1):
        if number > len(info["runs"]) - 5:
            rows[f"run {number}"] = _describe_run(run)
    return rows


@cache.command("verify")
@click.argument("store", type=_FILE)
@_json_option
def cache_verify(store: Path, as_json: bool) -> None:
    """Check every chunk of an activation cache byte by byte, its journal and its image table.

    Exit code 1 and a line per problem if it is damaged.

    \b
    Example: cyto cache verify cells.acts.zarr
    """
    from stores import verify_activations
    from stores.activation_store import read_spec
    from stores.spec import ACTIVATIONS, read_header

    n_chunks = read_spec(read_header(store, ACTIVATIONS), store).n_chunks
    _verify(store, verify_activations(store), n_chunks, as_json)


@cache.command("repair")
@click.argument("store", type=_FILE)
@click.option("--images", type=_FILE, help="What STORE was made from; needed if its own image table is damaged.")
@click.option("--root", type=_FILE, help="Where the images lie now  [default: where they lay].")
@click.option("--weights", help="The file of weights that STORE was made with; an untrained backbone needs none.")
@_device_option
@click.option("--batch-size", type=_COUNT, help="Images per forward pass  [default: as STORE was made].")
@_readers_option
def cache_repair(store: Path, images: Path | None, root: Path | None, device: str, **settings: Any) -> None:
    """Verify STORE, and make just its damaged chunks again, from the same images with the same weights.

    \b
    Example: cyto cache repair cells.acts.zarr --weights DinoBloom-B.pth
    """
    from cytocache.datasets import open_images
    from cytocache.repair import repair

    found = open_images(images, root=root) if images else None
    with (
        _stopping_gently("the chunk") as stop,
        _progress("verify", "chunk") as verifying,
        _progress("download", "byte") as downloading,
        _progress("repair", "image") as progress,
    ):
        done = repair(
            store,
            images=found,
            root=root,
            device=_resolve_device(device),
            verify_progress=verifying,
            progress=progress,
            download_progress=downloading,
            stop=stop,
            **settings,
        )
    _print_repaired(store, done)


def _print_repaired(store: Path, done: "RepairResult") -> None:
    for problem in done.problems:
        click.echo(f"was: {problem}")
    if not done.problems and not done.chunks:
        click.echo(f"{store}: whole; nothing to repair")
        return
    click.echo(f"{store}: repaired; {_count(len(done.chunks), 'chunk')} made again")
    if done.other_bits:
        click.echo(
            f"warning: {len(done.other_bits):,} of them differ in the last bits from what was there (another device, "
            f"version, thread count or batch size): SAEs trained on this cache before name other numbers",
            err=True,
        )
    if done.other_images:
        click.echo("warning: other image files are there, or can be read, than when the cache was made", err=True)


@cache.command("fidelity")
@click.argument("store", type=_FILE)
@click.option("--root", type=_FILE, help="Where the images lie now  [default: where they lay].")
@click.option("--weights", help="The file of weights that STORE was made with; an untrained backbone needs none.")
@click.option("--sae", "run", type=_FILE, help="An SAE: count the latents that cross zero or tau.")
@click.option("--tau", type=float, default=0.2, show_default=True, help="Threshold of activity, with --sae.")
@click.option("--sample", "n_images", type=_COUNT, default=64, show_default=True, help="Images to compare.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the sample.")
@_assume_option
@_device_option
@_readers_option
@_json_option
def cache_fidelity(
    store: Path, run: Path | None, assume_compatible: bool, device: str, as_json: bool, **settings: Any
) -> None:
    """What float16 and the precision of the forward pass cost: STORE against float32 tokens of a sample of its images.

    \b
    Example: cyto cache fidelity cells.acts.zarr --weights DinoBloom-B.pth --sae cells.sae
    """
    import math
    from dataclasses import asdict

    from cytocache.fidelity import measure_fidelity

    device = _resolve_device(device)
    latents, assumed = _encoder(run, store, device, assume_compatible) if run else (None, None)
    with _progress("download", "byte") as downloading, _progress("fidelity", "image") as progress:
        found = measure_fidelity(
            store, device=device, latents=latents, progress=progress, download_progress=downloading, **settings
        )
    if as_json:
        values = {name: None if math.isnan(value) else value for name, value in asdict(found).items()}
        facts = {} if assumed is None else {"assumed_equal": assumed}
        click.echo(json.dumps({"store": str(store), "tau": settings["tau"], **facts, **values}, indent=1))
    else:
        rows = _fidelity_rows(found, seed=settings["seed"], tau=settings["tau"] if run else None)
        _print_page(f"{store}: cached float16 against float32", rows)


def _encoder(run: Path, store: Path, device: str, assume_compatible: bool) -> tuple[Any, list[str]]:
    """What turns the tokens of a cache into latents, and what had to be assumed of them."""
    from cytosae.checkpoint import load_sae
    from stores import ActivationStore

    sae = load_sae(run, device=device)
    spec = ActivationStore(store).spec
    return sae.model.encode, sae.require_tokens(spec, f"the cache {store}", assume_compatible=assume_compatible)


def _fidelity_rows(found: "Fidelity", *, seed: int, tau: float | None) -> dict[str, str]:
    rows = {
        "sample": f"{found.n_images:,} images, {found.n_tokens:,} tokens (seed {seed})",
        "FVU": f"{found.fvu:.2e} of the float32 tokens' variance is lost; of CLS alone "
        f"{f'{found.fvu_cls:.2e}' if found.fvu_cls == found.fvu_cls else 'n/a (it does not vary)'}",
        "magnitude": f"largest {found.largest_magnitude:.4g}; largest difference {found.largest_difference:.3g}",
    }
    if tau is not None:
        crossing = _rate(found.n_cross_zero, found.n_active), _rate(found.n_cross_tau, found.n_above_tau)
        rows["latents"] = f"{found.n_active:,} are active in float32; {found.n_cross_zero:,} cross zero ({crossing[0]})"
        rows["tau"] = f"{found.n_above_tau:,} exceed {tau:g}; {found.n_cross_tau:,} cross it ({crossing[1]})"
    return rows


# ---------------------------------------------------------------------------------------------------- stage two


@cli.group()
def sae() -> None:
    """Stage two: sparse autoencoders."""


@sae.command("train")
@click.argument("stores", type=_STORE, nargs=-1, required=True)
@click.option("-o", "--out", "run", type=_FILE, required=True, help="Folder of the run.")
@click.option(
    "--preset", type=click.Choice(["cytosae", "paper"]), help="cytosae (the released run) or paper (Eq. 1 as printed)."
)
@click.option("--config", "config_file", type=_FILE, help="TOML file with settings; options win over it.")
@click.option("--expansion", type=int, help="Latents per channel  [default: 64].")
@click.option(
    "--activation",
    type=click.Choice(["relu", "topk", "batchtopk", "jumprelu", "gated"]),
    help="What makes a latent active  [default: relu].",
)
@click.option("--k", type=_COUNT, help="Active latents per token, of topk and batchtopk.")
@click.option("--l1", type=float, help="Weight of the sparsity term  [default: 8e-5].")
@click.option("--lr", type=float, help="Learning rate of Adam  [default: 4e-4].")
@click.option("--warmup-steps", type=int, help="Steps of linear warm-up  [default: 500].")
@click.option(
    "--schedule", type=click.Choice(["constant", "cosine", "linear"]), help="Afterwards  [default: constant]."
)
@click.option("--batch-tokens", type=int, help="Tokens per step  [default: 16448, which is 64 images].")
@click.option("--tokens", type=int, help="Budget in tokens  [default: 257000000].")
@click.option("--epochs", type=float, help="Budget in passes over the caches, instead of --tokens.")
@click.option("--token-set", type=_TOKEN_SETS, help="Which tokens are trained on  [default: all].")
@click.option("--mix", type=float, multiple=True, help="Share of the tokens that a cache gives, once for each STORE.")
@click.option("--exclude", type=_FILE, help="Parquet or text file with ids of images to leave out.")
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
@click.option("--seed", type=_SEED, help="Seed of weights and order  [default: 0].")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Of products: bf16 on a GPU  [default: fp32].")
@_device_option
@click.option("--checkpoint-every", type=_COUNT, default=500, show_default=True, help="Steps between two saved states.")
@click.option("--keep-states", type=_COUNT, default=2, show_default=True, help="Saved states that stay.")
@click.option("--logger", type=click.Choice(["tensorboard", "wandb"]), help="Also send the metrics there.")
@_overwrite_option
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
    from cytosae.config import make_config
    from cytosae.train import train
    from stores import find_header, read_image_ids

    options = {name: value for name, value in options.items() if value not in (None, ())}
    _take_ghost(options, ghost)
    config = make_config(preset=preset, config_file=config_file, options=options)
    if config.warning:
        click.echo(f"warning: {config.warning}", err=True)
    before = find_header(run)
    with _progress("train", "token") as progress:
        header = train(
            stores,
            run,
            config,
            exclude=read_image_ids(exclude) if exclude else (),
            device=_resolve_device(device),
            checkpoint_every=checkpoint_every,
            keep_states=keep_states,
            overwrite=overwrite,
            inputs=tuple(path for path in (config_file, exclude) if path),
            logger=logger,
            progress=lambda done, total, metrics: progress(done, total, _training_line(metrics)),
        )
    if os.environ.get("RANK", "0") != "0":  # of several processes, which torchrun numbers, the first one speaks
        return
    _say_done(run, before is not None and before.complete and not overwrite)
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
    click.echo(_training_line(summary["final"]))
    if "held_out" in summary:
        click.echo(f"held out: {_held_out_line(summary['held_out'])}")


@sae.command("sweep")
@click.argument("grid", type=_FILE)
@click.argument("stores", type=_STORE, nargs=-1, required=True)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of the sweep: SAEs in runs/, tables, a figure.")
@click.option(
    "--at-once",
    type=click.IntRange(1, 256),
    help="SAEs in one pass over the data  [default: as many as fit in half of the free memory].",
)
@click.option("--exclude", type=_FILE, help="Parquet or text file with ids of images to leave out.")
@_device_option
@click.option("--checkpoint-every", type=_COUNT, default=500, show_default=True, help="Steps between two saved states.")
@click.option("--keep-states", type=_COUNT, default=2, show_default=True, help="Saved states of an SAE that stay.")
@_json_option
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

    with _progress("sweep", "token") as progress:
        done = sweep(
            grid,
            stores,
            out,
            exclude=read_image_ids(exclude) if exclude else (),
            device=_resolve_device(device),
            say=lambda line: click.echo(line, err=True),
            progress=progress,
            **settings,
        )
    _say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps({"sweep": str(out), "members": done.members, "table": done.table}, indent=1))
    else:
        click.echo(done.markdown, nl=False)
        click.echo(f"\n{out}: {len(done.members):,} SAEs in runs/, tables, sweep.png", err=True)
    if done.failed:
        names = listed([f"{row['name']} at step {row['failed_at_step']:,}" for row in done.failed])
        click.echo(f"warning: {len(done.failed):,} of {len(done.members):,} SAEs failed: {names}", err=True)


@sae.command("info")
@click.argument("run", type=_FILE)
@_json_option
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
    _print_page(f"{run}: {header.kind}, version {header.version}, {_state(header.complete)}", rows)


def _trained_rows(header: "Header") -> dict[str, str]:
    """The page of `cyto sae info`."""
    spec, summary, config = header.spec, header.summary or {}, header.spec["config"]
    return {
        "latents": f"{spec['n_latents']:,} ({_activation(spec)}) on tokens of width {spec['width']}",
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
        "last batch": _training_line(summary["final"]) if summary else "(not finished)",
        **({"held out": _held_out_line(summary["held_out"])} if "held_out" in summary else {}),
        "identity": header.identity,
    }


@sae.command("eval")
@click.argument("run", type=_FILE)
@click.argument("store", type=_STORE)
@click.option("--token-set", type=_TOKEN_SETS, help="Tokens that count  [default: what RUN was trained on].")
@click.option(
    "--dead-window",
    type=_COUNT,
    help="Dead latents are also counted over the last so many tokens  [default: 1052672].",
)
@click.option(
    "--only", type=_FILE, help="Parquet or text file with ids of images to measure on, such as RUN/held_out.parquet."
)
@click.option(
    "--images", type=_FILE, help="Where the images lie: measure what a reconstruction does to the final CLS embedding."
)
@click.option(
    "--weights", help="With --images: the weights that STORE was made with; an untrained backbone needs none."
)
@click.option("--sample", "n_images", type=_COUNT, default=64, show_default=True, help="With --images: how many.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="With --images: seed of the sample.")
@_device_option
@_readers_option
@_assume_option
@click.option("--per-latent", is_flag=True, help="With --json: also the two counts of every latent.")
@_json_option
def sae_eval(
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
    from cytosae.evaluate import DEAD_WINDOW, evaluate
    from stores import read_image_ids

    if sampling["weights"] and not images:
        raise click.UsageError("--weights is of use only with --images, which says where the images lie")
    device = _resolve_device(device)
    with _progress("decoder", "block") as comparing, _progress("evaluate", "image") as progress:
        found = evaluate(
            store,
            run,
            token_set=token_set,
            dead_window=dead_window or DEAD_WINDOW,
            only=read_image_ids(only) if only else None,
            sample=_backbone_sample(store, images, device=device, **sampling) if images else None,
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


def _backbone_sample(
    store: Path | str, root: Path, *, device: str, weights: str | None, n_images: int, seed: int, workers: int
) -> "BackboneSample":
    """What stage two cannot make: images of STORE at its block, read when they are asked for, and the way on."""
    from cytocache.sample import draw_sample, load_backbone_of, read_sample
    from cytosae.evaluate import BackboneSample
    from stores import ActivationStore

    cache = ActivationStore(store)
    with _progress("download", "byte") as downloading:
        backbone = load_backbone_of(cache, weights=weights, device=device, keep_tail=True, progress=downloading)

    def outputs() -> Iterator[Any]:
        rows = draw_sample(cache, n_images=n_images, seed=seed)
        with _progress("sample", "image") as progress:
            yield from read_sample(
                cache,
                rows,
                backbone,
                root=root,
                device=device,
                workers=workers,
                root_option="--images",
                progress=progress,
            )

    return BackboneSample(outputs=outputs(), final_cls=backbone.final_cls, seed=seed)


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
    _print_page(title, rows)
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


@sae.command("import")
@click.argument("file", type=_FILE)
@click.option("-o", "--out", "run", type=_FILE, required=True, help="Folder of the run.")
@_overwrite_option
def sae_import(file: Path, run: Path, overwrite: bool) -> None:
    """Take over an SAE of another program (CytoSAE, PatchSAE, SAELens).

    FILE is a .pt of CytoSAE or PatchSAE, or a SAELens folder; nothing in it is executed. Which tokens it was trained
    on stays unknown: cyto sae encode, sae eval and cache fidelity ask for --assume-compatible. SAELens'
    architectures standard, topk, jumprelu and gated are taken, of the others relu.

    \b
    Example: cyto sae import final_sparse_autoencoder_dinov2_vitb14_-2_resid_49152.pt -o released.sae
    """
    from cytosae.interop import import_sae

    header, was_complete = import_sae(file, run, overwrite=overwrite)
    _say_done(run, was_complete)
    spec = header.spec
    click.echo(
        f"{run}: {spec['n_latents']:,} latents ({_activation(spec)}) on tokens of width {spec['width']}, "
        f"from {spec['imported']['format']}"
    )
    for note in (header.summary or {})["notes"]:
        click.echo(f"  {note}")
    click.echo("  which tokens it was trained on is not known: say --assume-compatible where it is used")


@sae.command("export")
@click.argument("run", type=_FILE)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["cytosae", "saelens"]),
    required=True,
    help="cytosae: one .pt, which PyTorch loads with weights_only; saelens: a folder.",
)
@click.option("-o", "--out", type=_FILE, required=True, help="The file or folder to write; nothing is replaced.")
def sae_export(run: Path, layout: str, out: Path) -> None:
    """Write the SAE in RUN as CytoSAE (relu only) or SAELens stores it. Latents and reconstruction stay the same.

    batchtopk becomes what SAELens makes of it: jumprelu with one threshold for all.

    \b
    Example: cyto sae export cells.sae --format saelens -o cells.saelens
    """
    from cytosae.interop import export_sae

    _say_done(out, export_sae(run, out, format=layout))
    n_bytes = _size(out) if out.is_dir() else out.stat().st_size
    click.echo(f"{out}: {run} in the {layout} layout, {n_bytes / 1e6:,.1f} MB")


@sae.command("encode")
@click.argument("store", type=_STORE)
@click.argument("run", type=_FILE)
@click.option("-o", "--out", "latents", type=_FILE, required=True, help="The latent store to write.")
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
@_assume_option
@_device_option
@_overwrite_option
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
    from cytosae.encode import encode
    from stores.shards import Shard

    shard = Shard.parse(shard_text)
    with _progress("encode", "image") as progress:
        done = encode(store, run, latents, device=_resolve_device(device), shard=shard, progress=progress, **settings)
    if not done.is_complete:
        click.echo(
            f"{latents}: shard {shard} is done, {done.n_readable:,} readable images; other shards are not, or are "
            f"being joined. The last one completes the store; if all have ended: cyto latents merge {latents}"
        )
        return
    _say_done(latents, done.was_complete)
    click.echo(_describe_latents(latents))


def _activation(spec: dict[str, Any]) -> str:
    """`topk, k 32`"""
    return f"{spec['activation']}, k {spec['k']}" if spec.get("k") else str(spec["activation"])


def _imported_rows(header: "Header") -> dict[str, str]:
    spec, summary = header.spec, header.summary or {}
    says = summary.get("says", {})
    names = ("model_name", "block_layer", "module_name", "class_token", "hook_name", "dataset_path", "l1_coefficient")
    metadata = says.get("metadata")
    claims = {**(metadata if isinstance(metadata, dict) else {}), **says}
    shown = [f"{name} {_shown(str(claims[name]))}" for name in names if claims.get(name) is not None]
    return {
        "latents": f"{spec['n_latents']:,} ({_activation(spec)}) on tokens of width {spec['width']}",
        "imported": f"from {spec['imported']['format']}, sha256 {spec['imported']['files']['weights']}",
        "tokens": f"not known: {', '.join(name for name, value in spec['tokens'].items() if value is None)}",
        "says": ", ".join(shown) or "nothing of where it comes from",
        "notes": "; ".join(summary.get("notes", [])) or "none",
        "weights": f"sha256 {summary.get('sae_sha256', '(not finished)')}",
        "identity": header.identity,
    }


@cli.group()
def latents() -> None:
    """Latent stores."""


@latents.command("info")
@click.argument("store", type=_FILE)
@_json_option
def latents_info(store: Path, as_json: bool) -> None:
    """What is in a latent store, complete or not.

    \b
    Example: cyto latents info cells.latents.zarr
    """
    from stores import LATENTS, LatentStore, read_header, read_runs
    from stores.latent_parts import missing_images
    from stores.latent_store import read_latent_spec

    header = read_header(store, LATENTS, complete=False)
    missing = [] if header.complete else missing_images(store, read_latent_spec(header, store))
    n_bytes = _size(store)
    if as_json:
        facts = {"n_images_missing": sum(map(len, missing)), "bytes": n_bytes, "runs": read_runs(store)}
        click.echo(json.dumps({**header.to_json(), **facts}, indent=1))
        return
    rows = _latent_rows(header, read_latent_spec(header, store), n_bytes)
    if header.complete:
        latents = LatentStore(store)
        rows["nonzeros"] = (
            f"{latents.nnz:,} ({latents.nnz / max(1, latents.n_readable_tokens):.1f} per token of a readable image, "
            f"{n_bytes / max(1, latents.nnz):.2f} bytes each)"
        )
    else:
        rows["missing"] = ", ".join(f"images {some.start:,} to {some.stop - 1:,}" for some in missing) or "nothing"
    _print_page(f"{store}: {header.kind}, version {header.version}, {_state(header.complete)}", rows)


def _latent_rows(header: "Header", spec: "LatentSpec", n_bytes: int) -> dict[str, str]:
    return {
        "images": f"{spec.n_images:,} x {spec.tokens_per_image} tokens",
        "latents": f"{spec.n_latents:,}, encoded in {spec.precision}",
        "nonzeros": "(not finished)",
        "values": f"float32, {spec.value_bits} mantissa bits, " + _pruning(spec.min_activation, header.summary or {}),
        "SAE": f"sha256 {spec.sae_sha256}",
        "cache": f"{spec.cache['backbone']}{'' if spec.cache['trained'] else ' (UNTRAINED)'}, "
        f"block {spec.cache['block']}, sha256 {spec.cache_sha256}",
        "size": f"{n_bytes / 1e6:,.1f} MB",
        "identity": header.identity,
        "written by": header.created_by,
    }


@latents.command("verify")
@click.argument("store", type=_FILE)
@_json_option
def latents_verify(store: Path, as_json: bool) -> None:
    """Check every chunk file by its checksum, and every index and value, of a latent store.

    Exit code 1 and a line per problem if it is damaged.

    \b
    Example: cyto latents verify cells.latents.zarr
    """
    from stores import LATENTS, read_header, verify_latents
    from stores.latent_store import read_latent_spec

    n_blocks = -(-read_latent_spec(read_header(store, LATENTS), store).n_images // 256)
    _verify(store, verify_latents(store, block_images=256), n_blocks, as_json)


@latents.command("merge")
@click.argument("store", type=_FILE)
def latents_merge(store: Path) -> None:
    """Complete a latent store whose shards have all ended. The last shard does so itself, unless it was killed.

    No GPU, no SAE and no cache is needed: the rows are there, and are only joined.

    \b
    Example: cyto latents merge cells.latents.zarr
    """
    from stores.errors import StoreNotFound
    from stores.latent_parts import complete_latents

    with _progress("join", "image") as progress:
        header = complete_latents(store, progress=progress)
    if header is None:
        raise StoreNotFound(f"{store} is being completed by another process at this moment")
    click.echo(_describe_latents(store))


@cli.command("verify")
@click.argument("places", metavar="PATH...", type=_FILE, nargs=-1, required=True)
@_json_option
def verify_any(places: tuple[Path, ...], as_json: bool) -> None:
    """Check every byte of any folder that cyto has written: caches, SAEs, latents, barcodes, results, an atlas.

    A line per problem, and exit code 1 if there is one. Files of which an older cyto recorded no hash are named.

    \b
    Example: cyto verify cells.acts.zarr run cells.latents.zarr barcodes concepts comparison
    """
    from stores.verify_any import verify

    with _progress("verify", "part") as progress:
        reports = [verify(place, progress=progress) for place in places]
    if as_json:
        found = [{**vars(report), "root": str(report.root), "ok": not report.problems} for report in reports]
        click.echo(json.dumps(found, indent=1))
    for report in [] if as_json else reports:
        for problem in report.problems:
            click.echo(problem)
        if report.unrecorded:
            click.echo(f"{report.root}: no hash recorded, so not checked: {', '.join(report.unrecorded)}")
        if not report.problems:
            click.echo(f"{report.root}: {'no damage found' if report.unrecorded else 'whole'} ({report.kind})")
    damaged = [str(report.root) for report in reports if report.problems]
    if damaged:
        raise click.ClickException(f"damaged: {', '.join(damaged)}")


@click.command("export")
@click.argument("barcodes", type=_FILE)
@click.option("--h5ad", "out", type=_FILE, required=True, help="The file to write, .h5ad.")
@click.option(
    "--level",
    type=click.Choice(["image", "patient", "disease"]),
    default="image",
    show_default=True,
    help="Whose barcodes.",
)
@click.option("--tau", type=float, help="Which barcodes, where there are several tau.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the two maps.")
@_overwrite_option
def barcode_export(barcodes: Path, out: Path, level: str, tau: float | None, seed: int, overwrite: bool) -> None:
    """BARCODES as one .h5ad file for cellxgene and the like: texts as categories, X_pca, and X_umap (with umap-learn).

    \b
    Example: cyto barcode export cells.barcodes --h5ad cells.h5ad
    """
    from cytosae.barcode_export import export_h5ad

    done = export_h5ad(barcodes, out, level=level, tau=tau, seed=seed, overwrite=overwrite)
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
    for line in done.lines():
        click.echo(_shown(line))


class _Barcode(click.Command):
    """`cyto barcode LATENTS...` counts; `cyto barcode export` is a command of its own."""

    commands = {"export": barcode_export}  # noqa: RUF012  # as a group has them, for the reference

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and (command := self.commands.get(args[0])):
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


@cli.command(cls=_Barcode)
@click.argument("latents", type=_STORE, nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    "barcodes",
    type=_FILE,
    required=True,
    help="Folder of the barcodes; with --scheduler on a file system that all workers share.",
)
@click.option(
    "--tau",
    "taus",
    type=float,
    multiple=True,
    default=(0.2,),
    help="A latent is active above this value (strictly)  [default: 0.2]. Repeat it for several in one pass: each gets "
    "its own stores, image_tau0.2.zarr and so on.",
)
@click.option("--token-set", type=_TOKEN_SETS, default="all", show_default=True, help="Tokens that count.")
@click.option(
    "--normalize",
    type=click.Choice(["images", "cytosae-release"]),
    default="images",
    show_default=True,
    help="images: mean over a patient's readable images; cytosae-release: the released divisor.",
)
@click.option(
    "--table",
    type=_FILE,
    help="CSV or Parquet with image_id and patient, disease, label, ...: groups by these instead.",
)
@_dask_options
@_overwrite_option
def barcode(
    latents: tuple[Path | str, ...],
    barcodes: Path,
    taus: tuple[float, ...],
    table: Path | None,
    scheduler: str | None,
    workers: int,
    memory_limit: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Image, patient and disease barcodes from the stored latents (paths or URLs) of one or more datasets.

    Patients of two datasets are two people, even if they have the same name. `cyto barcode export` writes barcodes as
    one .h5ad file.

    \b
    Example: cyto barcode cells.latents.zarr -o cells.barcodes --tau 0.2
    """
    from cytosae.barcodes import BarcodeConfig, write_barcodes

    config = BarcodeConfig(tau=taus if len(taus) > 1 else taus[0], **settings)
    with _dask_client(scheduler, workers, memory_limit) as client, _progress("barcode", "image") as progress:
        done = write_barcodes(
            latents, barcodes, config, client=client, table=table, overwrite=overwrite, progress=progress
        )
    _say_done(barcodes, done.was_complete)
    _print_barcodes(barcodes, config, done, table)


def _print_barcodes(barcodes: Path, config: "BarcodeConfig", done: "BarcodeResult", table: Path | None) -> None:
    click.echo(
        f"{barcodes}: {_count(done.n_images, 'image')}, {_count(done.n_patients, 'patient')}, "
        f"{_count(done.n_diseases, 'disease')}, {done.n_latents:,} latents, "
        f"tau {', '.join(f'{tau:g}' for tau in config.taus)}"
    )
    left_out = {
        "unreadable images": done.n_unreadable,
        "images without a patient (image barcodes only)": done.n_without_patient,
        "patients without a readable image": done.n_patients_unreadable,
        "patients without a disease (no disease barcode)": done.n_patients_without_disease,
    }
    _print_left_out(left_out)
    _print_join(done, table)
    for tau, share, n_silent in zip(config.taus, done.share_above_tau, done.n_silent_latents, strict=True):
        which = "tau" if len(config.taus) == 1 else f"tau {tau:g}"
        click.echo(f"{share:.1%} of the nonzeros exceed {which}; {n_silent:,} of {done.n_latents:,} latents never do")
        if n_silent == done.n_latents:
            click.echo(f"warning: no latent exceeds tau {tau:g} anywhere: every barcode is empty", err=True)
        elif share < 0.01:
            click.echo(
                f"warning: almost nothing exceeds tau {tau:g}. 0.2 belongs to the released SAE and means nothing "
                f"for another: choose a smaller --tau",
                err=True,
            )


def _print_left_out(left_out: dict[str, int]) -> None:
    for what, number in left_out.items():
        if number:
            click.echo(f"left out: {_left_out(number, what)}")


def _left_out(number: int, what: str) -> str:
    """`1 image without a patient`, of what in the plural: its first noun."""
    one = re.sub(r"\b(image|patient|mask)s\b", r"\1", what, count=1)
    return f"{number:,} {_shown(one if number == 1 else what)}"


def _print_join(done: Any, table: Path | None) -> None:
    """How several stores, and a table given beside them, fit together."""
    if done.differences:
        click.echo(f"the stores were made differently: {done.differences}")
    if done.n_missing_in_table:
        click.echo(f"{_count(done.n_missing_in_table, 'image')} without a row in {table}: {done.missing_in_table}")
    if done.n_unknown_in_table:
        click.echo(f"{_count(done.n_unknown_in_table, 'row')} of {table} for no image here: {done.unknown_in_table}")


# --------------------------------------------------------------------------------------------------- the science


@cli.group()
def concept() -> None:
    """Concepts: what single latents answer to, in numbers and pictures."""


@concept.command("stats")
@click.argument("latents", type=_STORE, nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    "concepts",
    type=_FILE,
    required=True,
    help="Folder of the concepts; with --scheduler on a file system that all workers share.",
)
@click.option("--token-set", type=_TOKEN_SETS, default="all", show_default=True, help="Tokens that count.")
@click.option("--top-k", type=_COUNT, default=10, show_default=True, help="Images kept of a latent, in each dataset.")
@click.option(
    "--label",
    type=click.Choice(["label", "label_common"]),
    default="label",
    show_default=True,
    help="Column of the image table that entropies are of.",
)
@click.option(
    "--min-support", type=_COUNT, default=5, show_default=True, help="Fewest labelled top images that give an entropy."
)
@click.option(
    "--shuffles",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Of the labels, for the entropy that chance would give.",
)
@click.option(
    "--patient-shuffles",
    type=click.IntRange(min=0),
    default=999,
    show_default=True,
    help="Of the labels from patient to patient, for the p of an entropy.",
)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the shuffles.")
@click.option(
    "--table",
    type=_FILE,
    help="CSV or Parquet with image_id and dataset, label, label_common: groups by these instead.",
)
@_dask_options
@_overwrite_option
def concept_stats(
    latents: tuple[Path | str, ...],
    concepts: Path,
    table: Path | None,
    scheduler: str | None,
    workers: int,
    memory_limit: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Statistics of every latent in every dataset: frequency, mean activation, top images and their labels.

    LATENTS are the stored latents (paths or URLs) of one SAE. Also draws the paper's Fig. 2A, and says whether latents
    answer to the same cell type in different datasets.

    \b
    Example: cyto concept stats cells.latents.zarr -o cells.concepts
    """
    from cytosae.concepts import ConceptConfig, write_concepts

    config = ConceptConfig(**settings)
    with _dask_client(scheduler, workers, memory_limit) as client, _progress("concepts", "image") as progress:
        done = write_concepts(
            latents, concepts, config, client=client, table=table, overwrite=overwrite, progress=progress
        )
    _say_done(concepts, done.was_complete)
    click.echo(f"{concepts}: {done.n_latents:,} latents, token set {config.token_set}")
    for found in done.by_dataset:
        _print_dataset(found, config.label)
    for pair in done.agreement:
        _print_agreement(pair)
    _print_left_out({"images without a dataset": done.n_without_dataset})
    _print_join(done, table)
    if done.warning:
        click.echo(f"warning: {done.warning}", err=True)


@concept.command("top")
@click.argument("concepts", type=_FILE)
@click.argument("latent", type=click.IntRange(min=0))
@click.option("--dataset", help="Only this dataset  [default: all].")
@_json_option
def concept_top(concepts: Path, latent: int, dataset: str | None, as_json: bool) -> None:
    """One latent: its statistics, and the images with the largest activation, in each dataset.

    \b
    Example: cyto concept top cells.concepts 1412
    """
    from stores import ConceptStore

    store = ConceptStore(concepts)
    top = store.top_images(latent, dataset).to_pylist()
    names = [dataset] if dataset else store.datasets
    pages = [
        {
            **store.latents(name).slice(latent, 1).to_pylist()[0],
            "top_images": [row for row in top if row["dataset"] == name],
        }
        for name in names
    ]
    if as_json:
        click.echo(json.dumps({"concepts": str(concepts), "latent": latent, "by_dataset": pages}, indent=1))
        return
    for page in pages:
        _print_latent(page)


@concept.command("thresholds")
@click.argument("concepts", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of the table and the figures.")
@click.option("--dataset", help="Only this dataset  [default: all].")
@_overwrite_option
@_json_option
def concept_thresholds(
    concepts: tuple[Path, ...], out: Path, dataset: str | None, overwrite: bool, as_json: bool
) -> None:
    """How many latents lie above a mean activation, for several SAEs side by side: the paper's Fig. 2A.

    CONCEPTS are folders of cyto concept stats, such as one for each width.

    \b
    Example: cyto concept thresholds narrow.concepts wide.concepts -o widths
    """
    from cytosae.concept_thresholds import LOG10_THRESHOLDS, compare_thresholds

    found, was_complete = compare_thresholds(concepts, out, dataset=dataset, overwrite=overwrite)
    _say_done(out, was_complete)
    if as_json:
        rows = [vars(each) for each in found]
        click.echo(json.dumps({"log10_thresholds": LOG10_THRESHOLDS, "counts": rows}, indent=1))
        return
    names = [f"{_shown(each.concepts)} {_shown(each.dataset)}" for each in found]
    width = max(map(len, names))
    click.echo(f"latents with a mean activation above 10 to the\n{'':<{width}} " + _cells(LOG10_THRESHOLDS))
    for name, each in zip(names, found, strict=True):
        click.echo(f"{name:<{width}} " + _cells(f"{n:,}" for n in each.n_above))
    click.echo(f"table and figures in {out}")


@cli.command("compare")
@click.argument("barcodes", type=_FILE)
@click.argument("a")
@click.argument("b")
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of the comparison.")
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--permutations",
    "n_permutations",
    type=_COUNT,
    default=10_000,
    show_default=True,
    help="Of the diseases among the patients; where there are no more ways than that, each is taken once.",
)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of permutations and bootstraps.")
@click.option("--top", type=_COUNT, default=50, show_default=True, help="Latents of each top list.")
@click.option(
    "--min-patients",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Test only latents above 0 in so many patients of both groups together.",
)
@click.option(
    "--min-mean",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Test only latents whose mean barcode over the patients of both groups is so large.",
)
@click.option(
    "--latents", type=_FILE, help="Test only those in the column `latent` of this CSV or Parquet, made on other data."
)
@click.option(
    "--bootstraps",
    "n_bootstraps",
    type=click.IntRange(min=0),
    default=1_000,
    show_default=True,
    help="How often patients are drawn anew, to see which latents stay in the top lists.",
)
@click.option(
    "--images-per-patient",
    metavar="N|all|auto",
    default="auto",
    show_default=True,
    help="Thin every patient to so many images, for p, g and AUC; auto: if the groups' medians differ by a quarter.",
)
@click.option("--strata", metavar="COLUMN", help="Of the image table: permute patients within its values only.")
@click.option(
    "--adjust", metavar="COLUMN", multiple=True, help="Of the image table, numbers or categories; may repeat."
)
@click.option("--within-label", metavar="LABEL", help="Count only images with this label.")
@click.option(
    "--standardize", metavar="COLUMN", help="Average each patient's means per label (`label`) with the same weights."
)
@_overwrite_option
@_json_option
def compare_diseases(
    barcodes: Path, out: Path, latents: Path | None, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Which latents differ between the patients of diseases A and B, by how much, and by more than chance?

    A and B are spelled as in disease.zarr; B may be `rest`: all other diseases. The unit is the patient. What the
    columns and figures mean: docs/compare.md.

    \b
    Example: cyto compare cells.barcodes CBFB::MYH11 PML::RARA -o cbfb_against_pml
    """
    from cytosae.compare import CompareConfig, compare

    config = CompareConfig(**settings)
    with _progress("compare", "permutation") as progress:
        done = compare(barcodes, out, config, latents=latents, overwrite=overwrite, progress=progress)
    _say_done(out, done.was_complete)
    if as_json:
        click.echo(
            json.dumps(
                {"comparison": str(out), **done.summary, "top": done.top(5), "supported": done.supported(5)}, indent=1
            )
        )
    else:
        _print_comparison(out, config, done)


def _print_comparison(out: Path, config: "CompareConfig", done: "Comparison") -> None:
    from cytosae.compare import describe_left_out

    found = done.summary
    for group in ("a", "b"):
        about = found[group]
        per_patient = "{min:,} to {max:,}, median {median:,g}".format(**about["images_per_patient"])
        click.echo(
            f"{group.upper()}: {_shown(about['name'])}, {_count(about['n_patients'], 'patient')} with "
            f"{_count(about['n_images'], 'image')} ({per_patient} each)"
        )
    normalized = "" if found["normalize"] == "images" else f", normalised as {found['normalize']}"
    not_tested = describe_left_out(found["left_out"], config)
    click.echo(
        f"tested: {found['n_tested']:,} of {found['n_latents']:,} latents at tau {found['tau']:g}{normalized}"
        + (f"; not: {not_tested}" if not_tested else "")
    )
    how = f"all {found['n_permutations']:,} ways" if found["is_exact"] else f"{found['n_permutations']:,} permutations"
    chance = "" if found["is_exact"] else f", seed {found['seed']}"
    click.echo(f"{how} to share out the patients{chance}; no p can be below {found['p_floor']:.2g}")
    click.echo(
        f"p <= 0.05: {found['n_p_at_most_0.05']:,} latents; q <= 0.05: {found['n_q_at_most_0.05']:,}; "
        f"p_max_t <= 0.05: {found['n_p_max_t_at_most_0.05']:,}; step-down {found['n_p_step_down_at_most_0.05']:,}"
        + (f"; without adjusting, p <= 0.05: {found['n_p_crude_at_most_0.05']:,}" if config.is_adjusted else "")
    )
    for group, rows in done.supported(5).items():
        click.echo(f"higher in {_shown(found[group]['name'])}: {found['n_higher'][group]:,}; best supported first")
        click.echo(
            "    latent    mean A    mean B       g   (95% interval)    AUC         p         q   p_max_t stable"
        )
        for row in rows:
            limits = f"({_cell(row['hedges_g_low'], '.2f')} to {_cell(row['hedges_g_high'], '.2f')})"
            click.echo(
                f"  {row['latent']:>8} {row['mean_a']:>9.4g} {row['mean_b']:>9.4g} {_cell(row['hedges_g'], '7.2f')} "
                f"{limits:>16} {row['auc']:>6.3f} {row['p']:>9.3g} {row['q']:>9.3g} {row['p_max_t']:>9.3g} "
                f"{_cell(row['stability'], '6.0%')}"
            )
    if found["stability_no_effect"]:
        least, most = min(found["stability_no_effect"]), max(found["stability_no_effect"])
        click.echo(f"stable: with shuffled groups, the first five of a list have {least:.0%} to {most:.0%}")
    for warning in found["warnings"]:
        click.echo(f"warning: {_shown(warning)}", err=True)
    click.echo(f"{out}: differential, patients and correlation.parquet; scatter, patients and correlation.png, .svg")


def _cell(value: float | None, form: str) -> str:
    """A number in its column; `-` where there is none."""
    return "-".rjust(int(form.split(".")[0] or 0)) if value is None else format(value, form)


@concept.command("stability")
@click.argument("runs", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder for the tables and the figure.")
@click.option(
    "--concepts",
    type=_FILE,
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
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of what chance gives.")
@click.option(
    "--assume-compatible", is_flag=True, help="Take imported SAEs, which do not say which tokens they were trained on."
)
@click.option(
    "--allow-same-seed",
    is_flag=True,
    help="Compare SAEs that were trained from one seed, which begin with equal weights.",
)
@_overwrite_option
@_json_option
def concept_stability(runs: tuple[Path, ...], out: Path, as_json: bool, **settings: Any) -> None:
    """Do SAEs agree? Match the latents of every two RUNs one to one by the cosine of their decoder rows.

    The matching has the largest possible sum of cosines. Beside it stands what chance gives: random directions, and
    each decoder matched with itself. Directions alone are compared: the SAEs may differ in the number of latents, in
    the scale of their tokens and in their centre. Train them from different seeds.

    \b
    Example: cyto concept stability seed0.sae seed1.sae seed2.sae -o cells.stability
    """
    from cytosae.stability import write_stability

    with _progress("match", "block") as progress:
        done = write_stability(runs, out, progress=progress, **settings)
    _say_done(out, done.was_complete)
    for warning in done.warnings:
        click.echo(f"warning: {_shown(warning)}", err=True)
    if as_json:
        click.echo(json.dumps({"saes": [str(run) for run in runs], "pairs": done.pairs}, indent=1))
        return
    for run, n_without in zip(runs, done.n_without_direction, strict=True):
        if n_without:
            click.echo(f"{run}: {_count(n_without, 'latent')} left out: without a direction, the decoder row is zero")
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


@concept.command("neighbours")
@click.argument("run", type=_FILE)
@click.option("-o", "--out", type=_FILE, help="Folder for the table  [default: print the neighbours of --latent].")
@click.option(
    "--latents",
    type=_STORE,
    multiple=True,
    metavar="STORE",
    help="Latent store (path or URL) by this SAE: also tells which latents are active together. May repeat.",
)
@click.option(
    "--latent", "chosen", type=int, multiple=True, metavar="N", help="Of this latent; may repeat  [default: all]."
)
@click.option("--top", "n_top", type=_COUNT, default=10, show_default=True, help="Neighbours of each kind.")
@click.option("--tau", default=0.0, show_default=True, help="Active at a token: stored value above this.")
@click.option("--token-set", type=_TOKEN_SETS, default="all", show_default=True, help="Tokens that count.")
@click.option(
    "--min-images",
    type=_COUNT,
    default=5,
    show_default=True,
    help="Images in which two latents must be active at one token, to be neighbours by activity.",
)
@_dask_options
@_overwrite_option
@_json_option
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
    from cytosae.coactivation import Coactivation
    from cytosae.neighbours import find_neighbours, write_neighbours

    config = Coactivation(**settings)
    if out is None:
        if not chosen:
            raise click.UsageError("give -o DIR for the neighbours of all latents, or --latent N to print those of one")
        found = find_neighbours(run, latents, chosen=chosen, settings=config).table.to_pylist()
        click.echo(json.dumps(found, indent=1) if as_json else "\n".join(_neighbour_lines(found, chosen)))
        return
    cluster = _dask_client(scheduler, workers, memory_limit) if latents else nullcontext()
    with cluster as client, _progress("neighbours", "step") as progress:
        was_complete = write_neighbours(
            run, out, latents, chosen=chosen, settings=config, client=client, overwrite=overwrite, progress=progress
        )
    _say_done(out, was_complete)
    summary = _result_summary(out, "neighbours")
    if as_json:
        click.echo(json.dumps(summary, indent=1))
        return
    by = f" and activity at {summary['n_tokens']:,} tokens of {summary['n_images']:,} images" if latents else ""
    click.echo(f"{out}: neighbours of {summary['n_latents']:,} latents by direction{by}")
    if summary["n_without_direction"]:
        click.echo(f"{_count(summary['n_without_direction'], 'latent')} without a direction: the decoder row is zero")


def _result_summary(out: Path, kind: str) -> dict[str, Any]:
    from stores import read_header
    from stores.spec import FORMATS

    return read_header(out, FORMATS[kind]).summary or {}


def _neighbour_lines(rows: list[dict[str, Any]], chosen: tuple[int, ...]) -> Iterator[str]:
    """One block per latent: its neighbours by direction, then those by activity."""
    for latent in sorted(set(chosen)):
        mine = [row for row in rows if row["latent"] == latent]
        n_tokens = next((row["n_tokens"] for row in mine if row["n_tokens"] is not None), None)
        yield f"latent {latent}" + ("" if n_tokens is None else f", active at {_count(n_tokens, 'token')}")
        for by, title in (("direction", "nearest direction"), ("tokens", "active at the same tokens")):
            some = [row for row in mine if row["by"] == by]
            if by == "direction" or n_tokens is not None:
                yield f"  {title}: {'' if some else 'none'}".rstrip()
            for row in some:
                together = ""
                if row["n_tokens_both"] is not None:
                    together = (
                        f"  phi {_number(row['phi'])}  lift {row['lift'] or 0:.1f}  together at "
                        f"{_count(row['n_tokens_both'], 'token')} of {_count(row['n_images_both'], 'image')}"
                    )
                yield f"    {row['rank']:>3}  latent {row['neighbour']:<6}  cosine {_number(row['cosine'])}{together}"


@concept.command("patient")
@click.argument("barcodes", type=_FILE)
@click.argument("patient", required=False)
@click.option("--all", "is_all", is_flag=True, help="Every patient instead of one.")
@click.option("-o", "--out", type=_FILE, required=True, help="Folder for the tables and the figure.")
@click.option("--tau", type=float, help="Which barcodes, where there are several.")
@click.option(
    "--min-images",
    type=_COUNT,
    default=3,
    show_default=True,
    help="Of the patient's images in which a raised latent must be above tau.",
)
@click.option("--splits", "n_splits", type=_COUNT, default=200, show_default=True, help="Times the images are halved.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the splits.")
@_overwrite_option
@_json_option
def concept_patient(
    barcodes: Path, patient: str | None, is_all: bool, out: Path, overwrite: bool, as_json: bool, **settings: Any
) -> None:
    """Latents that set PATIENT apart from the other patients of its disease, and hold in both halves of its images.

    z predicts one more patient from the others (Student's t, the patient's own error added), at least 5 others of the
    same disease and dataset. It ranks and describes, without p- or q-values: how many latents set the other patients
    apart by the same rule is the yardstick.

    \b
    Example: cyto concept patient cells.barcodes P07 -o P07.concepts
    """
    from cytosae.patient_concepts import PatientSettings, write_patient_concepts

    if (patient is None) != is_all:
        raise click.UsageError("name one PATIENT, or give --all")
    with _progress("compare", "patient") as progress:
        done = write_patient_concepts(
            barcodes, patient, out, PatientSettings(**settings), overwrite=overwrite, progress=progress
        )
    _say_done(out, done.was_complete)
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
    name = _shown(row["patient"])
    if row["skipped"]:
        return f"{name}: left out ({_shown(row['skipped'])})"
    usual = "no other patient could be counted"
    if row["n_others_counted"]:
        usual = (
            f"of the other patients, {row['n_others_counted']:,} counted in the same way, each has "
            f"{row['others_least']:,} to {row['others_most']:,}, median {row['others_median']:g}"
        )
    return (
        f"{name}: {_count(row['n_images'], 'image')} against {row['n_others']:,} others with {_shown(row['disease'])}; "
        f"{_count(row['n_raised'], 'latent')} raised and {row['n_lowered']:,} lowered (|z| of 3 or more in all "
        f"images and in both halves) of {row['n_latents']:,} looked at; {usual}; halves correlate "
        f"{_number(row['halves_correlation'])}"
    )


def _patient_concept_line(row: dict[str, Any]) -> str:
    return (
        f"  latent {row['latent']:<6} z {row['z']:>7.1f}  {row['barcode']:.3g} against {row['others_mean']:.3g} "
        f"tokens per image, in {_count(row['n_images_active'], 'image')}; {row['n_others_beyond']:,} others as far; "
        f"|z| of 3 in both halves in {row['replicated']:.0%} of the splits"
    )


def _map_options(command: Any) -> Any:
    """How maps are drawn, and where the images lie."""
    options = (
        click.option(
            "--root",
            "roots",
            type=_FILE,
            multiple=True,
            help="Where the images lie now, once for each of LATENTS  [default: where they lay].",
        ),
        click.option(
            "--n-images", type=click.IntRange(1, 10), default=6, show_default=True, help="Reference images per dataset."
        ),
        click.option(
            "--nearest", is_flag=True, help="Draw patches as squares, instead of bilinear between their centres."
        ),
        click.option(
            "--released", is_flag=True, help="The released code's rendering: dark and bright patches, no scale."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@concept.command("select")
@click.argument("concepts", type=_FILE)
@click.option("--dataset", help="Whose statistics decide  [default: the only one].")
@click.option("--threshold", default=1e-3, show_default=True, help="Least mean activation of a latent that takes part.")
@click.option("--clusters", type=_COUNT, default=10, show_default=True, help="Clusters of KMeans.")
@click.option("--per-cluster", type=_COUNT, default=5, show_default=True, help="Latents drawn from each.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of clusters and draws.")
@click.option("--as-released", is_flag=True, help="Cluster mean activation and frequency as they are, without log10.")
@_overwrite_option
@_json_option
def concept_select(concepts: Path, dataset: str | None, overwrite: bool, as_json: bool, **settings: Any) -> None:
    """Draw latents for an expert to look at: KMeans on log10 mean activation and log10 frequency, some of each cluster.

    Writes selection.parquet into CONCEPTS, which cyto concept sheet --selected draws.

    \b
    Example: cyto concept select cells.concepts --seed 0
    """
    from cytosae.selection import FILE, SelectionConfig, select_latents
    from stores import ConceptStore

    store = ConceptStore(concepts)
    config = SelectionConfig(dataset=store.choose_dataset(dataset), **settings)
    found = select_latents(store, config, overwrite=overwrite)
    _say_done(concepts / FILE, found.was_complete)
    if found.warning:
        click.echo(f"warning: {found.warning}", err=True)
    if as_json:
        click.echo(json.dumps({"concepts": str(concepts), "latents": found.table.to_pylist()}, indent=1))
    else:
        _print_selection(concepts / FILE, config, found)


def _print_selection(path: Path, config: "SelectionConfig", found: "Selection") -> None:
    click.echo(
        f"{path}: {len(found.latents):,} of {found.n_candidates:,} latents of {config.dataset} with a mean "
        f"activation of at least {config.threshold:g}, from {len(found.cluster_sizes)} clusters (seed {config.seed})"
    )
    if len(found.cluster_sizes) < config.clusters:
        click.echo(f"fewer clusters than {config.clusters}: the latents have only so many different values")
    small = [size for size in found.cluster_sizes if size < config.per_cluster]
    if small:
        click.echo(
            f"all latents taken of {len(small)} clusters with fewer than {config.per_cluster} "
            f"({', '.join(map(str, small))})"
        )
    clusters = found.table["cluster"].to_pylist()
    for cluster, size in enumerate(found.cluster_sizes):
        drawn = [str(latent) for latent, of in zip(found.latents, clusters, strict=True) if of == cluster]
        click.echo(f"  cluster {cluster} ({_count(size, 'latent')}): {', '.join(drawn)}")


@concept.command("sheet")
@click.argument("concepts", type=_FILE)
@click.argument("stores", metavar="LATENTS...", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of the figures.")
@click.option("--latent", "latents", type=int, multiple=True, help="A latent to draw; repeat it for several.")
@click.option("--selected", is_flag=True, help="Draw those of cyto concept select.")
@click.option("--dataset", "datasets", multiple=True, help="Datasets to show  [default: all]; repeat it for several.")
@_map_options
@_overwrite_option
def concept_sheet(
    concepts: Path,
    stores: tuple[Path, ...],
    out: Path,
    latents: tuple[int, ...],
    selected: bool,
    overwrite: bool,
    datasets: tuple[str, ...],
    roots: tuple[Path, ...],
    n_images: int,
    nearest: bool,
    released: bool,
) -> None:
    """A figure per latent: its top images from each dataset beside each other, with the patches that carry it.

    LATENTS are the stores that CONCEPTS was made from.

    \b
    Example: cyto concept sheet cells.concepts cells.latents.zarr -o cells.sheets --latent 17 --latent 210
    """
    from cytosae.map_figures import Style
    from cytosae.selection import read_selection
    from cytosae.sheets import write_sheets
    from stores import ConceptStore

    store = ConceptStore(concepts)
    with _progress("sheet", "latent") as progress:
        done = write_sheets(
            store,
            _sources(stores, roots),
            out,
            latents=(*latents, *(read_selection(store).latents if selected else ())),
            datasets=datasets,
            n_images=n_images,
            style=Style(is_smooth=not nearest, is_released=released),
            overwrite=overwrite,
            inputs=(concepts, *stores, *roots),
            progress=progress,
        )
    _say_done(out, done.was_complete)
    click.echo(f"{out}: {_count(done.n_latents, 'latent')}, {_count(done.n_images, 'image')}, latent<N>.png and .svg")
    _warn_of_unseen(done.unseen)


@concept.command("map")
@click.argument("stores", metavar="LATENTS...", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of figures and tables.")
@click.option("--image", "image_id", help="The image_id of an image of LATENTS.")
@click.option(
    "--file", type=_FILE, help="Or a new image file, with --sae and the backbone that LATENTS were made with."
)
@click.option("--sae", "run", type=_FILE, help="With --file: the SAE that LATENTS were made with.")
@click.option("--weights", help="With --file: the weights of the backbone; an untrained one needs none.")
@click.option("--latent", "latents", type=int, multiple=True, help="A latent to draw; repeat it for several.")
@click.option("--patch", type=int, help="Or a patch, 0 to 255 row by row: the latents that speak for it are drawn.")
@click.option("--concepts", "concepts", type=_FILE, help="Statistics and reference images; needed with --patch.")
@click.option("--top", "n_top", type=_COUNT, default=2, show_default=True, help="With --patch: latents to draw.")
@click.option("--dataset", help="With --patch: whose statistics --shared and --noisy mean  [default: the image's].")
@click.option(
    "--shared",
    default=1.0,
    show_default=True,
    help="With --patch: pass over latents of this frequency or more; 1: active in every readable image, above 1: none.",
)
@click.option(
    "--noisy",
    default=0.1,
    show_default=True,
    help="With --patch: pass over latents whose mean activation is above this; 0.1 is made for the released SAE.",
)
@_map_options
@_assume_option
@_device_option
@_overwrite_option
def concept_map(
    stores: tuple[Path, ...],
    out: Path,
    image_id: str | None,
    file: Path | None,
    run: Path | None,
    weights: str | None,
    latents: tuple[int, ...],
    patch: int | None,
    concepts: Path | None,
    n_top: int,
    dataset: str | None,
    shared: float,
    noisy: float,
    roots: tuple[Path, ...],
    n_images: int,
    nearest: bool,
    released: bool,
    assume_compatible: bool,
    device: str,
    overwrite: bool,
) -> None:
    """Where in an image latents are active: maps of given latents, or of those that speak for one of its patches.

    With --patch: its active latents without the shared and the noisy ones, the largest values first. With --concepts,
    the reference images of each latent too, from all its datasets.

    \b
    Example: cyto concept map cells.latents.zarr -o map --image cells/a.png --patch 57 --concepts cells.concepts
    """
    from cytosae.map_figures import Style
    from cytosae.maps import write_maps
    from cytosae.patch_maps import PatchQuery
    from stores import ConceptStore

    if (patch is None) == (not latents):
        raise click.UsageError("give --latent (it may repeat), or --patch for the latents that speak for it")
    if patch is not None and concepts is None:
        raise click.UsageError("--patch needs --concepts, whose statistics say which latents are shared or noisy")
    sources, store, query = _sources(stores, roots), ConceptStore(concepts) if concepts else None, None
    subject = _subject(
        sources, image_id, file, run, weights=weights, device=device, assume_compatible=assume_compatible
    )
    if patch is not None and store is not None:
        known = dataset or (subject.dataset if subject.dataset in store.datasets else None)
        query = PatchQuery(patch=patch, dataset=store.choose_dataset(known), n_top=n_top, shared=shared, noisy=noisy)
    done = write_maps(
        subject,
        out,
        latents=latents,
        query=query,
        concepts=store,
        sources=sources,
        n_images=n_images,
        style=Style(is_smooth=not nearest, is_released=released),
        overwrite=overwrite,
        inputs=tuple(path for path in (*stores, *roots, concepts, file, run) if path),
    )
    _print_maps(out, subject.name, query, done)
    click.echo(f"{out}: map.png and .svg{', latent<N>.png and .svg' if concepts else ''}")
    _warn_of_unseen(done.unseen)


def _print_maps(out: Path, name: str, query: "PatchQuery | None", done: "MapResult") -> None:
    _say_done(out, done.was_complete)
    if query is not None:
        click.echo(
            f"patch {query.patch} of {name}: {done.n_active:,} active latents; passed over: {done.n_shared:,} shared "
            f"(frequency of at least {query.shared:g} in {query.dataset}), {done.n_noisy:,} noisy (mean activation "
            f"above {query.noisy:g})"
        )
    for latent, largest in zip(done.latents, done.largest, strict=True):
        click.echo(f"  latent {latent}: largest value {largest:.4g}")


@concept.command("masks")
@click.argument("latents", type=_FILE)
@click.argument("masks", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of the table and the figure.")
@click.option(
    "--root", type=_FILE, help="What paths in a table of masks are relative to [default: the table's folder]."
)
@click.option(
    "--classes",
    metavar="VALUE=NAME,...|any",
    help="Which values of the masks count, and their names, such as 1=cytoplasm,2=nucleus or #ff0000=nucleus; one name "
    "for two values unites them; any: all above 0 together  [default: each value a class, where that is clear].",
)
@click.option(
    "--min-share", default=0.5, show_default=True, help="A patch is of a class that covers this share of it or more."
)
@click.option(
    "--shuffles",
    "n_shuffles",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Times that patients exchange their masks, and that signs are drawn; 0: no p-values.",
)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the shuffles, and of the two halves.")
@_overwrite_option
@_json_option
def concept_masks(
    latents: Path,
    masks: Path,
    out: Path,
    root: Path | None,
    classes: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How well the map of each latent agrees with segmentation masks: AUROC within images, IoU, and chance.

    MASKS is a .csv or .parquet table with the columns image_id and mask (a path), or a folder of files named like the
    images. PNG, TIFF or BMP of any size, read by value: 0 is background, every other value a class. The shuffles know
    the patients.

    \b
    Example: cyto concept masks cells.latents.zarr nuclei/ -o cells.nuclei
    """
    from cytocache.masks import find_masks, read_all_shares
    from cytosae.masks import write_mask_agreement
    from cytosae.patch_maps import patch_side
    from stores import LatentStore

    store = LatentStore(latents)
    found = find_masks(masks, store.images, root=root)
    with _progress("read", "mask") as progress:
        side = patch_side(store.spec.tokens_per_image)
        read = read_all_shares(found, store.readable(), side, classes, progress=progress)
    with _progress("masks", "step") as progress:
        inputs = tuple(path for path in (latents, masks, root) if path)
        named = [(one.name, one.values) for one in read.classes]
        done = write_mask_agreement(
            store,
            read.shares,
            out,
            classes=named,
            overwrite=overwrite,
            inputs=inputs,
            progress=progress,
            **settings,
        )
    _say_done(out, done.was_complete)
    left_out = {
        "masks of no image here": found.unknown,
        "unreadable masks": read.unreadable,
        "masks of unreadable images": read.of_unreadable_images,
    }
    if as_json:
        counts = {what: len(names) for what, names in left_out.items()}
        click.echo(json.dumps({"out": str(out), "left_out": counts, **vars(done)}, indent=1))
    else:
        _print_masks(out, done, left_out, store.spec.n_latents)


def _print_masks(out: Path, done: "MaskResult", left_out: dict[str, list[str]], n_latents: int) -> None:
    from stores.tables import listed

    for what, names in left_out.items():
        if names:
            click.echo(f"left out: {_left_out(len(names), what)} ({listed([_shown(name) for name in names])})")
    n_units, classes = done.n_units or 0, done.classes or []
    who = "" if done.unit == "image" else f" of {_count(n_units, 'unit')} (patients, and images without one)"
    click.echo(
        f"{out}: {_count(done.n_images, 'image')} with masks{who}, {done.n_foreground / done.n_patches:.1%} of the "
        f"patches are foreground; {done.n_silent:,} of {n_latents:,} latents are active at none"
    )
    for one in classes:
        values = ", ".join(one["values"])
        click.echo(f"  {_shown(one['name'])} (value {values}), {one['n_patches'] / done.n_patches:.1%} of the patches")
        for name, words in (("auroc", "AUROC"), ("iou", "IoU")):
            top = ", ".join(f"{row['latent']} ({row[name]:.3f})" for row in one[f"best_by_{name}"])
            chance = one[f"expected_max_{name}"]
            by_chance = "" if chance is None else f"; the best under exchanged masks: {chance:.3f}"
            click.echo(f"  {words:<6} latents {top or '(none)'}{by_chance}")
    if all(one["expected_max_auroc"] is None for one in classes):
        click.echo(
            "  no p-values: nothing was shuffled (one image, --shuffles 0, or no latent active in enough images)"
        )
    elif done.unit == "image":
        click.echo("  p-values take each image for a patient: no two patients are known, and those of one are alike")
    elif n_units < 6:
        click.echo(f"  {n_units} patients: p-values cannot be small, however well a latent agrees")


def _sources(stores: tuple[Path, ...], roots: tuple[Path, ...], option: str = "--root") -> "Sources":
    """Latent stores, and a function per store that gives the pixels of its images."""
    from cytocache.pictures import Pictures
    from cytosae.reference_images import Sources
    from stores import LatentStore

    if roots and len(roots) != len(stores):
        raise click.UsageError(
            f"give {option} once for each of LATENTS, or not at all; found {len(roots)} for {len(stores)}"
        )
    opened = [LatentStore(store) for store in stores]
    return Sources(
        opened, [Pictures(store, root) for store, root in zip(opened, roots or (None,) * len(opened), strict=True)]
    )


def _subject(
    sources: "Sources", image_id: str | None, file: Path | None, run: Path | None, **backbone: Any
) -> "Subject":
    """An image of a store, or one of a file and the SAE that encodes it."""
    from cytosae.maps import stored_subject

    if image_id is not None and file is None and run is None:
        return stored_subject(sources, image_id)
    if image_id is None and file is not None and run is not None:
        return _new_subject(sources, file, run, **backbone)
    raise click.UsageError("give --image; or --file and --sae, for an image that is in no store")


def _new_subject(
    sources: "Sources", file: Path, run: Path, *, weights: str | None, device: str, assume_compatible: bool
) -> "Subject":
    """An image file that is in no store, encoded as the images of the first store were."""
    from cytocache.pictures import to_pixels
    from cytocache.sample import load_backbone_as, read_new_image
    from cytosae.checkpoint import load_sae
    from cytosae.encode import encode_image
    from cytosae.maps import Subject
    from cytosae.patch_maps import token_matrix
    from stores import ActivationSpec
    from stores.spec import stated

    device, latents = _resolve_device(device), sources.stores[0]
    cache, spec = f"the cache of {latents.root}", stated(ActivationSpec, latents.spec.cache, latents.root)
    sae = load_sae(run, device=device)
    sae.require_tokens(spec, cache, assume_compatible=assume_compatible)
    with _progress("download", "byte") as downloading:
        backbone = load_backbone_as(spec, cache, weights=weights, device=device, progress=downloading)
    tokens, picture, content_hash = read_new_image(file, spec, backbone, device=device)
    rows = encode_image(tokens, sae, latents.spec, device=device)
    return Subject(
        name=file.name,
        tokens=token_matrix(rows, latents.spec.n_latents),
        picture=to_pixels(picture),
        origin={"sha256": content_hash, "as": latents.identity},
    )


def _warn_of_unseen(unseen: list[str], option: str = "--root") -> None:
    from stores.tables import listed

    if unseen:
        click.echo(
            f"warning: {_count(len(unseen), 'image')} could not be shown "
            f"({listed([_shown(name) for name in unseen])}); say where they are with {option}, and add --overwrite",
            err=True,
        )


@cli.command()
@click.argument("barcodes", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of the results.")
@click.option(
    "--cache",
    "caches",
    type=_FILE,
    multiple=True,
    help="Activation cache of the same images, for baselines; may repeat.",
)
@click.option("--sae", type=_FILE, help="Folder of the SAE: says whether it was trained on these images.")
@click.option(
    "--level", type=click.Choice(["patient", "image"]), default="patient", show_default=True, help="What is told apart."
)
@click.option("--target", default="", help="Column of classes  [default: disease of patients, label of images].")
@click.option("--class", "classes", multiple=True, help="Keep this class; may repeat  [default: all].")
@click.option("--tau", type=float, help="Which barcodes, where there are several tau.")
@click.option("--group-by", help="Column of the images: patients (images) with a common value stay together.")
@click.option(
    "--min-images", type=_COUNT, default=1, show_default=True, help="Leave out patients with fewer readable images."
)
@click.option(
    "--max-images",
    type=_COUNT,
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
@click.option("--mil-epochs", type=_COUNT, default=40, show_default=True, help="Its passes over the training patients.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of folds, shuffles and the MIL head.")
@click.option("--workers", type=_COUNT, default=n_cores(), show_default="cores", help="Threads.")
@_overwrite_option
@_json_option
def probe(
    barcodes: Path,
    out: Path,
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

    \b
    Example: cyto probe cells.barcodes -o cells.probe --cache cells.acts.zarr
    """
    from cytosae.probe import C_FACTORS, REPETITIONS, THRESHOLDS, ProbeConfig, write_probe
    from cytosae.probe_baselines import MilConfig
    from cytosae.probe_units import UnitConfig

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
    with _progress("tokens", "image") as token_progress, _progress("probe", "step") as progress:
        scores, was_complete = write_probe(
            barcodes,
            out,
            config,
            caches=caches,
            sae=sae,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
            token_progress=token_progress,
        )
    _say_done(out, was_complete)
    for warning in scores["warnings"]:
        click.echo(f"warning: {_shown(warning)}", err=True)
    if as_json:
        click.echo(json.dumps(scores, indent=1, allow_nan=False))
    else:
        _print_probe(out, scores)


@cli.group()
def atlas() -> None:
    """Web pages of a run, and the review of its concepts by experts."""


@atlas.command("build")
@click.option("--barcodes", type=_FILE, required=True, help="Folder of cyto barcode.")
@click.option("--concepts", type=_FILE, required=True, help="Folder of cyto concept stats.")
@click.option(
    "--latents",
    "stores",
    type=_FILE,
    multiple=True,
    required=True,
    help="Latent store that both were made from; repeat it for several, in the same order.",
)
@click.option("-o", "--out", type=_FILE, required=True, help="Folder of the atlas.")
@click.option(
    "--images",
    "roots",
    type=_FILE,
    multiple=True,
    help="Where the images lie now, once for each of --latents  [default: where they lay].",
)
@click.option("--compare", "comparisons", type=_FILE, multiple=True, help="Folder of cyto compare; may repeat.")
@click.option("--neighbours", type=_FILE, help="Folder of cyto concept neighbours.")
@click.option(
    "--pages",
    type=click.Choice(["selected", "top", "all"]),
    default="selected",
    show_default=True,
    help="Latents with a page: those of cyto concept select and in the comparisons' top lists, the --top largest "
    "mean activations, or all. The scatter and the table show every latent.",
)
@click.option("--top", type=_COUNT, default=200, show_default=True, help="With --pages top: how many.")
@click.option("--n-images", type=_COUNT, default=10, show_default=True, help="Reference images per latent and dataset.")
@click.option(
    "--patient-images", type=click.IntRange(min=0), default=12, show_default=True, help="Cells shown of each patient."
)
@click.option("--pixels", type=click.IntRange(min=32), default=256, show_default=True, help="Longer side of a picture.")
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--pseudonyms",
    is_flag=True,
    help="Call patients P0001, P0002, ... and images by number, in an order that only the key in DIR.pseudonyms.csv "
    "tells; that file, beside DIR, also says who is who.",
)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the patients' cells and the decoys.")
@click.option("--dry-run", is_flag=True, help="Say how many pages and bytes it would be, and write nothing.")
@_overwrite_option
@_json_option
def atlas_build(
    barcodes: Path,
    concepts: Path,
    stores: tuple[Path, ...],
    out: Path,
    roots: tuple[Path, ...],
    comparisons: tuple[Path, ...],
    neighbours: Path | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write web pages of concepts, images, patients and diseases, to be opened from the disk or any web server.

    Nothing in them asks a network for anything.

    \b
    Example: cyto atlas build --barcodes cells.barcodes --concepts cells.concepts --latents cells.latents.zarr -o atlas
    """
    from cytosae.atlas.build import estimate_atlas, write_atlas
    from cytosae.atlas.config import AtlasConfig
    from cytosae.atlas.inputs import open_inputs
    from cytosae.atlas.pseudonyms import pseudonyms_file

    config = AtlasConfig(**settings)
    sources = _sources(stores, roots, option="--images")
    inputs = open_inputs(barcodes, concepts, sources, comparisons=comparisons, neighbours=neighbours, tau=config.tau)
    if dry_run:
        done = estimate_atlas(inputs, config)
    else:
        given = [path for path in (barcodes, concepts, *stores, *roots, *comparisons, neighbours) if path is not None]
        with _progress("atlas", "page") as progress:
            done = write_atlas(inputs, out, config, overwrite=overwrite, given=given, progress=progress)
        _say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps({"atlas": str(out), "written": not dry_run, **vars(done)}, indent=1))
        return
    counts = ", ".join(_count(number, kind.removesuffix("s")) for kind, number in done.counts.items())
    about = "about " if dry_run else ""
    click.echo(f"{out}: pages of {counts}; {about}{done.n_files:,} files, {about}{done.n_bytes / 1e6:,.1f} MB")
    if dry_run:
        click.echo("nothing was written")
        return
    _warn_of_unseen(done.unseen, "--images")
    if config.pseudonyms:
        click.echo(f"who is who, and the key: {pseudonyms_file(out)}; keep it, and never give it away with the atlas")
    click.echo(f"open {(out / 'index.html').absolute().as_uri()}")


@atlas.command("serve")
@click.argument("site", metavar="DIR", type=_FILE)
@click.option("--reviews", type=_FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="Port to listen on; 0: any free one."
)
@click.option("--show-labels", is_flag=True, help="In the review, show latents, datasets and labels of images.")
@click.option("--review-only", is_flag=True, help="Serve the review page, not the atlas, in which labels can be seen.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of each reviewer's order of concepts.")
def atlas_serve(site: Path, reviews: Path | None, review_only: bool, show_labels: bool, port: int, seed: int) -> None:
    """Serve an atlas to a browser on this machine, and take reviews of its concepts.

    Every verdict is on the disk before the page says so; give your name again to go on where you stopped. Ctrl-C stops.

    \b
    Example: cyto atlas serve cells.atlas
    """
    from cytosae.atlas.review_server import ServeConfig, open_server

    config = ServeConfig(port=port, seed=seed, shows_labels=show_labels, is_review_only=review_only)
    folder = reviews or _reviews_of(site)
    with open_server(site, folder, config) as server:
        asked = ", ".join(f"{question.title} ({len(question.items):,})" for question in server.review.questions)
        click.echo(f"{site}: {server.address}  review: {server.address}review.html  (Ctrl-C stops)")
        click.echo(f"asked: {_shown(asked) or 'nothing; the atlas was built without a selection and comparisons'}")
        click.echo(f"verdicts: {folder}")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    click.echo("\nstopped")


@atlas.command("export")
@click.argument("site", metavar="DIR", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, help="The table to write, .csv or .parquet.")
@click.option("--reviews", type=_FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@click.option("--history", is_flag=True, help="Also verdicts that a later one of the same reviewer replaced.")
@_overwrite_option
def atlas_export(site: Path, out: Path, reviews: Path | None, history: bool, overwrite: bool) -> None:
    """The verdicts of all reviewers as one table, with what was hidden from them.

    \b
    Example: cyto atlas export cells.atlas -o reviews.csv
    """
    from cytosae.atlas.questions import read_review
    from cytosae.atlas.reviews import read_verdicts, verdict_table, write_verdicts

    review = read_review(site)
    table = verdict_table(read_verdicts(reviews or _reviews_of(site)), review, history=history)
    write_verdicts(table, out, overwrite=overwrite)
    n_reviewers = len(set(table["reviewer"].to_pylist()))
    click.echo(f"{out}: {_count(table.num_rows, 'verdict')} of {_count(n_reviewers, 'reviewer')}")


@atlas.command("agreement")
@click.argument("site", metavar="DIR", type=_FILE)
@click.option("--reviews", type=_FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@_json_option
def atlas_agreement(site: Path, reviews: Path | None, as_json: bool) -> None:
    """Do reviewers agree, which share of concepts is meaningful, and are those of a disease told from decoys?

    \b
    Example: cyto atlas agreement cells.atlas
    """
    from cytosae.atlas.agreement import agreement
    from cytosae.atlas.questions import read_review
    from cytosae.atlas.reviews import read_verdicts

    review = read_review(site)
    found = agreement(read_verdicts(reviews or _reviews_of(site)), review)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(
        f"{_count(found['n_verdicts'], 'verdict')} ({found['n_superseded']:,} earlier ones replaced), of them "
        f"{found['n_seen_with_labels']:,} with labels shown"
    )
    if found["n_not_asked"]:
        click.echo(f"left out: {found['n_not_asked']:,} on concepts that {site} does not ask about")
    for question in found["questions"]:
        _print_reviewed(question)


def _reviews_of(site: Path) -> Path:
    """Beside the atlas: what replaces it leaves the reviews alone."""
    site = site.absolute()
    return site.with_name(f"{site.name}.reviews")


def _print_reviewed(found: dict[str, Any]) -> None:
    """What `cyto atlas agreement` found for one question."""
    from cytosae.atlas.agreement import EXTREME

    click.echo(f"\n{_shown(found['title'])}: {_count(found['n_items'], 'concept')}")
    for reviewer, given in found["reviewers"].items():
        said = ", ".join(f"{count:,} {verdict}" for verdict, count in given["verdicts"].items())
        click.echo(f"  {_shown(reviewer)}: {given['n']:,} judged ({said})")
    for pair in found["cohen"]:
        names = " and ".join(_shown(name) for name in pair["reviewers"])
        click.echo(
            f"  {names}: Cohen's kappa {_kappa(pair, 'kappa')} over {_count(pair['n_items'], 'concept')}, "
            f"{_share(pair['agreement'])} equal, Gwet's AC1 {_kappa(pair, 'ac1')}"
        )
    all_of = found["fleiss"]
    if all_of["n_reviewers"] > 2:
        click.echo(
            f"  all {all_of['n_reviewers']:,}: Fleiss' kappa {_kappa(all_of, 'kappa')} over {all_of['n_items']:,} "
            f"concepts that all judged ({all_of['n_left_out']:,} left out), Gwet's AC1 {_kappa(all_of, 'ac1')}"
        )
    if any((each["largest_share"] or 0) >= EXTREME for each in (*found["cohen"], all_of)):
        click.echo(f"  {EXTREME:.0%} or more of the verdicts are one and the same: a kappa says little there, AC1 more")
    for row in found.get("meaningful", ()):
        cluster = "all" if row["cluster"] is None else f"cluster {row['cluster']}"
        who = "most reviewers" if row["reviewer"] is None else _shown(row["reviewer"])
        if row["n"]:
            click.echo(f"  {who}, {cluster}: meaningful {_interval(row)}")
        weighted = row.get("of_all_latents")
        if weighted and weighted["share"] is not None:
            click.echo(
                f"  {who}, of all latents (clusters weighted by size): meaningful {weighted['share']:.1%} "
                f"({100 * weighted['low']:.1f} to {100 * weighted['high']:.1f})"
                + (f", of the {weighted['covers']:.1%} in judged clusters" if weighted["covers"] < 1 else "")
            )
    if found.get("specific"):
        medians = {group: _cell(found["median_images"][group], "1,.0f") for group in ("a", "b", "decoy")}
        click.echo(
            f"  images with a latent, median: list of {_shown(found['a'])} {medians['a']}, of {_shown(found['b'])} "
            f"{medians['b']}, decoys {medians['decoy']}"
        )
    for reviewer, said in found.get("specific", {}).items():
        for group, name in (("a", found["a"]), ("b", found["b"])):
            click.echo(
                f"  {_shown(reviewer)}: called specific to {_shown(name)} {_interval(said['confirmed'][group])} of its "
                f"list, {_interval(said['decoys_called'][group])} of the decoys "
                f"(p {_cell(said['p_lists'][group], '1.3g')})"
            )
        click.echo(f"  {_shown(reviewer)}: the right side of the two, p {_cell(said['p_sides'], '1.3g')}")


def _kappa(found: dict[str, Any], name: str) -> str:
    """`0.412 (0.120 to 0.655)`"""
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{_number(found[name])}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _interval(row: dict[str, Any]) -> str:
    """`5 of 8 (62.5%, 30.6 to 86.3)`"""
    if not row["n"]:
        return "0 of 0"
    return f"{row['n_yes']:,} of {row['n']:,} ({row['share']:.1%}, {100 * row['low']:.1f} to {100 * row['high']:.1f})"


# ---------------------------------------------------------------------------------------------------- the pipeline


@cli.command()
@click.option("--out", type=_FILE, default=Path("cyto-demo"), show_default=True, help="Folder for everything.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the drawn cells.")
def demo(out: Path, seed: int) -> None:
    """The whole pipeline on drawn cells, up to an atlas: no download, about a minute on two cores.

    Cells, patients and diseases are invented, and the backbone is untrained: this shows the machinery, not medicine.

    \b
    Example: cyto demo --out cyto-demo
    """
    from cytocache.datasets import open_images
    from cytocache.demo_cells import write_demo_images
    from cytocache.extract import ExtractConfig, extract
    from cytocache.images import read_image
    from cytosae.atlas.build import write_atlas
    from cytosae.atlas.config import AtlasConfig
    from cytosae.atlas.inputs import open_inputs
    from cytosae.barcodes import BarcodeConfig, write_barcodes
    from cytosae.compare import CompareConfig, compare
    from cytosae.concepts import ConceptConfig, write_concepts
    from cytosae.config import TrainConfig
    from cytosae.encode import encode
    from cytosae.figures import characteristic_latents, plot_patient_barcodes
    from cytosae.map_figures import plot_reference_images
    from cytosae.selection import SelectionConfig, select_latents
    from cytosae.train import train
    from stores import BarcodeStore, ConceptStore, LatentStore

    _claim_demo_folder(out, seed)
    cells, acts, run = out / "images.csv", out / "cells.acts.zarr", out / "cells.sae"
    latents, barcodes = out / "cells.latents.zarr", out / "cells.barcodes"
    concepts, pair, site = out / "cells.concepts", out / "compare", out / "atlas"

    write_demo_images(out, seed=seed)
    images = open_images(cells)
    click.echo(f"{cells}: {images.table.num_rows} drawn cells of 18 invented patients with 3 invented diseases")

    click.echo(f"\n$ cyto cache extract {cells} {acts}")
    with _progress("extract", "image") as progress:
        extract(images, acts, ExtractConfig(workers=n_cores()), progress=progress)
    click.echo(_describe_cache(acts))

    # chosen on this backbone, whose token norms and density are not DinoBloom's (docs/log.md)
    settings = {"expansion": 4, "l1": 2e-4, "lr": 1e-3, "warmup_steps": 30, "batch_tokens": 4096, "tokens": 1_000_000}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    click.echo(f"\n$ cyto sae train {acts} -o {run} {options}")
    with _progress("train", "token") as progress:
        config = TrainConfig(**settings)  # type: ignore[arg-type]
        header = train(
            [acts], run, config, progress=lambda done, total, metrics: progress(done, total, _training_line(metrics))
        )
    click.echo(f"{run}: {header.spec['n_latents']} latents; {_training_line((header.summary or {})['final'])}")

    click.echo(f"\n$ cyto sae encode {acts} {run} -o {latents}")
    with _progress("encode", "image") as progress:
        encoded = encode(acts, run, latents, progress=progress)
    click.echo(f"{latents}: {encoded.nnz:,} nonzeros, {encoded.l0:.1f} per token, {_size(latents) / 1e6:.1f} MB")

    with _dask_client(None, n_cores(), "2GiB") as client:
        click.echo(f"\n$ cyto barcode {latents} -o {barcodes} --tau 0.2")
        with _progress("barcode", "image") as progress:
            counted = write_barcodes(latents, barcodes, BarcodeConfig(tau=0.2), client=client, progress=progress)
        click.echo(
            f"{barcodes}: {counted.n_images} images, {counted.n_patients} patients, {counted.n_diseases} diseases; "
            f"{counted.share_above_tau[0]:.0%} of the nonzeros exceed tau"
        )
        click.echo(f"\n$ cyto concept stats {latents} -o {concepts}")
        with _progress("concepts", "image") as progress:
            write_concepts(latents, concepts, ConceptConfig(), client=client, progress=progress)
    click.echo(f"{concepts}: {ConceptStore(concepts).n_latents} latents")

    click.echo(f"\n$ cyto concept select {concepts}")
    config_of_draw = SelectionConfig(dataset=ConceptStore(concepts).datasets[0])
    click.echo(
        f"{len(select_latents(ConceptStore(concepts), config_of_draw).latents)} latents for an expert to look at"
    )

    store = BarcodeStore(barcodes)
    a, b = store.read_obs("disease").index[:2]
    click.echo(f"\n$ cyto compare {barcodes} {a} {b} -o {pair}")
    compared = compare(barcodes, pair, CompareConfig(a=a, b=b)).summary
    click.echo(f"{pair}: {compared['n_tested']} latents tested, {compared['n_q_at_most_0.05']} with q of at most 0.05")

    options = f"--barcodes {barcodes} --concepts {concepts} --latents {latents} --compare {pair}"
    click.echo(f"\n$ cyto atlas build {options} -o {site}")
    inputs = open_inputs(barcodes, concepts, _sources((latents,), (out,)), comparisons=[pair])
    with _progress("atlas", "page") as progress:
        built = write_atlas(inputs, site, AtlasConfig(), progress=progress)
    click.echo(f"{site}: {built.counts['concepts']} concepts, {built.counts['images']} images")

    by_image = store.read("image")
    paths = [out / str(path) for path in by_image.obs["path"]]
    plot_patient_barcodes(store.read("patient"), out / "patients_by_latents.png")
    plot_reference_images(
        LatentStore(latents),
        by_image,
        characteristic_latents(by_image, group="label"),
        lambda index: _pixels(read_image(paths[index])[0]),
        out / "reference_images.png",
    )
    click.echo(
        f"\nLook at:\n"
        f"  {out / 'patients_by_latents.png'}   which latents tell the patients apart\n"
        f"  {out / 'reference_images.png'}      the cells that a latent answers to, and where in the cell\n"
        f"  {barcodes / 'patient.zarr'}   anndata.read_zarr opens it, scanpy takes it\n"
        f"Next: the same commands on your own images, README.md\n"
        f"The atlas, for a browser: {(site / 'index.html').absolute().as_uri()}"
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


def _pixels(picture: Any) -> Any:
    import numpy as np

    return np.asarray(picture)


# ---------------------------------------------------------------------------------------------------- shared


def _resolve_device(device: str) -> str:
    import torch

    from stores.errors import BadInput

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("cpu", *["cuda"][:n_gpus], *(f"cuda:{number}" for number in range(n_gpus))):
        raise BadInput(f"device must be auto, cpu or an available cuda device; found {device!r}")
    return device


@contextmanager
def _stopping_gently(what: str) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the job to stop behind what is in flight, the second stops it at once."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        click.echo(f"\nfinishing {what} in flight; Ctrl-C again stops at once and loses it", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _dask_client(scheduler: str | None, workers: int, memory_limit: str) -> Iterator["Client"]:
    """A client of the running scheduler, or of a cluster started here for the time of the command."""
    from cytosae.cluster import open_client

    try:
        with open_client(scheduler, workers=workers, memory_limit=memory_limit) as client:
            yield client
    except KeyboardInterrupt:
        sys.unraisablehook = _say_unless_of_dask
        raise


def _say_unless_of_dask(unraisable: Any) -> None:
    """Ctrl-C inside distributed's Future.__init__ leaves one that is half made; its __del__ then complains."""
    name = getattr(unraisable.object, "__qualname__", "")
    if not (name == "Future.__del__" and isinstance(unraisable.exc_value, AttributeError)):
        sys.__unraisablehook__(unraisable)


@contextmanager
def _progress(job: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress line on stderr: rewritten in a terminal, one line every ten seconds in a log."""
    from tqdm import tqdm

    began, shown, last, at_start = time.monotonic(), 0.0, (-1, ""), -1
    in_terminal = sys.stderr.isatty()

    def show(done: int, total: int, state: str) -> None:
        nonlocal shown, last, at_start, began
        now = time.monotonic()
        if at_start < 0:
            at_start, began = done, now  # the rate is that of this run, not of what was there before
        elif (done, state) == last or (done == total == last[0]):
            return
        elif done < total and now - shown < (0.2 if in_terminal else 10):
            return
        shown, last = now, (done, state)
        line = tqdm.format_meter(
            done,
            total,
            now - began,
            prefix=job,
            unit=f" {unit}s",
            unit_scale=total >= 100_000,
            initial=at_start,
            postfix=state,
        )
        click.echo(f"\r\x1b[2K{line}" if in_terminal else line, err=True, nl=not in_terminal)

    yield show
    if in_terminal and shown:
        click.echo(err=True)


def _held_out_line(found: dict[str, Any]) -> str:
    return (
        f"{found['n_images']:,} images: mse {found['mse']:.4g}, L0 {found['l0']:.1f}, "
        f"explained variance {_number(found['explained_variance'])}"
    )


def _training_line(metrics: dict[str, Any]) -> str:
    return (
        f"loss {metrics['loss']:.4g}, L0 {metrics['l0']:.1f}, "
        f"explained variance {_number(metrics['explained_variance'])}, "
        + (
            f"{metrics['n_dead']:,} dead ({_share(metrics['dead_fraction'])})"
            if metrics["n_dead"] is not None
            else "dead n/a"
        )
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _count(number: int, what: str) -> str:
    """`1 latent`, `2,000 latents`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _rate(part: int, whole: int) -> str:
    return f"{part / whole:.2e}" if whole else "n/a"


def _verify(store: Path, checks: Iterator[Any], total: int, as_json: bool) -> None:
    problems = []
    with _progress("verify", "chunk") as progress:
        for n_done, problem in enumerate(checks, start=1):
            if problem is not None:
                problems.append(problem)
            progress(min(n_done, total), total, f"{len(problems)} bad" if problems else "")
    if as_json:
        found = [{"chunk": problem.chunk, "images": problem.images, "what": problem.what} for problem in problems]
        click.echo(json.dumps({"store": str(store), "ok": not problems, "problems": found}, indent=1))
    else:
        for problem in problems:
            click.echo(str(problem))
        if not problems:
            click.echo(f"{store}: whole ({_count(total, 'chunk')} checked)")
    if problems:
        raise click.ClickException(f"{store} is damaged: {_count(len(problems), 'problem')}")


def _say_done(path: Path, was_complete: bool) -> None:
    if was_complete:
        click.echo(f"{path} is already complete with these settings; nothing to do", err=True)


def _describe_cache(store: Path) -> str:
    from stores import ActivationStore

    spec = ActivationStore(store).spec
    return (
        f"{store}: {spec.n_images:,} images x {spec.tokens_per_image} tokens x {spec.width} channels, "
        f"block {spec.block} of {spec.backbone}{'' if spec.trained else ' (UNTRAINED)'}, {_size(store) / 1e6:,.1f} MB"
    )


def _describe_latents(store: Path) -> str:
    from stores import LatentStore

    latents = LatentStore(store)
    spec, summary = latents.spec, latents.header.summary or {}
    pruning = f"; {_pruning(spec.min_activation, summary)}" if spec.min_activation else ""
    return (
        f"{store}: {spec.n_images:,} images x {spec.tokens_per_image} tokens x {spec.n_latents:,} latents, "
        f"{latents.nnz:,} nonzeros ({latents.nnz / max(1, latents.n_readable_tokens):.1f} per token of a readable "
        f"image{pruning}), {_size(store) / 1e6:,.1f} MB"
    )


def _pruning(min_activation: float, summary: dict[str, Any]) -> str:
    if not min_activation:
        return "nothing dropped"
    n_dropped, nnz = summary.get("n_dropped", 0), summary.get("nnz", 0)
    counted = f": {n_dropped:,} of {nnz + n_dropped:,}" if summary else ""
    return f"values below {min_activation:g} dropped{counted}"


def _describe_run(run: dict[str, Any]) -> str:
    """One line of the run log; a log of another program's may lack any of it."""
    by = f"shard {run['shard']}, " if "shard" in run else ""
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    where = f"{run.get('device')}, batches of {run.get('batch_size')}, {run.get('threads')} threads"
    return f"{run.get('time')}: {by}{where}; images in {run.get('images_root')}; {versions}"


def _unreadable(store: Path | str) -> str:
    """`2 of 41,621 images could not be read (a.tif: ...); they are listed in images.parquet`."""
    from stores import ActivationStore
    from stores.tables import column, listed

    images = ActivationStore(store).images
    bad = [
        f"{path}: {error}"
        for path, error in zip(column(images, "path"), column(images, "error"), strict=True)
        if error is not None
    ]
    return (
        f"{len(bad):,} of {images.num_rows:,} images could not be read ({listed(bad)}); "
        f"they are listed in {store}/images.parquet"
    )


def _print_groups(table: Any) -> None:
    from collections import Counter

    from stores.tables import column

    for name in ("label", "disease"):
        counts = Counter(value for value in column(table, name) if value is not None)
        if counts:
            shown = [f"{value} {number:,}" for value, number in sorted(counts.items())]
            click.echo(f"  {name:<10} {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}")
    patients = {value for value in column(table, "patient") if value is not None}
    if patients:
        click.echo(f"  {'patients':<10} {len(patients):,}")


def _index_json(index: "Index") -> dict[str, Any]:
    return {
        "dataset": index.dataset,
        "class_set": index.class_set,
        "n_images": index.images.table.num_rows,
        "unit": index.unit,
        "counts": [vars(count) for count in index.counts],
        "stated": [vars(stated) for stated in index.stated],
        "findings": [
            {"what": finding.what, "n": len(finding.names), "names": finding.names} for finding in index.findings
        ],
    }


def _print_index(index: "Index", root: Path, out: Path) -> None:
    """Found and published counts side by side, each difference in words; then what is odd."""
    from stores.tables import column, listed

    class_set = f", class set {index.class_set}" if index.class_set else ""
    n_images = index.images.table.num_rows
    click.echo(f"{index.dataset}{class_set}: {n_images:,} images in {_shown(str(root))}")
    rows = [(_shown(count.name), count.found, count.published) for count in index.counts]
    published = [number for _, _, number in rows if number is not None]
    rows.append(("total", sum(found for _, found, _ in rows), sum(published) if published else None))
    width = max(len(name) for name, _, _ in rows)
    click.echo(f"  {'':<{width}}  {index.unit:>9}{'  published' if published else ''}")
    for name, found, number in rows:
        beside = "" if number is None else f"  {number:>9,}  {_difference(found, number)}"
        click.echo(f"  {name:<{width}}  {found:>9,}{beside}".rstrip())
    for stated in index.stated:
        click.echo(f"  stated elsewhere: {stated.n:,} ({stated.source})")
    for finding in index.findings:
        click.echo(f"  {finding.what}: {len(finding.names):,} ({listed([_shown(name) for name in finding.names])})")
    if any(len(finding.names) > 3 for finding in index.findings):
        click.echo("  (--json names all of them)")
    groups = {
        kind: len({value for value in column(index.images.table, name) if value is not None})
        for name, kind in (("label", "classes"), ("patient", "patients"), ("disease", "diseases"))
    }
    click.echo(", ".join([f"{out}: {n_images:,} images", *(f"{n:,} {kind}" for kind, n in groups.items() if n)]))


def _print_probe(out: Path, scores: dict[str, Any]) -> None:
    level, rule, chance = scores["level"], scores["regularization"], scores["permutation"]
    shown = ", ".join(f"{_shown(name)} {n:,}" for name, n in scores["classes"].items())
    click.echo(
        f"{out}: {scores['n_units']:,} {level}s in {scores['n_groups']:,} groups; {_shown(scores['target'])}: {shown}"
    )
    _print_left_out(scores["left_out"])
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
            f"{_count(chance['n'], 'shuffle')}; first repeat {found['observed']:.3f}, p = {found['p']:.3g} "
            f"(no p can be below {chance['p_floor']:.3g})"
        )


def _span(interval: dict[str, float | None]) -> str:
    """A 95% interval."""
    return "" if interval["low"] is None else f"({interval['low']:.3f} to {interval['high']:.3f})"


def _difference(found: int, published: int) -> str:
    if found == published:
        return ""
    return f"<- {abs(found - published):,} {'fewer' if found < published else 'more'}"


def _shown(name: str) -> str:
    """A name from a disk, safe to print: no escape sequences, nothing that is not UTF-8."""
    return name if name.isprintable() else ascii(name)


def _print_dataset(found: dict[str, Any], label: str) -> None:
    """What `cyto concept stats` found in one dataset, and what it could not say."""
    unreadable = f" ({found['n_unreadable']:,} unreadable)" if found["n_unreadable"] else ""
    click.echo(
        f"  {_shown(found['dataset'])}: {found['n_readable']:,} images{unreadable}, {found['n_labelled']:,} with one "
        f"of {found['n_labels']:,} labels; {_count(found['n_silent'], 'latent')} never active, "
        f"{found['n_meaningful']:,} have a mean activation of 0.001 or more"
    )
    if not found["n_labelled"]:
        click.echo(f"    no image has a {label}: label entropies are null")
        return
    if "n_divergence_q_05" in found:
        without = found["n_labelled_without_patient"]
        click.echo(
            f"    {_count(found['n_divergence_q_05'], 'latent')} whose top images differ in {label} from the dataset, "
            f"{found['n_entropy_q_05']:,} with an entropy smaller than by chance (q <= 0.05; {label}s shuffled from "
            f"patient to patient: {_count(found['n_patients'], 'patient')}"
            + (f", {_count(without, 'image')} without a patient counted as one each)" if without else ")")
        )
    if found["n_without_entropy"]:
        click.echo(
            f"    {_count(found['n_without_entropy'], 'latent')} without an entropy: active, too few labelled images"
        )
    if found["n_top_unlabelled"]:
        click.echo(f"    {found['n_top_unlabelled']:,} top images have no {label}: left out of the entropies")


def _print_agreement(pair: dict[str, Any]) -> None:
    names = f"{_shown(pair['dataset_a'])} and {_shown(pair['dataset_b'])}"
    if not pair["n_compared"]:
        click.echo(f"  {names}: no latent has enough images with a label_common in both")
        return
    click.echo(
        f"  {names}: {pair['n_agreeing']:,} of {pair['n_compared']:,} latents ({pair['share']:.1%}) have the same top "
        f"label_common; by chance {pair['share_expected']:.1%}"
    )


def _print_latent(page: dict[str, Any]) -> None:
    """One latent in one dataset."""
    rows = {
        "frequency": f"{page['frequency']:.3g} ({_count(page['n_images'], 'image')})",
        "activation": f"mean {page['mean_activation']:.3g} where active, largest token {page['max_activation']:.3g}",
        "entropy": f"{_number(page['label_entropy'])} (shuffled {_number(page['label_entropy_null'])})",
        "label": f"{_shown(page['top_label'] or 'n/a')} ({page['n_labelled']:,} top images with a label)",
    }
    _print_page(f"latent {page['latent']:,} in {_shown(page['dataset'])}", rows)
    for image in page["top_images"]:
        label = _shown(image["label"] or image["label_common"] or "")
        click.echo(f"  {image['rank']:>3}  {image['value']:<10.4g} {_shown(image['image_id'])}  {label}".rstrip())


def _cells(values: Iterable[Any]) -> str:
    return "".join(f"{value:>9}" for value in values)


def _print_page(title: str, rows: dict[str, str]) -> None:
    click.echo(title)
    for name, value in rows.items():
        click.echo(f"  {name:<10} {value}")


def _state(complete: bool) -> str:
    return "complete" if complete else "INCOMPLETE (run the same command again to continue)"


def _size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
