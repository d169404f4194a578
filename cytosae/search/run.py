"""Which images, and which patients, are most like one image? Exact, in one pass over the barcodes of all images.

Compared by latents (kernels.py): fingerprints and whole barcodes, or by a region of the image; and, beside them, by
what the backbone says without an SAE (token_index.py): mean patch tokens and CLS.
A patient is as similar as its images are on average, so that a patient with more images has no advantage.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.plotting import plain
from cytosae.stage_one import StageOne, require_stage_one
from stores.activation_store import one_or_more, open_caches
from stores.errors import BadInput
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import SEARCH
from stores.tables import column

from .config import BARCODE, FINGERPRINT, REGION, SearchConfig
from .figures import SHOWN, plot_found
from .kernels import barcode_products, fingerprint, fingerprint_products, region_shares
from .query import Query, file_query, region_query, stored_query, vector_of
from .report import SearchResult
from .scan import LAYERS, Collection, open_collection, reader_of, scan
from .token_index import TokenIndex, build_index, places_of

Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
NAMED = ("label", "label_common", "disease")  # columns of the image table that results repeat
_SHARED = 8  # latents that are named as the reason for a similarity


def search_cells(
    barcodes: Path | str,
    image: Path | str,
    config: SearchConfig | None = None,
    *,
    out: Path | str | None = None,
    latents: Path | str | Sequence[Path | str] = (),
    sae: Path | str | None = None,
    weights: str | None = None,
    caches: Path | str | Sequence[Path | str] = (),
    keep: Path | str | None = None,
    stage_one: StageOne | None = None,
    roots: Path | str | Sequence[Path | str] = (),
    device: str = "auto",
    assume_compatible: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> SearchResult:
    """Images and patients most like one image; with `out` also as a folder of tables.

    Images with the same content as the query are not listed. Memory: a few blocks of barcodes (0.5 GiB), and with
    `caches` one part of their means.

    Parameters
    ----------
    image : an `image_id` of the barcodes, or the path of an image file, which needs `latents`, `sae` and `stage_one`
    latents : latent stores that the barcodes were counted from; needed for a region, and for a file
    sae : the SAE that they were made with
    weights : for a file: the weights of the trained backbone; an untrained one needs none
    caches : activation caches that the latents were made from: also compares mean patch tokens and CLS
    keep : folder that keeps these means for the next search; None: they are computed again
    stage_one : `cytocache.bridge`, for a file; with `out` and `latents` also for a figure of the cells
    roots : folder of the images of each of `latents`; none: as recorded when the caches were made
    device : for a file: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one

    Raises
    ------
    BadInput
        If there is no such image, patch or tau, or no latent to look for.
    SpecMismatch
        If the stores, the SAE or the backbone do not belong together, or `out` holds something else.
    DamagedStore
        If a store is damaged.
    """
    config = config or SearchConfig()
    latents, caches, roots = one_or_more(latents), one_or_more(caches), one_or_more(roots)
    if config.patches and caches:
        raise BadInput("a region is compared by latents alone: give --patches without --cache")
    barcodes = Path(barcodes)
    collection = open_collection(barcodes, config.tau, config.weigh)
    query = _query(
        collection,
        image,
        config,
        latents=latents,
        sae=sae,
        weights=weights,
        stage_one=stage_one,
        device=device,
        assume_compatible=assume_compatible,
        progress=progress,
    )
    for way in config.ways:  # what cannot be looked for is told before a folder is begun
        vector_of(query, way, collection.weights, config.k)
    stores = open_caches(caches) if caches else []
    places = places_of(stores, collection.ids, collection.is_readable) if caches else []
    if roots and len(roots) != len(latents):
        raise BadInput(f"give a folder of images once for each latent store, or none; found {len(roots)}")
    spec = {
        "barcodes": collection.store.header.identity,
        "query": query.origin,
        **asdict(config),
        "patches": [*config.patches],
        "tau": collection.tau,
        "caches": [store.content_sha256 for store in stores],
    }
    writer = None
    if out is not None:
        inputs = [barcodes, *(Path(each) for each in (*latents, *caches) if "://" not in str(each))]
        packages = ("numpy", "scipy", "numba", "anndata")
        writer = begin_results(Path(out), SEARCH, spec, overwrite=overwrite, inputs=inputs, packages=packages)
        writer.watch(collection.store.header)
        if writer.is_complete:
            return read_search(Path(out))
    scores = dict(_scores_by_latents(collection, query, config, progress))
    if caches:
        with index_folder(keep) as folder:
            index = build_index(stores, folder, progress=progress)
            scores |= _scores_by_tokens(collection, query, index, places)
    listed = _listed(collection, query, config)
    images = [
        row for way, found in scores.items() for row in _image_rows(collection, query, config, way, found, listed)
    ]
    patients = [row for way, found in scores.items() for row in _patient_rows(collection, query, config, way, found)]
    result = SearchResult(
        out=None if out is None else Path(out),
        name=query.name,
        ways=tuple(scores),
        n_images=int(collection.is_readable.sum()),
        n_copies=int((_copies(collection, query) & (np.arange(collection.n_images) != _number(query))).sum()),
        latents=_query_rows(collection, query, config),
        images=images,
        patients=patients,
    )
    if writer is not None:
        writer.write_table("images", pa.Table.from_pylist(images, _IMAGES))
        writer.write_table("patients", pa.Table.from_pylist(patients, _PATIENTS))
        writer.write_table("latents", pa.Table.from_pylist(result.latents, _LATENTS))
        if latents and stage_one is not None:
            _draw(result, query, latents, stage_one, roots, writer.root / "found")
        writer.finish(
            {"mode": "query", "name": query.name, **{name: getattr(result, name) for name in ("n_images", "n_copies")},
             "ways": [*result.ways]}
        )  # fmt: skip
    return result


def read_search(out: Path) -> SearchResult:
    """The result of a search that was written to a folder.

    Raises
    ------
    BadInput
        If it is an evaluation.
    """
    store = ResultStore(out, SEARCH)
    said = dict(store.header.summary or {})
    if said.get("mode") != "query":
        raise BadInput(f"{out} holds an evaluation of a search, not a search")
    return SearchResult(
        out=out,
        name=str(said["name"]),
        ways=tuple(said["ways"]),
        n_images=int(said["n_images"]),
        n_copies=int(said["n_copies"]),
        was_complete=True,
        **{name: store.table(name).to_pylist() for name in ("latents", "images", "patients")},
    )


def _draw(
    result: SearchResult,
    query: Query,
    latents: Sequence[Path | str],
    stage_one: StageOne,
    roots: Sequence[Path | str],
    path: Path,
) -> None:
    """The cells of each way, beside the query. Memory: the pictures of one figure."""
    pictures: dict[str, Any] = {}
    wanted = {query.name, *(row["image_id"] for row in result.images)}
    for place, root in zip(latents, roots or (None,) * len(latents), strict=True):
        store = LatentStore(place)
        picture = stage_one.pictures(store, None if root is None else Path(root))
        for number, name in enumerate(column(store.images, "image_id")):
            if name in wanted:
                pictures[str(name)] = picture(number)
    unknown = "it is in none of the latent stores"
    shown = [
        (
            way,
            [
                (
                    f"{row['similarity']:.2f} {plain(row['label'] or row['label_common'])}",
                    pictures.get(row["image_id"], unknown),
                )
                for row in result.images
                if row["by"] == way
            ][:SHOWN],
        )
        for way in result.ways
    ]
    own = query.picture if query.picture is not None else pictures.get(query.name, unknown)
    plot_found(query.name, own, shown, path)


@contextmanager
def index_folder(keep: Path | str | None) -> Iterator[Path]:
    """The folder for means of tokens: the one to be kept, or a temporary one."""
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="cyto-search-") as name:
        yield Path(name)


def _query(
    collection: Collection,
    image: Path | str,
    config: SearchConfig,
    *,
    latents: Sequence[Path | str],
    sae: Path | str | None,
    stage_one: StageOne | None,
    weights: str | None,
    device: str,
    assume_compatible: bool,
    progress: Progress,
) -> Query:
    if collection.find(str(image)) is not None:
        if sae is not None or weights is not None:
            raise BadInput(f"{image} is an image of the barcodes: --sae and --weights are for a file, leave them out")
        if config.patches:
            return region_query(collection, str(image), latents, config.patches)
        return stored_query(collection, str(image), config.ways)
    file = Path(image)
    if not file.is_file():
        raise BadInput(
            f"no image {str(image)!r} in {collection.store.root}, and no file of this name; expected a value of the "
            f"column image_id, such as {collection.ids[0]!r}, or an image file"
        )
    if config.other_patients:
        raise BadInput(f"{file} is a file, which is of no patient of the barcodes: leave --other-patients out")
    if sae is None or not latents:
        raise BadInput(f"{file} is in no store: give --latents and --sae, so that it is encoded as the others were")
    return file_query(
        collection,
        file,
        latents[0],
        sae,
        require_stage_one(stage_one),
        patches=config.patches,
        weights=weights,
        device=device,
        assume_compatible=assume_compatible,
        progress=progress,
    )


# ------------------------------------------------------------------------------------------------- similarities


def _scores_by_latents(
    collection: Collection, query: Query, config: SearchConfig, progress: Progress
) -> Iterator[tuple[str, Float32s]]:
    """(way, similarity of every image) by fingerprint and barcode, or by the region."""
    for number, way in enumerate(config.ways):
        vector = vector_of(query, way, collection.weights, config.k)
        found = np.zeros(collection.n_images, np.float32)

        def tell(done: int, total: int, state: str, n_before: int = number, way: str = way) -> None:
            progress(n_before * total + done, len(config.ways) * total, way)

        for first, scores in scan(reader_of(collection, way), _scorer(way, vector, collection, config), progress=tell):
            found[first : first + len(scores)] = scores[:, 0]
        yield way, found


def _scorer(way: str, vector: Float32s, collection: Collection, config: SearchConfig) -> Any:
    if way == REGION:
        return lambda rows: region_shares(rows, collection.weights, vector)
    return scorer(way, vector[:, None], collection.weights, config.k)


def scorer(way: str, queries: Float32s, weights: Float32s, k: int) -> Any:
    """Rows of barcodes -> (rows, queries) similarities; queries : (latents, queries) of norm 1."""
    queries = np.ascontiguousarray(queries)
    if way == FINGERPRINT:
        return lambda rows: fingerprint_products(rows, weights, k, queries)
    return lambda rows: barcode_products(rows, weights, queries)


def _scores_by_tokens(
    collection: Collection, query: Query, index: TokenIndex, places: Sequence[Ints]
) -> dict[str, Float32s]:
    """The same by mean patch tokens and CLS: cosines of what is left when the mean image is taken off."""
    found = {}
    for way in index.ways:
        vector = query.tokens.get(way)
        if vector is None:
            cache, image = next(
                (number, int(np.flatnonzero(at == query.number)[0]))
                for number, at in enumerate(places)
                if (at == query.number).any()
            )
            vector = index.vector(cache, image, way)
        unit = index.unit(vector[None], way)[0]
        scores = np.zeros(collection.n_images, np.float32)
        for cache, first, rows in index.blocks(way):
            numbers = places[cache][first : first + len(rows)]
            scores[numbers[numbers >= 0]] = (rows @ unit)[numbers >= 0]
        found[way] = scores
    return found


# ------------------------------------------------------------------------------------------------- who is listed


def _number(query: Query) -> int:
    return -1 if query.number is None else query.number


def _copies(collection: Collection, query: Query) -> npt.NDArray[np.bool_]:
    """The query itself, and images with the same bytes."""
    same = (collection.columns["content_hash"] == query.content_hash) & (query.content_hash != "")
    return np.asarray(same | (np.arange(collection.n_images) == _number(query)), bool)


def _listed(collection: Collection, query: Query, config: SearchConfig) -> npt.NDArray[np.bool_]:
    kept = collection.is_readable & ~_copies(collection, query)
    if config.other_patients and query.number is not None:
        kept &= collection.patient_of != collection.patient_of[query.number]
    return kept


def _best(scores: Float32s, listed: npt.NDArray[np.bool_], top: int) -> Ints:
    """The numbers of the `top` largest scores, of equals the earlier first; only what is alike at all."""
    some = np.flatnonzero(listed & (scores > 0))
    order: Ints = some[np.lexsort((some, -scores[some]))][:top]
    return order


def _image_rows(
    collection: Collection,
    query: Query,
    config: SearchConfig,
    way: str,
    scores: Float32s,
    listed: npt.NDArray[np.bool_],
) -> Iterator[dict[str, Any]]:
    best = _best(scores, listed, config.top)
    reasons = _reasons(collection, query, config, way, best)
    own = -1 if query.number is None else int(collection.patient_of[query.number])
    for rank, number in enumerate(best.tolist(), start=1):
        patient = int(collection.patient_of[number])
        yield {
            "by": way,
            "rank": rank,
            "image_id": collection.ids[number],
            "similarity": float(scores[number]),
            "patient": collection.patients[patient][0],
            "dataset": collection.patients[patient][1],
            **_named(collection, number),
            "is_own_patient": patient == own,
            "latents": reasons.get(number, []),
        }


def _named(collection: Collection, number: int) -> dict[str, str]:
    return {name: str(collection.columns[name][number]) if name in collection.columns else "" for name in NAMED}


def _reasons(collection: Collection, query: Query, config: SearchConfig, way: str, best: Ints) -> dict[int, list[int]]:
    """Image -> the latents that add most to its similarity, most first."""
    if way not in LAYERS or not len(best):
        return {}
    vector = vector_of(query, way, collection.weights, config.k)
    rows = np.sort(best)
    matrix = collection.store.read_rows("image", rows, collection.tau, layer=LAYERS[way])
    found = {}
    for at, number in enumerate(rows.tolist()):
        row = matrix[at]
        if way == REGION:
            part = collection.weights[row.indices] * np.minimum(vector[row.indices], row.data)
        elif way == BARCODE:
            part = np.log1p(row.data) * collection.weights[row.indices] * vector[row.indices]
        else:
            which, weighted = fingerprint(row.indices, row.data, collection.weights, config.k)
            own = np.zeros(collection.n_latents, np.float32)
            own[which] = weighted
            part = (own * vector)[row.indices]
        order = np.lexsort((row.indices, -part))[:_SHARED]
        found[number] = [int(row.indices[place]) for place in order if part[place] > 0]
    return found


def _patient_rows(
    collection: Collection, query: Query, config: SearchConfig, way: str, scores: Float32s
) -> Iterator[dict[str, Any]]:
    """Patients by the mean similarity of all their images, the query and its copies left out."""
    some = np.flatnonzero(_listed(collection, query, config))
    owner = collection.patient_of[some]
    n_patients = len(collection.patients)
    count = np.bincount(owner, minlength=n_patients)
    mean = np.bincount(owner, scores[some].astype(np.float64), n_patients) / np.maximum(count, 1)
    named = np.array([bool(name) for name, _ in collection.patients])
    known = np.flatnonzero((count > 0) & named & (mean > 0))
    own = -1 if query.number is None else int(collection.patient_of[query.number])
    for rank, patient in enumerate(known[np.lexsort((known, -mean[known]))][: config.top].tolist(), start=1):
        mine = some[owner == patient]
        nearest = int(mine[np.argmax(scores[mine])])
        yield {
            "by": way,
            "rank": rank,
            "patient": collection.patients[patient][0],
            "dataset": collection.patients[patient][1],
            "disease": _named(collection, nearest)["disease"],
            "similarity": float(mean[patient]),
            "n_images": int(count[patient]),
            "nearest_image": collection.ids[nearest],
            "nearest_similarity": float(scores[nearest]),
            "is_own_patient": patient == own,
        }


def _query_rows(collection: Collection, query: Query, config: SearchConfig) -> list[dict[str, Any]]:
    """The fingerprint of the query, or the latents of its region."""
    layer = LAYERS[config.ways[0]]
    values = query.layers[layer]
    some = np.flatnonzero(values)
    which, weighted = fingerprint(some, values[some], collection.weights, config.k)
    return [
        {
            "rank": rank,
            "latent": int(latent),
            "value": float(values[latent]),
            "weight": float(collection.weights[latent]),
            "weighted": float(part),
        }
        for rank, (latent, part) in enumerate(zip(which, weighted, strict=True), start=1)
    ]


_TEXT, _WHOLE, _NUMBER = pa.string(), pa.int64(), pa.float64()
_IMAGES = pa.schema(
    [
        ("by", _TEXT), ("rank", _WHOLE), ("image_id", _TEXT), ("similarity", _NUMBER), ("patient", _TEXT),
        ("dataset", _TEXT), *((name, _TEXT) for name in NAMED), ("is_own_patient", pa.bool_()),
        ("latents", pa.list_(_WHOLE)),
    ]
)  # fmt: skip
_PATIENTS = pa.schema(
    [
        ("by", _TEXT), ("rank", _WHOLE), ("patient", _TEXT), ("dataset", _TEXT), ("disease", _TEXT),
        ("similarity", _NUMBER), ("n_images", _WHOLE), ("nearest_image", _TEXT), ("nearest_similarity", _NUMBER),
        ("is_own_patient", pa.bool_()),
    ]
)  # fmt: skip
_LATENTS = pa.schema(
    [("rank", _WHOLE), ("latent", _WHOLE), ("value", _NUMBER), ("weight", _NUMBER), ("weighted", _NUMBER)]
)
