"""Barcodes on disk: a folder of AnnData stores (image, patient, disease), in Zarr v3.

Format "barcodes", version 1: docs/formats.md. `anndata.read_zarr` opens each of them: int32 indices, float32
values, `obs` the images, patients or diseases, `var` one row per latent.
"""

import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from .checksum import CRC_BYTES
from .csr import CsrReader
from .errors import BadInput, DamagedStore
from .files import PARTIAL_SUFFIX, is_dropping, sha256_file, write_files
from .spec import BARCODES, Header, read_header, require_unchanged
from .tables import listed
from .zarr_meta import check_tree, files_below, read_array, read_group

if TYPE_CHECKING:
    import pandas as pd

LEVELS = ("image", "patient", "disease")
_READ_ROWS = 256  # read at a time
# empty elements, which every AnnData store has
NOTHING_ELSE: dict[str, Any] = {name: {} for name in ("obsm", "varm", "obsp", "varp")}


def begin_level(root: Path) -> None:
    """Make an empty AnnData store with layers at `root`; an incomplete one there is replaced."""
    if root.is_dir() and not root.is_symlink():
        doomed = root.with_name(f".{root.name}.{uuid.uuid4().hex}.removed")
        root.rename(doomed)  # a task of an interrupted job may still write into it
        shutil.rmtree(doomed, ignore_errors=True)
    group = zarr.open_group(root, mode="w-", zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    group.create_group("layers").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})


def write_tables(root: Path, tables: dict[str, Any], *others: Path) -> None:
    """Write some elements of the AnnData store at `root`, by name, and the same ones of `others`.

    By way of memory, which takes half the time: zarr hands each small file to another thread, and these wait for each
    other longest while workers keep all cores busy.

    tables : tables, or dicts of plain values
    """
    from anndata.io import write_elem
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3)
    with plain_anndata():
        for name, table in tables.items():
            write_elem(group, name, plain_strings(table))
    below = {name: content.to_bytes() for name, content in files.items() if "/" in name}  # the group itself is there
    for store in (root, *others):
        write_files(store, below)


@contextmanager
def plain_anndata() -> Iterator[None]:
    """Let anndata write what all its versions can read: no Zarr shards, strings as `string-array`.

    Both are set explicitly: the defaults depend on the versions of anndata and pandas.
    """
    import anndata

    with anndata.settings.override(auto_shard_zarr_v3=False, allow_write_nullable_strings=False):
        yield


def plain_strings(table: Any) -> Any:
    """A table whose strings (columns, index, column names) are Python objects; any other value unchanged.

    pandas 3 has an array type for strings, which anndata 0.12 refuses to write as `string-array`.
    """
    import pandas as pd

    if not isinstance(table, pd.DataFrame):
        return table
    texts = {name: table[name].astype(object) for name in table if isinstance(table[name].dtype, pd.StringDtype)}
    found = table.assign(**texts) if texts else table.copy(deep=False)
    found.index, found.columns = _plain_index(table.index), _plain_index(table.columns)
    return found


def _plain_index(index: "pd.Index") -> "pd.Index":
    import pandas as pd

    return index.astype(object) if isinstance(index.dtype, pd.StringDtype) else index


def level_name(level: str, tau: float, *, is_only: bool) -> str:
    """The name of a level's store: `image`, or `image_tau0.2` if there are several taus."""
    return level if is_only else f"{level}_tau{tau_text(tau)}"


def tau_text(tau: float) -> str:
    """The shortest text of this number: 0.2, 1, 1e-05."""
    return repr(float(tau)).removesuffix(".0")


def recorded_files(root: Path) -> dict[str, list[Any]]:
    """Every file of the levels below `root`: path -> [size, checksum], for the header.

    For a chunk that ends with its own CRC32C, this is the checksum (8 hex digits): decoding compares it with the
    content, so no chunk is read twice. For all other files, which are small, it is the SHA-256.
    """
    found: dict[str, list[Any]] = {}
    has_crc: dict[Path, bool] = {}  # by folder, which may hold thousands of chunks
    for store in sorted(root.glob("*.zarr")):
        for path in _files_below(store):
            if path.parent not in has_crc:
                has_crc[path.parent] = _ends_with_crc(path)
            found[path.relative_to(root).as_posix()] = [
                path.stat().st_size,
                _checksum(path, by_end=has_crc[path.parent]),
            ]
    return found


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in files_below(folder) if path.suffix != PARTIAL_SUFFIX)


