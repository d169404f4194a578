"""SAEs of other programs, in and out: the same numbers, honest words, and nothing of a stranger's is executed."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from cli import cli
from cytosae.latents.encode import encode
from cytosae.sae import SparseAutoencoder, export_sae, import_sae, interop, load_sae, save_sae
from cytosae.sae.interop import read_foreign
from cytosae.sae.safe_unpickle import read_pickle
from stores.activation_store import ActivationStore
from stores.errors import BadInput, IncompleteStore, SpecMismatch
from stores.latent_store import LatentStore
from stores.runlog import read_runs
from stores.spec import SAE, new_header

D, L, K = 6, 20, 5
MODULE = "src.sae_training.config"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


# --------------------------------------------------------------------------------- as other programs write it


def config_class(module: str = MODULE, name: str = "ViTSAERunnerConfig") -> type:
    """The released class, as far as pickle looks at it."""
    return type(name, (), {"__module__": module, "__qualname__": name})


def released_config(cls: type | None = None, **changes: Any) -> Any:
    """What training left in `cfg`: numbers, texts, None, a dtype, a device, and one tuple that is a slip of theirs."""
    values = {
        **{"d_in": D, "d_sae": L, "expansion_factor": 64, "gated_sae": None, "class_token": None, "seed": 42},
        **{"dtype": torch.float32, "device": torch.device("cuda", 0), "store_batch_size": (32,), "lr": 4e-4},
        **{"model_name": "dinov2_vitb14", "block_layer": -2, "module_name": "resid", "l1_coefficient": 8e-5},
        **{"checkpoint_path": "out/checkpoints/8jsxk3co", "wandb_entity": None, "log_to_wandb": True},
    }
    config = (cls or config_class())()
    config.__dict__.update({**values, **changes})
    return config


def released_weights(seed: int = 0, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """State dict of a module, in the released order; rows of `W_dec` are near norm 1, not at it."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Module()
    shapes = {"W_enc": (D, L), "b_enc": (L,), "W_dec": (L, D), "b_dec": (D,)}
    for name, shape in shapes.items():
        setattr(module, name, nn.Parameter(torch.randn(shape, generator=generator)))
    module.hook = nn.Identity()
    state = module.state_dict()  # with PyTorch's own `_metadata`
    state["W_dec"] /= state["W_dec"].norm(dim=1, keepdim=True) * 1.01
    state.update(changes)
    return state


def save_released(path: Path, content: Any = None, **options: Any) -> Path:
    """`torch.save` while the config's module is there; afterwards it is gone, as on a user's machine."""
    content = {"cfg": released_config(), "state_dict": released_weights()} if content is None else content
    classes = (
        {type(value) for value in [content.get("cfg"), content.get("config")]} if isinstance(content, dict) else ()
    )
    added = []
    for cls in classes:
        parts = cls.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                added.append(name)
        if added:
            setattr(sys.modules[cls.__module__], cls.__name__, cls)
    try:
        torch.save(content, path, **options)
    finally:
        for name in added:
            del sys.modules[name]
    return path


