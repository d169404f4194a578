"""Pictures of barcodes and latents. They start from stores; the caller gives a function that fetches image pixels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss

from stores.latent_store import LatentStore

from .drawing import COLORS, MARKERS, new_figure, plain, save_figure, text_color

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

Picture = Callable[[int], npt.NDArray[np.uint8]]  # image_index -> (height, width, 3) RGB
_MOST_NAMED = 16  # values in a legend


def plot_patient_barcodes(patients: "AnnData", path: Path, *, n_latents: int = 60) -> None:
    """Patients (rows, by disease) against the latents whose barcode varies most between patients.

    Chosen, blind to the disease, by the standard deviation of the barcode's square root (which counts need, or the
    commonest latents would win); each latent is scaled to its own largest value; columns are ordered by the disease in
    which their mean is largest.
    """
    order = np.argsort(np.asarray(patients.obs["disease"]), kind="stable")
    diseases = np.asarray(patients.obs["disease"])[order]
    names = sorted(set(diseases))
    values = ss.csr_matrix(patients.X).toarray()[order]
    scaled = values / np.maximum(values.max(0), np.finfo(np.float32).tiny)
    chosen = np.argsort(-np.sqrt(values).std(0), kind="stable")[:n_latents]
    means = np.array([scaled[diseases == name][:, chosen].mean(0) for name in names])
    chosen = chosen[np.lexsort((-means.max(0), means.argmax(0)))]

    figure, axes = new_figure(width=3 + 0.16 * len(chosen), height=1.6 + 0.2 * len(order))
    image = axes.imshow(scaled[:, chosen], aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(chosen)), [str(latent) for latent in chosen], rotation=90, fontsize=6)
    labels = [
        f"{plain(name)}  {plain(patient)}" for name, patient in zip(diseases, patients.obs_names[order], strict=True)
    ]
    axes.set_yticks(range(len(order)), labels, fontsize=7)
    for tick, name in zip(axes.get_yticklabels(), diseases, strict=True):
        tick.set_color(text_color(names.index(name)))
    for edge in np.flatnonzero(diseases[1:] != diseases[:-1]):
        axes.axhline(edge + 0.5, color="white", linewidth=2)
    axes.set_xlabel(f"latent ({len(chosen)} of {patients.n_vars:,}: those that vary most between patients)")
    axes.set_title(f"Patient barcodes, tau {patients.uns['cyto']['tau']:g}", fontsize=10, loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("tokens above tau per image,\nrelative to the latent's largest", fontsize=7)
    save_figure(figure, path)


def characteristic_latents(images: "AnnData", *, group: str, min_images: int = 5) -> dict[str, int]:
    """For each value of the obs column `group`: the latent that sets its images apart most, to be looked at.

    Largest difference of the mean image activation, inside against outside, over their pooled standard deviation; only
    latents active in at least `min_images` images of the group. A choice for a picture, not a test.
    """
    values = ss.csr_matrix(images.layers["mean"]).toarray()
    labels = np.asarray(images.obs[group])
    chosen = {}
    for name in sorted(set(labels) - {""}):
        inside, outside = values[labels == name], values[labels != name]
        if len(inside) < 2 or len(outside) < 2:
            continue
        spread = np.sqrt((inside.var(0) + outside.var(0)) / 2) + 1e-9
        effect = (inside.mean(0) - outside.mean(0)) / spread
        effect[(inside > 0).sum(0) < min(min_images, len(inside))] = -np.inf
        if np.isfinite(effect.max()):
            chosen[str(name)] = int(effect.argmax())
    return chosen


def plot_reference_images(
    latents: LatentStore, images: "AnnData", chosen: dict[str, int], picture: Picture, path: Path, *, n_images: int = 6
) -> None:
    """The images in which each chosen latent is most active, each with its map beside it (16 x 16 patches, no CLS).

    Ties go to the image that comes first; fewer images are shown where fewer are active.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mean = ss.csc_matrix(images.layers["mean"])
    figure, grid = new_figure(
        width=1.1 * 2 * n_images + 1.2, height=1.2 * len(chosen) + 0.6, rows=len(chosen), columns=n_images
    )
    for row, (name, latent) in zip(np.atleast_2d(grid), chosen.items(), strict=True):
        column = mean[:, [latent]].tocoo()
        top = column.row[np.lexsort((column.row, -column.data))][:n_images]
        maps = [patch_map(latents, int(index), latent) for index in top]
        largest = max((float(patches.max()) for patches in maps), default=1.0) or 1.0
        for axes in row:
            axes.axis("off")
        for axes, index, patches in zip(row, top, maps, strict=False):
            _draw_pair(axes, picture(int(index)), patches / largest)
            axes.set_title(plain(images.obs["label"].iloc[index]), fontsize=6, pad=2)
        row[0].text(
            -0.06,
            0.5,
            f"latent {latent}\n{plain(name)}",
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=7,
        )
    figure.suptitle("Reference images: the cells in which a latent is most active, and where in the cell", fontsize=8)
    shares = ScalarMappable(Normalize(0, 1), cmap="inferno")
    figure.colorbar(shares, ax=grid, fraction=0.01, pad=0.01).set_label(
        "share of the row's largest activation", fontsize=7
    )
    save_figure(figure, path)


