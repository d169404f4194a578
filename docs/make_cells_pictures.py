"""Writes docs/img/cell-<label>.jpg, the pictures of the first page, from the folder of `cyto demo`.

For each latent that is named: the image in which it is most active, and below it the map of where. Which latents are
easy to see changes with the versions of the packages, so they are chosen by eye:

    python docs/make_cells_pictures.py cyto-demo 467 115 19 303 345 226
"""

import sys
from pathlib import Path

import anndata
import numpy as np
from PIL import Image

from cytosae.maps import blended, patch_map, read_tokens
from stores import LatentStore

_SIDE = 224  # pixels, of an image and of its map


def cell_above_map(run: Path, latent: int) -> tuple[str, Image.Image]:
    """Label and picture, 224 x 448, of the strongest image of a latent; the map is on its own scale."""
    latents = LatentStore(run / "cells.latents.zarr")
    images = anndata.read_zarr(run / "cells.barcodes" / "image.zarr")
    index = int(np.argmax(images.layers["mean"][:, [latent]].toarray()))
    with Image.open(run / str(latents.images["path"][index])) as file:
        cell = file.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    patches = patch_map(read_tokens(latents, index), latent, latents.layout)
    picture = Image.new("RGB", (_SIDE, 2 * _SIDE))
    picture.paste(cell, (0, 0))
    picture.paste(Image.fromarray(blended(np.asarray(cell), patches, float(patches.max()))), (0, _SIDE))
    return str(images.obs["label"].iloc[index]), picture


if __name__ == "__main__":
    for number in sys.argv[2:]:
        label, picture = cell_above_map(Path(sys.argv[1]), int(number))
        picture.save(Path(__file__).parent / "img" / f"cell-{label}.jpg", quality=88)
