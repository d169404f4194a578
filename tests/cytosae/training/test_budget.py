"""`tokens = "auto"`: when a run has settled, what that changes, and that a resumed run or two ranks decide the same."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from places import ROOT
from token_caches import write_cache
from training_runs import SETTINGS, _what_was_trained, tokens_of_cells

from cli import cli
from cytosae.sae import TrainConfig, load_sae
from cytosae.sweep import sweep
from cytosae.training.budget import (
    FIRST_GUESS,
    Budget,
    Check,
    Watch,
    check_interval,
    fewest_steps,
    foreseen_steps,
    has_settled,
)
from cytosae.training.choices import StepClock, auto_expansion, auto_l0, duration
from cytosae.training.data import open_data
from cytosae.training.distributed import ALONE
from cytosae.training.train import train
from stores import BadInput

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO: dict[str, Any] = {
    **{name: value for name, value in SETTINGS.items() if name != "l1"},
    "tokens": "auto",
    "lr": 1e-2,
    "dead_after_steps": 20,
    "log_every": 15,
}
KINDS: dict[str, dict[str, Any]] = {
    "steered": {"target_l0": 6.0},
    "constant": {"schedule": "constant", "l1": 1e-2},
    "cosine": {"activation": "topk", "target_l0": 5.0, "schedule": "cosine", "decay_steps": 33},
    "jumprelu": {"activation": "jumprelu", "target_l0": 6.0, "token_scale": "sqrt-width"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 5 tokens of width 8, 4 a chunk, image 3 unreadable; read-only."""
    return write_cache(tmp_path_factory.mktemp("budget") / "acts.zarr", tokens_of_cells(3), unreadable=(3,))


def auto(name: str) -> TrainConfig:
    return TrainConfig(**(AUTO | KINDS[name]))


# ------------------------------------------------------------------------------------------------------ the rule


def checks_of(errors: list[float], l0: list[float] | None = None) -> list[Check]:
    """A check every 20 steps."""
    return [Check(20 * number, error, l0[number - 1] if l0 else 10.0) for number, error in enumerate(errors, start=1)]


def test_the_rule_by_hand() -> None:
    """40 checks, 800 steps, no warm-up: the last quarter are checks 31 to 40, the one before 21 to 30."""
    falls = [2.0] * 20 + [1.0] * 10
    assert has_settled(checks_of(falls + [0.995] * 10), 0, 0.0)
    assert not has_settled(checks_of(falls + [0.985] * 10), 0, 0.0)  # still 1.5% better
    assert has_settled(checks_of(falls + [1.2] * 10), 0, 0.0)  # held-out images only get worse
    assert not has_settled(checks_of(falls + [1.0] * 10, [10.0] * 30 + [10.6] * 10), 0, 0.0)  # L0 still moves
    assert has_settled(checks_of(falls + [1.0] * 10, [10.0] * 30 + [9.6] * 10), 0, 0.0)
    jumps = [10.0 + 5 * (number % 30 < 15) for number in range(100)]
    assert not has_settled(checks_of([1.0] * 74, jumps[:74]), 0, 0.0)
    assert has_settled(checks_of([1.0] * 75, jumps[:75]), 0, 0.0)  # 1,500 steps: L0 does not count any more
    assert not has_settled(checks_of([1.0] * 9), 0, 0.0)  # 180 steps are too few
    assert has_settled(checks_of([1.0] * 10), 0, 0.0)
    assert not has_settled(checks_of([1.0] * 14), 100, 0.0)  # of which 100 are the warm-up
    # the warm-up does not count: 700 steps behind step 100, so the quarters are 175 steps long
    assert not has_settled(checks_of([2.0] * 22 + [1.0] * 9 + [0.985] * 9), 100, 0.0)


def test_after_a_long_warm_up_a_quarter_may_have_no_check_yet() -> None:
    """Warm-up 5,000: a check every 160 steps, and a quarter of 280 steps is 70 steps long."""
    config, budget, ends = TrainConfig(tokens="auto", warmup_steps=5_000), Budget(), set()
    for step in range(8_000):
        if budget.is_due(step):
            budget = budget.after(Check(step, 1.0, 8.0), config, 2.0, most=60_000, is_steady=True)
            ends.add(foreseen_steps(budget.checks, config, 2.0, step, 60_000))
    assert budget.settled_at == 5_440  # quarters of 110 steps: checks at 5,440, and at 5,280 before
    assert min(ends) > 5_440


