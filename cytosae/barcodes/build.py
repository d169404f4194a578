"""From latent stores to image, patient and disease barcodes, out of core, with Dask (CytoSAE, Eq. 2 and 3).

    a_i[s] = number of tokens of image i with h[s] > tau                       image        (Eq. 2)
    a_p[s] = 1/N_p sum over the N_p readable images of patient p of a_i[s]     patient      (Eq. 3)
    a_d[s] = 1/N_d sum over the N_d patients of disease d of a_p[s]            disease

How the work is divided (a part: a file that one task writes, with the barcodes of consecutive images or groups; a
level: images, patients or diseases):

    latent stores --> partitions of images --> parts of images -----> image.zarr
                      one task each            |
                                               +--> parts of patients ----> patient.zarr, .parquet
                                               |    one task per some patients
                                               |                  |
                                               |                  +--> parts of diseases --> disease.zarr, .parquet
                                               +--> sums over all images --> table of latents of each store

A task gives back how many entries each row of its part has (`PartSummary`). So it is known where in a store every entry
will lie, and further tasks fill the stores a few chunks each, while parts still come in (`_Level`). A task of the next
level knows where the parts lie (`LevelParts`) and which rows make a group (`GroupTask`). This process plans, and writes
the tables. Counts are integers, and every sum of activations has a fixed order, whatever the partitions, workers and
memory. No torch here.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cytosae.cluster import Watch, client_or_own, cluster_job, prepare_workers
from stores import csr_bulk
from stores.barcode_store import (
    LEVELS,
    NOTHING_ELSE,
    BarcodeStore,
    begin_level,
    level_name,
    recorded_files,
    tau_text,
    write_tables,
)
from stores.csr_bulk import CHUNK_ENTRIES, begin_matrix, finish_matrices
from stores.destination import plan_output
from stores.errors import BadInput
from stores.files import sha256_json, sweep_partials, sync_file, sync_tree
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.runlog import append_run
from stores.spec import BARCODES, Header, check_choice, new_header, read_header, require_unchanged, write_header
from stores.tables import table_sha256
from stores.token_sets import TOKEN_SETS

from . import tasks
from .compatibility import check_exact, check_one_sae, check_tau, check_token_set, differences
from .count_kernels import LatentSums
from .partitions import count_into_parts, discard
from .patients import Groups, disease_rows, group_images, image_rows, join_tables, patient_rows, regroup
from .report import BarcodeResult
from .tau_rule import AUTO, TauChoice, smaller_taus, tau_of

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client, Future

NORMALIZATIONS = ("images", "cytosae-release")
_GROUP_ENTRIES = 4 * CHUNK_ENTRIES  # entries that a task of groups adds up; fixed, since sums of floats depend on it
_FILL_CHUNKS = 4  # chunks of a matrix that a task fills
_FAN_IN = 8  # of the tree; fixed, since sums depend on it
_WAVE = 64  # leaves of the tree that are submitted at once
_LAYERS = {"image": ("max", "mean"), "patient": ("activation_sum", "n_active_images"), "disease": ()}

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BarcodeConfig:
    """What to count.

    Attributes
    ----------
    tau : one or several, 0 or more; a latent is active at a token if its stored float32 value is greater. Or "auto":
        one that follows from the latents alone (tau_rule.py), for which they are read once more
    token_set : tokens that count: all, patch, cls or register
    normalize : images: mean over a patient's readable images; cytosae-release: divide by the number of latents, as the
        released code does
    partition_images : images that one task counts; None: as memory allows. Decides speed and memory only
    block_images : its name in 0.1; stays for one release
    """

    tau: float | tuple[float, ...] | str = 0.2
    token_set: str = "all"
    normalize: str = "images"
    partition_images: int | None = None
    block_images: InitVar[int | None] = None

    def __post_init__(self, block_images: int | None) -> None:
        if block_images is not None:
            object.__setattr__(self, "partition_images", block_images)
        check_choice("token_set", self.token_set, TOKEN_SETS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        if isinstance(self.tau, str) and self.tau != AUTO:
            raise BadInput(f"tau must be one or several numbers, or {AUTO!r}; found {self.tau!r}")
        if not isinstance(self.tau, str):  # 1 and 1.0 are the same settings
            as_given = self.tau if isinstance(self.tau, tuple) else (self.tau,)
            floats = tuple(float(tau) for tau in as_given)
            object.__setattr__(self, "tau", floats if isinstance(self.tau, tuple) else floats[0])
        for tau in self.taus:
            if not (math.isfinite(tau) and tau >= 0):
                raise BadInput(f"tau must be a number of at least 0; found {tau!r}")
        if not (self.is_auto or self.taus) or len({np.float32(tau) for tau in self.taus}) < len(self.taus):
            raise BadInput(f"several tau must differ, as float32 too; found {', '.join(map(tau_text, self.taus))}")
        if self.partition_images is not None and self.partition_images < 1:
            raise BadInput(f"partition_images must be at least 1; found {self.partition_images}")

    @property
    def is_auto(self) -> bool:
        """tau is not chosen yet."""
        return self.tau == AUTO

    @property
    def taus(self) -> tuple[float, ...]:
        """One or more, rising; none with "auto"."""
        if isinstance(self.tau, str):
            return ()
        return tuple(sorted(self.tau)) if isinstance(self.tau, tuple) else (self.tau,)


@dataclass(frozen=True)
class _Job:
    """What all steps of the job share."""

    stores: list[LatentStore]
    root: Path
    config: BarcodeConfig
    groups: Groups
    header: Header
    client: "Client"
    watch: Watch

    @property
    def parts(self) -> Path:
        return self.root / "parts"

    @property
    def n_latents(self) -> int:
        return self.stores[0].spec.n_latents

    def path(self, level: str, tau: float) -> Path:
        name = level_name(level, tau, is_only=len(self.config.taus) == 1)
        return self.root / f"{name}.zarr"


class _Level:
    """Images, patients or diseases: the parts with their barcodes, and the tasks that fill the stores from these.

    Parts come in one by one, in order. As soon as they hold a few full chunks of entries, a task writes these.
    """

    def __init__(self, job: _Job, name: str) -> None:
        """Begin the stores of the level; what lies there is replaced."""
        self.name, self.tag, self.layers = name, _tag(job, name), _LAYERS[name]
        self.parts: list[tasks.PartSummary] = []
        self.futures: list[Future] = []
        self._client = job.client
        self.stores = [job.path(name, tau) for tau in job.config.taus]
        for store in self.stores:
            begin_level(store)
            begin_matrix(store / "X")
            for layer in self.layers:
                begin_matrix(store / "layers" / layer)
        # By kind of matrix (0 the layers, 1 + n the counts at tau n, which have entries of their own): number of the
        # first entry of every part and of the end, and how many entries have their task
        self._begins = [[0] for _ in range(1 + len(self.stores))]
        self._n_submitted = [0] * len(self._begins)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(n_rows,) entries of each row, in the layers."""
        return np.concatenate([np.empty(0, np.int32), *(part.lengths for part in self.parts)])

    def n_above(self, tau_index: int) -> npt.NDArray[np.int32]:
        """(n_rows,) entries of each row with a count at the tau with this number, from 0."""
        return np.concatenate([np.empty(0, np.int32), *(part.n_above[tau_index] for part in self.parts)])

    def add(self, part: tasks.PartSummary) -> None:
        """The next part is written."""
        self.parts.append(part)
        self._begins[0].append(self._begins[0][-1] + int(part.lengths.sum(dtype=np.int64)))
        for begins, n_above in zip(self._begins[1:], part.n_above, strict=True):
            begins.append(begins[-1] + int(n_above.sum(dtype=np.int64)))
        self._submit(only_full=True)

    def end(self) -> None:
        """There are no more parts: the last entries, too, get their tasks."""
        self._submit(only_full=False)

    def finish(self, n_latents: int) -> None:
        """Write what makes the matrices readable, while workers fill them."""
        for tau_index, store in enumerate(self.stores):
            finish_matrices([store / "X"], self.n_above(tau_index), n_latents)
        if self.layers:
            layers = [store / "layers" / layer for store in self.stores for layer in self.layers]
            finish_matrices(layers, self.lengths, n_latents)

    def _submit(self, *, only_full: bool) -> None:
        size = _FILL_CHUNKS * csr_bulk.CHUNK_ENTRIES
        for kind, begins in enumerate(self._begins):
            while self._n_submitted[kind] + (size if only_full else 1) <= begins[-1]:
                first = self._n_submitted[kind]
                last = self._n_submitted[kind] = min(first + size, begins[-1])
                low, high = bisect.bisect_right(begins, first) - 1, bisect.bisect_left(begins, last)
                parts = [(self.parts[k].path, begins[k]) for k in range(low, high) if begins[k] < begins[k + 1]]
                # before partitions that wait: the disk is to have work from the beginning
                submit = partial(self._client.submit, pure=False, priority=1)
                if kind:
                    matrix = str(self.stores[kind - 1] / "X")
                    self.futures.append(submit(tasks.fill_counts, parts, self.tag, kind - 1, first, last, matrix))
                elif self.layers:
                    matrices = {
                        layer: [str(store / "layers" / layer) for store in self.stores] for layer in self.layers
                    }
                    self.futures.append(submit(tasks.fill_layers, parts, self.tag, first, last, matrices))


