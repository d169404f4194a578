"""From latent stores to image, patient and disease barcodes, out of core, with Dask (CytoSAE, Eq. 2 and 3).

    a_i[s] = number of tokens of image i with h[s] > tau                       image        (Eq. 2)
    a_p[s] = 1/N_p sum over the N_p readable images of patient p of a_i[s]     patient      (Eq. 3)
    a_d[s] = 1/N_d sum over the N_d patients of disease d of a_p[s]            disease

One Dask task per block of images opens the store, counts, and writes its own part; one finisher joins the parts in
image order. Counts are integers and the finisher's blocks are fixed, so results do not depend on block size, workers
or order. No torch here: this runs on a laptop that has never seen it.
"""

import dataclasses
import math
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss

from stores.barcode_store import BarcodeStore, BarcodeWriter
from stores.csr import CsrReader, CsrRows
from stores.errors import BadInput
from stores.files import PARTIAL_SUFFIX, sync_tree
from stores.latent_store import LatentStore
from stores.output import plan_output
from stores.runlog import append_run
from stores.spec import BARCODES, Header, check_choice, new_header, read_header, write_header
from stores.tables import column, listed

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client

TOKEN_SETS = ("all", "patch", "cls")
NORMALIZATIONS = ("images", "cytosae-release")
_SUM_IMAGES = 256  # images that the finisher adds up at a time; fixed, so that sums never depend on the blocks

