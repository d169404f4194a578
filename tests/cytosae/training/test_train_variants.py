"""Training with every variant: atoms found again, interruptions without a trace, ranks, held-out images, loggers."""

import dataclasses
import json
import os
import subprocess
import sys
import types
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
from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae, make_config
from cytosae.training import precision
from cytosae.training.dead_latents import resample
from cytosae.training.distributed import ALONE
from cytosae.training.evaluate import evaluate
from cytosae.training.train import train
from stores import BadInput, SpecMismatch, find_header
from stores.files import LOCK_SUFFIX, locked

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk", "k": 6, "dead_latents": "auxk"},
    "batchtopk": {"activation": "batchtopk", "k": 6, "schedule": "cosine"},
    "jumprelu": {"activation": "jumprelu", "jump_threshold": 0.1, "jump_bandwidth": 0.1, "loss": "mse"},
    "gated": {"activation": "gated", "l1_warmup_steps": 5, "token_scale": "sqrt-width", "schedule": "linear"},
    "resample": {
        "dead_latents": "resample",
        "resample_every": 3,
        "b_dec_init": "zeros",
        "holdout": 0.2,
        "order_seed": 4,
    },
    "mix": {"mix": (3.0, 1.0), "b_dec_init": "mean"},
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two caches of 24 images of 5 tokens of width 8, 4 a chunk; read-only."""
    root = tmp_path_factory.mktemp("caches")
    return [
        write_cache(root / "a.zarr", tokens_of_cells(3), unreadable=(3,)),
        write_cache(root / "b.zarr", tokens_of_cells(4)),
    ]


def settings(name: str, *, steps: int = 12) -> TrainConfig:
    return make_config(options={**SETTINGS, "tokens": steps * BATCH, **VARIANTS[name]})


def given(caches: list[Path], name: str) -> list[Path]:
    return caches if name == "mix" else caches[:1]


# ------------------------------------------------------------------------------------------- a known dictionary

D, N_ATOMS, PER_TOKEN = 24, 48, 3
DICTIONARY: dict[str, tuple[dict[str, Any], float, float]] = {  # settings, least explained variance, least recovery
    "relu": ({"l1": 2e-2, "expansion": 4}, 0.84, 0.95),
    "topk": (
        {"activation": "topk", "k": PER_TOKEN, "dead_latents": "auxk", "lr": 1e-2, "auxk_weight": 0.5}
        | {"dead_after_steps": 20, "tokens": 2000 * 512},
        0.9,
        0.95,
    ),
    "batchtopk": ({"activation": "batchtopk", "k": PER_TOKEN, "dead_latents": "auxk", "lr": 1e-2}, 0.88, 0.8),
    "jumprelu": ({"activation": "jumprelu", "l1": 3e-3, "jump_threshold": 0.1, "jump_bandwidth": 0.1}, 0.87, 0.5),
    "gated": ({"activation": "gated", "l1": 5e-2, "expansion": 4}, 0.86, 0.8),
    "resample": (
        {"activation": "topk", "k": PER_TOKEN, "dead_latents": "resample", "resample_every": 100, "lr": 1e-2},
        0.88,
        0.8,
    ),
}


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Tokens that are sums of three of 48 random directions in 24 dimensions, 0.5 to 1.5 of each, with some noise."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(N_ATOMS, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    n = 200 * 64
    chosen = rng.random((n, N_ATOMS)).argsort(axis=1)[:, :PER_TOKEN]
    amounts = np.zeros((n, N_ATOMS))
    np.put_along_axis(amounts, chosen, rng.uniform(0.5, 1.5, (n, PER_TOKEN)), axis=1)
    tokens = amounts @ atoms + 0.01 * rng.normal(size=(n, D))
    root = write_cache(
        tmp_path_factory.mktemp("dictionary") / "acts.zarr", tokens.reshape(200, 64, D).astype(np.float16)
    )
    return root, torch.from_numpy(atoms).float()


@pytest.mark.stress
@pytest.mark.parametrize("name", DICTIONARY)
def test_the_true_atoms_are_found_again(name: str, dictionary: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """relu with L1 and topk find at least 95% of them at cosine 0.95; all explain what is stated above."""
    cache, atoms = dictionary
    options, least_explained, least_found = DICTIONARY[name]
    common = {"loss": "mse", "b_dec_init": "mean", "schedule": "linear", "expansion": 8, "lr": 3e-3}
    common |= {"batch_tokens": 512, "warmup_steps": 50, "dead_after_steps": 50, "log_every": 100, "tokens": 1500 * 512}
    header = train([cache], tmp_path / "run", make_config(options={**common, **options}))
    assert (header.summary or {})["final"]["explained_variance"] > least_explained
    decoder = load_sae(tmp_path / "run").model.W_dec
    found = (atoms @ decoder.T).amax(1) > 0.95
    assert found.float().mean() >= least_found


# ------------------------------------------------------------------------------------------------ interruptions


def _what_was_trained(run: Path) -> dict[str, Any]:
    header = json.loads((run / "sae.json").read_text())
    header["summary"]["final"].pop("tokens_per_second")
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    rows = [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
    return {"weights": (run / "sae.safetensors").read_bytes(), "metrics": rows, "header": header}


@pytest.mark.stress
@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_and_continued_equals_never_stopped(name: str, caches: list[Path], tmp_path: Path) -> None:
    config = settings(name)
    train(given(caches, name), tmp_path / "whole", config)
    for stop in (2, 7):

        def interrupt(done: int, total: int, metrics: dict[str, Any], stop: int = stop) -> None:
            if done == stop * BATCH:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(given(caches, name), tmp_path / "cut", config, progress=interrupt)
    train(given(caches, name), tmp_path / "cut", config)
    assert _what_was_trained(tmp_path / "cut") == _what_was_trained(tmp_path / "whole")
    run = load_sae(tmp_path / "whole")
    assert run.model.activation == config.activation
    assert all(bool(torch.isfinite(value).all()) for value in run.model.state_dict().values())


def test_a_run_at_work_is_not_trained_by_a_second_process(caches: list[Path], tmp_path: Path) -> None:
    with locked(tmp_path / f".run{LOCK_SUFFIX}"), pytest.raises(SpecMismatch, match="being written by another process"):
        train(caches[:1], tmp_path / "run", settings("topk"))
    train(caches[:1], tmp_path / "run", settings("topk"))
    assert not (tmp_path / f".run{LOCK_SUFFIX}").exists()


# -------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("topk", marks=pytest.mark.slow),
        "batchtopk",
        pytest.param("gated", marks=pytest.mark.slow),
        "resample",
    ],
)
@pytest.mark.stress
def test_two_processes_train_what_one_does(name: str, caches: list[Path], tmp_path: Path) -> None:
    """Under torchrun, with gloo: the same weights as one process with the same global batch, to float tolerance."""
    config = settings(name)
    train(given(caches, name), tmp_path / "one", config)
    written = tmp_path / "settings.toml"
    values = {key: value for key, value in dataclasses.asdict(config).items() if value is not None and value != ()}
    written.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "cli.py"), "sae", "train", *map(str, given(caches, name))]
    command += ["-o", str(tmp_path / "two"), "--config", str(written), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("latents after") == 1  # one of them speaks
    one, two = load_sae(tmp_path / "one").model.state_dict(), load_sae(tmp_path / "two").model.state_dict()
    for key, value in one.items():
        assert (two[key] - value).abs().max() <= 1e-4 * value.abs().max(), key
    assert (
        json.loads((tmp_path / "two" / "sae.json").read_text())["spec"]
        == json.loads((tmp_path / "one" / "sae.json").read_text())["spec"]
    )


# ------------------------------------------------------------------------------------------- data that is chosen


def test_held_out_images_are_measured_and_never_trained_on(caches: list[Path], tmp_path: Path) -> None:
    """The figures in sae.json are those of `sae eval` on just these images; the others make no difference to them."""
    config = dataclasses.replace(settings("topk"), holdout=0.25)
    header = train(caches[:1], tmp_path / "run", config)
    held_out = pq.read_table(tmp_path / "run" / "held_out.parquet")["image_id"].to_pylist()
    assert header.spec["images"] == {"trained_on": 17, "held_out": 6, "excluded": 0, "excluded_sha256": None}
    found = evaluate(caches[0], tmp_path / "run", only=held_out)
    stated = (header.summary or {})["held_out"]
    assert (found.n_images, found.n_held_out, stated["n_images"]) == (6, 6, 6)
    for name in ("mse", "explained_variance", "explained_variance_uncentered", "l0"):
        assert stated[name] == pytest.approx(getattr(found, name), rel=1e-6)
    assert evaluate(caches[0], tmp_path / "run").n_held_out == 6  # of all 23

    tokens = tokens_of_cells(3)
    ids = [f"{i:03d}.png" for i in range(24)]
    for i in range(24):
        if any(ids[i] in name for name in held_out):
            tokens[i] = 100
    other = write_cache(tmp_path / "other.zarr", tokens, unreadable=(3,))
    train([other], tmp_path / "other", config)
    assert (tmp_path / "other" / "sae.safetensors").read_bytes() == (tmp_path / "run" / "sae.safetensors").read_bytes()


def test_the_command_leaves_images_out(caches: list[Path], tmp_path: Path) -> None:
    ids = pq.read_table(caches[0] / "images.parquet")["image_id"].to_pylist()
    (tmp_path / "bad.txt").write_text(f"{ids[0]}\n\n{ids[5]}\n")
    (tmp_path / "more.toml").write_text("batch_tokens = 10\nwarmup_steps = 2\nauxk = 4\n")
    arguments = ["sae", "train", caches[0], "-o", tmp_path / "run", "--activation", "topk", "--k", 4]
    arguments += ["--dead-latents", "auxk", "--tokens", 40, "--expansion", 4, "--config", tmp_path / "more.toml"]
    arguments += ["--exclude", tmp_path / "bad.txt", "--holdout", 0.1, "--device", "cpu"]
    done = CliRunner().invoke(cli, [str(part) for part in arguments])
    assert done.exit_code == 0, done.output
    assert "held out: 3 images: mse" in done.stdout
    page = CliRunner().invoke(cli, ["sae", "info", str(tmp_path / "run")]).stdout
    for words in ("32 (topk, k 4) on tokens of width 8", "18 trained on, 3 held out, 2 excluded", "dead latents: auxk"):
        assert words in page
    both = CliRunner().invoke(cli, [*map(str, arguments), "--no-ghost"])
    assert both.exit_code == 2
    unknown = CliRunner().invoke(cli, [str(part) for part in [*arguments[:-4], "--k", 99, "--device", "cpu"]])
    assert unknown.exit_code == 1


# ---------------------------------------------------------------------------------------------- dead latents


def test_a_resampled_latent_points_at_what_is_reconstructed_badly() -> None:
    """By hand: one token has all the loss, so every dead latent starts at it; the living and their moments stay."""
    model = SparseAutoencoder(4, 6)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.normalise_decoder()
    with torch.no_grad():
        tokens = model(torch.zeros(5, 4))
        for _ in range(200):  # a fixed point is reconstructed without loss
            tokens = model(tokens)
    tokens[3] = model.b_dec.detach() + torch.tensor([0.0, 30.0, 0.0, 40.0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dead = torch.tensor([True, False, False, True, False, False])
    n = resample(model, optimizer, dead, tokens, torch.Generator().manual_seed(1), ranks=ALONE, micro_batch=2)
    assert n == 2
    norm = before["W_enc"][:, ~dead].norm(dim=0).mean()
    for latent in (0, 3):
        assert torch.allclose(model.W_dec[latent], torch.tensor([0, 0.6, 0, 0.8]), atol=1e-5)
        assert torch.allclose(model.W_enc[:, latent], 0.2 * norm * torch.tensor([0, 0.6, 0, 0.8]), atol=1e-5)
        assert model.b_enc[latent] == 0
    for name in ("W_dec", "b_enc"):
        assert torch.equal(getattr(model, name)[~dead], before[name][~dead])
        for key in ("exp_avg", "exp_avg_sq"):
            moments = optimizer.state[getattr(model, name)][key]
            assert not moments[dead].any()
            assert moments[~dead].all()
    assert torch.equal(model.W_enc[:, ~dead], before["W_enc"][:, ~dead])
    assert not optimizer.state[model.W_enc]["exp_avg"][:, dead].any()


# --------------------------------------------------------------------------------------------------- loggers


def test_metrics_go_to_wandb(caches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a module that notes how it is called, as the program itself wants a network."""
    calls: list[Any] = []

    class Job:
        def __enter__(self) -> "Job":
            return self

        def __exit__(self, *error: object) -> None:
            calls.append("end")

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values["loss"]))

    def init(**options: Any) -> Job:
        calls.append(options)
        return Job()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train(caches[:1], tmp_path / "run", settings("topk", steps=3), logger="wandb")
    header, rows = find_header(tmp_path / "run"), pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    assert header is not None
    assert (calls[0]["id"], calls[0]["config"]["k"]) == (header.identity[:16], 6)
    assert calls[1:] == [*((row["step"], row["loss"]) for row in rows), "end"]


