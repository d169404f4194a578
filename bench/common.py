"""What the benchmarks share: two sides timed in turns, facts about the machine, one line of JSON, synthetic input.

Both sides of a ratio run in the same process of the same run, in rounds whose order alternates, so that noise and drift
of the machine hit both. There is never a time limit or an assertion on speed: a benchmark measures, a person judges.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from stores.machine import n_cores

PROJECT = Path(__file__).resolve().parents[1]
RELEASED = PROJECT.parent / "shared" / "data" / "released_mll23" / "feature_data.npz"
DISTINCT_PER_IMAGE = 1_853  # latents active in an average image of the released SAE (docs/reference/paper.md 8)
N_LATENTS = 49_152
WIDTH = 768
TOKENS_PER_IMAGE = 257


@dataclass(frozen=True)
class Spent:
    """Time that something took: wall clock, and processor time of all threads, and of child processes that ended."""

    seconds: float
    cpu_seconds: float

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


@dataclass(frozen=True)
class Timing:
    """One side of a comparison over all rounds."""

    rounds: list[Spent]

    @property
    def seconds(self) -> float:
        """Median wall clock of a round."""
        return statistics.median(spent.seconds for spent in self.rounds)

    @property
    def cpu_seconds(self) -> float:
        """Median processor time of a round."""
        return statistics.median(spent.cpu_seconds for spent in self.rounds)

    def to_json(self, amount: float, unit: str) -> dict[str, Any]:
        """Rate (amount per median second) with what it was computed from."""
        return {
            "rate": amount / self.seconds,
            "unit": f"{unit}/s",
            "seconds": self.seconds,
            "rounds": [spent.seconds for spent in self.rounds],
        }


Side = Callable[[], Any]  # does the work once; time that it returns (its setup) is not counted


def alternate(
    *sides: Side,
    rounds: int,
    warm_up: bool = True,
    sync: Callable[[], None] = lambda: None,
    tidy: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time all sides in turns: a, b, b, a, a, b, ... after one unmeasured run of each.

    Parameters
    ----------
    sync : waits until the device has done what was asked; called before and, inside the measured time, after a side
    tidy : called outside the measured time after every run, for instance to remove what it wrote
    """
    spent: list[list[Spent]] = [[] for _ in sides]
    for number in range(-1 if warm_up else 0, rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            sync()
            began = now()
            setup = sides[side]()
            sync()
            took = now() - began
            tidy()
            if number >= 0:
                spent[side].append(took - setup if isinstance(setup, Spent) else took)
                say(f"round {number + 1} of {rounds}, side {side + 1} of {len(sides)}: {spent[side][-1].seconds:.3f} s")
    return [Timing(rounds) for rounds in spent]


def now() -> Spent:
    """The two clocks."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


@contextmanager
def setup_timed(module: Any, name: str) -> Iterator[list[Spent]]:
    """While open, collects what each call of `module.name` takes.

    For what a job pays once, whatever its size (loading a model): a short benchmark would count it thousands of times.
    """
    original, spent = getattr(module, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = now()
        result = original(*args, **kwargs)
        spent.append(now() - began)
        return result

    with mock.patch.object(module, name, timed):
        yield spent


def arguments(doc: str | None, *, rounds: int = 3) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `doc` is the module's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds; the median counts (%(default)s)")
    return parser


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The option for benchmarks that write: the disk under this folder is the one that is measured."""
    parser.add_argument(
        "--folder", type=Path, help="where to write, in a folder of its own that is removed (temporary)"
    )


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A new folder for the time of a benchmark."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cyto-bench-", dir=folder) as name:
        yield Path(name)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"  {text}", file=sys.stderr, flush=True)


def emit(
    bench: str,
    *,
    ratio: float,
    target: float,
    ours: dict[str, Any],
    baseline: dict[str, Any],
    params: dict[str, Any],
    device: str = "cpu",
    **more: Any,
) -> None:
    """Print the one line of a benchmark; `ratio` is ours against the baseline, higher is better."""
    line = {"bench": bench, "ratio": ratio, "target": target, "ours": ours, "baseline": baseline, **more}
    line |= {"params": params, "machine": machine(device)}
    print(json.dumps(_rounded(line), allow_nan=False), flush=True)