Progress = Callable[[int, int, str], None]  # images done, images in all, a word on the state
Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BarcodeConfig:
    """What to count. `block_images` decides speed and memory only."""

    tau: float = 0.2  # a latent is active at a token if its stored float32 value is greater
    token_set: str = "all"
    normalize: str = "images"  # "cytosae-release": divide by n_latents, as released (REFERENCE.md, quirk 19)
    block_images: int = 256

    def __post_init__(self) -> None:
        check_choice("token_set", self.token_set, TOKEN_SETS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise BadInput(f"tau must be a number of at least 0; found {self.tau!r}")
        if self.block_images < 1:
            raise BadInput(f"block_images must be at least 1; found {self.block_images}")


@dataclass(frozen=True, kw_only=True)
class BarcodeResult:
    """What was counted, and what was left out."""

    n_images: int  # readable
    n_unreadable: int
    n_without_patient: int  # readable, but nobody's: in the image store only
    n_patients: int  # with a readable image
    n_patients_unreadable: int  # without one: left out
    n_patients_without_disease: int  # in the patient store only
    n_diseases: int
    n_latents: int
    n_silent_latents: int  # latents that exceed tau nowhere
    share_above_tau: float  # of all stored nonzeros in the token set
    was_complete: bool


@dataclass(frozen=True)
class _Groups:
    """Which images belong to which patient, and which patients to which disease; names sorted."""

    patients: list[str]
    patient_of_image: Int  # (n_images,), -1: nobody's, or unreadable
    diseases: list[str]
    disease_of_patient: Int  # (n_patients,), -1: unknown
    n_images: Int  # (n_patients,) readable images
    n_unreadable: Int  # (n_patients,)
    left_out: dict[str, int]


def write_barcodes(
    latents: Path,
    barcodes: Path,
    config: BarcodeConfig,
    *,
    client: "Client",
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> BarcodeResult:
    """Count the latents of one store into `barcodes/image.zarr`, `patient.zarr` and `disease.zarr`.

    `client` is connected to a local or remote Dask cluster whose workers see both paths. A continued job takes the
    parts that are already there. Memory: a worker holds one block of token rows; the finisher one block of image rows
    and the sparse patient sums.

    Raises
    ------
    BadInput
        If a patient has two diseases, or tau lies below what the latent store was pruned at.
    DamagedStore
        If a chunk of the latents is lost or damaged.
    """
    store = LatentStore(latents)
    if config.tau < store.spec.min_activation:
        raise BadInput(
            f"{latents} was pruned below {store.spec.min_activation:g}: tau {config.tau:g} would count too few; "
            f"choose a larger --tau, or encode without pruning"
        )
    groups = _group_images(store)
    spec = {
        "latents": store.identity,
        "latents_spec": store.spec.to_dict(),
        "tau": config.tau,
        "token_set": config.token_set,
        "normalize": config.normalize,
    }
    header = new_header(BARCODES, spec)
    output = plan_output(barcodes, header, overwrite=overwrite, inputs=(latents,))
    if output.is_complete:
        output.publish()
        BarcodeStore(barcodes).check()  # damaged ones are not "already complete"
        return _result(read_header(barcodes, BARCODES), was_complete=True)

    root = output.work
    root.mkdir(parents=True, exist_ok=True)
    write_header(root, header)
    append_run(root, packages=("dask", "distributed", "numpy", "scipy", "anndata"), latents=str(store.root))
    parts = _count_blocks(store, root / "parts", config, client, progress)
    header = _join(store, root, parts, groups, config, header)
    shutil.rmtree(root / "parts")
    output.publish()
    return _result(header, was_complete=False)


def count_tokens(rows: CsrRows, *, tau: float, token_set: str, tokens_per_image: int) -> "ImageCounts":
    """Per image and latent: tokens above tau, largest activation, summed activation.

    Parameters
    ----------
    rows : token rows of whole images, `tokens_per_image` each, CLS first
    tau : compared as float32 with the stored value, strictly greater

    Returns
    -------
    One entry for every (image, latent) with a nonzero in the token set, images in order, latents rising.
    """
    latent, value, image_ptr = _entries_of_set(rows, token_set, tokens_per_image)
    # to columns and back is a stable sort by (image, latent) in linear time: a latent's tokens end up side by side, in
    # token order, so that sums have a fixed order; 20 times faster than sorting (docs/log.md)
    shape = (len(image_ptr) - 1, int(latent.max(initial=0)) + 1)
    sorted_rows = ss.csr_matrix((value, latent.astype(np.int32), image_ptr), shape=shape).tocsc().tocsr()
    value, latent, image_ptr = sorted_rows.data, sorted_rows.indices, sorted_rows.indptr.astype(np.int64)
    is_first = np.ones(len(value), bool)
    is_first[1:] = latent[1:] != latent[:-1]
    is_first[image_ptr[image_ptr < len(value)]] = True
    first = np.flatnonzero(is_first)
    if len(first):
        count = np.add.reduceat((value > np.float32(tau)).astype(np.int32), first)
        largest = np.maximum.reduceat(value, first)
        total = np.add.reduceat(value.astype(np.float64), first)
    else:
        count, largest, total = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float64)
    indptr = np.searchsorted(first, image_ptr).astype(np.int64)
    return ImageCounts(indptr, latent[first].astype(np.int64), count, largest, total, n_values=len(value))


@dataclass(frozen=True)
class ImageCounts:
    """Sparse rows of images: entry k belongs to `latent[k]`; image i holds entries indptr[i]..indptr[i + 1]."""

    indptr: Int  # (n_images + 1,)
    latent: Int  # (entries,), rising in an image
    count: npt.NDArray[np.int32]  # tokens above tau; may be 0
    max: npt.NDArray[np.float32]
    total: npt.NDArray[np.float64]  # sum over the tokens of the set
    n_values: int  # nonzeros that were looked at


def _entries_of_set(
    rows: CsrRows, token_set: str, tokens_per_image: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], Int]:
    """(latents, values, where each image begins) of the tokens that count, in token order."""
    if token_set == "all":
        return rows.indices, rows.values, rows.indptr[::tokens_per_image]
    is_chosen = np.full(rows.n_rows, token_set == "patch")
    is_chosen[::tokens_per_image] = token_set == "cls"
    lengths = np.diff(rows.indptr)
    keep = np.repeat(is_chosen, lengths)
    per_image = (lengths * is_chosen).reshape(-1, tokens_per_image).sum(1)
    return rows.indices[keep], rows.values[keep], np.concatenate([[0], np.cumsum(per_image)])


