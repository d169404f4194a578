"""How a backbone is named: published ones by a word, any vision transformer of timm by where its description lies."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stores.errors import BadInput

from .model_options import options_text, parse_options

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
FORMS = "timm:NAME, hf-hub:OWNER/NAME, a folder in timm's layout, or a file of weights"
_PART = "[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """A name that was taken apart.

    kind : timm (`name`: an architecture, with or without the tag of its weights), hub (`name`: OWNER/NAME), or path
    options : settings behind a question mark, `timm:vit_base_patch16_224?reg_tokens=4`
    """

    kind: str
    name: str
    revision: str = ""  # of a hub: a commit, branch or tag
    options: dict[str, Any] = field(default_factory=dict)


def parse_model_name(text: str) -> ModelName | None:
    """The parts of a backbone's name; None if it has none of the forms (a published model's name is none of them).

    Raises
    ------
    BadInput
        For a name that begins like one of the forms and goes on otherwise, or settings that are not known.
    """
    bare, options = _split_options(text)
    scheme, colon, rest = bare.partition(":")
    if colon and scheme == "timm":
        if not re.fullmatch(r"[a-z0-9_]+(?:\.[A-Za-z0-9_]+)?", rest):
            raise BadInput(f"expected a backbone timm:NAME, with a name of timm; found {text!r:.120}")
        return ModelName(kind="timm", name=rest, options=options)
    if colon and scheme in ("hf-hub", "hf_hub"):
        found = _HUB.fullmatch(rest)
        if found is None or ".." in rest:
            raise BadInput(f"expected a backbone hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION; found {text!r:.120}")
        return ModelName(kind="hub", name=found[1], revision=found[2] or "", options=options)
    if colon and scheme == "local-dir":
        return ModelName(kind="path", name=rest, options=options)
    if "/" in bare or bare.endswith(WEIGHTS_SUFFIXES) or Path(bare).is_dir():
        return ModelName(kind="path", name=bare, options=options)
    return None


def canonical_name(architecture: str, options: dict[str, Any]) -> str:
    """The name that stands in a cache: what decides the computation, not where the model came from."""
    settings = options_text(options)
    return f"timm:{architecture}{'?' if settings else ''}{settings}"


def _split_options(text: str) -> tuple[str, dict[str, Any]]:
    before, mark, after = text.rpartition("?")
    if mark and re.match("[a-z_]+=", after):
        return before, parse_options(after, before)
    return text, {}
