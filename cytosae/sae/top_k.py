"""The k largest values of each token, in place: compiled on the CPU, torch elsewhere. Twin: support/reference.py."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

_CHUNK = 16  # values that are compared together: most chunks have none of the k largest


def keep_top_k_(values_BL: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the k largest values of each row to 0, in place, and return the matrix.

    Of equal values the first ones are kept (on the CPU). NaN counts as the largest.
    """
    if k >= values_BL.shape[1]:
        return values_BL
    if values_BL.device.type == "cpu" and values_BL.dtype.itemsize > 2:
        use_kernels_with_torch_threads()
        _keep_top_k(values_BL.detach().numpy(), k)
        return values_BL
    top_BK, at_BK = values_BL.topk(k, dim=1, sorted=False)
    return values_BL.zero_().scatter_(1, at_BK, top_BK)


def use_kernels_with_torch_threads() -> None:
    """Let numba's kernels use as many threads as torch does; torch's own number stays the same."""
    n_threads = torch.get_num_threads()
    use_threads(n_threads)
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)


def use_threads(n_threads: int) -> None:
    """Set the number of threads of numba's kernels. The first call may change torch's number: both use OpenMP."""
    numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # set at import


@numba.njit(cache=True, inline="always")
def replace_least(heap: Any, value: Any) -> None:
    """Put a value into a heap (smallest first) instead of its smallest: so kernels keep the largest values so far."""
    at = 0
    while 2 * at + 1 < len(heap):
        child = 2 * at + 1
        if child + 1 < len(heap) and heap[child + 1] < heap[child]:
            child += 1
        if value <= heap[child]:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@numba.njit(parallel=True, cache=True)
def _keep_top_k(values: npt.NDArray[Any], k: int) -> None:
    for b in numba.prange(values.shape[0]):
        row = values[b]
        heap = np.zeros(k, values.dtype)  # the k largest so far, the smallest first
        for first in range(0, len(row), _CHUNK):
            stop = min(first + _CHUNK, len(row))
            bound = heap[0]
            n = 0
            for latent in range(first, stop):
                n += not row[latent] <= bound
            if n == 0:
                continue
            for latent in range(first, stop):
                if not row[latent] <= heap[0]:
                    replace_least(heap, row[latent])
        least = heap[0]
        n_equal = k
        for at in range(k):
            n_equal -= heap[at] > least
        for latent in range(len(row)):
            if row[latent] == least and n_equal > 0:
                n_equal -= 1
            elif row[latent] <= least:
                row[latent] = 0
