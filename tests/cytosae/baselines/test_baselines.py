"""Baselines as folders: ordinary SAEs with the data, latents and L0 of the SAE that they are like."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import ACTIVE, N_ATOMS, WIDTH, planted_cache, planted_config, planted_sae
from token_caches import write_cache

from cytosae.baselines import KINDS, BaselineConfig, write_baseline
from cytosae.baselines.reference import kind_of
from cytosae.latents.encode import encode
from cytosae.relations import write_stability
from cytosae.sae import load_sae, make_config, save_sae
from cytosae.training import sae_info
from cytosae.training.evaluate import evaluate
from cytosae.training.train import train
from stores import SAE, LatentStore, new_header, read_image_ids
from stores.errors import BadInput, SpecMismatch
from stores.verify_any import verify_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(cache, SAE)"""
    root = tmp_path_factory.mktemp("planted")
    cache = planted_cache(root / "acts.zarr")
    return cache, planted_sae(root / "sae", cache)


@pytest.mark.stress
@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_is_an_ordinary_sae(kind: str, planted: tuple[Path, Path], tmp_path: Path) -> None:
    cache, sae = planted
    lines: list[str] = []
    done = write_baseline([cache], tmp_path / "b", BaselineConfig(kind=kind), like=sae, say=lines.append)
    assert kind_of(done.header) == kind
    assert any(line.startswith(("plan:", "budget:")) for line in lines)
    assert verify_folder(tmp_path / "b").is_whole
    assert kind in str(sae_info(tmp_path / "b")).replace("frozen ", "frozen-")
    ours, theirs = (sorted(read_image_ids(run / "held_out.parquet")) for run in (tmp_path / "b", sae))
    assert ours == theirs
    assert len(ours) > 50
    assert done.header.spec["caches"] == load_sae(sae).header.spec["caches"]
    found = evaluate(cache, tmp_path / "b", only=ours)
    assert (found.n_held_out, found.n_trained_on) == (len(ours), 0)
    assert found.n_latents == {"neurons": 2 * WIDTH, "nmf": WIDTH}.get(kind, N_ATOMS)
    assert found.l0 <= 1 if kind == "kmeans" else found.l0 == pytest.approx(ACTIVE, abs=0.05)
    assert found.explained_variance > (-0.01 if kind in ("random", "neurons") else 0.05)
    held_out = (done.header.summary or {})["held_out"]
    assert held_out["explained_variance"] == pytest.approx(found.explained_variance, abs=1e-6)
    assert encode(cache, tmp_path / "b", tmp_path / "latents.zarr").is_complete
    assert LatentStore(tmp_path / "latents.zarr").nnz > 0

    again = write_baseline([cache], tmp_path / "b", BaselineConfig(kind=kind), like=sae)
    assert again.was_complete
    assert again.header.identity == done.header.identity
    weights = (tmp_path / "b" / "sae.safetensors").read_bytes()
    write_baseline([cache], tmp_path / "twice", BaselineConfig(kind=kind), like=sae)
    assert weights == (tmp_path / "twice" / "sae.safetensors").read_bytes()
    write_baseline([cache], tmp_path / "other", BaselineConfig(kind=kind, seed=5), like=sae)
    is_drawn = kind not in ("pca", "neurons")
    assert (weights != (tmp_path / "other" / "sae.safetensors").read_bytes()) == is_drawn
    assert sorted(read_image_ids(tmp_path / "other" / "held_out.parquet")) == theirs


