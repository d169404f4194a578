"""Conversion of a SAELens config and its tensors to our model and back; interop.py reads and writes the files.

SAELens 6, with u = (x - b_dec) W_enc, or x W_enc where `apply_b_dec_to_input` is false; x_hat = z W_dec + b_dec:

standard  z = ReLU(u + b_enc)
topk      z = ReLU(u + b_enc) at the k largest of a token; with `rescale_acts_by_decoder_norm` of (u + b_enc) ||W_dec||,
          and x_hat takes z / ||W_dec||
jumprelu  z = ReLU(u + b_enc) where u + b_enc > threshold; a trained batchtopk is stored like this
gated     z = ReLU(exp(r_mag) u + b_mag) where u + b_gate > 0
"""

import re
from typing import Any

import torch

from stores.torch_archive import Refused

from .model import SparseAutoencoder

_ALL = ("W_enc", "W_dec", "b_dec")
TENSORS = {
    "standard": (*_ALL, "b_enc"),
    "topk": (*_ALL, "b_enc"),
    "jumprelu": (*_ALL, "b_enc", "threshold"),
    "gated": (*_ALL, "b_gate", "r_mag", "b_mag"),
}
_LOG_OF_ZERO = -110.0  # finite, as weights are, and exp of it is 0 in float32


def read_config(says: dict[str, Any]) -> tuple[str, int | None]:
    """(architecture, k of topk) of a cfg.json, of SAELens 6 or before.

    Raises
    ------
    Refused
        If a setting would give other latents than the equations above; the message names it.
    """
    architecture, activation = says.get("architecture"), says.get("activation_fn", says.get("activation_fn_str"))
    if architecture in (None, "standard"):
        architecture = "topk" if activation == "topk" and _is_before_6(says) else "standard"
    if not isinstance(architecture, str) or architecture not in TENSORS:
        raise Refused(
            f"has architecture {shown(str(architecture))!r:.60} in cfg.json; only {', '.join(TENSORS)} can be imported"
        )
    metadata = says.get("metadata")
    hook = says.get("hook_name") or (metadata.get("hook_name") if isinstance(metadata, dict) else None)
    function = (None, "topk") if architecture == "topk" else (None, "relu")
    allowed: dict[str, tuple[Any, ...]] = {
        "activation_fn": function,
        "activation_fn_str": function,  # before version 6
        "normalize_activations": (None, False, "none"),
        "reshape_activations": (None, "none"),
        "finetuning_scaling_factor": (None, False),
        "apply_b_dec_to_input": (None, False, True),
        **({"rescale_acts_by_decoder_norm": (None, False, True)} if architecture == "topk" else {}),
    }
    for name, values in allowed.items():
        value = says.get(name)
        if not any(value is known or (isinstance(known, str) and value == known) for known in values):
            raise Refused(
                f"has {name} {shown(str(value))!r:.60} in cfg.json; "
                f"only {' or '.join(str(known).lower() for known in values if known is not None)} can be imported"
            )
    if "hook_z" in str(hook) and "reshape_activations" not in says:  # what SAELens then takes for granted
        raise Refused("was trained on attention heads (hook_z), which are no tokens")
    return architecture, _read_k(says) if architecture == "topk" else None


def to_ours(
    architecture: str, k: int | None, stored: dict[str, torch.Tensor], says: dict[str, Any]
) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    """(activation, state of our model, notes on what was changed) from the float32 `TENSORS` of an architecture.

    Raises
    ------
    Refused
        If k is larger than the number of latents, or a decoder row to be divided by its norm is zero.
    """
    weights, notes = dict(stored), []
    n_latents = len(weights["W_dec"])
    if k is not None and k > n_latents:
        raise Refused(f"says k {k:,} in cfg.json, but has {n_latents:,} latents")
    if architecture == "topk" and says.get("rescale_acts_by_decoder_norm"):
        norm_L = weights["W_dec"].double().norm(dim=1)
        if not bool(norm_L.all()):
            raise Refused("has rescale_acts_by_decoder_norm in cfg.json, and a row of W_dec whose norm is 0")
        weights["W_enc"] = (weights["W_enc"].double() * norm_L).float()
        weights["b_enc"] = (weights["b_enc"].double() * norm_L).float()
        weights["W_dec"] = (weights["W_dec"].double() / norm_L[:, None]).float()
        notes.append("the norms of W_dec's rows are now in W_enc and b_enc (rescale_acts_by_decoder_norm)")
    if architecture == "gated":
        weights["b_enc"] = weights.pop("b_gate")
    if says.get("apply_b_dec_to_input") is False:
        shift_L = weights["b_dec"].double() @ weights["W_enc"].double()
        weights["b_enc"] = (weights["b_enc"].double() + shift_L).float()
        where = "b_enc"
        if architecture == "gated":
            weights["b_mag"] = (weights["b_mag"].double() + weights["r_mag"].double().exp() * shift_L).float()
            where = "b_enc and, times exp(r_mag), in b_mag"
        notes.append(
            f"b_dec was not subtracted from the input; b_dec W_enc is now in {where}, so that latents stay equal"
        )
    if architecture == "jumprelu":
        threshold_L = weights.pop("threshold").double()
        is_low = threshold_L <= 0
        weights["log_threshold"] = threshold_L.log().masked_fill_(is_low, _LOG_OF_ZERO).float()
        if bool(is_low.any()):
            notes.append(
                f"{int(is_low.sum()):,} thresholds are 0 or below, and now 0: latents stay equal, as with ReLU"
            )
    return "relu" if architecture == "standard" else architecture, weights, notes


def from_ours(model: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(the fields of cfg.json for the architecture, its `TENSORS`); batchtopk becomes jumprelu, as in SAELens."""
    stored = {name: value.detach() for name, value in model.state_dict().items()}
    if model.activation == "topk":
        return {"architecture": "topk", "k": model.k, "rescale_acts_by_decoder_norm": False}, stored
    if model.activation == "gated":
        stored["b_gate"] = stored.pop("b_enc")
        return {"architecture": "gated"}, stored
    if model.activation == "jumprelu":  # exp may overflow; the largest float32 has the same effect as infinity
        stored["threshold"] = stored.pop("log_threshold").exp().clamp_max(torch.finfo(torch.float32).max)
        return {"architecture": "jumprelu"}, stored
    if model.activation == "batchtopk":
        stored["threshold"] = stored["threshold"].repeat(model.n_latents)
        return {"architecture": "jumprelu"}, stored
    return {"architecture": "standard"}, stored


def shown(text: str) -> str:
    """Text from a file that is not trusted, safe to print on one line."""
    return text if text.isprintable() else ascii(text)


def _read_k(says: dict[str, Any]) -> int:
    """As SAELens looks it up: `k`, or before version 6 in the arguments of the activation function."""
    settings = says.get("activation_fn_kwargs") if _is_before_6(says) else None
    given = [value for value in (says.get("k"), settings.get("k") if isinstance(settings, dict) else None) if value]
    k = given[0] if given else None
    if type(k) is not int or k < 1 or any(other != k for other in given):
        raise Refused(
            f"has k {shown(str(given if len(given) > 1 else k))!r:.60} in cfg.json; topk needs one whole number above 0"
        )
    return k


def _is_before_6(says: dict[str, Any]) -> bool:
    """True for files of SAELens before 6, where `activation_fn` has an effect; a file without a version is one."""
    metadata = says.get("metadata")
    version = says.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, dict) else None)
    return not (isinstance(version, str) and re.match(r"([6-9]|[1-9][0-9])\.", version))
