"""Folders of concepts without a run of `cyto concept stats`: what a test says of its latents, in the real format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stores import CONCEPTS, ConceptStore, LatentStore, begin_results
from stores.concept_store import LATENT_COLUMNS, TOP_COLUMNS
from stores.tables import column


def make_concepts(
    root: Path,
    statistics: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    top: Sequence[dict[str, Any]] = (),
    sae_sha256: str = "0" * 64,
    **spec: Any,
) -> ConceptStore:
    """Concepts with these columns of `latents.parquet` by dataset, null or 0 in all others."""
    rows: list[dict[str, Any]] = []
    for dataset, columns in statistics.items():
        n_latents = len(next(iter(columns.values())))
        rows += [
            {"latent": n, "dataset": dataset, "n_images": 0, "max_activation": 0.0}
            | {name: values[n] for name, values in columns.items()}
            for n in range(n_latents)
        ]
    writer = begin_results(root, CONCEPTS, {"latents_spec": [{"sae_sha256": sae_sha256}], "n": len(rows), **spec})
    writer.write_table("latents", pa.Table.from_pylist(rows, pa.schema(list(LATENT_COLUMNS.items()))))
    writer.write_table("top_images", pa.Table.from_pylist(list(top), pa.schema(list(TOP_COLUMNS.items()))))
    writer.finish({"n_latents": n_latents, "by_dataset": [{"dataset": name} for name in statistics]})
    return ConceptStore(root)


def dense_tokens(store: LatentStore, image_index: int) -> np.ndarray:
    """(tokens_per_image, n_latents) of one image, filled in value by value."""
    rows = store.read_images(image_index, image_index + 1)
    dense = np.zeros((rows.n_rows, store.spec.n_latents), np.float32)
    for token in range(rows.n_rows):
        for k in range(rows.indptr[token], rows.indptr[token + 1]):
            dense[token, rows.indices[k]] = rows.values[k]
    return dense


def concepts_of(store: LatentStore, root: Path, *, n_top: int = 3, fires_above: float = 0) -> ConceptStore:
    """The concepts of a store, computed the slow way; every second image counts to the dataset `other`.

    fires_above : image activation; a latent of a tiny SAE fires in every image, and has a frequency of 1 at 0
    """
    readable = store.readable()
    names, labels = column(store.images, "image_id"), column(store.images, "label")
    activation = np.array([dense_tokens(store, image).mean(0) for image in range(store.spec.n_images)])
    statistics, top = {}, []
    for number, dataset in enumerate(("images", "other")):
        members = [image for image in range(len(readable)) if readable[image] and image % 2 == number]
        fires = activation[members] > fires_above
        mean = (activation[members] * fires).sum(0) / np.maximum(1, fires.sum(0))
        statistics[dataset] = {"frequency": fires.mean(0).tolist(), "mean_activation": mean.tolist()}
        statistics[dataset]["n_images"] = fires.sum(0).tolist()
        for latent in range(store.spec.n_latents):
            order = sorted((-activation[image, latent], names[image], image) for image in members)
            for rank, (value, name, image) in enumerate(order[:n_top], start=1):
                if -value > fires_above:
                    top.append(
                        {"latent": latent, "dataset": dataset, "rank": rank, "image_id": name, "value": -value}
                        | {"image_index": image, "label": labels[image]}
                    )
    return make_concepts(root, statistics, top=top, sae_sha256=store.spec.sae_sha256)
