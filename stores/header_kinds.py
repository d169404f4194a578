"""The expected types of values in a header, as far as commands use them: one table for each kind of artefact.

A pattern is a type, a tuple of patterns (any of them), `[pattern]` (a list of such), `{"name": pattern}` (an object;
names may be missing, and other names may have any value) or `{"*": pattern}`.
"""

from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from .errors import DamagedStore

Pattern = Any
_NUMBER = (int, float)
_WHOLE: Pattern = "a whole number above 0"
_NAMES: Pattern = "file names"  # an object whose keys are names of files in the same folder

_TOKENS: Pattern = {
    **{name: (str, NoneType) for name in ("backbone", "weights_sha256", "token_layout")},
    **{name: (int, NoneType) for name in ("block", "tokens_per_image", "width")},
    "transform": (dict, NoneType),
}
_CACHE: Pattern = {
    **dict.fromkeys(("backbone", "weights_sha256", "precision", "token_layout", "manifest_sha256"), str),
    **dict.fromkeys(("n_images", "tokens_per_image", "width", "chunk_images"), _WHOLE),
    **dict.fromkeys(("block", "n_blocks"), int),
    "trained": bool,
    "transform": dict,
    "allow_truncated": bool,
}
_LATENTS: Pattern = {
    **dict.fromkeys(("sae_sha256", "cache_sha256", "images_sha256", "precision"), str),
    **dict.fromkeys(("n_images", "tokens_per_image", "n_latents"), _WHOLE),
    "value_bits": int,
    "min_activation": _NUMBER,
    "cache": _CACHE,
}
_CONFIG: Pattern = {
    **dict.fromkeys(("loss", "dead_latents", "ghost_scale", "order", "token_set", "activation"), (str, NoneType)),
    **dict.fromkeys(("l1", "lr"), _NUMBER),
    **dict.fromkeys(("batch_tokens", "seed"), int),
    **dict.fromkeys(("init", "background", "frozen"), str),
    "clip_norm": _NUMBER,
    "nested": ([_NUMBER], NoneType),
}
_OF_STEP: Pattern = dict.fromkeys(
    (
        *("loss", "mse", "l1", "gate", "dead_loss", "l0", "explained_variance", "explained_variance_uncentered"),
        *("dead_fraction", "n_meaningful"),
    ),
    (*_NUMBER, NoneType),
)

SPEC_KINDS: dict[str, Pattern] = {
    "activation cache": _CACHE,
    "latent store": _LATENTS,
    "SAE": {
        **dict.fromkeys(("width", "n_latents"), _WHOLE),
        "activation": str,
        "k": (_WHOLE, NoneType),
        "tokens": _TOKENS,
        "trained_backbone": (bool, NoneType),
        "caches": [{"identity": str, "sha256": str, "precision": str}],
        **dict.fromkeys(("n_steps", "tokens_per_epoch"), int),
        "config": _CONFIG,
        "images": {"*": (int, str, NoneType, list, dict)},
        "imported": {"format": str, "files": {"*": str}},
        "init_from": {"identity": str, "sae_sha256": str},
        "baseline": {"kind": str, "like": (str, NoneType), "l0": _NUMBER, "sample_tokens": int, "seed": int},
        "background": {
            **dict.fromkeys(("rule", "sha256"), str),
            **dict.fromkeys(("patches", "left_out"), int),
            **dict.fromkeys(("threshold", "explained", "share_at_rim", "share_elsewhere"), _NUMBER),
        },
    },
    "barcodes": {
        "latents": (str, [str]),
        "latents_spec": (_LATENTS, [_LATENTS]),
        "tau": (*_NUMBER, [_NUMBER]),
        "token_set": str,
        "normalize": str,
        "tau_rule": {"name": str, "version": int, "words": str},
    },
    "concepts": {"latents": [str], "latents_spec": [_LATENTS], "token_set": str, "label": str, "top_k": int},
    "thresholds": {"concepts": [{"name": str, "identity": str}], "log10_thresholds": [_NUMBER]},
    "patch maps": {"latents": [int], "origin": dict, "query": (dict, NoneType), "style": dict},
    "reference sheets": {"concepts": str, "latents": [int], "datasets": [str], "style": dict},
    "mask agreement": {"masks_sha256": str},
    "comparison": {"barcodes": (str, [str]), "a": str, "b": str, "tau": (*_NUMBER, NoneType)},
    "probe": {"barcodes": (str, [str]), "level": str, "target": str, "tau": (*_NUMBER, NoneType)},
    "probe test": {"barcodes": str, "model": str, "tau": _NUMBER},
    "stability": {"saes": [{"sae_sha256": str, "n_latents": int}]},
    "scorecard": {"sae_sha256": str, "latents": [str], "sample_sha256": str, "label": str, "ks": [int]},
    "neighbours": {"sae_sha256": str, "latents": ([str], NoneType), "chosen": ([int], str)},
    "patient concepts": {"barcodes": str, "patient": (str, NoneType), "tau": (*_NUMBER, NoneType)},
    "comparison with baselines": {"sae": str, "baselines": [{"sae_sha256": str, "kind": str}], "caches": [str]},
    "search": {"barcodes": str, "tau": _NUMBER, "k": int, "weigh": str, "caches": [str]},
    "replication": {"discovery": str, "replication": str},
    "latent match": {"a": [str], "b": [str], "by": str, "seed": int},
    "ablation": {"latents": [int], "mode": str, "token_set": str, "sae_sha256": str, "cache_sha256": str},
    "latent names": {
        **dict.fromkeys(("concepts", "barcodes", "sae_sha256", "match"), str),
        "latents": [str],
        "chosen": [int],
        **dict.fromkeys(("n_shown", "n_test", "min_test", "pixels", "seed"), int),
        "labels": bool,
    },
    "atlas": {"barcodes": str, "concepts": str, "latents": [str], "comparisons": [str]},
}
_WITH_FILES: Pattern = {"files": (_NAMES,)}
SUMMARY_KINDS: dict[str, Pattern] = {
    **{kind: _WITH_FILES for kind in SPEC_KINDS},
    "activation cache": {"images_sha256": str, "n_readable": int, "n_unreadable": int, "n_truncated": int},
    "latent store": {"nnz": int, "n_dropped": int, "journal_sha256": str, "files": {"*": str}},
    "SAE": {
        **dict.fromkeys(("steps", "tokens", "images"), int),
        "final": _OF_STEP,
        "held_out": (_OF_STEP, NoneType),
        "sae_sha256": str,
        "says": dict,
        "notes": [str],
    },
    "barcodes": {
        **dict.fromkeys(("n_images", "n_unreadable", "n_patients", "n_diseases", "n_latents"), int),
        "n_silent_latents": [int],
        "share_above_tau": [_NUMBER],
        "would_keep": [[_NUMBER]],
        "exports": (_NAMES,),
        "store_files": {"*": [(int, str)]},
    },
    "concepts": {
        **_WITH_FILES,
        "n_latents": _WHOLE,
        "by_dataset": [{"dataset": str, "*": (str, *_NUMBER, NoneType)}],
        "agreement": [{"dataset_a": str, "dataset_b": str}],
        "differences": str,
    },
    "comparison": {
        **_WITH_FILES,
        "a": {"name": str},
        "b": {"name": str},
        "warnings": [str],
        "n_higher": {"*": int},
        "left_out": {"*": int},
    },
}