def _checksum(path: Path, *, by_end: bool) -> str:
    if by_end:
        with path.open("rb") as file:
            file.seek(-CRC_BYTES, os.SEEK_END)
            return f"{int.from_bytes(file.read(), 'little'):08x}"
    return sha256_file(path)


def _ends_with_crc(path: Path) -> bool:
    """Is it a chunk of a sparse matrix that Cyto wrote (`csr_bulk`)?"""
    if path.parent.name != "c" or path.parent.parent.name not in ("indices", "data", "indptr"):
        return False
    return read_array(path.parent.parent).codecs[-1:] == ("crc32c",)


class BarcodeStore:
    """A complete barcodes folder, open for reading."""

    def __init__(self, root: Path | str) -> None:
        """Open the folder at `root`.

        Raises
        ------
        StoreNotFound, IncompleteStore, SpecMismatch
            If there are no finished barcodes of a version that this program reads.
        """
        self.root = Path(root).absolute()
        self.header: Header = read_header(self.root, BARCODES)
        self._whole: set[str] = set()  # folders that were checked

    @property
    def taus(self) -> tuple[float, ...]:
        """The thresholds, ascending."""
        tau = self.header.spec["tau"]
        return tuple(tau) if isinstance(tau, list) else (tau,)

    def path(self, level: str, tau: float | None = None) -> Path:
        """The folder of a level's AnnData store; `tau` is needed only if there are several.

        Raises
        ------
        BadInput
            If there is no such level or tau.
        """
        if tau is None and len(self.taus) > 1:
            raise BadInput(f"{self.root} holds barcodes at several tau: choose one of {self._listed_taus()}")
        if tau is not None and tau not in self.taus:
            raise BadInput(f"{self.root} has no barcodes at tau {tau:g}; it holds {self._listed_taus()}")
        name = level_name(level, self.taus[0] if tau is None else tau, is_only=len(self.taus) == 1)
        if level not in LEVELS or not (self.root / f"{name}.zarr").is_dir():
            there = [each for each in LEVELS if any(self.root.glob(f"{each}*.zarr"))]
            raise BadInput(f"{self.root} has no {level!r} barcodes; it holds {', '.join(there)}")
        return self.root / f"{name}.zarr"

    def check(self) -> None:
        """Raise DamagedStore if a level, a chunk or an export is missing, or has changed."""
        names = [level_name(level, tau, is_only=len(self.taus) == 1) for level in LEVELS for tau in self.taus]
        self.check_files(*(f"{name}.zarr" for name in names))
        for name in (level_name(level, tau, is_only=len(self.taus) == 1) for level in LEVELS for tau in self.taus):
            layers = (path for path in (self.root / f"{name}.zarr" / "layers").glob("*") if _is_layer(path))
            for matrix in (self.root / f"{name}.zarr" / "X", *layers):
                missing = CsrReader(matrix, shape=_stated_shape(matrix)).missing_chunks()
                if missing:
                    raise DamagedStore(f"{missing[0]} is missing; count again with cyto barcode --overwrite")
        for name, sha256 in (self.header.summary or {}).get("exports", {}).items():
            export = self.root / name
            if not export.is_file() or sha256_file(export) != sha256:
                what = "damaged: its hash is not the one in the header" if export.is_file() else "missing"
                raise DamagedStore(f"{export} is {what}; count again with cyto barcode --overwrite")

    @property
    def records_files(self) -> bool:
        """Does the header have checksums of all files? Not in barcodes of an older cyto."""
        return bool(self._recorded)

    @property
    def _recorded(self) -> dict[str, list[Any]]:
        """Size and checksum of every file by the header; empty in barcodes of an older cyto."""
        return dict((self.header.summary or {}).get("store_files", {}))

    def check_files(self, *below: str) -> None:
        """Raise DamagedStore if a file below these folders of the barcodes is missing or has changed.

        For a chunk only the checksum at its end is compared here; decoding compares it with the content. Barcodes of
        an older cyto have no recorded checksums, and pass. Folders that passed are not checked again.
        """
        for folder in below:
            if self._recorded and folder not in self._whole:
                for problem in self.file_problems(folder):
                    require_unchanged(self.header)  # the store may have been replaced
                    raise DamagedStore(f"{self.root}/{problem}; count again with cyto barcode --overwrite")
                self._whole.add(folder)

    def file_problems(self, folder: str, *, all_bytes: bool = False) -> Iterator[str]:
        """`NAME is missing` and the like, for every file that the header names below a folder of the barcodes."""
        expected = {name: what for name, what in self._recorded.items() if f"{name}/".startswith(f"{folder}/")}
        place = self.root / folder
        there = [place] if place.is_file() else _files_below(place)
        extra = {path.relative_to(self.root).as_posix() for path in there} - expected.keys()
        yield from (f"{name} does not belong there" for name in sorted(extra))
        for name, (size, checksum) in expected.items():
            path = self.root / name
            if not path.is_file():
                yield f"{name} is missing"
            elif path.stat().st_size != size:
                yield f"{name} has {path.stat().st_size:,} bytes, expected {size:,}"
            elif _checksum(path, by_end=len(checksum) == 8) != checksum:
                yield f"{name} is not the file that was written: its checksum is not the one in the header"
            elif all_bytes and len(checksum) == 8 and _content_crc(path) != checksum:
                yield f"{name} fails its checksum: bits have changed"

    def _check_matrix(self, path: Path) -> None:
        """Check the files of a matrix, and that the store was not replaced."""
        place = path.relative_to(self.root)
        self.check_files(place.as_posix(), f"{place.parts[0]}/zarr.json")

    def read(self, level: str, tau: float | None = None) -> Any:
        """The AnnData of one level (`image`, `patient`, `disease`), whole in memory; `tau` as for `path`.

        Raises
        ------
        DamagedStore
            If it cannot be read, or a file has changed. In barcodes of an older cyto, which have no recorded
            checksums, a lost chunk reads as zeros; only `check` finds it.
        """
        import anndata

        path = self.path(level, tau)
        self.check_files(path.name)
        check_tree(path)
        with _errors_as_damage(path), _without_foreign_file_warnings():
            return anndata.read_zarr(path)

    def read_element(self, level: str, element: str, tau: float | None = None) -> Any:
        """One element of a level's AnnData (`X`, `obs`, `layers/mean`), whole in memory; otherwise as `read`."""
        from anndata.io import read_elem

        path = self.path(level, tau)
        if element == "X" or element.startswith("layers/"):
            n_rows = self.matrix(level, tau, element.removeprefix("layers/")).shape[0]
            return self.read_rows(level, np.arange(n_rows), tau, layer=element.removeprefix("layers/"))
        self.check_files(f"{path.name}/{element}", f"{path.name}/zarr.json")
        read_group(path)
        check_tree(path / element)
        with _errors_as_damage(path), _without_foreign_file_warnings():
            return read_elem(zarr.open_group(path, mode="r")[element])

    def read_obs(self, level: str, tau: float | None = None, *, needed: Sequence[str] = ()) -> "pd.DataFrame":
        """Only the table of images, patients or diseases, which must have the columns `needed`. Otherwise as `read`.

        Raises
        ------
        DamagedStore
            Also if a column is missing.
        """
        table: pd.DataFrame = self.read_element(level, "obs", tau)
        missing = [name for name in needed if name not in table.columns]
        if missing:
            raise DamagedStore(
                f"{self.path(level, tau)} has no column {listed(missing)}: it is damaged, or of an older cyto; "
                f"count again with cyto barcode --overwrite"
            )
        return table

    def matrix(self, level: str, tau: float | None = None, layer: str = "X") -> CsrReader:
        """A reader for ranges of rows of a level's `X`, or of a layer.

        Raises
        ------
        BadInput
            If there is no such level or tau.
        DamagedStore
            If the matrix is damaged or missing.
        """
        path = self.path(level, tau)
        path = path / "X" if layer == "X" else path / "layers" / layer
        self._check_matrix(path)
        return CsrReader(path, shape=_stated_shape(path))

    def read_rows(self, level: str, rows: npt.ArrayLike, tau: float | None = None, *, layer: str = "X") -> Any:
        """Some rows of `X` or a layer, given in ascending order, as a scipy CSR matrix in float32; checked.

        Memory: twice the rows, and 256 further rows.

        Raises
        ------
        DamagedStore
            If a chunk is damaged or missing.
        TypeError, IndexError
            If `rows` are not whole numbers (a mask is none), there is no such row, or they do not ascend.
        """
        from scipy.sparse import csr_matrix, vstack

        reader = self.matrix(level, tau, layer)
        shape = reader.shape
        rows = _checked_rows(rows, shape[0])
        pieces = [csr_matrix((0, shape[1]), dtype=np.float32)]
        with _errors_as_damage(self.path(level, tau)):
            for number in np.unique(rows // _READ_ROWS):
                first, last = int(number) * _READ_ROWS, min((int(number) + 1) * _READ_ROWS, shape[0])
                found = reader.read_rows(first, last)
                whole = csr_matrix((found.values, found.indices, found.indptr), shape=(last - first, shape[1]))
                pieces.append(whole[rows[(rows >= first) & (rows < last)] - first])
        return vstack(pieces, format="csr")

    def row_lengths(
        self, level: str, rows: npt.NDArray[np.int64], tau: float | None = None, *, layer: str = "X"
    ) -> npt.NDArray[np.int64]:
        """(len(rows),) number of nonzeros in some rows, as `read_rows` would return. Raises DamagedStore."""
        reader = self.matrix(level, tau, layer)
        with _errors_as_damage(self.path(level, tau)):
            lengths: npt.NDArray[np.int64] = np.diff(reader.row_starts(0, reader.shape[0] + 1))[rows]
        return lengths

    def _listed_taus(self) -> str:
        return ", ".join(map(tau_text, self.taus))


def _checked_rows(rows: npt.ArrayLike, n_rows: int) -> npt.NDArray[np.int64]:
    found = np.asarray(rows)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise TypeError(f"rows must be a list of whole numbers; found {found.dtype} of shape {found.shape}")
    if found.size and not 0 <= found.min() <= found.max() < n_rows:
        raise IndexError(f"row {found.min() if found.min() < 0 else found.max()} outside 0..{n_rows - 1}")
    found = found.astype(np.int64)
    if (np.diff(found) < 0).any():
        raise IndexError("rows must be in ascending order: read them sorted, and order what is read")
    return found


def _content_crc(path: Path) -> str:
    """The CRC32C (hex) of a chunk without the CRC32C at its end."""
    return f"{google_crc32c.value(path.read_bytes()[:-CRC_BYTES]):08x}"


@contextmanager
def _without_foreign_file_warnings() -> Iterator[None]:
    """Hide zarr's warnings about foreign files in a group, such as .DS_Store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized as a component of a Zarr hierarchy")
        yield


def _is_layer(path: Path) -> bool:
    return path.is_dir() and not is_dropping(path.name)


@contextmanager
def _errors_as_damage(path: Path) -> Iterator[None]:
    """Turn errors of zarr, its codecs and anndata into a DamagedStore in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedStore(f"{path} cannot be read ({reason}); count again with cyto barcode --overwrite") from None


def _stated_shape(matrix: Path) -> tuple[int, int]:
    """The shape in the attributes of a CSR group."""
    try:
        n_rows, n_columns = read_group(matrix)["shape"]
        if min(n_rows, n_columns) < 0 or not type(n_rows) is type(n_columns) is int:
            raise ValueError("not a shape")
    except (ValueError, KeyError, TypeError):
        raise DamagedStore(
            f"{matrix / 'zarr.json'} is missing or damaged; count again with cyto barcode --overwrite"
        ) from None
    return n_rows, n_columns
