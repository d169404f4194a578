"""A sweep: each member equals the SAE trained alone, batches are gathered once for all, tables say what came out."""

import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from places import ROOT
from token_caches import write_cache
from training_runs import BATCH, _metrics, _what_was_trained, tokens_of_cells

import stores.token_stream
from cli import cli
from cytosae.sae import SparseAutoencoder, TrainConfig
from cytosae.sweep import sweep
from cytosae.sweep.figures import plot_sweep
from cytosae.sweep.grid import Grid, read_grid
from cytosae.sweep.record import METRICS, as_markdown, means_over_seeds
from cytosae.training import Training, train_step
from cytosae.training.measured_sums import MeasuredSums
from cytosae.training.train import train
from stores import SAE, BadInput, DamagedStore, SpecMismatch, read_header, read_runs

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = """
[base]
expansion = 8
batch_tokens = 10
tokens = 120
warmup_steps = 4
dead_after_steps = 1
l1 = 1e-2
log_every = 1
"""
# 12 steps each, but 6 of the third; of two orders of the tokens, so two passes
MIXED = (
    BASE
    + """holdout = 0.2
[grid]
seed = [0, 7]
[[runs]]
[[runs]]
activation = "topk"
k = 4
[[runs]]
tokens = 60
dead_latents = "resample"
resample_every = 2
[[runs]]
token_set = "patch"
b_dec_init = "zeros"
"""
)


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here; `pictures` marks who looks at them."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr(
            "cytosae.sweep.run.plot_sweep", lambda table, settings, paths, **_: [p.touch() for p in paths]
        )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 5 tokens of width 8, 4 a chunk, image 3 unreadable; read-only."""
    return write_cache(tmp_path_factory.mktemp("sweep") / "acts.zarr", tokens_of_cells(3), unreadable=(3,))


@pytest.fixture(scope="module")
def alone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `train` makes of each member of MIXED by itself, by name."""
    root = tmp_path_factory.mktemp("alone")
    (root / "grid.toml").write_text(MIXED)
    for member in read_grid(root / "grid.toml").members:
        train([cache], root / member.name, member.config)
    return {member.name: _what_was_trained(root / member.name) for member in read_grid(root / "grid.toml").members}


