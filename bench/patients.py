"""How many latents set a patient apart by `cyto concept patient` where no patient is special? A table, by simulation.

Cells: how many patients, images of each (or of the patient and of the others), how many images show a latent (30%, 2%,
0.2%), how its level spreads over patients (log-normal with this standard deviation of logarithms, gamma with this
shape, or only some patients have it), and whether an image that shows it has 1 to 257 patches or always 1 ("ties").
Given, of all latents: the share with |z| >= 3 (nominally 0.27%) and the share that sets the patient apart; the
former by the plain scale with tokens that fall one by one, as it was; and the share set apart where the patient has
five times its level (log-normal 0.5). `--table` prints Markdown, a row for the cells of one size with the largest
shares. `ratio` is how many cells are at most at 0.27%, of all those without "some patients".
"""

import time
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss
from common import arguments, emit

from cytosae.relations import dispersion_of
from cytosae.relations.patient_concepts import compare_patient, image_spread
from cytosae.relations.patient_z import as_z

Floats = npt.NDArray[np.float64]
PATIENTS = (6, 36, 189)
IMAGES = ((20, 20), (300, 300), (1000, 1000), (20, 300), (300, 20))  # of the patient, of each other
FREQUENCIES = (0.3, 0.02, 0.002)
SPREADS = ("log-normal 0", "log-normal 0.5", "log-normal 1", "gamma 1", "a tenth")
NOMINAL = 0.0027
TARGETS = 6  # patients that are compared with the same others


