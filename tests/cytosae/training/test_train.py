"""Training: each step is the released one, an interruption leaves no trace, and what goes wrong is said in one line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import torch
from click.testing import CliRunner
from places import ROOT
from reference import Params
from token_caches import write_cache
from training_runs import BATCH, SETTINGS, TOKENS, WIDTH, _metrics, _what_was_trained, tokens_of_cells

from cli import cli
from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae, load_tensors, make_config
from cytosae.sae.chosen_defaults import RELEASED
from cytosae.training.train import train
from stores import (
    SAE,
    ActivationStore,
    BadInput,
    IncompleteStore,
    SpecMismatch,
    TokenStream,
    open_caches,
    read_header,
    read_runs,
)
from stores.files import sha256_file

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def small(preset: str | None = None, *, steps: int = 12, **changes: Any) -> TrainConfig:
    return make_config(preset=preset, options={**SETTINGS, "tokens": steps * BATCH, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 5 tokens of width 8, 4 a chunk, image 3 unreadable; read-only."""
    return write_cache(tmp_path_factory.mktemp("train") / "acts.zarr", tokens_of_cells(3), unreadable=(3,))


# ------------------------------------------------------------------------------------------- the released step


def _released_run(cache: Path, config: TrainConfig, objective: str, n_steps: int) -> tuple[Params, list[int]]:
    """The twin's weights after `n_steps` steps, folded, and the number of dead latents at each of them."""
    model = SparseAutoencoder(WIDTH, int(config.expansion) * WIDTH)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    stream = TokenStream(open_caches([cache]), order=config.order, seed=config.seed)
    if config.b_dec_init == "geometric-median-per-position":  # on the first batch, which is not trained on
        images = next(stream.batches(BATCH)).reshape(-1, TOKENS, WIDTH)
        b_dec, position = reference.geometric_median_per_position(images), BATCH
    else:
        sample, position = next(stream.batches(stream.tokens_per_epoch)), 0
        b_dec = np.zeros(WIDTH) if config.b_dec_init == "zeros" else reference.geometric_median(sample)
    W_enc, b_enc, W_dec = (getattr(model, name).detach().double().numpy() for name in NAMES[:3])
    params = Params(W_enc, b_enc, W_dec, b_dec)
    adam, silent, n_dead = reference.adam_start(params), np.zeros(model.n_latents, np.int64), []
    for step, batch in enumerate(islice(stream.batches(BATCH, position=position), n_steps)):
        n_dead.append(int((silent > config.dead_after_steps).sum()))
        params, adam, silent = reference.released_step(
            params,
            adam,
            batch,
            objective=objective,
            l1=config.l1,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            step=step,
            steps_since_fired=silent,
            dead_after=config.dead_after_steps,
        )
    return reference.fold_decoder_norm(params), n_dead


@pytest.mark.parametrize("n_steps", [1, 12])
@pytest.mark.parametrize(
    ("preset", "b_dec_init", "least_dead"),
    [
        ("cytosae", "geometric-median-per-position", 3),
        (None, "geometric-median", 0),
        (None, "zeros", 100),
        ("paper", "zeros", 100),
    ],
)
def test_training_equals_the_released_steps(
    cache: Path, tmp_path: Path, preset: str | None, b_dec_init: str, least_dead: int, n_steps: int
) -> None:
    """Same start, same batches, latents dying on the way: after 12 steps all weights agree with the float64 twin."""
    config = small(preset, steps=n_steps, b_dec_init=b_dec_init, seed=3)
    train([cache], tmp_path / "run", config)
    trained = load_sae(tmp_path / "run").model
    twin, n_dead = _released_run(cache, config, preset or "default", n_steps)
    assert sum(n_dead) >= (least_dead if n_steps > 1 else 0)
    for name in NAMES:
        found, wanted = getattr(trained, name).double().numpy(), getattr(twin, name)
        assert np.abs(found - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-30), name


def test_without_ghost_dead_latents_stay_where_they_are(cache: Path, tmp_path: Path) -> None:
    """A latent that never fires gets no gradient without ghost, and one with it."""
    weights = {}
    for ghost in (False, True):
        train(
            [cache], tmp_path / str(ghost), small(b_dec_init="zeros", dead_latents="ghost" if ghost else "none", seed=3)
        )
        weights[ghost] = load_sae(tmp_path / str(ghost)).model.W_enc
    start = SparseAutoencoder(WIDTH, 64)
    start.init_weights(torch.Generator().manual_seed(3))
    moved = {ghost: ((found - start.W_enc).abs().amax(0) > 1e-6).sum().item() for ghost, found in weights.items()}
    assert moved[False] < moved[True] == 64


