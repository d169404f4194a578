"""Does a search find cells of the same type? Precision at k for labels, beside the backbone's tokens and chance.

Images are drawn by lot and looked for among all others. Images of the same patient never count: they were stained,
photographed and chosen together. Nor do copies of the query, images with the same bytes: to find them is no skill.
`other datasets`: only images of other datasets count, which asks whether latents mean
the same where the laboratory differs. Only images with a label are listed, so that a missing label is no error.
Intervals: patients of the queries are drawn anew.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.activation_store import one_or_more, open_caches
from stores.errors import BadInput
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import SEARCH
from stores.wording import counted

from .config import BARCODE, FINGERPRINT, LABELS, OF_LATENTS, TOKENS, SearchEvaluationConfig
from .figures import plot_precision
from .kernels import fingerprint, keep_best
from .report import SearchEvaluation
from .run import index_folder, scorer
from .scan import LAYERS, Collection, open_collection, reader_of, scan
from .token_index import TokenIndex, build_index, places_of

Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
SCOPES = ("other patients", "other datasets")


def evaluate_search(
    barcodes: Path | str,
    out: Path | str,
    config: SearchEvaluationConfig | None = None,
    *,
    caches: Path | str | Sequence[Path | str] = (),
    keep: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> SearchEvaluation:
    """Precision at k of fingerprints and barcodes, and with `caches` of mean tokens and CLS, in the folder `out`.

    Memory: 8 bytes for each query and latent (79 MB at 200 queries and 49,152 latents), and a few blocks of barcodes.

    Parameters
    ----------
    caches : activation caches that the latents were made from
    keep : folder that keeps the means of their tokens for the next search; None: they are computed again

    Raises
    ------
    BadInput
        If no image has a label, or a type is that of one patient only.
    SpecMismatch
        If `out` holds something else.
    DamagedStore
        If a store is damaged.
    """
    config, barcodes, out = config or SearchEvaluationConfig(), Path(barcodes), Path(out)
    collection = open_collection(barcodes, config.tau, config.weigh)
    queries = draw_queries(collection, config)
    caches = one_or_more(caches)
    stores = open_caches(caches) if caches else []
    places = places_of(stores, collection.ids, collection.is_readable) if caches else []
    spec = {
        "barcodes": collection.store.header.identity,
        **asdict(config),
        "at": [*config.at],
        "tau": collection.tau,
        "caches": [store.content_sha256 for store in stores],
    }
    inputs = [barcodes, *(Path(cache) for cache in caches if "://" not in str(cache))]
    packages = ("numpy", "scipy", "numba", "anndata")
    writer = begin_results(out, SEARCH, spec, overwrite=overwrite, inputs=inputs, packages=packages)
    writer.watch(collection.store.header)
    if writer.is_complete:
        return _read(out)
    lists = _Lists(collection, queries, max(config.at))
    _look_by_latents(lists, config, progress)
    if caches:
        with index_folder(keep) as folder:
            _look_by_tokens(lists, build_index(stores, folder, progress=progress), places)
    hits = lists.hits()
    table = describe(collection, queries, hits, lists.copies, config)
    if not table:
        raise BadInput(f"{barcodes}: no image that was drawn has a type that another patient's image has, too")
    writer.write_table("precision", pa.Table.from_pylist(table))
    writer.write_table("queries", _query_table(collection, queries, hits, config))
    plot_precision(table, writer.root / "precision")
    notes = _notes(collection, hits, sum(map(len, lists.copies)))
    writer.finish({"mode": "evaluation", "n_queries": len(queries), "n_images": _n_images(collection), "notes": notes})
    return SearchEvaluation(
        out=out, n_queries=len(queries), n_images=_n_images(collection), rows=table, notes=tuple(notes)
    )


def _look_by_latents(lists: "_Lists", config: SearchEvaluationConfig, progress: Progress) -> None:
    """One pass over the barcodes of all images for each way."""
    collection, queries = lists.collection, lists.queries
    for number, way in enumerate(OF_LATENTS):
        vectors = query_vectors(collection, way, queries, config)

        def tell(done: int, total: int, state: str, n_before: int = number, way: str = way) -> None:
            progress(n_before * total + done, len(OF_LATENTS) * total, way)

        reader = reader_of(collection, way)
        for first, scores in scan(reader, scorer(way, vectors, collection.weights, config.k), progress=tell):
            lists.add(way, np.arange(first, first + len(scores)), scores)


def _look_by_tokens(lists: "_Lists", index: TokenIndex, places: list[Ints]) -> None:
    """Two passes over the means of tokens for each way: the queries' own, then all images against these."""
    for way in index.ways:
        units = np.zeros((len(lists.queries), index.stores[0].spec.width), np.float32)
        for cache, first, rows in index.blocks(way):
            numbers = places[cache][first : first + len(rows)]
            for place, query in enumerate(lists.queries):
                units[place] = rows[numbers == query][0] if (numbers == query).any() else units[place]
        for cache, first, rows in index.blocks(way):
            numbers = places[cache][first : first + len(rows)]
            some = numbers >= 0
            lists.add(way, numbers[some], np.ascontiguousarray(rows[some] @ units.T))


