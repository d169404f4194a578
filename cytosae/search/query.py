"""What is looked for: the latents of an image of the barcodes, of a region of it, or of a new image file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss

from cytosae.stage_one import Pixels, StageOne
from stores.activation_spec import ActivationSpec
from stores.devices import resolve_device
from stores.errors import BadInput, SpecMismatch
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.spec import stated
from stores.tables import column
from stores.token_layout import TokenLayout
from stores.token_sets import chosen_tokens

from .config import BARCODE, REGION
from .kernels import fingerprint
from .scan import LAYERS, Collection, reader_of

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Query:
    """An image that others are compared with."""

    name: str
    origin: dict[str, Any]  # what determines it; plain JSON values
    number: int | None  # of the image in the barcodes; None: it is not one of them
    layers: dict[str, Float32s]  # "X", "mean", "max": (latents,); of a region only "max"
    content_hash: str  # of the image file; images with the same one are not listed
    picture: Pixels | None  # of a new file; that of a stored image is found by its latent store
    tokens: dict[str, Float32s]  # "tokens", "cls": (width,) of a new file; of a stored image they come from the cache


def vector_of(query: Query, way: str, weights: Float32s, k: int) -> Float32s:
    """(latents,) what the kernels take: of norm 1 for fingerprint and barcode, the values themselves for a region.

    Raises
    ------
    BadInput
        If there is nothing to look for.
    """
    values = query.layers[LAYERS[way]]
    if way == BARCODE:
        found = (np.log1p(values) * weights).astype(np.float32)
    else:
        some = np.flatnonzero(values)
        latents, weighted = fingerprint(some, values[some], weights, k)
        found = np.zeros(len(values), np.float32)
        found[latents] = values[latents] if way == REGION else weighted
    norm = float(np.linalg.norm(found.astype(np.float64)))
    if norm == 0:
        what = "is above tau" if way == BARCODE else "is active"
        raise BadInput(
            f"no latent of {query.name} {what} and is missing in any other image, so there is nothing to look for; "
            f"try --weigh none, or count barcodes at a smaller tau"
        )
    return found if way == REGION else (found / norm).astype(np.float32)


def stored_query(collection: Collection, image_id: str, ways: Sequence[str]) -> Query:
    """An image of the barcodes, whole.

    Raises
    ------
    BadInput
        If it could not be read when its latents were made.
    """
    number = collection.find(image_id)
    assert number is not None
    if not collection.is_readable[number]:
        raise BadInput(f"image {image_id!r} could not be read when its latents were made: it has none to look for")
    layers = {}
    for way in ways:
        layer = LAYERS[way]
        reader_of(collection, way)
        rows = collection.store.read_rows("image", np.array([number]), collection.tau, layer=layer)
        layers[layer] = rows.toarray()[0].astype(np.float32)
    return Query(
        name=image_id,
        origin={"image_id": image_id},
        number=number,
        layers=layers,
        content_hash=str(collection.columns["content_hash"][number]),
        picture=None,
        tokens={},
    )


def region_query(collection: Collection, image_id: str, latents: Sequence[Path | str], patches: Sequence[int]) -> Query:
    """Some patches of an image of the barcodes: the largest value of each latent there.

    Raises
    ------
    BadInput
        If no latent store is given or none has the image, or there is no such patch.
    SpecMismatch
        If the barcodes were not counted from this latent store.
    """
    for path in latents:
        store = LatentStore(path)
        ids = column(store.images, "image_id")
        if image_id in ids:
            _require_counted_from(collection, store)
            at = ids.index(image_id)
            if not store.readable()[at]:
                raise BadInput(f"image {image_id!r} could not be read when {store.root} was made: it has no latents")
            rows = store.read_images(at, at + 1).to_scipy(store.spec.n_latents)
            number = collection.find(image_id)
            return Query(
                name=image_id,
                origin={"image_id": image_id, "latents": store.identity},
                number=number,
                layers=_of_region(rows, store.layout, patches),
                content_hash=str(collection.columns["content_hash"][number]) if number is not None else "",
                picture=None,
                tokens={},
            )
    where = f"none of the given latent stores has {image_id!r}" if latents else "none was given"
    raise BadInput(f"a region needs the latents of the image's patches, and {where}: give --latents, as cyto barcode")


def file_query(
    collection: Collection,
    file: Path,
    latents: Path | str,
    sae: Path | str,
    stage_one: StageOne,
    *,
    patches: Sequence[int] = (),
    weights: str | None = None,
    device: str = "auto",
    assume_compatible: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Query:
    """An image file that is in no store, encoded as the images of `latents` were.

    Parameters
    ----------
    latents : a latent store that the barcodes were counted from
    sae : the SAE that it was made with
    weights : the file of the trained backbone; an untrained one needs none
    progress : bytes of the weights downloaded, bytes in all

    Raises
    ------
    BadInput
        If the file or the weights cannot be read, or there is no such patch.
    SpecMismatch
        If backbone, SAE, latents and barcodes do not belong together.
    """
    from cytosae.latents import encode_image  # brings torch
    from cytosae.sae import load_sae

    store = LatentStore(latents)
    _require_counted_from(collection, store)
    device = resolve_device(device)
    cache, spec = f"the cache of {store.root}", stated(ActivationSpec, store.spec.cache, store.root)
    run = load_sae(Path(sae), device=device)
    run.require_tokens(spec, cache, assume_compatible=assume_compatible)
    tokens, picture, content_hash = stage_one.new_image(
        file, spec, cache, weights=weights, device=device, progress=progress
    )
    rows = encode_image(tokens, run, store.spec).to_scipy(store.spec.n_latents)
    layout, wide = store.layout, tokens.astype(np.float64)
    layers = _of_region(rows, layout, patches) if patches else _whole(collection, rows, layout)
    return Query(
        name=file.name,
        origin={"sha256": content_hash, "as": store.identity},
        number=None,
        layers=layers,
        content_hash=content_hash,
        picture=picture,
        tokens={
            "tokens": wide[layout.first_patch :].mean(0).astype(np.float32),
            **({"cls": wide[0].astype(np.float32)} if layout.n_cls else {}),
        },
    )


def _whole(collection: Collection, rows: ss.csr_matrix, layout: TokenLayout) -> dict[str, Float32s]:
    """The rows that `cyto barcode` would have written for these tokens."""
    chosen = chosen_tokens(str(collection.store.header.spec["token_set"]), layout)
    some = rows[chosen.start : chosen.stop]
    return {
        "X": np.asarray((some > np.float32(collection.tau)).sum(0), np.float32)[0],
        "mean": np.asarray(some.astype(np.float64).mean(0), np.float32)[0],
    }


def _of_region(rows: ss.csr_matrix, layout: TokenLayout, patches: Sequence[int]) -> dict[str, Float32s]:
    wrong = [patch for patch in patches if patch >= len(layout.patches)]
    if wrong:
        raise BadInput(
            f"patches are numbered 0 to {len(layout.patches) - 1:,}, row by row from the top left; found {wrong[0]:,}"
        )
    some = rows[[layout.patches[patch] for patch in patches]]
    return {"max": some.max(0).toarray()[0].astype(np.float32)}


def _require_counted_from(collection: Collection, store: LatentStore) -> None:
    said = collection.store.header.spec["latents"]
    if store.identity not in (said if isinstance(said, list) else [said]):
        raise SpecMismatch(
            f"{collection.store.root} was not counted from {store.root}; give a latent store of these barcodes"
        )
