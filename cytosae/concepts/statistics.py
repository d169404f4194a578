"""What each latent responds to, in numbers: from latent stores to statistics per latent and dataset, with Dask.

    A[i, s] = mean over the tokens of image i of h[s]              image activation
    n[s]    = number of readable images with A[i, s] > 0           n / readable images: frequency
    mean activation = sum_i A[i, s] / n[s]                         over the images in which the latent is active

and the images of the largest A with the entropy of their labels (CytoSAE, Fig. 2A; docs/reference/paper.md 6).
Partitions of images are counted as for barcodes. Their sums are then added up in pieces that depend on the data only,
so partitions, workers and memory change no bit. No torch here.
"""

from collections.abc import Sequence
from dataclasses import InitVar, asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import false_discovery_control

from cytosae.barcodes import (
    LatentSums,
    LevelParts,
    PartSummary,
    check_one_sae,
    check_token_set,
    count_into_parts,
    differences,
    discard,
    join_tables,
    regroup,
    warm_up,
)
from cytosae.cluster import Watch, client_or_own, cluster_job, prepare_workers
from stores.concept_store import LATENT_COLUMNS, MEANINGFUL, TOP_COLUMNS, threshold_warning
from stores.csr_bulk import CHUNK_ENTRIES
from stores.errors import BadInput
from stores.files import sha256_json
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.result_folder import ResultWriter, begin_results
from stores.spec import CONCEPTS, check_choice
from stores.tables import column, readable, table_sha256
from stores.token_sets import TOKEN_SETS

from .figures import Panel, plot_scatter, plot_thresholds
from .label_entropy import label_agreement, label_entropy, label_tests, shuffled_entropy, top_label
from .report import ConceptResult
from .tasks import TopImages, sum_images

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "ConceptConfig",
    "ConceptResult",
    "concept_statistics",
    "label_entropy",
    "shuffled_entropy",
    "write_concepts",
]

LABEL_COLUMNS = ("label", "label_common")
_MOST_DATASETS = 20  # each costs some hundred bytes a latent here, and as many rows in the tables
_MOST_TOP = 100
_GROUP_ENTRIES = 4 * CHUNK_ENTRIES  # entries that a task adds up; fixed, since sums depend on it
_WAVE = 16  # such tasks submitted at once

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ConceptConfig:
    """What to work out.

    Attributes
    ----------
    token_set : tokens that count: all, patch, cls or register
    top_k : images kept of a latent, in each dataset; 1 to 100
    label : column of the image table that entropies are of: label or label_common
    min_support : fewest labelled top images that give an entropy; 1 to `top_k`
    shuffles : of the labels, for the entropy expected by chance; 0: none
    patient_shuffles : of the labels from patient to patient, for the p-value of an entropy; 0: none
    seed : of the shuffles
    partition_images : images that one task counts; None: as memory allows. Decides speed and memory only
    block_images : its name in 0.1; stays for one release
    """

    token_set: str = "all"
    top_k: int = 10
    label: str = "label"
    min_support: int = 5
    shuffles: int = 100
    patient_shuffles: int = 999
    seed: int = 0
    partition_images: int | None = None
    block_images: InitVar[int | None] = None

    def __post_init__(self, block_images: int | None) -> None:
        if block_images is not None:
            object.__setattr__(self, "partition_images", block_images)
        check_choice("token_set", self.token_set, TOKEN_SETS)
        check_choice("label", self.label, LABEL_COLUMNS)
        if not 1 <= self.top_k <= _MOST_TOP:
            raise BadInput(f"top_k must be 1 to {_MOST_TOP}; found {self.top_k}")
        if not 1 <= self.min_support <= self.top_k:
            raise BadInput(
                f"min_support must be 1 to top_k, which is {self.top_k}: no latent has more images; "
                f"found {self.min_support}"
            )
        for name in ("shuffles", "patient_shuffles", "seed"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} must be at least 0; found {getattr(self, name)}")
        if self.partition_images is not None and self.partition_images < 1:
            raise BadInput(f"partition_images must be at least 1; found {self.partition_images}")


