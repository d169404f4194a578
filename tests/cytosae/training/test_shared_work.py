"""What one rank, or each rank for its share, does for all: the start of b_dec and the penalty, the held-out images."""

import dataclasses
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from token_caches import write_cache
from training_runs import BATCH, SETTINGS, tokens_of_cells

from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae, make_config
from cytosae.sae.model import geometric_median
from cytosae.training import data as data_module
from cytosae.training.data import OF_DATA, choose_data, initial_b_dec, open_data
from cytosae.training.held_out import held_out_pieces, measure_held_out, tokens_at_a_time
from cytosae.training.measured_sums import MeasuredSums
from cytosae.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

SHARE = """
import json, os, sys
from pathlib import Path
import torch
from test_shared_work import held_out_config, odd_model
from cytosae.training import held_out
from cytosae.training.data import open_data
from cytosae.training.distributed import joined_ranks

read, real = [], held_out.images_of
def watched(store, mask, token_set, chunks, *, step):
    read.extend(f"{store.root.name}:{chunk}" for chunk in chunks)
    return real(store, mask, token_set, chunks, step=step)
held_out.images_of = watched
config = held_out_config(int(sys.argv[1]))
with joined_ranks("cpu") as ranks:
    data = open_data([Path(each) for each in sys.argv[3:]], config)
    found = held_out.measure_held_out(odd_model(), data, config, device="cpu", ranks=ranks)
Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps([found, read]))
"""
START = """
import importlib, os, sys
import cli
folder = sys.argv[1]
data, train = (importlib.import_module(f"cytosae.training.{name}") for name in ("data", "train"))
def counted(place, name):
    real = getattr(place, name)
    def call(*given, **more):
        with open(os.path.join(folder, f"{name}.{os.environ['RANK']}"), "a") as file:
            file.write("x")
        return real(*given, **more)
    setattr(place, name, call)
counted(data, "geometric_median")
counted(train, "begin_steering")
sys.argv = ["cyto", *sys.argv[2:]]
cli.main()
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """24 and 10 images of 5 tokens of width 8, 4 a chunk."""
    root = tmp_path_factory.mktemp("shared")
    return [
        write_cache(root / "acts.zarr", tokens_of_cells(3), unreadable=(3,)),
        write_cache(root / "more.zarr", tokens_of_cells(8, n_images=10) + np.float16(20)),
    ]


def held_out_config(seed: int) -> TrainConfig:
    return make_config(options={**SETTINGS, "tokens": 4 * BATCH, "holdout": 0.5, "seed": seed})


def odd_model() -> SparseAutoencoder:
    """Weights that need a gradient, as in training."""
    model = SparseAutoencoder(8, 64)
    model.init_weights(torch.Generator().manual_seed(5))
    return model


def on_two_ranks(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent)])
    return subprocess.run(
        [*command, sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )


@pytest.mark.stress
@pytest.mark.parametrize("seed", [0, 1])
def test_each_rank_measures_on_its_share_of_the_held_out_images(caches: list[Path], tmp_path: Path, seed: int) -> None:
    """Every chunk is read by one rank; the figures of both are those of one process, to the order of the sums."""
    config = held_out_config(seed)
    wanted = measure_held_out(odd_model(), open_data(caches, config), config, device="cpu")
    done = on_two_ranks(SHARE, str(seed), str(tmp_path), *map(str, caches))
    assert done.returncode == 0, done.stderr[-2000:]
    (first, read), (second, read_by_second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first == pytest.approx(wanted, rel=1e-9)
    assert (first["n_images"], first["n_tokens"]) == (wanted["n_images"], wanted["n_tokens"])
    assert len({*read, *read_by_second}) == len(read) + len(read_by_second)
    assert abs(len(read) - len(read_by_second)) <= 1
    assert all((read, read_by_second))


@pytest.mark.stress
def test_what_a_run_starts_with_is_computed_on_one_rank(caches: list[Path], tmp_path: Path) -> None:
    """The median and jumprelu's first thresholds; the weights are those of one process."""
    values: dict[str, Any] = {name: value for name, value in SETTINGS.items() if name != "l1"}
    values |= {"tokens": 4 * BATCH, "activation": "jumprelu", "target_l0": 5.0, "holdout": 0.2}
    config = make_config(options=values)
    written = tmp_path / "settings.toml"
    written.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    train(caches[:1], tmp_path / "one", config)
    arguments = ["sae", "train", str(caches[0]), "-o", str(tmp_path / "two"), "--config", str(written)]
    done = on_two_ranks(START, str(tmp_path), *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("geometric_median", "begin_steering"):
        assert (tmp_path / f"{name}.0").read_text() == "x"
        assert not (tmp_path / f"{name}.1").exists()
    one, two = (load_sae(tmp_path / name).model.state_dict() for name in ("one", "two"))
    for key, value in one.items():
        assert (two[key] - value).abs().max() <= 1e-4 * value.abs().max(), key


def test_measuring_keeps_no_dense_latents_for_a_gradient(caches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a run need one: without a word against it all micro-batches would stay in memory."""
    seen, real = list[bool](), MeasuredSums.add

    def watched(sums: Any, x_NTD: torch.Tensor) -> None:
        real(sums, x_NTD)
        seen.append(sums._activation_L.requires_grad)

    monkeypatch.setattr(MeasuredSums, "add", watched)
    config = held_out_config(0)
    measure_held_out(odd_model(), open_data(caches, config), config, device="cpu")
    assert seen
    assert not any(seen)


def test_what_is_measured_after_the_last_step_shows_progress(caches: list[Path], tmp_path: Path) -> None:
    """It may take minutes: held-out images, then those for the health, each to the end."""
    seen: list[tuple[int, int, str]] = []
    config = held_out_config(0)
    done = train(caches, tmp_path / "run", config, measure_progress=lambda *given: seen.append(given))
    parts = {state: [(n, total) for n, total, other in seen if other == state] for _, _, state in seen}
    assert list(parts) == ["the error on held-out images", "the health of the SAE"]
    for counts, n_images in zip(parts.values(), (done.summary["held_out"]["n_images"], 33), strict=True):
        assert len(counts) > 3  # of chunks
        assert counts == sorted(counts)
        assert {total for _, total in counts} == {n_images} == {counts[-1][0]}


@pytest.mark.parametrize("background", ["keep", "some"])
def test_for_a_gpu_the_images_of_several_chunks_are_taken_together(caches: list[Path], background: str) -> None:
    """The same tokens in the same order, in pieces of up to `step` tokens."""
    config = held_out_config(0)
    data = choose_data(open_data(caches, config).stores, config)
    if background == "some":
        rng = np.random.default_rng(0)
        keep = [rng.random((store.spec.n_images, 5)) < 0.7 for store in data.stores]
        data = dataclasses.replace(data, background=dataclasses.make_dataclass("Kept", ["keep"])(keep))
    step = 40
    apart = list(held_out_pieces(data, config, "cpu", step=step))
    together = list(held_out_pieces(data, config, "cuda", step=step))  # the pieces themselves are on the host
    assert len(together) < len(apart)
    assert all(piece.shape[0] * piece.shape[1] <= step for piece in together)
    assert torch.equal(*(torch.cat([piece.flatten(0, 1) for piece in pieces]) for pieces in (apart, together)))
    if background == "keep":
        sizes = [piece.shape[0] * 5 for piece in together]
        assert all(one + other > step for one, other in itertools.pairwise(sizes))


def test_a_gpu_measures_1_gib_of_latents_at_a_time_and_a_cpu_128_mib() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = {}
        for device in ("cpu", "cuda"):
            with torch.device(device):
                found[device] = tokens_at_a_time(SparseAutoencoder(768, 49_152))
    assert found == {"cpu": 682, "cuda": 5_461}


def test_the_median_is_computed_on_the_device_of_the_run(caches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors; it is the CPU's that is kept, once for each device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    devices, real = list[str](), geometric_median

    def watched(points: torch.Tensor) -> torch.Tensor:
        devices.append(points.device.type)
        found = real(points)
        assert found.device == points.device
        return found

    monkeypatch.setattr(data_module, "geometric_median", watched)
    config = held_out_config(0)
    data = open_data(caches, config)
    on_cpu = initial_b_dec(data, config)
    real_from_numpy, copied_to = torch.from_numpy, torch.ops.aten._to_copy  # `.to` would look for a real GPU
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, monkeypatch.context() as patch:
        patch.setattr(torch, "from_numpy", lambda values: fake.from_tensor(real_from_numpy(values)))
        patch.setattr(torch.Tensor, "to", lambda tensor, device: copied_to(tensor, device=torch.device(device)))
        assert initial_b_dec(data, config, "cuda").device.type == "cpu"
    assert devices == ["cpu", "cuda"]
    assert torch.equal(initial_b_dec(data, config), on_cpu)
    assert devices == ["cpu", "cuda"]


def test_saes_share_their_data_only_if_all_that_chooses_it_is_equal() -> None:
    """In a sweep, whose members always have an `order_seed`: `seed` is not asked."""
    read = {*re.findall(r"\bconfig\.(\w+)", inspect.getsource(choose_data))}
    assert read - {"seed"} == {*OF_DATA}
