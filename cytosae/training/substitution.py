"""What the rest of the backbone makes of reconstructed tokens: the change of the final CLS embedding.

Shapes: T tokens of an image, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from cytosae.sae import SparseAutoencoder
from stores.errors import BadInput

from .measured_latents import MeasuredLatents
from .measured_sums import explained_share


@dataclass(frozen=True, kw_only=True)
class BackboneSample:
    """Some images at the transformer block of the cache, and the rest of the backbone from there.

    outputs : for each image the float32 output of the block, (tokens_per_image, D)
    final_cls : maps (n, tokens_per_image, D) at the block to the final CLS embeddings, (n, any width)
    seed : with which the images were drawn
    """

    outputs: Iterable[torch.Tensor]
    final_cls: Callable[[torch.Tensor], torch.Tensor]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """Distance of the final CLS embedding c' from the original one c: means over the images of a sample."""

    cosine: float  # c . c' / (||c|| ||c'||); NaN if any of them is a zero vector
    relative_l2: float  # ||c' - c|| / ||c||


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """Change of the final CLS embedding when the chosen tokens at the block are replaced and the others are not.

    A loss recovered is, for language models, (loss(zeros) - loss(reconstruction)) / (loss(zeros) - loss(untouched)):
    zero-ablation (Rajamanoharan et al. 2024, Gated SAEs; SAELens). A feature extractor has no loss of its own: here it
    is the mean of ||c' - c|| / ||c||, which is 0 when nothing is replaced. So
    recovered = 1 - reconstruction.relative_l2 / zeros.relative_l2: 1 if the reconstruction changes nothing, 0 if it is
    no better than zeros, below 0 if it is worse; NaN if zeros change nothing either. `recovered_from_mean` has
    mean-ablation in place of zeros, `mean_token`: the harder reference where tokens share a large mean.
    """

    n_images: int
    seed: int
    reconstruction: Change
    zeros: Change
    mean_token: Change  # the mean of the chosen tokens over the whole cache, at every position
    recovered: float
    recovered_from_mean: float


def substitute(
    model: SparseAutoencoder,
    sample: BackboneSample,
    outputs: list[torch.Tensor],
    mean_D: torch.Tensor,
    chosen: slice,
    *,
    step: int,
    device: str,
) -> Substitution:
    """The effect on the final CLS embedding: each image goes through with its three replacements."""
    cosines, distances, latents = [], [], MeasuredLatents(model)
    for tokens_TD in outputs:
        four = tokens_TD.to(device).repeat(4, 1, 1)  # untouched, reconstruction, zeros, mean token
        four[1, chosen] = torch.cat([latents.decoded(latents.of(part)) for part in four[1, chosen].split(step)])
        four[2, chosen] = 0
        four[3, chosen] = mean_D
        embedded = sample.final_cls(four).double().cpu()
        if not bool(torch.isfinite(embedded).all()):
            raise BadInput("a final CLS embedding became NaN or infinite: the SAE's weights do not fit these tokens")
        untouched, norms = embedded[0], embedded.norm(dim=1)
        cosines.append(embedded[1:] @ untouched / (norms[1:] * norms[0]))
        distances.append((embedded[1:] - untouched).norm(dim=1) / norms[0])
    changes = [
        Change(cosine=cosine, relative_l2=distance)
        for cosine, distance in zip(
            torch.stack(cosines).mean(0).tolist(), torch.stack(distances).mean(0).tolist(), strict=True
        )
    ]
    reconstruction, zeros, mean_token = changes
    return Substitution(
        n_images=len(outputs),
        seed=sample.seed,
        reconstruction=reconstruction,
        zeros=zeros,
        mean_token=mean_token,
        recovered=explained_share(reconstruction.relative_l2, zeros.relative_l2),
        recovered_from_mean=explained_share(reconstruction.relative_l2, mean_token.relative_l2),
    )
