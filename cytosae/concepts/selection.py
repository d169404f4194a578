"""Which latents should an expert look at? The paper's sample: clusters of latents above a threshold, five of each.

It lies in the folder of concepts that it was drawn from, as `selection.parquet`, whose metadata names settings, seed
and the identity of those concepts.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.concept_store import MEANINGFUL, ConceptStore, threshold_warning
from stores.destination import claimed
from stores.errors import BadInput, DamagedStore, SpecMismatch, StoreNotFound
from stores.files import write_atomic
from stores.spec import describe_difference, require_unchanged
from stores.tables import read_sealed, sealed_parquet

FILE = "selection.parquet"
_COLUMNS = ("latent", "dataset", "cluster", "mean_activation", "frequency")
Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How latents are drawn. `as_released`: KMeans on mean activation and frequency as they are, without log10."""

    dataset: str
    threshold: float = MEANINGFUL  # of the mean activation; a latent that equals it takes part
    clusters: int = 10
    per_cluster: int = 5
    seed: int = 0
    as_released: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise BadInput(f"threshold must be a mean activation of at least 0; found {self.threshold!r}")
        for name in ("clusters", "per_cluster"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1; found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The drawn latents, ordered by cluster and number, and the sizes that they were drawn from."""

    table: pa.Table  # latent, dataset, cluster (from 0, the largest mean activation first), mean_activation, frequency
    n_candidates: int  # latents above the threshold
    cluster_sizes: tuple[int, ...]
    was_complete: bool = False
    warning: str | None = None  # the threshold belongs to another SAE

    @property
    def latents(self) -> list[int]:
        """Their numbers, in the table's order."""
        return [int(latent) for latent in self.table["latent"].to_pylist()]


def select_latents(concepts: ConceptStore, config: SelectionConfig, *, overwrite: bool = False) -> Selection:
    """Draw latents for experts to look at, and write them into the folder of `concepts`.

    A cluster with fewer latents than wanted gives all it has. There are fewer clusters than wanted where fewer latents
    differ in the two features.

    Raises
    ------
    BadInput
        If there is no such dataset, or no latent above the threshold.
    SpecMismatch
        If a selection with other settings is there (and not `overwrite`).
    DamagedStore
        If the one there was changed.
    """
    with claimed(concepts.root / FILE):
        return _select(concepts, config, overwrite=overwrite)


def _select(concepts: ConceptStore, config: SelectionConfig, *, overwrite: bool) -> Selection:
    settings = {**asdict(config), "concepts": concepts.identity}
    spec = concepts.header.spec.get("latents_spec", [])
    warning = threshold_warning(spec, config.threshold, "choose another --threshold")
    found = None if overwrite else _read(concepts)
    if found is not None:
        if found[0] != settings:
            raise SpecMismatch(
                f"{concepts.root / FILE} is a selection with other settings "
                f"({describe_difference(found[0], settings)}); add --overwrite to replace it"
            )
        return replace(found[1], warning=warning)
    selection = replace(draw(concepts.latents(config.dataset), config), warning=warning)
    metadata = {
        "settings": settings,
        "n_candidates": selection.n_candidates,
        "cluster_sizes": selection.cluster_sizes,
    }
    require_unchanged(concepts.header)
    write_atomic(concepts.root / FILE, sealed_parquet(selection.table, **metadata))
    return selection


def read_selection(concepts: ConceptStore) -> Selection:
    """The selection in the folder of `concepts`.

    Raises
    ------
    StoreNotFound
        If there is none.
    DamagedStore
        If it was changed, or drawn from other concepts.
    """
    found = _read(concepts)
    if found is None:
        raise StoreNotFound(f"no selection in {concepts.root}. Make one with cyto concept select {concepts.root}")
    if found[0].get("concepts") != concepts.identity:
        raise DamagedStore(
            f"{concepts.root / FILE} was drawn from other concepts; cyto concept select --overwrite makes it again"
        )
    return found[1]


def draw(latents: pa.Table, config: SelectionConfig) -> Selection:
    """The sample out of one dataset's rows of `latents.parquet`.

    Raises
    ------
    BadInput
        If no latent reaches the threshold.
    """
    mean, frequency = (latents[name].to_numpy().astype(np.float64) for name in ("mean_activation", "frequency"))
    chosen = np.flatnonzero((mean >= config.threshold) & (frequency > 0))
    if not len(chosen):
        raise BadInput(
            f"no latent of dataset {config.dataset} has a mean activation of {config.threshold:g} or more; the largest "
            f"is {np.nanmax(mean, initial=0):.3g}: choose a smaller --threshold"
        )
    features = np.column_stack([mean, frequency])[chosen]
    features = features if config.as_released else np.log10(features)
    rng = np.random.default_rng(config.seed)
    clusters = _clusters(features, config.clusters, int(rng.integers(1 << 32)))
    sizes = np.bincount(clusters)
    drawn = [np.sort(rng.permutation(np.flatnonzero(clusters == c))[: config.per_cluster]) for c in range(len(sizes))]
    rows = chosen[np.concatenate(drawn)]
    table = pa.table(
        {
            "latent": pa.array(latents["latent"].to_numpy()[rows], pa.int64()),
            "dataset": pa.array([config.dataset] * len(rows), pa.string()),
            "cluster": pa.array(np.repeat(np.arange(len(drawn)), [len(some) for some in drawn]), pa.int64()),
            "mean_activation": mean[rows],
            "frequency": frequency[rows],
        }
    )
    return Selection(table=table, n_candidates=len(chosen), cluster_sizes=tuple(sizes.tolist()))


def _clusters(features: Float, n_clusters: int, seed: int) -> Int:
    """(n,) cluster of each point, numbered by the first feature's mean, the largest first."""
    from sklearn.cluster import KMeans

    n_clusters = min(n_clusters, len(np.unique(features, axis=0)))
    found = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(features)
    names, labels = np.unique(found, return_inverse=True)
    means = [tuple(features[labels == cluster].mean(0)) for cluster in range(len(names))]
    rank = np.empty(len(names), np.int64)
    rank[sorted(range(len(names)), key=lambda cluster: means[cluster], reverse=True)] = np.arange(len(names))
    return rank[labels]


def _read(concepts: ConceptStore) -> tuple[dict[str, Any], Selection] | None:
    """(settings, selection) of the file there; None where there is none."""
    path = concepts.root / FILE
    if not path.exists():
        return None
    try:
        table, said = read_sealed(path)
        table = table.select(_COLUMNS)
        sizes = tuple(int(size) for size in said["cluster_sizes"])
        selection = Selection(
            table=table, n_candidates=int(said["n_candidates"]), cluster_sizes=sizes, was_complete=True
        )
        return dict(said["settings"]), selection
    except (OSError, KeyError, TypeError, ValueError, RecursionError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedStore(
            f"{path} is not a selection ({reason}); cyto concept select --overwrite makes it again"
        ) from None
