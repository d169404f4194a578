"""What the stages of a run will cost: seconds and bytes, from a first look at the images and a short measurement.

Rough on purpose: a plan says minutes or hours, and whether the disk will do.
"""

import time
from dataclasses import dataclass

import numpy as np

from cytosae.stage_one import FirstLook

from .cohort import CohortFacts
from .recipe import Recipe
from .stages import (
    ATLAS,
    BARCODES,
    CACHE,
    COMPARE,
    CONCEPTS,
    LATENTS,
    PROBE,
    SAE_FOLDER,
    SECOND_SAE,
    SELECTION,
    STABILITY,
    Stage,
)

_SECONDS, _LEAST = 0.15, 7  # of the measurement, about, and its least number of products
_TRAIN_PRODUCTS, _ENCODE_PRODUCTS = 6.0, 1.6  # products of (tokens, width) x (width, latents) that a token costs
_BYTES_PER_VALUE = 2.6  # of a stored latent
_ENTRY_BYTES = 30  # of a latent of an image, in all barcodes of it
_START = 3.0  # seconds until the workers of a cluster are ready


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one stage, about."""

    seconds: float
    n_bytes: float
    is_open: bool = False  # it ends when it has settled: what it takes may be more, and is not known before


def products_per_second(look: FirstLook, n_latents: int, *, device: str) -> float:
    """Tokens a second through one product with the encoder's matrix, on this machine.

    By the median of some products: where other programs compute, a single one may take a hundred times as long.
    """
    import torch

    tokens = torch.from_numpy(look.tokens.reshape(-1, look.width)[:512]).to(device).float()
    weights = torch.zeros(look.width, min(n_latents, 8192), device=device)
    share = n_latents / weights.shape[1]
    tokens @ weights  # warm
    seconds: list[float] = []
    while sum(seconds) < _SECONDS or len(seconds) < _LEAST:
        began = time.perf_counter()
        float((tokens @ weights).sum())  # a GPU is done then
        seconds.append(time.perf_counter() - began)
    return len(tokens) / float(np.median(seconds)) / share


def stage_cost(
    stage: Stage, recipe: Recipe, facts: CohortFacts, look: FirstLook, n_latents: int, rate: float | None
) -> Cost:
    """What a stage costs, about.

    rate : as of `products_per_second`; None: nothing that needs it is to be done
    """
    n_images, per_image = facts.n_images, look.tokens_per_image
    n_tokens = n_images * per_image
    l0 = _l0(recipe)
    rate = rate or 1e6
    entries = n_images * min(n_latents, 12 * l0)
    kind = stage.out if stage.out == SELECTION else stage.out.split("/")[0]  # of two comparisons both are "compare"
    chunk = int(recipe.extract.get("chunk_images") or 256)
    n_padded = -(-n_images // chunk) * min(chunk, n_images) if n_images > chunk else n_images
    costs = {
        CACHE: (
            look.seconds_to_start + n_images * look.seconds_per_image,
            2.0 * n_padded * per_image * look.width,
        ),
        SAE_FOLDER: (_training_seconds(recipe, n_tokens, rate), 8.0 * n_latents * look.width),
        SECOND_SAE: (_training_seconds(recipe, n_tokens, rate), 8.0 * n_latents * look.width),
        LATENTS: (1 + _ENCODE_PRODUCTS * n_tokens / rate, _BYTES_PER_VALUE * l0 * n_tokens),
        BARCODES: (_START + 4e-7 * l0 * n_tokens, _ENTRY_BYTES * entries),
        CONCEPTS: (_START + 4e-7 * l0 * n_tokens + 2e-4 * n_latents, 300.0 * n_latents * len(facts.datasets)),
        SELECTION: (1.0, 1e4),
        COMPARE: (2 + 5e-7 * n_latents * max(20, facts.n_patients) * 30, 200.0 * n_latents),
        PROBE: (10.0 if stage.name == "probe disease" else 5 + 0.02 * min(n_images, 1000), 2e6),
        STABILITY: (2 + n_latents**2 * look.width * 4 / 1e11, 100.0 * n_latents),
        ATLAS: (3 + 0.012 * min(n_images, 3000), 3e6 + 2.5e4 * min(n_images, 3000)),
    }
    seconds, n_bytes = costs[kind]
    is_open = kind in (SAE_FOLDER, SECOND_SAE) and not recipe.uses_sae and recipe.train_config.tokens == "auto"
    return Cost(seconds=seconds, n_bytes=n_bytes, is_open=is_open)


def _training_seconds(recipe: Recipe, n_tokens: int, rate: float) -> float:
    if recipe.uses_sae:
        return 2.0
    from cytosae.training import foreseen_steps  # torch

    config = recipe.train_config
    n_steps = config.n_steps(n_tokens)
    if config.tokens == "auto":
        n_steps = foreseen_steps([], config, 0.0, 0, n_steps)
    return 3 + _TRAIN_PRODUCTS * n_steps * config.batch_tokens / rate


def _l0(recipe: Recipe) -> float:
    """Active latents of a token, as far as the recipe says."""
    wanted = recipe.sae.get("k") or recipe.sae.get("target_l0")
    return float(wanted) if isinstance(wanted, int | float) else 32.0


def n_latents_of(recipe: Recipe, width: int) -> int:
    """Latents of the SAE that will be trained."""
    expansion = recipe.sae.get("expansion", 8)
    return int(expansion) * width if isinstance(expansion, int | np.integer) else 8 * width
