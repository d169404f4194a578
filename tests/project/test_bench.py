"""Every benchmark runs at its smallest size and prints one JSON line; what it measures there means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

BENCH = ROOT / "bench"
TINY = {
    "cli_help": "--rounds 1",
    "atlas": "--share 0.0003 --latents 512 --images-per-patient 5",
    "archives": "--images 12 --batch-size 4 --workers 1 --rounds 1",
    "extract": "--backbone random-vit-tiny --images 4 --batch-size 2 --chunk-images 2 --rounds 1",
    "loader": "--images 12 --chunk-images 4 --pool-chunks 2 --batch-tokens 514 --epochs 1 --width 32 "
    "--quality-images 24 --dataloader-batches 2 --rounds 1",
    "sae_step": "--tokens 64 --width 32 --latents 256 --l0 10 --sweep --micro-batches 32,64 --rounds 1",
    "measure": "--images 3 --width 32 --latents 256 --k 4 --rounds 1",
    "sae_run": "--images 6 --width 32 --expansion 4 --batch-tokens 257 --steps 4",
    "baselines": "--images 20 --width 16 --latents 64",
    "sae_step_gpu": "",
    "encode": "--images 3 --chunk-images 2 --width 32 --latents 256 --l0 10 --micro-batches 128 --rounds 1",
    "compare": "--patients 20 --in-a 8 --latents 256 --permutations 500 --loop-permutations 5 --block-permutations 20",
    "calibration": "--cells 1 --runs 2 --latents 20 --permutations 99 --coverage-runs 1 --data-sets 1",
    "probe_intervals": "--runs 3 --repeats 1 --draws 20",
    "purity_intervals": "--runs 2 --draws 20 --kinds 2",
    "patients": "--cells 12 --runs 1 --latents 20 --splits 5",
    "probe": "--units 40 --latents 200 --direct 1 --rounds 1",
    "score": "--images 120 --latents 60 --classes 2 --width 8 --loop-latents 2",
    "frontier": "--images 10 --width 16 --expansion 4 --sparsities 3 --steps 6 --batch 257 --seeds 0 --lr 1e-3",
    "steering": "--activations relu --targets 16 --expansion 2 --steps 6 --batch-tokens 64 --images 8 --width 16",
    "tau": "--planted 60 --tokens 4000 --seeds 1 --cohorts 1 --rounds 1",
    "ablate": "--images 24 --tokens 17 --width 16 --latents 64 --l0 4 --chosen 1 --controls 3 --n-images 2 "
    "--loop-edits 2",
    "background": "--cells 16",
    "barcode": "--share 0.00003 --latents 1024 --l0 5 --rounds 1 --workers 1",
    "describe": "--share 0.0006 --latents 512 --images-per-patient 5 --items 2 --rounds 1",
    "search": "--share 0.0003 --latents 512 --images-per-patient 5 --evaluate 5 --rounds 1",
}
KEYS = {"bench", "ratio", "target", "ours", "baseline", "params", "machine"}


@pytest.mark.stress
@pytest.mark.parametrize("name", TINY)
def test_benchmark_prints_one_json_line(name: str, tmp_path: Path) -> None:
    in_folder = (
        "archives",
        "atlas",
        "extract",
        "loader",
        "encode",
        "barcode",
        "search",
        "describe",
        "sae_run",
        "baselines",
        "frontier",
        "steering",
        "tau",
        "ablate",
        "background",
    )
    folder = ["--folder", str(tmp_path)] if name in in_folder else []
    command = [sys.executable, str(BENCH / f"{name}.py"), *TINY[name].split(), *folder]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["bench"] == name
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    if "skipped" in found:
        assert name == "sae_step_gpu"
        return
    assert found.keys() >= KEYS
    assert found["ratio"] > 0
    assert {"rate", "unit", "seconds"} <= found["ours"].keys() & found["baseline"].keys()
    assert {"cpu", "cores", "torch", "zarr", "python", "device", "date"} <= found["machine"].keys()


@pytest.mark.stress
def test_run_all_goes_on_and_names_what_failed(tmp_path: Path) -> None:
    for name, body in {"cli_help": "raise SystemExit('no')", "loader": "print('{}')"}.items():
        (tmp_path / f"{name}.py").write_text(body)
    (tmp_path / "run_all.py").write_text((BENCH / "run_all.py").read_text())
    command = [sys.executable, str(tmp_path / "run_all.py"), "cli_help", "loader"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (1, "{}\n")
    assert done.stderr.endswith("failed: cli_help\n")


def test_every_benchmark_is_run_by_make_bench_and_tested() -> None:
    helpers = {"common", "latent_generator", "patient_generator", "run_all", "frontier_peers", "tau_cells"}
    helpers.add("precision")  # measures fidelity on a cache that is given; no rates
    helpers.add("full_size")  # a line for each command, and stores of 10 GB that stay; on request
    programs = {path.stem for path in BENCH.glob("*.py")} - helpers
    listed = (BENCH / "run_all.py").read_text()

    assert programs == set(TINY)
    assert all(f'"{name}": [' in listed for name in programs)