def test_a_run_that_gains_from_half_as_much_again_goes_on() -> None:
    """error = steps^-0.1 never settles, error = 1 + 5 exp(-steps / 100) does when the rest is small."""
    assert not any(
        has_settled(checks_of([(20 * n) ** -0.1 for n in range(1, last)]), 0, 0.0) for last in range(10, 200)
    )
    errors = [1 + 5 * math.exp(-20 * n / 100) for n in range(1, 200)]
    settled = [last for last in range(1, 200) if has_settled(checks_of(errors[:last]), 0, 0.0)]
    assert 20 * settled[0] > 100 * math.log(5 / 0.05)
    assert settled == list(range(settled[0], 200))


def test_where_almost_all_is_explained_the_small_rest_does_not_count() -> None:
    """The last quarter is 0.015 better: 1.5% of the error, and 0.15% of a variance of 10, 0.3% of one of 5."""
    checks = checks_of([2.0] * 20 + [1.0] * 10 + [0.985] * 10)
    assert not has_settled(checks, 0, 5.0)
    assert has_settled(checks, 0, 10.0)
    assert not has_settled(checks_of([2.0] * 20 + [1.0] * 10 + [0.9] * 10), 0, 10.0)


def test_the_variance_is_the_error_of_the_mean_token(cache: Path) -> None:
    """In each loss and at each scale, against the sum as it is defined."""
    for loss, scale in (("normed", 1.0), ("normed", 0.3), ("eq1", 0.3), ("mse", 3.0)):
        config = TrainConfig(**(AUTO | KINDS["constant"] | {"loss": loss}))
        watch = Watch(open_data([cache], config), config, "cpu", ALONE)
        x_ND = watch._tokens_ND.double() * scale
        error_ND = (x_ND - x_ND.mean(0)).square()
        weight = {"normed": 1 / x_ND.norm(dim=1, keepdim=True), "eq1": x_ND.shape[1], "mse": 1.0}[loss]
        assert watch.variance(scale) == pytest.approx(float((error_ND * weight).mean()), rel=1e-5)


def test_the_end_is_foreseen_from_how_the_error_falls() -> None:
    """error = 100 / steps with a variance of 100: quarters differ by 0.2% of it behind a known step."""
    config = TrainConfig(tokens="auto", warmup_steps=0)
    errors = [100.0 / (20 * n) for n in range(1, 200)]
    end = next(last for last in range(1, 200) if has_settled(checks_of(errors[:last]), 0, 100.0))
    foreseen = [foreseen_steps(checks_of(errors[:last]), config, 100.0, 20 * last, 62_000) for last in range(10, end)]
    true_end = config.end_after(20 * end, 62_000)
    assert all(abs(steps / true_end - 1) < 0.25 for steps in foreseen)
    assert foreseen_steps([], config, 100.0, 0, 62_000) == FIRST_GUESS * fewest_steps(config, 0, 62_000)
    assert foreseen_steps(checks_of(errors[:12]), config, 1e-9, 240, 62_000) <= 8 * 240 * 1.25 + 20


def test_checks_become_rarer_and_their_number_stays_small() -> None:
    due = [step for step in range(1, 70_000) if step % check_interval(step) == 0]
    assert due[:3] == [20, 40, 60]
    assert len(due) < 500
    for now in (640, 1280, 5120, 62_000):
        assert sum(now - now / 4 < step <= now for step in due) >= 8


def test_the_decay_begins_when_it_has_settled() -> None:
    config = TrainConfig(tokens="auto", warmup_steps=0)
    budget = Budget(checks=tuple(checks_of([1.0] * 19)))
    held_back = budget.after(Check(400, 1.0, 10.0), config, 0.0, most=10_000, is_steady=False)
    assert (held_back.end, held_back.settled_at) == (None, None)
    settled = budget.after(Check(400, 1.0, 10.0), config, 0.0, most=10_000, is_steady=True)
    assert (settled.end, settled.settled_at) == (500, 400)
    given_up = Budget(checks=tuple(checks_of([1.0] * 99))).after(
        Check(2000, 1.0, 9.0), config, 0.0, most=9999, is_steady=False
    )
    assert given_up.settled_at == 2000
    rates = [config.lr_at(step, 500) / config.lr for step in (399, 400, 401, 450, 499)]
    assert rates == pytest.approx([1, 1, 0.99, 0.5, 0.01])
    assert budget.after(Check(400, 1.0, 10.0), config, 0.0, most=450, is_steady=True).end == 450
    assert (
        settled.after(Check(420, 0.1, 10.0), config, 0.0, most=10_000, is_steady=True).end == 500
    )  # decided is decided
    assert Budget.from_tensor(settled.to_tensor()) == settled
    assert Budget.from_tensor(held_back.to_tensor()) == held_back
    assert fewest_steps(config, 0, 10_000) == 250
    assert fewest_steps(config, 333, 10_000) == 340 + 85
    assert TrainConfig(tokens="auto", schedule="constant").end_after(400, 10_000) == 401
    assert TrainConfig(tokens="auto", schedule="cosine", decay_steps=7).end_after(400, 10_000) == 407


