"""Any vision transformer of timm: its description, its weights, the two put together.

The description is timm's own, a config.json (of a folder, or of a model on Hugging Face), or follows from the shapes of
the weights of the DINOv2 family (file_architecture.py). Nothing comes over the network unless `hf-hub:`, `hf:` or
`auto` asks for it, and no file is trusted: weights_file.py, model_config.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stores.errors import BadInput
from stores.files import sha256_file
from stores.progress import Progress
from stores.tables import listed
from stores.token_layout import TokenLayout

from .checkpoint_state import State, backbone_state, check_shapes, load_strictly, timm_names
from .download import fetch_from_hub
from .file_architecture import describe_file
from .model_config import ModelConfig, read_model_config, require_architecture, timm_config
from .model_names import WEIGHTS_SUFFIXES, ModelName, canonical_name
from .preprocess import Preprocess
from .random_weights import set_random, sha256_state
from .torchvision_guard import declare_missing_operators
from .vit import create_vit, layout_of, patch_pixels, position_grid, require_vit, set_image_size
from .weights_file import read_weights

_MAX_FILE_BYTES = 128 << 30  # with an optimizer's state; nothing of the file is in memory before it is used
# as timm and open_clip call them, the best first
_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A whole model with its weights, in memory."""

    name: str  # canonical: what decides the computation
    model: Any
    layout: TokenLayout
    preprocess: Preprocess
    weights_sha256: str
    trained: bool
    weights_source: str = ""  # of a download: the value of --weights that gives the same file again


@dataclass(frozen=True, kw_only=True)
class _Weights:
    path: Path
    sha256: str = ""
    source: str = ""


def load_model(
    asked: ModelName,
    text: str,
    *,
    weights: str | None,
    image_size: int | None,
    check_blocks: Callable[[str, int], object],
    progress: Progress,
) -> LoadedModel:
    """The model that a name and `--weights` describe; `text`: the name as the user gave it, for errors.

    check_blocks : called with the model's name and its number of blocks, before weights are downloaded

    Raises
    ------
    BadInput
        If it is no vision transformer, weights are missing or do not fit, or a download fails.
    """
    declare_missing_operators()
    is_random = weights == "random"
    state: State | None = None
    given: _Weights | None = None
    if asked.kind == "path" and not Path(asked.name).is_dir():  # the weights are the description
        given = _Weights(path=_existing(Path(asked.name), text))
        state = _read(given.path)
        config = describe_file(state, given.path, asked.options)
    else:
        config, default = _describe(asked, text, progress)
        config = replace(config, options={**config.options, **asked.options})
    require_architecture(config.architecture, text)
    name, size = canonical_name(config.architecture, config.options), image_size or config.preprocess.size

    hollow = create_vit(config.architecture, config.options, img_size=size, on="meta", name=text)
    require_vit(hollow, text, size)
    check_blocks(text, len(hollow.blocks))
    if is_random:
        model = create_vit(config.architecture, config.options, img_size=size, on="cpu", name=text)
        model, digest, source = set_random(model), "", ""
        digest = sha256_state(model)
    else:
        if state is None or weights not in (None, "auto"):
            given = _weights_of(weights, text, None if state is not None else default, progress)
            state = _read(given.path)
        assert given is not None
        model = _filled(config, state, given.path, text)
        if model.patch_embed.img_size[0] != size:
            set_image_size(model, size, text)
        digest, source = given.sha256 or sha256_file(given.path), given.source
    return LoadedModel(
        name=name,
        model=model,
        layout=layout_of(model, text),
        preprocess=replace(config.preprocess, size=size),
        weights_sha256=digest,
        trained=not is_random,
        weights_source=source,
    )


def _describe(asked: ModelName, text: str, progress: Progress) -> tuple[ModelConfig, Callable[[], _Weights]]:
    """The model's description, and how its weights are got where the user names no others."""
    if asked.kind == "timm":
        config = timm_config(asked.name)
        return config, lambda: _published(config, text, progress)
    if asked.kind == "hub":
        at = f"@{asked.revision}" if asked.revision else ""
        file = fetch_from_hub(f"hf:{asked.name}/config.json{at}", "config.json", progress=progress)
        commit = file.source.rpartition("@")[2]
        return read_model_config(file.path), lambda: _fetched(f"hf:{asked.name}@{commit}", progress)
    folder = Path(asked.name)
    return read_model_config(folder / "config.json"), lambda: _Weights(path=_file_in(folder))


