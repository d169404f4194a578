"""Settings that follow the activation and the wanted L0 where they are not given; their values in the released code."""

from typing import Any

# what a run of before these settings did; the presets keep it with every activation
RELEASED: dict[str, Any] = {
    "init": "kaiming",
    "clip_norm": 0.0,
    "nested": None,
    "background": "keep",
    "frozen": "none",
    "target_l0": None,
}

_RELEASED: dict[str, Any] = {"loss": "normed", "init": "kaiming", "clip_norm": 0.0, "dead_latents": "ghost"}
_TOP_K: dict[str, Any] = {"loss": "eq1", "init": "transpose", "clip_norm": 1.0, "dead_latents": "auxk"}
BY_ACTIVATION: dict[str, dict[str, Any]] = {
    "relu": _RELEASED,
    "topk": _TOP_K,
    "batchtopk": _TOP_K,
    "jumprelu": _RELEASED,
    "gated": _RELEASED,
}
# where the penalty is steered to an L0, so that no L1 weight is given whose unit the loss would change; by measurement
# (docs/benchmarks.md)
STEERED: dict[str, dict[str, Any]] = {
    "jumprelu": _TOP_K,
    "gated": {"loss": "eq1", "clip_norm": 1.0},
}
