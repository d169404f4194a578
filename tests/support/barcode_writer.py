"""Barcodes on disk without a latent store: what the counting writes by tasks, written from matrices at hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stores.barcode_store import NOTHING_ELSE, begin_level, write_tables
from stores.csr import CsrWriter


class BarcodeWriter:
    """Writes one AnnData store: rows of `X` and of the layers block by block, then the tables.

    Memory: one unfinished chunk per matrix.
    """

    def __init__(self, root: Path, *, n_latents: int, layers: tuple[str, ...] = ()) -> None:
        """Begin the store at `root`; a half-written one that lies there is replaced."""
        begin_level(root)
        self._root = root
        paths = {"X": root / "X"} | {name: root / "layers" / name for name in layers}
        self._matrices = {name: CsrWriter(path, n_columns=n_latents, indices="int32") for name, path in paths.items()}

    def append(self, matrices: dict[str, Any]) -> None:
        """Append the same rows to `X` and to every layer.

        Parameters
        ----------
        matrices : name -> scipy CSR (rows, n_latents): canonical, without zeros, values finite, exact in float32
        """
        assert matrices.keys() == self._matrices.keys()
        assert all(np.isfinite(matrix.data).all() for matrix in matrices.values())
        for name, matrix in matrices.items():
            self._matrices[name].append(matrix.indices, matrix.data.astype(np.float32), np.diff(matrix.indptr))

    def finish(self, *, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> None:
        """State the shapes and write the tables; `obs` has one row per appended row, `var` one per latent."""
        for matrix in self._matrices.values():
            matrix.finish()
        assert all(matrix.n_rows == len(obs) for matrix in self._matrices.values())
        write_tables(self._root, {"obs": obs, "var": var, "uns": uns, **NOTHING_ELSE})