def save_saelens(folder: Path, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A folder as SAELens 6 writes it."""
    config = {
        **{"architecture": "standard", "d_in": D, "d_sae": L, "dtype": "float32", "device": "cuda"},
        **{"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"},
        "metadata": {"sae_lens_version": "6.18.0", "model_name": "clip", "hook_name": "blocks.10.hook_resid_post"},
    }
    config = {name: value for name, value in {**config, **changes}.items() if value != "absent"}
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(dict(released_weights()) if weights is None else weights, folder / "sae_weights.safetensors")
    return folder


def released_twin(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, reconstruction) of the released forward pass, in float64."""
    w = {name: value.double() for name, value in weights.items()}
    latents = torch.relu(torch.einsum("...d,dl->...l", tokens.double() - w["b_dec"], w["W_enc"]) + w["b_enc"])
    return latents, torch.einsum("...l,ld->...d", latents, w["W_dec"]) + w["b_dec"]


def saelens_twin(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of SAELens' four SAEs, with its switches, as the docs of version 6 define them."""
    config = json.loads((folder / "cfg.json").read_text())
    w = {name: value.double() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    shifted = tokens.double() - w["b_dec"] * config["apply_b_dec_to_input"]
    norm = w["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(len(w["W_dec"]))
    if config["architecture"] == "gated":
        is_on = shifted @ w["W_enc"] + w["b_gate"] > 0
        latents = is_on * torch.relu(shifted @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    else:
        before = (shifted @ w["W_enc"] + w["b_enc"]) * norm
        if config["architecture"] == "topk":
            least = before.sort(dim=1, descending=True).values[:, config["k"] - 1]
            before = torch.where(before >= least[:, None], before, 0)
        if config["architecture"] == "jumprelu":
            before = torch.where(before > w["threshold"], before, 0)
        latents = torch.relu(before)
    return latents, (latents / norm) @ w["W_dec"] + w["b_dec"]


def saelens_weights(architecture: str) -> dict[str, torch.Tensor]:
    """As `released_weights`, of another architecture."""
    weights, generator = dict(released_weights()), torch.Generator().manual_seed(5)
    more = {name: torch.randn(L, generator=generator) for name in ("b_gate", "b_mag", "r_mag", "threshold")}
    if architecture == "jumprelu":
        weights["threshold"] = more["threshold"].exp()
    if architecture == "gated":
        del weights["b_enc"]
        weights |= {name: more[name] * 0.5 for name in ("b_gate", "b_mag", "r_mag")}
    return weights


def run_of(root: Path, activation: str, **changes: torch.Tensor) -> Path:
    """A run folder with some SAE of an activation."""
    k = K if activation in ("topk", "batchtopk") else None
    model, generator = SparseAutoencoder(D, L, activation, k), torch.Generator().manual_seed(7)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    model.load_state_dict({**state, **changes})
    if activation == "batchtopk" and not changes:
        model.threshold.fill_(2.5)
    tokens = {**dict.fromkeys(interop._UNKNOWN), "width": D}
    spec = {"width": D, "n_latents": L, "activation": activation, "k": k, "tokens": tokens, "caches": []}
    root.mkdir()
    save_sae(root, model, new_header(SAE, spec), {})
    return root


def some_tokens(width: int = D) -> torch.Tensor:
    return torch.randn(50, width, generator=torch.Generator().manual_seed(1)) * 3


def assert_same_numbers(run: Path, expected: tuple[torch.Tensor, torch.Tensor], tokens: torch.Tensor) -> None:
    model = load_sae(run).model
    latents = model.encode(tokens)
    assert (expected[0] > 0).any()
    for found, wanted in zip((latents, model.decode(latents)), expected, strict=True):
        assert (found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def assert_same_bits(run: Path, weights: dict[str, torch.Tensor]) -> None:
    state = load_sae(run).model.state_dict()
    assert state.keys() == set(NAMES)
    for name in NAMES:
        assert state[name].numpy().tobytes() == weights[name].numpy().tobytes()


# ------------------------------------------------------------------------------------------------------ cytosae


@pytest.mark.parametrize("module", [MODULE, "sae_training.config"])
@pytest.mark.parametrize("key", ["cfg", "config"])
def test_a_released_file_is_taken_bit_for_bit_and_its_config_as_plain_values(
    tmp_path: Path, module: str, key: str
) -> None:
    weights = released_weights()
    cls = config_class(module)
    path = save_released(tmp_path / "x.pt", {key: released_config(cls), "state_dict": weights})
    before = set(sys.modules)
    done = import_sae(path, tmp_path / "run")
    header, was_complete = done.header, done.was_complete
    assert not was_complete
    assert not {name for name in set(sys.modules) - before if "sae_training" in name}
    assert_same_bits(tmp_path / "run", weights)
    assert_same_numbers(tmp_path / "run", released_twin(weights, some_tokens()), some_tokens())
    assert header.summary is not None
    says = header.summary["says"]
    assert says == json.loads(json.dumps(vars(released_config()), default=lambda v: str(v).removeprefix("torch.")))
    assert says["device"] == "cuda:0"
    assert header.summary["notes"] == []
    assert header.spec["tokens"] == {**dict.fromkeys(interop._UNKNOWN), "width": D}  # claims are no knowledge
    assert header.spec["trained_backbone"] is None
    assert header.spec["caches"] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_and_it_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in released_weights().items()}
    path = save_released(tmp_path / "x.pt", {"cfg": released_config(dtype=dtype), "state_dict": weights})
    foreign = read_foreign(path)
    assert foreign.notes == [f"{str(dtype).removeprefix('torch.')} became float32"]
    for name in NAMES:
        assert torch.equal(foreign.weights[name], weights[name].float())


def test_a_transposed_matrix_is_read_as_it_is_meant(tmp_path: Path) -> None:
    """Tied weights share one record: W_enc is W_dec by columns."""
    w_dec = released_weights()["W_dec"]
    weights = released_weights(W_dec=w_dec, W_enc=w_dec.T)
    foreign = read_foreign(save_released(tmp_path / "x.pt", {"cfg": released_config(), "state_dict": weights}))
    assert torch.equal(foreign.weights["W_enc"], w_dec.T)
    assert torch.equal(foreign.weights["W_dec"], w_dec)


def test_a_config_with_numbers_that_json_lacks(tmp_path: Path) -> None:
    content = {"cfg": released_config(lr=float("nan"), seed=float("-inf")), "state_dict": released_weights()}
    header = import_sae(save_released(tmp_path / "x.pt", content), tmp_path / "run").header
    assert header.summary is not None
    assert (header.summary["says"]["lr"], header.summary["says"]["seed"]) == ("nan", "-inf")
    assert read_foreign(save_saelens(tmp_path / "x", l1_coefficient=float("inf"))).says["l1_coefficient"] == "inf"


def test_what_is_beside_the_weights_is_named(tmp_path: Path) -> None:
    content = {"cfg": released_config(), "state_dict": released_weights(), "optimizer": {}, "step": 3}
    assert read_foreign(save_released(tmp_path / "x.pt", content)).notes == ["left out: optimizer, step"]


# ------------------------------------------------------------------------------------------------------ saelens


@pytest.mark.parametrize("subtracted", [True, False])
def test_a_saelens_folder_gives_the_same_numbers(tmp_path: Path, subtracted: bool) -> None:
    folder = save_saelens(tmp_path / "x", apply_b_dec_to_input=subtracted)
    (folder / "sparsity.safetensors").write_bytes(b"")
    header = import_sae(folder, tmp_path / "run").header
    assert_same_numbers(tmp_path / "run", saelens_twin(folder, some_tokens()), some_tokens())
    assert header.summary is not None
    folded = ["b_dec was not subtracted from the input; b_dec W_enc is now in b_enc, so that latents stay equal"]
    assert header.summary["notes"] == [*([] if subtracted else folded), "left out: sparsity.safetensors"]
    if subtracted:
        assert_same_bits(tmp_path / "run", released_weights())


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "topk rescaled", "jumprelu", "gated"])
def test_the_other_architectures_give_the_same_numbers(tmp_path: Path, architecture: str, subtracted: bool) -> None:
    architecture, _, rescaled = architecture.partition(" ")
    settings = {"k": K, "rescale_acts_by_decoder_norm": bool(rescaled)} if architecture == "topk" else {}
    weights = saelens_weights(architecture)
    if rescaled:  # so that the norms decide which are the largest
        weights["W_dec"] *= torch.linspace(0.2, 3, L)[:, None]
    changes = {"architecture": architecture, "apply_b_dec_to_input": subtracted, **settings}
    folder = save_saelens(tmp_path / "x", weights, **changes)
    header = import_sae(folder, tmp_path / "run").header
    model = load_sae(tmp_path / "run").model
    assert (header.spec["activation"], model.activation, model.k) == (architecture, architecture, settings.get("k"))
    assert ("k" in header.spec) == (architecture == "topk")
    assert_same_numbers(tmp_path / "run", saelens_twin(folder, some_tokens()), some_tokens())
    assert header.summary is not None
    words = "; ".join(header.summary["notes"])
    assert ("b_dec was not subtracted" in words) == (not subtracted)
    assert ("times exp(r_mag), in b_mag" in words) == (not subtracted and architecture == "gated")
    assert ("norms of W_dec's rows" in words) == bool(rescaled)
    if subtracted and not rescaled:
        assert words == ""
        ours = {"b_gate": "b_enc", "threshold": "log_threshold"}
        state = {name: value for name, value in model.state_dict().items() if name != "log_threshold"}
        assert all(torch.equal(state[ours.get(name, name)], weights[name]) for name in weights if name != "threshold")


def test_a_threshold_at_or_below_zero_is_relu(tmp_path: Path) -> None:
    weights = saelens_weights("jumprelu")
    weights["threshold"][:3] = torch.tensor([0.0, -1.0, -0.0])
    folder = save_saelens(tmp_path / "x", weights, architecture="jumprelu")
    header = import_sae(folder, tmp_path / "run").header
    assert (header.summary or {})["notes"] == [
        "3 thresholds are 0 or below, and now 0: latents stay equal, as with ReLU"
    ]
    assert_same_numbers(tmp_path / "run", saelens_twin(folder, some_tokens()), some_tokens())
    least = torch.full((1, L), 1e-44)  # above 0, by as little as a number can be, or nearly
    kept = load_sae(tmp_path / "run").model.keep_active_(least)
    assert (kept[0, :3] > 0).all()
    assert not (kept[0, 3:] > 0).any()
    export_sae(tmp_path / "run", tmp_path / "y", format="saelens")
    assert load_file(tmp_path / "y" / "sae_weights.safetensors")["threshold"][:3].tolist() == [0, 0, 0]


def test_a_row_without_a_norm_cannot_be_rescaled(tmp_path: Path) -> None:
    weights = saelens_weights("topk")
    weights["W_dec"][3] = 0
    settings = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    with pytest.raises(BadInput, match="a row of W_dec whose norm is 0"):
        read_foreign(save_saelens(tmp_path / "x", weights, **settings))


def old_topk(architecture: str) -> dict[str, Any]:
    """Of cfg.json before version 6, where the activation function had a name and settings."""
    old = {"architecture": architecture, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    return {**old, "hook_name": "blocks.10.hook_resid_post", "metadata": "absent", "sae_lens_version": "5.1.0"}


@pytest.mark.parametrize("architecture", ["standard", "topk", "absent"])
def test_topk_from_before_version_6(tmp_path: Path, architecture: str) -> None:
    foreign = read_foreign(save_saelens(tmp_path / "x", **old_topk(architecture)))
    assert (foreign.activation, foreign.k) == ("topk", K)
    with pytest.raises(BadInput, match="has activation_fn_str 'topk'"):  # since then, it has no effect
        read_foreign(save_saelens(tmp_path / "y", **{**old_topk("standard"), "sae_lens_version": "6.0.0"}))
    with pytest.raises(BadInput, match=r"has k '\[6, 5\]'"):
        read_foreign(save_saelens(tmp_path / "z", **old_topk(architecture), k=6))


def test_a_folder_from_before_version_6(tmp_path: Path) -> None:
    """Flat names, no architecture, null where `none` stands now."""
    old: dict[str, Any] = {
        "hook_name": "blocks.10.hook_resid_post",
        "activation_fn_str": "relu",
        "normalize_activations": None,
    }
    absent: dict[str, Any] = dict.fromkeys(("architecture", "metadata", "reshape_activations"), "absent")
    assert read_foreign(save_saelens(tmp_path / "x", **absent, **old)).says["activation_fn_str"] == "relu"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "batchtopk"}, "has architecture 'batchtopk' in cfg.json; only standard, topk, jumprelu, gat"),
        ({"architecture": "temporal"}, "has architecture 'temporal'"),
        ({"architecture": ["standard"]}, "has architecture"),
        ({"architecture": "jumprelu"}, "lacks threshold; found W_dec"),
        ({"architecture": "gated"}, "lacks b_gate, r_mag, b_mag; found W_dec"),
        ({"architecture": "topk"}, "has k 'None' in cfg.json; topk needs one whole number above 0"),
        ({"architecture": "topk", "k": 2.0}, "has k '2.0'"),
        ({"architecture": "topk", "k": True}, "has k 'True'"),
        ({"architecture": "topk", "k": -1}, "has k '-1'"),
        ({"architecture": "topk", "k": "5\x1b"}, "has k "),
        ({"architecture": "topk", "k": 10**12}, "says k 1,000,000,000,000 in cfg.json, but has 20 latents"),
        ({"architecture": "topk", "activation_fn_kwargs": {"k": 5}}, "has k 'None'"),  # of no effect since version 6
        ({"architecture": "topk", "k": 5, "activation_fn": "relu"}, "has activation_fn 'relu'.*only topk"),
        ({"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": 1}, "has rescale_acts_by_decoder_norm '1'"),
        ({"activation_fn": "topk"}, "has activation_fn 'topk'"),
        ({"activation_fn_str": "tanh-relu"}, "has activation_fn_str 'tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, "has normalize_activations 'layer_norm' .*; only false or none"),
        ({"normalize_activations": True}, "has normalize_activations 'True'"),
        ({"normalize_activations": "expected_average_only_in"}, "has normalize_activations"),
        ({"reshape_activations": "hook_z"}, "has reshape_activations 'hook_z'"),
        ({"reshape_activations": "absent", "metadata": {"hook_name": "blocks.1.attn.hook_z"}}, "attention heads"),
        ({"finetuning_scaling_factor": True}, "has finetuning_scaling_factor 'True'"),
        ({"apply_b_dec_to_input": 1}, "has apply_b_dec_to_input '1'"),
        ({"d_in": D + 1}, f"says d_in {D + 1}, but its weights have {D}"),
        ({"x": [[[[[[[[[[1]]]]]]]]]]}, "is nested deeper"),
        ({"x": 10**30}, "holds more than plain values"),
        ({"x": "\ud800"}, "text that is not UTF-8"),
        ({"x": "y" * 2_000_000}, "cfg.json of more than"),
    ],
)
def test_what_would_give_other_latents_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as raised:
        read_foreign(save_saelens(tmp_path / "x", **changes))
    assert str(raised.value).isprintable()


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = save_saelens(tmp_path / "x")
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    whole, said = weights.read_bytes(), config.read_text()
    n_header = int.from_bytes(whole[:8], "little")
    many = json.dumps({str(n): {} for n in range(100)}).encode()
    tensors = dict(released_weights())
    cases: list[tuple[Path, bytes, str]] = [
        (weights, whole[:-1], "damaged sae_weights.safetensors"),
        (weights, whole[:3], "damaged sae_weights.safetensors"),
        (weights, struct.pack("<Q", 2**60) + whole[8:], "damaged sae_weights.safetensors"),
        (weights, whole[:8] + b"[" * n_header + whole[8 + n_header :], "damaged sae_weights.safetensors"),
        (weights, struct.pack("<Q", len(many)) + many, "has 100 tensors"),
        (weights, struct.pack("<Q", 2 << 20) + b"{}" + b" " * (2 << 20), "far more tensors than an SAE has"),
        (config, said[:-1].encode(), "cfg.json that is not JSON"),
        (config, b"[" * 100_000, "cfg.json that is not JSON"),
        (config, b"\xff", "cfg.json that is not JSON"),
        (config, b"[1]", "cfg.json that is not an object"),
    ]
    for path, content, words in cases:
        path.write_bytes(content)
        with pytest.raises(BadInput, match=words) as raised:
            read_foreign(folder)
        assert str(raised.value).isprintable()
        weights.write_bytes(whole)
        config.write_text(said)
    for change, words in (
        ({"W_enc": tensors["W_enc"].T.contiguous()}, "belong together"),
        ({"b_dec": torch.full((D,), float("nan"))}, "holds b_dec with numbers that are NaN"),
        ({"b_dec": torch.zeros(D, dtype=torch.int32)}, "no plain floating-point tensor as b_dec"),
        ({"threshold": torch.zeros(L)}, "holds threshold beside the weights"),
    ):
        save_file({**tensors, **change}, weights)
        with pytest.raises(BadInput, match=words):
            read_foreign(folder)
    for architecture, change, words in (
        ("jumprelu", {"threshold": torch.full((L,), float("nan"))}, "holds threshold with numbers that are NaN"),
        ("jumprelu", {"threshold": torch.full((L,), float("inf"))}, "holds threshold with numbers that are NaN or inf"),
        ("jumprelu", {"threshold": torch.ones(())}, r"holds .*threshold \(\).*belong together"),
        ("jumprelu", {"log_threshold": torch.ones(L)}, "holds log_threshold beside the weights of a jumprelu SAE"),
        ("gated", {"r_mag": torch.ones(L + 1)}, r"r_mag \(21,\).*\(L,\) of b_gate and b_mag and r_mag belong together"),
        ("gated", {"b_enc": torch.ones(L)}, "holds b_enc beside the weights of a gated SAE"),
    ):
        save_file({**saelens_weights(architecture), **change}, weights)
        config.write_text(json.dumps({**json.loads(said), "architecture": architecture}))
        with pytest.raises(BadInput, match=words):
            read_foreign(folder)
    # a fold that leaves what float32 holds
    save_file({**saelens_weights("gated"), "r_mag": torch.full((L,), 99.0)}, weights)
    config.write_text(json.dumps({**json.loads(said), "architecture": "gated", "apply_b_dec_to_input": False}))
    with pytest.raises(BadInput, match="holds b_mag with numbers that are NaN or infinite"):
        read_foreign(folder)
    weights.unlink()
    with pytest.raises(BadInput, match=r"has no sae_weights.safetensors; expected a .pt of CytoSAE"):
        read_foreign(folder)


# -------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("format", ["cytosae", "saelens"])
def test_out_and_in_again_changes_no_bit(made: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / ("x.pt" if format == "cytosae" else "x")
    assert export_sae(made / "run", out, format=format).was_complete is False
    header = import_sae(out, tmp_path / "run").header
    sae = load_sae(made / "run")
    assert_same_bits(tmp_path / "run", sae.model.state_dict())
    assert load_sae(tmp_path / "run").sha256 == sae.sha256
    assert header.spec["tokens"]["backbone"] is None  # what an export says is still a claim
    assert header.summary is not None
    says = header.summary["says"] if format == "cytosae" else header.summary["says"]["metadata"]
    assert says["cyto"]["tokens"] == sae.same_tokens
    assert says["cyto"]["sae_sha256"] == sae.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", out.name])


ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}


@pytest.mark.parametrize("activation", ARCHITECTURES)
def test_every_activation_has_a_saelens_architecture(tmp_path: Path, activation: str) -> None:
    run, out, tokens = run_of(tmp_path / "run", activation), tmp_path / "x", some_tokens()
    export_sae(run, out, format="saelens")
    config, weights = json.loads((out / "cfg.json").read_text()), load_file(out / "sae_weights.safetensors")
    names = {"jumprelu": {*NAMES, "threshold"}, "gated": {*NAMES, "b_gate", "r_mag", "b_mag"} - {"b_enc"}}
    assert config["architecture"] == ARCHITECTURES[activation]
    assert weights.keys() == names.get(ARCHITECTURES[activation], set(NAMES))
    assert (config.get("k"), config.get("rescale_acts_by_decoder_norm")) == ((K, False) * (activation == "topk")) or (
        activation != "topk"
    )
    expected = saelens_twin(out, tokens)
    assert_same_numbers(run, expected, tokens)
    if activation == "batchtopk":
        assert weights["threshold"].tolist() == [2.5] * L
    assert export_sae(run, out, format="saelens").was_complete is True

    import_sae(out, tmp_path / "again")
    assert_same_numbers(tmp_path / "again", expected, tokens)
    before, after = (load_sae(tmp_path / name).model.state_dict() for name in ("run", "again"))
    if activation != "batchtopk":
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before if name != "log_threshold")
    for name in sorted(weights):  # one bit of one number: something else
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(torch.int32).view(-1)[0] ^= 1
        save_file(changed, out / "sae_weights.safetensors")
        with pytest.raises(SpecMismatch, match="there already"):
            export_sae(run, out, format="saelens")


