"""Maps of one image: of latents that are named, or of those that speak for one of its patches (Fig. 3 of the paper)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as ss

from cytosae.stage_one import StageOne
from stores.activation_store import ActivationSpec
from stores.concept_store import ConceptStore
from stores.errors import BadInput
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import MAPS, stated
from stores.tables import column

from .figures import Style, plot_maps, plot_rows
from .patch_maps import PatchQuery, Pixels, latents_of_patch, patch_map, read_tokens
from .reference_images import Frame, Sources, reference_rows, require_same_sae, unseen


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The image that is looked at, from a store or a file of its own."""

    name: str
    tokens: ss.csr_matrix  # (tokens_per_image, n_latents), CLS first
    picture: Pixels | str  # a str says why there is nothing to see
    origin: dict[str, Any]  # what decides `tokens`; plain JSON values
    dataset: str | None = None  # of an image of a store


@dataclass(frozen=True, kw_only=True)
class MapResult:
    """What was drawn."""

    latents: list[int]
    largest: list[float]  # value of each latent at a patch of the image
    n_active: int  # at the patch, if one was asked for
    n_shared: int  # of these; a latent may be both
    n_noisy: int
    unseen: list[str]  # images that could not be shown, and why
    was_complete: bool = False


def stored_subject(sources: Sources, image_id: str) -> Subject:
    """An image of one of the stores, to look at.

    Raises
    ------
    BadInput
        If no store has it, two have, or it could not be read when its store was made.
    """
    number, image_index = sources.find(image_id)
    store = sources.stores[number]
    if not store.readable()[image_index]:
        raise BadInput(f"image {image_id!r} could not be read when {store.root} was made: it has no latents")
    return Subject(
        name=image_id,
        tokens=read_tokens(store, image_index),
        picture=sources.pictures[number](image_index),
        origin={"latents": store.identity, "image_id": image_id},
        dataset=column(store.images, "dataset")[image_index],
    )


