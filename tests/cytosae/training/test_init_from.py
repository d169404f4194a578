"""A run that goes on from an existing or imported SAE."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from places import ROOT
from token_caches import write_cache
from training_runs import BATCH, SETTINGS, tokens_of_cells

from cli import cli
from cytosae.sae import export_sae, import_sae, load_sae, make_config
from cytosae.training import init_settings
from cytosae.training.evaluate import evaluate
from cytosae.training.train import train
from stores import BadInput, SpecMismatch

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"activation": "topk", "k": 6},
    "batchtopk": {"activation": "batchtopk", "k": 6},
    "jumprelu": {"activation": "jumprelu", "jump_threshold": 0.1, "jump_bandwidth": 0.1},
    "gated": {"activation": "gated"},
}


def small(kind: str, *, steps: int = 12, **changes: Any) -> Any:
    return make_config(options={**SETTINGS, "tokens": steps * BATCH, **KINDS[kind], **changes})


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("caches")
    return [write_cache(root / f"{seed}.zarr", tokens_of_cells(seed)) for seed in (3, 4)]


@pytest.mark.parametrize("scale", ["none", "sqrt-width"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_where_the_other_ended(kind: str, scale: str, caches: list[Path], tmp_path: Path) -> None:
    """With a step that changes nothing the weights are those of before; with real steps the loss begins lower."""
    train(caches[:1], tmp_path / "first", small(kind, steps=60, token_scale=scale))
    still = small(kind, steps=1, lr=1e-30, token_scale=scale)
    train(caches[1:], tmp_path / "still", still, init_from=tmp_path / "first")
    before, after = load_sae(tmp_path / "first"), load_sae(tmp_path / "still")
    for name, value in before.model.state_dict().items():
        if name != "threshold":  # of batchtopk: measured on the new batch
            torch.testing.assert_close(after.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert after.header.spec["init_from"] == {"identity": before.header.identity, "sae_sha256": before.sha256}

    config = small(kind, token_scale=scale)
    anew = train(caches[:1], tmp_path / "anew", config)
    on = train(caches[:1], tmp_path / "on", config, init_from=tmp_path / "first")
    losses = [pq.read_table(tmp_path / name / "metrics.parquet")["loss"].to_pylist() for name in ("anew", "on")]
    assert losses[1][0] < losses[0][0]
    assert anew.identity != on.identity


def test_thresholds_stay_where_l0_is_steered(caches: list[Path], tmp_path: Path) -> None:
    """A new jumprelu gets its first thresholds from the tokens; one that was trained has its own."""
    steered = {name: value for name, value in SETTINGS.items() if name != "l1"} | {
        "activation": "jumprelu",
        "target_l0": 6.0,
    }
    train(caches[:1], tmp_path / "first", make_config(options={**steered, "tokens": 30 * BATCH}))
    still = make_config(options={**steered, "tokens": BATCH, "lr": 1e-30})
    train(caches[:1], tmp_path / "still", still, init_from=tmp_path / "first")
    before, after = (load_sae(tmp_path / name).model.log_threshold for name in ("first", "still"))
    assert before.std() > 0
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_interrupted_and_continued_equals_never_stopped(caches: list[Path], tmp_path: Path) -> None:
    train(caches[:1], tmp_path / "first", small("topk"))
    config, first = small("topk"), tmp_path / "first"
    train(caches[1:], tmp_path / "whole", config, init_from=first)

    def interrupt(done: int, total: int, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(caches[1:], tmp_path / "cut", config, init_from=first, progress=interrupt)
    with pytest.raises(SpecMismatch):  # without the SAE to go on from it is another run
        train(caches[1:], tmp_path / "cut", config)
    report = train(caches[1:], tmp_path / "cut", config, init_from=first)
    assert (tmp_path / "cut" / "sae.safetensors").read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()
    assert load_sae(first).sha256[:16] in str(report)


def test_images_of_before_are_never_called_held_out(caches: list[Path], tmp_path: Path) -> None:
    """First trained on all of a cache, then on three quarters of it: the last quarter was seen all the same."""
    cache = caches[0]
    train([cache], tmp_path / "first", small("relu"))
    config = dataclasses.replace(small("relu"), holdout=0.25)
    alone = train([cache], tmp_path / "alone", config)
    assert evaluate(cache, tmp_path / "alone").n_held_out == 6
    assert not any("held-out" in warning for warning in alone.warnings)
    on = train([cache], tmp_path / "on", config, init_from=tmp_path / "first")
    found = evaluate(cache, tmp_path / "on")
    assert (found.n_known, found.n_trained_on, found.n_held_out) == (24, 24, 0)
    assert on.warnings[-1] == "6 held-out images were trained on by the SAE that this one goes on from"

    export_sae(tmp_path / "first", tmp_path / "first.pt", format="cytosae")
    import_sae(tmp_path / "first.pt", tmp_path / "foreign")  # which does not say what it was trained on
    with pytest.raises(SpecMismatch, match="--assume-compatible"):
        train([cache], tmp_path / "from", config, init_from=tmp_path / "foreign")
    train([cache], tmp_path / "from", config, init_from=tmp_path / "foreign", assume_compatible=True)
    found = evaluate(cache, tmp_path / "from")
    assert (found.n_known, found.n_held_out) == (18, 0)


def test_the_command_takes_the_shape_of_the_sae(caches: list[Path], tmp_path: Path) -> None:
    train(caches[:1], tmp_path / "first", small("topk"))
    assert init_settings(tmp_path / "first") == {"activation": "topk", "expansion": 8, "k": 6}

    def run(*more: Any) -> Any:
        arguments = ["sae", "train", caches[1], "-o", tmp_path / "run", "--init-from", tmp_path / "first"]
        arguments += ["--tokens", 40, "--batch-tokens", 10, "--device", "cpu", *more]
        return CliRunner().invoke(cli, [str(part) for part in arguments])

    for more, words in (
        (("--expansion", 4), "the SAE to go on from has expansion 8; found expansion 4. Leave it out"),
        (("--activation", "relu"), "the SAE to go on from has activation topk; found activation relu"),
    ):
        refused = run(*more)
        assert refused.exit_code == 1
        assert words in refused.output
    done = run("--k", 3)
    assert done.exit_code == 0, done.output
    spec = json.loads((tmp_path / "run" / "sae.json").read_text())["spec"]
    assert (spec["activation"], spec["k"], spec["n_latents"]) == ("topk", 3, 64)
    page = CliRunner().invoke(cli, ["sae", "info", str(tmp_path / "run")]).stdout
    assert f"begun from sha256 {load_sae(tmp_path / 'first').sha256}" in page
    same = CliRunner().invoke(cli, ["sae", "train", str(caches[0]), "-o", str(tmp_path / "first"), "--overwrite",
        "--init-from", str(tmp_path / "first"), "--tokens", "40", "--batch-tokens", "10"])  # fmt: skip
    assert same.exit_code == 1
    assert load_sae(tmp_path / "first").header.complete  # it is still there


def test_a_golden_sae_can_be_gone_on_from(tmp_path: Path) -> None:
    golden = ROOT / "tests" / "golden" / "sae-v1"
    spec = json.loads((golden / "sae.json").read_text())["spec"]
    tokens, rng = spec["tokens"], np.random.default_rng(0)
    drawn = rng.normal(size=(8, tokens["tokens_per_image"], spec["width"])).astype(np.float16)
    names = ("backbone", "weights_sha256", "block", "transform", "token_layout")
    cache = write_cache(tmp_path / "a.zarr", drawn, **{name: tokens[name] for name in names})
    config = make_config(options={"batch_tokens": 8, "tokens": 16}, start=init_settings(golden))
    report = train([cache], tmp_path / "run", config, init_from=golden)
    assert report.spec["n_latents"] == spec["n_latents"]


@pytest.mark.stress
def test_another_kind_of_tokens_is_refused(caches: list[Path], tmp_path: Path) -> None:
    train(caches[:1], tmp_path / "first", small("relu"))
    other = write_cache(tmp_path / "b.zarr", tokens_of_cells(3), block=3)
    with pytest.raises(SpecMismatch, match="block"):
        train([other], tmp_path / "run", small("relu"), init_from=tmp_path / "first")
    with pytest.raises(BadInput, match="has expansion 8; found expansion 4"):
        train(caches[:1], tmp_path / "run", small("relu", expansion=4), init_from=tmp_path / "first")


def test_what_a_preset_says_of_the_width_gives_way(caches: list[Path], tmp_path: Path) -> None:
    """Number of latents and activation are those of the SAE to go on from; the preset says the rest."""
    train(caches[:1], tmp_path / "first", small("topk"))
    start = init_settings(tmp_path / "first")
    config = make_config(preset="paper", options={"tokens": BATCH, "batch_tokens": BATCH}, start=start)
    assert (config.expansion, config.activation, config.k) == (8, "topk", 6)
    assert (config.loss, config.dead_latents, config.lr) == ("eq1", "ghost", 4e-4)
    assert (
        train(caches[:1], tmp_path / "run", config, init_from=tmp_path / "first").spec["n_latents"]
        == start["expansion"] * 8
    )
    with pytest.raises(BadInput, match="has expansion 8; found expansion 4"):
        make_config(preset="paper", options={"expansion": 4}, start=start)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--activation", "topk", "--l1", 0.1), "--l1 weighs a sparsity term, and topk has none"),
        (("--holdout-by", "patient", "--tokens", 512), "--holdout-by patient: no patient is held out"),
        (("--init-from", "first", "--init", "transpose"), "--init: only for new weights"),
        (("--init-from", "first", "--b-dec-init", "mean"), "--b-dec-init: only for new weights"),
    ],
)
def test_options_without_an_effect_are_refused(
    options: tuple[Any, ...], words: str, caches: list[Path], tmp_path: Path
) -> None:
    if "first" in options:
        train(caches[:1], tmp_path / "first", small("relu", steps=1))
    given = [str(tmp_path / "first" if option == "first" else option) for option in options]
    done = CliRunner().invoke(cli, ["sae", "train", str(caches[0]), "-o", str(tmp_path / "run"), *given])
    assert (done.exit_code, words in done.stderr) == (2, True), done.output
    assert not (tmp_path / "run").exists()