@pytest.mark.stress
@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_frozen_matrix_keeps_its_initial_value(
    frozen: str, activation: str, planted: tuple[Path, Path], tmp_path: Path
) -> None:
    cache, sae = planted
    like = sae
    if activation == "relu":
        settings = {"target_l0": 6.0, "dead_latents": "resample", "resample_every": 100, "tokens": 128 * 1200}
        settings["schedule"] = "linear"  # at a constant learning rate L0 swings around 6 to the end (docs/log.md)
        config = planted_config(activation="relu", k=None, **settings)
        like = train([cache], tmp_path / "relu", config).out
    l0 = (load_sae(like).header.summary or {})["held_out"]["l0"]
    made = write_baseline([cache], tmp_path / "f", BaselineConfig(kind=f"frozen-{frozen}"), like=like)
    write_baseline([cache], tmp_path / "r", BaselineConfig(kind="random"), like=like)
    trained, random = (load_sae(tmp_path / name).model for name in "fr")
    name = "W_enc" if frozen == "encoder" else "W_dec"
    other = "W_dec" if frozen == "encoder" else "W_enc"

    def directions(weight: torch.Tensor) -> torch.Tensor:
        rows = weight if weight.shape[1] == WIDTH else weight.T
        return rows / rows.norm(dim=1, keepdim=True)

    cosines = {
        key: (directions(getattr(trained, key)) * directions(getattr(random, key))).sum(1) for key in (name, other)
    }
    assert cosines[name].min() > 1 - 1e-5  # up to the rounding of rows that are scaled to norm 1
    assert cosines[other].min() < 0.97
    spec = made.header.spec
    assert spec["config"]["frozen"] == frozen
    assert spec["resolved"]["order_seed"] == 0
    assert (made.header.summary or {})["tokens"] == (load_sae(like).header.summary or {})["tokens"]
    assert (made.header.summary or {})["held_out"]["l0"] == pytest.approx(l0, rel=0.35)


def test_frozen_is_no_setting_of_before(planted: tuple[Path, Path], tmp_path: Path) -> None:
    config = planted_config()
    assert "frozen" not in config.to_spec()
    assert "frozen" in dataclasses.replace(config, frozen="decoder").to_spec()
    with pytest.raises(BadInput, match="gives both matrices new weights, and one is frozen"):
        planted_config(frozen="decoder", dead_latents="resample")


def test_the_untrained_sae_is_the_beginning_of_the_run(planted: tuple[Path, Path], tmp_path: Path) -> None:
    """A run of one step with no learning rate to speak of has the matrices of `random`."""
    cache, _ = planted
    config = planted_config(tokens=128, lr=1e-12, seed=4, order_seed=0)
    begun = train([cache], tmp_path / "begun", config).out
    write_baseline([cache], tmp_path / "random", BaselineConfig(kind="random"), like=begun)
    ours, theirs = load_sae(tmp_path / "random").model, load_sae(begun).model
    assert torch.allclose(ours.W_enc, theirs.W_enc, atol=1e-6)
    scale = (load_sae(tmp_path / "random").header.summary or {})["scale"]
    assert torch.allclose(ours.W_dec, scale * theirs.W_dec, atol=1e-6)
    assert torch.allclose(ours.b_dec, theirs.b_dec, atol=1e-5)
    with pytest.raises(BadInput, match=r"were trained from one seed \(4\)"):
        write_stability([tmp_path / "random", begun], tmp_path / "stability")


def test_it_is_like_settings_where_there_is_no_sae(planted: tuple[Path, Path], tmp_path: Path) -> None:
    settings = planted_config(k=7)
    done = write_baseline([planted[0]], tmp_path / "b", BaselineConfig(kind="pca"), settings=settings)
    assert done.header.spec["k"] == 7
    assert done.header.spec["baseline"]["like"] is None
    by_data = write_baseline([planted[0]], tmp_path / "c", BaselineConfig(kind="pca"))
    assert by_data.header.spec["k"] == 6  # an eighth of the latents, of which so few tokens allow 48
    fixed = make_config(options={"l1": 1e-3})
    with pytest.raises(BadInput, match=r"which a fixed l1 does not tell; give that SAE \(--like RUN\)"):
        write_baseline([planted[0]], tmp_path / "d", BaselineConfig(kind="pca"), settings=fixed)