def check_kinds(value: Any, pattern: Pattern, name: str, place: object) -> None:
    """Raise DamagedStore, with name and place, if a value in a header does not have the type of the pattern."""
    found = _misfit(value, pattern, name)
    if found is not None:
        where, wrong, expected = found
        shown = repr(wrong)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise DamagedStore(
            f"{place}: the header says {where.removeprefix(f'{name}.')} {shown}; expected {_words(expected)}; run the "
            f"command that made it again, with --overwrite"
        )


def fits_hint(value: Any, hint: Any) -> bool:
    """Does a JSON value fit the type of a dataclass field? An integer fits float; a list fits tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits_hint(value, each) for each in inner)
    if origin in (list, tuple) or hint in (list, tuple):
        items = [each for each in inner if each is not Ellipsis]
        is_list = isinstance(value, list | tuple)
        if not is_list or not items:
            return is_list
        if origin is tuple and Ellipsis not in inner:
            return len(value) == len(items) and all(map(fits_hint, value, items))
        return all(fits_hint(each, items[0]) for each in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict) and (not inner or all(fits_hint(each, inner[1]) for each in value.values()))
    if hint is None or hint is NoneType:
        return value is None
    return _is_a(value, hint)


def _words(pattern: Pattern) -> str:
    """The values that fit a pattern, in words."""
    if isinstance(pattern, tuple):
        return " or ".join(dict.fromkeys(map(_words, pattern)))
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
    if isinstance(pattern, list) or pattern is list:
        return "a list"
    if isinstance(pattern, dict) or pattern is dict:
        return "an object"
    return names.get(pattern, str(pattern))


def _misfit(value: Any, pattern: Pattern, name: str) -> tuple[str, Any, Pattern] | None:
    """(name, value, expected pattern) of the first value that does not fit; None if all fit."""
    if isinstance(pattern, tuple):
        found = [_misfit(value, each, name) for each in pattern]
        if None in found:
            return None
        # of several patterns, report the one that fits further
        deepest = max((each for each in found if each), key=lambda each: len(each[0]), default=None)
        return (name, value, pattern) if deepest is None or deepest[0] == name else deepest
    if isinstance(pattern, list):
        if not isinstance(value, list):
            return name, value, pattern
        inside = (_misfit(each, pattern[0], f"{name}[{n}]") for n, each in enumerate(value))
        return next((each for each in inside if each), None)
    if isinstance(pattern, dict):
        if not isinstance(value, dict):
            return name, value, pattern
        known = [key for key in value if key in pattern or "*" in pattern]
        inside = (_misfit(value[key], pattern.get(key, pattern.get("*")), f"{name}.{key}") for key in known)
        return next((each for each in inside if each), None)
    if pattern is _NAMES:
        is_names = isinstance(value, dict) and all(is_file_name(key) and isinstance(value[key], str) for key in value)
        return None if is_names else (name, value, pattern)
    if pattern is _WHOLE:
        return None if type(value) is int and 1 <= value < 1 << 53 else (name, value, pattern)
    return None if _is_a(value, pattern) else (name, value, pattern)


def is_file_name(name: str) -> bool:
    """Is this the name of a file in the same folder, and no path that leads out of it?"""
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & {*name}


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float)
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    return isinstance(value, kind) if kind in (str, bool, dict, list, NoneType) else True
