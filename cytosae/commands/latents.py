"""cyto latents: latent stores."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stores.console import FILE, json_option, print_page, print_problems, progress_line
from stores.wording import describe_latents, pruning, size_on_disk, state_of

if TYPE_CHECKING:
    from stores import Header, LatentSpec


@click.command("info")
@click.argument("store", type=FILE)
@json_option
def latents_info(store: Path, as_json: bool) -> None:
    """What is in a latent store, complete or not.

    \b
    Example: cyto latents info cells.latents.zarr
    """
    from stores import LATENTS, LatentStore, read_header, read_runs
    from stores.latent_shards import missing_images
    from stores.latent_store import read_latent_spec

    header = read_header(store, LATENTS, complete=False)
    missing = [] if header.complete else missing_images(store, read_latent_spec(header, store))
    n_bytes = size_on_disk(store)
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
    print_page(f"{store}: {header.kind}, version {header.version}, {state_of(header.complete)}", rows)


def _latent_rows(header: "Header", spec: "LatentSpec", n_bytes: int) -> dict[str, str]:
    return {
        "images": f"{spec.n_images:,} x {spec.tokens_per_image} tokens",
        "latents": f"{spec.n_latents:,}, encoded in {spec.precision}",
        "nonzeros": "(not finished)",
        "values": f"float32, {spec.value_bits} mantissa bits, " + pruning(spec.min_activation, header.summary or {}),
        "SAE": f"sha256 {spec.sae_sha256}",
        "cache": f"{spec.cache['backbone']}{'' if spec.cache['trained'] else ' (UNTRAINED)'}, "
        f"block {spec.cache['block']}, sha256 {spec.cache_sha256}",
        "size": f"{n_bytes / 1e6:,.1f} MB",
        "identity": header.identity,
        "written by": header.created_by,
    }


@click.command("verify")
@click.argument("store", type=FILE)
@json_option
def latents_verify(store: Path, as_json: bool) -> None:
    """Check every chunk file by its checksum, and every index and value, of a latent store.

    Exit code 1 and a line per problem if it is damaged.

    \b
    Example: cyto latents verify cells.latents.zarr
    """
    from stores import LATENTS, read_header, verify_latents
    from stores.latent_store import read_latent_spec

    n_blocks = -(-read_latent_spec(read_header(store, LATENTS), store).n_images // 256)
    print_problems(store, verify_latents(store, block_images=256), n_blocks, as_json)


@click.command("merge")
@click.argument("store", type=FILE)
def latents_merge(store: Path) -> None:
    """Complete a latent store whose shards have all ended. The last shard does so itself, unless it was killed.

    No GPU, no SAE and no cache is needed: the rows are there, and are only joined.

    \b
    Example: cyto latents merge cells.latents.zarr
    """
    from stores.latent_shards import merge_latents

    with progress_line("join", "image") as progress:
        merge_latents(store, progress=progress)
    click.echo(describe_latents(store))
