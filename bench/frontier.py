"""How good are our SAEs at equal L0, width, tokens and batch, beside those of other libraries?

On the same cached tokens: explained variance of held-out images about their mean against L0, and the share of latents
that are never active, for our relu, topk, batchtopk, jumprelu, gated and nested (Matryoshka) SAEs and for those of
SAELens, dictionary_learning and overcomplete. Every side gets the learning rates of --lr; of them the best one by
mean held-out explained variance counts, for each method and sparsity. Same warm-up (a twentieth of the steps), schedule
and window of dead latents for all; tokens are scaled to mean norm sqrt(width) for all. Ratio: the smallest, over the
peers' rows with L0 7 to 140 and within the range of ours, of the peer's unexplained share over that of our method of
the same name at that L0 (above 1: ours explains more); target 1.

Peers live in an environment of their own, because their dependencies are large and pinned:
python -m venv peers && peers/bin/pip install sae-lens dictionary-learning overcomplete
python bench/frontier.py --cache cells.acts.zarr --peers peers/bin/python --table
Without --cache tokens are drawn; without --peers, or for a library that is not there, its rows are "not run".
"""

import argparse
import json
import math
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, emit, say, scratch, similar_tokens, write_cache
from frontier_peers import LIBRARIES, measure

from cytosae import train
from cytosae.sae import TrainConfig, load_sae, make_config
from cytosae.training import choose_data
from stores import ActivationStore

HOLDOUT = 0.2
NESTED = (1 / 32, 3 / 32, 7 / 32, 15 / 32)  # the shares of arXiv 2503.17547
BY_K = ("topk", "batchtopk", "matryoshka")
METHODS = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
# sparsity terms from about L0 128 to 8, as shares of the tokens' deviation (per channel) or, for a number of active
# latents, of their variance; every library has its own form of the loss
PENALTIES: dict[tuple[str, str], tuple[float, ...]] = {
    ("ours", "relu"): (0.1, 0.2, 0.4, 0.8),
    ("ours", "gated"): (0.1, 0.2, 0.4, 0.8),
    ("ours", "jumprelu"): (0.1, 0.3, 1.0, 3.0),
    ("sae-lens", "relu"): (0.1, 0.2, 0.4, 0.8),
    ("sae-lens", "gated"): (0.1, 0.2, 0.4, 0.8),
    ("sae-lens", "jumprelu"): (0.1, 0.3, 1.0, 3.0),
    ("dictionary-learning", "relu"): (0.1, 0.2, 0.4, 0.8),
    ("dictionary-learning", "gated"): (0.1, 0.2, 0.4, 0.8),
}
Row = dict[str, Any]


def main() -> None:
    """Train, measure, and print one line of JSON."""
    options = _options()
    with scratch(options.folder) as folder:
        cache = options.cache or _drawn(folder, options)
        data = choose_data([ActivationStore(cache)], TrainConfig(holdout=HOLDOUT))
        factor, deviation = _write_tokens(folder, data, options)
        jobs = _jobs(options, data.width, deviation)
        rows = [_ours(folder, cache, job, factor) for job in jobs if job["library"] == "ours"]
        rows += _peers(folder, [job for job in jobs if job["library"] != "ours"], options)
    best = _best(rows)
    if options.table:
        print(_table(best))
        return
    first = next(row for row in rows if "seconds" in row)
    theirs = next((row for row in rows if row["library"] != "ours" and "seconds" in row), first)
    emit(
        "frontier",
        ratio=_ratio(best),
        target=1,
        ours=_rate(first),
        baseline=_rate(theirs) | {"what": f"{theirs['library']} {theirs['method']}"},
        best=best,
        rows=rows,
        params={name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    )


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--cache", type=Path, help="activation cache (tokens are drawn)")
    parser.add_argument("--peers", help="python of the environment of the peers (their rows are not run)")
    parser.add_argument("--expansion", type=int, default=8, help="latents per channel (%(default)s)")
    parser.add_argument("--sparsities", type=_whole, default="8,32,128", help="k (%(default)s)")
    parser.add_argument("--methods", type=_names, default=",".join(METHODS), help="(%(default)s)")
    parser.add_argument("--libraries", type=_names, default=",".join(("ours", *LIBRARIES)), help="(%(default)s)")
    parser.add_argument("--lr", type=_numbers, default="1e-3,3e-3", help="learning rates to choose from (%(default)s)")
    parser.add_argument("--seeds", type=_whole, default="0,1,2", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=2_048, help="tokens per step (%(default)s)")
    parser.add_argument("--schedule", choices=("linear", "constant"), default="linear", help="(%(default)s)")
    parser.add_argument("--every", type=int, default=1, help="measure on every n-th token only (%(default)s)")
    parser.add_argument(
        "--penalties",
        type=_numbers,
        help="sparsity terms of relu, jumprelu and gated, for all (a list for each library)",
    )
    parser.add_argument(
        "--steer", action="store_true", help="our relu, jumprelu and gated take --sparsities as target_l0, no penalties"
    )
    parser.add_argument("--raw", action="store_true", help="tokens as they are cached, not scaled")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=JSON", help="a setting of all of ours, as in --config"
    )
    parser.add_argument("--images", type=int, default=48, help="drawn images, without --cache (%(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of drawn tokens (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table for docs/benchmarks.md instead")
    parser.add_argument("--folder", type=Path, help="where to write, in a folder that is removed (temporary)")
    return parser.parse_args()