@dataclass(frozen=True)
class _Images:
    """The images of all stores, store by store, as numbers."""

    ids: list[str]
    by_id: Ints  # (n_images,) the image that comes n-th by its id
    place: Ints  # (n_images,) and which one it is
    datasets: list[str]
    dataset: Ints  # (n_images,) -1: none
    is_readable: npt.NDArray[np.bool_]
    labels: dict[str, tuple[list[str], Ints]]  # column -> names, rising, and (n_images,) which one; -1: none
    patient: Ints  # (n_images,) a number within the dataset; -1: none

    @staticmethod
    def of(table: pa.Table) -> "_Images":
        ids = [str(name) for name in column(table, "image_id")]
        by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
        place = np.empty_like(by_id)
        place[by_id] = np.arange(len(ids))
        datasets, dataset = _numbered(column(table, "dataset"))
        labels = {name: _numbered(column(table, name)) for name in LABEL_COLUMNS}
        patient = _numbered(column(table, "patient"))[1]
        return _Images(ids, by_id, place, datasets, dataset, np.array(readable(table), bool), labels, patient)

    def members(self, dataset: int) -> Ints:
        """The readable images of a dataset, in order."""
        return np.flatnonzero((self.dataset == dataset) & self.is_readable)

    def labels_within(self, name: str, members: Ints) -> Ints:
        """(n_images,) label numbers of these images; -1 for all others."""
        found = np.full(len(self.ids), -1, np.int64)
        found[members] = self.labels[name][1][members]
        return found


