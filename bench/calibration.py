"""Is p of `cyto compare` what it says where nothing differs, and do its intervals cover? A table, by simulation.

Cells: sizes of the groups, images per patient, and how many images show a latent (30%, 2%, 0.2%); an image that shows
it has a count of 1 to 257 patches, or ("ties") always 1. Patients are thinned by the rule of `--images-per-patient
auto`. Given: the share of latents with p <= 0.05, the share of runs with any p_max_t <= 0.05, and the least coverage of
the 95% intervals (difference, g, AUC), without a difference. `--table` prints Markdown in place of JSON.
`ratio` is how many cells lie within 0.04 to 0.06 and at most 0.07, of all.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from common import arguments, emit

from cytosae.compare import DRAWS, choose_number, combine_draws, permutation_test
from cytosae.compare.intervals import intervals

GROUPS = ((16, 20, 60, 400), (60, 20, 16, 400), (20, 50, 20, 200), (30, 100, 30, 100), (8, 100, 40, 100))
FREQUENCIES = (0.3, 0.02, 0.002)


def main() -> None:
    """Measure and print one line of JSON, or the table."""
    parser = arguments(__doc__)
    parser.add_argument("--latents", type=int, default=100, help="of a run (%(default)s)")
    parser.add_argument("--runs", type=int, default=100, help="of a cell (%(default)s)")
    parser.add_argument("--permutations", type=int, default=499, help="(%(default)s)")
    parser.add_argument("--cells", type=int, default=2 * len(GROUPS) * len(FREQUENCIES), help="the first of them")
    parser.add_argument("--table", action="store_true", help="Markdown in place of JSON")
    options = parser.parse_args()
    began = time.monotonic()
    plans = [(groups, f, ties) for ties in (False, True) for f in FREQUENCIES for groups in GROUPS][: options.cells]
    cells = [simulate(*plan, options.latents, options.runs, options.permutations) for plan in plans]
    seconds = time.monotonic() - began
    if options.table:
        print("| patients x images | frequency | p <= 0.05 | family-wise | all images: p <= 0.05 | coverage |")
        print("|---|---|---|---|---|---|")
        for cell in cells:
            print(
                f"| {cell['groups']} | {cell['frequency']:.1%}{', ties' if cell['ties'] else ''} | {cell['p']:.3f} "
                f"| {cell['family']:.3f} | {cell['p_all']:.3f} | {' / '.join(f'{c:.3f}' for c in cell['coverage'])} |"
            )
        return
    n_right = sum(0.04 <= cell["p"] <= 0.06 and cell["family"] <= 0.07 for cell in cells)
    n_crude = sum(0.04 <= cell["p_all"] <= 0.06 for cell in cells)
    rate = {"unit": "cells", "seconds": seconds, "rate": len(cells) / seconds}
    emit(
        "calibration",
        ratio=max(n_right, 0.5) / len(cells),
        target=1,
        ours=rate | {"n_right": n_right},
        baseline=rate | {"what": "all images, not thinned", "n_right": n_crude},
        cells=cells,
        params=vars(options),
    )


def simulate(
    groups: tuple[int, int, int, int], frequency: float, ties: bool, n_latents: int, n_runs: int, n_permutations: int
) -> dict[str, Any]:
    """One cell of the table."""
    n_a, images_a, n_b, images_b = groups
    is_a = np.arange(n_a + n_b) < n_a
    n_images = np.where(is_a, images_a, images_b)
    n = choose_number(n_images[:, None], is_a, np.ones(1), "auto")
    rng = np.random.default_rng([*groups, round(frequency * 1e4), ties])
    below, below_all, families, covered = [], [], [], []
    for run in range(n_runs):
        images = [made_up(rng, size, frequency, ties, n_latents) for size in n_images]
        whole = np.array([each.mean(0) for each in images], np.float32)
        draws = [whole]
        if n is not None:
            draws = [
                np.array([each[rng.permutation(len(each))[: n[0]]].mean(0) for each in images], np.float32)
                for _ in range(DRAWS)
            ]
        tested = np.array([draw.max(0) > 0 for draw in [whole, *draws]]).any(0)
        draws = [draw[:, tested] for draw in draws]
        test = combine_draws([permutation_test(d, is_a, n_permutations=n_permutations, seed=run) for d in draws])
        alone = permutation_test(whole[:, tested], is_a, n_permutations=n_permutations, seed=run)
        below.append((test.p <= 0.05).mean())
        below_all.append((alone.p <= 0.05).mean())
        families.append(test.p_max_t.min() <= 0.05)
        found = intervals(whole[:, tested].astype(float), [draw.astype(float) for draw in draws], is_a)
        names = (("difference", 0.0), ("hedges_g", 0.0), ("auc", 0.5))
        covered.append([((found[f"{k}_low"] <= v) & (v <= found[f"{k}_high"])).mean() for k, v in names])
    return {
        "groups": f"{n_a} x {images_a} against {n_b} x {images_b}",
        "frequency": frequency,
        "ties": ties,
        "p": float(np.mean(below)),
        "family": float(np.mean(families)),
        "p_all": float(np.mean(below_all)),
        "coverage": np.mean(covered, 0).tolist(),
    }


def made_up(
    rng: np.random.Generator, n_images: int, frequency: float, ties: bool, n_latents: int
) -> npt.NDArray[np.float32]:
    """(images, latents) of one patient: how often a latent is shown differs from patient to patient."""
    rate = np.minimum(1, rng.gamma(4, frequency / 4, n_latents))
    shown = rng.random((n_images, n_latents), np.float32) < rate
    values = shown.astype(np.float32)
    if not ties:
        values[shown] = np.minimum(257, np.ceil(rng.exponential(20, int(shown.sum()))))
    return values


if __name__ == "__main__":
    main()
