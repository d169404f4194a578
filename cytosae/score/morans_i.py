"""Is a latent's map in one piece? Moran's I of its activations on the grid of patches.

Positive where neighbours are alike, -1 / (patches - 1) on average where the patches are shuffled, negative for a
chequerboard. Neighbours are the patches above, below, left and right, each pair counts once.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


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


def means_without(
    values: Floats, latents: Ints, block_of: Ints, n_latents: int, n_blocks: int, high: float
) -> tuple[Floats, Floats]:
    """Mean over latents of their mean over maps, and share of latents above `high`, without each block: (n_blocks,).

    Parameters
    ----------
    values : (n,) of the maps, without NaN
    latents, block_of : (n,) of which latent a map is, and in which block its image
    """
    sums, counts = np.bincount(latents, values, n_latents), np.bincount(latents, minlength=n_latents)
    mean = sums / np.maximum(1, counts)
    keys, which = np.unique(latents * n_blocks + block_of, return_inverse=True)
    latent, block = np.divmod(keys, n_blocks)
    left = counts[latent] - np.bincount(which)
    new = (sums[latent] - np.bincount(which, values)) / np.maximum(1, left)
    is_left = left > 0
    n_known = (counts > 0).sum() - np.bincount(block[~is_left], minlength=n_blocks)
    total = mean.sum() + np.bincount(block, np.where(is_left, new, 0) - mean[latent], n_blocks)
    above = (mean[counts > 0] > high).sum() + np.bincount(
        block, (is_left & (new > high)).astype(float) - (mean[latent] > high), n_blocks
    )
    some = np.where(n_known > 0, n_known, np.nan)
    return total / some, above / some


def shuffled(maps: Floats, rng: np.random.Generator) -> Floats:
    """The same maps, their patches in one random order."""
    flat = maps.reshape(-1, maps.shape[2])
    return flat[rng.permutation(len(flat))].reshape(maps.shape)