def _jobs(options: argparse.Namespace, width: int, deviation: float) -> list[Row]:
    """Every training of the comparison."""
    common = {"steps": options.steps, "batch": options.batch, "n_latents": options.expansion * width}
    common |= {"warmup": max(1, options.steps // 20), "dead_after": 64, "nested": NESTED}
    common |= {"every": options.every}
    common |= {"decay": options.steps // 5 if options.schedule == "linear" else 0}
    channel = deviation / math.sqrt(width)
    common |= {"threshold": 0.1 * channel, "bandwidth": 0.1 * channel, "penalty": deviation**2}
    jobs = []
    for library in options.libraries:
        for method in options.methods:
            if library == "overcomplete" and method not in ("topk", "batchtopk"):
                continue  # no other architecture there
            points: list[tuple[float, float]] = [(k, k) for k in options.sparsities]  # (label, value)
            is_steered = library == "ours" and options.steer and method not in BY_K
            if (library, method) in PENALTIES and not is_steered:
                unit = deviation**2 / width if method == "jumprelu" else channel
                points = [(share, share * unit) for share in options.penalties or PENALTIES[library, method]]
            changes = dict(text.split("=", 1) for text in options.set) if library == "ours" else {}
            jobs += [
                common
                | {"changes": {name: json.loads(value) for name, value in changes.items()}}
                | {
                    "steered": is_steered,
                    "library": library,
                    "method": method,
                    "at": at,
                    "sparsity": value,
                    "lr": lr,
                    "seed": seed,
                }
                for at, value in points
                for lr in options.lr
                for seed in options.seeds
            ]
    return jobs


def _ours(folder: Path, cache: Path, job: Row, factor: float) -> Row:
    """One of our SAEs, trained by the product and read back."""
    method, run = job["method"], folder / "run"
    settings: dict[str, Any] = {
        "expansion": job["n_latents"] // load_width(folder),
        "activation": "batchtopk" if method == "matryoshka" else method,
        "nested": NESTED if method == "matryoshka" else None,
        "k": int(job["sparsity"]) if method in BY_K else None,
        "l1": None if job["steered"] else 0.0 if method in BY_K else job["sparsity"],
        "target_l0": job["sparsity"] if job["steered"] else None,
        "l1_warmup_steps": job["steps"] // 10,
        "lr": job["lr"],
        "warmup_steps": job["warmup"],
        "schedule": "linear" if job["decay"] else "constant",
        "batch_tokens": job["batch"],
        "tokens": job["steps"] * job["batch"],
        "token_scale": "none" if factor == 1 else "sqrt-width",
        "dead_after_steps": job["dead_after"],
        "dead_latents": "auxk",
        "jump_threshold": job["threshold"],
        "jump_bandwidth": job["bandwidth"],
        "holdout": HOLDOUT,
        "order_seed": 0,  # the same images are held out
        "seed": job["seed"],
        "log_every": 100,
    }
    settings |= job["changes"]
    given = {name: value for name, value in settings.items() if value is not None}
    config = make_config(options=given)
    if config.loss == "normed" and method not in BY_K and not job["steered"]:  # the penalty in the unit of this loss
        norm = float(np.load(folder / "norm.npy"))
        config = make_config(options=given | {"l1": given["l1"] / (norm * load_width(folder))})
    began = time.perf_counter()
    train([cache], run, config, overwrite=True, checkpoint_every=10**9)
    seconds = time.perf_counter() - began
    model = load_sae(run).model
    tokens = {name: torch.from_numpy(np.load(folder / f"{name}.npy")).float() for name in ("train", "test")}
    model.fold_token_scale(1 / factor)
    found = measure(model.encode, model.decode, *(tokens[name][:: job["every"]] for name in ("train", "test")))
    say(f"ours {method} {job['at']:g} lr {job['lr']:g} seed {job['seed']}: {found} {seconds:.0f} s")
    return job | found | {"seconds": seconds}


def load_width(folder: Path) -> int:
    """D of the tokens."""
    return int(np.load(folder / "test.npy", mmap_mode="r").shape[1])


def _peers(folder: Path, jobs: list[Row], options: argparse.Namespace) -> list[Row]:
    """The rows of the peers, from their own process."""
    if not options.peers:
        return [job | {"not_run": "no environment with peers was given (--peers)"} for job in jobs]
    asked = {"folder": str(folder), "threads": torch.get_num_threads(), "jobs": jobs}
    program = Path(__file__).with_name("frontier_peers.py")
    process = subprocess.Popen(
        [options.peers, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asked))
    process.stdin.close()
    rows = []
    for line in process.stdout:
        rows.append(json.loads(line))
        shown = {name: rows[-1].get(name) for name in ("explained_variance", "l0", "dead", "seconds", "not_run")}
        say(f"{rows[-1]['library']} {rows[-1]['method']} {rows[-1]['at']:g} lr {rows[-1]['lr']:g}: {shown}")
    process.wait()
    return rows + [job | {"not_run": "the process of the peers ended before"} for job in jobs[len(rows) :]]


def _write_tokens(folder: Path, data: Any, options: argparse.Namespace) -> tuple[float, float]:
    """train.npy and test.npy, scaled; returns the factor, and the deviation about the mean of the scaled tokens."""
    (store,), (is_train,), (is_test,) = data.stores, data.chosen.train, data.chosen.held_out
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for rows, tokens in store.iter_chunks():
        for name, mask in (("train", is_train), ("test", is_test)):
            parts[name].append(tokens[mask[rows.start : rows.stop]].reshape(-1, data.width).astype(np.float32))
    of = {name: np.concatenate(found) for name, found in parts.items()}
    norm = float(np.linalg.norm(of["train"], axis=1).mean())
    factor = 1.0 if options.raw else math.sqrt(data.width) / norm
    for name, tokens in of.items():
        np.save(folder / f"{name}.npy", tokens * np.float32(factor))
    np.save(folder / "norm.npy", norm * factor)
    centred = (of["train"] - of["train"].mean(0)) * factor
    return factor, float(np.sqrt(np.square(centred).sum(1).mean()))


def _drawn(folder: Path, options: argparse.Namespace) -> Path:
    rng = np.random.default_rng(0)
    tokens = similar_tokens(rng, options.images, options.width)
    write_cache(
        folder / "drawn.zarr", [tokens], n_images=options.images, width=options.width, chunk_images=options.images
    )
    return folder / "drawn.zarr"


def _best(rows: list[Row]) -> list[Row]:
    """Per library, method and sparsity: mean and deviation over seeds, at the learning rate with the best mean."""
    groups: dict[tuple[Any, ...], dict[float, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["library"], row["at"]), {}).setdefault(row["lr"], []).append(row)
    best = []
    for (method, library, at), by_lr in groups.items():
        named = {"method": method, "library": library, "at": at}
        done = {lr: [row for row in found if "not_run" not in row] for lr, found in by_lr.items()}
        done = {lr: found for lr, found in done.items() if found}
        if not done:
            reasons = sorted({row["not_run"] for found in by_lr.values() for row in found})
            best.append(named | {"not_run": "; ".join(reasons)})
            continue
        mean = {lr: statistics.fmean(row["explained_variance"] for row in found) for lr, found in done.items()}
        lr = max(mean, key=lambda lr: mean[lr])
        values = [row["explained_variance"] for row in done[lr]]
        best.append(
            named
            | {
                "lr": lr,
                "l0": statistics.fmean(row["l0"] for row in done[lr]),
                "explained_variance": mean[lr],
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "dead": statistics.fmean(row["dead"] for row in done[lr]),
                "seconds": statistics.median(row["seconds"] for row in done[lr]),
                "n": len(values),
            }
        )
    return best


def _ratio(best: list[Row]) -> float:
    """The smallest unexplained share of a peer over ours, at the peer's L0 between two of ours of the same method."""
    ratios = []
    for row in best:
        if row["library"] == "ours" or "not_run" in row:
            continue
        curve = sorted(
            (ours["l0"], ours["explained_variance"])
            for ours in best
            if ours["library"] == "ours" and ours["method"] == row["method"] and "not_run" not in ours
        )
        # beyond the ends of our curve there is nothing to compare with; a k that is kept on average is a little off
        if curve and 7 <= row["l0"] <= 140 and curve[0][0] / 1.1 <= row["l0"] <= curve[-1][0] * 1.1:
            ours = float(
                np.interp(math.log(row["l0"]), [math.log(max(1e-9, l0)) for l0, _ in curve], [ev for _, ev in curve])
            )
            ratios.append((1 - row["explained_variance"]) / (1 - ours))
    return min(ratios, default=1.0)


def _rate(row: Row) -> dict[str, Any]:
    return {"rate": row["steps"] * row["batch"] / row["seconds"], "unit": "tokens/s", "seconds": row["seconds"]}


def _table(best: list[Row]) -> str:
    lines = ["| method | library | sparsity | lr | L0 | explained | deviation | dead | seconds |", "|---" * 9 + "|"]
    for row in best:
        start = f"| {row['method']} | {row['library']} | {row['at']:g} |"
        if "not_run" in row:
            lines.append(f"{start} not run: {row['not_run']} | | | | | |")
            continue
        lines.append(
            f"{start} {row['lr']:g} | {row['l0']:.1f} | {row['explained_variance']:.4f} | {row['deviation']:.4f} | "
            f"{row['dead']:.1%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _names(text: str) -> list[str]:
    return text.split(",")


def _whole(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