def test_other_data_are_refused(planted: tuple[Path, Path], tmp_path: Path) -> None:
    cache, sae = planted
    tokens = np.random.default_rng(0).normal(2, 1, (40, 8, WIDTH)).astype(np.float16)
    other = write_cache(tmp_path / "other.zarr", tokens, patients=[f"P{number % 9}" for number in range(40)])
    with pytest.raises(SpecMismatch, match=r"was trained on other data \(.*\); give the caches that it was trained on"):
        write_baseline([other], tmp_path / "b", BaselineConfig(kind="pca"), like=sae)
    with pytest.raises(SpecMismatch, match="the same --exclude"):
        write_baseline([cache], tmp_path / "b", BaselineConfig(kind="pca"), like=sae, exclude=["synthetic/000.png"])
    write_baseline([cache], tmp_path / "b", BaselineConfig(kind="pca"), like=sae)
    with pytest.raises(BadInput, match=r"is itself a baseline \(pca\); give the SAE that it is like"):
        write_baseline([cache], tmp_path / "c", BaselineConfig(kind="pca"), like=tmp_path / "b")
    with pytest.raises(SpecMismatch, match="with other settings"):
        write_baseline([cache], tmp_path / "b", BaselineConfig(kind="ica"), like=sae)


def test_an_imported_sae_needs_to_be_assumed(planted: tuple[Path, Path], tmp_path: Path) -> None:
    cache, sae = planted
    imported = tmp_path / "imported"
    imported.mkdir()
    header = json.loads((sae / "sae.json").read_text())
    spec = header["spec"]
    unknown = {name: None for name in spec["tokens"] if name != "width"}
    spec = {name: spec[name] for name in ("width", "n_latents", "activation", "k")} | {
        "tokens": {**spec["tokens"], **unknown},
        "trained_backbone": None,
        "caches": [],
        "imported": {"format": "saelens", "files": {"weights": "0" * 64}},
    }
    save_sae(imported, load_sae(sae).model, new_header(SAE, spec), {"says": {}, "notes": []})
    with pytest.raises(SpecMismatch, match="--assume-compatible"):
        write_baseline([cache], tmp_path / "b", BaselineConfig(kind="pca"), like=imported)
    done = write_baseline([cache], tmp_path / "b", BaselineConfig(kind="pca"), like=imported, assume_compatible=True)
    assert done.header.spec["k"] == ACTIVE  # measured on the tokens
    config = BaselineConfig(kind="frozen-decoder")
    with pytest.raises(BadInput, match="is imported and does not say how it was trained"):
        write_baseline([cache], tmp_path / "c", config, like=imported, assume_compatible=True)


def test_settings_out_of_range() -> None:
    with pytest.raises(BadInput, match="kind must be one of random, frozen-decoder"):
        BaselineConfig(kind="svd")
    with pytest.raises(BadInput, match="components are those of pca, ica and nmf"):
        BaselineConfig(kind="tokens", components=3)
    with pytest.raises(BadInput, match="iterations are those of ica and nmf; pca has none, leave them out"):
        BaselineConfig(kind="pca", iterations=3)
    assert BaselineConfig(kind="nmf", iterations=3).iterations == 3
    with pytest.raises(BadInput, match="frozen-decoder is trained on as many tokens as the SAE, not on a sample"):
        BaselineConfig(kind="frozen-decoder", sample_tokens=100)


def test_components_that_were_asked_for_are_not_called_the_most(planted: tuple[Path, Path], tmp_path: Path) -> None:
    cache, sae = planted
    done = write_baseline([cache], tmp_path / "b", BaselineConfig(kind="pca", components=3), like=sae)
    assert f"pca has 6 latents; the SAE has {load_sae(sae).model.n_latents:,}" in [*done.lines()]
    with pytest.raises(BadInput, match="sample_tokens must be at least 1; found 0"):
        BaselineConfig(kind="pca", sample_tokens=0)
