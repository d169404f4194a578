"""The settings of an ablation."""

import math
from dataclasses import dataclass
from typing import Any

from stores.errors import BadInput
from stores.spec import check_choice
from stores.token_sets import TOKEN_SETS

ENOUGH_CONTROLS = 100  # with fewer, no p-value can be below 1 in 100


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Which latents are changed, how, at which tokens, and against what.

    Attributes
    ----------
    latents : the chosen latents, each once
    mode : what a latent's value z becomes. zero: 0; mean: its mean over all chosen tokens; scale:K: K z, K a number
    token_set : the tokens that are edited: all, patch, cls or register; "": those that the SAE was trained on
    n_images : images of each latent, drawn among those in which it is active
    n_controls : latents of the nearest frequency and norm that are changed in the same way
    n_directions : random directions that are added to the same tokens with the same norms
    curve : how many latents together are removed, or alone are kept; () for no curves
    curve_images : images of the curves; 0: no curves
    sample : images that are looked at for frequencies and active images, drawn round the patients; 0: all
    target : a column of the image table, such as label: a probe of the final CLS embedding is fitted to it; "": none
    probe_images : images that it is fitted to, drawn round the patients
    seed : of all draws

    Raises
    ------
    BadInput
        If no latent is given or one twice, or a setting has a value that it cannot have.
    """

    latents: tuple[int, ...]
    mode: str = "zero"
    token_set: str = ""
    n_images: int = 32
    n_controls: int = 100
    n_directions: int = 100
    curve: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    curve_images: int = 32
    sample: int = 0
    target: str = ""
    probe_images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latents", "curve"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.latents:
            raise BadInput("no latent to change; give its number: --latent N, once or several times")
        twice = sorted({latent for latent in self.latents if self.latents.count(latent) > 1})
        if twice:
            raise BadInput(f"latent {twice[0]:,} is given twice; give each --latent once")
        self.new_value(1.0, 0.0)  # raises for an unknown mode
        if self.token_set:
            check_choice("token_set", self.token_set, TOKEN_SETS)
        least = {
            "n_images": 1,
            "n_controls": 1,
            "n_directions": 0,
            "curve_images": 0,
            "sample": 0,
            "seed": 0,
            "probe_images": 1,
        }
        for name, number in least.items():
            if getattr(self, name) < number:
                raise BadInput(f"{name} must be at least {number}; found {getattr(self, name)}")
        if list(self.curve) != sorted({*self.curve}) or any(k < 1 for k in self.curve):
            raise BadInput(f"curve must be rising numbers of at least 1; found {', '.join(map(str, self.curve))}")

    @property
    def factor(self) -> float:
        """What a value is multiplied by: 0 for zero and mean, K for scale:K."""
        kind, _, number = self.mode.partition(":")
        if kind == "scale":
            try:
                factor = float(number)
            except ValueError:
                factor = math.nan
            if math.isfinite(factor):
                return factor
        if self.mode not in ("zero", "mean"):
            raise BadInput(f"mode must be zero, mean or scale:K with a number K, such as scale:2; found {self.mode!r}")
        return 0.0

    def new_value(self, value: Any, mean: float) -> Any:
        """What becomes of a value of a latent that has this mean, or of an array of values."""
        factor = self.factor
        return mean if self.mode == "mean" else factor * value