def test_an_infinite_threshold_leaves_as_the_largest_number(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "jumprelu", log_threshold=torch.full((L,), 500.0))
    export_sae(run, tmp_path / "x", format="saelens")
    import_sae(tmp_path / "x", tmp_path / "again")
    assert not load_sae(tmp_path / "again").model.encode(some_tokens()).any()


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "gated"])
def test_the_cytosae_layout_has_relu_only(tmp_path: Path, activation: str) -> None:
    words = f"has the activation {activation}, and the released CytoSAE code computes relu only; use --format saelens"
    with pytest.raises(BadInput, match=words):
        export_sae(run_of(tmp_path / "run", activation), tmp_path / "x.pt", format="cytosae")
    assert not (tmp_path / "x.pt").exists()


def test_equal_weights_under_another_activation_are_another_sae(tmp_path: Path) -> None:
    """Latents know their SAE by its SHA-256 alone, and k is in no tensor."""
    settings: list[dict[str, Any]] = [{}, {"architecture": "topk", "k": 4}, {"architecture": "topk", "k": 5}]
    for n, changes in enumerate(settings):
        import_sae(save_saelens(tmp_path / f"x{n}", **changes), tmp_path / f"r{n}")
    assert len({load_sae(tmp_path / f"r{n}").sha256 for n in range(3)}) == 3


