"""What do baselines of a large SAE cost, and an SAE minus a baseline with its intervals?

Ours: `compare_with_baselines` of a random and a `tokens` baseline, two passes over the held-out images and the
bootstrap. Against: `evaluate` of both on the same images, one pass each without intervals, but with the nearest decoder
row of each. Also: time and peak memory of each fit. The tokens are invented; an SAE of the released size is not needed,
since its settings alone tell what baselines are like.
"""

import resource
from pathlib import Path
from typing import Any

from common import N_LATENTS, WIDTH, add_folder, arguments, chunk_sizes, emit, now, say, scratch, write_cache
from sae_run import tokens_of_few_atoms

from cytosae import evaluate
from cytosae.baselines import BaselineConfig, VersusConfig, compare_with_baselines, write_baseline
from cytosae.sae import TrainConfig
from stores import read_image_ids


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=1)
    add_folder(parser)
    parser.add_argument("--images", type=int, default=400, help="in the cache (%(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="(%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--kinds", default="tokens,random,neurons,pca", help="the first two are compared (%(default)s)")
    options = parser.parse_args()
    config = TrainConfig(expansion=options.latents // options.width, target_l0=32.0, holdout=0.1)
    with scratch(options.folder) as folder:
        cache = folder / "baselines.acts.zarr"
        blocks = (tokens_of_few_atoms(n, options.width, seed=k) for k, n in enumerate(chunk_sizes(options.images, 64)))
        write_cache(cache, blocks, n_images=options.images, width=options.width, chunk_images=64)
        fits: dict[str, dict[str, float]] = {}
        runs: list[Path] = []
        for kind in options.kinds.split(","):
            began = now()
            made = write_baseline([cache], folder / f"{kind}.sae", BaselineConfig(kind=kind), settings=config, say=say)
            fits[kind] = {"seconds": (now() - began).seconds, "peak_mib": _peak_mib(), **_figures(made.header.summary)}
            runs.append(made.out)
        held_out = read_image_ids(runs[0] / "held_out.parquet")
        ours, theirs = [], []
        for number in range(options.rounds):
            began = now()
            compare_with_baselines(runs[0], cache, [runs[1]], folder / f"versus{number}", VersusConfig(), say=say)
            ours.append((now() - began).seconds)
            began = now()
            for run in runs[:2]:
                evaluate(cache, run, only=held_out)
            theirs.append((now() - began).seconds)
    n_images = 2 * len(held_out)
    fast, slow = min(ours), min(theirs)
    emit(
        "baselines",
        ratio=slow / fast,
        target=1,
        ours={"rate": n_images / fast, "unit": "images/s", "seconds": fast, "fits": fits, "peak_mib": _peak_mib()},
        baseline={"rate": n_images / slow, "unit": "images/s", "seconds": slow, "what": "evaluate, without intervals"},
        params={**vars(options), "folder": str(options.folder or "temporary")},
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _figures(summary: dict[str, Any] | None) -> dict[str, float]:
    found = (summary or {})["held_out"]
    return {"l0": found["l0"], "explained_variance": found["explained_variance"]}


if __name__ == "__main__":
    main()
