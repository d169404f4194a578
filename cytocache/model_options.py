"""The settings of a timm architecture that may differ from its defaults, as text and as checked values.

They come from a model's config.json, which is untrusted, or from the name of a backbone, `timm:NAME?patch_size=16`.
Only known settings within bounds reach timm, so that a file cannot ask for a model that fills the memory. A canonical
text of what decides the tokens is part of a cache's identity.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from stores.errors import BadInput

_Check = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int) -> _Check:
    return (lambda value: type(value) is int and low <= value <= high), f"a whole number from {low:,} to {high:,}"


def _number(low: float, high: float) -> _Check:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    return fits, f"a number from {low:g} to {high:g}"


def _one_of(*values: str) -> _Check:
    return (lambda value: value in values), f"one of {', '.join(map(repr, values))}"


_FLAG: _Check = (lambda value: type(value) is bool, "true or false")

_KNOWN: dict[str, _Check] = {
    "depth": _whole(1, 200),
    "embed_dim": _whole(8, 16_384),
    "num_heads": _whole(1, 512),
    "patch_size": _whole(1, 256),
    "reg_tokens": _whole(0, 256),
    "num_reg_tokens": _whole(0, 256),  # as the EVA family calls them
    "mlp_ratio": _number(0.1, 64),
    "init_values": _number(0, 1e6),
    "global_pool": _one_of("", "avg", "avgmax", "max", "token", "map"),
    "pos_embed": _one_of("", "none", "learn"),
    "mlp_layer": _one_of("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked"),
    "act_layer": _one_of("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "GELU", "SiLU", "ReLU"),
    "rope_type": _one_of("cat", "mixed", "dinov3"),
    "rope_temperature": _number(1e-3, 1e9),
    "rope_grid_offset": _number(-1e3, 1e3),
    "rope_grid_indexing": _one_of("ij", "xy"),
    "rope_rotate_half": _FLAG,
    "ref_feat_shape": (
        lambda value: (
            isinstance(value, list) and len(value) == 2 and all(type(n) is int and 1 <= n <= 4096 for n in value)
        ),
        "two whole numbers",
    ),
    **dict.fromkeys(
        (
            *("class_token", "no_embed_class", "qkv_bias", "qk_norm", "proj_bias", "pre_norm", "final_norm", "fc_norm"),
            *("scale_attn_norm", "scale_mlp_norm", "pool_include_prefix"),
            *("qkv_fused", "swiglu_mlp", "scale_mlp", "scale_attn_inner", "use_abs_pos_emb", "use_rot_pos_emb"),
            *("use_post_norm", "use_pre_transformer_norm", "use_post_transformer_norm", "use_fc_norm"),
        ),
        _FLAG,
    ),
}
# no effect on the tokens of a trained model, or set by us: the input's size, the head, training
_IGNORED = {
    *("img_size", "num_classes", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init", "fix_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("head_init_scale", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
}


def checked_options(said: Mapping[str, Any], place: object) -> dict[str, Any]:
    """The settings of a model that decide its tokens; null and what has no effect are left out.

    Raises
    ------
    BadInput
        For a setting that is not known, or a value out of its range.
    """
    found: dict[str, Any] = {}
    for name, value in said.items():
        if value is None or name in _IGNORED:
            continue
        if name == "in_chans":
            if value != 3:
                raise BadInput(f"{place} is a model of images with {value!r:.20} channels; expected 3 (RGB)")
            continue
        if not isinstance(name, str) or name not in _KNOWN:
            raise BadInput(
                f"{place} has the model setting {name!r:.60}, which is not known here; known are "
                f"{', '.join(sorted(_KNOWN))}"
            )
        fits, expected = _KNOWN[name]
        if not fits(value):
            raise BadInput(f"{place}: the model setting {name} must be {expected}; found {value!r:.60}")
        found[name] = value
    return found


def parse_options(text: str, place: object) -> dict[str, Any]:
    """The settings in `depth=4&class_token=false`. Raises BadInput as `checked_options`."""
    said: dict[str, Any] = {}
    for pair in filter(None, text.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or not name or name in said:
            raise BadInput(f"{place}: expected settings like ?depth=12&patch_size=16; found {pair!r:.60}")
        said[name] = _value(value)
    return checked_options(said, place)


def options_text(options: Mapping[str, Any]) -> str:
    """The inverse of `parse_options`, names rising; "" for none."""
    return "&".join(f"{name}={_shown(options[name])}" for name in sorted(options))


def timm_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as arguments of `timm.create_model`: names of layers become layers."""
    import timm.layers

    arguments = dict(options)
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    if "act_layer" in arguments:
        arguments["act_layer"] = str(arguments["act_layer"]).lower()
    return arguments


def _value(text: str) -> Any:
    if text in ("true", "True", "false", "False"):
        return text.lower() == "true"
    if "," in text:
        return [_value(part) for part in text.split(",")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(_shown, value))
    return repr(float(value)) if isinstance(value, float) else str(value)
