"""Maps of one image: of given latents, or of the latents that characterise a patch (CytoSAE, Fig. 3)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as ss

from cytosae.stage_one import StageOne, require_stage_one
from stores.activation_spec import ActivationSpec
from stores.concept_store import ConceptStore
from stores.devices import resolve_device
from stores.errors import BadInput
from stores.notebook import figure_html
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import MAPS, stated
from stores.tables import column
from stores.token_layout import TokenLayout
from stores.wording import Report

from .figures import Style, plot_maps, plot_rows
from .patch_maps import PatchQuery, Pixels, latents_of_patch, patch_map, read_tokens
from .reference_images import (
    Frame,
    Places,
    Sources,
    as_concepts,
    as_sources,
    check_n_images,
    reference_rows,
    require_same_sae,
    unseen,
    unseen_warnings,
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The image whose maps are drawn, from a store or from a new file."""

    name: str
    tokens: ss.csr_matrix  # (tokens_per_image, n_latents)
    picture: Pixels | str  # a str is the reason why it cannot be shown
    origin: dict[str, Any]  # what determines `tokens`; plain JSON values
    dataset: str | None = None  # of an image of a store
    layout: TokenLayout | None = None  # of the tokens; None: CLS first, then patches


@dataclass(frozen=True, kw_only=True)
class MapResult(Report):
    """What was drawn."""

    out: Path  # the folder
    name: str  # of the image
    query: PatchQuery | None = None  # the patch that was asked about
    has_references: bool = False  # are the reference images of each latent drawn, too?
    latents: list[int]
    largest: list[float]  # value of each latent at a patch of the image
    n_active: int  # at the patch, if one was asked for
    n_shared: int  # of these; a latent may be both
    n_noisy: int
    unseen: list[str]  # images that could not be shown, and why
    was_complete: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """Images that could not be shown."""
        return unseen_warnings(self.unseen, "--root")

    def lines(self) -> Iterator[str]:
        """The active latents of the patch, the largest value of each latent that is drawn, and the files."""
        if self.query is not None:
            yield (
                f"patch {self.query.patch} of {self.name}: {self.n_active:,} active latents; left out: "
                f"{self.n_shared:,} shared (frequency of at least {self.query.shared:g} in {self.query.dataset}), "
                f"{self.n_noisy:,} noisy (mean activation above {self.query.noisy:g})"
            )
        for latent, largest in zip(self.latents, self.largest, strict=True):
            yield f"  latent {latent}: largest value {largest:.4g}"
        yield f"{self.out}: map.png and .svg{', latent<N>.png and .svg' if self.has_references else ''}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "map.png")


def stored_subject(sources: Sources, image_id: str) -> Subject:
    """An image of one of the stores.

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
        layout=store.layout,
    )


def new_subject(
    sources: Sources,
    file: Path | str,
    sae: Path | str,
    stage_one: StageOne,
    *,
    weights: str | None = None,
    device: str = "auto",
    assume_compatible: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Subject:
    """An image file that is in no store, encoded as the images of the first store were.

    Parameters
    ----------
    sae : the SAE that the store was made with
    stage_one : `cytocache.bridge`
    weights : the file of the trained backbone; an untrained one needs none
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
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

    file, device = Path(file), resolve_device(device)
    latents = sources.stores[0]
    cache, spec = f"the cache of {latents.root}", stated(ActivationSpec, latents.spec.cache, latents.root)
    run = load_sae(Path(sae), device=device)
    run.require_tokens(spec, cache, assume_compatible=assume_compatible)
    tokens, picture, content_hash = stage_one.new_image(
        file, spec, cache, weights=weights, device=device, progress=progress
    )
    rows = encode_image(tokens, run, latents.spec)
    return Subject(
        name=file.name,
        tokens=rows.to_scipy(latents.spec.n_latents),
        picture=picture,
        origin={"sha256": content_hash, "as": latents.identity},
        layout=latents.layout,
    )


