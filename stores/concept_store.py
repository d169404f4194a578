"""Concepts on disk: statistics and top images of each latent, per dataset, as tables in one folder of results.

Format "concepts", version 1: docs/formats.md. `latents.parquet` has one row per latent and dataset,
`top_images.parquet` one per latent, dataset and rank; both are ordered by dataset, then latent (then rank).
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import BadInput, DamagedStore
from .result_folder import ResultStore
from .spec import CONCEPTS, check_latent

MEANINGFUL = 1e-3  # smallest mean activation of the latents that the paper examines (inclusive)
LATENT_COLUMNS = {
    "latent": pa.int64(),
    "dataset": pa.string(),
    "n_images": pa.int64(),  # readable images in which the latent is active
    "frequency": pa.float64(),  # their fraction of the readable images
    "mean_activation": pa.float64(),  # of the image activation, over the images in which it is active; 0 for none
    "max_activation": pa.float32(),  # the largest value of a single token; the largest image activation is rank 1's
    "n_labelled": pa.int64(),  # of the top images
    "label_entropy": pa.float64(),  # nats; null below the minimum support
    "label_entropy_null": pa.float64(),  # its mean with shuffled labels
    "label_entropy_p": pa.float64(),  # of an entropy as small or smaller, with labels shuffled between patients
    "label_entropy_q": pa.float64(),  # Benjamini-Hochberg over the latents of the dataset that have a p
    "label_divergence": pa.float64(),  # nats; of the labels of the top images from those of the dataset
    "label_divergence_p": pa.float64(),  # of a divergence as large or larger, with the same shuffles
    "label_divergence_q": pa.float64(),
    "top_label": pa.string(),  # the label with the largest share of the top images' activation
    "n_labelled_common": pa.int64(),
    "top_label_common": pa.string(),
}
RELEASED = {"backbone": "dinobloom-b", "block": 10, "n_latents": 49_152}  # the SAE that MEANINGFUL was chosen for
_LATER = tuple(f"label_{name}" for name in ("entropy_p", "entropy_q", "divergence", "divergence_p", "divergence_q"))
TOP_COLUMNS = {
    "latent": pa.int64(),
    "dataset": pa.string(),
    "rank": pa.int64(),  # from 1
    "image_id": pa.string(),
    "image_index": pa.int64(),  # row in the concatenated image tables of the latent stores
    "value": pa.float32(),  # image activation
    "label": pa.string(),
    "label_common": pa.string(),
}


def threshold_warning(latents_spec: Sequence[dict[str, Any]], threshold: float, option: str) -> str | None:
    """A warning if the threshold `MEANINGFUL` is used with an SAE that it was not chosen for; else None.

    The scale of mean activations depends on tokens, training and penalty, so the number fits only one SAE.

    Parameters
    ----------
    latents_spec : as in the header of concepts
    option : the words that tell how to give another threshold
    """
    spec = latents_spec[0] if latents_spec else {}
    found = {**spec.get("cache", {}), "n_latents": spec.get("n_latents")}
    if threshold != MEANINGFUL or {name: found.get(name) for name in RELEASED} == RELEASED:
        return None
    return (
        f"a mean activation of {MEANINGFUL:g} belongs to the released SAE and means nothing with another one; look at "
        f"the figure thresholds of cyto concept stats, and {option}"
    )


class ConceptStore:
    """A complete folder of concepts, open for reading. A table is read once, on first use."""

    def __init__(self, root: Path | str) -> None:
        """Open the folder at `root`.

        Raises
        ------
        StoreNotFound, IncompleteStore, SpecMismatch
            If there are no finished concepts of a version that this program reads.
        DamagedStore
            If the header does not list latents and datasets.
        """
        self._results = ResultStore(root, CONCEPTS)
        self.root, self.header = self._results.root, self._results.header
        summary: Any = self.header.summary
        try:
            self.n_latents = int(summary["n_latents"])
            self.by_dataset: list[dict[str, Any]] = [dict(found) for found in summary["by_dataset"]]
            self.datasets = [str(found["dataset"]) for found in self.by_dataset]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStore(
                f"{self.root}: its header does not say which latents and datasets it holds ({error!r})"
            ) from None

    @property
    def identity(self) -> str:
        """SHA-256 of everything that decides the numbers."""
        return self.header.identity

    def latents(self, dataset: str | None = None) -> pa.Table:
        """`LATENT_COLUMNS` of one dataset, row i for latent i; or of all datasets, concatenated.

        Raises
        ------
        BadInput
            If there is no such dataset.
        DamagedStore
            If the table was changed or lost.
        """
        if dataset is None:
            return self._latents
        return self._latents.slice(self._number(dataset) * self.n_latents, self.n_latents)

    def top_images(self, latent: int, dataset: str | None = None) -> pa.Table:
        """`TOP_COLUMNS` of one latent, in one dataset or all, the largest image activation first; ties by `image_id`.

        Raises
        ------
        BadInput
            If there is no such latent or dataset.
        DamagedStore
            If the table was changed or lost.
        """
        self.check_latent(latent)
        rows = pc.equal(self.all_top_images["latent"], latent)
        if dataset is not None:
            self._number(dataset)
            rows = pc.and_(rows, pc.equal(self.all_top_images["dataset"], dataset))
        return self.all_top_images.filter(rows)

    @cached_property
    def all_top_images(self) -> pa.Table:
        """`TOP_COLUMNS` of all latents and datasets."""
        return self._table("top_images", TOP_COLUMNS)

    def check_latent(self, latent: int) -> None:
        """Raise BadInput if there is no such latent."""
        check_latent(latent, self.n_latents, self.root)

    def choose_dataset(self, name: str | None) -> str:
        """`name`, which must be one of the datasets; None: the only one.

        Raises
        ------
        BadInput
            If there is no such dataset, or None was given and there are several.
        """
        if name is None and len(self.datasets) != 1:
            raise BadInput(f"{self.root} holds {', '.join(self.datasets)}; say which with --dataset")
        return self.datasets[0 if name is None else self._number(name)]

    def _number(self, dataset: str) -> int:
        if dataset not in self.datasets:
            raise BadInput(f"no dataset {dataset!r} in {self.root}; it holds {', '.join(self.datasets)}")
        return self.datasets.index(dataset)

    @cached_property
    def _latents(self) -> pa.Table:
        table = self._table("latents", LATENT_COLUMNS)
        n_rows = self.n_latents * len(self.datasets)
        if table.num_rows != n_rows or (table["latent"].to_numpy() != np.arange(n_rows) % self.n_latents).any():
            raise DamagedStore(
                f"{self.root}/latents.parquet does not have one row for each of {self.n_latents:,} latents and "
                f"{len(self.datasets)} datasets"
            )
        return table

    def _table(self, name: str, columns: dict[str, pa.DataType]) -> pa.Table:
        table = self._results.table(name)
        for at, (column, kind) in enumerate(columns.items()):
            if column in _LATER and column not in table.column_names:
                table = table.add_column(min(at, table.num_columns), column, pa.nulls(table.num_rows, kind))
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise DamagedStore(f"{self.root}/{name}.parquet lacks {', '.join(missing)}")
        return table
