"""Several processes of one run: whichever of them stops, in whatever line, none of the others waits for ever."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from places import ROOT
from rank_worker import AT, config_of
from token_caches import write_cache
from training_runs import tokens_of_cells

from cytosae.sae import load_sae
from cytosae.training.batch_top_k import _of_all_ranks
from cytosae.training.distributed import Ranks, joined_ranks
from cytosae.training.train import train
from stores.devices import resolve_device
from stores.errors import BadInput

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.stress]
LIMIT = 200  # seconds; two processes that wait for each other would do so for hours
# what stops: rank, error there, words of it; the newest step that is saved afterwards (None: no state)
STOPPED: dict[str, tuple[int, str, str, int | None]] = {
    "open": (1, "StoreUnreachable", "cannot be read", None),
    "folder": (0, "SpecMismatch", "holds another run", None),
    "read": (1, "StoreUnreachable", "cannot be read", AT - 1),
    "memory": (1, "OutOfMemory", "out of memory on the GPU: 2.00 GiB more were asked for. Lower --expansion", AT - 1),
    "progress": (0, "ConnectionError", "the notebook is gone", 4),
    "resample": (1, "OutOfMemory", "out of memory on the GPU", 4),  # weights have changed in part: not saved
    "measure": (0, "OutOfMemory", "out of memory on the GPU", 8),
    "finish": (1, "StoreUnreachable", "cannot be read", 8),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """All cases, one after the other, in the same two processes: (folder, outcomes by case of each rank)."""
    folder = tmp_path_factory.mktemp("ranks")
    write_cache(folder / "a.zarr", tokens_of_cells(3))
    cases = ["fine", *STOPPED, "settings", "nan", "interrupt", "read", "killed"]
    given = [f"{case}:{port}" for case, port in zip(cases, _free_ports(len(cases)), strict=True)]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    command = [sys.executable, str(ROOT / "tests" / "support" / "rank_worker.py"), str(folder), *given]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}) for rank in range(2)]
    try:
        for rank in ranks:
            rank.wait(LIMIT)
    finally:
        for rank in ranks:
            rank.kill()
    return folder, [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(2)]


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _saved_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in Path(run.parent).rglob(f"*{run.name}*/state/*.safetensors"))


@pytest.mark.parametrize("case", STOPPED)
def test_when_one_stops_all_stop(case: str, trained: tuple[Path, list[dict[str, Any]]]) -> None:
    """The one with its own error, the other with a line that names it; rank 0 has saved the state if it is whole."""
    folder, outcomes = trained
    rank, kind, words, saved = STOPPED[case]
    its, other = outcomes[rank][case], outcomes[1 - rank][case]
    assert its["type"] == kind
    assert words in its["said"]
    assert other["type"] == "OtherProcessStopped"
    first_words = words.split(":")[0].removesuffix(" on the GPU")
    assert other["said"].startswith(f"process {rank} of 2 stopped: ")
    assert first_words in other["said"]
    assert "\n" not in its["said"] + other["said"]
    if case != "read":  # which was finished afterwards
        assert _saved_steps(folder / case)[-1:] == ([] if saved is None else [saved])


def test_it_goes_on_from_there(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    """`read` was stopped in step 6. The second call would be stopped in its own sixth step; five were left."""
    folder, outcomes = trained
    assert [of_rank["fine"]["type"] for of_rank in outcomes] == [None, None]
    assert [of_rank["read again"]["type"] for of_rank in outcomes] == [None, None]
    weights = [(folder / case / "sae.safetensors").read_bytes() for case in ("fine", "read")]
    assert weights[0] == weights[1]
    train([folder / "a.zarr"], folder / "alone", config_of("fine"), device="cpu")
    two, one = (load_sae(folder / name).model.state_dict() for name in ("fine", "alone"))
    for name, value in one.items():
        assert (two[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_a_nan_on_one_rank_is_a_nan_for_all(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    """batchtopk, whose ranks ask each other for the largest values."""
    said = [of_rank["nan"] for of_rank in trained[1]]
    assert [one["type"] for one in said] == ["Diverged", "Diverged"]
    assert said[0] == said[1]
    assert f"the loss became nan at step {AT - 1}" in said[0]["said"]


def test_a_signal_to_one_stops_both_between_two_steps(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, outcomes = trained
    assert [of_rank["interrupt"]["type"] for of_rank in outcomes] == ["KeyboardInterrupt", "KeyboardInterrupt"]
    assert _saved_steps(folder / "interrupt")[-1] == AT


def test_ranks_with_other_settings_are_refused(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    for of_rank in trained[1]:
        assert of_rank["settings"]["type"] == "BadInput"
        assert (
            "all processes of a run must work on the same; found different data or settings"
            in of_rank["settings"]["said"]
        )


def test_a_process_that_is_killed_does_not_keep_the_other(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, outcomes = trained
    assert "killed" not in outcomes[1]
    assert outcomes[0]["killed"]["type"] == "OtherProcessStopped"
    assert "another of the 2 processes of this run was ended; run the same command" in outcomes[0]["killed"]["said"]
    assert _saved_steps(folder / "killed")[-1] == AT - 1


# ------------------------------------------------------------------------------------------------ on GPUs, without one


class Recorded:
    """Stands for a function: notes its calls in a common list."""

    def __init__(self, calls: list[tuple[str, Any, Any]], name: str, result: Any = None) -> None:
        self._calls, self._name, self._result = calls, name, result

    def __call__(self, *given: Any, **more: Any) -> Any:
        self._calls.append((self._name, given, more))
        return self._result


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """Process 1 of 2 on a machine with two GPUs; the calls to torch.cuda and torch.distributed."""
    calls: list[tuple[str, Any, Any]] = []
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", Recorded(calls, "set_device"))
    results = {"get_rank": 1, "get_world_size": 2, "new_group": "hosts"}
    for name in (
        "init_process_group",
        "new_group",
        "destroy_process_group",
        "all_reduce",
        "get_rank",
        "get_world_size",
    ):
        monkeypatch.setattr(dist, name, Recorded(calls, name, results.get(name)))
    monkeypatch.setattr(dist, "broadcast_object_list", Recorded(calls, "broadcast_object_list"))
    return calls


def test_each_process_takes_its_gpu_before_nccl_begins(two_gpus: list[tuple[str, Any, Any]]) -> None:
    """NCCL is given the device, and objects go through gloo: nothing is put on the GPU of process 0."""
    device = resolve_device("cuda")
    assert device == "cuda:1"
    with joined_ranks(device) as ranks:
        assert (ranks.rank, ranks.size, ranks.hosts) == (1, 2, "hosts")
        ranks.broadcast("anything")
        ranks.barrier()
    names = [name for name, _, _ in two_gpus]
    assert names[:3] == ["set_device", "init_process_group", "new_group"]
    assert names[-1] == "destroy_process_group"
    of = {name: (given, more) for name, given, more in two_gpus}
    gpu = torch.device("cuda", 1)
    assert of["set_device"][0] == (gpu,)
    assert of["init_process_group"][0] == ("nccl",)
    assert of["init_process_group"][1]["device_id"] == gpu
    assert of["new_group"][1]["backend"] == "gloo"
    on_hosts = [(given, more) for name, given, more in two_gpus if name in ("all_reduce", "broadcast_object_list")]
    assert len(on_hosts) == 4  # three questions, and the object
    for given, more in on_hosts:
        assert more["group"] == "hosts"
        assert isinstance(given[0], list) or given[0].device.type == "cpu"


def test_processes_that_would_share_a_gpu_are_refused(
    two_gpus: list[tuple[str, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match=r"each of the 2 processes on .* found device 'cuda:0' for process 1\. Leave"):
        with joined_ranks("cuda:0"):
            pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match=r"found 1 for 2 processes\. Give --nproc-per-node 1"):
        resolve_device("cuda")
    assert not two_gpus


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_of_all_ranks_equal_those_of_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank has fewer values than are wanted, one none; a NaN anywhere comes back."""
    draws = torch.Generator().manual_seed(0)
    parts = [torch.rand(n, generator=draws).to(dtype) + 0.1 for n in (7, 3, 0)]
    ranks, sent = Ranks(0, 3), []

    def gather(self: Ranks, values: torch.Tensor) -> list[torch.Tensor]:
        sent.append(values)
        return [values] if len(sent) < 3 else sent

    monkeypatch.setattr(Ranks, "all_gather", gather)
    for part, bound in zip(parts, (0.5, 0.25, 0.0), strict=True):
        kept, highest = _of_all_ranks(part, bound, 7, ranks)
    assert highest == 0.5
    assert kept.dtype == dtype
    assert sorted(kept.tolist()) == sorted(torch.cat(parts).tolist())[-7:]
    sent.clear()
    for part in (parts[0], torch.tensor([0.3, float("nan")], dtype=dtype), parts[2]):
        kept, _ = _of_all_ranks(part, 0.0, 7, ranks)
    assert torch.isnan(kept).any()