def test_the_preset_cytosae_trains_on_whole_images_in_the_same_order_in_every_pass(cache: Path) -> None:
    """Quirk 2: 23 readable images, two a batch; the order of a pass comes back in the next one."""
    config = small("cytosae")
    stream = TokenStream(open_caches([cache]), order=config.order, token_set=config.token_set, seed=config.seed)
    batches = np.stack(list(islice(stream.batches(BATCH), 23))).reshape(46, TOKENS, WIDTH)
    assert np.array_equal(batches[:23], batches[23:])
    images = {image.tobytes() for n, image in enumerate(tokens_of_cells(3)) if n != 3}
    assert {image.tobytes() for image in batches[:23]} == images


# ------------------------------------------------------------------------------------------- a golden curve

# loss at each step; torch 2.13.0 on the CPU
GOLDEN = {
    "default": """1.72556 1.66681 2.344 1.65153 1.13245 0.700566 0.570232 0.577617 0.659575 0.780971
        0.653913 0.678326 0.558066 0.430942 0.406146 0.332379 0.28454 0.260333 0.248758 0.254845""",
    "cytosae": """0.138268 0.372182 0.306613 0.277732 0.241079 0.216501 0.158941 0.168361 0.169 0.13178
        0.0715986 0.161222 0.152239 0.116133 0.132362 0.175727 0.124411 0.122349 0.134335 0.0844235""",
    "paper": """6.4073 5.3337 3.88565 3.99043 3.6834 2.74259 2.08461 1.35616 1.44731 1.99027
        1.72115 2.25097 1.50183 1.72499 1.60005 1.26676 1.02417 1.09231 1.04729 0.947297""",
}


@pytest.mark.parametrize(
    ("name", "changes", "steps_with_ghost"),
    [("default", {"b_dec_init": "zeros"}, 18), ("cytosae", {}, 10), ("paper", {}, 0)],
    ids=["default", "cytosae", "paper"],
)
def test_the_golden_curve_of_twenty_steps(
    tmp_path: Path, name: str, changes: dict[str, Any], steps_with_ghost: int
) -> None:
    """A refactor that moves the loss is not a refactor. (Threads and micro-batches move it by 3e-7.)"""
    n, t, d = np.meshgrid(np.arange(20), np.arange(TOKENS), np.arange(WIDTH), indexing="ij")
    tokens = (2 + np.sin(1 + 3 * n + 0.3 * t + 1.7 * d) + 0.5 * np.cos(n * d + t)).astype(np.float16)
    root = write_cache(tmp_path / "acts.zarr", tokens)
    preset = None if name == "default" else name
    train([root], tmp_path / "run", small(preset, steps=20, lr=1e-2, **changes))
    rows = _metrics(tmp_path / "run")
    assert [row["loss"] for row in rows] == pytest.approx([float(loss) for loss in GOLDEN[name].split()], rel=1e-4)
    assert sum(row["dead_loss"] > 0 for row in rows) == steps_with_ghost


# ------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("preset", [None, "cytosae"])
@pytest.mark.parametrize("stop_at", [1, 7, 12])
def test_interrupted_and_continued_equals_never_stopped(
    cache: Path, tmp_path: Path, preset: str | None, stop_at: int
) -> None:
    """Ctrl-C behind step 1, 7 and the last one; weights, metrics and header come out the same."""

    def interrupt(done: int, total: int, metrics: dict[str, float | None]) -> None:
        if metrics["step"] == stop_at:
            raise KeyboardInterrupt

    config = small(preset)
    train([cache], tmp_path / "never", config)
    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", config, progress=interrupt)
    with pytest.raises(IncompleteStore, match="Run the same cyto sae train command again to continue"):
        load_sae(tmp_path / "run")
    seen: list[float | None] = []
    train([cache], tmp_path / "run", config, progress=lambda done, total, metrics: seen.append(metrics["step"]))
    assert seen == list(range(stop_at + 1, 13))  # nothing was done twice
    assert _what_was_trained(tmp_path / "run") == _what_was_trained(tmp_path / "never")
    assert len(read_runs(tmp_path / "run")) == 2