def test_metrics_go_to_tensorboard(caches: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard, which is none of our dependencies")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(caches[:1], tmp_path / "run", settings("topk", steps=3), logger="tensorboard")
    events = EventAccumulator(str(tmp_path / "run.tensorboard"))
    events.Reload()
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_one_line(
    name: str, caches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match=f"the logger {name} is not installed; pip install {name}"):
        train(caches[:1], tmp_path / "run", settings("topk"), logger=name)


@pytest.mark.parametrize("name", ["tf32", "fp16"])
def test_precisions_for_gpus(name: str, caches: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"precision '{name}' is for GPUs; found device 'cpu'"):
        train(caches[:1], tmp_path / "run", dataclasses.replace(settings("topk"), precision=name))


def test_bf16_on_a_processor_that_has_it(caches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused on another; torch computes it on any."""
    config = dataclasses.replace(settings("topk"), precision="bf16")
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(BadInput, match="precision 'bf16' needs a GPU, or a processor with AMX or AVX512-BF16"):
        train(caches[:1], tmp_path / "run", config)
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    done = train(caches[:1], tmp_path / "run", config)
    exact = train(caches[:1], tmp_path / "exact", dataclasses.replace(config, precision="fp32"))
    assert done.spec["config"]["precision"] == "bf16"
    assert done.identity != exact.identity
    loss, wanted = (report.summary["final"]["loss"] for report in (done, exact))
    assert loss != wanted
    assert loss == pytest.approx(wanted, rel=0.05)