def _count_blocks(
    store: LatentStore, parts: Path, config: BarcodeConfig, client: "Client", progress: Progress
) -> list[Path]:
    """One task per block of images; each writes its part under `parts` and returns nothing but its name."""
    from distributed import as_completed

    parts.mkdir(exist_ok=True)
    blocks = [
        (start, min(start + config.block_images, store.spec.n_images))
        for start in range(0, store.spec.n_images, config.block_images)
    ]
    names = [parts / f"{start:09d}-{stop:09d}.npz" for start, stop in blocks]
    for stray in set(parts.glob("*.npz")) - set(names):
        stray.unlink()  # of another block size; torn ones go with the folder, a cancelled task may still be at them
    todo = [(block, name) for block, name in zip(blocks, names, strict=True) if not name.exists()]
    n_done = store.spec.n_images - sum(stop - start for (start, stop), _ in todo)
    progress(n_done, store.spec.n_images, "counting")
    futures = {
        client.submit(
            _count_block, str(store.root), start, stop, config.tau, config.token_set, str(name), pure=False
        ): stop - start
        for (start, stop), name in todo
    }
    try:
        for future in as_completed(list(futures)):
            future.result()  # raises the worker's error here
            n_done += futures[future]
            progress(n_done, store.spec.n_images, "counting")
    finally:
        client.cancel(list(futures))
    return names


def _count_block(store: str, start: int, stop: int, tau: float, token_set: str, part: str) -> None:
    """The task: read one block of images, count, write the part atomically."""
    latents = LatentStore(store, check_files=False)
    rows = latents.read_images(start, stop)
    counts = count_tokens(rows, tau=tau, token_set=token_set, tokens_per_image=latents.spec.tokens_per_image)
    partial = Path(f"{part}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")  # a cancelled task may be at the same block
    with partial.open("wb") as file:
        np.savez(file, **{field.name: getattr(counts, field.name) for field in dataclasses.fields(counts)})
        file.flush()
        os.fsync(file.fileno())
    partial.replace(part)


def _join(
    store: LatentStore, root: Path, parts: list[Path], groups: _Groups, config: BarcodeConfig, header: Header
) -> Header:
    """Parts to image store, image store to patients, patients to diseases; then the folder is complete."""
    n_latents = store.spec.n_latents
    images, n_values = _write_image_rows(store, root / "image.zarr", parts, config)
    patient_sums, latent_sums = _add_up(root / "image.zarr", store.spec.n_images, n_latents, groups)
    var = _latent_table(latent_sums, int(store.readable().sum()))
    uns = {"cyto": _provenance(store, header)}
    images.finish(obs=_image_obs(store), var=var, uns=uns)

    divisor = groups.n_images if config.normalize == "images" else np.full(len(groups.patients), n_latents)
    patient_rows = _divide_rows(patient_sums.pop("count"), divisor)
    patients = BarcodeWriter(root / "patient.zarr", n_latents=n_latents, layers=tuple(patient_sums))
    patients.append({"X": patient_rows, **patient_sums})
    patients.finish(obs=_patient_obs(groups), var=var, uns=uns)

    belongs, n_of_disease = _membership(groups.disease_of_patient, len(groups.diseases))
    diseases = BarcodeWriter(root / "disease.zarr", n_latents=n_latents)
    diseases.append({"X": _divide_rows(belongs @ patient_rows, n_of_disease)})
    diseases.finish(obs=_disease_obs(groups, n_of_disease), var=var, uns=uns)

    summary = {
        **groups.left_out,
        "n_images": int(store.readable().sum()),
        "n_patients": len(groups.patients),
        "n_diseases": len(groups.diseases),
        "n_latents": n_latents,
        "n_silent_latents": int((latent_sums["count_sum"] == 0).sum()),
        "share_above_tau": int(latent_sums["count_sum"].sum()) / max(1, n_values),
    }
    sync_tree(root)
    header = Header(**{**vars(header), "complete": True, "summary": summary})
    write_header(root, header)
    return header


def _write_image_rows(
    store: LatentStore, path: Path, parts: list[Path], config: BarcodeConfig
) -> tuple[BarcodeWriter, int]:
    """Append the parts, in image order, to the image store; returns it with the number of nonzeros looked at."""
    tokens, n_latents = store.spec.tokens_per_image, store.spec.n_latents
    n_set = {"all": tokens, "patch": tokens - 1, "cls": 1}[config.token_set]
    writer = BarcodeWriter(path, n_latents=n_latents, layers=("max", "mean"))
    n_values = 0
    for part in parts:
        with np.load(part, allow_pickle=False) as saved:
            counts = ImageCounts(**{name: saved[name] for name in saved.files if name != "n_values"}, n_values=0)
            n_values += int(saved["n_values"])
        shape = (len(counts.indptr) - 1, n_latents)
        values = {"X": counts.count, "max": counts.max, "mean": (counts.total / n_set).astype(np.float32)}
        rows = {name: ss.csr_matrix((v, counts.latent, counts.indptr), shape, copy=True) for name, v in values.items()}
        for matrix in rows.values():
            matrix.eliminate_zeros()  # nothing above tau, or a mean below the least float32
        writer.append(rows)
    writer.close_rows()
    return writer, n_values