def write_barcodes(
    latents: Path | str | Sequence[Path | str],
    out: Path | str,
    config: BarcodeConfig = BarcodeConfig(),
    *,
    client: "Client | None" = None,
    table: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> BarcodeResult:
    """Count the latents of one or more stores into `out/image.zarr`, `patient.zarr` and `disease.zarr`.

    A job that is continued keeps the parts that are there, whatever their size. Memory of a worker: the result of one
    partition and two chunks; of this process: the tables, and a few numbers per image.

    Parameters
    ----------
    latents : paths or URLs; the rows of the stores follow each other; all by the same SAE
    out : the folder, on a file system that all workers share
    client : of a local or remote Dask cluster whose workers see all paths; None: one is started for this call
    table : other patients, diseases or labels for the images (image_id and the columns to replace)

    Raises
    ------
    BadInput
        If a patient has two diseases, image ids clash, or tau lies below what a latent store was pruned at; if a worker
        lacks this version of the package, or does not see the same files.
    SpecMismatch
        If the stores hold latents of different SAEs.
    DamagedStore
        If a chunk of the latents is lost or damaged.
    ClusterLost
        If the scheduler goes away. The parts that are finished stay.
    """
    out, table = Path(out), None if table is None else Path(table)
    with client_or_own(client) as working:
        return _write_barcodes(latents, out, config, working, table, overwrite, progress)


def _write_barcodes(
    latents: Path | str | Sequence[Path | str],
    out: Path,
    config: BarcodeConfig,
    client: "Client",
    table: Path | None,
    overwrite: bool,
    progress: Progress,
) -> BarcodeResult:
    prepare_workers(client, tasks.warm_up)
    paths = [latents] if isinstance(latents, Path | str) else list(latents)
    stores = [LatentStore(path) for path in paths]
    check_one_sae(stores)
    check_token_set(stores, config.token_set)
    images = join_tables(stores)
    notes: dict[str, Any] = {"differences": differences(stores)}
    chosen: TauChoice | None = None
    if config.is_auto:
        chosen = tau_of(stores, client, out, config.token_set, config.partition_images, progress)
        config = replace(config, tau=chosen.tau)
    check_tau(stores, config.taus[0])
    if table is not None:
        images, found = regroup(images, table)
        notes |= found
    groups = group_images(images)
    check_exact(stores, groups)
    header = new_header(BARCODES, _make_spec(stores, config, chosen, None if table is None else images))
    inputs = tuple(path for path in (*(store.root for store in stores), table) if isinstance(path, Path))
    output = plan_output(out, header, overwrite=overwrite, inputs=inputs)
    if output.is_complete:
        output.publish()
        BarcodeStore(out).check()  # damaged ones are not "already complete"
        return _result(read_header(out, BARCODES), out, config, table, was_complete=True)

    root = output.work.absolute()
    root.mkdir(parents=True, exist_ok=True)
    watch = Watch(client, progress)
    job = _Job(stores, root, config, groups, header, client, watch)
    try:
        with cluster_job(client, root, {store.root: store.journal_sha256 for store in stores}):
            write_header(root, header)
            append_run(
                root,
                packages=("dask", "distributed", "numba", "numpy", "anndata"),
                latents=_one_or_all([str(store.root) for store in stores]),
            )
            levels: list[_Level] = []

            def begin_stores() -> None:
                levels.extend(_Level(job, name) for name in LEVELS)
                _write_known_tables(job, images)

            count_into_parts(
                watch,
                stores,
                job.parts,
                _tag(job, LEVELS[0]),
                taus=config.taus,
                token_set=config.token_set,
                partition_images=config.partition_images,
                each=lambda part: levels[0].add(part),
                meanwhile=begin_stores,
            )
            header = _join(job, levels, notes, watch.tell)
    finally:
        if not any(root.iterdir()):  # refused before anything was written
            root.rmdir()
    for left_over in (job.parts, *job.root.glob(".*.removed")):
        discard(left_over)
    output.publish()
    return _result(header, out, config, table, was_complete=False)


def _make_spec(
    stores: Sequence[LatentStore], config: BarcodeConfig, chosen: TauChoice | None, regrouped: Any | None
) -> dict[str, Any]:
    """What decides the numbers; `regrouped` is the image table if `table` gave other patients, diseases or labels."""
    return {
        "latents": _one_or_all([store.identity for store in stores]),
        "latents_spec": _one_or_all([store.spec.to_dict() for store in stores]),
        "tau": _one_or_all(config.taus),
        "token_set": config.token_set,
        "normalize": config.normalize,
        **({} if regrouped is None else {"table": table_sha256(regrouped)}),
        **({} if chosen is None else {"tau_rule": chosen.rule}),
    }


def _tag(job: _Job, level: str) -> str:
    """Of the parts of a level: a part with another tag belongs to another job."""
    return sha256_json({"barcodes": job.header.identity, "level": level})


# ------------------------------------------------------------------------------------------- images to groups


def _sum_patients(job: _Job, images: _Level, patients: _Level, *, meanwhile: Callable[[], None]) -> LatentSums:
    """Add up the images of every patient: parts for `patients`. Also the sums over all readable images, by a tree.

    Images without a patient count in the sums over all images only. `meanwhile` is called once, while workers add up.
    """
    groups, n_patients = job.groups, len(job.groups.names)
    divisor = groups.n_images if job.config.normalize == "images" else np.full(n_patients, job.n_latents)
    lengths = images.lengths
    with_patient = np.flatnonzero(groups.patient_of_image >= 0)
    members = with_patient[np.argsort(groups.patient_of_image[with_patient], kind="stable")]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(groups.n_images)])
    plan = _plan_groups(job, "patient", members, starts, divisor, lengths)
    without = np.flatnonzero((groups.patient_of_image < 0) & groups.is_readable)
    edges = np.arange(len(without) + 1)  # may be cut anywhere; a task then takes its own as one group
    plan += [
        replace(task, starts=np.array([0, len(task.members)]), divisors=np.zeros(1, np.int64))
        for task in _plan_groups(job, "no-patient", without, edges, np.zeros(len(without), np.int64), lengths)
    ]
    n_taus, level_below = len(job.config.taus), tasks.LevelParts.of(images.parts)
    pending: list[Future] = []  # sums that are not added up yet
    for wave in range(0, max(1, len(plan)), _WAVE):
        leaves = [
            job.client.submit(tasks.sum_patients, task, level_below, patients.tag, n_taus, job.n_latents, pure=False)
            for task in plan[wave : wave + _WAVE]
        ]
        parts = [job.client.submit(tasks.summary_only, leaf, pure=False) for leaf in leaves]
        pending = pending + leaves
        while True:
            pending = [
                job.client.submit(tasks.add_sums, pending[k : k + _FAN_IN], pure=False)
                for k in range(0, len(pending), _FAN_IN)
            ]
            if len(pending) <= 1:
                break
        if not wave:
            meanwhile()
        for part in job.watch.results(parts):  # so no more than one wave is submitted
            if part is not None:
                patients.add(part)
    (sums,) = job.watch.results(pending) or [LatentSums.zeros(n_taus, job.n_latents)]
    return sums