def new_subject(
    sources: Sources,
    file: Path,
    sae: Path,
    stage_one: StageOne,
    *,
    weights: str | None = None,
    device: str = "cpu",
    assume_compatible: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Subject:
    """An image file that is in no store, encoded as the images of the first store were.

    Parameters
    ----------
    sae : the SAE that the store was made with
    stage_one : `cytocache.bridge`
    weights : the file of the trained backbone; an untrained one needs none
    progress : bytes of the weights downloaded, bytes in all

    Raises
    ------
    BadInput
        If the file or the weights cannot be read.
    SpecMismatch
        If backbone or SAE are not those of the store.
    """
    from cytosae.latents import encode_image  # brings torch
    from cytosae.sae import load_sae

    latents = sources.stores[0]
    cache, spec = f"the cache of {latents.root}", stated(ActivationSpec, latents.spec.cache, latents.root)
    run = load_sae(sae, device=device)
    run.require_tokens(spec, cache, assume_compatible=assume_compatible)
    tokens, picture, content_hash = stage_one.new_image(
        file, spec, cache, weights=weights, device=device, progress=progress
    )
    rows = encode_image(tokens, run, latents.spec, device=device)
    return Subject(
        name=file.name,
        tokens=rows.to_scipy(latents.spec.n_latents),
        picture=picture,
        origin={"sha256": content_hash, "as": latents.identity},
    )


def write_maps(
    subject: Subject,
    out: Path,
    *,
    latents: Sequence[int] = (),
    query: PatchQuery | None = None,
    concepts: ConceptStore | None = None,
    sources: Sources,
    n_images: int = 6,
    style: Style,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> MapResult:
    """Write `map.png`, `patches.parquet`, and with `concepts` the reference images of each latent, `latent<N>.png`.

    Parameters
    ----------
    latents : to be shown; or none, and `query` chooses those of a patch, which needs `concepts`
    sources : where the reference images are found
    n_images : reference images of each dataset, at most

    Raises
    ------
    BadInput
        If there is no such latent, patch or dataset, or the query leaves no latent.
    SpecMismatch
        If the concepts are of another SAE, or `out` holds something else.
    """
    active = None
    if concepts is not None:
        require_same_sae(concepts, sources)
    if query is not None:
        assert concepts is not None
        active = latents_of_patch(subject.tokens, query, concepts)
        latents = _best(active, query, subject.name)
    latents, patch = list(dict.fromkeys(latents)), None if query is None else query.patch
    frames = [_frame(subject, latent, patch) for latent in latents]
    spec = {
        "origin": subject.origin,
        "latents": latents,
        "query": None if query is None else asdict(query),
        "references": None
        if concepts is None
        else {"concepts": concepts.identity, "latents": sources.identities, "n_images": n_images},
        "style": asdict(style),
    }
    writer = begin_results(out, MAPS, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "matplotlib"))
    writer.watch(*sources.headers, *([concepts.header] if concepts else []))
    if writer.is_complete:
        return ResultStore(out, MAPS).result(MapResult, was_complete=True)

    plot_maps(subject.picture, frames, writer.root / "map", title=subject.name, style=style, patch=patch)
    writer.write_table("patches", _patch_table(latents, frames))
    if active is not None:
        writer.write_table("active", active)
    not_shown = [f"{subject.name}: {subject.picture}"] if isinstance(subject.picture, str) else []
    if concepts is not None:
        for latent in latents:
            rows = reference_rows(concepts, sources, latent, n_images=n_images)
            plot_rows(rows, writer.root / f"latent{latent}", title=f"Latent {latent}", style=style)
            not_shown += unseen(rows)
    result = MapResult(
        latents=latents,
        largest=[float(frame.patches.max()) for frame in frames],
        n_active=0 if active is None else active.num_rows,
        n_shared=0 if active is None else _count(active, "is_shared"),
        n_noisy=0 if active is None else _count(active, "is_noisy"),
        unseen=list(dict.fromkeys(not_shown)),
    )
    kept = {name: value for name, value in asdict(result).items() if name != "was_complete"}
    writer.finish({"image": subject.name, "result": kept})
    return result


def _best(active: pa.Table, query: PatchQuery, name: str) -> list[int]:
    chosen = [row["latent"] for row in active.to_pylist() if row["rank"] is not None and row["rank"] <= query.n_top]
    if not chosen:
        raise BadInput(
            f"no latent is left at patch {query.patch} of {name}: {active.num_rows:,} are active there, of which "
            f"{_count(active, 'is_shared'):,} are shared (frequency of at least {query.shared:g} in {query.dataset}) "
            f"and {_count(active, 'is_noisy'):,} noisy (mean activation above {query.noisy:g}); choose another "
            f"--patch, or larger --shared and --noisy"
        )
    return chosen


def _count(active: pa.Table, name: str) -> int:
    return int(np.sum(active[name].to_numpy()))


def _frame(subject: Subject, latent: int, patch: int | None) -> Frame:
    patches = patch_map(subject.tokens, latent)
    at_patch = "" if patch is None else f", {patches.ravel()[patch]:.3g} at patch {patch}"
    is_active = bool(patches.any())
    caption = f"latent {latent}{at_patch if is_active else ': active at no patch'}"
    return Frame(caption=caption, picture=subject.picture, patches=patches, image_id=subject.name)


def _patch_table(latents: Sequence[int], frames: Sequence[Frame]) -> pa.Table:
    """The nonzero patches: latent, patch, row, column, value."""
    rows = [
        (latent, patch, patch // len(frame.patches), patch % len(frame.patches), value)
        for latent, frame in zip(latents, frames, strict=True)
        for patch, value in enumerate(frame.patches.ravel().tolist())
        if value
    ]
    names, kinds = ("latent", "patch", "row", "column", "value"), (*(pa.int64(),) * 4, pa.float32())
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return pa.table({name: pa.array(cells, kind) for name, cells, kind in zip(names, columns, kinds, strict=True)})
