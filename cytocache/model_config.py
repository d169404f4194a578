"""A model's config.json as timm writes it: architecture, its settings, and the model's own preprocessing.

The file is untrusted: it is JSON of a bounded size, and only known values within bounds are taken from it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from stores.errors import BadInput

from .model_options import checked_options
from .preprocess import Preprocess

MAX_CONFIG_BYTES = 4 << 20  # names of 21,000 classes fit


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a config.json, or timm itself, says of a model."""

    architecture: str
    options: dict[str, Any]
    preprocess: Preprocess
    hub: str = ""  # OWNER/NAME of its published weights, if timm knows them


def read_model_config(path: Path) -> ModelConfig:
    """The config of a folder or a model on Hugging Face.

    Raises
    ------
    BadInput
        If it is none of timm's, or has a value that is not known here.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read ({error.strerror}): a folder in timm's layout has config.json and model.safetensors"
        ) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise BadInput(f"{path} has more than {MAX_CONFIG_BYTES:,} bytes: it is no config of a model")
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is no JSON; expected a config.json as timm writes it") from None
    if not isinstance(said, dict) or not isinstance(said.get("architecture"), str):
        kind = said.get("model_type") if isinstance(said, dict) else None
        of = f"; it is one of transformers ({kind!r:.40}): look for the same model at timm" if kind else ""
        raise BadInput(f"{path} names no architecture of timm; expected a config.json as timm writes it{of}")
    nested = said.get("pretrained_cfg")
    input_of = nested if isinstance(nested, dict) else said  # timm 0.9 and before had one object
    arguments = said.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise BadInput(f"{path}: model_args must be an object; found {arguments!r:.60}")
    preprocess = _preprocess_of(input_of, path)
    if type(arguments.get("img_size")) is int and input_of.get("fixed_input_size") is True:
        preprocess = replace(preprocess, size=arguments["img_size"])
    return ModelConfig(
        architecture=said["architecture"], options=checked_options(arguments, path), preprocess=preprocess
    )


def timm_config(name: str) -> ModelConfig:
    """What timm knows of an architecture, with or without the tag of its weights.

    Raises
    ------
    BadInput
        If timm does not have it; the message names similar ones.
    """
    import timm

    architecture = name.partition(".")[0]
    try:
        known = timm.get_pretrained_cfg(name) if timm.is_model(architecture) else None
    except RuntimeError:  # the architecture is there, the tag is not
        known = None
    if known is None:
        _refuse_unknown(name)
    preprocess = _preprocess_of(known.to_dict(), f"timm:{name}")
    hub = str(known.hf_hub_id or "")
    return ModelConfig(architecture=architecture, options={}, preprocess=preprocess, hub=hub)


def require_architecture(name: str, place: object) -> None:
    """Raise BadInput if timm has no such architecture."""
    import timm

    if not timm.is_model(name):
        raise BadInput(
            f"{place} names the architecture {name!r:.80}, which timm {timm.__version__} does not have; a newer "
            f"timm may"
        )


def _refuse_unknown(name: str) -> NoReturn:
    import difflib

    import timm

    near = difflib.get_close_matches(name, timm.list_models("*vit*") + timm.list_models("*eva*"), n=3)
    raise BadInput(
        f"no backbone timm:{name}: timm {timm.__version__} has no such model"
        + (f"; similar: {', '.join(near)}" if near else "; python -c 'import timm; print(timm.list_models(\"vit*\"))'")
    )


def _preprocess_of(said: Mapping[str, Any], place: object) -> Preprocess:
    """The preprocessing of a `pretrained_cfg`, with timm's defaults for what is missing."""
    channels, *sizes = _input_size(said, place)
    if channels != 3 or len(set(sizes)) != 1:
        raise BadInput(f"{place} takes inputs of {said['input_size']!r:.60}; expected 3 channels and a square")
    wanted: dict[str, Any] = {
        "size": sizes[0],
        "interpolation": said.get("interpolation") or "bicubic",
        "crop_pct": said.get("crop_pct") or 0.875,
        "crop_mode": said.get("crop_mode") or "center",
    }
    for name in ("mean", "std"):
        value = said.get(name)
        if isinstance(value, list | tuple):
            wanted[name] = tuple(value)
    try:
        return Preprocess(**wanted)
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None


def _input_size(said: Mapping[str, Any], place: object) -> list[int]:
    size = said.get("input_size", (3, 224, 224))
    if not isinstance(size, list | tuple) or len(size) != 3 or not all(type(n) is int for n in size):
        raise BadInput(f"{place}: input_size must be three whole numbers; found {size!r:.60}")
    return list(size)