def main() -> None:
    """Measure and print one line of JSON, or the table."""
    parser = arguments(__doc__)
    parser.add_argument("--latents", type=int, default=200, help="of a run (%(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="of a cell, six patients each (%(default)s)")
    parser.add_argument("--splits", type=int, default=20, help="into halves (%(default)s)")
    parser.add_argument("--cells", type=int, default=10**6, help="the first of them")
    parser.add_argument("--table", action="store_true", help="Markdown in place of JSON")
    options = parser.parse_args()
    began = time.monotonic()
    plans = [
        (n, images, f, spread, ties)
        for n in PATIENTS
        for images in IMAGES
        for f in FREQUENCIES
        for spread in SPREADS
        for ties in (False, True)
    ][: options.cells]
    if options.table:
        print(
            "| patients | images | frequency | before: z | z | set apart | a tenth: set apart | five times the level |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for _, group in groupby(plans, key=lambda plan: plan[:3]):
            of_it = [simulate(*plan, options.latents, options.runs, options.splits) for plan in group]
            cell = of_it[0]
            smooth = [c for c in of_it if c["spread"] != "a tenth"]
            worst = [max(c[name] for c in smooth) for name in ("before", "z", "apart")]
            tenth = max((c["apart"] for c in of_it if c["spread"] == "a tenth"), default=float("nan"))
            power = "/".join(f"{c['found']:.0%}" for c in of_it if c["spread"] == "log-normal 0.5")
            shares = " | ".join(f"{100 * share:.2f}" for share in [*worst, tenth])
            print(
                f"| {cell['patients']} | {cell['images']} | {cell['frequency']:.1%} | {shares} | {power} |", flush=True
            )
        return
    cells = [simulate(*plan, options.latents, options.runs, options.splits) for plan in plans]
    seconds = time.monotonic() - began
    smooth = [c for c in cells if c["spread"] != "a tenth"]
    rate = {"unit": "cells", "seconds": seconds, "rate": len(cells) / seconds}
    emit(
        "patients",
        ratio=max(0.5, sum(c["apart"] <= NOMINAL for c in smooth)) / len(smooth),
        target=1,
        ours=rate | {"largest_apart": max(c["apart"] for c in smooth)},
        baseline=rate
        | {"what": "plain scale, tokens one by one: |z| >= 3", "largest": max(c["before"] for c in smooth)},
        cells=cells,
        params=vars(options),
    )


def simulate(
    n_patients: int,
    images: tuple[int, int],
    frequency: float,
    spread: str,
    ties: bool,
    n_latents: int,
    n_runs: int,
    n_splits: int,
) -> dict[str, Any]:
    """One cell."""
    rng = np.random.default_rng([n_patients, *images, round(frequency * 1e4), SPREADS.index(spread), ties])
    shares = np.zeros((n_runs * TARGETS, 4))
    for run in range(n_runs):
        rates = np.minimum(1, frequency * levels(rng, spread, (n_patients - 1 + TARGETS, n_latents)))
        made = [made_up(rng, images[1], rate, ties) for rate in rates[TARGETS:]]
        others = np.array([np.asarray(each.mean(axis=0)).ravel() for each in made])
        mean, sd = others.mean(0), others.std(0, ddof=1)
        sums = np.sum([image_spread(each) for each in made], axis=0)
        for target in range(TARGETS):
            patient = made_up(rng, images[0], rates[target], ties)
            mine = np.asarray(patient.mean(axis=0)).ravel()
            own = np.maximum(np.maximum(mine, mean) / images[0], 1 / images[0] ** 2)
            before = as_z((mine - mean) / np.sqrt(sd**2 * (1 + 1 / len(others)) + own), len(others))
            z, apart = looked_at(patient, others, images[1], sums, rng, n_splits)
            found = 0.0
            if spread == "log-normal 0.5":
                five = made_up(rng, images[0], np.minimum(1, 5 * rates[target]), ties)
                found = looked_at(five, others, images[1], sums, rng, n_splits)[1]
            shares[run * TARGETS + target] = (np.abs(before) >= 3).mean(), z, apart, found
    return {
        "patients": n_patients,
        "images": str(images[0]) if images[0] == images[1] else f"{images[0]} against {images[1]}",
        "frequency": frequency,
        "spread": spread,
        "ties": ties,
        **dict(zip(("before", "z", "apart", "found"), shares.mean(0).tolist(), strict=True)),
    }


def looked_at(
    patient: Any, others: Floats, n_images: int, sums: Floats, rng: np.random.Generator, n_splits: int
) -> tuple[float, float]:
    """Shares of all latents with |z| of 3 or more, and that set the patient apart.

    n_images, sums : images of each other patient, and what they all add to `dispersion_of`
    """
    n_others, n_latents = others.shape
    found = compare_patient(
        np.arange(n_latents),
        patient,
        others,
        dispersion=dispersion_of(*(sums + image_spread(patient))),
        images_per_patient=(n_others * n_images + patient.shape[0]) / (n_others + 1),
        min_images=3,
        n_splits=n_splits,
        rng=rng,
    )
    return float((np.abs(found.z) >= 3).sum() / n_latents), float(found.sets_apart.sum() / n_latents)


def levels(rng: np.random.Generator, spread: str, shape: tuple[int, int]) -> Floats:
    """How much of its frequency each patient has of a latent, 1 on average."""
    kind, _, number = spread.partition(" ")
    if kind == "log-normal":
        sd = float(number)
        return np.exp(rng.normal(-(sd**2) / 2, sd, shape))
    if kind == "gamma":
        return rng.gamma(float(number), 1 / float(number), shape)
    return np.where(rng.random(shape) < 0.1, 10, 0) * np.exp(rng.normal(-0.125, 0.5, shape))


def made_up(rng: np.random.Generator, n_images: int, rates: Floats, ties: bool) -> Any:
    """(images, latents) CSR of one patient."""
    n_shown = rng.binomial(n_images, rates)
    columns = np.repeat(np.arange(len(rates)), n_shown)
    # which images show a latent: the first n_shown of its own random order, only as far as it is needed
    rows = np.concatenate([rng.permutation(n_images)[:n] if n else np.empty(0, np.int64) for n in n_shown])
    values = np.ones(len(rows)) if ties else np.minimum(257, np.ceil(rng.exponential(20, len(rows))))
    return ss.csr_matrix((values, (rows.astype(np.int64), columns)), shape=(n_images, len(rates)))


if __name__ == "__main__":
    main()
