"""Measures the error that float16, and the precision of the forward pass, bring into a cache.

A sample of images is run through the backbone again in float32. Its tokens are compared with the cached ones: fraction
of variance unexplained (FVU), largest magnitude, and, with an SAE, how many latents are active in only one of the two.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from stores.activation_spec import ActivationSpec
from stores.activation_store import ActivationStore
from stores.devices import memory_told, resolve_device
from stores.errors import BadInput
from stores.machine import n_cores
from stores.progress import Progress
from stores.runlog import read_runs
from stores.spec import require_unchanged
from stores.token_layout import TokenLayout
from stores.wording import Report, page_html, page_lines, rate

from .sample import draw_sample, load_backbone_of, read_sample

# (tokens, width) float32 -> (tokens, n_latents) float32
Latents = Callable[[torch.Tensor], torch.Tensor]


class Sae(Protocol):
    """What is needed of an SAE; `cytosae.load_sae` gives one."""

    @property
    def model(self) -> Any:
        """`model.encode` gives the latents of (n, width) float32 tokens."""

    def require_tokens(self, spec: ActivationSpec, place: str, *, assume_compatible: bool = False) -> list[str]:
        """Refuse tokens of another kind than it was trained on; gives what had to be assumed."""


@dataclass(frozen=True, kw_only=True)
class Fidelity(Report):
    """Cached tokens against float32 ones, over a sample. Latent counts are 0 without an SAE.

    FVU: sum of squared differences / sum of squared distances from the mean token; NaN if the tokens do not vary.
    """

    n_images: int
    n_tokens: int
    fvu: float
    fvu_cls: float  # over CLS tokens alone; NaN if the backbone has none
    largest_magnitude: float  # of the float32 tokens; the largest float16 number is 65,504
    largest_difference: float
    n_active: int = 0  # (token, latent) pairs that are active in float32
    n_cross_zero: int = 0  # pairs that are active in one of the two only
    n_above_tau: int = 0
    n_cross_tau: int = 0  # pairs that exceed tau in one of the two only
    store: Path = Path()
    seed: int = 0  # of the sample
    tau: float = 0.2
    with_latents: bool = False  # latents were counted
    has_cls: bool = True
    assumed_equal: tuple[str, ...] | None = None  # what an imported SAE does not say of its tokens; None without an SAE

    def rows(self) -> dict[str, str]:
        """The named values of the page."""
        why_not = "it does not vary" if self.has_cls else "the backbone has none"
        fvu_cls = f"n/a ({why_not})" if math.isnan(self.fvu_cls) else f"{self.fvu_cls:.2e}"
        rows = {
            "sample": f"{self.n_images:,} images, {self.n_tokens:,} tokens (seed {self.seed})",
            "FVU": f"{self.fvu:.2e} of the float32 tokens' variance is lost; of CLS alone {fvu_cls}",
            "magnitude": f"largest {self.largest_magnitude:.4g}; largest difference {self.largest_difference:.3g}",
        }
        if self.with_latents:
            zero, tau = rate(self.n_cross_zero, self.n_active), rate(self.n_cross_tau, self.n_above_tau)
            rows["latents"] = f"{self.n_active:,} are active in float32; {self.n_cross_zero:,} cross zero ({zero})"
            rows["tau"] = f"{self.n_above_tau:,} exceed {self.tau:g}; {self.n_cross_tau:,} cross it ({tau})"
        return rows

    @property
    def _title(self) -> str:
        return f"{self.store}: cached float16 against float32"

    def lines(self) -> Iterator[str]:
        """The page of `cyto cache fidelity`."""
        yield from page_lines(self._title, self.rows())

    def _repr_html_(self) -> str:
        return page_html(self._title, self.rows())

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; null where one is not defined."""
        named = [
            name
            for name in vars(self)
            if name not in ("store", "seed", "tau", "with_latents", "has_cls", "assumed_equal")
        ]
        values = {name: getattr(self, name) for name in named}
        facts = {} if self.assumed_equal is None else {"assumed_equal": list(self.assumed_equal)}
        numbers = {name: None if math.isnan(value) else value for name, value in values.items()}
        return {"store": str(self.store), "tau": self.tau, **facts, **numbers}