def plot_sweep(
    table: Sequence[dict[str, Any]], settings: Sequence[str], paths: Sequence[Path], *, x: str, y: str
) -> None:
    """Explained variance against L0, a point per row of a sweep's table: mean and standard deviation over seeds.

    One panel per setting that varies; all show the same points, each coloured (and shaped) by its own setting. Rows
    without a finished SAE are not shown, and counted below.
    """
    shown = [row for row in table if row[f"{x}_mean"] is not None and row[f"{y}_mean"] is not None]
    panels = list(settings) or [""]
    columns = min(3, len(panels))
    n_rows = -(-len(panels) // columns)
    figure, grid = new_figure(width=4.2 * columns, height=3.6 * n_rows + 0.5, rows=n_rows, columns=columns)
    all_axes = np.atleast_1d(grid).ravel()
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    spread = [row[f"{x}_mean"] for row in shown if row[f"{x}_mean"] > 0]
    for axes, setting in zip(all_axes, panels, strict=False):
        if len(spread) == len(shown) and spread and max(spread) > 10 * min(spread):
            _scale_by_log(axes)
        _draw_sweep(axes, shown, setting, x, y)
        axes.set_xlabel("L0: active latents per token", fontsize=8)
        axes.set_ylabel("explained variance", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.5)
    measured = "held-out images" if x.startswith("held_out_") else "last batch of training"
    missing = f"; not shown: {len(table) - len(shown)} without a finished SAE" if len(shown) < len(table) else ""
    figure.suptitle(f"{len(shown)} settings, mean and standard deviation over seeds ({measured}){missing}", fontsize=9)
    for path in paths:
        save_figure(figure, path)


def _draw_sweep(axes: "Axes", rows: Sequence[dict[str, Any]], setting: str, x: str, y: str) -> None:
    """One panel. Values have colours of their own as long as there are enough of them, then shades in their order."""
    values = list(dict.fromkeys(row[setting] for row in rows)) if setting else [None]
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    for number, value in enumerate(values):
        some = [row for row in rows if not setting or row[setting] == value]
        axes.errorbar(
            [row[f"{x}_mean"] for row in some],
            [row[f"{y}_mean"] for row in some],
            xerr=[row[f"{x}_sd"] or 0 for row in some],
            yerr=[row[f"{y}_sd"] or 0 for row in some],
            fmt=MARKERS[number % len(MARKERS)],
            color=COLORS[number] if len(values) <= len(COLORS) else _shade(number / (len(values) - 1)),
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.4,
            elinewidth=1,
            capsize=2,
            alpha=0.9,
            label=str(value) if number < _MOST_NAMED else None,
        )
    if setting and rows:
        unnamed = f" ({_MOST_NAMED} of {len(values)} named)" if len(values) > _MOST_NAMED else ""
        axes.set_title(f"{setting}{unnamed}", fontsize=9, loc="left")
        axes.legend(fontsize=7, frameon=False, ncols=1 if len(values) <= 8 else 2)


def _scale_by_log(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["cividis"](share)


def patch_map(latents: LatentStore, image_index: int, latent: int) -> npt.NDArray[np.float32]:
    """(16, 16) activation of a latent at the patches of an image, row by row from the top left; CLS is left out."""
    rows = latents.read_images(image_index, image_index + 1)
    tokens = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
    values = np.zeros(rows.n_rows, np.float32)
    is_latent = rows.indices == latent
    values[tokens[is_latent]] = rows.values[is_latent]
    side = round((rows.n_rows - 1) ** 0.5)
    return values[1:].reshape(side, side)


def _draw_pair(axes: "Axes", pixels: npt.NDArray[np.uint8], share: npt.NDArray[np.float32]) -> None:
    """The picture, and beside it the same picture in grey under the map: opacity follows magnitude."""
    height, width = pixels.shape[:2]
    grey = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2) / 255 * 0.6 + 0.4
    extent = (0.0, float(width), float(height), 0.0)
    beside = (width * 1.04, width * 2.04, float(height), 0.0)
    axes.imshow(pixels, extent=extent)
    axes.imshow(grey, extent=beside)
    axes.imshow(share, extent=beside, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(share, 0, 1) ** 0.5 * 0.9)
    axes.set_xlim(0, width * 2.04)
    axes.set_ylim(height, 0)