def _read(out: Path) -> SearchEvaluation:
    store = ResultStore(out, SEARCH)
    said = dict(store.header.summary or {})
    return SearchEvaluation(
        out=out,
        n_queries=int(said["n_queries"]),
        n_images=int(said["n_images"]),
        rows=store.table("precision").to_pylist(),
        notes=tuple(said["notes"]),
        was_complete=True,
    )


def _n_images(collection: Collection) -> int:
    return int(collection.is_readable.sum())


def draw_queries(collection: Collection, config: SearchEvaluationConfig) -> Ints:
    """Rising numbers of the images that are looked for: readable, with a label, drawn at random.

    Raises
    ------
    BadInput
        If none has.
    """
    has = np.zeros(collection.n_images, bool)
    for name in LABELS:
        if name in collection.columns:
            has |= collection.columns[name] != ""
    some = np.flatnonzero(has & collection.is_readable)
    if len(some) < 2:
        raise BadInput(
            f"{collection.store.root}: {len(some)} readable images have a label, and precision needs labels; give them "
            f"with cyto barcode --table"
        )
    rng = np.random.default_rng([config.seed, 0])
    return np.sort(rng.choice(some, min(config.n_queries, len(some)), replace=False))


def query_vectors(collection: Collection, way: str, queries: Ints, config: SearchEvaluationConfig) -> Float32s:
    """(latents, queries) of norm 1; a query without any latent to look for is a column of zeros."""
    found = np.zeros((collection.n_latents, len(queries)), np.float32)
    matrix = collection.store.read_rows("image", queries, collection.tau, layer=LAYERS[way])
    for place in range(len(queries)):
        row = matrix[place]
        if way == FINGERPRINT:
            which, values = fingerprint(row.indices, row.data, collection.weights, config.k)
        else:
            which, values = row.indices, np.log1p(row.data) * collection.weights[row.indices]
        norm = float(np.linalg.norm(values.astype(np.float64)))
        if norm > 0:
            found[which, place] = values / norm
    return found


def copies_of(collection: Collection, queries: Ints) -> list[list[int]]:
    """For each query the other images with the same bytes."""
    hashes = collection.columns["content_hash"]
    alike: dict[str, list[int]] = {str(hashes[query]): [] for query in queries if hashes[query] != ""}
    for number, content in enumerate(hashes.tolist()):
        if content in alike:
            alike[content].append(number)
    return [[n for n in alike.get(str(hashes[query]), []) if n != query] for query in queries.tolist()]


class _Lists:
    """The nearest images of every query: for each way, column of labels, and scope."""

    def __init__(self, collection: Collection, queries: Ints, n: int) -> None:
        self.collection, self.queries, self._n = collection, queries, n
        self.copies = copies_of(collection, queries)
        self._columns = [
            name for name in LABELS if name in collection.columns and (collection.columns[name] != "").any()
        ]
        self._found: dict[tuple[str, str, str], tuple[Float32s, Ints]] = {}

    def add(self, way: str, numbers: Ints, scores: Float32s) -> None:
        """Scores of some images, (images, queries), which are changed: those of copies become minus infinity."""
        for place, copies in enumerate(self.copies):
            if copies:
                scores[np.isin(numbers, copies), place] = -np.inf
        least = 0 if way in LAYERS else -np.inf  # no latent in common: not listed
        owners = {SCOPES[0]: self.collection.patient_of, SCOPES[1]: self.collection.dataset_of}
        for column in self._columns:
            eligible = self.collection.is_readable[numbers] & (self.collection.columns[column][numbers] != "")
            for scope, owner in owners.items():
                if scope == SCOPES[1] and self.collection.dataset_of.max(initial=0) == 0:
                    continue
                shape = (len(self.queries), self._n)
                lists = self._found.setdefault(
                    (way, column, scope), (np.full(shape, least, np.float32), np.full(shape, -1, np.int64))
                )
                keep_best(scores, numbers, owner[numbers], owner[self.queries], eligible, *lists)

    def hits(self) -> dict[tuple[str, str, str], npt.NDArray[np.int8]]:
        """(queries, n): 1 where the nearest image has the query's label, 0 where not, -1 where there is none."""
        found = {}
        for key, (_, indices) in self._found.items():
            labels = self.collection.columns[key[1]]
            same = labels[indices] == labels[self.queries][:, None]
            found[key] = np.where(indices < 0, -1, same).astype(np.int8)
        return found


