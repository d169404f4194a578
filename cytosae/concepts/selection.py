"""Which latents should an expert look at? The paper's sample: clusters of latents above a threshold, five of each.

It lies in the folder of concepts that it was drawn from, as `selection.parquet`, whose metadata names settings, seed
and the identity of those concepts.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.concept_store import MEANINGFUL, ConceptStore, threshold_warning
from stores.destination import claimed
from stores.errors import BadInput, DamagedStore, OtherSettings, StoreNotFound
from stores.files import write_atomic
from stores.notebook import table_html
from stores.spec import as_floats, describe_difference, require_unchanged
from stores.tables import read_sealed, sealed_parquet
from stores.wording import Report, counted

FILE = "selection.parquet"
_COLUMNS = ("latent", "dataset", "cluster", "mean_activation", "frequency")
Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How latents are drawn.

    Attributes
    ----------
    dataset : whose statistics decide; None: the only dataset of the concepts
    threshold : smallest mean activation of a candidate, 0 or more; a latent that equals it is a candidate
    clusters : number of clusters of KMeans
    per_cluster : latents drawn from each cluster
    seed : of KMeans and of the draws
    as_released : cluster mean activation and frequency as they are, without log10, as the released code does
    """

    dataset: str | None = None
    threshold: float = MEANINGFUL
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
        as_floats(self, "threshold")


@dataclass(frozen=True, kw_only=True)
class Selection(Report):
    """The latents that were drawn, and how many each cluster has."""

    out: Path  # the file
    config: SelectionConfig  # with the dataset that was chosen
    table: pa.Table  # latent, dataset, cluster (from 0, the largest mean activation first), mean_activation, frequency
    n_candidates: int  # latents at or above the threshold
    cluster_sizes: tuple[int, ...]  # candidates in each cluster
    was_complete: bool = False
    warning: str | None = None  # the threshold belongs to another SAE

    @property
    def latents(self) -> list[int]:
        """Numbers of the drawn latents, ordered by cluster, then by number, as in the table."""
        return [int(latent) for latent in self.table["latent"].to_pylist()]

    @property
    def warnings(self) -> tuple[str, ...]:
        """A threshold that belongs to another SAE."""
        return (self.warning,) if self.warning else ()

    def lines(self) -> Iterator[str]:
        """How many were drawn, and which from each cluster."""
        config, sizes = self.config, self.cluster_sizes
        yield (
            f"{self.out}: {len(self.latents):,} of {self.n_candidates:,} latents of {config.dataset} with a mean "
            f"activation of at least {config.threshold:g}, from {len(sizes)} clusters (seed {config.seed})"
        )
        if len(sizes) < config.clusters:
            yield f"fewer clusters than {config.clusters}: the latents have only so many different values"
        small = [size for size in sizes if size < config.per_cluster]
        if small:
            yield (
                f"all latents taken of {len(small)} clusters with fewer than {config.per_cluster} "
                f"({', '.join(map(str, small))})"
            )
        clusters = self.table["cluster"].to_pylist()
        for cluster, size in enumerate(sizes):
            drawn = [str(latent) for latent, of in zip(self.latents, clusters, strict=True) if of == cluster]
            yield f"  cluster {cluster} ({counted(size, 'latent')}): {', '.join(drawn)}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + table_html(self.table.slice(0, 50).to_pylist(), most=50)


def select_latents(
    concepts: ConceptStore | Path | str, config: SelectionConfig = SelectionConfig(), *, overwrite: bool = False
) -> Selection:
    """Draw latents for experts to look at, and write them into the folder of concepts as `selection.parquet`.

    Latents with a mean activation of at least `config.threshold` are clustered by KMeans on log10 mean activation and
    log10 frequency; `config.per_cluster` are drawn from each cluster (CytoSAE, the sample that experts reviewed). A
    cluster with fewer latents gives all of them. There are fewer clusters than asked for where fewer latents differ in
    the two features.

    Parameters
    ----------
    concepts : a folder of `cyto concept stats`, or the folder opened

    Raises
    ------
    BadInput
        If there is no such dataset, no dataset is named and there are several, or no latent reaches the threshold.
    SpecMismatch
        If a selection with other settings is there (and not `overwrite`).
    DamagedStore
        If the one there was changed.
    """
    store = concepts if isinstance(concepts, ConceptStore) else ConceptStore(concepts)
    chosen = replace(config, dataset=store.choose_dataset(config.dataset))
    with claimed(store.root / FILE):
        found = _select(store, chosen, overwrite=overwrite)
    return found if isinstance(concepts, ConceptStore) else replace(found, out=Path(concepts) / FILE)


def _select(concepts: ConceptStore, config: SelectionConfig, *, overwrite: bool) -> Selection:
    settings = {**asdict(config), "concepts": concepts.identity}
    spec = concepts.header.spec.get("latents_spec", [])
    warning = threshold_warning(spec, config.threshold, "choose another --threshold")
    found = None if overwrite else _read(concepts)
    if found is not None:
        if found[0] != settings:
            raise OtherSettings(
                f"{concepts.root / FILE} is a selection with other settings "
                f"({describe_difference(found[0], settings)}); add --overwrite to replace it"
            )
        return replace(found[1], warning=warning)
    selection = replace(draw(concepts.latents(config.dataset), config, concepts.root / FILE), warning=warning)
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


def draw(latents: pa.Table, config: SelectionConfig, out: Path) -> Selection:
    """The sample out of one dataset's rows of `latents.parquet`; `out`: the file that it is for.

    Raises
    ------
    BadInput
        If no latent reaches the threshold.
    """
    mean, frequency = (latents[name].to_numpy().astype(np.float64) for name in ("mean_activation", "frequency"))
    chosen = np.flatnonzero((mean >= config.threshold) & (frequency > 0))
    if not len(chosen) and config.threshold == 0:
        raise BadInput(f"no latent of dataset {config.dataset} is active in any image: there is none to draw")
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
    return Selection(out=out, config=config, table=table, n_candidates=len(chosen), cluster_sizes=tuple(sizes.tolist()))


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
        settings = dict(said["settings"])
        config = SelectionConfig(**{each.name: settings[each.name] for each in fields(SelectionConfig)})
        selection = Selection(
            out=path,
            config=config,
            table=table,
            n_candidates=int(said["n_candidates"]),
            cluster_sizes=sizes,
            was_complete=True,
        )
        return settings, selection
    except (OSError, KeyError, TypeError, ValueError, RecursionError, pa.ArrowException, BadInput) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedStore(
            f"{path} is not a selection ({reason}); cyto concept select --overwrite makes it again"
        ) from None
