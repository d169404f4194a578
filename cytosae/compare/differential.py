"""Which latents set the patients of one disease apart from those of another? (CytoSAE, Fig. 5)

The unit is the patient: each counts once, whatever the number of images. For each latent there are the difference of
mean barcodes (by which the paper ranks latents), effect sizes, permutation p-values, their Benjamini-Hochberg q-values
and max-T adjustment (permutation.py), intervals (intervals.py), and the share of bootstraps in which the latent stays
in the top list (top_list_stability.py). Filters do not use the diseases, so that the p-values of the remaining latents
stay valid. Who is compared: groups.py; which images count for a patient: patient_values.py; strata and covariates:
covariates.py, freedman_lane.py. Figures: figures.py.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import false_discovery_control

from cytosae.barcodes import IMAGE_COLUMNS
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput
from stores.files import sha256_json
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import COMPARISON
from stores.tables import column, listed, read_table_file

from .config import CompareConfig, describe_left_out
from .figures import plot_correlation, plot_patients, plot_scatter
from .freedman_lane import adjustment, residual_permutation_test
from .groups import Prepared, TwoGroups, choose_groups, prepare, read_patients, sae_of, warn_of_groups
from .intervals import SUPPORT, intervals, is_supported
from .permutation import PermutationTest, combine_draws, permutation_test
from .report import Comparison
from .top_list_stability import bootstrap_stability, ranks_of, stability_without_effect

_COLUMNS = 1 << 12  # latents of one chunk in float64
_METHOD = 3  # version of the statistics: results of older versions are not taken for these
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def compare(
    barcodes: Path | str,
    out: Path | str,
    config: CompareConfig,
    *,
    latents: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Comparison:
    """Compare the patients of two diseases latent by latent, and write tables and figures to the folder `out`.

    Memory: the barcodes of the patients that are compared, dense in float32, three times; 11 times more if patients are
    thinned, and another 11 for p_crude if only some images count.

    Parameters
    ----------
    latents : a table with a column `latent`: only these are tested. They must be chosen on other data, or p-values are
        not valid

    Raises
    ------
    BadInput
        If a disease does not exist or has fewer than two patients, or no latent is left to be tested.
    DamagedStore
        If the barcodes cannot be read, or hold what no barcode is.
    SpecMismatch
        If `out` holds a comparison with other settings (and not `overwrite`), or something else.
    """
    barcodes, out = Path(barcodes), Path(out)
    latents = None if latents is None else Path(latents)
    store = BarcodeStore(barcodes)
    patients = read_patients(store, config.tau)
    images = store.read_obs("image", config.tau, needed=IMAGE_COLUMNS)
    chosen = choose_groups(patients, config.a, config.b)
    prepared = prepare(store, images, chosen, config)
    groups = prepared.groups
    only = None if latents is None else read_latents(latents, n_latents=groups.values.shape[1])
    is_tested, left_out = choose_tested(groups.values, config, only)
    spec = {
        "barcodes": store.header.identity,
        **asdict(config),
        "tau": store.taus[0] if config.tau is None else config.tau,
        "adjust": [*config.adjust],
        "method": _METHOD,
        "b_is_rest": config.b not in groups.diseases,
        "latents": None if only is None else sha256_json(only),
    }
    inputs = [path for path in (barcodes, latents) if path is not None]
    packages = ("numpy", "scipy", "numba", "anndata")
    writer = begin_results(out, COMPARISON, spec, overwrite=overwrite, inputs=inputs, packages=packages)
    writer.watch(store.header)
    if writer.is_complete:
        return Comparison(out=out, results=ResultStore(out, COMPARISON), was_complete=True)

    table, summary = differential(prepared, config, is_tested, progress=progress)
    summary |= {
        "images": prepared.images_used,
        "left_out": left_out,
        "tau": spec["tau"],
        "normalize": store.header.spec["normalize"],
        "token_set": store.header.spec.get("token_set", "all"),
        "sae_sha256": sae_of(store),
        "warnings": [
            *warn_of_groups(prepared, config, images, normalize=store.header.spec["normalize"]),
            *prepared.notes,
            *summary["warnings"],
        ],
    }
    shown = {group: _first(table, f"rank_{group}", config.top) for group in ("a", "b")}
    correlation = correlate(groups.values[:, is_tested])
    writer.write_table("differential", table)
    writer.write_table("patients", _patient_table(groups, sorted({*shown["a"], *shown["b"]})))
    writer.write_table("correlation", _correlation_table(groups, correlation))
    titles = (config.a, config.b)
    plot_scatter(table, shown, titles, writer.root / "scatter")
    plot_patients(groups.values, groups.is_a, shown, titles, writer.root / "patients")
    plot_correlation(correlation, groups.diseases, groups.names, writer.root / "correlation")
    writer.finish(summary)
    return Comparison(out=out, results=ResultStore(out, COMPARISON), was_complete=False)


def read_latents(path: Path, *, n_latents: int) -> list[int]:
    """The latents that a CSV or Parquet table names in its column `latent`, rising, each once.

    Raises
    ------
    BadInput
        If there is no such column, or in it nothing, or what is no latent of these barcodes.
    """
    table = read_table_file(path)
    if "latent" not in table.column_names:
        raise BadInput(f"{path} has no column 'latent' (found: {listed(table.column_names)})")
    cells = column(table, "latent")
    wrong = [repr(cell) for cell in cells if not (cell or "").isdecimal() or len(cell or "") > 9]
    wrong = wrong or [cell for cell in cells if cell and int(cell) >= n_latents]
    if wrong or not cells:
        found = f"{len(wrong):,} that are not ({listed(wrong)})" if cells else "none"
        raise BadInput(f"{path} must name latents from 0 to {n_latents - 1:,}; found {found}")
    return sorted({int(cell) for cell in cells if cell})


def choose_tested(
    values: npt.NDArray[np.float32], config: CompareConfig, only: list[int] | None
) -> tuple[Bools, dict[str, int]]:
    """Which latents are tested, and how many are left out, by the first reason that applies. Groups are not used.

    Parameters
    ----------
    values : shape (patients, latents)
    only : these latents; None: all

    Raises
    ------
    BadInput
        If none is left.
    """
    n_latents = values.shape[1]
    is_listed = np.ones(n_latents, bool) if only is None else np.isin(np.arange(n_latents), only)
    reasons = {
        "not_listed": ~is_listed,
        "equal_in_all": values.min(0) == values.max(0),
        "few_patients": (values > 0).sum(0) < config.min_patients,
        "low_mean": values.mean(0, dtype=np.float64) < config.min_mean,
    }
    is_tested, left_out = np.ones(n_latents, bool), {}
    for reason, applies in reasons.items():
        left_out[reason] = int((is_tested & applies).sum())
        is_tested &= ~applies
    if not is_tested.any():
        raise BadInput(
            f"none of {n_latents:,} latents is left to be tested ({describe_left_out(left_out, config)}); "
            f"ask for fewer patients or a smaller mean, or count barcodes at a smaller tau"
        )
    return is_tested, left_out


def differential(
    prepared: Prepared,
    config: CompareConfig,
    is_tested: Bools,
    *,
    progress: Progress = lambda done, total, state: None,
) -> tuple[pa.Table, dict[str, Any]]:
    """One row per latent, and what was done in plain values; the columns are those of docs/compare.md.

    Columns of latents that are not tested are null where they would come of a test: p, q, p_max_t, stability, ranks.

    Parameters
    ----------
    is_tested : (latents,), not all False (`choose_tested`)
    progress : permutations done, permutations in all
    """
    positive = [(prepared.groups.values[some] > 0).sum(0) for some in (prepared.groups.is_a, ~prepared.groups.is_a)]
    supported = is_supported(prepared.groups.values, prepared.draws)
    groups, described = _adjusted_description(prepared)
    columns = described | {
        "n_patients_a": positive[0],
        "n_patients_b": positive[1],
    }
    n_a, n_b = int(groups.is_a.sum()), int((~groups.is_a).sum())
    n_latents, tested = len(is_tested), np.flatnonzero(is_tested)
    values = groups.values[:, tested]
    test, crude_p, crude_difference = _tests(prepared, config, tested, columns["difference"], progress)
    q = false_discovery_control(test.p)
    difference = columns["difference"][tested]
    settings: dict[str, Any] = {"top": config.top, "seed": config.seed}
    stability = bootstrap_stability(values, groups.is_a, n_bootstraps=config.n_bootstraps, **settings)
    by_rank = stability_without_effect(values, groups.is_a, n_bootstraps=config.n_bootstraps, **settings)
    ranks = {"rank_a": ranks_of(difference), "rank_b": ranks_of(-difference)}
    place = np.fmin(ranks["rank_a"], ranks["rank_b"])
    no_effect = np.full(len(tested), np.nan)
    no_effect[~np.isnan(place)] = by_rank[place[~np.isnan(place)].astype(np.int64) - 1]
    is_explained = config.is_adjusted and config.within_label is None
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = (1 - columns["difference"] / crude_difference)[tested]
    explained[~np.isfinite(explained) | (not is_explained)] = np.nan
    found = {
        "p": test.p,
        "q": q,
        "p_max_t": test.p_max_t,
        "p_step_down": test.p_step_down,
        "p_crude": crude_p,
        "difference_crude": crude_difference[tested],
        "explained": explained,
        "stability": stability,
        "stability_no_effect": no_effect,
    }
    table = pa.table(
        {
            "latent": np.arange(n_latents),
            **{name: pa.array(numbers, from_pandas=True) for name, numbers in columns.items()},
            "is_tested": is_tested,
            **{name: _spread(numbers, tested, n_latents) for name, numbers in found.items()},
            **{name: _spread(numbers, tested, n_latents).cast(pa.int64()) for name, numbers in ranks.items()},
        }
    )
    return table, {
        "a": _about(groups, groups.is_a, config.a),
        "b": _about(groups, ~groups.is_a, config.b),
        "n_patients_without_disease": groups.n_without_disease,
        "n_patients_of_other_diseases": groups.n_of_others,
        "n_latents": n_latents,
        "n_tested": len(tested),
        "n_permutations": test.n_permutations,
        "is_exact": test.is_exact,
        "p_floor": test.floor,
        "seed": config.seed,
        "n_bootstraps": config.n_bootstraps,
        "n_p_at_most_0.05": int((test.p <= 0.05).sum()),
        "n_q_at_most_0.05": int((q <= 0.05).sum()),
        "n_p_max_t_at_most_0.05": int((test.p_max_t <= 0.05).sum()),
        "n_p_step_down_at_most_0.05": int((test.p_step_down <= 0.05).sum()),
        "n_p_crude_at_most_0.05": int((crude_p <= 0.05).sum()),
        "n_without_interval": int((is_tested & ~supported).sum()),
        "stability_no_effect": [round(float(share), 4) for share in by_rank[:5] if np.isfinite(share)],
        "n_higher": {"a": int((difference > 0).sum()), "b": int((difference < 0).sum())},
        "warnings": [*_floor_warnings(test, n_a, n_b), *_support_warnings(is_tested & ~supported)],
    }


def _tests(
    prepared: Prepared, config: CompareConfig, tested: npt.NDArray[np.int64], difference: Floats, progress: Progress
) -> tuple[PermutationTest, Floats, Floats]:
    """P-values of the tested latents; as they are without adjustments, p (tested,) and the difference (latents,)."""
    n_tests = len(prepared.draws) + (len(prepared.crude[1]) if config.is_adjusted else 0)
    n_run = 0

    def run(
        draw: npt.NDArray[np.float32], is_a: Bools, strata: npt.NDArray[np.int64] | None, covariates: Floats | None
    ) -> PermutationTest:
        nonlocal n_run

        def tell(done: int, total: int, state: str) -> None:
            progress(n_run * total + done, n_tests * total, state)

        shared: dict[str, Any] = {"n_permutations": config.n_permutations, "seed": config.seed, "progress": tell}
        chosen = np.ascontiguousarray(draw[:, tested])
        if covariates is None:
            test = permutation_test(chosen, is_a, strata=strata, **shared)
        else:
            test = residual_permutation_test(chosen, is_a, covariates, strata=strata, **shared)
        n_run += 1
        return test

    groups = prepared.groups
    test = combine_draws([run(draw, groups.is_a, prepared.strata, prepared.covariates) for draw in prepared.draws])
    if not config.is_adjusted:
        return test, test.p, difference
    whole, draws, is_a = prepared.crude
    crude = combine_draws([run(draw, is_a, None, None) for draw in draws])
    return test, crude.p, whole[is_a].mean(0, dtype=np.float64) - whole[~is_a].mean(0, dtype=np.float64)


def describe_groups(prepared: Prepared) -> dict[str, npt.NDArray[Any]]:
    """Means, effect sizes and limits, (latents,) each, adjusted for strata and covariates if there are any."""
    return _adjusted_description(prepared)[1]


def _adjusted_description(prepared: Prepared) -> tuple[TwoGroups, dict[str, npt.NDArray[Any]]]:
    """The groups with adjusted values, and what `describe_groups` returns."""
    groups, draws, inflation, counted = prepared.groups, prepared.draws, 1.0, None
    if prepared.strata is not None or prepared.covariates is not None:
        adjusted, inflation = adjustment(groups.is_a, prepared.strata, prepared.covariates)
        is_one = len(draws) == 1 and draws[0] is groups.values
        counted = (groups.values, prepared.draws)
        groups = replace(groups, values=adjusted(groups.values))
        draws = [groups.values] if is_one else [adjusted(draw) for draw in draws]
    return groups, _describe(groups, draws, inflation, counted)


def _describe(
    groups: TwoGroups,
    draws: list[npt.NDArray[np.float32]],
    inflation: float,
    counted: tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]] | None,
) -> dict[str, npt.NDArray[Any]]:
    """Means, effect sizes and intervals of every latent, tested or not."""
    chunks = []
    for first in range(0, groups.values.shape[1], _COLUMNS):
        some = slice(first, first + _COLUMNS)
        values, *drawn = (each[:, some].astype(np.float64) for each in (groups.values, *draws))
        before = None
        if counted is not None:
            whole, *of_draws = (each[:, some].astype(np.float64) for each in (counted[0], *counted[1]))
            before = whole, of_draws
        found = intervals(values, drawn, groups.is_a, inflation=inflation, counted=before)
        # rounding gives equal values a tiny variance, and an effect size divided by it would be huge
        equal = np.ones(values.shape[1], bool)
        for members in (groups.is_a, ~groups.is_a):
            low, high = values[members].min(0), values[members].max(0)
            equal &= high - low <= 1e-6 * np.abs(high) if inflation != 1 else high == low
        for name in ("hedges_g", "hedges_g_low", "hedges_g_high"):
            found[name][equal] = np.nan
        chunks.append({"mean_a": values[groups.is_a].mean(0), "mean_b": values[~groups.is_a].mean(0), **found})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def correlate(values: npt.NDArray[np.floating]) -> Floats:
    """Pearson correlation of every two patients over the latents; NaN where a patient's values are all equal.

    Parameters
    ----------
    values : shape (patients, latents)
    """
    n_patients, n_latents = values.shape
    varies = values.min(1) < values.max(1)
    mean = values.mean(1, dtype=np.float64, keepdims=True)
    products = np.zeros((n_patients, n_patients))
    for first in range(0, n_latents, _COLUMNS):
        centred = values[:, first : first + _COLUMNS] - mean
        products += centred @ centred.T
    length = np.sqrt(np.diagonal(products))
    correlation = np.full_like(products, np.nan)
    np.divide(products, np.outer(length, length), out=correlation, where=np.outer(varies, varies))
    return np.clip(correlation, -1, 1)


# ------------------------------------------------------------------------------------------------- tables


def _spread(numbers: Floats, tested: npt.NDArray[np.int64], n_latents: int) -> pa.Array:
    """A column of all latents from values of the tested ones; null for the others, and for NaN."""
    all_of_them = np.full(n_latents, np.nan)
    all_of_them[tested] = numbers
    return pa.array(all_of_them, from_pandas=True)


def _about(groups: TwoGroups, members: Bools, name: str) -> dict[str, Any]:
    n_images = groups.n_images[members]
    return {
        "name": name,
        "n_patients": int(members.sum()),
        "n_images": int(n_images.sum()),
        "images_per_patient": {
            "min": int(n_images.min()),
            "median": float(np.median(n_images)),
            "max": int(n_images.max()),
        },
    }


def _floor_warnings(test: PermutationTest, n_a: int, n_b: int) -> list[str]:
    """Warnings where so few patients, or permutations, allow no small p or q."""
    n_tested = len(test.p)
    if test.floor > 0.05:
        remedy = "more patients" if test.is_exact else "more --permutations"
        return [f"no p can be below {test.floor:.2g} with {n_a} against {n_b} patients: it takes {remedy} to say more"]
    n_needed = math.ceil(round(n_tested * test.floor / 0.05, 6))
    if n_needed == 1:
        return []
    n_permutations = math.ceil(n_tested / 0.05)
    # with fewer splits of the patients than that, each is taken once, and no p can be so small
    one_is_enough = not test.is_exact and math.comb(n_a + n_b, n_a) > n_permutations
    remedy = (f"--permutations {n_permutations}, or with " if one_is_enough else "") + "fewer tested (--min-patients)"
    return [
        f"q <= 0.05 takes {n_needed:,} latents at the smallest p that is possible ({test.floor:.2g}); a single one can "
        f"have it with {remedy}"
    ]


def _support_warnings(is_rare: Bools) -> list[str]:
    """A warning on latents without intervals."""
    if not is_rare.any():
        return []
    return [
        f"{int(is_rare.sum()):,} tested latents are above 0 in fewer than {SUPPORT} patients, or after thinning in "
        f"nearly none: too few for an interval of difference and g, which is left empty"
    ]


def _first(table: pa.Table, rank: str, n: int) -> list[int]:
    """The latents of a top list, in its order."""
    ranks = np.asarray(table[rank].to_pandas(), np.float64)
    order = np.argsort(ranks, kind="stable")  # NaN comes last
    return [int(latent) for latent in order[:n] if ranks[latent] <= n]


def _patient_table(groups: TwoGroups, latents: list[int]) -> pa.Table:
    """A row for every chosen latent and patient."""
    n_patients = len(groups.names)
    return pa.table(
        {
            "latent": np.repeat(np.array(latents, np.int64), n_patients),
            "patient": groups.names * len(latents),
            "disease": groups.diseases * len(latents),
            "group": ["a" if is_a else "b" for is_a in groups.is_a] * len(latents),
            "n_images": np.tile(groups.n_images, len(latents)),
            "value": groups.values[:, latents].T.ravel(),
        }
    )


def _correlation_table(groups: TwoGroups, correlation: Floats) -> pa.Table:
    """A row for every pair of patients, in the order of the figure."""
    n_patients = len(groups.names)
    return pa.table(
        {
            "patient": np.repeat(np.array(groups.names, object), n_patients).tolist(),
            "other": groups.names * n_patients,
            "correlation": pa.array(correlation.ravel(), from_pandas=True),
        }
    )