def describe(
    collection: Collection,
    queries: Ints,
    hits: dict[tuple[str, str, str], npt.NDArray[np.int8]],
    copies: Sequence[Sequence[int]],
    config: SearchEvaluationConfig,
) -> list[dict[str, Any]]:
    """A row for each column, scope, way and k.

    Only queries whose label an eligible image has count: the others could not be found by any search. Where fewer than
    k images are eligible at all, precision at k is that of all of them; a list that is shorter because nothing else is
    alike is divided by k nevertheless.
    """
    rows = []
    rng_seed = [config.seed, 1]
    for column, scope in dict.fromkeys((key[1], key[2]) for key in hits):
        labels = collection.columns[column]
        chance, n_eligible = _chance(collection, queries, copies, column, scope)
        counts = np.flatnonzero((labels[queries] != "") & (chance > 0))
        if not len(counts):
            continue
        owners = np.unique(collection.patient_of[queries[counts]], return_inverse=True)[1]
        rng = np.random.default_rng(rng_seed)
        drawn = rng.multinomial(
            owners.max() + 1, np.full(owners.max() + 1, 1 / (owners.max() + 1)), config.n_bootstraps
        )
        weights = drawn[:, owners].astype(np.float64)
        types = np.unique(labels[queries[counts]], return_inverse=True)[1]
        for at in config.at:
            each = {
                way: (found[counts, :at] == 1).sum(1) / np.minimum(at, n_eligible[counts])
                for (way, c, s), found in hits.items()
                if (c, s) == (column, scope)
            }
            for way, precision in each.items():
                low, high = _interval(precision, weights)
                row: dict[str, Any] = {
                    "column": column,
                    "scope": scope,
                    "by": way,
                    "at": at,
                    "n_queries": len(counts),
                    "n_types": int(types.max()) + 1,
                    "precision": float(precision.mean()),
                    "low": low,
                    "high": high,
                    "precision_macro": float(np.mean([precision[types == t].mean() for t in range(types.max() + 1)])),
                    "chance": float(chance[counts].mean()),
                    "difference": None,
                    "difference_low": None,
                    "difference_high": None,
                }
                if TOKENS in each and way in (FINGERPRINT, BARCODE):
                    against = precision - each[TOKENS]
                    limits = _interval(against, weights)
                    row |= {"difference": float(against.mean())}
                    row |= {"difference_low": limits[0], "difference_high": limits[1]}
                rows.append(row)
    return rows


def _interval(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> tuple[float | None, float | None]:
    """95% percentile interval of the mean over drawn patients; none of fewer than two patients."""
    totals = weights.sum(1)
    means = (weights @ values)[totals > 0] / totals[totals > 0]
    if (weights != weights[:1]).any():
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)
    return None, None


def _chance(
    collection: Collection, queries: Ints, copies: Sequence[Sequence[int]], column: str, scope: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(queries,) share of the eligible images that have the query's label: the precision by lot; their number."""
    labels = collection.columns[column]
    eligible = np.flatnonzero(collection.is_readable & (labels != ""))
    owner = collection.patient_of if scope == SCOPES[0] else collection.dataset_of
    code = np.unique(labels, return_inverse=True)[1]
    n_of = np.bincount(code[eligible], minlength=code.max() + 1)
    shares, n_eligible = np.zeros(len(queries)), np.zeros(len(queries), np.int64)
    for place, query in enumerate(queries):
        own = eligible[(owner[eligible] == owner[query]) | np.isin(eligible, copies[place])]
        left = len(eligible) - len(own)
        shares[place] = (n_of[code[query]] - (code[own] == code[query]).sum()) / left if left else 0
        n_eligible[place] = left
    return shares, n_eligible


def _query_table(
    collection: Collection,
    queries: Ints,
    hits: dict[tuple[str, str, str], npt.NDArray[np.int8]],
    config: SearchEvaluationConfig,
) -> pa.Table:
    """A row for each query, column, scope and way: how many of the nearest have its label."""
    rows = [
        {
            "image_id": collection.ids[query],
            "column": column,
            "type": str(collection.columns[column][query]),
            "scope": scope,
            "by": way,
            **{f"n_same_at_{at}": int((found[place, :at] == 1).sum()) for at in config.at},
        }
        for (way, column, scope), found in hits.items()
        for place, query in enumerate(queries)
        if collection.columns[column][query] != ""
    ]
    return pa.Table.from_pylist(rows)


def _notes(collection: Collection, hits: dict[tuple[str, str, str], Any], n_copies: int) -> list[str]:
    found = []
    if n_copies:
        found.append(f"{counted(n_copies, 'image')} with the same bytes as a query, which do not count for it")
    n_alone = sum(not name for name, _ in collection.patients)
    if n_alone:
        found.append(f"{n_alone:,} images have no patient; each counts as a patient of its own")
    if not any(scope == SCOPES[1] for _, _, scope in hits):
        found.append("these barcodes are of one dataset: nothing can be said of a search across datasets")
    return found
