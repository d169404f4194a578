"""Is a latent's map in one piece? Moran's I of its activations on the grid of patches.

Positive where neighbours are alike, -1 / (patches - 1) on average where the patches are shuffled, negative for a
chequerboard. Neighbours are the patches above, below, left and right, each pair counts once.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def morans_i(maps: Floats) -> Floats:
    """(n,) Moran's I of maps (side, side, n); NaN where all patches are equal."""
    side = maps.shape[0]
    z = maps - maps.mean((0, 1))
    products = (z[1:] * z[:-1]).sum((0, 1)) + (z[:, 1:] * z[:, :-1]).sum((0, 1))
    squares = (z**2).sum((0, 1))
    scale = (maps**2).sum((0, 1))
    varies = squares > 1e-12 * scale
    n_pairs = 2 * side * (side - 1)
    found: Floats = np.full(maps.shape[2], np.nan)
    found[varies] = side * side / max(1, n_pairs) * products[varies] / squares[varies]
    return found


def shuffled(maps: Floats, rng: np.random.Generator) -> Floats:
    """The same maps, their patches in one random order."""
    flat = maps.reshape(-1, maps.shape[2])
    return flat[rng.permutation(len(flat))].reshape(maps.shape)
