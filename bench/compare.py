"""How fast are the permutations of `cyto compare`, at the size of AML Hehr's barcodes (189 patients, 49,152 latents)?

Ours: `permutation_test` on all of them. Against: the loop that one writes first, a permutation at a time (numpy, in
float32: a product of a row and the barcodes, a comparison, a maximum), of which a few are timed and the rate is taken.
Beside it, the same in blocks of 1,024 permutations by matrix products (BLAS), which is what one writes next.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from common import N_LATENTS, alternate, arguments, emit, latent_frequency

from cytosae.compare import permutation_test

Floats = npt.NDArray[np.float32]


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--patients", type=int, default=189, help="(%(default)s)")
    parser.add_argument("--in-a", type=int, default=37, help="of them in A (%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--permutations", type=int, default=10_000, help="of ours (%(default)s)")
    parser.add_argument("--loop-permutations", type=int, default=100, help="of the loop (%(default)s)")
    parser.add_argument("--block-permutations", type=int, default=2_048, help="of the blocks (%(default)s)")
    options = parser.parse_args()
    values, source = barcodes(options.patients, options.latents)
    is_a = np.arange(options.patients) < options.in_a
    found: dict[str, Any] = {}

    def ours() -> None:
        found["p"] = permutation_test(values, is_a, n_permutations=options.permutations, seed=0).p

    ours_timed, loop, blocks = alternate(
        ours,
        lambda: by_products(values, is_a, options.loop_permutations, block=1),
        lambda: by_products(values, is_a, options.block_permutations, block=1_024),
        rounds=options.rounds,
    )
    fast = ours_timed.to_json(options.permutations, "permutations")
    slow = loop.to_json(options.loop_permutations, "permutations")
    middle = blocks.to_json(options.block_permutations, "permutations")
    emit(
        "compare",
        ratio=fast["rate"] / slow["rate"],
        target=10,
        ours=fast | {"cpu_seconds": ours_timed.cpu_seconds},
        baseline=slow | {"what": "one permutation at a time"},
        in_blocks=middle | {"what": "matrix products of 1,024 permutations", "ratio": fast["rate"] / middle["rate"]},
        seconds_for_a_million=1e6 / fast["rate"],
        smallest_p=float(found["p"].min()),
        params=vars(options) | {"frequency": source},
    )


def barcodes(n_patients: int, n_latents: int) -> tuple[Floats, str]:
    """(patients, latents): zero in many patients for rare latents, skewed counts in the others; none is constant."""
    rng = np.random.default_rng(0)
    frequency, source = latent_frequency(n_latents)
    has_any = rng.random((n_patients, n_latents), np.float32) < np.clip(frequency * 30, 0.05, 1)
    values = rng.standard_exponential((n_patients, n_latents), np.float32) * has_any
    values[0] += np.float32(0.01)
    return values, source


def by_products(values: Floats, is_a: npt.NDArray[np.bool_], n_permutations: int, *, block: int) -> None:
    """p and p_max_t by matrix products of `block` permutations with the standardised barcodes."""
    z = (values - values.mean(0)) / values.std(0)
    observed = np.abs(is_a.astype(np.float32) @ z)
    rng = np.random.default_rng(0)
    n_as_extreme, n_max = np.ones((2, values.shape[1]), np.int64)
    for done in range(0, n_permutations, block):
        masks = np.tile(is_a.astype(np.float32), (min(block, n_permutations - done), 1))
        sums = np.abs(rng.permuted(masks, axis=1) @ z)
        n_as_extreme += (sums >= observed).sum(0)
        largest = np.sort(sums.max(1))
        n_max += len(largest) - np.searchsorted(largest, observed)


if __name__ == "__main__":
    main()
