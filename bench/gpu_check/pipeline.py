"""The chain on a GPU as a user runs it: images -> cache -> SAE -> latents, and what only a GPU can show about it.

python pipeline.py OUT [--device cuda] [--images 2048] [--steps 300]        writes OUT/pipeline.json
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

import extract as bench_extract
from common import TOKENS_PER_IMAGE, now, setup_timed
from gpu_check.sections import Sections

import cytocache.extract
from cytocache.datasets import Images, open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.fidelity import measure_fidelity
from cytosae import encode, evaluate, train
from cytosae.sae import TrainConfig

LOGGED = ("step", "loss", "mse", "l0", "dead_fraction", "tokens_per_second", "explained_variance")
RESUMED: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk with auxk": {"activation": "topk", "k": 32, "dead_latents": "auxk"},
    "batchtopk with resample": {
        **{"activation": "batchtopk", "k": 32, "dead_latents": "resample", "resample_every": 10},
    },
}


class Pipeline:
    """The steps of the chain in one temporary folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.o, self.folder, self.device = options, folder, options.device
        self.on_gpu = self.device.startswith("cuda")
        self.precision = "fp16" if self.on_gpu else "fp32"  # as docs/training.md proposes
        self.cache, self.run = folder / "a.acts.zarr", folder / "sae"
        with mock.patch.object(bench_extract, "_DRAWN", 128):
            bench_extract.draw_images(folder / "images", options.images)
        self.images: Images = open_images(folder / "images")

    def extracted(self, name: str, batch_size: int) -> dict[str, Any]:
        """Images per second, without the time to load the backbone."""
        config = ExtractConfig(
            backbone=self.o.backbone,
            weights=None if self.o.backbone.startswith("random") else "random",
            device=self.device,
            batch_size=batch_size,
            workers=max(2, len(os.sched_getaffinity(0)) - 2),
        )
        with setup_timed(cytocache.extract, "load_backbone") as loading:
            began = now()
            extract(self.images, self.folder / name, config)
            seconds = (now() - began).seconds
        loaded = sum(spent.seconds for spent in loading)
        return {"images_s": self.o.images / (seconds - loaded), "seconds": seconds, "load_seconds": loaded}

    def extracted_again(self, name: str, batch_size: int) -> dict[str, Any]:
        """The same once more: are the bytes the same?"""
        found = self.extracted(name, batch_size)
        return found | {"same_bytes": _digest(self.cache) == _digest(self.folder / name)}

    def trained(self) -> dict[str, Any]:
        config = TrainConfig(
            expansion=self.o.expansion,
            batch_tokens=self.o.batch_tokens,
            tokens=self.o.steps * self.o.batch_tokens,
            holdout=0.05,
            warmup_steps=50,
            l1=8e-4,
            precision=self.precision,
        )
        rows: list[dict[str, Any]] = []
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        header = train(
            [self.cache],
            self.run,
            config,
            device=self.device,
            checkpoint_every=150,
            progress=lambda done, total, metrics: rows.append({name: metrics[name] for name in LOGGED}),
        )
        seconds = time.perf_counter() - began
        return {
            **{"seconds": seconds, "tokens_s": self.o.steps * self.o.batch_tokens / seconds},
            "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None,
            "held_out": (header.summary or {}).get("held_out"),
            "log": rows[:: max(1, len(rows) // 8)],
        }

    def resumed(self) -> dict[str, Any]:
        """Is a run that was stopped at step 20 of 40 and continued equal, to the bit, to one that was not stopped?"""
        return {name: self._is_resumed_equal(name, more) for name, more in RESUMED.items()}

    def _is_resumed_equal(self, name: str, more: dict[str, Any]) -> bool | str:
        n = min(4_112, self.o.batch_tokens)
        config = TrainConfig(
            **{"expansion": 4, "tokens": 40 * n, "batch_tokens": n, "warmup_steps": 4, "dead_after_steps": 3},
            **{"precision": self.precision, "log_every": 5, **more},
        )

        def stop(done: int, total: int, metrics: dict[str, float | None]) -> None:
            if metrics["step"] == 20:
                raise KeyboardInterrupt

        whole, stopped = self.folder / f"whole {name}", self.folder / f"stopped {name}"
        try:
            train([self.cache], whole, config, device=self.device)
            try:
                train([self.cache], stopped, config, device=self.device, progress=stop)
            except KeyboardInterrupt:
                pass
            train([self.cache], stopped, config, device=self.device)
        except Exception as error:  # the other activations are worth trying
            return f"{type(error).__name__}: {error}"[:400]
        return (whole / "sae.safetensors").read_bytes() == (stopped / "sae.safetensors").read_bytes()

    def encoded(self, precision: str) -> dict[str, Any]:
        began = time.perf_counter()
        done = encode(
            self.cache, self.run, self.folder / f"{precision}.latents.zarr", precision=precision, device=self.device
        )
        seconds = time.perf_counter() - began
        return {"l0": done.l0, "seconds": seconds, "tokens_s": self.o.images * TOKENS_PER_IMAGE / seconds}

    def evaluated(self) -> dict[str, Any]:
        began = time.perf_counter()
        found = evaluate(self.cache, self.run, device=self.device)
        names = ("l0", "mse", "explained_variance")
        rate = found.n_tokens / (time.perf_counter() - began)
        return {**{name: getattr(found, name) for name in names}, "tokens_s": rate}


def _digest(store: Path) -> str:
    """SHA-256 of the files of all chunks of tokens."""
    digest = hashlib.sha256()
    for path in sorted(store.glob("tokens/c/*/0/0")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Run every section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=2_048)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--backbone", default="dinobloom-b")
    parser.add_argument("--expansion", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=16_448)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cyto-gpu-") as folder:
        made = Pipeline(options, Path(folder))
        batch = 128 if made.on_gpu else 16
        sections = Sections(options.out / "pipeline.json")
        sections.run("extract", partial(made.extracted, "a.acts.zarr", batch))
        sections.run("extract again, same bytes", partial(made.extracted_again, "b.acts.zarr", batch))
        sections.run("extract, another batch size", partial(made.extracted, "c.acts.zarr", 256 if made.on_gpu else 8))
        fidelity = partial(measure_fidelity, made.cache, device=made.device, n_images=min(16, options.images))
        sections.run("fidelity", lambda: vars(fidelity(workers=4)))
        sections.run("train", made.trained)
        sections.run("resumed equals never stopped, to the bit", made.resumed)
        for precision in ("fp32", "bf16"):
            sections.run(f"encode {precision}", partial(made.encoded, precision))
        sections.run("evaluate", made.evaluated)


if __name__ == "__main__":
    main()