def _average_patients(job: _Job, patients: _Level, diseases: _Level) -> None:
    """Average the barcodes of the patients of every disease, each patient once: parts for `diseases`."""
    of_patient, n_diseases = job.groups.disease_of_patient, len(job.groups.diseases)
    known = np.flatnonzero(of_patient >= 0)
    members = known[np.argsort(of_patient[known], kind="stable")]
    sizes = np.bincount(of_patient[known], minlength=n_diseases)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    plan = _plan_groups(job, "disease", members, starts, sizes, patients.lengths)
    n_taus, level_below = len(job.config.taus), tasks.LevelParts.of(patients.parts)
    futures = [
        job.client.submit(tasks.average_patients, task, level_below, diseases.tag, n_taus, job.n_latents, pure=False)
        for task in plan
    ]
    for part in job.watch.results(futures):
        diseases.add(part)


def _plan_groups(
    job: _Job, name: str, members: Ints, starts: Ints, divisors: Ints, lengths: npt.NDArray[np.int32]
) -> list[tasks.GroupTask]:
    """Consecutive groups into tasks of about _GROUP_ENTRIES entries: by the data alone, never by workers or memory.

    Group g has the rows members[starts[g]:starts[g + 1]]; `lengths`: entries of every row of the level below.
    """
    entries = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[members], dtype=np.int64)])[starts[:-1]]
    task_of = entries // _GROUP_ENTRIES
    cuts = [0, *(np.flatnonzero(np.diff(task_of)) + 1), len(divisors)] if len(divisors) else [0]
    return [
        tasks.GroupTask(
            path=str(job.parts / f"{name}-{low:09d}.groups"),
            members=members[starts[low] : starts[high]],
            starts=starts[low : high + 1] - starts[low],
            divisors=divisors[low:high],
        )
        for low, high in pairwise(cuts)
    ]


