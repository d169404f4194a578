"""Pictures of a white cell with a nucleus, a red cell and a platelet, whose places are known."""

import numpy as np
import numpy.typing as npt

SIDE = 16  # patches
_PIXELS = 16 * SIDE  # of a picture's side
Pixels = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
GROUND, RED_CELL, PLATELET = (228, 224, 232), (215, 150, 150), (150, 110, 185)  # a dark platelet
CYTOPLASM, GRANULES, NUCLEUS = (190, 185, 222), (200, 110, 100), (90, 50, 150)


def blood(
    rng: np.random.Generator,
    *,
    has_nucleus: bool = True,
    zoom: float = 1.0,
    platelet: tuple[int, int, int] = PLATELET,
) -> tuple[Pixels, Bools, Bools]:
    """A white cell in the middle, half of its cytoplasm red granules; a red cell above it, a platelet below it.

    Returns the picture, which pixels are cells, and which the nucleus.

    has_nucleus : False: another platelet instead of the white cell
    zoom, platelet : size and color of the platelets
    """
    y, x = np.mgrid[:_PIXELS, :_PIXELS].astype(float)
    middle = rng.uniform(0.48, 0.56, 2) * _PIXELS
    from_middle, from_red = np.hypot(y - middle[0], x - middle[1]), np.hypot(y - 22, x - 128)
    is_platelet = np.hypot(y - 236, x - 128) < 10 * zoom
    central = from_middle < (68 if has_nucleus else 12 * zoom)
    nucleus = (from_middle < 42) & has_nucleus
    picture = np.full((_PIXELS, _PIXELS, 3), GROUND, float)
    picture[(from_red < 34) & (from_red > 12)] = RED_CELL
    picture[central] = CYTOPLASM if has_nucleus else platelet
    picture[central & (x < middle[1]) & has_nucleus] = GRANULES
    picture[nucleus] = NUCLEUS
    picture[is_platelet] = platelet
    picture += rng.normal(0, 2, picture.shape)
    return picture.clip(0, 255).astype(np.uint8), central | (from_red < 34) | is_platelet, nucleus


def of_patches(pixels: Bools) -> npt.NDArray[np.float64]:
    """(patches,) shares."""
    return np.asarray(pixels.reshape(SIDE, 16, SIDE, 16).mean(axis=(1, 3)).ravel())
