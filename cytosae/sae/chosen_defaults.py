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
_OPEN: dict[str, Any] = {"loss": "auto", "init": "auto", "clip_norm": None, "dead_latents": "auto"}
BY_ACTIVATION: dict[str, dict[str, Any]] = {
    "relu": _RELEASED,
    "topk": _TOP_K,
    "batchtopk": _TOP_K,
    "jumprelu": _RELEASED,
    "gated": _RELEASED,
}
_MANY = 32  # active latents per token, from which a steered relu learns better as topk does; below, its latents die


def steered_defaults(activation: str, target_l0: float | str) -> dict[str, Any]:
    """What differs where the penalty is steered to an L0: no L1 weight is given, whose unit the loss would change.

    By measurement (docs/benchmarks.md). Of relu with `auto` the same settings are open until the number is known.
    """
    if activation == "gated":
        return {"loss": "eq1", "clip_norm": 1.0}
    if activation == "jumprelu":
        return _TOP_K
    if activation != "relu":
        return {}
    if target_l0 == "auto":
        return _OPEN
    return _TOP_K if float(target_l0) >= _MANY else {}