def test_from_one_layout_through_the_other_and_back(tmp_path: Path) -> None:
    """CytoSAE, ours, SAELens, ours, CytoSAE, ours, CytoSAE: every weight stays, and so do the words; nothing grows."""
    weights = released_weights()
    import_sae(save_released(tmp_path / "0.pt"), tmp_path / "r0")
    export_sae(tmp_path / "r0", tmp_path / "1", format="saelens")
    import_sae(tmp_path / "1", tmp_path / "r1")
    export_sae(tmp_path / "r1", tmp_path / "2.pt", format="cytosae")
    import_sae(tmp_path / "2.pt", tmp_path / "r2")
    export_sae(tmp_path / "r2", tmp_path / "3.pt", format="cytosae")
    tokens = some_tokens()
    for run in ("r0", "r1", "r2"):
        assert_same_bits(tmp_path / run, weights)
    assert_same_numbers(tmp_path / "r0", saelens_twin(tmp_path / "1", tokens), tokens)
    said = json.loads((tmp_path / "1" / "cfg.json").read_text())["metadata"]["cyto"]["said_before"]
    assert said == read_foreign(tmp_path / "0.pt").says
    assert len((tmp_path / "3.pt").read_bytes()) <= len((tmp_path / "2.pt").read_bytes())
    for n in range(3, 9):  # what an export adds is not carried from one to the next
        import_sae(tmp_path / (f"{n}.pt" if n % 2 else str(n)), tmp_path / f"r{n}")
        format, out = ("saelens", str(n + 1)) if n % 2 else ("cytosae", f"{n + 1}.pt")
        export_sae(tmp_path / f"r{n}", tmp_path / out, format=format)
    assert_same_bits(tmp_path / "r8", weights)
    assert len((tmp_path / "9.pt").read_bytes()) == len((tmp_path / "7.pt").read_bytes())
    said = json.loads((tmp_path / "8" / "cfg.json").read_text())["metadata"]["cyto"]["said_before"]
    assert said["d_sae"] == L
    assert "cyto" not in said
    assert len((tmp_path / "8" / "cfg.json").read_text()) == len((tmp_path / "6" / "cfg.json").read_text())


def test_an_imported_config_comes_out_as_it_came_in(tmp_path: Path) -> None:
    import_sae(save_released(tmp_path / "in.pt"), tmp_path / "run")
    export_sae(tmp_path / "run", tmp_path / "out.pt", format="cytosae")
    before, after = (read_foreign(tmp_path / name) for name in ("in.pt", "out.pt"))
    assert after.says | before.says == after.says
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in NAMES)


def test_the_released_loader_takes_an_export(made: Path, tmp_path: Path) -> None:
    """Its steps, here: `Config(checkpoint["cfg"])` of a dict, the fields its class reads, strict names and shapes."""
    export_sae(made / "run", tmp_path / "x.pt", format="cytosae")
    checkpoint = torch.load(tmp_path / "x.pt", weights_only=True)  # so it is data only
    assert list(checkpoint) == ["cfg", "state_dict"]
    config = types.SimpleNamespace(**checkpoint["cfg"])
    assert not config.gated_sae
    assert config.dtype is torch.float32
    assert (config.block_layer, config.module_name) == (load_sae(made / "run").same_tokens["block"], "resid")
    assert (config.image_width, config.image_height, config.l1_coefficient) == (224, 224, 8e-5)
    module = nn.Module()
    for name, shape in {
        "W_enc": (config.d_in, config.d_sae),
        "b_enc": (config.d_sae,),
        "W_dec": (config.d_sae, config.d_in),
        "b_dec": (config.d_in,),
    }.items():
        setattr(module, name, nn.Parameter(torch.empty(shape, dtype=config.dtype)))
    module.load_state_dict(checkpoint["state_dict"])
    tokens = some_tokens(config.d_in)
    assert_same_numbers(made / "run", released_twin(dict(module.state_dict()), tokens), tokens)