def _signal_at_line(number: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that sends Ctrl-C at the `number`-th line that train.py or model.py runs from now on."""
    left = number

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(("cytosae/training/train.py", "cytosae/sae/model.py")):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    return trace


@pytest.mark.stress
def test_ctrl_c_at_any_line_of_a_step_leaves_no_trace(
    cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A signal arrives wherever it likes: between Adam and the counter of steps, behind the normalisation, anywhere."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    config = small(steps=4, b_dec_init="zeros")
    train([cache], tmp_path / "never", config)
    wanted = _what_was_trained(tmp_path / "never")
    line, is_over = 0, False
    while not is_over:
        line += 1
        run, stopped_in = tmp_path / str(line), list[Any]()

        def arm(
            done: int, total: int, metrics: dict[str, float | None], line: int = line, at: list[Any] = stopped_in
        ) -> None:
            at.append(metrics["step"])
            if metrics["step"] == 2:
                sys._getframe(1).f_trace = trace = _signal_at_line(line)
                sys.settrace(trace)

        try:
            train([cache], run, config, progress=arm)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        is_over = stopped_in[-1] > 2  # the whole third step passed before the line was reached
        train([cache], run, config)
        assert _what_was_trained(run) == wanted, f"interrupted at line {line} of the third step"
    assert line > 20


def test_signals_find_their_own_handlers_again(cache: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train([cache], tmp_path / "run", small(steps=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture(scope="module")
def long_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """Arguments of a `cyto sae train` of 600 steps without its `-o`, and what it gives when nobody stops it."""
    root = tmp_path_factory.mktemp("long")
    file = root / "settings.toml"
    lines = [f"{name} = {value}" for name, value in {**SETTINGS, "log_every": 50, "tokens": 600 * BATCH}.items()]
    file.write_text("\n".join([*lines, 'b_dec_init = "zeros"']))
    arguments = ["sae", "train", str(cache), "--config", str(file), "--device", "cpu", "--checkpoint-every", "10"]
    done = CliRunner().invoke(cli, [*arguments, "-o", str(root / "run")])
    assert done.exit_code == 0, done.output
    return arguments, _what_was_trained(root / "run")


@pytest.mark.stress
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_command_that_is_repeated_equals_one_that_was_not(
    long_run: tuple[list[str], dict[str, Any]], tmp_path: Path, number: signal.Signals
) -> None:
    """A real process, ended after its first checkpoint; the same command again resumes it, bit for bit."""
    arguments, wanted = long_run
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cli", *arguments, "-o", str(run)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not states(run):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate()
    if number == signal.SIGTERM:  # what a scheduler sends is treated like Ctrl-C
        assert process.returncode == 130
        assert "interrupted; run the same command again to continue" in said
    _, metadata = load_tensors(states(run)[0])
    assert 0 < json.loads(metadata["cyto"])["step"] < 600
    again = CliRunner().invoke(cli, command[3:])
    assert again.exit_code == 0, again.output
    assert _what_was_trained(run) == wanted


def states(run: Path) -> list[Path]:
    """The saved states of a run, the newest first."""
    return sorted((run / "state").glob("state-*.safetensors"), reverse=True)


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "empty"])
def test_a_damaged_state_falls_back_to_the_one_before(
    cache: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(done: int, total: int, metrics: dict[str, float | None]) -> None:
        if metrics["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", small(), checkpoint_every=3, keep_states=2, progress=interrupt)
    newest, before = states(tmp_path / "run")
    assert (newest.name, before.name) == ("state-000000008.safetensors", "state-000000006.safetensors")
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 4
    newest.write_bytes({"flipped bit": raw, "cut": raw[:-100], "empty": bytearray()}[damage])
    steps: list[float | None] = []
    train([cache], tmp_path / "run", small(), progress=lambda done, total, metrics: steps.append(metrics["step"]))
    assert steps[0] == 7
    assert "state-000000008.safetensors is damaged" in caplog.text
    train([cache], tmp_path / "never", small())
    assert _what_was_trained(tmp_path / "run") == _what_was_trained(tmp_path / "never")
    assert states(tmp_path / "run") == []


def test_a_torn_checkpoint_is_never_seen(cache: Path, tmp_path: Path) -> None:
    """What a kill leaves half-written goes away; the last whole state counts."""

    def interrupt(done: int, total: int, metrics: dict[str, float | None]) -> None:
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    train([cache], tmp_path / "never", small())
    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", small(), progress=interrupt)
    torn = tmp_path / "run" / "state" / "state-000000099.safetensors.0f.partial"
    torn.write_bytes(b"half a state")
    train([cache], tmp_path / "run", small())
    assert not torn.exists()
    assert _what_was_trained(tmp_path / "run") == _what_was_trained(tmp_path / "never")


def test_a_complete_run_is_not_trained_again(cache: Path, tmp_path: Path) -> None:
    first = train([cache], tmp_path / "run", small())
    again = train([cache], tmp_path / "run", small(), progress=lambda *_: pytest.fail("it trained"))
    assert again.header == first.header
    assert (first.was_complete, again.was_complete) == (False, True)
    assert len(read_runs(tmp_path / "run")) == 1


def test_the_same_command_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        train([cache], tmp_path / name, small(seed=seed))
    weights = {name: (tmp_path / name / "sae.safetensors").read_bytes() for name in ("first", "again", "other")}
    assert weights["first"] == weights["again"] != weights["other"]


# ------------------------------------------------------------------------------------------- what is refused


def test_a_run_is_continued_with_its_own_settings_only(cache: Path, tmp_path: Path) -> None:
    train([cache], tmp_path / "run", small())
    weights = (tmp_path / "run" / "sae.safetensors").read_bytes()
    words = r"run holds an SAE with other settings \(config.lr 0.0004 against 0.001\).*--overwrite"
    with pytest.raises(SpecMismatch, match=words):
        train([cache], tmp_path / "run", small(lr=1e-3))
    assert (tmp_path / "run" / "sae.safetensors").read_bytes() == weights
    train([cache], tmp_path / "run", small(lr=1e-3), overwrite=True)
    assert read_header(tmp_path / "run", SAE).spec["config"]["lr"] == 1e-3


def test_a_cache_with_other_tokens_does_not_continue_a_run(cache: Path, tmp_path: Path) -> None:
    """Same settings, same shape, other values: the cache's checksums tell them apart."""
    train([cache], tmp_path / "run", small())
    other = write_cache(tmp_path / "acts.zarr", tokens_of_cells(4), unreadable=(3,))
    with pytest.raises(SpecMismatch, match=r"holds an SAE with other settings \(caches"):
        train([other], tmp_path / "run", small())


def test_an_incomplete_cache_is_refused(tmp_path: Path) -> None:
    half = write_cache(tmp_path / "half.zarr", tokens_of_cells(), n_chunks=3)
    with pytest.raises(IncompleteStore, match=r"half\.zarr is incomplete: .*Run the same cyto cache extract command"):
        train([half], tmp_path / "run", small())
    assert not (tmp_path / "run").exists()


def test_caches_that_do_not_fit_together_are_refused(cache: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other.zarr", tokens_of_cells(), weights_sha256="1" * 64)
    with pytest.raises(SpecMismatch, match=r"the same kind of tokens: weights_sha256 0+… against 1+…"):
        train([cache, other], tmp_path / "run", small())
    assert not (tmp_path / "run").exists()


def test_two_caches_are_trained_on_together(cache: Path, tmp_path: Path) -> None:
    """Budget in epochs: one pass over both. Order and number of caches are part of what the run is."""
    other = write_cache(tmp_path / "other.zarr", tokens_of_cells(8, n_images=6))
    header = train([cache, other], tmp_path / "run", small(tokens=None, epochs=2.0))
    assert header.spec["tokens_per_epoch"] == (23 + 6) * TOKENS
    assert header.spec["n_steps"] == 2 * 29 * TOKENS // BATCH
    assert _metrics(tmp_path / "run")[-1]["epoch"] == 2
    assert [entry["sha256"] for entry in header.spec["caches"]] == [
        ActivationStore(path).content_sha256 for path in (cache, other)
    ]
    with pytest.raises(SpecMismatch, match="other settings"):
        train([cache], tmp_path / "run", small(tokens=None, epochs=2.0))


def test_a_loss_that_stops_being_finite_is_one_clear_error_and_keeps_the_saved_state(
    cache: Path, tmp_path: Path
) -> None:
    """The last checkpoint stays as it was; weights on their way to infinity do not replace it."""
    words = r"the loss became (nan|inf) at step [1-9]\d* \(mse .*\); lower --lr or lengthen --warmup-steps"
    config = small(lr=1e18)
    for _ in range(2):
        with pytest.raises(BadInput, match=words):
            train([cache], tmp_path / "run", config, checkpoint_every=1)
        tensors, metadata = load_tensors(states(tmp_path / "run")[0])
        step = json.loads(metadata["cyto"])["step"]
        assert step >= 1
        assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
        assert [row["step"] for row in _metrics(tmp_path / "run")] == list(range(1, step + 1))
        saved = states(tmp_path / "run")[0].read_bytes()
    with pytest.raises(BadInput, match=words):
        train([cache], tmp_path / "run", config)
    assert states(tmp_path / "run")[0].read_bytes() == saved
    with pytest.raises(IncompleteStore):
        load_sae(tmp_path / "run")


def test_a_batch_smaller_than_an_image_has_no_median_per_position(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match="b_dec_init 'geometric-median-per-position' needs batches of at least one image"
    ):
        train([cache], tmp_path / "run", small("cytosae", batch_tokens=4))


# ------------------------------------------------------------------------------------------- what a run holds


def test_metrics_have_a_row_per_logged_step(cache: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float | None]] = []
    config = small(log_every=5, b_dec_init="zeros")
    train([cache], tmp_path / "run", config, progress=lambda done, total, m: seen.append((done, total, m["step"])))
    table = pq.read_table(tmp_path / "run" / "metrics.parquet")
    assert table.column_names == [
        *("step", "tokens", "images", "epoch", "lr", "loss", "mse", "l1", "gate", "dead_loss", "l0"),
        *("explained_variance", "explained_variance_uncentered", "n_dead", "dead_fraction", "dead_window_tokens"),
        "tokens_per_second",
    ]
    page = (ROOT / "docs" / "training.md").read_text()
    assert all(f"`{name}`" in page for name in table.column_names)
    rows = table.to_pylist()
    assert [row["step"] for row in rows] == [5, 10, 12]  # and the last one
    assert seen == [(50, 120, 5), (100, 120, 10), (120, 120, 12)]
    for row in rows:
        assert row["loss"] == pytest.approx(row["mse"] + row["l1"] + row["dead_loss"])
        assert (row["tokens"], row["images"]) == (row["step"] * BATCH, row["step"] * 2)
        assert row["epoch"] == row["tokens"] / (23 * TOKENS)
        assert row["explained_variance"] < row["explained_variance_uncentered"] < 1
        assert 0 < row["dead_fraction"] < 1
        assert row["dead_window_tokens"] == BATCH
        assert row["tokens_per_second"] > 0


def test_the_learning_rate_warms_up_and_stays(cache: Path, tmp_path: Path) -> None:
    """Step k, from 0, runs at lr x min(1, (k + 1) / warmup_steps), as released."""
    train([cache], tmp_path / "run", small(steps=6))
    assert [row["lr"] for row in _metrics(tmp_path / "run")] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])


