"""Barcodes of one level as one .h5ad file that cellxgene and other viewers open: categories, two maps of the rows."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stores.barcode_store import BarcodeStore, plain_anndata, plain_strings
from stores.errors import BadInput
from stores.files import PARTIAL_SUFFIX, sync_file, sync_folder
from stores.wording import Report, printable

if TYPE_CHECKING:
    import pandas as pd

Float32s = npt.NDArray[np.float32]
_MOST_COMPONENTS = 50
_NEIGHBOURS = 15  # of UMAP


@dataclass(frozen=True, kw_only=True)
class Exported(Report):
    """What was written."""

    path: Path
    n_rows: int
    n_latents: int
    categories: tuple[str, ...]  # columns of obs that became categories
    n_components: int  # columns of X_pca; 0: too few rows or latents
    has_umap: bool
    warnings: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The file, and what it holds."""
        maps = [f"X_pca ({self.n_components} components)"] * bool(self.n_components) + ["X_umap"] * self.has_umap
        yield f"{printable(str(self.path))}: {self.n_rows:,} rows x {self.n_latents:,} latents"
        yield f"categories: {printable(', '.join(self.categories)) or 'none'}; maps: {', '.join(maps) or 'none'}"


def export_h5ad(
    barcodes: Path | str,
    out: Path | str,
    *,
    level: str = "image",
    tau: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Exported:
    """Write the AnnData of one level as `out`: the same X, layers, obs, var and `uns["cyto"]`, and what viewers read.

    Texts of obs become categories, but for those that differ in every row (ids stay texts). `obsm["X_pca"]` is a PCA of
    log(1 + X), of at most 50 components; `obsm["X_umap"]` rests on it, where the package umap-learn is installed. Both
    are for looking: `cyto compare` and `cyto probe` do not read them. Memory: the level, once or twice.

    Parameters
    ----------
    level : image, patient or disease
    tau : which barcodes, where there are several
    seed : of both maps

    Raises
    ------
    BadInput
        If there is no such level or tau, or no row of it; if `out` does not end with .h5ad, lies inside the barcodes,
        or is there.
    DamagedStore
        If the barcodes are not what was written.
    """
    store, out = BarcodeStore(barcodes), Path(out)
    if out.suffix != ".h5ad":
        raise BadInput(f"{out} must end with .h5ad")
    if out.absolute().is_relative_to(store.root) or out.resolve().is_relative_to(store.root.resolve()):
        raise BadInput(f"{out} lies inside {barcodes}, whose files are recorded; choose a place beside it")
    if out.is_dir() or (out.exists() and not overwrite):
        raise BadInput(f"{out} is there already; choose another output, or add --overwrite to replace it")
    found = store.read(level, tau)
    if not found.n_obs:
        raise BadInput(
            f"{store.root} has no {level}, since no image has one in its table; count again with cyto barcode --table"
        )
    found.obs, categories = with_categories(found.obs)
    found.var = plain_strings(found.var)
    warnings: list[str] = []
    about: dict[str, Any] = {"seed": seed, "of": "log(1 + X)"}
    components = principal_components(found.X, seed=seed)
    if components is None:
        warnings.append(f"no map: it takes three rows that differ; found {found.n_obs}")
    else:
        found.obsm["X_pca"] = components
        about["scikit-learn"] = version("scikit-learn")
        points = _umap(components, seed)
        if points is None:
            warnings.append("no X_umap: umap-learn is not installed (pip install umap-learn); viewers show X_pca")
        elif isinstance(points, str):
            warnings.append(f"no X_umap: {points}")
        else:
            found.obsm["X_umap"] = points
            about["umap-learn"] = version("umap-learn")
        found.uns["cyto"]["maps"] = about
    _write(found, out)
    return Exported(
        path=out,
        n_rows=found.n_obs,
        n_latents=found.n_vars,
        categories=categories,
        n_components=0 if components is None else components.shape[1],
        has_umap="X_umap" in found.obsm,
        warnings=tuple(warnings),
    )


def with_categories(obs: "pd.DataFrame") -> "tuple[pd.DataFrame, tuple[str, ...]]":
    """A table whose texts are categories, and their names. Texts of which no two rows are alike stay texts."""
    import pandas as pd

    found = plain_strings(obs)
    names = [
        name
        for name in found
        if found[name].dtype == object and all(isinstance(value, str) for value in found[name])
        # one row has no two alike; it is a category all the same
        if len(found) == 1 or not found[name].is_unique
    ]
    columns = {}
    for name in names:
        kinds = pd.Index(sorted(set(found[name])), dtype=object)  # Python's texts, which every anndata writes
        columns[name] = pd.Categorical(found[name], categories=kinds)
    return found.assign(**columns), tuple(map(str, names))


def principal_components(counts: Any, *, seed: int) -> Float32s | None:
    """(n_rows, k) coordinates of log(1 + counts), k at most 50; None where fewer than three rows differ.

    counts : (n_rows, n_latents) sparse, not negative
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import PCA

    values = csr_matrix(counts, dtype=np.float64, copy=True)
    values.data = np.log1p(values.data)
    if values.shape[0] < 3:
        return None
    top, bottom = (np.asarray(side(axis=0).todense()).ravel() for side in (values.max, values.min))
    values = values[:, np.flatnonzero(top > bottom)]  # most latents are silent in a small dataset
    values.indices, values.indptr = values.indices.astype(np.int32), values.indptr.astype(np.int32)
    n_components = min(_MOST_COMPONENTS, values.shape[0] - 1, values.shape[1] - 1)
    if n_components < 2:
        return None
    pca = PCA(n_components, svd_solver="arpack", random_state=_random_state(seed))
    found = np.asarray(pca.fit_transform(values))
    has_spread = pca.explained_variance_ > 1e-9 * max(float(pca.explained_variance_[0]), 1e-300)
    if not np.isfinite(found).all() or has_spread.sum() < 2:
        return None
    return np.ascontiguousarray(found[:, has_spread], np.float32)


def _umap(components: Float32s, seed: int) -> Float32s | str | None:
    """(n_rows, 2) coordinates; None without the package, a text where there are too few rows."""
    try:
        version("umap-learn")
    except PackageNotFoundError:
        return None
    if len(components) < 4:
        return f"it takes four rows; found {len(components)}"
    import warnings

    import umap

    n_neighbours = min(_NEIGHBOURS, len(components) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread
        init = "spectral" if len(components) > 10 else "random"  # of so few points no spectrum can be had
        model = umap.UMAP(n_neighbors=n_neighbours, random_state=_random_state(seed), init=init)
        return np.ascontiguousarray(model.fit_transform(components), np.float32)


def _random_state(seed: int) -> np.random.RandomState:
    """As both libraries take it, for a seed of any size."""
    return np.random.RandomState(np.random.SeedSequence(seed).generate_state(8))


def _write(table: Any, out: Path) -> None:
    """Atomically."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with plain_anndata():
            table.write_h5ad(partial, compression="gzip")
        sync_file(partial)
        partial.replace(out)
        sync_folder(out.parent)
    finally:
        partial.unlink(missing_ok=True)