# ------------------------------------------------------------------------------------------- the stores


def _write_known_tables(job: _Job, images: Any) -> None:
    """What needs no counts: the rows of all levels, and where the numbers come from."""
    rows = {"image": image_rows(images), "patient": patient_rows(job.groups), "disease": disease_rows(job.groups)}
    for tau in job.config.taus:
        paths = [job.path(level, tau) for level in LEVELS]
        write_tables(paths[0], {"uns": {"cyto": _provenance(job, tau)}, **NOTHING_ELSE}, *paths[1:])
        for level, path in zip(LEVELS, paths, strict=True):
            write_tables(path, {"obs": rows[level]})


def _join(job: _Job, levels: "list[_Level]", notes: dict[str, Any], progress: Progress) -> Header:
    """From the parts of all images to patients and diseases, and from all parts to stores; then the header."""
    images, patients, diseases = levels
    n_images = len(job.groups.is_readable)
    progress(n_images, n_images, "joining")
    images.end()
    sums = _sum_patients(job, images, patients, meanwhile=lambda: images.finish(job.n_latents))
    patients.end()
    exports = _export(job, patients, job.groups.names)  # the longest task of all: before the others
    _average_patients(job, patients, diseases)
    diseases.end()
    exports += _export(job, diseases, job.groups.diseases)
    for level in (patients, diseases):
        level.finish(job.n_latents)
    futures = [future for level in levels for future in level.futures]
    n_readable = int(job.groups.is_readable.sum())
    for tau_index, tau in enumerate(job.config.taus):
        paths = [job.path(level, tau) for level in LEVELS]
        write_tables(paths[0], {"var": _latent_table(sums, tau_index, n_readable)}, *paths[1:])
    job.watch.results(futures)
    for level in levels:
        level.futures.clear()  # a worker that dies from here on must not have them done again
    del futures
    for place in job.root.glob("*.zarr"):  # while the workers still export
        sync_tree(place)
    sha256 = dict(job.watch.results(exports))
    del exports
    n_values = sum(part.n_values for part in images.parts)
    summary = {
        **job.groups.left_out,
        **notes,
        "n_images": n_readable,
        "n_patients": len(job.groups.names),
        "n_diseases": len(job.groups.diseases),
        "n_latents": job.n_latents,
        "n_silent_latents": [int((tokens == 0).sum()) for tokens in sums.tokens],
        "share_above_tau": [int(tokens.sum()) / max(1, n_values) for tokens in sums.tokens],
        "exports": sha256,
    }
    if would_keep := smaller_taus(sums.max, job.config.taus[0], summary["share_above_tau"][0]):
        summary["would_keep"] = would_keep
    sweep_partials(job.root)
    summary["store_files"] = recorded_files(job.root)
    for name in sha256:
        sync_file(job.root / name)
    header = Header(**{**vars(job.header), "complete": True, "summary": summary})
    require_unchanged(*(store.header for store in job.stores))
    write_header(job.root, header)
    return header


