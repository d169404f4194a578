"""cyto cache: activation caches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
    assume_option,
    device_option,
    json_option,
    overwrite_option,
    print_page,
    print_problems,
    progress_line,
    readers_option,
    say_done,
    stopping_gently,
)
from stores.devices import resolve_device
from stores.wording import counted, describe_cache, rate, size_on_disk, state_of, unreadable_images

if TYPE_CHECKING:
    from cytocache.extract import ExtractResult
    from cytocache.fidelity import Fidelity
    from cytocache.repair import RepairResult
    from stores import ActivationSpec, Header


class Bridges(Protocol):
    """What cli.py hands to commands that need the other stage, as click's context object."""

    def encoder(
        self, sae: Path, store: Path, device: str, assume_compatible: bool
    ) -> tuple[Callable[[Any], Any], list[str]]:
        """What turns the tokens of a cache into latents, and what had to be assumed of them."""


@click.command("extract")
@click.argument("images", type=FILE)
@click.argument("store", type=FILE)
@click.option("--root", type=FILE, help="What paths in a manifest are relative to [default: the manifest's folder].")
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
@device_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the forward pass; auto: bf16 on a GPU, else fp32.",
)
@click.option("--batch-size", type=COUNT, help="Images per forward pass  [default: 128 on a GPU, else 32].")
@readers_option
@click.option("--chunk-images", type=COUNT, default=256, show_default=True, help="Images per chunk file.")
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    default="0/1",
    help="Write part I of N (I from 0): run N such commands on as many GPUs or nodes, in any order; the last one to "
    "end completes the store.",
)
@overwrite_option
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
    device = resolve_device(device)
    batch_size = batch_size or (32 if device == "cpu" else 128)
    config = ExtractConfig(device=device, batch_size=batch_size, **settings)
    with (
        stopping_gently("the chunk") as stop,
        progress_line("download", "byte") as downloading,
        progress_line("extract", "image") as progress,
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
        said = f"{counted(len(found.passed_over), 'folder')} passed over ({listed(list(found.passed_over))})"
        click.echo(f"{said}: hidden, of a network disk or system, or results of Cyto: no cells", err=True)
    if found.n_skipped:
        click.echo(f"{counted(found.n_skipped, 'file')} passed over in {images}: not images by their name", err=True)
    _print_extracted(store, done, str(shard))


def _print_extracted(store: Path, done: "ExtractResult", shard: str) -> None:
    if not done.is_complete:
        click.echo(
            f"{store}: shard {shard} is done, {done.n_readable + done.n_unreadable:,} images; other shards are not. "
            f"The last one completes the store; if all have ended: cyto cache merge {store}"
        )
        return
    for place in done.stores:
        say_done(place, done.was_complete)
        click.echo(describe_cache(place))
    if done.n_unreadable:
        click.echo(f"warning: {unreadable_images(done.stores[0])}", err=True)


@click.command("merge")
@click.argument("store", type=FILE)
def cache_merge(store: Path) -> None:
    """Complete an activation cache whose shards have all ended. The last shard does so itself, unless it was killed.

    \b
    Example: cyto cache merge cells.acts.zarr
    """
    from stores.activation_writer import merge_cache

    for place in merge_cache(store):
        click.echo(describe_cache(place))


@click.command("info")
@click.argument("store", type=STORE)
@json_option
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
        n_bytes = size_on_disk(folder) + (len(chunks) * spec.chunk_bytes if is_url else 0)
        n_written = sum(len(spec.chunk_rows(chunk)) for chunk in chunks)
        info = {**header.to_json(), "n_images_written": n_written, "bytes": n_bytes, "runs": read_runs(folder)}
    if as_json:
        click.echo(json.dumps(info, indent=1))
        return
    title = f"{store}: {header.kind}, version {header.version}, {state_of(header.complete)}"
    print_page(title, _cache_rows(header, spec, info))
    if header.complete:
        _print_groups(ActivationStore(store).images)
        if (header.summary or {}).get("n_unreadable"):
            click.echo(f"  {unreadable_images(store)}")


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


@click.command("verify")
@click.argument("store", type=FILE)
@json_option
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
    print_problems(store, verify_activations(store), n_chunks, as_json)


@click.command("repair")
@click.argument("store", type=FILE)
@click.option("--images", type=FILE, help="What STORE was made from; needed if its own image table is damaged.")
@click.option("--root", type=FILE, help="Where the images lie now  [default: where they lay].")
@click.option("--weights", help="The file of weights that STORE was made with; an untrained backbone needs none.")
@device_option
@click.option("--batch-size", type=COUNT, help="Images per forward pass  [default: as STORE was made].")
@readers_option
def cache_repair(store: Path, images: Path | None, root: Path | None, device: str, **settings: Any) -> None:
    """Verify STORE, and make just its damaged chunks again, from the same images with the same weights.

    \b
    Example: cyto cache repair cells.acts.zarr --weights DinoBloom-B.pth
    """
    from cytocache.datasets import open_images
    from cytocache.repair import repair

    found = open_images(images, root=root) if images else None
    with (
        stopping_gently("the chunk") as stop,
        progress_line("verify", "chunk") as verifying,
        progress_line("download", "byte") as downloading,
        progress_line("repair", "image") as progress,
    ):
        done = repair(
            store,
            images=found,
            root=root,
            device=resolve_device(device),
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
    click.echo(f"{store}: repaired; {counted(len(done.chunks), 'chunk')} made again")
    if done.other_bits:
        click.echo(
            f"warning: {len(done.other_bits):,} of them differ in the last bits from what was there (another device, "
            f"version, thread count or batch size): SAEs trained on this cache before name other numbers",
            err=True,
        )
    if done.other_images:
        click.echo("warning: other image files are there, or can be read, than when the cache was made", err=True)


@click.command("fidelity")
@click.argument("store", type=FILE)
@click.option("--root", type=FILE, help="Where the images lie now  [default: where they lay].")
@click.option("--weights", help="The file of weights that STORE was made with; an untrained backbone needs none.")
@click.option("--sae", "run", type=FILE, help="An SAE: count the latents that cross zero or tau.")
@click.option("--tau", type=float, default=0.2, show_default=True, help="Threshold of activity, with --sae.")
@click.option("--sample", "n_images", type=COUNT, default=64, show_default=True, help="Images to compare.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the sample.")
@assume_option
@device_option
@readers_option
@json_option
@click.pass_obj
def cache_fidelity(
    bridges: "Bridges",
    store: Path,
    run: Path | None,
    assume_compatible: bool,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """What float16 and the precision of the forward pass cost: STORE against float32 tokens of a sample of its images.

    \b
    Example: cyto cache fidelity cells.acts.zarr --weights DinoBloom-B.pth --sae cells.sae
    """
    import math
    from dataclasses import asdict

    from cytocache.fidelity import measure_fidelity

    device = resolve_device(device)
    latents, assumed = bridges.encoder(run, store, device, assume_compatible) if run else (None, None)
    with progress_line("download", "byte") as downloading, progress_line("fidelity", "image") as progress:
        found = measure_fidelity(
            store, device=device, latents=latents, progress=progress, download_progress=downloading, **settings
        )
    if as_json:
        values = {name: None if math.isnan(value) else value for name, value in asdict(found).items()}
        facts = {} if assumed is None else {"assumed_equal": assumed}
        click.echo(json.dumps({"store": str(store), "tau": settings["tau"], **facts, **values}, indent=1))
    else:
        rows = _fidelity_rows(found, seed=settings["seed"], tau=settings["tau"] if run else None)
        print_page(f"{store}: cached float16 against float32", rows)


def _fidelity_rows(found: "Fidelity", *, seed: int, tau: float | None) -> dict[str, str]:
    rows = {
        "sample": f"{found.n_images:,} images, {found.n_tokens:,} tokens (seed {seed})",
        "FVU": f"{found.fvu:.2e} of the float32 tokens' variance is lost; of CLS alone "
        f"{f'{found.fvu_cls:.2e}' if found.fvu_cls == found.fvu_cls else 'n/a (it does not vary)'}",
        "magnitude": f"largest {found.largest_magnitude:.4g}; largest difference {found.largest_difference:.3g}",
    }
    if tau is not None:
        crossing = rate(found.n_cross_zero, found.n_active), rate(found.n_cross_tau, found.n_above_tau)
        rows["latents"] = f"{found.n_active:,} are active in float32; {found.n_cross_zero:,} cross zero ({crossing[0]})"
        rows["tau"] = f"{found.n_above_tau:,} exceed {tau:g}; {found.n_cross_tau:,} cross it ({crossing[1]})"
    return rows


def _describe_run(run: dict[str, Any]) -> str:
    """One line of the run log; a log of another program's may lack any of it."""
    by = f"shard {run['shard']}, " if "shard" in run else ""
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    where = f"{run.get('device')}, batches of {run.get('batch_size')}, {run.get('threads')} threads"
    return f"{run.get('time')}: {by}{where}; images in {run.get('images_root')}; {versions}"


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