def _add_up(
    image_store: Path, n_images: int, n_latents: int, groups: _Groups
) -> tuple[dict[str, ss.csr_matrix], dict[str, npt.NDArray[Any]]]:
    """Sums over images, per patient (sparse, (n_patients, n_latents)) and per latent; in blocks of a fixed size.

    `count`: tokens above tau; `activation_sum`: image activations (mean over the image's tokens of the set);
    `n_active_images`: images with any activation. Integers are summed as int64, activations as float64 in image order.
    """
    shape = (n_images, n_latents)
    readers = {name: CsrReader(image_store / place, shape=shape) for name, place in _IMAGE_MATRICES.items()}
    n_patients = len(groups.patients)
    patient = {name: ss.csr_matrix((n_patients, n_latents), dtype=kind) for name, kind in _SUM_TYPES.items()}
    latent = {f"{name}_sum": np.zeros(n_latents, kind) for name, kind in _SUM_TYPES.items()}
    latent["max"] = np.zeros(n_latents, np.float32)
    for start in range(0, n_images, _SUM_IMAGES):
        stop = min(start + _SUM_IMAGES, n_images)
        rows = {name: _as_scipy(reader.read_rows(start, stop), n_latents) for name, reader in readers.items()}
        belongs, _ = _membership(groups.patient_of_image[start:stop], n_patients)
        blocks = {
            "count": rows["X"].astype(np.int64),
            "activation_sum": rows["mean"].astype(np.float64),
            "n_active_images": rows["max"].astype(bool).astype(np.int64),
        }
        for name, block in blocks.items():
            patient[name] = patient[name] + belongs.astype(block.dtype) @ block
            latent[f"{name}_sum"] += np.asarray(block.sum(0)).ravel()
        np.maximum.at(latent["max"], rows["max"].indices, rows["max"].data)
    return {name: _canonical(matrix) for name, matrix in patient.items()}, latent


_IMAGE_MATRICES = {"X": "X", "max": "layers/max", "mean": "layers/mean"}
_SUM_TYPES = {"count": np.int64, "activation_sum": np.float64, "n_active_images": np.int64}


def _group_images(store: LatentStore) -> _Groups:
    """Patients and diseases of the image table. Left out, and counted: unreadable images, those without a patient.

    Raises
    ------
    BadInput
        If a patient has two diseases.
    """
    is_readable = store.readable()
    owner, disease = column(store.images, "patient"), column(store.images, "disease")
    diseases_of: dict[str, set[str]] = {}
    for name, found in zip(owner, disease, strict=True):
        if name is not None:
            diseases_of.setdefault(name, set()).update([found] if found is not None else [])
    torn = sorted(name for name, found in diseases_of.items() if len(found) > 1)
    if torn:
        raise BadInput(
            f"{len(torn):,} patients have images of two diseases ({listed(torn)}: "
            f"{' and '.join(sorted(diseases_of[torn[0]]))}); correct the image table and extract again"
        )
    readable_owner = [name if ok else None for name, ok in zip(owner, is_readable, strict=True)]
    patients = sorted({name for name in readable_owner if name is not None})
    number = {name: i for i, name in enumerate(patients)}
    patient_of_image = np.array([number.get(name, -1) if name else -1 for name in readable_owner], np.int64)
    unreadable_owner = [number[name] for name, ok in zip(owner, is_readable, strict=True) if not ok and name in number]
    disease_of = [next(iter(diseases_of[name]), None) for name in patients]
    diseases = sorted({name for name in disease_of if name is not None})
    return _Groups(
        patients=patients,
        patient_of_image=patient_of_image,
        diseases=diseases,
        disease_of_patient=np.array([diseases.index(d) if d is not None else -1 for d in disease_of], np.int64),
        n_images=np.bincount(patient_of_image[patient_of_image >= 0], minlength=len(patients)),
        n_unreadable=np.bincount(np.array(unreadable_owner, np.int64), minlength=len(patients)),
        left_out={
            "n_unreadable": int((~is_readable).sum()),
            "n_without_patient": sum(1 for name, ok in zip(owner, is_readable, strict=True) if ok and name is None),
            "n_patients_unreadable": len(diseases_of) - len(patients),
            "n_patients_without_disease": disease_of.count(None),
        },
    )