def _export(job: _Job, level: _Level, names: list[str]) -> "list[Future]":
    """The tasks that write a level as Parquet beside its stores."""
    paths = [part.path for part in level.parts]
    return [
        job.client.submit(
            tasks.export_rows,
            *(paths, level.tag, number, names, level.name, level.layers),
            str(store.with_suffix(".parquet")),
            pure=False,
            priority=2,
        )
        for number, store in enumerate(level.stores)
    ]


def _latent_table(sums: LatentSums, tau_index: int, n_readable: int) -> "pd.DataFrame":
    """One row per latent: in how many readable images it is active, how strongly there, tokens above tau in all."""
    import pandas as pd

    table = {
        "latent": np.arange(len(sums.n_active)),
        "n_active_images": sums.n_active,
        "frequency": sums.n_active / max(1, n_readable),
        "mean_activation": sums.activation / np.maximum(sums.n_active, 1),
        "max_activation": sums.max,
        "n_tokens_above_tau": sums.tokens[tau_index],
    }
    return pd.DataFrame(table, index=pd.Index([str(i) for i in range(len(sums.n_active))], name="latent_name"))


def _provenance(job: _Job, tau: float) -> dict[str, Any]:
    spec, first = job.header.spec, job.stores[0].spec
    unit = {"images": "mean tokens above tau per readable image", "cytosae-release": "tokens above tau / n_latents"}
    return {
        "tau": tau,
        "token_set": spec["token_set"],
        "normalize": spec["normalize"],
        "unit_image": "tokens above tau",
        "unit_patient": unit[spec["normalize"]],
        "identity": job.header.identity,
        "latents": spec["latents"],
        "sae_sha256": first.sae_sha256,
        "cache_sha256": _one_or_all([store.spec.cache_sha256 for store in job.stores]),
        "backbone": first.cache["backbone"],
        "backbone_trained": bool(first.cache["trained"]),
        "block": int(first.cache["block"]),
        "value_bits": min(store.spec.value_bits for store in job.stores),
        **({"tau_rule": spec["tau_rule"]["words"]} if "tau_rule" in spec else {}),
        "created_by": job.header.created_by,
    }


def _one_or_all(values: Sequence[Any]) -> Any:
    """A setting that is one value for one store or tau, and a list for several."""
    return values[0] if len(values) == 1 else list(values)


def _result(
    header: Header, out: Path, config: BarcodeConfig, table: Path | None, *, was_complete: bool
) -> BarcodeResult:
    per_tau = ("n_silent_latents", "share_above_tau")
    summary: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else (value,) if name in per_tau else value
        for name, value in (header.summary or {}).items()
        if name not in ("exports", "store_files")
    }
    summary["would_keep"] = tuple((float(tau), int(n)) for tau, n in summary.get("would_keep", ()))
    rule = header.spec.get("tau_rule")
    return BarcodeResult(out=out, taus=config.taus, table=table, **summary, tau_rule=rule, was_complete=was_complete)
