"""One run on a GPU: is the training step correct there, where does its time go, and what do the variants cost?

python probe.py OUT [--device cuda] [--latents 49152] [--tokens 16448]: writes OUT/probe.json and OUT/profile-*.txt
"""

import importlib.metadata
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from common import arguments
from gpu_check.sections import Sections
from sae_step import L1, Case, add_sizes, make_case
from sae_step_gpu import fused_step, parts, waits

from cytosae.sae import SparseAutoencoder, TrainConfig, geometric_median
from cytosae.training import (
    BatchLosses,
    Objective,
    budget,
    compare_plainly,
    distributed,
    held_out,
    loss_and_gradients,
    losses,
    on_device,
    saving,
    state,
)
from cytosae.training.measured_sums import MeasuredSums

OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Probe:
    """The sections, at the sizes of the options."""

    def __init__(self, options: Any, out: Path) -> None:
        self.o, self.out, self.device = options, out, options.device
        self.on_gpu = self.device.startswith("cuda")
        self.sync: Callable[[], None] = torch.cuda.synchronize if self.on_gpu else lambda: None
        self.fast = "bf16" if self.on_gpu else "fp32"

    def case(self, l0: float, dead: float = 0.0, tokens: int | None = None, popularity: str = "flat") -> Case:
        sizes = {"latents": self.o.latents, "width": self.o.width, "tokens": tokens or self.o.tokens}
        case = make_case(Namespace(**sizes, popularity=popularity), l0, dead, device=self.device)
        case.model.normalise_decoder()
        return case

    def gradients(self, case: Case, *, objective: Objective, **more: Any) -> BatchLosses:
        return loss_and_gradients(case.model, case.tokens, objective, l1=L1, dead_L=case.dead, **more)

    def ms(self, job: Callable[[], Any], rounds: int = 5, warm_up: int = 2) -> dict[str, float]:
        """Median and least milliseconds until the device is ready, and until the call has returned to the host."""
        whole, host = [], []
        for number in range(-warm_up, rounds):
            self.sync()
            began = time.perf_counter()
            job()
            returned = time.perf_counter()
            self.sync()
            if number >= 0:
                whole.append((time.perf_counter() - began) * 1e3)
                host.append((returned - began) * 1e3)
        return {"ms": statistics.median(whole), "least_ms": min(whole), "host_ms": statistics.median(host)}

    def machine(self) -> dict[str, Any]:
        packages = ("torch", "triton", "numpy", "numba", "zarr", "timm", "pandas", "pyarrow")
        found: dict[str, Any] = {name: _version(name) for name in packages}
        found |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        if self.on_gpu:
            gpu = torch.cuda.get_device_properties(0)
            found |= {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "GiB": gpu.total_memory / 2**30}
        return found

    def ceilings(self) -> dict[str, Any]:
        """What the device can do at best: copying, and the encoder's product in each precision."""
        n_bytes = 2**31 if self.on_gpu else 2**24
        source = torch.zeros(n_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        found: dict[str, Any] = {"copy_TB_s": 2 * n_bytes / self.ms(partial(target.copy_, source))["ms"] / 1e9}
        n_flop = 2 * self.o.tokens * self.o.width * self.o.latents
        for name, dtype in OPERANDS.items():
            tokens = torch.randn(self.o.tokens, self.o.width, device=self.device).to(dtype)
            weights = torch.randn(self.o.latents, self.o.width, device=self.device).to(dtype).T
            out = torch.empty(self.o.tokens, self.o.latents, dtype=dtype, device=self.device)
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            took = self.ms(partial(torch.mm, tokens, weights, out=out))
            found[f"encoder {name}"] = took | {"TFLOP_s": n_flop / took["ms"] / 1e9}
        torch.backends.cuda.matmul.allow_tf32 = False
        return found

    def correct(self) -> dict[str, Any]:
        """Relative differences ||g - g64|| / ||g64|| of gradients from dense float64 ones; equal bits when repeated."""
        case = self.case(200, 0.02, tokens=min(1_024, self.o.tokens))
        exact = SparseAutoencoder(self.o.width, self.o.latents).to(self.device).double()
        exact.load_state_dict({name: value.double() for name, value in case.model.state_dict().items()})
        with mock.patch.object(losses, "compare_reconstruction", compare_plainly):  # the kernel takes no float64
            exact_case = Case(exact, case.tokens.double(), case.dead)
            self.gradients(exact_case, objective=Objective(), sparse_below=0.0)
        wanted = {name: parameter.grad for name, parameter in exact.named_parameters()}
        found: dict[str, Any] = {}
        for precision, (work, sparse_below) in itertools.product(
            OPERANDS if self.on_gpu else ("fp32",), {"sparse": 2.0, "dense": 0.0}.items()
        ):
            runs = []
            for _ in range(2):
                self.gradients(case, objective=Objective(precision=precision), sparse_below=sparse_below)
                runs.append({name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None})
            found[f"{work} {precision}"] = {
                "equal_bits": all(torch.equal(runs[0][name], runs[1][name]) for name in wanted),
                **{name: _relative(runs[0][name], grad) for name, grad in wanted.items()},
            }
        return found

    def parts(self) -> dict[str, Any] | str:
        """Milliseconds of each part of one micro-batch; launch shapes of the two kernels that gather rows."""
        if not self.on_gpu:
            return "no GPU"
        found: dict[str, Any] = {}
        for l0, size, popularity in ((200, 2, "flat"), (200, 1, "flat"), (50, 1, "flat"), (200, 1, "released")):
            n = self.o.tokens // size
            case = self.case(l0, tokens=n, popularity=popularity)
            found[f"L0 {l0}, {n} tokens, {popularity}"] = parts(case, n, 5, self.sync)
        from cytosae.training import kernels_gpu  # needs triton

        case = self.case(200)
        for columns, rows, pairs in ((128, 8, 4), (256, 4, 2), (256, 8, 4), (256, 16, 8), (512, 8, 4), (1024, 4, 4)):
            with mock.patch.multiple(kernels_gpu, _COLUMNS=columns, _ROWS=rows, _PAIRS=pairs):
                took = parts(case, self.o.tokens, 4, self.sync)
            found[f"columns {columns}, rows {rows}, pairs {pairs}"] = [took["reconstruction"], took["gradients"]]
        return found

    def steps(self) -> dict[str, Any]:
        """Whole steps: gradients, projection, Adam, norms."""
        bf16, found = Objective(precision=self.fast), {}
        auxk = Objective(precision=self.fast, dead_latents="auxk")
        todo: dict[str, tuple[float, float, str, Objective, dict[str, Any]]] = {
            "relu, L0 200": (200, 0, "relu", bf16, {}),
            # on a large card a batch is one micro-batch, whose gathered rows (51 MB) do not fit an H200's L2 cache
            **{
                f"relu, L0 200, {n} micro-batches": (200, 0, "relu", bf16, {"micro_batch": -(-self.o.tokens // n)})
                for n in (2, 4)
            },
            "relu, L0 200, dense": (200, 0, "relu", bf16, {"sparse_below": 0.0}),
            "relu, L0 50": (50, 0, "relu", bf16, {}),
            "relu, L0 500": (500, 0, "relu", bf16, {}),
            "relu, L0 1500, sparse": (1500, 0, "relu", bf16, {"sparse_below": 2.0}),
            "relu, L0 1500, dense": (1500, 0, "relu", bf16, {"sparse_below": 0.0}),
            "relu, L0 200, 25% dead": (200, 0.25, "relu", bf16, {}),
            "relu, L0 200, 57% dead": (200, 0.57, "relu", bf16, {}),
            "relu, L0 200, 57% dead, auxk": (200, 0.57, "relu", auxk, {}),
            **{
                f"relu, L0 200, {name}": (200, 0, "relu", Objective(precision=name), {})
                for name in (("fp16", "tf32", "fp32") if self.on_gpu else ("fp32",))
            },
            **{name: (200, 0, name, bf16, {}) for name in ("topk", "batchtopk", "jumprelu", "gated")},
        }
        for name, (l0, dead, activation, objective, more) in todo.items():
            try:
                found[name] = self._step(_with_activation(self.case(l0, dead), activation), objective, more)
            except Exception as error:  # the other steps are worth having
                found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        return found

    def _step(self, case: Case, objective: Objective, more: dict[str, Any]) -> dict[str, Any]:
        optimizer = torch.optim.Adam(case.model.parameters(), lr=0.0, fused=True)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        job = partial(self._one_step, case, optimizer, partial(self.gradients, case, objective=objective, **more))
        found: dict[str, Any] = self.ms(job)
        found |= {"tokens_s": self.o.tokens / found["ms"] * 1e3}
        found |= {"l0": self.gradients(case, objective=objective, **more).l0}
        if self.on_gpu:
            found |= {"waits": waits(job), "peak_GiB": torch.cuda.max_memory_allocated() / 2**30}
        return found

    def _one_step(self, case: Case, optimizer: torch.optim.Adam, gradients: Callable[[], Any]) -> None:
        if self.on_gpu:
            fused_step(case, optimizer, gradients)
        else:
            gradients()
            optimizer.step()

    def profile(self) -> dict[str, Any] | str:
        """The kernels of five steps by their time on the GPU."""
        if not self.on_gpu:
            return "no GPU"
        from torch.profiler import ProfilerActivity, profile

        found: dict[str, Any] = {}
        for name, dead in (("plain", 0.0), ("dead", 0.57)):
            case = self.case(200, dead)
            optimizer = torch.optim.Adam(case.model.parameters(), lr=0.0, fused=True)
            gradients = partial(self.gradients, case, objective=Objective(precision="bf16"))
            for _ in range(3):
                fused_step(case, optimizer, gradients)
            self.sync()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                for _ in range(5):
                    fused_step(case, optimizer, gradients)
                self.sync()
            events = profiled.key_averages()
            table = events.table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90)
            (self.out / f"profile-{name}.txt").write_text(table)
            top = sorted(events, key=lambda event: -event.self_device_time_total)[:22]
            found[name] = {event.key[:70]: event.self_device_time_total / 5e3 for event in top}
        return found

    def around(self) -> dict[str, Any]:
        """What a run needs beside its steps."""
        found: dict[str, Any] = {}
        case = self.case(200)
        optimizer = torch.optim.Adam(case.model.parameters(), lr=0.0, fused=True)
        self.gradients(case, objective=Objective(precision=self.fast))
        if self.on_gpu:
            found["optimizer step, one kernel for W_dec"] = self.ms(lambda: fused_step(case, optimizer, lambda: None))
        found["Adam of torch"] = self.ms(optimizer.step)
        silent = torch.zeros(self.o.latents, dtype=torch.int64, device=self.device)
        saved = state.TrainState(case.model, optimizer, silent, 1.0, 1, [])
        found["copying a state, for which a step waits"] = self.ms(lambda: saving.snapshot(saved), rounds=3, warm_up=1)
        with tempfile.TemporaryDirectory() as folder:  # not in `out`, where it would stay if time were up
            (Path(folder) / "state").mkdir()
            found["writing a state, for which none waits"] = self.ms(
                lambda: state.save_state(Path(folder), saved, keep=2), rounds=1, warm_up=0
            )
        points = torch.randn(65_536 if self.on_gpu else 2_048, self.o.width)
        for device in dict.fromkeys(("cpu", self.device)):
            there = points.to(device)
            found[f"geometric median, {device}"] = self.ms(partial(geometric_median, there), rounds=1, warm_up=0)
        found["batches sent ahead, each"] = self._sent()
        found["held-out images"] = self._held_out(case.model.requires_grad_(False))
        found["a check of tokens auto"] = self._watched(case.model)
        return found

    def _sent(self) -> float:
        batch = np.zeros((self.o.tokens, self.o.width), np.float16)
        n = 40
        tokens = on_device(itertools.repeat(batch), self.device)
        for _ in range(3):
            next(tokens)
        took = self.ms(lambda: [next(tokens).float() for _ in range(n)], rounds=1, warm_up=0)
        return took["ms"] / n

    def _watched(self, model: SparseAutoencoder) -> dict[str, float]:
        """Every 20 steps at first, and dense in float32: what share of a run is it?"""
        watch = budget.Watch.__new__(budget.Watch)
        tokens = torch.zeros(budget.WATCHED_TOKENS, self.o.width, dtype=torch.float16)
        known = {"_tokens_ND": tokens, "_n": len(tokens), "_device": self.device}
        vars(watch).update(known, _config=TrainConfig(), _ranks=distributed.ALONE)
        return self.ms(lambda: watch.check(model, 1, 1.0), rounds=2, warm_up=1)

    @torch.inference_mode()
    def _held_out(self, model: SparseAutoencoder) -> dict[str, Any]:
        found: dict[str, Any] = {}
        step = max(1, held_out._MICRO_BATCH_BYTES // (4 * model.n_latents))
        for factor in (1, 8) if self.on_gpu else (1,):
            images = torch.randn(max(1, factor * step // 257), 257, self.o.width, device=self.device) + model.b_dec
            sums = MeasuredSums(model, loss="normed", step=step * factor, window_begins=0)
            took = self.ms(partial(sums.add, images), warm_up=1)
            found[f"{len(images)} at a time"] = took | {"tokens_s": len(images) * 257 / took["ms"] * 1e3}
        return found


def _with_activation(case: Case, activation: str) -> Case:
    """The same encoder and decoder under another activation."""
    if activation == "relu":
        return case
    old, k = case.model, 64 if "topk" in activation else None
    model = SparseAutoencoder(old.width, old.n_latents, activation, k).to(old.W_dec.device)
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            getattr(model, name).copy_(parameter)
        if activation == "jumprelu":
            model.log_threshold.fill_(-6.9)
        if activation == "gated":
            model.b_mag.copy_(old.b_enc)
    return Case(model, case.tokens, case.dead)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _relative(found: torch.Tensor, wanted: torch.Tensor | None) -> float:
    assert wanted is not None
    return float((found.double() - wanted).norm() / wanted.norm())


def main() -> None:
    """Run every section."""
    parser = arguments(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    add_sizes(parser, tokens=16_448)
    options = parser.parse_args()
    probe = Probe(options, options.out)
    tidy = torch.cuda.empty_cache if probe.on_gpu else lambda: None
    sections = Sections(options.out / "probe.json", tidy)
    for name in ("machine", "ceilings", "correct", "parts", "steps", "profile", "around"):
        sections.run(name, getattr(probe, name))


if __name__ == "__main__":
    main()