def _membership(group_of: Int, n_groups: int) -> tuple[ss.csr_matrix, Int]:
    """(n_groups, len(group_of)) 0/1 matrix with member k in row group_of[k] (-1: nowhere), and the group sizes."""
    members = np.flatnonzero(group_of >= 0)
    groups = group_of[members]
    matrix = ss.csr_matrix((np.ones(len(members)), (groups, members)), shape=(n_groups, len(group_of)))
    return matrix, np.bincount(groups, minlength=n_groups)


def _divide_rows(matrix: ss.csr_matrix, divisor: Int) -> ss.csr_matrix:
    """Row r divided by divisor[r], in float64, canonical."""
    matrix = _canonical(matrix).astype(np.float64)
    matrix.data /= np.repeat(divisor.astype(np.float64), np.diff(matrix.indptr))
    return matrix


def _canonical(matrix: ss.csr_matrix) -> ss.csr_matrix:
    """A copy with rising indices and without zeros."""
    matrix = ss.csr_matrix(matrix, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _as_scipy(rows: CsrRows, n_columns: int) -> ss.csr_matrix:
    return ss.csr_matrix((rows.values, rows.indices, rows.indptr), shape=(rows.n_rows, n_columns))


def _image_obs(store: LatentStore) -> "pd.DataFrame":
    import pandas as pd

    names = [name for name in store.images.column_names if name not in ("image_id", "error")]
    index = pd.Index(column(store.images, "image_id"), name="image_id")
    return pd.DataFrame({name: column(store.images, name) for name in names}, index=index).fillna("")


def _patient_obs(groups: _Groups) -> "pd.DataFrame":
    import pandas as pd

    disease = [groups.diseases[d] if d >= 0 else "" for d in groups.disease_of_patient]
    counts = {"n_images": groups.n_images, "n_unreadable": groups.n_unreadable}
    return pd.DataFrame({"disease": disease, **counts}, index=pd.Index(groups.patients, name="patient"))


def _disease_obs(groups: _Groups, n_patients: Int) -> "pd.DataFrame":
    import pandas as pd

    known = groups.disease_of_patient >= 0
    n_images = np.zeros(len(groups.diseases), np.int64)
    np.add.at(n_images, groups.disease_of_patient[known], groups.n_images[known])
    index = pd.Index(groups.diseases, name="disease")
    return pd.DataFrame({"n_patients": n_patients, "n_images": n_images}, index=index)


def _latent_table(sums: dict[str, npt.NDArray[Any]], n_readable: int) -> "pd.DataFrame":
    """One row per latent: in how many readable images it is active, how strongly there, tokens above tau in all."""
    import pandas as pd

    n_active = sums["n_active_images_sum"]
    table = {
        "latent": np.arange(len(n_active)),
        "n_active_images": n_active,
        "frequency": n_active / max(1, n_readable),
        "mean_activation": sums["activation_sum_sum"] / np.maximum(n_active, 1),
        "max_activation": sums["max"],
        "n_tokens_above_tau": sums["count_sum"],
    }
    return pd.DataFrame(table, index=pd.Index([str(i) for i in range(len(n_active))], name="latent_name"))


def _provenance(store: LatentStore, header: Header) -> dict[str, Any]:
    spec, cache = header.spec, store.spec.cache
    unit = {"images": "mean tokens above tau per readable image", "cytosae-release": "tokens above tau / n_latents"}
    return {
        "tau": spec["tau"],
        "token_set": spec["token_set"],
        "normalize": spec["normalize"],
        "unit_image": "tokens above tau",
        "unit_patient": unit[spec["normalize"]],
        "identity": header.identity,
        "latents": store.identity,
        "sae_sha256": store.spec.sae_sha256,
        "cache_sha256": store.spec.cache_sha256,
        "backbone": cache["backbone"],
        "backbone_trained": bool(cache["trained"]),
        "block": int(cache["block"]),
        "value_bits": store.spec.value_bits,
        "created_by": header.created_by,
    }


def _result(header: Header, *, was_complete: bool) -> BarcodeResult:
    return BarcodeResult(**(header.summary or {}), was_complete=was_complete)
