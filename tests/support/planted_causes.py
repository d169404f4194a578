"""A backbone whose later blocks are written down here, and a cache and an SAE in front of it, for test_ablate.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sparse_tokens import write_sae
from token_caches import write_cache

from cytosae.sae import SparseAutoencoder, load_sae

N_IMAGES, PER_IMAGE, WIDTH, N_LATENTS = 40, 10, 24, 160
PLANTED = 17  # the latent that the later blocks listen to


@dataclass(frozen=True)
class Rest:
    """Stage one, as far as an ablation asks it: the later blocks, and how many edits they were asked for."""

    gain: torch.Tensor  # (D, D)
    n_rows: list[int]

    def final_cls(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, T, D) -> (n, D): what all tokens say, bent."""
        self.n_rows.append(len(tokens))
        return torch.tanh(0.1 * tokens.mean(1) @ self.gain) * 10 + tokens[:, 0]

    def backbone_rest(self, *args: Any, **settings: Any) -> tuple[Callable[..., Any], None]:
        """As `cytocache.bridge.backbone_rest`, without images."""
        return self.final_cls, None


def planted_rest(run: Path, strength: float) -> Any:
    """A `Rest` that hears the direction of `PLANTED` this much louder than any other one."""
    direction = load_sae(run, device="cpu").model.W_dec[PLANTED]
    gain = torch.eye(WIDTH) + strength * torch.outer(direction, direction)
    return Rest(gain, [])


def rare_latents(model: SparseAutoencoder) -> None:
    """Each latent is active at 1.5% to 4% of the tokens, `PLANTED` at 2.5%; the last one never."""
    tokens = torch.from_numpy(_tokens().astype(np.float32)).reshape(-1, WIDTH)
    shares = 0.96 + 0.025 * torch.rand(model.n_latents, generator=torch.Generator().manual_seed(3))
    shares[PLANTED] = 0.975
    hears = (tokens - model.b_dec) @ model.W_enc
    model.b_enc.copy_(torch.stack([-hears[:, n].quantile(share) for n, share in enumerate(shares)]))
    model.b_enc[-1] = -1e3


def _tokens() -> npt.NDArray[np.float16]:
    return np.random.default_rng(1).normal(0.5, 1, (N_IMAGES, PER_IMAGE, WIDTH)).astype(np.float16)


def write_planted(root: Path, *, unreadable: tuple[int, ...] = (4,), activation: str = "relu") -> None:
    """acts.zarr: 40 images of 8 patients of different size and of nobody; run: an SAE of 160 latents."""
    patients: list[str | None] = [None if n % 13 == 12 else f"P{min(n % 11, 7)}" for n in range(N_IMAGES)]
    write_cache(root / "acts.zarr", _tokens(), unreadable=unreadable, chunk_images=6, patients=patients)
    write_sae(root / "run", root / "acts.zarr", n_latents=N_LATENTS, activation=activation, change=rare_latents)


def dense_latents(run: Path, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(n, T, L) float64 from the definition of a relu SAE."""
    model = load_sae(run, device="cpu").model
    w_enc, b_enc, b_dec = (getattr(model, name).double().numpy() for name in ("W_enc", "b_enc", "b_dec"))
    found: npt.NDArray[np.float64] = np.maximum((tokens.astype(np.float64) - b_dec) @ w_enc + b_enc, 0)
    return found


def rows_of(table: Any, **where: Any) -> Iterator[dict[str, Any]]:
    """The rows of a table with these values."""
    for row in table.to_pylist():
        if all(row[name] == value for name, value in where.items()):
            yield row