def grid_of(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def parsed(folder: Path, text: str) -> Grid:
    return read_grid(grid_of(folder, text))


def trained(out: Path) -> dict[str, dict[str, Any]]:
    return {run.name: _what_was_trained(run) for run in sorted((out / "runs").iterdir())}


def interrupt_after(n_batches: int) -> Callable[[int, int, str], None]:
    left = n_batches

    def progress(done: int, total: int, state: str) -> None:
        nonlocal left
        left -= "held-out images" not in state  # which are measured between two batches
        if left == 0:
            raise KeyboardInterrupt

    return progress


# ------------------------------------------------------------------------------------------- the same as alone


def plan_of(said: list[str]) -> str:
    """The first line that is no warning."""
    return next(line for line in said if not line.startswith("warning: "))


@pytest.mark.parametrize("at_once", [None, 2])
def test_each_member_equals_the_one_trained_alone(
    cache: Path, tmp_path: Path, alone: dict[str, dict[str, Any]], at_once: int | None
) -> None:
    """Weights, metrics, held-out numbers and header, bit for bit, however many share a pass."""
    said: list[str] = []
    done = sweep(grid_of(tmp_path, MIXED), [cache], tmp_path / "out", at_once=at_once, say=said.append)
    n_passes = {None: 2, 2: 4}[at_once]
    assert plan_of(said).startswith(f"8 SAEs: {n_passes} passes over the data with up to {at_once or 6} at once")
    assert len(alone) == len(done.members) == 8
    assert trained(tmp_path / "out") == alone
    assert not done.was_complete
    assert not done.failed


@pytest.mark.stress
@pytest.mark.parametrize(("stop_after", "then_at_once", "n_finished"), [(3, None, 0), (6, 1, 2), (13, None, 6)])
def test_an_interrupted_sweep_goes_on_and_equals_one_that_was_not(
    cache: Path,
    tmp_path: Path,
    alone: dict[str, dict[str, Any]],
    stop_after: int,
    then_at_once: int | None,
    n_finished: int,
) -> None:
    """Ctrl-C between two batches, in the first pass and the second; finished members are not trained again."""
    grid, out = grid_of(tmp_path, MIXED), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweep(grid, [cache], out, progress=interrupt_after(stop_after))
    steps = {state.stem[6:] for state in (out / "runs").glob("*activation=topk*/state/*")}
    assert steps == ({f"{stop_after:09d}"} if stop_after < 12 else set())  # saved where it was stopped
    finished = {run: time_written(run) for run in (out / "runs").iterdir() if (run / "sae.safetensors").exists()}
    assert len(finished) == n_finished
    assert json.loads((out / "sweep.json").read_text())["complete"] is False
    seen: list[tuple[int, int]] = []
    sweep(grid, [cache], out, at_once=then_at_once, progress=lambda done, total, state: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert trained(out) == alone
    assert {run: time_written(run) for run in finished} == finished
    assert len(read_runs(out)) == 2


def time_written(run: Path) -> int:
    return (run / "sae.safetensors").stat().st_mtime_ns


@pytest.mark.stress
def test_a_killed_command_that_is_repeated_equals_one_that_was_not(cache: Path, tmp_path: Path) -> None:
    """A real process, killed after the first states lie on the disk."""
    text = BASE.replace("tokens = 120", "tokens = 2000") + '[grid]\nseed = [0, 1]\nb_dec_init = ["zeros", "mean"]'
    grid, out = grid_of(tmp_path, text), tmp_path / "out"
    command = [sys.executable, "-m", "cli", "sae", "sweep", str(grid), str(cache), "-o", str(out)]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--checkpoint-every", "10"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not [*out.glob("runs/*/state/*.safetensors")]:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not [*out.glob("runs/*/sae.safetensors")]
    sweep(grid, [cache], out)
    sweep(grid, [cache], tmp_path / "never")
    assert trained(out) == trained(tmp_path / "never")


@pytest.mark.parametrize("at_step", [5, 12])
def test_members_that_are_behind_catch_up(
    cache: Path, tmp_path: Path, alone: dict[str, dict[str, Any]], at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the steps of two members on one batch: some have taken it, others not; and one lost its states."""
    grid, out = grid_of(tmp_path, MIXED), tmp_path / "out"

    def interrupted_step(training: Training, tokens: Any) -> None:
        if training.step == at_step - 1 and training.plan.config.activation == "topk":
            raise KeyboardInterrupt
        train_step(training, tokens)

    with monkeypatch.context() as patch:
        patch.setattr("cytosae.sweep.run.train_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            sweep(grid, [cache], out)
    lost = next(iter(sorted((out / "runs").glob("*=relu*"))))
    for state in (lost / "state").glob("*"):
        state.unlink()
    seen: list[int] = []
    sweep(grid, [cache], out, progress=lambda done, total, state: seen.append(done))
    assert seen == sorted(seen)  # those behind first, then all together
    assert trained(out) == alone


def test_members_with_batches_of_their_own_do_not_share_a_pass(cache: Path, tmp_path: Path) -> None:
    """Other sizes, or other first tokens: the released median uses the first batch up."""
    text = BASE + 'order = "images"\n[grid]\nbatch_tokens = [10, 20]\n'
    grid = grid_of(tmp_path, text + 'b_dec_init = ["zeros", "geometric-median-per-position"]')
    said: list[str] = []
    sweep(grid, [cache], tmp_path / "out", say=said.append)
    assert plan_of(said).startswith("4 SAEs: 4 passes")
    for member in read_grid(grid).members:
        train([cache], tmp_path / member.name, member.config)
        assert _what_was_trained(tmp_path / member.name) == trained(tmp_path / "out")[member.name]


def test_members_share_the_batches_and_the_start_of_b_dec(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six members of 12 steps: 12 batches, one sample for b_dec, and what is gathered ahead; not six times that."""
    sizes: list[int] = []
    real = stores.token_stream.gather

    def counting(pieces: Any, places: Any, width: int) -> Any:
        sizes.append(len(places))
        return real(pieces, places, width)

    monkeypatch.setattr(stores.token_stream, "gather", counting)
    members = sweep(grid_of(tmp_path, BASE + "[grid]\nseed = [0, 1, 2]\nlr = [1e-3, 2e-3]"), [cache], tmp_path / "out")
    assert len(members.members) == 6
    ahead = 3  # batches that a stream prepares before anybody asks
    assert 12 <= sizes.count(BATCH) <= 12 + ahead
    assert sum(size > BATCH for size in sizes) <= 1 + ahead  # of the sample


def test_seeds_differ_in_their_weights_only(cache: Path, tmp_path: Path) -> None:
    """Equal held-out images and order of tokens; first weights of their own."""
    sweep(grid_of(tmp_path, BASE + "holdout = 0.3\n[grid]\nseed = [0, 1]"), [cache], tmp_path / "out")
    runs = sorted((tmp_path / "out" / "runs").iterdir())
    assert [run.name for run in runs] == ["seed=0", "seed=1"]
    first, second = (
        {name: (run / name).read_bytes() for name in ("held_out.parquet", "sae.safetensors")} for run in runs
    )
    assert first["held_out.parquet"] == second["held_out.parquet"]
    assert first["sae.safetensors"] != second["sae.safetensors"]
    assert [read_header(run, SAE).spec["config"]["order_seed"] for run in runs] == [0, 0]


def test_the_grid_is_trained_for_each_kind_of_caches(cache: Path, tmp_path: Path) -> None:
    """Two caches of block 10 are trained on together; that of block 2 by itself. Each equals `train` on its caches."""
    more = write_cache(tmp_path / "more.zarr", tokens_of_cells(8, n_images=6))
    early = write_cache(tmp_path / "early.zarr", tokens_of_cells(5), block=2)
    grid = grid_of(tmp_path, BASE + "[grid]\nseed = [0, 1]")
    done = sweep(grid, [cache, early, more], tmp_path / "out")
    assert [(row["name"], row["caches"]) for row in done.members] == [
        *(("block10-seed=0", "block10"), ("block10-seed=1", "block10")),
        *(("block2-seed=0", "block2"), ("block2-seed=1", "block2")),
    ]
    assert [(row["caches"], row["n"]) for row in done.table] == [("block10", 2), ("block2", 2)]
    assert "| block2 | 2 |" in done.markdown
    config = read_grid(grid).members[1].config
    for name, caches in (("block10", [cache, more]), ("block2", [early])):
        train(caches, tmp_path / name, config)
        assert _what_was_trained(tmp_path / name) == trained(tmp_path / "out")[f"{name}-seed=1"]


def test_kinds_of_one_block_are_told_apart(cache: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other.zarr", tokens_of_cells(5), weights_sha256="1" * 64)
    done = sweep(grid_of(tmp_path, BASE), [cache, other], tmp_path / "out")
    names = [row["caches"] for row in done.members]
    assert len(set(names)) == 2
    assert all(name.startswith("block10-") for name in names)


def test_as_many_are_trained_at_once_as_fit_in_half_of_the_free_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and two moments: 16 bytes per weight. One that does not fit is tried all the same."""
    text = BASE + "[grid]\nexpansion = [8, 4, 64]\nseed = [0, 1]"
    n_weights = {expansion: 2 * 8 * 8 * expansion + 8 * expansion + 8 for expansion in (8, 4, 64)}
    free = 2 * 16 * (2 * n_weights[8] + n_weights[4])
    monkeypatch.setattr("cytosae.sweep.run.free_memory", lambda device: free)
    said: list[str] = []
    sweep(grid_of(tmp_path, text), [cache], tmp_path / "out", say=said.append)
    assert plan_of(said).startswith("6 SAEs: 4 passes over the data with up to 3 at once")  # 8 8 4, 4, 64, 64


# ------------------------------------------------------------------------------------------- what goes wrong


FAILING = BASE + "[grid]\nlr = [4e-4, 1e18]\nseed = [0, 1]"


def test_a_member_that_diverges_is_listed_and_the_others_go_on(cache: Path, tmp_path: Path) -> None:
    """And it is not tried again."""
    out = tmp_path / "out"
    arguments = ["sae", "sweep", str(grid_of(tmp_path, FAILING)), str(cache), "-o", str(out), "--device", "cpu"]
    first = CliRunner().invoke(cli, arguments)
    assert first.exit_code == 0, first.output
    assert "4 SAEs: 1 pass over the data with up to 4 at once" in first.stderr
    assert "warning: 2 of 4 SAEs failed: lr=1e+18-seed=0 at step 1, lr=1e+18-seed=1 at step 1" in first.stderr
    assert "| 1e+18 | 0 of 2 | n/a | n/a | n/a | n/a | failed at step 1 (seed 0), 1 (seed 1) |" in first.stdout
    assert first.stdout == (out / "table.md").read_text()
    rows = pq.read_table(out / "members.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["complete", "complete", "failed", "failed"]
    assert all("the loss became" in row["message"] for row in rows[2:])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = CliRunner().invoke(cli, [*arguments, "--json"])
    assert again.exit_code == 0
    assert "already complete with these settings" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    printed = json.loads(again.stdout)
    assert [row["failed_at_step"] for row in printed["members"]] == [None, None, 1, 1]
    assert [(row["lr"], row["n"], row["n_failed"]) for row in printed["table"]] == [(4e-4, 2, 0), (1e18, 0, 2)]


def test_weights_that_diverge_in_the_last_step_are_a_failure_too(cache: Path, tmp_path: Path) -> None:
    text = FAILING.replace("tokens = 120", "tokens = 10").replace("1e18", "1e30")
    done = sweep(grid_of(tmp_path, text), [cache], tmp_path / "out")
    assert [row["failed_at_step"] for row in done.members] == [None, None, 1, 1]
    assert "a weight became NaN or infinite in the last step" in done.failed[0]["message"]
    assert not [*(tmp_path / "out").glob("runs/*1e+30*/sae.safetensors")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[bass]\nlr = 1", r"grid\.toml has bass at its top level; expected the tables \[base\], \[grid\]"),
        ("base = 3", r"base must be a table of settings, \[base\]; found 3"),
        ("[base]\nlearning = 1", r"grid\.toml, \[base\] sets learning, which is no setting; there are expansion"),
        ('[base]\nlr = "fast"', r"grid\.toml, \[base\]: lr must be float; found 'fast'"),
        ('[base]\npreset = "mine"', r"\[base\]: preset must be one of cytosae, paper; found 'mine'"),
        ("[grid]\nseed = 3", r"\[grid\]: seed must be a list of values, as in seed = \[0, 1, 2\]; found 3"),
        ("[grid]\nseed = []", r"\[grid\]: seed must be a list of values"),
        ("[grid]\nseed = [0, 1.5]", r"\[grid\]: seed must be int; found 1.5"),
        ("[grid]\nseed = [18446744073709551616]", r"\[grid\]: seed must be int; found 18446744073709551616"),
        ('[grid]\npreset = ["paper"]', r"\[grid\] sets preset, which is for all members; it belongs into \[base\]"),
        ("runs = [1]", r"runs must be tables of settings, each begun by \[\[runs\]\]"),
        ("runs = []", r"runs must be tables of settings"),
        ("[[runs]]\nlr = 1\n[[runs]]\nsped = 1", r"\[\[runs\]\] number 2 sets sped, which is no setting"),
        ("[grid]\nlr = [1]\n[[runs]]\nlr = 2", r"\[\[runs\]\] number 1 sets lr, which \[grid\] sets, too"),
        ("[grid]\nlr = [1, 1.0]", r"asks twice for one SAE: lr 1.0, and lr 1.0; leave one out"),
        ("[[runs]]\n[[runs]]\nexpansion = 64", r"twice for one SAE: with the settings of all, and expansion 64"),
        ("[grid]\nk = [4]", r"the member k 4 cannot be trained: activation 'relu' takes no k.* one \[\[runs\]\]"),
        ("[grid]\nlr = [-1]", r"the member lr -1.0 cannot be trained: lr must be above 0"),
        ("[grid]\nseed = [" + "0," * 101 + "]\nl1 = [" + "0," * 100 + "]", r"asks for 10,100 SAEs; .* at most 10,000"),
        ("lr = ", r"grid\.toml cannot be read as TOML"),
        ("x = " + "[" * 100_000, r"grid\.toml cannot be read as TOML"),
        ("x = " + "9" * 5_000, r"grid\.toml cannot be read as TOML"),
        ("#" * (1 << 20) + "\n", r"grid\.toml is larger than 1 MiB"),
    ],
)
def test_bad_grids_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        parsed(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'expansion = 8\n[[runs]]\nactivation = "topk"\nk = 65',
            r"the member all cannot be trained: k must lie between 1 and the 64 latents",
        ),
        ("mix = [1, 2]", r"the member all cannot be trained: mix must have a share for each of the 1 caches"),
        (
            'preset = "cytosae"\n[grid]\nbatch_tokens = [4, 10]',
            r"the member batch_tokens=4 cannot be trained: .* needs batches of at least one image",
        ),
    ],
)
def test_members_that_do_not_fit_the_caches_are_found_before_training(
    cache: Path, tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        sweep(grid_of(tmp_path, f"[base]\n{text}"), [cache], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_continued_by_its_own_sweep_only(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, grid = tmp_path / "out", grid_of(tmp_path, BASE)
    sweep(grid, [cache], out)
    with pytest.raises(
        SpecMismatch, match=r"out holds a sweep of other settings or caches \(members.all .* against .*\)"
    ):
        sweep(grid_of(tmp_path, BASE + "lr = 1"), [cache], out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(SpecMismatch, match="full holds something else; give an empty or new folder with -o"):
        sweep(grid, [cache], tmp_path / "full")
    for inside in (cache / "out", out / "runs" / "all"):
        with pytest.raises(SpecMismatch, match="is or lies inside another artefact"):
            sweep(grid_of(tmp_path, BASE), [cache], inside)
    with pytest.raises(BadInput, match="given twice"):
        sweep(grid, [cache, cache], tmp_path / "twice")
    with pytest.raises(BadInput, match="at_once must be from 1 to 256; found 0"):
        sweep(grid, [cache], tmp_path / "none", at_once=0)
    record = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps(record | {"members": [{"name": "all"}]}))
    with pytest.raises(DamagedStore, match=r"sweep.json was changed by hand"):
        sweep(grid, [cache], out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="start it without torchrun"):
        sweep(grid, [cache], tmp_path / "ranks")


# ------------------------------------------------------------------------------------------- what a grid asks for


def test_the_grid_is_multiplied_out_in_order_and_named_by_what_varies(tmp_path: Path) -> None:
    """`[[runs]]` outside, `[grid]` inside; a list of one value is no variation."""
    grid = parsed(tmp_path, MIXED + "[[runs]]\nl1 = 0.5")
    names = "activation k l1 tokens token_set dead_latents resample_every b_dec_init seed".split()
    assert grid.varied == tuple(names)
    assert [member.config.seed for member in grid.members] == [0, 7] * 5
    simple = parsed(tmp_path, BASE + "[grid]\nl1 = [8e-5, 1]\nexpansion = [2]\nseed = [0, 1]")
    assert [member.name for member in simple.members] == [
        *("l1=8e-05-seed=0", "l1=8e-05-seed=1", "l1=1.0-seed=0", "l1=1.0-seed=1")
    ]
    assert simple.varied == ("l1", "seed")
    assert {member.config.expansion for member in simple.members} == {2}


def test_presets_budgets_and_the_seed_of_the_order(tmp_path: Path) -> None:
    """A preset gives way to [base], [base] to the others; a budget of the other kind is replaced, not added."""
    grid = parsed(
        tmp_path, '[base]\npreset = "cytosae"\nlr = 1\n[[runs]]\nepochs = 2\n[[runs]]\nlr = 3\norder_seed = 5'
    )
    first, second = (member.config for member in grid.members)
    assert (first.order, first.lr, first.epochs, first.tokens, first.order_seed) == ("images", 1, 2, None, 0)
    assert (second.lr, second.epochs, second.tokens, second.order_seed) == (3, None, 257_000_000, 5)


def test_the_grid_in_the_docs_is_the_papers_ablation(tmp_path: Path) -> None:
    """docs/reference/paper.md 1.3: everything around the chosen values, three seeds each."""
    page = (ROOT / "docs" / "training.md").read_text()
    text = re.search(r"^```toml\n(\[base\].*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert text is not None
    grid = parsed(tmp_path, text[1])
    assert len(grid.members) == 30
    assert grid.varied == ("expansion", "l1", "lr", "dead_latents", "b_dec_init", "seed")
    values = {name: {getattr(member.config, name) for member in grid.members} for name in grid.varied}
    assert values == {
        "expansion": {16, 32, 64, 128},
        "l1": {8e-4, 8e-5, 8e-6},
        "lr": {4e-3, 4e-4, 4e-5},
        "dead_latents": {"ghost", "none"},
        "b_dec_init": {"geometric-median", "mean"},
        "seed": {0, 1, 2},
    }


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    """Shares of a mix hold what no file name should; a hash tells cut names apart."""
    shares = ", ".join("[" + ", ".join(f"{n}.123456789012" for n in (*range(1, 9), last)) + "]" for last in (3, 4))
    names = [member.name for member in parsed(tmp_path, f"[grid]\nmix = [{shares}]").members]
    assert len(set(names)) == 2
    assert all(len(name) <= 100 and name.startswith("mix=1.123456789012+2.123456789012+") for name in names)


# ------------------------------------------------------------------------------------------- tables and pictures


def _member(caches: str, lr: float, seed: int, value: float | None, status: str = "complete") -> dict[str, Any]:
    step = 1_234 if status == "failed" else None
    return {"caches": caches, "lr": lr, "seed": seed, "status": status, "failed_at_step": step} | dict.fromkeys(
        METRICS, value
    )


def test_means_and_standard_deviations_by_hand() -> None:
    """2, 4, 9: mean 5, deviations -3, -1, 4, so the variance is 26 / 2. One SAE has no deviation, none has no mean."""
    members = [
        *(_member("a", 1.0, seed, value) for seed, value in enumerate((2.0, 4.0, 9.0))),
        _member("a", 2.0, 0, 7.0),
        _member("a", 2.0, 1, None, "failed"),
        _member("b", 1.0, 0, None, "unfinished"),
    ]
    table = means_over_seeds(members, ["lr", "seed"])
    assert [(row["caches"], row["lr"], row["n"], row["n_failed"], row["n_unfinished"]) for row in table] == [
        ("a", 1.0, 3, 0, 0),
        ("a", 2.0, 1, 1, 0),
        ("b", 1.0, 0, 0, 1),
    ]
    assert [(row["final_l0_mean"], row["final_l0_sd"]) for row in table] == [
        (5.0, math.sqrt(13)),
        (7.0, None),
        (None, None),
    ]
    lines = as_markdown(table, ["lr", "seed"]).splitlines()
    assert lines[2] == (
        "| caches | lr | SAEs | explained variance | L0 | MSE | dead share | latents >= 10^-3 | failed |"
    )
    assert lines[4] == "| a | 1.0 | 3 | 5.000 ± 3.606 | 5.0 ± 3.6 | 5 ± 3.606 | 5.00 ± 3.61 | 5 ± 4 |  |"
    assert lines[5].endswith("| 7 | failed at step 1,234 (seed 1) |")
    assert lines[6] == "| b | 1.0 | 0 of 1 | n/a | n/a | n/a | n/a | n/a |  |"


def test_the_tables_hold_what_the_runs_say(cache: Path, tmp_path: Path) -> None:
    """Parquet and sweep.json against the members' own `sae.json`."""
    out = tmp_path / "out"
    done = sweep(grid_of(tmp_path, MIXED), [cache], out)
    record = json.loads((out / "sweep.json").read_text())
    assert (record["format"], record["format_version"], record["complete"]) == ("sweep", 1, True)
    assert record["grid"]["grid"] == {"seed": [0, 7]}
    rows = pq.read_table(out / "members.parquet").to_pylist()
    assert rows == done.members
    for row, entry in zip(rows, record["members"], strict=True):
        header = read_header(out / row["folder"], SAE)
        assert row["identity"] == entry["identity"] == record["spec"]["members"][row["name"]] == header.identity
        summary = header.summary or {}
        config = header.spec["config"]
        assert {name: row[name] for name in entry["settings"]} == {name: config[name] for name in entry["settings"]}
        assert (row["final_loss"], row["final_dead_fraction"]) == tuple(
            _metrics(out / row["folder"])[-1][n] for n in ("loss", "dead_fraction")
        )
        assert row["held_out_l0"] == summary["held_out"]["l0"]
        assert row["final_tokens"] == summary["tokens"]
        assert row["seconds"] > 0
    table = pq.read_table(out / "table.parquet").to_pylist()
    assert table == done.table
    assert len(table) == 4
    assert table[1]["held_out_mse_mean"] == statistics.fmean(row["held_out_mse"] for row in rows[2:4])
    assert "the held-out images" in (out / "table.md").read_text()


def test_no_column_of_the_tables_has_the_name_of_a_setting(cache: Path, tmp_path: Path) -> None:
    """`loss`, `l1` and `tokens` are settings and also something that is measured."""
    text = "[base]\nbatch_tokens = 10\nwarmup_steps = 2\nexpansion = 2\n"
    text += "[grid]\nl1 = [0.001, 0.01]\nloss = ['mse', 'normed']\ntokens = [20]\nseed = [0, 1]\n"
    (tmp_path / "grid.toml").write_text(text)
    done = sweep(tmp_path / "grid.toml", [cache], tmp_path / "out")
    assert [(row["l1"], row["loss"], row["n"]) for row in done.table] == [
        (l1, loss, 2) for l1 in (0.001, 0.01) for loss in ("mse", "normed")
    ]
    settings = {field.name for field in dataclasses.fields(TrainConfig)}
    assert settings & set(done.members[0]) <= {"l1", "loss", "tokens", "seed"}


def test_meaningful_latents_are_those_that_are_strong_where_they_are_active() -> None:
    """Four images of two tokens, latents that copy the channels; 10^-3 is the least mean activation that counts.

    Latent 0: 0.002 in one image, nothing elsewhere. 1: 0.0018 there. 2: 0.003 and 0.0001 in two images. 3: never.
    """
    model = SparseAutoencoder(4, 4)
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(4))
        model.W_dec.copy_(torch.eye(4))
    images = torch.zeros(4, 2, 4)
    images[0, 1, 0], images[1, 0, 1] = 0.002001, 0.0018
    images[2, :, 2], images[3, :, 2] = 0.003, 0.0001
    for step in (1, 8):  # tokens at a time
        with torch.inference_mode():
            sums = MeasuredSums(model, loss="mse", step=step, window_begins=0)
            sums.add(images[:3])
            sums.add(images[3:])
        assert sums.n_meaningful() == 2


def test_pictures_are_drawn(cache: Path, tmp_path: Path) -> None:
    sweep(grid_of(tmp_path, FAILING), [cache], tmp_path / "out")
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.width > 400
    assert (tmp_path / "out" / "sweep.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("n_values", [0, 1, 40])
def test_pictures_of_few_and_of_many_values(tmp_path: Path, n_values: int) -> None:
    """No value is left without a colour; nothing to show is a picture, too."""
    rows = [_member("a", 10.0**-n, 0, 10.0**n) for n in range(n_values)] or [_member("a", 1.0, 0, None, "failed")]
    table = means_over_seeds(rows, ["lr", "seed"])
    plot_sweep(table, ["lr"] if n_values > 1 else [], [tmp_path / "s.png"], x="final_l0", y="final_explained_variance")
    assert (tmp_path / "s.png").stat().st_size > 1_000
