"""Does `--background first-component` leave out the patch tokens that masks call background, and no others?

Truth: masks of the same images (`--masks`, as `cyto concept masks` takes them); without them, masks by colour, which
are made here: the darkest channel of each pixel, smoothed, as a share of its 95% quantile in the image, which is the
light of the ground; Otsu's threshold of all images parts nuclei from the rest, a second one of the rest parts matter
from ground. The labelled cell is the piece of matter that covers most of the middle third, with its holes. That stands
in for masks by hand: it knows pixels and no tokens, and takes neighbours that touch for a part of the cell; look at
some of them (--keep-masks) before you believe it. A patch is ground if at most a tenth of it is matter, matter if at
least nine tenths are, and otherwise it does not count.

In all and per label: `ground_left_out` (1 is best), `matter_left_out` and `cell_left_out` (0 is best; of the labelled
cell only), `left_out`, and `wrongly`, the share of what is left out that is no ground. Ratio: the mean of ground left
out and matter kept; target 0.95. Baseline: the same mean of the best single threshold on the distance from the middle.

Without --images, cells are drawn; without --cache, tokens are extracted (random-vit-tiny, which is untrained).
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import add_folder, arguments, emit, now, say, scratch
from PIL import Image
from scipy import ndimage

from cytocache import bridge
from cytocache.demo_cells import CELL_TYPES, draw_cell
from cytocache.masks import find_masks, read_all_shares
from cytocache.preprocess import Preprocess
from cytosae.training.background import find_background
from stores import ActivationStore
from stores.tables import column

_GROUND, _MATTER = 0.1, 0.9  # shares of a patch
_SMOOTH = 1 / 64  # of an image's side
_CLASSES = "0=ground,128=other matter,255=labelled cell"  # of masks by colour
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=1)
    add_folder(parser)
    parser.add_argument("--images", type=Path, help="folder of images (drawn cells)")
    parser.add_argument("--cache", type=Path, help="their activation cache (extracted)")
    parser.add_argument("--masks", type=Path, help="their masks, 0 for background (made by colour)")
    parser.add_argument("--keep-masks", type=Path, help="a new folder for the masks by colour (not kept)")
    parser.add_argument("--cells", type=int, default=200, help="drawn cells (%(default)s)")
    options = parser.parse_args()
    with scratch(options.folder) as folder:
        images = options.images or _drawn(folder / "cells", options.cells)
        store = ActivationStore(options.cache or _extracted(images, folder / "cells.acts.zarr"))
        masks = options.masks or _masks_by_colour(
            images, [str(path) for path in column(store.images, "path")], options.keep_masks or folder / "masks"
        )
        rows, matter_NP, cell_NP = _patches(store, masks, "any" if options.masks else _CLASSES)
        labels = np.array([str(label) for label in column(store.images, "label")])[rows]
        began = now()
        found = find_background([store])
        seconds = (now() - began).seconds
        left_out_NP = ~found.keep[0][rows, store.spec.layout.first_patch :]
    by_label = {"all": judge(left_out_NP, matter_NP, cell_NP)}
    by_label |= {
        label: judge(left_out_NP[labels == label], matter_NP[labels == label], cell_NP[labels == label])
        for label in sorted(set(labels))
    }
    for label, figures in by_label.items():
        say(f"{label}: {figures}")
    emit(
        "background",
        ratio=by_label["all"]["right"],
        target=0.95,
        ours={"rate": found.n_patches / seconds, "unit": "patches/s", "seconds": seconds},
        baseline={"rate": _by_distance(matter_NP), "unit": "right", "seconds": 0.0, "what": "distance from the middle"},
        rule={name: value for name, value in found.to_spec().items() if name != "sha256"},
        by_label=by_label,
        params={name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    )


def judge(left_out_NP: Bools, matter_NP: Floats, cell_NP: Floats) -> dict[str, float]:
    """The shares that the head of this file names; of patches by the share of each that is matter, labelled cell."""
    is_ground, is_matter, is_cell = matter_NP <= _GROUND, matter_NP >= _MATTER, cell_NP >= _MATTER
    ground, matter = _share(left_out_NP[is_ground]), _share(left_out_NP[is_matter])
    return {
        "right": (ground + 1 - matter) / 2,
        "ground_left_out": ground,
        "matter_left_out": matter,
        "cell_left_out": _share(left_out_NP[is_cell]),
        "wrongly": _share(~is_ground[left_out_NP]),
        "left_out": _share(left_out_NP),
        "ground": _share(is_ground),
        "matter": _share(is_matter),
        "n_images": len(left_out_NP),
    }


def _share(values: Bools) -> float:
    return float(values.mean()) if values.size else 0.0


def _by_distance(matter_NP: Floats) -> float:
    """How much is right at best, if patches that are farther from the middle than some distance are left out."""
    side = round(matter_NP.shape[1] ** 0.5)
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    far_P = np.hypot(rows, columns).ravel()
    cuts = [np.broadcast_to(far_P > cut, matter_NP.shape) for cut in np.unique(far_P)]
    return max(judge(left_out, matter_NP, matter_NP)["right"] for left_out in cuts)


def _patches(store: ActivationStore, masks: Path, classes: str) -> tuple[list[int], Floats, Floats]:
    """(rows of the images with a mask; shares (N, patches) that are matter; that are the labelled cell)."""
    preprocess = Preprocess.seen_in(store.spec.transform)
    files, side = find_masks(masks, store.images), store.spec.layout.side
    read = read_all_shares(files, store.readable(), side, classes, preprocess=preprocess)
    names, rows = [one.name for one in read.classes], sorted(read.shares)
    shares_NCP = np.stack([read.shares[row].reshape(len(names), -1) for row in rows]).astype(np.float64)
    matter_NP = shares_NCP[:, [name != "ground" for name in names]].sum(1)
    cell = [name not in ("ground", "other matter") for name in names]
    return rows, matter_NP, shares_NCP[:, cell].sum(1)


def _masks_by_colour(images: Path, paths: list[str], folder: Path) -> Path:
    """A folder of masks named like the images: 0 ground, 128 matter, 255 the labelled cell."""
    darkest = {path: _darkest(images / path) for path in paths}
    sample = np.concatenate([values[::4, ::4].ravel() for values in darkest.values()])
    threshold = _otsu(sample[sample > _otsu(sample)])
    for path, values in darkest.items():
        mask = np.where(values < threshold, 128, 0).astype(np.uint8)
        side = min(mask.shape)
        mask[_labelled_cell(mask > 0, side // 3)] = 255
        place = (folder / path).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(place)
    return folder


def _otsu(values: Floats) -> float:
    """The edge of 256 equal bins with the largest variance between the two sides (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres, n_low = (edges[:-1] + edges[1:]) / 2, np.cumsum(counts)[:-1]
    sums, n_high = np.cumsum(counts * centres), counts.sum() - n_low
    between = n_low * n_high * (sums[:-1] / np.maximum(1, n_low) - (sums[-1] - sums[:-1]) / np.maximum(1, n_high)) ** 2
    return float(edges[1 + int(between.argmax())])


def _darkest(path: Path) -> Floats:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), np.float64).min(2)
    smooth = ndimage.gaussian_filter(pixels, _SMOOTH * min(pixels.shape))
    return np.asarray(smooth / max(1.0, np.quantile(smooth, 0.95)), np.float64)


def _labelled_cell(matter: Bools, margin: int) -> Bools:
    """The connected piece that covers most of the middle, with its holes; nothing where the middle is ground."""
    pieces, n_pieces = ndimage.label(matter)
    middle = pieces[margin:-margin, margin:-margin] if margin else pieces
    counts = np.bincount(middle.ravel(), minlength=n_pieces + 1)
    counts[0] = 0
    if not counts.any():
        return np.zeros_like(matter)
    return np.asarray(ndimage.binary_fill_holes(pieces == counts.argmax()), bool)


def _drawn(folder: Path, n_cells: int) -> Path:
    for number in range(n_cells):
        label = CELL_TYPES[number % len(CELL_TYPES)]
        place = folder / label / f"{number:05}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_cell(label, np.random.default_rng(number))).save(place)
    return folder


def _extracted(images: Path, out: Path) -> Path:
    found: Any = bridge.open_images(images, root=None)
    bridge.extract(found, out, {"backbone": "random-vit-tiny"})
    return out


if __name__ == "__main__":
    main()
