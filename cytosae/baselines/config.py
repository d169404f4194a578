"""The settings of a baseline, and of a comparison with baselines."""

from dataclasses import dataclass

from stores.errors import BadInput
from stores.spec import check_choice

FROZEN_KINDS = ("frozen-decoder", "frozen-encoder")
KINDS = ("random", *FROZEN_KINDS, "tokens", "pca", "ica", "nmf", "neurons", "kmeans")
LABEL_COLUMNS = ("label", "label_common")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """What is fitted, and to how much. Raises BadInput for a value out of range.

    kind : random, frozen-decoder, frozen-encoder, tokens, pca, ica, nmf, neurons or kmeans
    seed : of initial weights, drawn tokens and fits; None: that of the SAE to be like, 0 without one
    sample_tokens : training tokens that are looked at; None: 50 million numbers, so 65,536 tokens of width 768; for
        tokens at least twice, for kmeans at least twenty times as many as latents
    components : pca, ica, nmf: directions; None: as many as channels (of pca and ica both signs become latents)
    iterations : ica and nmf: passes over the sample, at most
    """

    kind: str
    seed: int | None = None
    sample_tokens: int | None = None
    components: int | None = None
    iterations: int = 100

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name in ("sample_tokens", "components", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1; found {value}")
        if self.seed is not None and self.seed < 0:
            raise BadInput(f"seed must be at least 0; found {self.seed}")
        if self.components is not None and self.kind not in ("pca", "ica", "nmf"):
            raise BadInput(f"components are those of pca, ica and nmf; {self.kind} has as many latents as the SAE")
        if self.iterations != type(self).iterations and self.kind not in ("ica", "nmf"):
            raise BadInput(f"iterations are those of ica and nmf; {self.kind} has none, leave them out")
        if self.sample_tokens is not None and self.kind.startswith("frozen"):
            raise BadInput(
                f"{self.kind} is trained on as many tokens as the SAE, not on a sample; leave sample_tokens out"
            )


@dataclass(frozen=True, kw_only=True)
class VersusConfig:
    """How an SAE and its baselines are measured. Raises BadInput for a value out of range.

    label : column of the image table that latents are asked about: label or label_common
    most_images : held-out images that are measured on, drawn at random; 0: all
    all_images : measure on all readable images, also those that an SAE was trained on
    draws : of the bootstrap
    least_images : labelled images in which a latent must be active to have a purity
    seed : of the drawn images, the bootstrap and the shuffled labels
    """

    label: str = "label"
    most_images: int = 2048
    all_images: bool = False
    draws: int = 1000
    least_images: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("label", self.label, LABEL_COLUMNS)
        if self.draws < 100:
            raise BadInput(f"draws must be at least 100, for 95% intervals; found {self.draws}")
        if self.most_images < 0 or self.least_images < 2 or self.seed < 0:
            raise BadInput(
                f"most_images and seed must be at least 0, least_images at least 2; found {self.most_images}, "
                f"{self.seed}, {self.least_images}"
            )
