"""A training run of a second or two."""

from cytosae.sae import TrainConfig


def tiny_config(**changes: object) -> TrainConfig:
    """A training run of a second or two."""
    settings = {"expansion": 2, "batch_tokens": 256, "tokens": 256 * 12, "warmup_steps": 4, "log_every": 4, **changes}
    return TrainConfig(**settings)  # type: ignore[arg-type]