# ------------------------------------------------------------------------------------------------------ in training


@pytest.mark.stress
@pytest.mark.parametrize("name", KINDS)
def test_interrupted_and_continued_decides_the_same(name: str, cache: Path, tmp_path: Path) -> None:
    """Ctrl-C four times, before and behind checks and in the decay: the same weights, metrics and decisions."""
    config = auto(name)
    whole = train([cache], tmp_path / "whole", config)
    settled = whole.summary["budget"]["settled_at_step"]
    assert whole.summary["steps"] == config.end_after(settled, 10**9)
    assert whole.summary["steps"] < whole.spec["n_steps"] == 25_700_000
    for stop in sorted({15, 105, settled // 15 * 15, whole.summary["steps"] // 15 * 15}):

        def interrupt(done: int, total: int, metrics: dict[str, Any], stop: int = stop) -> None:
            assert done <= total
            if metrics["step"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train([cache], tmp_path / "cut", config, progress=interrupt)
    train([cache], tmp_path / "cut", config)
    assert _what_was_trained(tmp_path / "cut") == _what_was_trained(tmp_path / "whole")
    rows = pq.read_table(tmp_path / "whole" / "metrics.parquet").to_pylist()
    known = [row for row in rows if row["held_out_mse"] is not None]
    assert len(known) == len(rows) - 1  # the row of step 15 is before the first check
    first = whole.summary["budget"]["checks"][0]
    assert (known[0]["held_out_mse"], known[0]["held_out_l0"]) == (first["error"], first["l0"])
    if name in ("steered", "jumprelu"):
        at_end = [row["l0_mean"] for row in rows if settled <= row["step"] <= settled + 15]
        assert at_end[0] == pytest.approx(6.0, rel=0.15)
    if name == "cosine":
        assert (whole.spec["k"], whole.spec["config"]["k"], whole.spec["config"].get("target_l0")) == (5, 5, None)


@pytest.mark.stress
def test_two_processes_decide_the_same(cache: Path, tmp_path: Path) -> None:
    """Under torchrun, with gloo; ranks that disagree would wait for each other for ever."""
    one = train([cache], tmp_path / "one", auto("steered"))
    settings = tmp_path / "settings.toml"
    settings.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (AUTO | KINDS["steered"]).items()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "cli.py"), "sae", "train", str(cache), "-o", str(tmp_path / "two")]
    command += ["--config", str(settings), "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("budget: until error and L0") == 1  # one of them speaks
    two = load_sae(tmp_path / "two").header
    assert two.summary is not None
    assert two.spec == one.spec
    assert two.summary["budget"]["settled_at_step"] == one.summary["budget"]["settled_at_step"]
    assert two.summary["steps"] == one.summary["steps"]
    assert two.summary["penalty"]["l1"] == pytest.approx(one.summary["penalty"]["l1"], rel=1e-3)


@pytest.mark.stress
def test_members_of_a_sweep_stop_by_themselves(cache: Path, tmp_path: Path) -> None:
    """Each equals the one trained alone, though they share batches and stop at different steps."""
    grid = tmp_path / "grid.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in AUTO.items() if name != "expansion"]
    grid.write_text("\n".join(["[base]", *lines, '[grid]\nexpansion = [8, "auto"]', "target_l0 = [3.0, 6.0]", ""]))
    done = sweep(grid, [cache], tmp_path / "sweep")
    assert not done.failed
    for target in (3.0, 6.0):
        alone = train([cache], tmp_path / f"{target}", TrainConfig(**AUTO, target_l0=target, order_seed=0))
        member = tmp_path / "sweep" / "runs" / f"expansion=8-target_l0={target}"
        assert _what_was_trained(member) == _what_was_trained(tmp_path / f"{target}")
        assert alone.summary["budget"]["settled_at_step"] is not None
    table = pq.read_table(tmp_path / "sweep" / "members.parquet").to_pylist()
    assert {row["expansion"] for row in table} == {"8", "auto"}
    assert {row["n_latents"] for row in table} == {64, 8}


def test_without_held_out_images_it_cannot_be(cache: Path) -> None:
    with pytest.raises(BadInput, match=r"holdout 0 leaves none: set holdout \(--holdout 0.1\), or the budget"):
        TrainConfig(tokens="auto", holdout=0.0)


# -------------------------------------------------------------------------------------------- settings from the data


def test_width_and_l0_by_hand() -> None:
    """400 cells, 1,333 cells, all of MLL23, at 257 tokens; widths of ViT tiny, S, B, L, g."""
    assert [auto_expansion(n * 257, 768) for n in (10, 400, 1_333, 41_621)] == [1, 4, 8, 64]
    assert [auto_expansion(n * 257, 192) for n in (10, 400, 1_333, 41_621)] == [1, 16, 32, 64]
    assert [auto_l0(width) for width in (8, 192, 384, 768, 1024, 1536, 10_000)] == [8, 16, 16, 32, 32, 32, 64]


@pytest.mark.stress
def test_the_command_says_what_it_will_do_and_why(cache: Path, tmp_path: Path) -> None:
    command = ["sae", "train", str(cache), "-o", str(tmp_path / "run"), "--batch-tokens", "10", "--device", "cpu"]
    command += ["--warmup-steps", "4"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    for line in (
        "data: 100 tokens of 20 images to train on, 3 images held out",
        "width: 8 latents, expansion 1 (the smallest; 100 distinct tokens are 12 per latent, 32 or more are wanted)",
        "L0: 1 active latents per token (from the root of the tokens' width, 8)",
        "budget: until error and L0 of held-out images have settled; at least 2,750 tokens = 275 steps of 10 = 27.5",
        "budget: at most 257,000,000 tokens = 25,700,000 steps of 10 = 2,570,000.0 passes",
        "time: ",
    ):
        assert line in done.stderr
    page = CliRunner().invoke(cli, ["sae", "info", str(tmp_path / "run")]).stdout
    assert "L0 steered to 1 (l1 " in page
    assert " steps (settled) of 10 tokens, lr 0.001" in page
    both = CliRunner().invoke(cli, [*command[:4], str(tmp_path / "other"), "--l1", "1e-3", "--target-l0", "4"])
    assert (both.exit_code, "either l1, a fixed weight, or target_l0" in both.output) == (1, True)
    word = CliRunner().invoke(cli, [*command, "--tokens", "some"])
    assert (word.exit_code, "'some' is neither a whole number nor auto" in word.output) == (2, True)


def test_too_many_latents_and_too_short_a_run_are_told(cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(expansion=8, batch_tokens=50, tokens=200)
    told: list[str] = []
    done = train([cache], tmp_path / "run", config, say=told.append)
    assert "budget: 200 tokens = 4 steps of 50 = 1.7 passes" in told
    few, short = done.warnings
    assert few.startswith("64 latents for 115 distinct tokens: 1.8 tokens per latent are too few")
    assert "--expansion 1 fits this data" in few
    assert short.startswith("the budget of 4 steps ends within the warm-up of 500")
    assert [line for line in told if line.startswith("warning: ")] == [f"warning: {few}", f"warning: {short}"]
    with pytest.raises(BadInput, match="target_l0 64 is not below the number of latents, 64"):
        train([cache], tmp_path / "wide", TrainConfig(expansion=8, batch_tokens=50, tokens=200, target_l0=64.0))


def test_times_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [duration(seconds) for seconds in (3, 300, 9_000, 400_000)] == ["3 s", "5 min", "2.5 h", "4.6 days"]
    clock, now = StepClock(TrainConfig(tokens=16_448 * 100), 0, 100), iter([10.0, 20.0])
    monkeypatch.setattr("cytosae.training.choices.time.perf_counter", lambda: next(now))
    assert [line for step in range(1, 20) for line in clock.lines(step)] == ["time: 2 s per step, 3 min in all"]