@memory_told("End what else uses this memory, or give --device cpu")
def measure_fidelity(
    store: Path | str,
    *,
    sae: Sae | None = None,
    assume_compatible: bool = False,
    latents: Latents | None = None,
    tau: float = 0.2,
    root: Path | str | None = None,
    weights: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    n_images: int = 64,
    seed: int = 0,
    progress: Progress = lambda done, total, state: None,
    download_progress: Progress = lambda done, total, state: None,
) -> Fidelity:
    """Compare the cache at `store` with float32 tokens of `n_images` readable images, drawn with `seed`.

    Parameters
    ----------
    sae : counts the latents that cross zero or `tau`: `cytosae.load_sae(...)` on the same device. Its memory: the
        latents of one image in float32, twice
    assume_compatible : take an imported SAE, which does not say which tokens it was trained on
    latents : instead of `sae`, the function that encodes tokens
    root : folder of the images now; default: as recorded when the cache was written
    weights : the file of the trained backbone; an untrained one needs none
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    workers : processes that read images; default: one for each core

    Raises
    ------
    BadInput
        If no image of the sample can be read, or its file is not the one that was cached; if tau is no number of at
        least 0.
    SpecMismatch
        If the weights are not those of the cache, or the SAE was trained on other tokens.
    """
    if not (math.isfinite(tau) and tau >= 0):
        raise BadInput(f"tau must be a number of at least 0; found {tau!r}")
    store, device, assumed = Path(store), resolve_device(device), None
    cache = ActivationStore(store)
    if sae is not None:
        assumed = tuple(sae.require_tokens(cache.spec, f"the cache {store}", assume_compatible=assume_compatible))
        latents = sae.model.encode
    backbone = load_backbone_of(cache, weights=weights, device=device, progress=download_progress)
    rows = draw_sample(cache, n_images=n_images, seed=seed)
    root = Path(root or str((read_runs(store) or [{}])[-1].get("images_root", ".")))
    sample = read_sample(
        cache, rows, backbone, root=root, device=device, workers=workers or n_cores(), progress=progress
    )
    sums = _Sums(cache.spec.width, cache.spec.layout)
    for row, full in zip(rows, sample, strict=True):
        with torch.inference_mode():
            cached = cache.read_images([row])[0].astype(np.float32)
            sums.add(full.cpu().numpy(), cached)
            if latents is not None:
                sums.add_latents(latents(full), latents(torch.from_numpy(cached).to(device)), tau)
    require_unchanged(cache.header)
    return replace(
        sums.result(), store=store, seed=seed, tau=tau, with_latents=latents is not None, assumed_equal=assumed
    )


class _Sums:
    """Running sums in float64."""

    def __init__(self, width: int, layout: TokenLayout) -> None:
        self._cls = slice(layout.cls.start, layout.cls.stop)
        self._n_images = self._n_tokens = 0
        self._error, self._square = np.zeros(2), np.zeros(2)  # all tokens, CLS
        self._sum = np.zeros((2, width))
        self._magnitude = self._difference = 0.0
        self._counts = np.zeros(4, np.int64)

    def add(self, full: npt.NDArray[np.float32], cached: npt.NDArray[np.float32]) -> None:
        self._n_images += 1
        self._n_tokens += len(full)
        difference = full.astype(np.float64) - cached
        for which, rows in enumerate((slice(None), self._cls)):
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
            has_cls=self._cls.stop > 0,
            largest_magnitude=self._magnitude,
            largest_difference=self._difference,
            n_active=active,
            n_cross_zero=cross_zero,
            n_above_tau=above,
            n_cross_tau=cross_tau,
        )
