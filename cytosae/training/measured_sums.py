"""Running sums over the tokens that an SAE is measured on: errors, L0, what is active, the tokens' own variance.

In float64, and int64 for what is counted; of dense latents, or of the active ones alone (measured_latents.py).
Shapes: N images and B tokens of a micro-batch, T chosen tokens of an image, D width, L latents.
"""

import math

import numpy as np
import torch

from cytosae.sae import Active, SparseAutoencoder
from stores.concept_store import MEANINGFUL
from stores.errors import BadInput

from .distributed import Ranks
from .losses import loss_weight
from .measured_latents import MeasuredLatents, image_totals


class MeasuredSums:
    """The sums of one pass, and the figures that follow from them.

    with_pca : also the products of channels, (D, D), for the variance that principal components explain
    """

    def __init__(
        self, model: SparseAutoencoder, *, loss: str, step: int, window_begins: int, with_pca: bool = False
    ) -> None:
        self.n_tokens = self.n_images = 0
        self.error = self.scaled_error = self.square = 0.0
        self.latents_per_image: list[int] = []
        device, n_latents = model.W_enc.device, model.n_latents
        self.l0_counts = torch.zeros(n_latents + 1, dtype=torch.int64, device=device)  # tokens by their L0
        self.n_images_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_tokens_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.fired_in_window = torch.zeros(n_latents, dtype=torch.bool, device=device)
        self._activation_L = torch.zeros(n_latents, dtype=torch.float64, device=device)  # summed over tokens
        # sums of x - first token: sums of x would cancel where the tokens vary little
        self._about_D = torch.zeros(0)
        self._shifted_D = torch.zeros(model.width, dtype=torch.float64, device=device)
        self._shifted_square = 0.0
        side = model.width if with_pca else 0
        self._shifted_DD = torch.zeros(side, side, dtype=torch.float64, device=device)
        self._model, self._loss, self._step, self._window_begins = model, loss, step, window_begins
        self._latents = MeasuredLatents(model)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token, so far."""
        return int(self.n_tokens_active.sum()) / max(1, self.n_tokens)

    def n_meaningful(self) -> int:
        """Latents whose mean activation (over the images in which they are active) is at least 10^-3."""
        per_image = self.n_tokens / max(1, self.n_images)
        mean_L = self._activation_L / (per_image * self.n_images_active.clamp_min(1))
        return int((mean_L >= MEANINGFUL).sum())

    @property
    def mean_D(self) -> torch.Tensor:
        """(D,) float64: the mean token."""
        return self._about_D + self._shifted_D / self.n_tokens

    @property
    def variance(self) -> float:
        """Sum of squared distances from the mean token."""
        return self._shifted_square - self._shifted_D.square().sum().item() / self.n_tokens

    def shifted(self) -> tuple[torch.Tensor, float]:
        """The sum of the tokens (D,), and of their squares, about the first token."""
        return self._shifted_D, self._shifted_square

    @property
    def explained_variance(self) -> float:
        """Share of the variance about the mean token; NaN if the tokens do not vary."""
        return explained_share(self.error, self.variance)

    @property
    def n_pca(self) -> int:
        """L0 as a number of components."""
        return min(round(self.l0), self._model.width)

    @property
    def pca_explained_variance(self) -> float:
        """The variance that the first `n_pca` components of the tokens explain; NaN if the tokens do not vary."""
        if not self.variance > 0:
            return math.nan
        about_mean_DD = self._shifted_DD - torch.outer(self._shifted_D, self._shifted_D) / self.n_tokens
        rising = torch.linalg.eigvalsh(about_mean_DD.cpu()).clamp_min(0)
        total = rising.sum().item()
        return rising[len(rising) - self.n_pca :].sum().item() / total if total > 0 else math.nan

    def add_other_ranks(self, ranks: Ranks) -> None:
        """Add the sums of the other ranks, on all of them; not those of the window and of each image."""
        if ranks.size == 1:
            return
        about = ranks.broadcast(self._about_D.double().cpu() if self.n_tokens else None)  # which all sums are moved to
        width, device = self._model.width, self._shifted_D.device
        about_D = torch.zeros(width, dtype=torch.float64, device=device) if about is None else about.to(device)
        if self.n_tokens:
            move_D = self._about_D.double() - about_D  # x - about = (x - own about) + move
            self._shifted_square += (2 * move_D @ self._shifted_D + self.n_tokens * move_D.square().sum()).item()
            self._shifted_D += self.n_tokens * move_D
        self._about_D = about_D
        names = ("n_tokens", "n_images", "error", "scaled_error", "square", "_shifted_square")
        numbers = torch.tensor([float(getattr(self, name)) for name in names], dtype=torch.float64, device=device)
        ranks.all_reduce_sum_(
            *(numbers, self._shifted_D, self._activation_L, self.n_images_active, self.n_tokens_active)
        )
        for name, value in zip(names, numbers.tolist(), strict=True):
            setattr(self, name, round(value) if name.startswith("n_") else value)

    def add(self, x_NTD: torch.Tensor) -> None:
        """Add whole images, (N, T, D) float32, `step` tokens of each at a time if it has more."""
        n_images, per_image, width = x_NTD.shape
        active_NL = torch.zeros(n_images, self._model.n_latents, device=x_NTD.device)
        for start in range(0, per_image, self._step):
            x_BD = x_NTD[:, start : start + self._step].reshape(-1, width)
            z = self._latents.of(x_BD)
            self._add_tokens(x_BD.double(), self._latents.decoded(z).double())
            active_NL += self._add_active(z, n_images) if isinstance(z, Active) else self._add_dense(z, n_images)
        self.n_tokens_active += active_NL.long().sum(0)
        fired_NL = active_NL > 0
        self.n_images_active += fired_NL.sum(0)
        self.latents_per_image += fired_NL.sum(1).tolist()
        self.fired_in_window |= fired_NL[max(0, self._window_begins - self.n_images) :].any(0)
        self.n_images += n_images

    def _add_dense(self, z_BL: torch.Tensor, n_images: int) -> torch.Tensor:
        """Add the latents of some images, as many tokens of each; returns (N, L): tokens on which each one is active.

        z_BL : is overwritten
        """
        self._activation_L += z_BL.view(n_images, -1, z_BL.shape[1]).sum(1).double().sum(0)
        z_BL.gt_(0)  # in place, 0 or 1: sums of such floats are exact, and ten times as fast as of booleans
        self.l0_counts += torch.bincount(z_BL.sum(1).long(), minlength=len(self.l0_counts))
        return z_BL.view(n_images, -1, z_BL.shape[1]).sum(1)

    def _add_active(self, z: Active, n_images: int) -> torch.Tensor:
        """The same, of active latents alone."""
        active_NL, total_NL = image_totals(z, n_images)
        self._activation_L += torch.from_numpy(total_NL.sum(0))
        per_token = np.bincount(z.tokens, minlength=z.n_tokens)
        self.l0_counts += torch.from_numpy(np.bincount(per_token, minlength=len(self.l0_counts)))
        return torch.from_numpy(active_NL)

    def _add_tokens(self, x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> None:
        error_B = (x_hat_BD - x_BD).square().sum(1)
        if not bool(torch.isfinite(error_B).all()):
            raise BadInput("a reconstruction became NaN or infinite: the SAE's weights do not fit these tokens")
        if not self.n_tokens:
            self._about_D = x_BD[0]
        square_B = x_BD.square().sum(1)
        scale_B = loss_weight(x_BD, self._loss)
        scale_B = scale_B.squeeze(1) if isinstance(scale_B, torch.Tensor) else scale_B
        shifted_BD = x_BD - self._about_D
        self.n_tokens += len(x_BD)
        self.error += error_B.sum().item()
        self.scaled_error += (error_B * scale_B).sum().item()
        self.square += square_B.sum().item()
        self._shifted_D += shifted_BD.sum(0)
        self._shifted_square += shifted_BD.square().sum().item()
        if len(self._shifted_DD):
            self._shifted_DD += shifted_BD.T @ shifted_BD


def explained_share(error: float, total: float) -> float:
    """1 - error / total; NaN where the total is not above zero."""
    return 1 - error / total if total > 0 else math.nan
