"""Time and memory of a baseline, said before it is made: counted operations over the measured speed of this machine."""

import time

import torch

_SIDE = 1024  # of the products that are timed
_EIGEN = 20  # eigenvectors of (D, D): about so many D^3 operations


def speed(device: str) -> float:
    """Floating-point operations per second of products of matrices on this device, measured in some 0.1 s."""
    side = torch.rand(_SIDE, _SIDE, device=device)
    _ = float((side @ side)[0, 0])  # the first product also starts threads
    began = time.perf_counter()
    for _ in range(3):
        product = side @ side
    _ = float(product[0, 0])
    return 3 * 2 * _SIDE**3 / (time.perf_counter() - began)


def operations(kind: str, *, n_tokens: int, width: int, n_latents: int, n_directions: int, iterations: int) -> float:
    """Operations of a fit, at most; NaN for what is trained, whose time its own first steps tell."""
    fits = {
        "random": 0.0,
        "tokens": 0.0,
        "neurons": 0.0,
        "pca": 2.0 * n_tokens * width**2 + _EIGEN * width**3,
        "ica": iterations * 8.0 * n_tokens * width * n_directions,
        "nmf": iterations * n_tokens * n_directions * (8.0 * width + 4.0 * n_directions),
        "kmeans": 2.0 * n_tokens * width * n_latents,
    }
    return fits.get(kind, float("nan"))


def memory(kind: str, *, n_tokens: int, width: int, n_latents: int, n_directions: int) -> float:
    """Bytes of a fit, about: the sample and its copies, the weights, a dense micro-batch."""
    sample = 4.0 * width * n_tokens
    # the sample, about its centre, and: whitened; both halves, one of them for a moment twice, and the codes
    copies = {"ica": 3.0 + n_directions / width, "nmf": 6.0 + n_directions / width}.get(kind, 1.5)
    if kind == "kmeans":
        sample = 4.0 * width * max(n_latents, min(n_tokens, 65_536))
    return copies * sample + 16.0 * n_latents * width + 3 * (128 << 20)