def test_the_saved_model_has_rows_of_norm_1_and_reconstructs_as_the_trained_one(cache: Path, tmp_path: Path) -> None:
    """Quirk 11: the norm that the last step left goes into the encoder. The trained one: a state kept at the end."""

    def interrupt(done: int, total: int, metrics: dict[str, float | None]) -> None:
        if done == total:
            raise KeyboardInterrupt

    config = small(lr=0.05)
    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", config, progress=interrupt)
    tensors, _ = load_tensors(states(tmp_path / "run")[0])
    trained = SparseAutoencoder(WIDTH, 64)
    trained.load_state_dict({name: tensors[f"model.{name}"] for name in NAMES})
    assert (trained.W_dec.norm(dim=1) - 1).abs().max() > 1e-3

    train([cache], tmp_path / "run", config)
    saved = load_sae(tmp_path / "run").model
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=3e-7)
    x = torch.from_numpy(tokens_of_cells(3)[0].astype(np.float32))
    wanted = trained(x).detach()
    torch.testing.assert_close(saved(x), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert not list((tmp_path / "run" / "state").iterdir())  # nothing left to continue from


def test_sae_json_says_what_was_trained_on_what(cache: Path, tmp_path: Path) -> None:
    config = small(seed=5)
    train([cache], tmp_path / "run", config)
    store, header = ActivationStore(cache), json.loads((tmp_path / "run" / "sae.json").read_text())
    assert (header["format"], header["format_version"], header["complete"]) == ("SAE", 1, True)
    assert header["created_by"].startswith("cyto ")
    spec, summary = header["spec"], header["summary"]
    assert (spec["width"], spec["n_latents"], spec["activation"]) == (WIDTH, 64, "relu")
    assert spec["tokens"] == store.spec.same_tokens
    assert spec["trained_backbone"] is False
    assert spec["caches"] == [{"identity": store.identity, "sha256": store.content_sha256, "precision": "fp32"}]
    assert TrainConfig.from_spec(spec["config"]) == config
    assert RELEASED | spec["config"] == dataclasses.asdict(config)
    assert (summary["steps"], summary["tokens"], summary["images"]) == (12, 120, 24)
    assert {key: value for key, value in summary["final"].items() if key != "tokens_per_second"} == _metrics(
        tmp_path / "run"
    )[-1]
    assert summary["sae_sha256"] == sha256_file(tmp_path / "run" / "sae.safetensors")
    (run,) = read_runs(tmp_path / "run")
    assert (run["device"], run["threads"], run["caches"]) == ("cpu", 1, [str(cache)])
    assert run["versions"]["torch"].startswith("2.")
