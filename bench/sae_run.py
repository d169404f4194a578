"""How long does a whole short training run take, from its first line to the finished folder?

Ours: `train` on a cache of tokens with a known dictionary, from initialisation, where half of all latents are active,
until few are. Against: the same run with dense work only, which is one product of five less than plain autograd does.
Both make the same SAE, to rounding. Also: the share of the steps' time that was spent waiting for a batch (target: at
most 0.05).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import scipy.sparse
from common import TOKENS_PER_IMAGE, WIDTH, add_folder, arguments, chunk_sizes, emit, now, say, scratch, write_cache

import cytosae.training.latent_matrix
from cytosae import train
from cytosae.sae import TrainConfig
from stores.token_stream import TokenStream


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=1)
    add_folder(parser)
    parser.add_argument("--images", type=int, default=1_024, help="in the cache (%(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="(%(default)s)")
    parser.add_argument("--expansion", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4_112, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="(%(default)s)")
    options = parser.parse_args()
    config = TrainConfig(
        expansion=options.expansion,
        batch_tokens=options.batch_tokens,
        tokens=options.steps * options.batch_tokens,
        lr=1e-3,
        l1=1e-3,
        warmup_steps=10,
    )
    with scratch(options.folder) as folder:
        cache = folder / "run.acts.zarr"
        sizes = chunk_sizes(options.images, 256)
        blocks = (tokens_of_few_atoms(n, options.width, seed=number) for number, n in enumerate(sizes))
        write_cache(cache, blocks, n_images=options.images, width=options.width, chunk_images=256)
        ours: list[dict[str, Any]] = []
        dense: list[dict[str, Any]] = []
        for number in range(options.rounds):
            ours.append(_run(cache, folder / f"ours{number}", config))
            with mock.patch.object(cytosae.training.latent_matrix, "SPARSE_BELOW", 0.0):
                dense.append(_run(cache, folder / f"dense{number}", config))
    fast, slow = (min(runs, key=lambda run: run["seconds"]) for runs in (ours, dense))
    emit(
        "sae_run",
        ratio=slow["seconds"] / fast["seconds"],
        target=1,
        ours=fast,
        baseline=slow | {"what": "the same run, dense work only"},
        params={**vars(options), "folder": str(options.folder or "temporary")},
    )


def _run(cache: Path, run: Path, config: TrainConfig) -> dict[str, Any]:
    waited = [0.0]
    plain = TokenStream.batches

    def timed(self: TokenStream, *given: Any, **more: Any) -> Iterator[npt.NDArray[np.float16]]:
        batches = plain(self, *given, **more)
        while True:
            began = now()
            batch = next(batches)
            waited[0] += (now() - began).seconds
            yield batch

    began = now()
    with mock.patch.object(TokenStream, "batches", timed):
        train([cache], run, config)
    seconds = (now() - began).seconds
    metrics = pq.read_table(run / "metrics.parquet").to_pylist()
    n_tokens = metrics[-1]["tokens"]
    say(f"{seconds:.1f} s, L0 {metrics[0]['l0']:.0f} to {metrics[-1]['l0']:.0f}")
    return {
        "rate": n_tokens / seconds,
        "unit": "tokens/s",
        "seconds": seconds,
        "share_of_waiting_for_batches": waited[0] / seconds,
        "l0": {row["step"]: row["l0"] for row in metrics},
        "tokens_per_second": {row["step"]: row["tokens_per_second"] for row in metrics},
        "explained_variance": metrics[-1]["explained_variance"],
    }


def tokens_of_few_atoms(n_images: int, width: int, *, seed: int, n_atoms: int = 4_096) -> npt.NDArray[np.float16]:
    """(n_images, 257, width): a common mean, 32 of the atoms at random strength, and a little noise."""
    common, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    mean = common.standard_normal(width).astype(np.float32)
    atoms = (common.standard_normal((n_atoms, width)) / np.sqrt(width)).astype(np.float32)
    n_tokens, n_active = n_images * TOKENS_PER_IMAGE, 32
    strengths = rng.exponential(3, n_tokens * n_active).astype(np.float32)
    chosen = rng.integers(0, n_atoms, n_tokens * n_active)
    starts = np.arange(n_tokens + 1) * n_active
    tokens = scipy.sparse.csr_array((strengths, chosen, starts), (n_tokens, n_atoms)) @ atoms
    tokens += mean + 0.05 * rng.standard_normal(tokens.shape, np.float32)
    return tokens.astype(np.float16).reshape(n_images, TOKENS_PER_IMAGE, width)


if __name__ == "__main__":
    main()
