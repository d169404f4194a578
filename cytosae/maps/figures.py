"""Figures of where latents are active: maps over an image, rows of reference images, agreement with masks.

The image is drawn in grey below the map. Colour and opacity of the map both increase with the activation, so the cell
is visible where the latent is inactive. An image that cannot be shown is an empty frame with the reason and its map.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as ss

from cytosae.plotting import COLORS, new_figure, plain, save_both, save_figure
from cytosae.stage_one import Picture
from stores.latent_store import LatentStore

from .mask_chance import LEVEL
from .patch_maps import Map, Pixels, patch_map, read_tokens, stretched
from .reference_images import Frame, FrameRow

if TYPE_CHECKING:
    import pyarrow as pa
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

RELEASED_DARK = 30 / 255  # brightness of patches at the minimum of a map (src/demo/core.py of the released code)
_OPACITY = 0.9  # of the map at its largest value
_EMPTY_SIDE = 224  # pixels, of the frame of an image that cannot be shown
_GAP = 0.04  # between a picture and its map, in widths of the picture


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a map is laid over its image."""

    is_smooth: bool = True  # bilinear between the centres of patches; else each patch is a square
    is_released: bool = False  # the released code's rendering: no scale, just dark and bright patches


def released_rendering(pixels: Pixels, patches: Map) -> Pixels:
    """The image with the patches that hold the map's minimum darkened to 30/255, all others at full brightness.

    Binary, as in the released code: activation values are not visible, and if all patches are active, the least active
    patch is drawn like an inactive one.
    """
    is_lit = (patches > patches.min()).astype(np.float32)
    brightness = np.where(stretched(is_lit, *pixels.shape[:2], is_smooth=False) > 0, 1, RELEASED_DARK)
    return (pixels * brightness[:, :, None]).astype(np.uint8)


def blended(pixels: Pixels, patches: Map, largest: float) -> Pixels:
    """The image in grey with the map in colour over it, pixel by pixel as the figures draw it.

    largest : the value that has the brightest colour
    """
    grey = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2) / 255 * 0.75 + 0.25
    values = stretched(patches, *pixels.shape[:2], is_smooth=True)
    colours = _heat()(np.clip(values / (largest or 1), 0, 1))
    opacity = colours[:, :, 3:]
    return np.asarray(np.round((colours[:, :, :3] * opacity + grey * (1 - opacity)) * 255), np.uint8)


