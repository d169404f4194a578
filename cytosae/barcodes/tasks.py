"""What Dask's workers do for barcodes: count a partition, add up groups, fill chunks of the stores.

Every task is a function of paths and plain values, finds its input on the disk that all share, writes its output there
atomically, and can be done twice. What comes back is small.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stores import csr_bulk
from stores.csr_bulk import EntryReader, share_entries, write_entries
from stores.errors import BadInput, DamagedStore
from stores.files import PARTIAL_SUFFIX, sha256_file
from stores.latent_store import remote_rows
from stores.part_files import Part, open_part, write_part
from stores.seal import Seal
from stores.token_layout import TokenLayout

from .count_kernels import ImageCounter, ImageCounts, LatentSums, add_rows, take_nonzero
from .value_counts import SparseCounts, ValueScanner

Ints = npt.NDArray[np.int64]
_MAPPED_BYTES = 256 << 20  # of parts that a task keeps open: mapped pages count as the worker's memory


@dataclass(frozen=True)
class Partition:
    """Images to be counted together: rows start..stop of one latent store, images first.. of the barcodes."""

    latents: str  # path or URL
    start: int
    stop: int
    first: int
    n_images: int  # of the store
    tokens_per_image: int
    n_latents: int
    journal_sha256: str = ""  # of a URL: what its chunk files are checked by
    seal: Seal | None = None  # of a path: the store that was planned for, and no other
    layout: TokenLayout | None = None  # which token of an image is what; None: CLS first, then patches

    @property
    def name(self) -> str:
        """Of its part."""
        return f"{self.first:09d}-{self.first + self.stop - self.start:09d}.part"


@dataclass(frozen=True)
class PartSummary:
    """How many entries each row of a part has: enough to know where in a store each of them will lie."""

    path: str
    tag: str  # whose part it is: identity of the job, and level
    lengths: npt.NDArray[np.int32]  # (n_rows,) entries
    n_above: npt.NDArray[np.int32]  # (n_taus, n_rows) entries with a count
    n_values: int = 0  # stored nonzeros that were counted
    was_there: bool = False


@dataclass(frozen=True)
class GroupTask:
    """Groups that one task adds up: group g has members[starts[g]:starts[g + 1]], and is divided by divisors[g]."""

    path: str  # of the part that it writes
    members: Ints  # row numbers of the level below, counted through all of its parts
    starts: Ints
    divisors: Ints  # 0: added to the sums over all images, but no row of its own

    def group(self, number: int) -> Ints:
        """The members of a group, in order."""
        return self.members[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class LevelParts:
    """Where the rows of one level lie, as tasks of the next level read them: its parts, in order.

    Much smaller than the summaries of the parts, since every task gets it.
    """

    paths: Sequence[str]
    tag: str
    bounds: Ints  # (n_parts + 1,) number of the first row of each part, and the number of rows

    @staticmethod
    def of(parts: Sequence[PartSummary]) -> "LevelParts":
        """These parts, in order."""
        bounds = np.cumsum([0, *(len(part.lengths) for part in parts)])
        return LevelParts([part.path for part in parts], parts[0].tag if parts else "", bounds)


def warm_up() -> None:
    """Load what counting needs, compiled code included: a worker does it while the job is planned."""
    counter = ImageCounter(np.array([0, 1]), n_latents=1, tokens_per_image=1, taus=(0.0,), token_set="all", place="")
    counter.add(0, np.zeros(1, np.uint16), np.ones(1, np.float32))
    counter.finish()


def count_partition(
    partition: Partition, folder: str, tag: str, taus: tuple[float, ...], token_set: str
) -> PartSummary:
    """Count the images of one partition into a part of `folder`; one that is there and whole is taken as it is."""
    path = Path(folder) / partition.name
    try:
        return _summary_of(open_part(path, tag, verify=True), path, tag, was_there=True)
    except DamagedStore:
        pass
    try:
        counts = _count(partition, taus, token_set)
    finally:  # also after an error: an exchanged store is then the reason
        if partition.seal is not None:
            partition.seal.check()
    arrays = {
        "indptr": counts.indptr,
        "latent": counts.latent,
        "X": counts.count,
        "max": counts.max,
        "mean": counts.mean,
        "n_above": counts.n_above,
        "n_values": np.array([counts.n_values]),
    }
    write_part(path, tag, arrays)
    return _summary_of(Part(tag, arrays), path, tag, was_there=False)


def scan_partition(partition: Partition, token_set: str) -> SparseCounts:
    """How large the values of one partition are."""
    try:
        reader = _reader(partition)
        scanner = ValueScanner(
            reader.row_starts,
            n_latents=partition.n_latents,
            tokens_per_image=partition.tokens_per_image,
            token_set=token_set,
            place=reader.place,
            layout=partition.layout,
        )
        for first, indices, values in reader.entries():
            scanner.add(first, indices, values)
        return scanner.finish()
    finally:  # also after an error: an exchanged store is then the reason
        if partition.seal is not None:
            partition.seal.check()


def _reader(partition: Partition) -> EntryReader:
    tokens = partition.tokens_per_image
    start, stop = partition.start * tokens, partition.stop * tokens
    shape = (partition.n_images * tokens, partition.n_latents)
    if partition.journal_sha256:
        objects = remote_rows(partition.latents, partition.journal_sha256)
        return EntryReader(f"{partition.latents}/X", shape=shape, start=start, stop=stop, objects=objects)
    return EntryReader(Path(partition.latents) / "X", shape=shape, start=start, stop=stop)


def _count(partition: Partition, taus: tuple[float, ...], token_set: str) -> ImageCounts:
    reader = _reader(partition)
    counter = ImageCounter(
        reader.row_starts,
        n_latents=partition.n_latents,
        tokens_per_image=partition.tokens_per_image,
        taus=taus,
        token_set=token_set,
        place=reader.place,
        layout=partition.layout,
    )
    for first, indices, values in reader.entries():
        counter.add(first, indices, values)
    return counter.finish()


def sum_patients(
    groups: GroupTask, images: LevelParts, tag: str, n_taus: int, n_latents: int
) -> tuple[PartSummary | None, LatentSums]:
    """Add up the images of some patients: their rows become a part; also the sums over all of these images."""
    opened = opener(images)
    total, sums = LatentSums.zeros(n_taus, n_latents), LatentSums.zeros(n_taus, n_latents)
    rows = _PartBuilder(n_taus, n_latents, ("activation_sum", "n_active_images"))
    for group, divisor in enumerate(groups.divisors):
        for number, local in split_by_part(groups.group(group), images.bounds):
            sums.add_images(opened(number), local)
        latent = np.flatnonzero(sums.n_active)
        if divisor:
            mean = sums.tokens[:, latent] / np.float64(divisor)
            rows.append(latent, mean, activation_sum=sums.activation[latent], n_active_images=sums.n_active[latent])
        total.move(sums, latent)
    return rows.write(Path(groups.path), tag) if groups.divisors.any() else None, total


def add_sums(sums: list[tuple[PartSummary | None, LatentSums] | LatentSums]) -> LatentSums:
    """A node of the tree: the sums over all images, added in the order given."""
    given = [item if isinstance(item, LatentSums) else item[1] for item in sums]
    total = replace(given[0], **{name: array.copy() for name, array in vars(given[0]).items()})
    for other in given[1:]:
        total.add(other)
    return total


def summary_only(result: tuple[PartSummary | None, LatentSums]) -> PartSummary | None:
    """What `sum_patients` says of its part, without the sums."""
    return result[0]


def average_patients(groups: GroupTask, patients: LevelParts, tag: str, n_taus: int, n_latents: int) -> PartSummary:
    """Mean barcodes of some diseases over their patients."""
    opened = opener(patients)
    rows, sums = _PartBuilder(n_taus, n_latents, ()), np.zeros((n_taus, n_latents))
    for group, divisor in enumerate(groups.divisors):
        for number, local in split_by_part(groups.group(group), patients.bounds):
            add_rows(opened(number), local, sums)
        latent = np.flatnonzero(sums.any(axis=0))
        rows.append(latent, sums[:, latent] / np.float64(divisor))
        sums.fill(0)
    return rows.write(Path(groups.path), tag)


def fill_layers(
    parts: Sequence[tuple[str, int]], tag: str, first: int, last: int, matrices: dict[str, list[str]]
) -> None:
    """Write entries first..last of the layers: name -> the matrices that hold it, one per store of another tau.

    `parts`: those that hold these entries, in order, each with the number of its first entry. All layers have the
    same indices, and a layer is the same for every tau: such chunks are compressed once.
    """
    opened = [(open_part(Path(path), tag), begin) for path, begin in parts]
    everywhere = [Path(path) for paths in matrices.values() for path in paths]
    for start in range(first, last, csr_bulk.CHUNK_ENTRIES):  # memory of one chunk, which the next one takes over
        stop = min(start + csr_bulk.CHUNK_ENTRIES, last)
        write_entries(everywhere[0], "indices", start, _entries(opened, "latent", start, stop, np.int32))
        for name, paths in matrices.items():
            values = _entries(opened, name, start, stop, np.float32)
            _require_finite(name, values)
            write_entries(Path(paths[0]), "data", start, values)
    for path in everywhere[1:]:
        share_entries(everywhere[0], path, "indices", first, last)
    for paths in matrices.values():
        for other in paths[1:]:
            share_entries(Path(paths[0]), Path(other), "data", first, last)


def _entries(
    parts: list[tuple[Part, int]], name: str, start: int, stop: int, dtype: type[np.generic]
) -> npt.NDArray[Any]:
    """Entries start..stop of an array that parts hold together, each from the number given with it."""
    pieces = [
        part[name][max(0, start - begin) : stop - begin]
        for part, begin in parts
        if begin < stop and start < begin + len(part[name])
    ]
    with np.errstate(over="ignore"):
        return np.concatenate(pieces, dtype=dtype, casting="unsafe") if len(pieces) > 1 else pieces[0].astype(dtype)


def fill_counts(parts: Sequence[tuple[str, int]], tag: str, tau_index: int, first: int, last: int, matrix: str) -> None:
    """Write entries first..last of `X` at one tau; `parts` as in `fill_layers`, counting these entries only."""
    opened = [open_part(Path(path), tag) for path, _ in parts]
    number, at, skip = 0, 0, first - parts[0][1]  # the part we are in, its entry, entries with a count to leave out
    for start in range(first, last, csr_bulk.CHUNK_ENTRIES):
        size, n_taken = min(csr_bulk.CHUNK_ENTRIES, last - start), 0
        indices, values = np.empty(size, np.int32), np.empty(size, np.float32)
        while True:
            latent, count = opened[number]["latent"], opened[number]["X"][tau_index]
            taken, at = take_nonzero(latent, count, at, skip, indices[n_taken:], values[n_taken:])
            n_taken, skip = n_taken + taken, 0
            if n_taken == size:
                break
            number, at = number + 1, 0
        _require_finite("X", values)
        write_entries(Path(matrix), "indices", start, indices)
        write_entries(Path(matrix), "data", start, values)


def export_rows(
    parts: Sequence[str], tag: str, tau_index: int, names: list[str], level: str, layers: Sequence[str], path: str
) -> tuple[str, str]:
    """One Parquet file in long form, a line per row and latent, as many row groups as parts; its name and SHA-256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = {"n_active_images": pa.int64()}
    schema = pa.schema(
        [(level, pa.dictionary(pa.int32(), pa.string())), ("latent", pa.int32()), ("value", pa.float32())]
        + [(name, kind.get(name, pa.float32())) for name in layers]
    )
    target, first = Path(path), 0
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    compact = {"compression": "zstd", "compression_level": 1, "use_dictionary": [level]}  # numbers hardly repeat
    with pq.ParquetWriter(partial, schema, **compact) as writer:
        for place in parts:
            part = open_part(Path(place), tag)
            n_rows = len(part["indptr"]) - 1
            keep = slice(None) if layers else part["X"][tau_index] != 0
            row = np.repeat(np.arange(n_rows, dtype=np.int32), np.diff(part["indptr"]))[keep]
            columns = [
                pa.DictionaryArray.from_arrays(pa.array(row), pa.array(names[first : first + n_rows], pa.string())),
                pa.array(part["latent"][keep].astype(np.int32)),
                pa.array(part["X"][tau_index][keep].astype(np.float32)),
                *(pa.array(part[name][keep]).cast(schema.field(name).type, safe=False) for name in layers),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            first += n_rows
    sha256 = sha256_file(partial)
    partial.replace(target)
    return target.name, sha256


class _PartBuilder:
    """A part of groups: rows are appended one by one, then written."""

    def __init__(self, n_taus: int, n_latents: int, layers: tuple[str, ...]) -> None:
        self._kind = np.uint16 if n_latents <= 1 << 16 else np.uint32
        self._latent: list[npt.NDArray[Any]] = [np.empty(0, self._kind)]
        self._x: list[npt.NDArray[np.float64]] = [np.empty((n_taus, 0))]
        self._layers: dict[str, list[npt.NDArray[Any]]] = {name: [np.empty(0)] for name in layers}
        self._n_above: list[Ints] = []
        self._lengths: list[int] = []

    def append(self, latent: Ints, x: npt.NDArray[np.float64], **layers: npt.NDArray[Any]) -> None:
        """A row: its latents, rising, and their values (n_taus, entries)."""
        self._latent.append(latent.astype(self._kind))
        self._x.append(x)
        for name, values in layers.items():
            self._layers[name].append(values.astype(np.float64))
        self._n_above.append((x != 0).sum(axis=1))
        self._lengths.append(len(latent))

    def write(self, path: Path, tag: str) -> PartSummary:
        lengths, n_above = np.array(self._lengths, np.int32), np.stack(self._n_above, axis=1).astype(np.int32)
        arrays = {
            "indptr": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
            "latent": np.concatenate(self._latent),
            "X": np.concatenate(self._x, axis=1),
            **{name: np.concatenate(values) for name, values in self._layers.items()},
        }
        write_part(path, tag, arrays)
        return PartSummary(str(path), tag, lengths, n_above)


def _summary_of(part: Part, path: Path, tag: str, *, was_there: bool) -> PartSummary:
    lengths = np.diff(part["indptr"]).astype(np.int32)
    return PartSummary(str(path), tag, lengths, np.array(part["n_above"]), int(part["n_values"][0]), was_there)


def opener(level: LevelParts) -> Callable[[int], Part]:
    """Number of a part -> the part; some stay open."""
    largest = max((Path(path).stat().st_size for path in level.paths), default=1)
    return lru_cache(max(2, _MAPPED_BYTES // largest))(lambda number: open_part(Path(level.paths[number]), level.tag))


def split_by_part(rows: Ints, bounds: Ints) -> list[tuple[int, Ints]]:
    """Rising row numbers, cut by the part that they lie in: (number of the part, rows within it)."""
    owner = np.searchsorted(bounds, rows, side="right") - 1
    cuts = np.flatnonzero(np.diff(owner)) + 1
    return [
        (int(owner[piece[0]]), rows[piece] - bounds[owner[piece[0]]])
        for piece in np.split(np.arange(len(rows)), cuts)
        if len(piece)
    ]


def _require_finite(name: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise BadInput(f"{name} of the barcodes has a value that is NaN, infinite or too large for float32")
