"""The weights of one backbone inside a checkpoint: which part of the file it is, and its names in timm.

Training writes more than a backbone: a teacher and a student, heads, an optimizer, prefixes of wrappers. What is looked
for is the one `patch_embed.proj.weight`; its prefix tells where the backbone begins, and the teacher, of which
published models are made, goes before the student. Names of DINOv2 and DINOv3 become those of timm.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stores.errors import BadInput
from stores.tables import listed

State = dict[str, torch.Tensor]
_ANCHOR = "patch_embed.proj.weight"
_CONTAINERS = ("teacher", "model_ema", "ema", "model", "module", "state_dict", "backbone", "encoder", "student")
# a prefix is made of these words and nothing else: "teacher.backbone.", "module.student.", ...
_WRAPPERS = {*_CONTAINERS, "_orig_mod", "_fsdp_wrapped_module", "visual", "trunk", "vit", "model_state_dict"}
_RANK = {"teacher": 0, "model_ema": 0, "ema": 0, "student": 2}  # the rest: 1
# of training and classification; of the rest, every weight must have its place
_NO_PART = re.compile(
    r"mask_token|head\..*|head_dist\..*|pre_logits\..*|local_cls_norm\..*|rope_embed\.periods|.*\.bias_mask"
)


@dataclass(frozen=True)
class _Found:
    """A candidate: a dict of tensors, and the prefix of the backbone's names in it."""

    path: tuple[str, ...]  # words before the names: of containers, then of the prefix
    tensors: Mapping[Any, Any]
    prefix: str


def backbone_state(content: Any, place: Path) -> State:
    """The backbone's weights by their own names: without prefixes, heads, blocks in chunks (of FSDP training).

    Raises
    ------
    BadInput
        If there is none, or it is not clear which is meant.
    """
    candidates = list(_candidates(content, (), place))
    if not candidates:
        names = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
        what = shown_keys(names) if names else type(content).__name__
        raise BadInput(
            f"{place} holds no vision transformer: expected weights with {_ANCHOR}, alone or in teacher, model or "
            f"state_dict; found {what}"
        )
    ranks = [_rank(found.path) for found in candidates]
    best = [found for found, rank in zip(candidates, ranks, strict=True) if rank == min(ranks)]
    if len(best) > 1:
        where = listed([".".join(found.path) or "(top)" for found in best])
        raise BadInput(f"{place} holds several vision transformers ({where}); save the one that is meant alone")
    return _plain_names(best[0], place)


def _rank(words: tuple[str, ...]) -> int:
    ranks = [_RANK[word] for word in words if word in _RANK]
    return max(ranks) if ranks else 1


def _candidates(content: Any, path: tuple[str, ...], place: Path) -> Any:
    if not isinstance(content, dict):
        return
    for key in content:
        if not isinstance(key, str) or not key.endswith(_ANCHOR) or not isinstance(content[key], torch.Tensor):
            continue
        prefix = key.removesuffix(_ANCHOR)
        words = tuple(prefix.split(".")[:-1])
        if prefix == "".join(f"{word}." for word in words) and {*words} <= _WRAPPERS:
            yield _Found((*path, *words), content, prefix)
    if len(path) < 3:
        for name in _CONTAINERS:
            if isinstance(content.get(name), dict):
                yield from _candidates(content[name], (*path, name), place)


def _plain_names(found: _Found, place: Path) -> State:
    state: State = {}
    for key, value in found.tensors.items():
        if not isinstance(key, str) or not key.startswith(found.prefix):
            continue
        name = key.removeprefix(found.prefix).replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
        # of FSDP training: blocks.CHUNK.NUMBER.rest, with numbers that run through all chunks
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        if _NO_PART.fullmatch(name):
            continue
        if not isinstance(value, torch.Tensor):
            raise BadInput(f"{place}: {shown_keys([name])} is no tensor; expected weights alone")
        if name in state:
            raise BadInput(f"{place} holds {shown_keys([name])} twice; expected weights of one model")
        state[name] = value.detach()
    return state


def timm_names(state: State, model: Any, place: Path) -> State:
    """The same weights by the names of timm's model, for DINOv2 and DINOv3 as their authors write them.

    DINOv2 with registers adds a position to CLS; timm's model has none there, so it is added once, as timm does.

    Raises
    ------
    BadInput
        If biases are not zero that this architecture does not have.
    """
    if "storage_tokens" in state:
        return _dinov3_names(state, model, place)
    # the giant model's gated MLP; the order of its two halves is the same
    state = {
        re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", key)): value
        for key, value in state.items()
    }
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        positions, cls = state.get("pos_embed"), state.get("cls_token")
        if (
            getattr(model, "no_embed_class", False)
            and positions is not None
            and cls is not None
            and positions.ndim == 3
        ):
            state["cls_token"], state["pos_embed"] = cls.float() + positions[:, :1].float(), positions[:, 1:]
    return state


def _dinov3_names(state: State, model: Any, place: Path) -> State:
    wanted, renamed = model.state_dict(), State()
    for key, value in state.items():
        for pattern, name in (
            (r"storage_tokens", "reg_token"),
            (r"\.ls1\.gamma$", ".gamma_1"),
            (r"\.ls2\.gamma$", ".gamma_2"),
            (r"\.mlp\.w1\.", ".mlp.fc1_g."),
            (r"\.mlp\.w2\.", ".mlp.fc1_x."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
        ):
            key = re.sub(pattern, name, key)
        if not key.endswith("attn.qkv.bias") or key in wanted:
            renamed[key] = value
            continue
        q_bias, v_bias = (key.replace("qkv.bias", name) for name in ("q_bias", "v_bias"))
        if value.ndim == 1 and not len(value) % 3:
            query, _, of_values = value.chunk(3)  # the bias of keys is masked: always 0
            if q_bias in wanted:
                renamed[q_bias], renamed[v_bias] = query, of_values
            elif bool((query != 0).any() or (of_values != 0).any()):
                raise BadInput(f"{place} has biases of queries and values; take the architecture that ends in _qkvb")
    return renamed


def load_strictly(model: Any, state: State, path: Path, name: str) -> None:
    """Give the model these weights, in float32; every weight must be there, and nothing else.

    Raises
    ------
    BadInput
        Naming the weights that are missing, unexpected, of another shape, or not finite.
    """
    check_shapes(model, state, path, name)
    state = {key: value.float() for key, value in state.items()}
    not_finite = [key for key in state if not torch.isfinite(state[key]).all()]
    if not_finite:
        raise BadInput(f"{path} does not fit {name}: {len(not_finite)} weights not finite ({shown_keys(not_finite)})")
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)


def check_shapes(model: Any, state: State, path: Path, name: str, hint: str = "") -> None:
    """Raise BadInput unless the names and shapes are those of the model, which may be on the meta device."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    mistyped = [key for key in state if not _is_plain(state[key])]
    for what, keys in {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "that are no plain floating-point tensors": mistyped,
    }.items():
        if keys:
            raise BadInput(f"{path} does not fit {name}: {len(keys)} weights {what} ({shown_keys(keys)}){hint}")


def shown_keys(keys: list[Any]) -> str:
    """Some keys of an untrusted file, safe to print in one line."""
    return listed(
        [(key if key.isprintable() else repr(key))[:60] if isinstance(key, str) else type(key).__name__ for key in keys]
    )


def _is_plain(value: torch.Tensor) -> bool:
    return value.dtype.is_floating_point and value.layout == torch.strided and value.device.type == "cpu"