def write_maps(
    stores: Sources | Places,
    out: Path | str,
    *,
    image_id: str | None = None,
    file: Path | str | None = None,
    sae: Path | str | None = None,
    weights: str | None = None,
    latents: Sequence[int] = (),
    query: PatchQuery | None = None,
    concepts: ConceptStore | Path | str | None = None,
    n_images: int = 6,
    style: Style | None = None,
    stage_one: StageOne | None = None,
    roots: Sequence[Path | str] = (),
    assume_compatible: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> MapResult:
    """Write `map.png`, `patches.parquet`, and with `concepts` the reference images of each latent, `latent<N>.png`.

    The image is one of the stores (`image_id`), or a new file that is encoded as their images were (`file`, `sae`).
    The map of a latent has the patches row by row from the top left, (16, 16) for DinoBloom, in the latent's own unit.

    Parameters
    ----------
    stores : latent stores of one SAE, as paths (then with `stage_one`) or opened by `open_sources`
    image_id : a value of the column image_id
    file, sae : a new image file, and the SAE that the stores were made with; `stage_one` is needed
    weights : with `file`: the file of the trained backbone; an untrained one needs none
    latents : to be shown; or none, and `query` chooses those of a patch, which needs `concepts`
    concepts : a folder of `concept_statistics`
    n_images : reference images of each dataset, at most
    style : how maps are drawn over images; None: `Style()`
    stage_one : `cytocache.bridge`, which reads images and runs the backbone
    roots : folder of the images of each store; none: as recorded when the caches were made
    assume_compatible : with `file`: take an imported SAE, which does not say which tokens it was trained on
    device : with `file`: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    progress : with `file`: bytes of the weights downloaded, bytes in all

    Raises
    ------
    BadInput
        If there is no such image, latent, patch or dataset, or the query leaves no latent; if not exactly one of
        `image_id` and `file`, or of `latents` and `query`, is given; if `n_images` is below 1.
    SpecMismatch
        If the stores, the concepts, the SAE or the backbone do not belong together, or `out` holds something else.
    """
    latents = [*latents]
    if (query is None) == (not latents):
        raise BadInput("give latents, or a query for those that are active at a patch")
    if query is not None and concepts is None:
        raise BadInput("a query needs concepts, whose statistics say which latents are shared or noisy")
    out, sources = Path(out), as_sources(stores, stage_one, roots)
    concepts = None if concepts is None else as_concepts(concepts)
    if image_id is not None and file is None and sae is None:
        subject = stored_subject(sources, image_id)
    elif image_id is None and file is not None and sae is not None:
        subject = new_subject(
            sources,
            file,
            sae,
            require_stage_one(stage_one),
            weights=weights,
            device=device,
            assume_compatible=assume_compatible,
            progress=progress,
        )
    else:
        raise BadInput("give image_id; or file and sae, for an image that is in no store")
    if query is not None and concepts is not None:
        known = query.dataset or (subject.dataset if subject.dataset in concepts.datasets else None)
        query = replace(query, dataset=concepts.choose_dataset(known))
    inputs = [*sources.places, *([concepts.root] if concepts else []), *(Path(each) for each in (file, sae) if each)]
    return _write_maps(
        subject,
        out,
        latents=latents,
        query=query,
        concepts=concepts,
        sources=sources,
        n_images=n_images,
        style=style or Style(),
        overwrite=overwrite,
        inputs=inputs,
    )


def _write_maps(
    subject: Subject,
    out: Path,
    *,
    latents: Sequence[int],
    query: PatchQuery | None,
    concepts: ConceptStore | None,
    sources: Sources,
    n_images: int,
    style: Style,
    overwrite: bool,
    inputs: Sequence[Path],
) -> MapResult:
    active = None
    if concepts is not None:
        check_n_images(n_images)
        require_same_sae(concepts, sources)
    if query is not None and concepts is not None:
        active = latents_of_patch(subject.tokens, query, concepts, subject.layout)
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
    known: dict[str, Any] = {
        "out": out,
        "name": subject.name,
        "query": query,
        "has_references": concepts is not None,
    }
    if writer.is_complete:
        return ResultStore(out, MAPS).result(MapResult, was_complete=True, **known)

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
    found: dict[str, Any] = {
        "latents": latents,
        "largest": [float(frame.patches.max()) for frame in frames],
        "n_active": 0 if active is None else active.num_rows,
        "n_shared": 0 if active is None else _count(active, "is_shared"),
        "n_noisy": 0 if active is None else _count(active, "is_noisy"),
        "unseen": list(dict.fromkeys(not_shown)),
    }
    writer.finish({"image": subject.name, "result": found})
    return MapResult(**known, **found)


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
    patches = patch_map(subject.tokens, latent, subject.layout)
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
