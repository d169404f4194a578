"""Which latents a chosen one is held against: those of the nearest frequency and the nearest norm.

A latent that is rare and small changes less than one that is frequent and large, whatever it stands for. Distance: in
log10 of the number of active images and of the norm (`Survey.norms`), each in units of its standard deviation over the
candidates. Candidates are active in at least one image and are not chosen themselves.
"""

import numpy as np

from stores.errors import BadInput

from .places import Ints
from .survey import Floats


def matched_latents(latent: int, chosen: Ints, n_images_active: Ints, norms: Floats, n: int, seed: int) -> Ints:
    """The `n` candidates nearest to `latent`, the nearest first; equal distances in a seeded order; fewer if there are.

    Parameters
    ----------
    n_images_active, norms : (L,) of all latents

    Raises
    ------
    BadInput
        If no latent is left to be held against.
    """
    candidates = np.flatnonzero((n_images_active > 0) & (norms > 0))
    candidates = candidates[~np.isin(candidates, chosen)]
    if not len(candidates):
        raise BadInput("every other latent is silent in these images: there is nothing to hold a latent against")
    about = np.zeros(len(candidates))
    for values in (n_images_active.astype(np.float64), norms):
        logs = np.log10(values[candidates])
        about += ((logs - np.log10(values[latent])) / (logs.std() or 1)) ** 2
    lot = np.random.default_rng([seed, latent]).permutation(len(candidates))
    return candidates[np.lexsort((lot, about))[:n]]