def plot_maps(
    pixels: Pixels | str, frames: Sequence[Frame], path: Path, *, title: str, style: Style, patch: int | None = None
) -> None:
    """`path`.png and .svg: the image, then the map of each latent over it, with a colour scale in the latent's unit.

    patch : outlined everywhere, if given
    """
    columns = min(4, 1 + len(frames))
    n_rows = -(-(1 + len(frames)) // columns)
    figure, grid = new_figure(width=3.3 * columns, height=3.1 * n_rows + 0.4, rows=n_rows, columns=columns)
    all_axes = np.atleast_1d(grid).ravel()
    for axes in all_axes:
        axes.axis("off")
    _draw_picture(all_axes[0], pixels, left=0)
    all_axes[0].set_title("the image" if patch is None else f"the image, patch {patch}", fontsize=8)
    for axes, frame in zip(all_axes[1:], frames, strict=False):
        largest = float(frame.patches.max())
        _draw_map(axes, frame, largest, style, left=0)
        axes.set_title(plain(frame.caption), fontsize=8)
        if not style.is_released:
            _add_scale(figure, axes, largest, "activation", fraction=0.046)
    for axes in all_axes[: 1 + len(frames)]:
        _limit(axes, pixels, widths=1)
        if patch is not None:
            _outline(axes, pixels, patch, side=len(frames[0].patches) if frames else 16)
    figure.suptitle(plain(title), fontsize=9)
    save_both(figure, path)


def plot_rows(rows: Sequence[FrameRow], path: Path, *, title: str, style: Style) -> None:
    """`path`.png and .svg: rows of images, each with its map on the right, all on one colour scale."""
    save_both(_draw_rows(rows, title=title, style=style, in_shares=False), path)


def _draw_rows(rows: Sequence[FrameRow], *, title: str, style: Style, in_shares: bool) -> Any:
    """The figure. `in_shares`: colours show shares of the row's largest value, so each row has its own scale."""
    n_images = max([1, *(len(row.frames) for row in rows)])
    figure, grid = new_figure(
        width=2.2 * n_images + 1.8, height=1.25 * len(rows) + 0.7, rows=len(rows), columns=n_images
    )
    grid = np.asarray(grid, object).reshape(len(rows), n_images)
    for axes in grid.ravel():
        axes.axis("off")
    for of_row, row in zip(grid, rows, strict=True):
        for axes, frame in zip(of_row, row.frames, strict=False):
            _draw_picture(axes, frame.picture, left=0)
            _draw_map(axes, frame, row.largest, style, left=1 + _GAP)
            _limit(axes, frame.picture, widths=2 + _GAP)
            axes.set_title(plain(frame.caption), fontsize=6, pad=2)
        heading = "\n".join(plain(line) for line in row.heading)
        first = {"transform": of_row[0].transAxes, "ha": "right", "va": "center", "fontsize": 7}
        of_row[0].text(-0.06, 0.5, heading, **first)
    figure.suptitle(title, fontsize=9)
    if not style.is_released:
        largest, label = (
            (1.0, "share of the row's largest activation") if in_shares else (rows[0].largest, "activation")
        )
        _add_scale(figure, grid, largest, label, fraction=0.01)
    return figure


def plot_concepts(rows: Sequence[FrameRow], path: Path) -> None:
    """`path`: a row of images for each latent, each image with its map on the right, each row on its own scale."""
    title = "Reference images: the cells in which a latent is most active, and where in the cell"
    save_figure(_draw_rows(rows, title=title, style=Style(), in_shares=True), path)


def plot_reference_images(
    latents: LatentStore, images: "AnnData", chosen: dict[str, int], picture: Picture, path: Path, *, n_images: int = 6
) -> None:
    """The images in which each chosen latent is most active, each with its map beside it (patches only, no CLS).

    Ties go to the image that comes first; fewer images are shown where fewer are active.
    """
    mean = ss.csc_matrix(images.layers["mean"])
    rows = []
    for name, latent in chosen.items():
        column = mean[:, [latent]].tocoo()
        top = column.row[np.lexsort((column.row, -column.data))][:n_images]
        frames = [
            Frame(
                caption=str(images.obs["label"].iloc[index]),
                picture=picture(int(index)),
                patches=patch_map(read_tokens(latents, int(index)), latent, latents.layout),
            )
            for index in top
        ]
        largest = max((float(frame.patches.max()) for frame in frames), default=0.0)
        rows.append(FrameRow(heading=(f"latent {latent}", name), frames=frames, largest=largest))
    title = "Reference images: the cells in which a latent is most active, and where in the cell"
    save_figure(_draw_rows(rows, title=title, style=Style(), in_shares=True), path)


def plot_agreement(table: "pa.Table", said: dict[str, Any], path: Path, *, n_images: int, n_patches: int) -> None:
    """AUROC and IoU against the number of active patches; the best latents marked, with what each needs as a dash.

    said : of a class of masks, as in `MaskResult.classes`; n_images, n_patches : that have masks
    """
    figure, grid = new_figure(width=9, height=4, columns=2)
    known = table.filter(table["auroc"].is_valid())
    for axes, (name, label, best) in zip(
        grid[0],
        (
            ("auroc", "AUROC within images", said["best_by_auroc"]),
            ("iou", "IoU (threshold from the other half)", said["best_by_iou"]),
        ),
        strict=True,
    ):
        axes.set_xscale("log")
        sizes, values = known["n_active_patches"].to_numpy(), known[name].to_numpy()
        axes.scatter(sizes, values, s=5, color=COLORS[0], alpha=0.5, rasterized=True)
        at = [row["n_active_patches"] for row in best], [row[name] for row in best]
        axes.scatter(*at, s=22, facecolors="none", edgecolors=COLORS[5])
        words = ["circles: latents " + ", ".join(str(row["latent"]) for row in best)]
        needing = [row for row in best if row[f"{name}_needed"] is not None]
        if needing:
            at = [row["n_active_patches"] for row in needing], [row[f"{name}_needed"] for row in needing]
            axes.scatter(*at, s=60, marker="_", color="black", linewidth=1)
            words.append(f"dashes: what each needs for p {LEVEL:g} among all latents, against masks of other images")
        axes.set_title("\n".join(words), fontsize=7, loc="left")
        axes.set_xlabel("patches in which the latent is active", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
    figure.suptitle(
        f"{plain(said['name'])}: {known.num_rows:,} latents and the masks of {n_images:,} images "
        f"({said['n_patches'] / n_patches:.0%} of the patches)",
        fontsize=9,
    )
    save_both(figure, path)


def _draw_picture(axes: "Axes", picture: Pixels | str, *, left: float) -> None:
    """The picture in its own aspect, or an empty frame with the reason; `left` in widths."""
    height, width = _size(picture)
    extent = (left * width, (left + 1) * width, float(height), 0.0)
    if isinstance(picture, str):
        _draw_empty(axes, extent)
        words = textwrap.fill(plain(picture), 16)
        axes.text((left + 0.5) * width, height / 2, words, ha="center", va="center", fontsize=6, color="0.3")
    else:
        axes.imshow(picture, extent=extent)


def _draw_map(axes: "Axes", frame: Frame, largest: float, style: Style, *, left: float) -> None:
    height, width = _size(frame.picture)
    extent = (left * width, (left + 1) * width, float(height), 0.0)
    if isinstance(frame.picture, str):
        _draw_empty(axes, extent)
        pixels = np.full((height, width, 3), 255, np.uint8)
    else:
        pixels = frame.picture
    if style.is_released:
        axes.imshow(released_rendering(pixels, frame.patches), extent=extent)
        return
    grey = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2) / 255 * 0.75 + 0.25
    axes.imshow(grey, extent=extent)
    values = stretched(frame.patches, height, width, is_smooth=style.is_smooth)
    axes.imshow(values, extent=extent, cmap=_heat(), vmin=0, vmax=largest or 1, interpolation="nearest")


def _draw_empty(axes: "Axes", extent: tuple[float, float, float, float]) -> None:
    left, right, bottom, top = extent
    axes.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color="0.6", linewidth=0.6)


