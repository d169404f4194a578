"""Is p of `cyto compare` what it says where nothing differs, and do its intervals cover? Three tables, by simulation.

`null`: sizes of the groups, images per patient, and how many images show a latent (30%, 2%, 0.2%); an image that shows
it has a count of 1 to 257 patches, or ("ties") always 1. Nothing differs; patients are thinned by the rule of
`--images-per-patient auto`. Given: the share of latents with p <= 0.05; the same with ties broken at random, which
alone can be 0.05 where few values of p are possible; the level that one permutation test can attain at all; the share
of runs with any p_max_t <= 0.05.
`coverage`: of the 95% intervals (difference, g, AUC), where a latent is shown a third, once, three or ten times as
often in A as in B; and for how many latents limits are given.
`mixture`: data sets where nothing differs within a cell type (or a site), but the mixture does.

`ratio` is how many cells are right, of all: 0.04 to 0.06 with ties broken at random, no more than 0.06 with all ties
counted, and family-wise at most 0.07; coverage at least 0.93; 0.04 to 0.06 in `mixture`. `--table` prints Markdown.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from common import arguments, emit, say
from patient_generator import LARGEST, MEAN, Floats, patient_means, rates
from scipy.sparse import csr_matrix
from scipy.stats import gamma

from cytosae.compare import DRAWS, CompareConfig, choose_number, combine_draws, permutation_test
from cytosae.compare.differential import choose_tested, differential
from cytosae.compare.groups import TwoGroups, prepare
from cytosae.compare.intervals import intervals
from cytosae.compare.permutation import PermutationTest
from stores.barcode_store import BarcodeStore
from stores.tables import STATUS_OK

Bools = npt.NDArray[np.bool_]
Cell = dict[str, Any]
GROUPS = ((16, 20, 60, 400), (60, 20, 16, 400), (20, 50, 20, 200), (30, 100, 30, 100), (8, 100, 40, 100))
FREQUENCIES = (0.3, 0.02, 0.002)
FACTORS = (1 / 3, 1, 3, 10)
MIXTURES = tuple(
    (images, settings)
    for images in ((20, 60, 20, 60), (16, 40, 30, 200))
    for settings in (
        {"within_label": "blast"},
        {"standardize": "label"},
        {"strata": "site"},
        {"adjust": ("site",)},
        {"strata": "site", "standardize": "label"},
    )
)
RIGHT: dict[str, Callable[[Cell], bool]] = {
    "null": lambda c: 0.04 <= c["p_random"] <= 0.06 and c["p"] <= 0.06 and c["family"] <= 0.07,
    "coverage": lambda c: min(c["coverage"]) >= 0.93,
    "mixture": lambda c: 0.04 <= c["p"] <= 0.06,
}


def main() -> None:
    """Measure and print one line of JSON, or the tables."""
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=[*RIGHT], action="append", help="only this one (may repeat)")
    parser.add_argument("--latents", type=int, default=100, help="of a run (%(default)s)")
    parser.add_argument("--runs", type=int, default=100, help="of a cell of `null` (%(default)s)")
    parser.add_argument("--even-runs", type=int, help="where nobody is thinned (as --runs)")
    parser.add_argument("--coverage-runs", type=int, default=20, help="of a cell of `coverage` (%(default)s)")
    parser.add_argument("--data-sets", type=int, default=50, help="of a cell of `mixture` (%(default)s)")
    parser.add_argument("--permutations", type=int, default=499, help="(%(default)s)")
    parser.add_argument("--cells", type=int, default=1000, help="the first of each part")
    parser.add_argument("--frequency", type=float, action="append", help="only this one (may repeat)")
    parser.add_argument(
        "--factor", type=float, action="append", help="of `coverage`, such as 30 for an AUC near 1 (may repeat)"
    )
    parser.add_argument("--only-ties", action="store_true", help="leave out what has counts of more than 1")
    parser.add_argument("--table", action="store_true", help="Markdown in place of JSON")
    options = parser.parse_args()
    began = time.monotonic()
    n_latents, n_permutations = options.latents, options.permutations
    frequencies = options.frequency or FREQUENCIES
    shown = [
        (groups, f, ties)
        for ties in ((True,) if options.only_ties else (False, True))
        for f in frequencies
        for groups in GROUPS
    ]
    factors = options.factor or FACTORS
    different = [(groups, f, ties, k) for groups, f, ties in shown for k in factors if f * k <= 1]

    def null(groups: tuple[int, int, int, int], f: float, ties: bool) -> Cell:
        is_even = groups[1] == groups[3]
        n_runs = (options.even_runs if is_even else None) or options.runs
        return simulate(groups, f, ties, n_latents, n_runs, n_permutations)

    jobs: dict[str, list[Callable[[], Cell]]] = {
        "null": [partial(null, *plan) for plan in shown],
        "coverage": [partial(cover, *plan, n_latents, options.coverage_runs) for plan in different],
        "mixture": [partial(mix, *plan, n_latents, options.data_sets, n_permutations) for plan in MIXTURES],
    }
    found: dict[str, list[Cell]] = {}
    for part in options.part or jobs:
        found[part] = []
        for job in jobs[part][: options.cells]:
            found[part].append(job())
            say(f"{part} {len(found[part])} of {len(jobs[part])}: {found[part][-1]}")
    seconds = time.monotonic() - began
    if options.table:
        for part, cells in found.items():
            print("\n".join(TABLES[part](cells)), end="\n\n")
        return
    n_cells = sum(map(len, found.values()))
    n_right = sum(RIGHT[part](cell) for part, cells in found.items() for cell in cells)
    n_crude = sum(0.04 <= cell["p_all"] <= 0.06 for cell in found.get("null", []))
    rate = {"unit": "cells", "seconds": seconds, "rate": n_cells / seconds}
    emit(
        "calibration",
        ratio=max(n_right, 0.5) / n_cells,
        target=1,
        ours=rate | {"n_right": n_right},
        baseline=rate | {"what": "null, all images, not thinned, p from 0.04 to 0.06", "n_right": n_crude},
        cells=found,
        params=vars(options),
    )


# ------------------------------------------------------------------------------------------------- nothing differs


def simulate(
    groups: tuple[int, int, int, int], frequency: float, ties: bool, n_latents: int, n_runs: int, n_permutations: int
) -> Cell:
    """One cell of `null`."""
    is_a, n_images, n = sizes(groups)
    rng = np.random.default_rng([*groups, round(frequency * 1e4), ties])
    found: dict[str, list[float]] = {name: [] for name in ("p", "p_random", "attainable", "family", "p_all")}
    for run in range(n_runs):
        rate = rates(rng, np.full(len(is_a), frequency), n_latents)
        whole, draws = patient_means(rng, n_images, rate, ties, n or 0, DRAWS if n else 0)
        tested = whole.max(0) > 0
        whole, draws = whole[:, tested], [draw[:, tested] for draw in draws or [whole]]
        tests = [permutation_test(draw, is_a, n_permutations=n_permutations, seed=run) for draw in draws]
        test = combine_draws(tests)
        broken, level = break_ties(draws, is_a, tests, n_permutations, run, rng.random(int(tested.sum())))
        p_all = test.p
        if n:
            p_all = permutation_test(whole, is_a, n_permutations=n_permutations, seed=run).p
        found["p"].append((test.p <= 0.05).mean())
        found["p_random"].append((broken <= 0.05).mean())
        found["attainable"].append(level)
        found["family"].append(test.p_max_t.min() <= 0.05)
        found["p_all"].append((p_all <= 0.05).mean())
    return describe(groups, frequency, ties) | {"n_runs": n_runs, **{k: float(np.mean(v)) for k, v in found.items()}}


def break_ties(
    draws: list[Floats], is_a: Bools, tests: list[PermutationTest], n_permutations: int, seed: int, share: Floats
) -> tuple[Floats, float]:
    """(columns,) p with a `share` (columns,) of the ties, combined as `combine_draws` does; and the attainable level.

    Where `share` is uniform, p of a draw is uniform too, whatever ties. The level of one draw's test is how many
    permutations have a p of at most 0.05 among them: a mean over columns, of the first draw.
    """
    rng = np.random.default_rng(seed)
    masks = rng.permuted(np.tile(is_a.astype(np.uint8), (n_permutations, 1)), axis=1)
    masks = np.vstack([is_a, masks]).astype(np.float64)
    broken, level = [], np.nan
    for number, (draw, test) in enumerate(zip(draws, tests, strict=True)):
        centred = draw - draw.mean(0)
        sums = np.abs(masks @ (centred / np.maximum(np.sqrt((centred**2).mean(0)), 1e-12)))
        n_above = np.count_nonzero(sums > sums[0] + 1e-7, axis=0)
        n_tied = np.rint(test.p * len(masks)) - n_above
        broken.append(np.maximum(n_above + share * n_tied, 0.5) / len(masks))
        if number == 0:
            n_allowed = int(0.05 * len(masks))
            first_too_many = -np.partition(-sums.T, n_allowed, axis=1)[:, n_allowed]
            level = float((sums > first_too_many + 1e-7).mean())
    tied = [
        PermutationTest(p, p, p, p, n_permutations, False, test.floor) for p, test in zip(broken, tests, strict=True)
    ]
    return combine_draws(tied).p, level


def sizes(groups: tuple[int, int, int, int]) -> tuple[Bools, npt.NDArray[np.int64], int | None]:
    """Members of A, images of each patient, and to how many they are thinned."""
    n_a, images_a, n_b, images_b = groups
    is_a = np.arange(n_a + n_b) < n_a
    n_images = np.where(is_a, images_a, images_b)
    n = choose_number(n_images[:, None], is_a, np.ones(1), "auto")
    return is_a, n_images, None if n is None else int(n[0])


def describe(groups: tuple[int, int, int, int], frequency: float, ties: bool) -> Cell:
    """What the cell is."""
    n_a, images_a, n_b, images_b = groups
    return {"groups": f"{n_a} x {images_a} against {n_b} x {images_b}", "frequency": frequency, "ties": ties}


# ------------------------------------------------------------------------------------------------- something differs


def cover(
    groups: tuple[int, int, int, int], frequency: float, ties: bool, factor: float, n_latents: int, n_runs: int
) -> Cell:
    """One cell of `coverage`: in A, `factor` times as many images show each latent."""
    is_a, n_images, n = sizes(groups)
    rng = np.random.default_rng([*groups, round(frequency * 1e4), ties, round(factor * 100)])
    true = truth(rng, groups, frequency, ties, factor, n or groups[1])
    n_tested, n_limits, n_covered = 0, 0, np.zeros(3)
    for _ in range(n_runs):
        rate = rates(rng, np.where(is_a, factor, 1) * frequency, n_latents)
        whole, draws = patient_means(rng, n_images, rate, ties, n or 0, DRAWS if n else 0)
        tested = whole.max(0) > 0
        whole, draws = whole[:, tested], [draw[:, tested] for draw in draws or [whole]]
        found = intervals(whole, draws, is_a)
        has = ~np.isnan(found["difference_low"])
        n_tested, n_limits = n_tested + len(has), n_limits + int(has.sum())
        for k, (name, value) in enumerate(true.items()):
            n_covered[k] += ((found[f"{name}_low"] <= value) & (value <= found[f"{name}_high"]))[has].sum()
    return describe(groups, frequency, ties) | {
        "factor": factor,
        "coverage": (n_covered / max(1, n_limits)).tolist(),
        "with_limits": n_limits / max(1, n_tested),
        "n_intervals": n_limits,
    }


def truth(
    rng: np.random.Generator, groups: tuple[int, int, int, int], frequency: float, ties: bool, factor: float, n: int
) -> dict[str, float]:
    """Difference, g and AUC of patients in general, g and AUC of means of n images; AUC from 200,000 of each group."""
    above = np.exp(-np.arange(LARGEST) / MEAN)  # chance that a count is above 0, 1, ..., 256
    first, second = (1.0, 1.0) if ties else (above.sum(), ((2 * np.arange(LARGEST) + 1) * above).sum())
    means, variances, values = [], [], []
    for share in (factor * frequency, frequency):
        rate = np.minimum(1, gamma.ppf((np.arange(100_000) + 0.5) / 100_000, 4, scale=share / 4))
        one, two = rate.mean(), (rate**2).mean()
        means.append(one * first)
        variances.append((one * second - two * first**2) / n + (two - one**2) * first**2)
        many = rates(rng, np.full(400, share), 500)
        values.append(np.sort(patient_means(rng, np.full(400, n), many, ties, 0, 0)[0].ravel()))
    (n_a, _, n_b, _), (a, b) = groups, values
    sd = np.sqrt(((n_a - 1) * variances[0] + (n_b - 1) * variances[1]) / (n_a + n_b - 2))
    auc = (np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")).mean() / 2 / len(b)
    return {"difference": means[0] - means[1], "hedges_g": float((means[0] - means[1]) / sd), "auc": float(auc)}


# ------------------------------------------------------------------------------------------------- the mixture differs


class _Barcodes:
    """Barcodes of images in memory, with as much of a BarcodeStore as comparing reads."""

    def __init__(self, values: npt.NDArray[np.float32]) -> None:
        self._values = csr_matrix(values)
        self.header = SimpleNamespace(spec={"normalize": "images"})

    def matrix(self, level: str, tau: float | None) -> csr_matrix:
        return self._values

    def read_rows(self, level: str, rows: npt.NDArray[np.int64], tau: float | None) -> csr_matrix:
        return self._values[rows]

    def path(self, level: str, tau: float | None) -> Path:
        return Path(level)


def mix(
    images: tuple[int, int, int, int], settings: Cell, n_latents: int, n_data_sets: int, n_permutations: int
) -> Cell:
    """One cell of `mixture`: 65% of A's images are blasts, 35% of B's; or 80% against 20% of patients from one site."""
    n_a, images_a, n_b, images_b = images
    below, crude, family = [], [], []
    for number in range(n_data_sets):
        rng = np.random.default_rng([*images, number, *map(ord, repr(settings))])
        is_a = np.arange(n_a + n_b) < n_a
        n_images = np.where(is_a, images_a, images_b)
        patient = np.repeat(np.arange(len(is_a)), n_images)
        rate = rng.gamma(4, 0.3 / 4, (len(is_a), n_latents))
        shown = rng.random((len(patient), n_latents)) < np.minimum(1, rate)[patient]
        values: Floats = np.where(shown, rng.geometric(0.1, shown.shape), 0).astype(np.float64)
        north = np.where(is_a, np.arange(len(is_a)) % 5 > 0, np.arange(len(is_a)) % 5 == 0)
        share = np.clip(np.where(is_a, 0.65, 0.35) + rng.uniform(-0.1, 0.1, len(is_a)), 0, 1)
        if "strata" not in settings and "adjust" not in settings:
            north[:] = False
        if "within_label" not in settings and "standardize" not in settings:
            share[:] = 0.5
        is_blast = rng.random(len(patient)) < share[patient]
        values += is_blast[:, None] * rng.poisson(3.0, values.shape) + north[patient, None] * 2.0
        names = [f"P{i:03d}" for i in range(len(is_a))]
        table = pd.DataFrame(
            {
                "patient": np.array(names, object)[patient],
                "dataset": "drawn",
                "status": STATUS_OK,
                "label": np.where(is_blast, "blast", "lymphocyte"),
                "site": np.where(north[patient], "north", "south"),
            }
        )
        means = np.array([values[patient == i].mean(0) for i in range(len(is_a))], np.float32)
        diseases = ["A" if one else "B" for one in is_a]
        groups = TwoGroups(means, names, names, diseases, ["drawn"] * len(names), n_images, is_a, 0, 0)
        config = CompareConfig(a="A", b="B", n_permutations=n_permutations, n_bootstraps=0, seed=number, **settings)
        store = cast(BarcodeStore, _Barcodes(values.astype(np.float32)))
        prepared = prepare(store, table, groups, config)
        tested, _ = choose_tested(prepared.groups.values, config, None)
        found = differential(prepared, config, tested)[0].to_pandas()
        below.append((found["p"] <= 0.05).mean())
        crude.append((found["p_crude"] <= 0.05).mean())
        family.append(bool((found["p_max_t"] <= 0.05).any()))
    return {
        "groups": f"{n_a} x {images_a} against {n_b} x {images_b}",
        "settings": " ".join(
            f"--{k.replace('_', '-')} {v if isinstance(v, str) else v[0]}" for k, v in settings.items()
        ),
        "n_data_sets": n_data_sets,
        "p": float(np.mean(below)),
        "least": float(np.min(below)),
        "most": float(np.max(below)),
        "family": float(np.mean(family)),
        "p_crude": float(np.mean(crude)),
    }


# ------------------------------------------------------------------------------------------------- tables


def _kind(cell: Cell) -> str:
    return f"{cell['groups']} | {cell['frequency']:.1%}{', ties' if cell['ties'] else ''}"


def _null_table(cells: list[Cell]) -> list[str]:
    return [
        "| patients x images | frequency | p <= 0.05 | ties broken at random | attainable by one test "
        "| family-wise (runs) | all images: p <= 0.05 |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {_kind(c)} | {c['p']:.3f} | {c['p_random']:.3f} | {c['attainable']:.3f} "
            f"| {c['family']:.3f} ({c['n_runs']:,}) | {c['p_all']:.3f} |"
            for c in cells
        ),
    ]


_TIMES = {1 / 3: "a third", 1: "as often", 3: "three times", 10: "ten times"}


def _coverage_table(cells: list[Cell]) -> list[str]:
    kinds = list(dict.fromkeys(map(_kind, cells)))
    factors = sorted({c["factor"] for c in cells})
    by_factor = [{_kind(c): c for c in cells if c["factor"] == k} for k in factors]
    names = " | ".join(_TIMES.get(k, f"{k:g} times") for k in factors)
    return [
        f"| patients x images | frequency | {names} | with limits |",
        "|---|---|" + "---|" * (len(factors) + 1),
        *(
            f"| {kind} | "
            + " | ".join(
                " / ".join(f"{share:.3f}" for share in some[kind]["coverage"]) if kind in some else ""
                for some in by_factor
            )
            + f" | {min(some[kind]['with_limits'] for some in by_factor if kind in some):.3f} |"
            for kind in kinds
        ),
    ]


def _mixture_table(cells: list[Cell]) -> list[str]:
    return [
        "| patients x images | options | p <= 0.05 | least and most of a data set | family-wise | p_crude <= 0.05 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {c['groups']} | `{c['settings']}` | {c['p']:.3f} | {c['least']:.3f} to {c['most']:.3f} "
            f"| {c['family']:.2f} ({c['n_data_sets']}) | {c['p_crude']:.3f} |"
            for c in cells
        ),
    ]


TABLES = {"null": _null_table, "coverage": _coverage_table, "mixture": _mixture_table}


if __name__ == "__main__":
    main()
