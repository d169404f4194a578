"""Barcodes on disk: one folder with three whole AnnData stores (image, patient, disease), in Zarr v3.

Format "barcodes", version 1: docs/formats.md. `anndata.read_zarr` opens each of them: int32 indices, float32
values, `obs` the images, patients or diseases, `var` one row per latent.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from .csr import CsrReader, CsrWriter
from .errors import BadInput, DamagedStore
from .spec import BARCODES, Header, read_header

if TYPE_CHECKING:
    import pandas as pd

LEVELS = ("image", "patient", "disease")


class BarcodeWriter:
    """Writes one AnnData store: rows of `X` and of the layers block by block, then the tables.

    Memory: one unfinished chunk per matrix.
    """

    def __init__(self, root: Path, *, n_latents: int, layers: tuple[str, ...] = ()) -> None:
        """Begin the store at `root`; a half-written one that lies there is replaced."""
        if root.is_dir() and not root.is_symlink():
            shutil.rmtree(root)
        self._group = zarr.open_group(os.fspath(root), mode="w-", zarr_format=3)
        self._group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        paths = {"X": root / "X"} | {name: root / "layers" / name for name in layers}
        layer_group = self._group.create_group("layers")
        layer_group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        self._matrices = {name: CsrWriter(path, n_columns=n_latents, indices="int32") for name, path in paths.items()}

    def append(self, matrices: dict[str, Any]) -> None:
        """Append the same rows to `X` and to every layer.

        Parameters
        ----------
        matrices : name -> scipy CSR (rows, n_latents): canonical, without zeros, values exact in float32

        Raises
        ------
        BadInput
            If a value is not finite; nothing is written then.
        """
        assert matrices.keys() == self._matrices.keys()
        for name, matrix in matrices.items():
            if not np.isfinite(matrix.data).all():
                raise BadInput(f"{name} of the barcodes has a value that is NaN or infinite")
        for name, matrix in matrices.items():
            self._matrices[name].append(matrix.indices, matrix.data.astype(np.float32), np.diff(matrix.indptr))

    def close_rows(self) -> None:
        """State the shapes: from here on the matrices can be read (`CsrReader`), and no row can be added."""
        for matrix in self._matrices.values():
            matrix.finish()

    def finish(self, *, obs: "pd.DataFrame", var: "pd.DataFrame", uns: dict[str, Any]) -> None:
        """Close the rows and write the tables; `obs` has one row per appended row, `var` one per latent."""
        import anndata
        from anndata.io import write_elem

        self.close_rows()
        assert all(matrix.n_rows == len(obs) for matrix in self._matrices.values())
        tables = {"obs": obs, "var": var, "uns": uns} | {name: {} for name in ("obsm", "varm", "obsp", "varp")}
        with anndata.settings.override(auto_shard_zarr_v3=False):  # said, so that anndata does not ask
            for name, table in tables.items():
                write_elem(self._group, name, table)


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

    def check(self) -> None:
        """Raise DamagedStore if a level or a chunk of its matrices is missing."""
        for level in LEVELS:
            layers = (path for path in (self.root / f"{level}.zarr" / "layers").glob("*") if path.is_dir())
            for matrix in (self.root / f"{level}.zarr" / "X", *layers):
                shape = matrix / "zarr.json"
                try:
                    n_rows, n_columns = json.loads(shape.read_bytes())["attributes"]["shape"]
                except (OSError, ValueError, KeyError, TypeError):
                    raise DamagedStore(f"{shape} is missing or damaged; count again with --overwrite") from None
                missing = CsrReader(matrix, shape=(n_rows, n_columns)).missing_chunks()
                if missing:
                    raise DamagedStore(f"{missing[0]} is missing; count again with --overwrite")

    def read(self, level: str) -> Any:
        """The AnnData of one level (`image`, `patient`, `disease`), whole in memory."""
        import anndata

        if level not in LEVELS or not (self.root / f"{level}.zarr").is_dir():
            there = [name for name in LEVELS if (self.root / f"{name}.zarr").is_dir()]
            raise BadInput(f"{self.root} has no {level!r} barcodes; it holds {', '.join(there)}")
        return anndata.read_zarr(self.root / f"{level}.zarr")