def _outline(axes: "Axes", picture: Pixels | str, patch: int, *, side: int) -> None:
    """The outline of a patch, black on white so that it is visible on any background."""
    height, width = _size(picture)
    top, left = (patch // side) * height / side, (patch % side) * width / side
    across, down = width / side, height / side
    x = [left, left + across, left + across, left, left]
    y = [top, top, top + down, top + down, top]
    for color, thickness in (("white", 2.4), ("black", 1.0)):
        axes.plot(x, y, color=color, linewidth=thickness)


def _limit(axes: "Axes", picture: Pixels | str, *, widths: float) -> None:
    height, width = _size(picture)
    axes.set_xlim(0, width * widths)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")


def _size(picture: Pixels | str) -> tuple[int, int]:
    return (_EMPTY_SIDE, _EMPTY_SIDE) if isinstance(picture, str) else (picture.shape[0], picture.shape[1])


def _add_scale(figure: Any, axes: Any, largest: float, label: str, *, fraction: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, largest or 1), cmap=_heat(on=0.8))
    bar = figure.colorbar(scale, ax=axes, fraction=fraction, pad=0.01)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6)


def _heat(on: float | None = None) -> "Colormap":
    """Colours from transparent to opaque; for a colour bar, blended with the grey `on`.

    Pages draw maps in the same colours by themselves: pipeline/page_pictures.py, atlas/static/maps.js.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    shares = np.linspace(0, 1, 256)
    colors, opacity = colormaps["inferno"](0.25 + 0.75 * shares), _OPACITY * shares
    if on is None:
        colors[:, 3] = opacity
    else:
        colors[:, :3] = colors[:, :3] * opacity[:, None] + on * (1 - opacity[:, None])
    return ListedColormap(colors)