def test_an_export_is_written_once_and_replaces_nothing(made: Path, copied: Path, tmp_path: Path) -> None:
    run = made / "run"
    import_sae(save_released(tmp_path / "other.pt"), tmp_path / "other")
    for format, name in (("cytosae", "x.pt"), ("saelens", "x")):
        out = tmp_path / "deep" / name
        assert export_sae(run, out, format=format).was_complete is False
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "deep").rglob("*")}
        assert export_sae(run, out, format=format).was_complete is True
        with pytest.raises(SpecMismatch, match=f"{name} is there already, and is not this SAE in the {format} layout"):
            export_sae(tmp_path / "other", out, format=format)
        with pytest.raises(SpecMismatch, match="there already"):
            export_sae(run, tmp_path / "other.pt", format="cytosae")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "deep").rglob("*")} == before
        (tmp_path / f"link{out.suffix}").symlink_to(tmp_path / "nowhere")
        with pytest.raises(SpecMismatch, match="is a link"):
            export_sae(run, tmp_path / f"link{out.suffix}", format=format)
        with pytest.raises(SpecMismatch, match="which holds our own SAE"):
            export_sae(copied / "run", copied / "run" / "in" / name, format=format)
    with pytest.raises(SpecMismatch, match="which holds our own SAE"):
        export_sae(copied / "run", copied / "run", format="saelens")
    with pytest.raises(BadInput, match=r"ends in .pt; found 'x.pth'"):
        export_sae(run, tmp_path / "x.pth", format="cytosae")


def test_only_the_very_same_export_counts_as_complete(tmp_path: Path) -> None:
    """Equal weights with another config, and an equal config with another weight, are something else."""
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        import_sae(
            save_released(tmp_path / f"{name}.pt", {"cfg": released_config(lr=lr), "state_dict": released_weights()}),
            tmp_path / name,
        )
    export_sae(tmp_path / "a", tmp_path / "x.pt", format="cytosae")
    with pytest.raises(SpecMismatch, match="there already"):
        export_sae(tmp_path / "b", tmp_path / "x.pt", format="cytosae")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["state_dict"]["b_dec"][0] += 1
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(SpecMismatch, match="there already"):
        export_sae(tmp_path / "a", tmp_path / "x.pt", format="cytosae")


def test_an_export_that_fails_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(interop, "write_json", full)
    monkeypatch.setattr(torch, "save", full)
    for format, name in (("cytosae", "x.pt"), ("saelens", "x")):
        with pytest.raises(OSError, match="No space"):
            export_sae(made / "run", tmp_path / name, format=format)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the run folder


