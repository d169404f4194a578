"""Latent stores of any size for the barcode benchmark: synthetic, but shaped like the released SAE's latents.

Per image a set of latents is drawn, each by the share of images in which it fires (about 1,853 of 49,152); within the
image each of them has its own share of tokens (log-normal), scaled to the wanted L0, and fires on at least one token.
So the tokens of an image are alike, as real ones are, and no image repeats: each is a function of (seed, its number).
Values are log-normal. numpy only, so that generating processes start quickly.
"""

import numpy as np
import numpy.typing as npt

Block = tuple[npt.NDArray[np.uint16 | np.uint32], npt.NDArray[np.float32], npt.NDArray[np.int64]]


def generate_block(
    first: int, last: int, *, frequency: npt.NDArray[np.float64], l0: float, tokens_per_image: int, seed: int
) -> Block:
    """(latent numbers, values, nonzeros per token) of the images first..last, token rows in order."""
    parts = [
        _generate_image(np.random.default_rng([seed, image]), frequency, l0, tokens_per_image)
        for image in range(first, last)
    ]
    indices, values, lengths = zip(*parts, strict=True)
    return np.concatenate(indices), np.concatenate(values), np.concatenate(lengths)


def _generate_image(rng: np.random.Generator, frequency: npt.NDArray[np.float64], l0: float, n_tokens: int) -> Block:
    latents = np.flatnonzero(rng.random(len(frequency), np.float32) < frequency)
    weight = np.exp(rng.standard_normal(len(latents), np.float32))
    l0 = max(0.0, l0 - len(latents) / n_tokens)  # the one token that each is sure of comes on top
    # the cap of one half takes some away from the strongest: what is left over is given to all
    share = np.minimum(l0 * weight / max(float(weight.sum()), 1e-9), 0.5)
    share = np.minimum(share * (l0 / max(float(share.sum()), 1e-9)), 0.9)
    threshold = (share * 65_536).astype(np.uint16)
    active = rng.integers(0, 65_536, (n_tokens, len(latents)), np.uint16) < threshold
    active[rng.integers(0, n_tokens, len(latents)), np.arange(len(latents))] = True
    lengths = active.sum(1, dtype=np.int64)
    kind = np.uint16 if len(frequency) <= 1 << 16 else np.uint32
    # boolean choice walks row by row, so the indices rise in every row
    indices = np.broadcast_to(latents.astype(kind), active.shape)[active]
    values = rng.standard_normal(len(indices), np.float32)
    values -= np.float32(1.6)
    return indices, np.exp(values, out=values), lengths
