"""What a training step minimises: the part of a `TrainConfig` that losses.py and dead_latents.py read in every step."""

from dataclasses import dataclass

from cytosae.sae import SparseAutoencoder, TrainConfig

from .precision import Dtypes, dtypes_of


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Form of the loss, treatment of dead latents, and precision; equal for all steps of a run.

    What changes from step to step (the sparsity weight, the dead latents) is an argument of `loss_and_gradients`.
    The meaning of each field is that of the setting of the same name in `TrainConfig`, which also checks the values.
    """

    loss: str = "normed"
    dead_latents: str = "ghost"
    ghost_scale: str = "scalar"
    auxk: int | None = None  # None: half the width of the tokens
    auxk_weight: float = 1 / 32
    jump_bandwidth: float = 1e-3
    nested: tuple[float, ...] | None = None
    precision: str = "fp32"

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Objective":
        """The objective of a run with these settings."""
        return cls(
            loss=config.loss,
            dead_latents=config.dead_latents,
            ghost_scale=config.ghost_scale,
            auxk=config.auxk,
            auxk_weight=config.auxk_weight,
            jump_bandwidth=config.jump_bandwidth,
            nested=config.nested,
            precision=config.precision,
        )

    def dtypes(self, model: SparseAutoencoder) -> Dtypes:
        """Types of what a step multiplies, on the device of the model."""
        return dtypes_of(self.precision, model.activation, model.W_dec.dtype, model.W_dec.device.type)