def emit_skipped(bench: str, *, reason: str, target: float, params: dict[str, Any]) -> None:
    """Print the one line of a benchmark that cannot be run here."""
    print(json.dumps({"bench": bench, "skipped": reason, "target": target, "params": params, "machine": machine()}))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a figure was measured."""
    torch = sys.modules.get("torch")
    name = torch.cuda.get_device_name(device) if torch is not None and device.startswith("cuda") else device
    return {
        "cpu": _cpu_name(),
        "cores": n_cores(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "load_at_the_end": os.getloadavg()[0],
        "device": name,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "zarr")},
        "threads": torch.get_num_threads() if torch is not None else None,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_cache(
    root: Path, blocks: Iterable[npt.NDArray[np.float16]], *, n_images: int, width: int, chunk_images: int
) -> None:
    """A complete activation cache from chunks of synthetic tokens, each (images, 257, width) float16."""
    from stores.activation_spec import ActivationSpec
    from stores.activation_writer import ActivationWriter
    from stores.tables import table_sha256

    table = image_table(n_images)
    spec = ActivationSpec(
        backbone="synthetic",
        weights_sha256="0" * 64,
        trained=False,
        block=10,
        n_blocks=12,
        transform={"size": 224, "interpolation": "none"},
        precision="fp32",
        token_layout="1 CLS + 16x16 patches, row-major",
        n_images=n_images,
        tokens_per_image=TOKENS_PER_IMAGE,
        width=width,
        chunk_images=chunk_images,
        manifest_sha256=table_sha256(table),
    )
    writer = ActivationWriter(root, spec, table)
    for chunk, tokens in enumerate(blocks):
        rows = spec.chunk_rows(chunk)
        hashes: list[str | None] = [f"{row:064x}" for row in rows]  # of one hash, none is held out
        writer.write_chunk(chunk, tokens, hashes, [None] * len(rows))
    writer.finish()


def image_table(n_images: int, *, images_per_patient: int = 430) -> Any:
    """A manifest; neighbouring images belong to one patient, the patients to five diseases in turn."""
    from stores import tables

    patients = [image // images_per_patient for image in range(n_images)]
    columns: dict[str, list[str | None]] = {
        "path": [f"{image:06d}.jpg" for image in range(n_images)],
        "patient": [f"P{patient:04d}" for patient in patients],
        "disease": [f"D{patient % 5}" for patient in patients],
    }
    return tables.image_table(columns, source="synthetic", dataset="synthetic")


def chunk_sizes(n_images: int, chunk_images: int) -> list[int]:
    """Images in each chunk, the short last one included."""
    return [min(chunk_images, n_images - start) for start in range(0, n_images, chunk_images)]


def similar_tokens(rng: np.random.Generator, n_images: int, width: int) -> npt.NDArray[np.float16]:
    """(n_images, 257, width): standard normal; two tokens of an image correlate by one half."""
    image = rng.standard_normal((n_images, 1, width), np.float32)
    token = rng.standard_normal((n_images, TOKENS_PER_IMAGE, width), np.float32)
    return ((image + token) * np.float32(math.sqrt(0.5))).astype(np.float16)


def latent_frequency(n_latents: int) -> tuple[npt.NDArray[np.float64], str]:
    """Share of images in which each latent fires, and where that comes from.

    The released SAE's own figures where they lie beside the project; else a vector like them: min(1, c / rank).
    """
    n_distinct = DISTINCT_PER_IMAGE * n_latents / N_LATENTS
    if RELEASED.is_file() and n_latents <= N_LATENTS:
        with np.load(RELEASED, allow_pickle=False) as data:
            frequency = data["frequency"].astype(np.float64)
        chosen = np.linspace(0, N_LATENTS - 1, n_latents).round().astype(np.int64)
        return frequency[chosen], "released (MLL23)"
    rank = np.arange(1, n_latents + 1)
    low, high = 0.0, float(n_latents)
    for _ in range(60):  # c such that the shares add up to what an average image shows
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle / rank).sum() < n_distinct else (low, middle)
    return np.random.default_rng(0).permutation(np.minimum(1, low / rank)), "Zipf-like, min(1, c / rank)"


def token_share(popularity: Sequence[float] | npt.NDArray[np.float64], l0: float) -> npt.NDArray[np.float64]:
    """Share of tokens on which each latent is active: proportional to its popularity, adding up to `l0`."""
    weight = np.asarray(popularity, np.float64)
    low, high = 0.0, 2.0 / weight[weight > 0].min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(0.95, middle * weight).sum() < l0 else (low, middle)
    return np.minimum(0.95, low * weight)


def _rounded(value: Any) -> Any:
    """Floats to six digits, whatever they lie in; what JSON cannot say becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the project's checkout; a `+` says that tracked files were changed since."""
    git = ["git", "--no-optional-locks", "-C", str(PROJECT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
