"""cyto cache: activation caches."""

import json
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
    print_check,
    progress_line,
    readers_option,
    stopping_gently,
    tell,
    typed_options,
)

if TYPE_CHECKING:
    from cytocache.fidelity import Sae


class Bridges(Protocol):
    """What cli.py hands to commands that need the other stage, as click's context object."""

    def load_sae(self, sae: Path, device: str) -> "Sae":
        """The SAE at `sae`, on `device`."""


@click.command("extract")
@click.argument("images", type=FILE)
@click.argument("store", type=FILE)
@click.option(
    "--root",
    type=FILE,
    help="Folder or archive that paths in a table are relative to  [default: the table's folder].",
)
@click.option(
    "--backbone",
    default="random-vit-tiny",
    show_default=True,
    help="dinobloom-s, -b, -l or -g; timm:NAME, hf-hub:OWNER/NAME, a folder in timm's layout or a file of weights: any "
    "other vision transformer (docs/howto/other-backbones.md); or random-vit-tiny: small, untrained, no download.",
)
@click.option(
    "--weights",
    metavar="FILE|auto|hf:OWNER/NAME|random",
    help="A DinoBloom .pth file; 'auto': the published one, downloaded once and checked; hf:OWNER/NAME[/FILE]"
    "[@REVISION]: the same from Hugging Face; 'random': untrained. Of another model a file or folder.",
)
@click.option(
    "--image-size",
    type=COUNT,
    help="Pixels along each side of the backbone's input, a multiple of its patches  [default: as it was trained].",
)
@click.option(
    "--crop",
    type=click.Choice(["own", "none"]),
    default="own",
    show_default=True,
    help="own: what the model's own preprocessing cuts off of an image is cut off; none: the whole image, as a square.",
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
    help="Precision of the forward pass; auto: bf16 on a GPU, else fp32.",
)
@click.option("--batch-size", type=COUNT, help="Images per forward pass  [default: 128 on a GPU, else 32].")
@readers_option
@click.option("--chunk-images", type=COUNT, default=256, show_default=True, help="Images per chunk file.")
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    default="0/1",
    help="Write shard I of N (I from 0): run N such commands on as many GPUs or nodes, in any order; the last one to "
    "end completes the store.",
)
@click.option(
    "--allow-truncated",
    is_flag=True,
    help="Take images whose files are cut off as far as they go, instead of leaving them out; the store's column "
    "`truncated` names them.",
)
@overwrite_option
def cache_extract(
    images: Path,
    store: Path,
    root: Path | None,
    shard_text: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Run a backbone once over IMAGES and write its tokens to STORE.

    IMAGES is a folder (one sub-folder per class); a .zip or .tar(.gz) with the same inside, which is not unpacked; a
    folder of such archives; or a .csv or .parquet table with a column `path` (also class.zip::a/b.tif) and, where
    known, image_id, label, patient, disease, dataset.

    \b
    Example: cyto cache extract cells/ cells.acts.zarr --backbone dinobloom-b --weights DinoBloom-B.pth
    """
    from cytocache.datasets import open_images
    from cytocache.extract import ExtractConfig, extract
    from stores.shards import Shard

    shard = Shard.parse(shard_text)
    found = open_images(images, root=root)  # before: nothing is in flight, so the first Ctrl-C stops at once
    with (
        stopping_gently("the chunk") as stop,
        progress_line("download", "byte") as downloading,
        progress_line("extract", "image") as progress,
    ):
        done = extract(
            found,
            store,
            ExtractConfig(**settings),
            shard=shard,
            overwrite=overwrite,
            progress=progress,
            download_progress=downloading,
            stop=stop,
        )
    tell(done, were_complete=done.stores if done.was_complete else ())


@click.command("merge")
@click.argument("store", type=FILE)
def cache_merge(store: Path) -> None:
    """Complete an activation cache whose shards have all ended. The last shard does so itself, unless it was killed.

    \b
    Example: cyto cache merge cells.acts.zarr
    """
    from stores import merge_cache

    tell(merge_cache(store))


@click.command("info")
@click.argument("store", type=STORE)
@json_option
def cache_info(store: Path | str, as_json: bool) -> None:
    """What is in an activation cache, complete or not. STORE may be a URL (s3://, gs://, https://, ...), if complete.

    \b
    Example: cyto cache info cells.acts.zarr
    """
    from stores import DamagedStore
    from stores import cache_info as info_of

    try:
        info = info_of(store, header_only=as_json)
    except DamagedStore:  # what its header says is needed to repair it
        if not as_json:
            tell(info_of(store, header_only=True))
        raise
    if as_json:
        click.echo(json.dumps(info.to_json(), indent=1))
    else:
        tell(info)


@click.command("verify")
@click.argument("store", type=FILE)
@json_option
def cache_verify(store: Path, as_json: bool) -> None:
    """Check every chunk of an activation cache byte by byte, its journal and its image table.

    Exit code 1 and a line per problem if it is damaged.

    \b
    Example: cyto cache verify cells.acts.zarr
    """
    from stores import check_cache

    with progress_line("verify", "chunk") as progress:
        report = check_cache(store, progress=progress)
    print_check(report, as_json)


@click.command("repair")
@click.argument("store", type=FILE)
@click.option(
    "--images",
    type=FILE,
    help="The folder or table that STORE was made from; needed if its own image table is damaged.",
)
@click.option("--root", type=FILE, help="Folder of the images now  [default: as recorded in STORE].")
@click.option("--weights", help="The weights that STORE was made with; an untrained backbone needs none.")
@device_option
@click.option("--batch-size", type=COUNT, help="Images per forward pass  [default: as STORE was made].")
@readers_option
def cache_repair(store: Path, images: Path | None, root: Path | None, **settings: Any) -> None:
    """Verify STORE, and make only its damaged chunks again, from the same images with the same weights.

    \b
    Example: cyto cache repair cells.acts.zarr --weights DinoBloom-B.pth
    """
    from cytocache.datasets import open_images
    from cytocache.repair import repair

    found = open_images(images, root=root) if images else None  # before: the first Ctrl-C stops at once
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
            verify_progress=verifying,
            progress=progress,
            download_progress=downloading,
            stop=stop,
            **settings,
        )
    tell(done)


@click.command("fidelity")
@click.argument("store", type=FILE)
@click.option("--root", type=FILE, help="Folder of the images now  [default: as recorded in STORE].")
@click.option("--weights", help="The weights that STORE was made with; an untrained backbone needs none.")
@click.option("--sae", "run", type=FILE, help="An SAE: count the latents that change across zero or tau.")
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
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """The error of float16 and of the forward pass: STORE against float32 tokens of a sample of its images.

    \b
    Example: cyto cache fidelity cells.acts.zarr --weights DinoBloom-B.pth --sae cells.sae
    """
    from cytocache.fidelity import measure_fidelity

    if run is None and typed_options("tau"):
        raise click.UsageError("--tau is of use only with --sae, whose latents are counted")
    with progress_line("download", "byte") as downloading, progress_line("fidelity", "image") as progress:
        done = measure_fidelity(
            store,
            sae=bridges.load_sae(run, device) if run else None,
            device=device,
            progress=progress,
            download_progress=downloading,
            **settings,
        )
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
