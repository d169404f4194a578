"""Does `target_l0` reach the wanted L0, and is the SAE as good as one with a fixed penalty that lands there?

Ours: one steered run for each activation, L0 and seed. Against: two runs with fixed penalties, at the weight that the
steering ended with and at one beside it, which bracket the same L0; their explained variance at the steered run's L0 is
read off the line between them (over log L0). All on held-out images, with equal width, tokens and batches. Tokens:
those of a cache, or by default sums of few directions out of a known dictionary.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from common import TOKENS_PER_IMAGE, add_folder, arguments, emit, now, say, scratch, write_cache

from cytosae import train
from cytosae.sae import TrainConfig

_JUMP = {"token_scale": "sqrt-width"}


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=1)
    add_folder(parser)
    parser.add_argument("--cache", type=Path, help="an activation cache (a planted dictionary)")
    parser.add_argument("--activations", default="relu,jumprelu,gated", help="(%(default)s)")
    parser.add_argument("--targets", default="8,32,128", help="wanted L0 (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each (%(default)s)")
    parser.add_argument("--expansion", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="(%(default)s)")
    parser.add_argument("--images", type=int, default=400, help="of the planted dictionary (%(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of the planted dictionary (%(default)s)")
    parser.add_argument("--no-fixed", action="store_true", help="steered runs only")
    options = parser.parse_args()
    rows = []
    with scratch(options.folder) as folder:
        cache = options.cache or _planted(folder / "planted.acts.zarr", options.images, options.width)
        for activation in options.activations.split(","):
            for target in map(float, options.targets.split(",")):
                for seed in range(options.seeds):
                    row = _compared(
                        cache, folder / f"{activation}-{target:g}-{seed}", activation, target, seed, options
                    )
                    rows.append(row)
                    say(str(row))
    seconds = sum(row["seconds"] for row in rows)
    emit(
        "steering",
        ratio=sum(abs(row["l0_mean"] / row["target"] - 1) <= 0.1 for row in rows) / len(rows),
        target=1,
        ours={"rate": options.steps * len(rows) / seconds, "unit": "steps/s", "seconds": seconds, "runs": rows},
        baseline={
            "rate": options.steps * len(rows) / seconds,
            "unit": "steps/s",
            "seconds": seconds,
            "what": "fixed penalties, in `runs` as fixed_*",
        },
        params={**vars(options), "folder": str(options.folder or "temporary"), "cache": str(options.cache)},
    )


def _compared(cache: Path, folder: Path, activation: str, target: float, seed: int, options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "activation": activation,
        "expansion": options.expansion,
        "batch_tokens": options.batch_tokens,
        "tokens": options.steps * options.batch_tokens,
        "lr": options.lr,
        "warmup_steps": min(100, options.steps // 8),
        "schedule": "linear",
        "holdout": 0.1,
        "seed": seed,
        "order_seed": 0,
    }
    began = now()
    steered = _run(cache, folder / "steered", settings | {"target_l0": target})
    seconds = (now() - began).seconds
    penalty = steered["penalty"]
    row = {"activation": activation, "target": target, "seed": seed, "seconds": seconds, "l1": penalty["l1"]}
    row |= {"l0_mean": penalty["running_mean_l0"], "held_since": penalty["held_since_step"]}
    row |= {"releases": penalty["n_releases"], "dead": steered["final"]["dead_fraction"]}
    row |= {"l0": steered["held_out"]["l0"], "explained": steered["held_out"]["explained_variance"]}
    if options.no_fixed:
        return row
    fixed = [_run(cache, folder / "fixed0", settings | {"l1": penalty["l1"]})["held_out"]]
    beside = (
        penalty["l1"]
        * min(2, max(0.5, (fixed[0]["l0"] / row["l0"]) ** 1.5))
        * (1.05 if fixed[0]["l0"] > row["l0"] else 1 / 1.05)
    )
    fixed.append(_run(cache, folder / "fixed1", settings | {"l1": beside})["held_out"])
    fixed.sort(key=lambda found: found["l0"])
    logs = [math.log(found["l0"]) for found in fixed]
    explained = [found["explained_variance"] for found in fixed]
    share = (math.log(row["l0"]) - logs[0]) / (logs[1] - logs[0]) if logs[1] > logs[0] else 0.0
    row |= {"fixed_l0": [found["l0"] for found in fixed], "fixed_explained": explained}
    row["fixed_at_same_l0"] = explained[0] + share * (explained[1] - explained[0])
    return row


def _run(cache: Path, run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return train([cache], run, TrainConfig(**settings)).summary


def _planted(root: Path, n_images: int, width: int, per_token: int = 8) -> Path:
    """Tokens that are sums of `per_token` of 8 x width directions, 0.5 to 1.5 of each, beside a mean and some noise."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(8 * width, width))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    tokens = np.empty((n_images, TOKENS_PER_IMAGE, width), np.float16)
    for image in range(n_images):
        amounts = np.zeros((TOKENS_PER_IMAGE, len(atoms)))
        chosen = rng.random(amounts.shape).argsort(axis=1)[:, :per_token]
        np.put_along_axis(amounts, chosen, rng.uniform(0.5, 1.5, chosen.shape), axis=1)
        tokens[image] = 0.5 + amounts @ atoms + 0.02 * rng.normal(size=(TOKENS_PER_IMAGE, width))
    write_cache(root, iter([tokens]), n_images=n_images, width=width, chunk_images=n_images)
    return root


if __name__ == "__main__":
    main()
