"""How often do the 95% intervals of `cyto sae versus` hold a label purity, and how wide are they?

Cohorts are drawn again and again: patients with their own mixture of labels, their own number of images and their own
frequency of each latent; a latent is `factor` times as frequent in one label (1: none, purity is chance; 60: purity is
near 1). A second SAE of the same images keeps to labels less (its factor is the square root), for the paired
difference, and a third exactly as much as the second: the SAE minus the better of both (`smaller_lead`), where it is
hardest, since which of both is better is chance. The interval is held against the mean of the figure over all cohorts
of the kind, or the smaller of both means. `ahead` (with factor 1, where all three are alike) is how often the SAE is
ahead of both.

Ours: leaving out each patient (`interval_without`). Against: the hull of two readings of a bootstrap, which was used
before. Prints one line of JSON: for each kind of cohort and figure the coverage and the median width of both.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from common import arguments, emit
from scipy.stats import norm as normal
from scipy.stats import t as student

from cytosae.baselines.figures_of_draws import PURITIES, SHUFFLES, figures_of_draws, purity_without
from cytosae.baselines.measure import ImageSums
from cytosae.baselines.versus import Lead, interval_of_difference, interval_without, left_out_together, smaller_lead
from cytosae.concepts import shuffled_labels

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
KINDS = [  # patients, labels, factor, are numbers of images uneven
    (n_patients, n_labels, factor, is_uneven)
    for is_uneven in (False, True)
    for n_labels, factor in ((12, 1.0), (3, 1.0), (3, 4.0), (3, 60.0))
    for n_patients in (5, 8, 20, 60)
]
DIFFERENCE, BEYOND = "difference above chance", "above the better of two"
FIGURES = (*PURITIES, DIFFERENCE, BEYOND)


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=20, help="cohorts drawn of each kind (%(default)s)")
    parser.add_argument("--draws", type=int, default=300, help="of the bootstrap (%(default)s)")
    parser.add_argument("--latents", type=int, default=60, help="(%(default)s)")
    parser.add_argument("--kinds", type=int, default=len(KINDS), help="only so many kinds of cohorts (%(default)s)")
    options = parser.parse_args()
    began = time.monotonic()
    found = [measure(kind, options) for kind in KINDS[: options.kinds]]
    seconds = time.monotonic() - began
    n_cohorts = options.runs * len(found)
    cells = [figure for row in found for figure in row["figures"].values()]
    covered = {side: [cell[side]["coverage"] for cell in cells] for side in ("without", "hull")}
    emit(
        "purity_intervals",
        ratio=float(np.median([cell["without"]["width"] / cell["hull"]["width"] for cell in cells])),
        target=1,
        ours={"rate": n_cohorts / seconds, "unit": "cohorts/s", "seconds": seconds}
        | {"mean_coverage": float(np.mean(covered["without"])), "least_coverage": min(covered["without"])},
        baseline={"rate": n_cohorts / seconds, "unit": "cohorts/s", "seconds": seconds, "what": "the hull"}
        | {"mean_coverage": float(np.mean(covered["hull"])), "least_coverage": min(covered["hull"])},
        cohorts=found,
        params=vars(options),
    )


def measure(kind: tuple[int, int, float, bool], options: Any) -> dict[str, Any]:
    """Coverage and median width of both intervals, of each figure."""
    n_patients, n_labels, factor, is_uneven = kind
    rng = np.random.default_rng([n_patients, n_labels, int(factor), is_uneven])
    again = np.random.default_rng([n_patients, n_labels, int(factor), is_uneven, 1])  # so that the others stay the same
    values = np.zeros((options.runs, 2 + len(PURITIES)))
    limits = np.zeros((2, options.runs, len(FIGURES), 2))
    n_ahead = 0
    for run in range(options.runs):
        groups, labels = cohort(rng, n_patients, n_labels, is_uneven)
        all_three = [latents_of(rng, groups, labels, n_labels, options.latents, each) for each in (factor, factor**0.5)]
        all_three.append(latents_of(again, groups, labels, n_labels, options.latents, factor**0.5))
        shuffled = np.stack([*shuffled_labels(labels, groups, shuffles=SHUFFLES, seed=run)])
        drawn = rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), options.draws)
        weights = np.vstack([np.ones(n_patients), drawn])[:, groups].astype(np.float64)
        blocks = left_out_together(groups, n_patients, run)
        of_draws = [figures_of_draws(sums, weights, labels, shuffled, least_images=5) for sums in all_three]
        left = [purity_without(sums, labels, shuffled, blocks, least_images=5) for sums in all_three]
        for number, name in enumerate(PURITIES):
            draws = of_draws[0][name]
            values[run, number] = draws[0]
            limits[0, run, number] = interval_without(draws[0], left[0][name])
            limits[1, run, number] = hull(draws[0], draws[1:], n_patients)
        name = PURITIES[-1]
        whole = [np.array([[draws[name][0], *each[name]]]) for draws, each in zip(of_draws, left, strict=True)]
        leads, hulls = [], []
        for other in (1, 2):
            draws = of_draws[0][name] - of_draws[other][name]
            leads.append(Lead(draws[0], *interval_of_difference(whole[0], whole[other])))
            hulls.append(Lead(draws[0], *hull(draws[0], draws[1:], n_patients)))
            values[run, len(PURITIES) + other - 1] = draws[0]
        for side, both in enumerate((leads, hulls)):
            for number, lead in enumerate((both[0], smaller_lead(*both)), start=len(PURITIES)):
                limits[side, run, number] = lead.low, lead.high
        n_ahead += bool(factor == 1 and smaller_lead(*leads).is_ahead)
    means = np.nanmean(values, axis=0)
    figures: dict[str, dict[str, Any]] = {}
    for number, figure in enumerate(FIGURES):
        truth = min(means[-2:]) if figure == BEYOND else means[number]
        figures[figure] = {"mean": float(truth)}
        for side, side_name in enumerate(("without", "hull")):
            low, high = limits[side, :, number].T
            figures[figure][side_name] = {
                "coverage": float(((low <= truth) & (truth <= high)).mean()),
                "width": float(np.median(high - low)),
                "low_above": float((low > truth).mean()),
            }
    what = {"patients": n_patients, "labels": n_labels, "factor": factor, "uneven": is_uneven}
    if factor == 1:
        what["ahead"] = n_ahead / options.runs
    return what | {"figures": figures}


def cohort(rng: np.random.Generator, n_patients: int, n_labels: int, is_uneven: bool) -> tuple[Ints, Ints]:
    """(images,) patients and labels: 4 to 30 images of a patient, or 1 to 300, most of them few."""
    if is_uneven:
        sizes = np.clip(np.exp(rng.normal(2.7, 1.1, n_patients)), 1, 300).astype(np.int64)
    else:
        sizes = rng.integers(4, 30, n_patients)
    groups = np.repeat(np.arange(n_patients), sizes)
    mixtures = rng.dirichlet(np.full(n_labels, 6 / n_labels), n_patients).cumsum(1)
    labels = (rng.random(len(groups))[:, None] > mixtures[groups, :-1]).sum(1)
    return groups, labels.astype(np.int64)


def latents_of(
    rng: np.random.Generator, groups: Ints, labels: Ints, n_labels: int, n_latents: int, factor: float
) -> ImageSums:
    """An SAE's latents: each is `factor` times as frequent in one label, and more or less so in each patient."""
    own, rate = np.arange(n_latents) % n_labels, min(0.08, 0.6 / factor)
    frequency = rate * rng.gamma(3, 1 / 3, (int(groups.max()) + 1, n_latents))
    odds = np.where(own == labels[:, None], factor, 1) * frequency[groups]
    active = rng.random(odds.shape) < np.minimum(0.9, odds)
    one, latents = np.ones(len(groups)), np.nonzero(active)[1]
    return ImageSums(
        n_latents=n_latents, tokens=one, error=one, square=one, shifted=one[:, None], active=one,
        begins=np.concatenate([[0], np.cumsum(active.sum(1))]), latents=latents.astype(np.int32),
        values=rng.gamma(2, 1, len(latents)).astype(np.float32),
    )  # fmt: skip


def hull(observed: float, draws: Floats, n_groups: int) -> tuple[float, float]:
    """As it was before: of the interval about the observed value and of that about the mean of the draws."""
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(observed) or not len(draws):
        return np.nan, np.nan
    wider = student.ppf(0.975, n_groups - 1) / normal.ppf(0.975) * np.sqrt(n_groups / (n_groups - 1))
    ends = [observed + wider * (np.quantile(draws, [0.025, 0.975]) - centre) for centre in (draws.mean(), observed)]
    return min(low for low, _ in ends), max(high for _, high in ends)


if __name__ == "__main__":
    main()
