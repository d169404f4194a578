"""A small atlas to review: a header, a page, and the review.json and pictures that `cyto atlas build` asks for."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from concept_folders import concepts_of

from cytocache.pictures import Pictures
from cytosae.concepts import SelectionConfig, select_latents
from cytosae.maps import Sources
from cytosae.review.items import ReviewConfig, ReviewFile, make_review
from stores import ATLAS, COMPARISON, LatentStore, ResultStore, begin_results

CONFIG = ReviewConfig(n_images=2, n_top=4, n_decoys=3)


def differential(n_latents: int, *, seed: int = 0) -> pa.Table:
    """The columns of differential.parquet that a review reads: 6 latents higher in a, 5 in b, the rest near zero."""
    rng = np.random.default_rng(seed)
    g = rng.uniform(-0.1, 0.1, n_latents)
    moved = rng.permutation(n_latents)[:11]
    g[moved] = [*np.linspace(1, 2, 6), *np.linspace(-2, -1, 5)]
    rank_a, rank_b = (np.full(n_latents, np.nan) for _ in range(2))
    rank_a[moved[:6]], rank_b[moved[6:]] = [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5]
    ranks = {"rank_a": pa.array(rank_a, from_pandas=True), "rank_b": pa.array(rank_b, from_pandas=True)}
    return pa.table(
        {"latent": np.arange(n_latents), "difference": g, "hedges_g": pa.array(g)}
        | {name: values.cast(pa.int64()) for name, values in ranks.items()}
    )


def make_comparison(root: Path, table: pa.Table, a: str = "sick", b: str = "well") -> ResultStore:
    writer = begin_results(root, COMPARISON, {"a": a, "b": b})
    writer.write_table("differential", table)
    writer.finish({})
    return ResultStore(root, COMPARISON)


def make_site(made: Path, folder: Path, *, a: str = "sick", b: str = "well") -> ReviewFile:
    """`folder`/atlas, from the latents in `made`; what was written to its review.json."""
    store = LatentStore(made / "latents.zarr")
    concepts = concepts_of(store, folder / "concepts", fires_above=0.05)
    selection = select_latents(concepts, SelectionConfig(dataset="images", threshold=0, clusters=2, per_cluster=3))
    comparison = make_comparison(folder / "compared", differential(concepts.n_latents), a, b)
    writer = begin_results(folder / "atlas", ATLAS, {"concepts": concepts.identity})
    sources = Sources([store], [Pictures(store, made)])
    found = make_review(concepts, sources, writer.root, CONFIG, selection=selection, comparisons=[comparison])
    writer.write_json("review", found.content)
    (writer.root / "index.html").write_text("<!doctype html><title>atlas</title>\n")
    (writer.root / "concepts").mkdir()
    (writer.root / "concepts" / "7.html").write_text("<!doctype html><title>latent 7</title>\n")
    writer.finish({})
    return found