def _weights_of(weights: str | None, text: str, default: Callable[[], _Weights] | None, progress: Progress) -> _Weights:
    if weights is None or weights == "auto":
        if default is None:
            raise BadInput(f"{text} is a file of weights already; leave out --weights")
        if weights is None and text.startswith("timm:"):
            raise BadInput(
                f"{text} needs weights: give a file or folder with --weights, or let --weights auto download those "
                f"that timm publishes (or --weights random for an untrained model)"
            )
        return default()
    if weights.startswith(("hf:", "hf-hub:")):
        return _fetched(weights, progress)
    path = Path(weights)
    return _Weights(path=_file_in(path) if path.is_dir() else _existing(path, text))


def _published(config: ModelConfig, text: str, progress: Progress) -> _Weights:
    if not config.hub:
        raise BadInput(f"timm publishes no weights of {text} on Hugging Face; give a file with --weights")
    return _fetched(f"hf:{config.hub}", progress)


def _fetched(address: str, progress: Progress) -> _Weights:
    file = fetch_from_hub(address, _FILES, progress=progress)
    return _Weights(path=file.path, sha256=file.sha256, source=file.source)


def _existing(path: Path, text: str) -> Path:
    if not path.is_file():
        raise BadInput(f"no file of weights at {path}, for the backbone {text}; give a file or a folder")
    return path


def _file_in(folder: Path) -> Path:
    """The weights in a folder of timm's layout, safetensors first."""
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    for suffix in WEIGHTS_SUFFIXES:
        found = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = listed([path.name for path in found])
            raise BadInput(f"{folder} has several files of weights ({names}); give one with --weights")
    raise BadInput(f"{folder} has no weights; expected {_FILES[0]} beside config.json")


def _read(path: Path) -> State:
    expected = "expected the weights of a vision transformer, as safetensors or by torch.save"
    return backbone_state(read_weights(path, max_bytes=_MAX_FILE_BYTES, expected=expected), path)


def _filled(config: ModelConfig, state: State, path: Path, text: str) -> Any:
    """The model with these weights, at the picture size of its learned positions."""
    size = config.preprocess.size
    hollow = create_vit(config.architecture, config.options, img_size=size, on="meta", name=text)
    state = timm_names(state, hollow, path)
    positions = state.get("pos_embed")
    if positions is not None and positions.ndim == 3 and getattr(hollow, "pos_embed", None) is not None:
        side = position_grid(hollow, positions.shape[1])
        if side is None:
            raise BadInput(
                f"{path} does not fit {text}: it has {positions.shape[1]:,} positions, which are not "
                f"{hollow.num_prefix_tokens} and a square of patches"
            )
        trained_at = side * patch_pixels(hollow)[0]
        if trained_at != size:
            size = trained_at
            hollow = create_vit(config.architecture, config.options, img_size=size, on="meta", name=text)
    check_shapes(hollow, state, path, text, _hint(hollow, state))
    n_parameters = sum(parameter.numel() for parameter in hollow.parameters())
    if path.stat().st_size < n_parameters:
        raise BadInput(f"{path} is too small for the {n_parameters:,} weights of {text}")
    model = create_vit(config.architecture, config.options, img_size=size, on="cpu", name=text)
    load_strictly(model, state, path, text)
    return model


def _hint(hollow: Any, state: State) -> str:
    """What to type, where the difference is a usual one."""
    embedding = state.get("patch_embed.proj.weight")
    if embedding is not None and embedding.ndim == 4 and hasattr(hollow.patch_embed, "proj"):
        ours, theirs = hollow.patch_embed.proj.weight.shape, embedding.shape
        if ours[0] != theirs[0]:
            return f"; it has width {theirs[0]}, this architecture {ours[0]}"
        if ours[2:] != theirs[2:]:
            return (
                f"; its patches have {theirs[2]} pixels, those of this architecture {ours[2]}: ?patch_size={theirs[2]}"
            )
    registers = state.get("reg_token")
    if registers is not None and getattr(hollow, "reg_token", None) is None:
        return f"; it has {registers.shape[1]} registers: take the architecture with registers, or ?reg_tokens="
    return ""