def test_import_again_is_complete_and_other_sources_are_refused(tmp_path: Path) -> None:
    path = save_released(tmp_path / "x.pt")
    import_sae(path, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    renamed = path.rename(tmp_path / "y.pt")  # the content counts, not the name
    assert import_sae(renamed, tmp_path / "run").was_complete is True
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before
    other = released_weights(seed=1)
    save_released(tmp_path / "z.pt", {"cfg": released_config(), "state_dict": other})
    with pytest.raises(SpecMismatch, match="holds an SAE with other settings"):
        import_sae(tmp_path / "z.pt", tmp_path / "run")
    import_sae(tmp_path / "z.pt", tmp_path / "run", overwrite=True)
    assert_same_bits(tmp_path / "run", other)
    folder = save_saelens(tmp_path / "s")
    with pytest.raises(SpecMismatch, match="is or contains an input"):
        import_sae(folder, folder)


def test_an_import_that_was_cut_says_so_and_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_released(tmp_path / "x.pt")
    with monkeypatch.context() as patched:
        patched.setattr(interop, "save_sae", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_sae(path, tmp_path / "run")
    with pytest.raises(IncompleteStore, match="Run the same cyto sae import command again"):
        load_sae(tmp_path / "run")
    assert import_sae(path, tmp_path / "run").was_complete is False
    assert_same_bits(tmp_path / "run", released_weights())


# ------------------------------------------------------------------------------------------------------- encode


def test_encoding_needs_a_word_and_then_gives_the_same_latents(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The way of the released SAE, with our own in its place: what comes back must be the latents we had."""
    export_sae(made / "run", tmp_path / "x.pt", format="cytosae")
    import_sae(tmp_path / "x.pt", tmp_path / "run")
    acts = made / "acts.zarr"
    words = "does not say on which tokens it was trained .backbone, weights_sha256, block, .* --assume-compatible"
    with pytest.raises(SpecMismatch, match=words):
        encode(acts, tmp_path / "run", tmp_path / "l.zarr")
    assert not (tmp_path / "l.zarr").exists()
    encode(acts, tmp_path / "run", tmp_path / "l.zarr", assume_compatible=True)
    (record,) = caplog.records
    assert "does not say backbone, weights_sha256, block" in record.getMessage()
    assert "random-vit-tiny, block 2, assumed to fit" in record.getMessage()
    (logged,) = read_runs(tmp_path / "l.zarr")
    assert logged["assumed_equal"] == list(interop._UNKNOWN)
    before, after = (LatentStore(place) for place in (made / "latents.zarr", tmp_path / "l.zarr"))
    assert before.spec == after.spec
    for name in ("data", "indices", "indptr"):
        raw = [sorted((root / "X" / name / "c").iterdir()) for root in (made / "latents.zarr", tmp_path / "l.zarr")]
        assert [path.read_bytes() for path in raw[0]] == [path.read_bytes() for path in raw[1]]


def test_eval_and_fidelity_ask_for_the_same_word(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_sae(made / "run", tmp_path / "x", format="saelens")
    import_sae(tmp_path / "x", tmp_path / "run")

    def numbers(*arguments: object) -> dict[str, Any]:
        done = CliRunner().invoke(cli, [str(argument) for argument in (*arguments, "--json")])
        assert done.exit_code == 0, done.output
        values: dict[str, Any] = json.loads(done.stdout)
        return values

    acts, word = made / "acts.zarr", "--assume-compatible"
    commands = {run: ("sae", "eval", run, acts) for run in (made / "run", tmp_path / "run")}
    for run in list(commands):
        fidelity = ("cache", "fidelity", acts, "--root", made, "--sample", 2, "--workers", 1, "--sae", run)
        ours, theirs = numbers(*commands[made / "run"]), commands[tmp_path / "run"]
        if run == made / "run":
            ours_fidelity = numbers(*fidelity)
    for command in (theirs, fidelity):
        refused = CliRunner().invoke(cli, [str(argument) for argument in command])
        assert refused.exit_code == 1
        assert "does not say on which tokens it was trained" in refused.stderr
        assert f"add {word}" in refused.stderr
    assert caplog.records == []
    found, found_fidelity = numbers(*theirs, word), numbers(*fidelity, word)
    assert len(caplog.records) == 2
    assert found.pop("assumed_equal") == found_fidelity.pop("assumed_equal") == list(interop._UNKNOWN)
    assert ours.pop("assumed_equal") == ours_fidelity.pop("assumed_equal") == []
    assert found_fidelity == ours_fidelity
    for name in ("mse", "l0", "explained_variance", "n_tokens", "dead_fraction_whole"):
        assert found[name] == ours[name]


def test_the_word_excuses_what_is_unknown_and_nothing_else(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_sae(save_released(tmp_path / "x.pt"), tmp_path / "narrow")
    with pytest.raises(SpecMismatch, match="do not hold the same kind of tokens: width 6 against 192"):
        encode(made / "acts.zarr", tmp_path / "narrow", tmp_path / "l.zarr", assume_compatible=True)
    encode(made / "acts.zarr", made / "run", tmp_path / "l.zarr", assume_compatible=True)  # known: nothing to assume
    assert caplog.records == []
    assert "assumed_equal" not in read_runs(tmp_path / "l.zarr")[0]
    sae = json.loads((made / "run" / "sae.json").read_text())
    assert ActivationStore(made / "acts.zarr").spec.same_tokens == sae["spec"]["tokens"]


# ------------------------------------------------------------------------------------------------- the command line


def test_the_commands(made: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    path = save_released(
        tmp_path / "x.pt", {"cfg": released_config(model_name="a\x1b[31m"), "state_dict": released_weights()}
    )
    done = run("sae", "import", path, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert f"{L} latents (relu) on tokens of width {D}, from cytosae" in done.stdout
    assert "--assume-compatible" in done.stdout
    again = run("sae", "import", path, "-o", tmp_path / "run")
    assert "already complete" in again.stderr
    page = run("sae", "info", tmp_path / "run")
    assert page.exit_code == 0, page.output
    assert "not known: backbone, weights_sha256, block" in page.stdout
    assert r"says       model_name 'a\x1b[31m', block_layer -2" in page.stdout
    assert json.loads(run("sae", "info", tmp_path / "run", "--json").stdout)["summary"]["says"]["block_layer"] == -2
    for format, name in (("cytosae", "y.pt"), ("saelens", "y")):
        done = run("sae", "export", tmp_path / "run", "--format", format, "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
        assert f"in the {format} layout" in done.stdout
        assert (
            "already complete"
            in run("sae", "export", tmp_path / "run", "--format", format, "-o", tmp_path / name).stderr
        )
    folder = save_saelens(tmp_path / "t", architecture="topk", k=K)
    done = run("sae", "import", folder, "-o", tmp_path / "topk")
    assert f"{L} latents (topk, k {K}) on tokens" in done.stdout
    assert f"latents    {L} (topk, k {K}) on tokens of width {D}" in run("sae", "info", tmp_path / "topk").stdout
    bad = run("sae", "import", tmp_path / "nowhere.pt", "-o", tmp_path / "r")
    assert bad.exit_code == 1
    assert re.search(r"Error: .*nowhere.pt is not there; expected a .pt of CytoSAE", bad.stderr)
    assert not (tmp_path / "r").exists()
    refused = run("sae", "encode", made / "acts.zarr", tmp_path / "run", "-o", tmp_path / "l", "--assume-compatible")
    assert "width 6 against 192" in refused.stderr
    half = json.loads((tmp_path / "run" / "sae.json").read_text())
    (tmp_path / "run" / "sae.json").write_text(json.dumps({**half, "complete": False, "summary": None}))
    assert "(not finished)" in run("sae", "info", tmp_path / "run").stdout


# --------------------------------------------------------------------------------------------------- hostile files


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def with_pickle(raw: bytes, pickled: bytes, **records: bytes) -> bytes:
    """The archive with another pickle, and other records; checksums fit."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(entry, pickled if name == "data.pkl" else records.get(name, old.read(entry)))
    return out.getvalue()


def pickle_of(raw: bytes) -> bytes:
    with zipfile.ZipFile(BytesIO(raw)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def raw_file(folder: Path, content: Any = None, **options: Any) -> bytes:
    return save_released(folder / "made.pt", content, **options).read_bytes()


def config_pickled(value: bytes) -> bytes:
    """A pickle {"cfg": value, "state_dict": {}}."""
    return b"\x80\x02}(X\x03\0\0\0cfg" + value + b"X\x0a\0\0\0state_dict}u."


def hostile_files(folder: Path, canary: Path) -> dict[str, tuple[bytes, str]]:
    """name -> (content, words of the refusal)"""
    evil = Calls(os.system, f"touch {canary}")
    weights, whole = released_weights(), raw_file(folder)
    pickled = pickle_of(whole)
    n = struct.pack("<I", 2**31 - 1)

    def saved(cfg: Any = None, state: Any = None, **options: Any) -> bytes:
        cfg = released_config() if cfg is None else cfg
        return raw_file(folder, {"cfg": cfg, "state_dict": weights if state is None else state}, **options)

    def changed(**tensors: torch.Tensor) -> bytes:
        return saved(state={**weights, **tensors})

    def piped(value: bytes) -> bytes:
        return with_pickle(whole, config_pickled(value))

    def inside(value: bytes) -> bytes:
        return piped(b"}(X\1\0\0\0x" + value + b"u")

    legacy, compressed, twice = BytesIO(), BytesIO(whole), BytesIO(whole)
    torch.save({"cfg": {}, "state_dict": weights}, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(compressed, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("made/data/9", bytes(1 << 20))
    with warnings.catch_warnings(), zipfile.ZipFile(twice, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("made/data/0", b"")
    record = whole.index(weights["b_dec"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[record] ^= 1
    larger = bytearray(whole)
    at = whole.rindex(b"made/data/0") - 46  # its entry in the directory: sizes at 20 and 24
    larger[at + 20 : at + 28] = struct.pack("<II", 3 << 30, 3 << 30)
    two_levels = b"]q\1(" + b"K\1" * 1000 + b"eX\1\0\0\0y]q\2(" + b"h\1" * 20_000 + b"e"
    many_texts = b"]q\1(X\x50\xc3\0\0" + b"a" * 50_000 + b"q\2" + b"h\2" * 60_000 + b"e"
    one_by_one = b"}q\1(" + b"".join(b"X\4\0\0\0%04dN" % k for k in range(9000)) + b"u"
    many_builds = b"c" + MODULE.encode() + b"\nViTSAERunnerConfig\nq\2)\x81" + one_by_one + b"b" + b"h\1b" * 50_000
    return {
        # would execute
        "cfg": (saved(cfg={"x": evil}), "asks for 'posix.system'"),
        "weights": (changed(W_enc=evil), "asks for 'posix.system'"),  # type: ignore[arg-type]
        "field": (saved(cfg=released_config(x=evil)), "asks for 'posix.system'"),
        "hooks": (changed(W_enc=Calls(torch._utils._rebuild_parameter, evil, True, {})), "'posix.system'"),  # type: ignore[arg-type]
        "eval": (piped(b"cbuiltins\neval\n(X\1\0\0\x001tR"), "asks for 'builtins.eval'"),
        "getattr": (piped(b"c__builtin__\ngetattr\n(tR"), "asks for '__builtin__.getattr'"),
        "torch.load": (saved(cfg={"x": Calls(torch.load, "x")}), "asks for 'torch.serialization.load'"),
        "name in our package": (piped(b"cstores.files\nsha256_file\n(tR"), "asks for 'stores.files.sha256_file'"),
        "another config": (saved(cfg=released_config(config_class("src.models.config"))), "'src.models.config.ViTSAE"),
        "another class": (saved(cfg=released_config(config_class(name="Path"))), f"'{MODULE}.Path'"),
        "dots": (piped(b"c" + MODULE.encode() + b"\nConfig.__init__\n(tR"), "Config.__init__'"),
        "called config": (piped(b"c" + MODULE.encode() + b"\nConfig\n(tR"), f"calls {MODULE}.Config with 0"),
        "config with arguments": (piped(b"c" + MODULE.encode() + b"\nConfig\n(K\1t\x81"), "wants to make"),
        "called dtype": (piped(b"ctorch\nfloat32\n(tR"), "calls torch.float32"),
        "stack global": (
            with_pickle(whole, pickle.dumps(evil, 4)),
            r"pickle holds more than torch.save writes \(PROTO\)",
        ),
        "inst": (piped(b"(X\1\0\0\x001ios\nsystem\n"), r"more than torch.save writes \(INST\)"),
        "obj": (piped(b"(cos\nsystem\no"), "asks for 'os.system'"),
        "extension": (piped(b"\x82\1"), r"\(EXT1\)"),
        "persistent text": (piped(b"Pxyz\n"), r"\(PERSID\)"),
        "state of a dict": (saved(state=Calls(dict, state={"x": 1})), "asks for '__builtin__.dict'"),
        "state of an ordered dict": (piped(b"ccollections\nOrderedDict\n)R}(X\1\0\0\0xK\1ub"), "sets fields of more"),
        "bytearray of 100 GB": (piped(b"c__builtin__\nbytearray\n(\x8a\x05\0\0\0\0\x19tR"), "'__builtin__.bytearray'"),
        # would take far more than their size
        "deflated": (compressed.getvalue(), "has a compressed record"),
        "long text": (piped(b"X" + n), "is no whole archive"),
        "long number": (piped(b"\x8b" + n), "is no whole archive"),
        "huge memo": (piped(b"Nr" + n), "is no whole archive|plain values|no state_dict|no config"),
        "list in itself": (inside(b"]q\1(h\1e"), "nested deeper"),
        "20 million numbers": (inside(two_levels), "nested deeper, or is larger"),
        "3 GB of text": (inside(many_texts), "nested deeper, or is larger"),
        "nested": (inside(b"]" * 50_000 + b"a" * 49_999), "nested deeper"),
        "nested tuples": (piped(b")" + b"\x85" * 100_000), "no config beside"),
        "tuple as a key": (piped(b"}(" + b")" + b"\x85" * 100_000 + b"K\1u"), "puts a tuple where a str belongs"),
        "one state for all": (piped(many_builds), "holds no state_dict|lacks W_enc"),
        "large pickle": (with_pickle(whole, bytes(300_000)), "has a pickle of 300,000 bytes, far more than an SAE"),
        "one number for all": (
            changed(W_enc=torch.zeros(1).expand(D, L)),
            r"holds W_enc of shape \(6, 20\) as a view \(strides \(0, 0\), from 0\) of 1 numbers",
        ),
        "part of more": (changed(b_dec=torch.zeros(5000)[7 : 7 + D]), r"as a view \(strides \(1,\), from 7\) of 5,000"),
        "negative stride": (
            with_pickle(whole, pickled.replace(b"K\x14K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", 1)),
            "calls torch._utils._rebuild_tensor_v2",
        ),
        "larger than the file": (bytes(larger), "lists a record that is larger than the whole file"),
        "twice": (twice.getvalue(), "lists the same record twice"),
        # are something else
        "empty": (b"", "is cut off, or was not written by torch.save"),
        "legacy": (legacy.getvalue(), "is cut off, or was not written by torch.save"),
        "cut": (whole[:-1], "is cut off"),
        "one bit": (bytes(flipped), "is no whole archive of torch.save .Bad CRC-32"),
        "short record": (
            with_pickle(whole, pickled, **{"data/1": b"1234"}),
            "should have 80 bytes in its record '1'; found 4",
        ),
        "big-endian": (with_pickle(whole, pickled, byteorder=b"big"), "big-endian"),
        "tensor alone": (raw_file(folder, torch.zeros(3)), r"holds no state_dict \(found: Tensor\)"),
        "no config": (raw_file(folder, {"state_dict": weights}), "holds no config"),
        "no state": (raw_file(folder, {"cfg": {}, "model": {}}), r"holds no state_dict \(found: cfg, model\)"),
        "gated": (changed(r_mag=torch.zeros(L), b_mag=torch.zeros(L)), "holds a gated SAE"),
        "gated by its config": (saved(cfg=released_config(gated_sae=True)), "holds a gated SAE"),
        "one missing": (saved(state={"W_enc": weights["W_enc"]}), "lacks b_enc, W_dec, b_dec; found W_enc"),
        "one more": (changed(threshold=torch.zeros(L)), "holds threshold beside"),
        "bias per position": (changed(b_dec=torch.zeros(257, D)), r"holds b_dec \(257, 6\): one bias per position"),
        "transposed": (changed(W_enc=torch.zeros(L, D)), r"holds W_enc \(20, 6\)"),
        "no latents": (changed(W_enc=torch.zeros(D, 0), b_enc=torch.zeros(0), W_dec=torch.zeros(0, D)), "W_enc"),
        "vector": (changed(W_enc=torch.zeros(D)), r"holds W_enc \(6,\)"),
        "NaN": (changed(b_enc=torch.full((L,), float("nan"))), "holds b_enc with numbers that are NaN"),
        "overflow": (
            changed(b_enc=torch.full((L,), 1e300, dtype=torch.float64)),
            "holds b_enc with numbers that are NaN",
        ),
        "whole numbers": (changed(b_enc=torch.zeros(L, dtype=torch.int32)), "asks for 'torch.IntStorage'"),
        "complex": (changed(b_enc=torch.zeros(L, dtype=torch.complex64)), "asks for 'torch.ComplexFloatStorage'"),
        "sparse": (changed(b_enc=torch.zeros(L).to_sparse()), "asks for 'torch._utils._rebuild_sparse_tensor'"),
        "text": (changed(b_enc="zeros"), "no plain floating-point tensor as b_enc"),  # type: ignore[arg-type]
        "another width": (saved(cfg=released_config(d_in=768)), "says d_in 768, but its weights have 6"),
        "tensor in the config": (saved(cfg={"x": torch.zeros(2)}), "its config holds more than plain values"),
        "large number": (saved(cfg={"x": 2**64}), "its config holds more than plain values"),
        "no text": (inside(b"X\3\0\0\0\xed\xa0\x80"), "is no whole archive"),
        "number as a key": (saved(cfg={1: 2}), "puts a int where a str belongs"),
    }


LOADER = """
import json, resource, sys, time
from pathlib import Path
import torch
from cytosae.interop import read_foreign
from stores.errors import BadInput

def megabytes(what):
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith(what))

read_foreign(Path(sys.argv[2]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, began, error = megabytes("VmRSS"), time.monotonic(), None
    try:
        read_foreign(path)
    except BadInput as refused:
        error = str(refused)
    told = {"name": path.name, "error": error, "s": time.monotonic() - began, "grew_mb": megabytes("VmHWM") - before}
    print(json.dumps(told), flush=True)
print(json.dumps([name for name in sys.modules if "sae_training" in name]))
"""


@pytest.mark.stress
def test_hostile_files_are_refused_by_name_and_none_is_executed(tmp_path: Path) -> None:
    """In a process of its own, with little memory to spare: each costs seconds and megabytes at most."""
    canary = tmp_path / "canary"
    files = hostile_files(tmp_path, canary)
    (tmp_path / "files").mkdir()
    for name, (content, _) in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    assert not canary.exists()
    command = [sys.executable, "-c", LOADER, str(tmp_path / "files"), str(save_released(tmp_path / "good.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    *lines, modules = [json.loads(line) for line in done.stdout.splitlines()]
    assert modules == []
    told = {line["name"]: line for line in lines}
    assert told.keys() == files.keys()
    for name, (_, words) in files.items():
        one = told[name]
        assert one["error"] is not None, one
        assert re.search(words, one["error"]), one
        assert one["error"].isprintable(), one
        assert one["error"].endswith(interop._EXPECTED)
        assert len(one["error"]) < 700
        assert one["s"] < 5, one
        assert one["grew_mb"] < 150, one
    assert not canary.exists()


def test_the_hostile_files_are_hostile(tmp_path: Path) -> None:
    """Loaded without care, the first of them does what it wants: the tests above would notice an execution."""
    canary = tmp_path / "canary"
    (tmp_path / "x.pt").write_bytes(hostile_files(tmp_path, canary)["cfg"][0])
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert canary.exists()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_changed_pickle_brings_anything_but_numbers_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the pickle changed at random, its checksum made to fit."""
    folder = tmp_path_factory.getbasetemp() / "changed"
    folder.mkdir(exist_ok=True)
    whole = (folder / "made.pt").read_bytes() if (folder / "made.pt").exists() else raw_file(folder)
    pickled = bytearray(pickle_of(whole))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pickled) - 1))
        pickled[at] = data.draw(st.sampled_from([*b"})](tuaesbR\x81QNh.\x85\x86\x87", *range(256)]))
    (folder / "x.pt").write_bytes(with_pickle(whole, bytes(pickled)))
    try:
        foreign = read_foreign(folder / "x.pt")
    except BadInput:
        return
    json.dumps(foreign.says, allow_nan=False).encode()
    assert {name: tuple(value.shape) for name, value in foreign.weights.items()} == {
        "W_enc": (D, L),
        "b_enc": (L,),
        "W_dec": (L, D),
        "b_dec": (D,),
    }
    assert all(torch.isfinite(value).all() for value in foreign.weights.values())


def test_damage_anywhere_is_seen_or_harmless(tmp_path: Path) -> None:
    whole = raw_file(tmp_path)
    weights, rng, n_read = released_weights(), np.random.default_rng(0), 0
    for at in rng.choice(len(whole), 150, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.pt").write_bytes(bytes(damaged))
        try:
            foreign = read_foreign(tmp_path / "x.pt")
        except BadInput:
            continue
        n_read += 1
        assert all(torch.equal(foreign.weights[name], weights[name]) for name in NAMES)
    assert 0 < n_read < 100  # padding, names and times of records that are not asked for


def test_a_pickle_that_does_not_end_is_no_checkpoint() -> None:
    with pytest.raises(ValueError, match="exhausted"):
        read_pickle(b"\x80\x02}", classes=frozenset())


# ------------------------------------------------------------------------------------ against the sae-lens package


@pytest.fixture
def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens", reason="needs the package sae-lens, which is none of our dependencies")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sae_lens_reads_an_export_and_agrees(sae_lens: Any, made: Path, tmp_path: Path) -> None:
    export_sae(made / "run", tmp_path / "x", format="saelens")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "x"))
    ours = load_sae(made / "run").model
    assert type(theirs).__name__ == "StandardSAE"
    for name in NAMES:
        assert torch.equal(getattr(theirs, name).detach(), getattr(ours, name))
    store = ActivationStore(made / "acts.zarr")
    tokens = torch.from_numpy(store.read_images([0, 1, 2]).astype(np.float32)).reshape(-1, ours.width)
    with torch.no_grad():
        latents, back = theirs.encode(tokens), theirs(tokens)
    assert (latents > 0).any()
    assert (latents - ours.encode(tokens)).abs().max() <= 1e-5 * latents.abs().max()
    assert (back - ours(tokens)).abs().max() <= 1e-5 * back.abs().max()
    assert theirs.cfg.metadata.model_name == "random-vit-tiny"
    assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("activation", ARCHITECTURES)
def test_sae_lens_agrees_about_every_activation(sae_lens: Any, tmp_path: Path, activation: str) -> None:
    run = run_of(tmp_path / "run", activation)
    export_sae(run, tmp_path / "x", format="saelens")
    theirs, ours, tokens = sae_lens.SAE.load_from_disk(str(tmp_path / "x")), load_sae(run).model, some_tokens()
    assert type(theirs).__name__.lower() == f"{ARCHITECTURES[activation]}sae"
    with torch.no_grad():
        latents = theirs.encode(tokens)
        assert torch.equal(latents > 0, ours.encode(tokens) > 0)
        assert torch.allclose(latents, ours.encode(tokens), rtol=1e-5, atol=1e-5)
        assert torch.allclose(theirs(tokens), ours(tokens), rtol=1e-5, atol=1e-4)
    if activation == "topk":
        assert (theirs.cfg.k, theirs.cfg.rescale_acts_by_decoder_norm) == (K, False)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize("architecture", ["Standard", "TopK", "TopK rescaled", "JumpReLU", "Gated"])
def test_what_sae_lens_saves_is_imported_and_agrees(
    sae_lens: Any, tmp_path: Path, architecture: str, subtracted: bool
) -> None:
    architecture, _, rescaled = architecture.partition(" ")
    settings = {"k": K, "rescale_acts_by_decoder_norm": bool(rescaled)} if architecture == "TopK" else {}
    config = getattr(sae_lens, f"{architecture}SAEConfig")(d_in=D, d_sae=L, apply_b_dec_to_input=subtracted, **settings)
    theirs = getattr(sae_lens, f"{architecture}SAE")(config)
    weights = saelens_weights(architecture.lower())
    if rescaled:
        weights["W_dec"] *= torch.linspace(0.2, 3, L)[:, None]
    theirs.load_state_dict(weights)
    theirs.save_model(str(tmp_path / "x"))
    import_sae(tmp_path / "x", tmp_path / "run")
    tokens = some_tokens()
    with torch.no_grad():
        expected = theirs.encode(tokens), theirs(tokens)
        assert_same_numbers(tmp_path / "run", expected, tokens)
        for found, wanted in zip(saelens_twin(tmp_path / "x", tokens), expected, strict=True):  # the twin is right too
            assert torch.allclose(found.float(), wanted, rtol=1e-5, atol=1e-4)
    export_sae(tmp_path / "run", tmp_path / "y", format="saelens")
    again = sae_lens.SAE.load_from_disk(str(tmp_path / "y"))
    with torch.no_grad():
        assert torch.allclose(again(tokens), theirs(tokens), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_trained_batchtopk_of_sae_lens_is_imported(sae_lens: Any, tmp_path: Path) -> None:
    """It is saved for inference as jumprelu; as a checkpoint of training it is refused by name."""
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=L, k=K, rescale_acts_by_decoder_norm=True)
    theirs = sae_lens.BatchTopKTrainingSAE(config)
    weights = saelens_weights("standard")
    weights["W_dec"] *= torch.linspace(0.2, 3, L)[:, None]
    theirs.load_state_dict({**weights, "topk_threshold": torch.tensor(2.0, dtype=torch.double)})
    theirs.save_inference_model(str(tmp_path / "x"))
    header = import_sae(tmp_path / "x", tmp_path / "run").header
    assert header.spec["activation"] == "jumprelu"
    saved, tokens = sae_lens.SAE.load_from_disk(str(tmp_path / "x")), some_tokens()
    with torch.no_grad():
        assert_same_numbers(tmp_path / "run", (saved.encode(tokens), saved(tokens)), tokens)
    theirs.save_model(str(tmp_path / "y"))
    with pytest.raises(BadInput, match="has architecture 'batchtopk'"):
        read_foreign(tmp_path / "y")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sae_lens_reads_a_topk_from_before_version_6_as_we_do(sae_lens: Any, tmp_path: Path) -> None:
    folder, tokens = save_saelens(tmp_path / "x", **{**old_topk("standard"), "device": "cpu"}), some_tokens()
    import_sae(folder, tmp_path / "run")
    theirs = sae_lens.SAE.load_from_disk(str(folder))
    with torch.no_grad():
        assert_same_numbers(tmp_path / "run", (theirs.encode(tokens), theirs(tokens)), tokens)