def concept_statistics(
    latents: Path | str | Sequence[Path | str],
    out: Path | str,
    config: ConceptConfig = ConceptConfig(),
    *,
    client: "Client | None" = None,
    table: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> ConceptResult:
    """Statistics of every latent in every dataset of one or more latent stores, with figures, in the folder `out`.

    A continued job takes the parts that are counted already. Memory of a worker: the result of one partition, or a few
    numbers per latent; of this process: the tables, and some hundred bytes per latent and dataset.

    Parameters
    ----------
    latents : paths or URLs; the rows of the stores follow each other; all by the same SAE
    client : of a local or remote Dask cluster whose workers see all paths; None: one is started for this call
    table : other datasets or labels for the images (image_id and the columns to replace)

    Raises
    ------
    BadInput
        If a store was pruned (its means and frequencies are not those of the SAE), image ids clash, no image has a
        dataset, or there are more than 20; if a worker lacks this version of the package or sees other files.
    SpecMismatch
        If the stores hold latents of different SAEs, or `out` holds something else.
    DamagedStore
        If a chunk of the latents is lost or damaged.
    ClusterLost
        If the scheduler goes away. The parts that are finished stay.
    """
    out, table = Path(out), None if table is None else Path(table)
    with client_or_own(client) as working:
        return _concept_statistics(latents, out, config, working, table, overwrite, progress)


write_concepts = concept_statistics  # its name in 0.1; stays for one release


def _concept_statistics(
    latents: Path | str | Sequence[Path | str],
    out: Path,
    config: ConceptConfig,
    client: "Client",
    table: Path | None,
    overwrite: bool,
    progress: Progress,
) -> ConceptResult:
    prepare_workers(client, warm_up)
    paths = [latents] if isinstance(latents, Path | str) else list(latents)
    stores = [LatentStore(path) for path in paths]
    check_one_sae(stores)
    check_token_set(stores, config.token_set)
    _refuse_pruned(stores)
    joined = join_tables(stores)
    notes: dict[str, Any] = {"differences": differences(stores)}
    if table is not None:
        joined, unmatched = regroup(joined, table)
        notes |= unmatched
    images = _Images.of(joined)
    if not 1 <= len(images.datasets) <= _MOST_DATASETS:
        raise BadInput(
            f"expected images of 1 to {_MOST_DATASETS} datasets; found {len(images.datasets):,}. Correct the column "
            f"'dataset' of the image table, or give another with --table"
        )
    settings = {name: value for name, value in asdict(config).items() if name != "partition_images"}
    spec = {
        "latents": [store.identity for store in stores],
        "latents_spec": [store.spec.to_dict() for store in stores],
        **settings,
    } | ({"table": table_sha256(joined)} if table is not None else {})
    inputs = [path for path in (*(store.root for store in stores), table) if isinstance(path, Path)]
    packages = ("dask", "distributed", "matplotlib", "numba", "numpy", "scipy")
    writer = begin_results(out, CONCEPTS, spec, overwrite=overwrite, inputs=inputs, packages=packages)
    if writer.is_complete:
        return _result(writer.header.summary or {}, out, config, table, was_complete=True)

    writer.watch(*(store.header for store in stores))
    parts = writer.root / "parts"
    with cluster_job(client, writer.root, {store.root: store.journal_sha256 for store in stores}):
        counted = _count(stores, images, writer, config, Watch(client, progress))
    found = [_describe(number, images, *each, config) for number, each in enumerate(counted)]
    compared, agreement = _compare(found, images, config)
    writer.write_table("latents", pa.concat_tables([each.latents for each in found]))
    writer.write_table("top_images", pa.concat_tables([each.top for each in found]))
    writer.write_table("agreement", compared)
    panels = [Panel.of(each.latents, name) for name, each in zip(images.datasets, found, strict=True)]
    plot_scatter(panels, writer.root / "scatter")
    plot_thresholds(panels, writer.root / "thresholds")
    discard(parts)
    summary = {
        "n_latents": stores[0].spec.n_latents,
        "by_dataset": [each.summary for each in found],
        "agreement": agreement,
        "n_without_dataset": int((images.is_readable & (images.dataset < 0)).sum()),
        **notes,
        "warning": threshold_warning(
            spec["latents_spec"], MEANINGFUL, "choose one for cyto concept select --threshold"
        ),
    }
    writer.finish(summary)
    return _result(summary, out, config, table, was_complete=False)


def _refuse_pruned(stores: list[LatentStore]) -> None:
    for store in stores:
        if store.spec.min_activation:
            raise BadInput(
                f"{store.root} was pruned below {store.spec.min_activation:g}, {store.n_dropped:,} values are missing: "
                f"frequencies and mean activations would be wrong; encode without --min-activation, into another "
                f"store: cyto sae encode STORE RUN -o LATENTS"
            )


# ------------------------------------------------------------------------------------------- sums over images


def _count(
    stores: list[LatentStore],
    images: _Images,
    writer: ResultWriter,
    config: ConceptConfig,
    watch: Watch,
) -> list[tuple[LatentSums, TopImages]]:
    """Sums and largest activations of every dataset."""
    tag = sha256_json({"concepts": writer.header.identity, "level": "image"})
    parts: list[PartSummary] = []
    count_into_parts(
        watch,
        stores,
        (writer.root / "parts").absolute(),
        tag,
        taus=(0.0,),
        token_set=config.token_set,
        partition_images=config.partition_images,
        each=parts.append,
    )
    watch.tell(len(images.ids), len(images.ids), "joining")
    below = LevelParts.of(parts)
    lengths = np.concatenate([np.empty(0, np.int32), *(part.lengths for part in parts)])
    found = []
    for number in range(len(images.datasets)):
        sums = LatentSums.zeros(1, stores[0].spec.n_latents)
        top = TopImages.zeros(stores[0].spec.n_latents, config.top_k)
        pieces = list(_pieces(images.members(number), lengths))
        for wave in range(0, len(pieces), _WAVE):
            futures = [
                watch.client.submit(
                    sum_images, piece, images.place[piece], below, stores[0].spec.n_latents, config.top_k, pure=False
                )
                for piece in pieces[wave : wave + _WAVE]
            ]
            for more_sums, more_top in watch.results(futures):  # in order
                sums.add(more_sums)
                top.add(more_top)
        found.append((sums, top))
    return found


def _pieces(members: Ints, lengths: npt.NDArray[np.int32]) -> list[Ints]:
    """Consecutive images of about _GROUP_ENTRIES entries: by the data alone, never by partitions, workers or memory."""
    entries = np.cumsum(lengths[members], dtype=np.int64) - lengths[members]
    cuts = [0, *(np.flatnonzero(np.diff(entries // _GROUP_ENTRIES)) + 1), len(members)] if len(members) else [0]
    return [members[low:high] for low, high in pairwise(cuts)]


# ------------------------------------------------------------------------------------------- sums to tables


@dataclass(frozen=True)
class _Described:
    """One dataset: its tables, and a summary."""

    latents: pa.Table
    top: pa.Table
    common: Ints  # (n_latents,) top label_common, -1 below the minimum support
    summary: dict[str, Any]


def _describe(number: int, images: _Images, sums: LatentSums, top: TopImages, config: ConceptConfig) -> _Described:
    name, members = images.datasets[number], images.members(number)
    n_latents = len(sums.n_active)
    index = np.where(top.image >= 0, images.by_id[top.image], -1)
    labels = {column: images.labels_within(column, members) for column in LABEL_COLUMNS}
    of_top = {column: np.where(index >= 0, values[index], -1) for column, values in labels.items()}
    heaviest = {column: top_label(top.value, values) for column, values in of_top.items()}
    n_labelled = {column: (values >= 0).sum(axis=1) for column, values in of_top.items()}
    entropy = label_entropy(top.value, of_top[config.label], min_support=config.min_support)
    chance = shuffled_entropy(
        top.value,
        index,
        labels[config.label],
        shuffles=config.shuffles,
        seed=config.seed,
        min_support=config.min_support,
    )
    tests = label_tests(
        top.value,
        index,
        labels[config.label],
        images.patient,
        shuffles=config.patient_shuffles,
        seed=config.seed,
        min_support=config.min_support,
    )
    entropy_q, divergence_q = _q(tests.entropy_p), _q(tests.divergence_p)
    mean = sums.activation / np.maximum(sums.n_active, 1)
    latents = _table(
        LATENT_COLUMNS,
        latent=np.arange(n_latents),
        dataset=[name] * n_latents,
        n_images=sums.n_active,
        frequency=sums.n_active / max(1, len(members)),
        mean_activation=mean,
        max_activation=sums.max,
        n_labelled=n_labelled[config.label],
        label_entropy=entropy,
        label_entropy_null=chance,
        label_entropy_p=tests.entropy_p,
        label_entropy_q=entropy_q,
        label_divergence=tests.divergence,
        label_divergence_p=tests.divergence_p,
        label_divergence_q=divergence_q,
        top_label=_named(images.labels[config.label][0], heaviest[config.label]),
        n_labelled_common=n_labelled["label_common"],
        top_label_common=_named(images.labels["label_common"][0], heaviest["label_common"]),
    )
    latent, rank = np.nonzero(index >= 0)
    image = index[latent, rank]
    top_images = _table(
        TOP_COLUMNS,
        latent=latent,
        dataset=[name] * len(latent),
        rank=rank + 1,
        image_id=_named(images.ids, image),
        image_index=image,
        value=top.value[latent, rank],
        **{column: _named(images.labels[column][0], labels[column][image]) for column in LABEL_COLUMNS},
    )
    is_active = sums.n_active > 0
    is_labelled = labels[config.label] >= 0
    of_patient = images.patient[is_labelled]
    summary = {
        "dataset": name,
        "n_readable": len(members),
        "n_unreadable": int(((images.dataset == number) & ~images.is_readable).sum()),
        "n_labelled": int(is_labelled.sum()),
        "n_labels": len(np.unique(labels[config.label][labels[config.label] >= 0])),
        "n_silent": int((~is_active).sum()),
        "n_meaningful": int((mean >= MEANINGFUL).sum()),
        "n_without_entropy": int((is_active & np.isnan(entropy)).sum()),
        "n_patients": len(np.unique(of_patient[of_patient >= 0])),
        "n_labelled_without_patient": int((of_patient < 0).sum()),
        "n_entropy_q_05": int((entropy_q <= 0.05).sum()),  # NaN is not
        "n_divergence_q_05": int((divergence_q <= 0.05).sum()),
        "n_top_unlabelled": int((of_top[config.label][latent, rank] < 0).sum()),
    }
    common = np.where(n_labelled["label_common"] >= config.min_support, heaviest["label_common"], -1)
    return _Described(latents, top_images, common, summary)


def _q(p: Floats) -> Floats:
    """Benjamini-Hochberg over what has a p."""
    q, has_p = np.full(len(p), np.nan), ~np.isnan(p)
    if has_p.any():
        q[has_p] = false_discovery_control(p[has_p])
    return q


def _compare(found: list[_Described], images: _Images, config: ConceptConfig) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Does a latent respond to the same cell type in every dataset? Per latent, and per pair of datasets."""
    common = np.stack([each.common for each in found])
    has_label = common >= 0
    n_datasets = has_label.sum(axis=0)
    first = common[has_label.argmax(axis=0), np.arange(common.shape[1])]
    is_same = ((common == first) | ~has_label).all(axis=0)
    agrees = pa.array(is_same, mask=n_datasets < 2)
    shared = np.where((n_datasets >= 2) & is_same, first, -1)
    compared = pa.table(
        {
            "latent": np.arange(common.shape[1]),
            "n_datasets": n_datasets,
            "agrees": agrees,
            "label_common": _named(images.labels["label_common"][0], shared),
        }
    )
    pairs = []
    for a, b in combinations(range(len(found)), 2):
        agreement = asdict(label_agreement(common[a], common[b], shuffles=config.shuffles, seed=config.seed))
        plain = {name: None if value != value else value for name, value in agreement.items()}  # NaN is null in JSON
        pairs.append({"dataset_a": images.datasets[a], "dataset_b": images.datasets[b], **plain})
    return compared, pairs


def _table(columns: dict[str, pa.DataType], **values: Any) -> pa.Table:
    """NaN becomes null. A value without a column, or a column without a value, is a mistake of this file."""
    assert values.keys() == columns.keys(), sorted(values.keys() ^ columns.keys())
    return pa.table({name: pa.array(values[name], kind, from_pandas=True) for name, kind in columns.items()})


def _numbered(names: list[str | None]) -> tuple[list[str], Ints]:
    """The names, each once, rising, and which one each is; -1 for none."""
    known = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(known)}
    return known, np.array([-1 if name is None else number[name] for name in names], np.int64)


def _named(names: list[str], numbers: Ints) -> pa.Array:
    """The names with these numbers; null for -1."""
    return pa.array(names, pa.string()).take(pa.array(numbers, mask=numbers < 0))


def _result(
    summary: dict[str, Any], out: Path, config: ConceptConfig, table: Path | None, *, was_complete: bool
) -> ConceptResult:
    known = {name: value for name, value in summary.items() if name not in ("files", "figures")}
    about: dict[str, Any] = {"out": out, "token_set": config.token_set, "label": config.label, "table": table}
    return ConceptResult(**about, **known, was_complete=was_complete)
