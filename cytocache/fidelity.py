"""What did float16, and the precision of the forward pass, cost? A sample of images goes through the backbone again.

The float32 tokens of today are compared with the cached ones: the unexplained share of their variance, the largest
magnitude, and, given an SAE, how many latents are active on one side only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stores.activation_store import ActivationStore
from stores.progress import Progress
from stores.runlog import read_runs
from stores.spec import require_unchanged

from .sample import draw_sample, load_backbone_of, read_sample

# (tokens, width) float32 -> (tokens, n_latents) float32
Latents = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Cached tokens against float32 ones, over a sample. Latent counts are 0 without an SAE.

    FVU: sum of squared differences / sum of squared distances from the mean token; NaN if the tokens do not vary.
    """

    n_images: int
    n_tokens: int
    fvu: float
    fvu_cls: float  # over CLS tokens alone
    largest_magnitude: float  # of the float32 tokens; float16 ends at 65,504
    largest_difference: float
    n_active: int = 0  # (token, latent) pairs that are active in float32
    n_cross_zero: int = 0  # pairs that are active on one side only
    n_above_tau: int = 0
    n_cross_tau: int = 0  # pairs that exceed tau on one side only


def measure_fidelity(
    store: Path,
    *,
    root: Path | None = None,
    weights: str | None = None,
    device: str = "cpu",
    workers: int = 2,
    n_images: int = 64,
    seed: int = 0,
    latents: Latents | None = None,
    tau: float = 0.2,
    progress: Progress = lambda done, total, state: None,
    download_progress: Progress = lambda done, total, state: None,
) -> Fidelity:
    """Compare the cache at `store` with float32 tokens of `n_images` readable images, drawn with `seed`.

    Parameters
    ----------
    root : where the images lie now; default: where they lay when the cache was written
    weights : the file of the trained backbone; an untrained one needs none
    latents : encodes tokens under an SAE; its memory is 257 x n_latents float32, twice

    Raises
    ------
    BadInput
        If no image of the sample can be read, or its file is not the one that was cached.
    SpecMismatch
        If the weights are not those of the cache.
    """
    cache = ActivationStore(store)
    backbone = load_backbone_of(cache, weights=weights, device=device, progress=download_progress)
    rows = draw_sample(cache, n_images=n_images, seed=seed)
    root = root or Path(str((read_runs(store) or [{}])[-1].get("images_root", ".")))
    sample = read_sample(cache, rows, backbone, root=root, device=device, workers=workers, progress=progress)
    sums = _Sums(cache.spec.width)
    for row, full in zip(rows, sample, strict=True):
        with torch.inference_mode():
            cached = cache.read_images([row])[0].astype(np.float32)
            sums.add(full.cpu().numpy(), cached)
            if latents is not None:
                sums.add_latents(latents(full), latents(torch.from_numpy(cached).to(device)), tau)
    require_unchanged(cache.header)
    return sums.result()


class _Sums:
    """Running sums in float64."""

    def __init__(self, width: int) -> None:
        self._n_images = self._n_tokens = 0
        self._error, self._square = np.zeros(2), np.zeros(2)  # all tokens, CLS
        self._sum = np.zeros((2, width))
        self._magnitude = self._difference = 0.0
        self._counts = np.zeros(4, np.int64)

    def add(self, full: npt.NDArray[np.float32], cached: npt.NDArray[np.float32]) -> None:
        self._n_images += 1
        self._n_tokens += len(full)
        difference = full.astype(np.float64) - cached
        for which, rows in enumerate((slice(None), slice(0, 1))):
            self._error[which] += (difference[rows] ** 2).sum()
            self._square[which] += (full[rows].astype(np.float64) ** 2).sum()
            self._sum[which] += full[rows].sum(0, dtype=np.float64)
        self._magnitude = max(self._magnitude, float(np.abs(full).max()))
        self._difference = max(self._difference, float(np.abs(difference).max()))

    def add_latents(self, full: torch.Tensor, cached: torch.Tensor, tau: float) -> None:
        for which, threshold in enumerate((0.0, tau)):
            above = full > threshold
            self._counts[2 * which] += int(above.sum())
            self._counts[2 * which + 1] += int((above != (cached > threshold)).sum())

    def result(self) -> Fidelity:
        n = np.array([self._n_tokens, self._n_images])
        variance = self._square - (self._sum**2).sum(1) / n
        varies = variance > 1e-9 * self._square  # an untrained backbone's CLS is the same for every image
        fvu = np.divide(self._error, variance, out=np.full(2, np.nan), where=varies)
        active, cross_zero, above, cross_tau = (int(count) for count in self._counts)
        return Fidelity(
            n_images=self._n_images,
            n_tokens=self._n_tokens,
            fvu=float(fvu[0]),
            fvu_cls=float(fvu[1]),
            largest_magnitude=self._magnitude,
            largest_difference=self._difference,
            n_active=active,
            n_cross_zero=cross_zero,
            n_above_tau=above,
            n_cross_tau=cross_tau,
        )
