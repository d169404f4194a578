"""Do the latents of one comparison differ in another cohort, too, and in the same direction? (`cyto compare replicate`)

Only the latents that the discovery found are tested in the replication's patients, one-sided in the discovery's
direction, with Holm's adjustment over these few. Everything else (which patients, which images, thinning, strata,
covariates) is as `cyto compare` does it (differential.py), with the discovery's settings.

The statistic of the one-sided test is that of Freedman and Lane (freedman_lane.py), with its sign:

    s*[c] = g' P R[c] / |P R[c] less its regression on strata and covariates|

p[c] = (1 + number of permutations with d s* >= d s) / (1 + permutations), d the sign of the discovery's difference.
How many latents agree in sign, and how well the effects correlate, is compared with permutations, too: latents move
together, so a binomial p would be far too small. There the difference of the groups is taken off first (the residuals
of the full model, ter Braak 1992): else latents that do differ would agree in most permutations, which are never quite
balanced. Twin: test_replicate.py, in plain loops.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import norm as normal
from scipy.stats import t as student

from cytosae.barcodes import IMAGE_COLUMNS
from stores.barcode_store import BarcodeStore, tau_text
from stores.errors import BadInput, SpecMismatch
from stores.files import canonical_json, parse_json
from stores.part_files import Arrays, Keep, KeptParts
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results, is_finished, kept_before
from stores.spec import COMPARISON, REPLICATION, check_choice
from stores.tables import listed
from stores.wording import counted

from .config import CompareConfig
from .differential import describe_groups
from .freedman_lane import residual_group
from .groups import Prepared, TwoGroups, choose_groups, prepare, read_patients, sae_of
from .permutation import PermutationTest, combine_draws
from .replication_figures import plot_replication
from .replication_report import Replication
from .report import Comparison

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
RULES = ("q", "p_max_t", "p_step_down")
_TOGETHER = 256  # permutations that are computed together
_SLACK = 1e-6  # relative tolerance of ties: values are of float32
_LEAST = 1e-9  # of a statistic, at most 1: a smaller one is rounding
_METHOD = 3  # version of the statistics: results of older versions are not taken for these


@dataclass(frozen=True, kw_only=True)
class ReplicateConfig:
    """Which latents of a discovery are tested, and how.

    Raises
    ------
    BadInput
        If there is no such rule, or a number is out of range.
    """

    rule: str = "q"  # which column of the discovery decides
    most: float = 0.05  # latents with at most this are tested
    top: int | None = None  # instead: the first of both top lists, whatever their p
    a: str | None = None  # what the groups are called in the replication; None: as in the discovery
    b: str | None = None
    n_permutations: int = 10_000
    n_bootstraps: int = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        if not 0 < self.most <= 1:
            raise BadInput(f"most must lie above 0 and be at most 1; found {self.most!r}")
        for name, least in {"n_permutations": 1, "n_bootstraps": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name} must be at least {least}; found {getattr(self, name)}")
        if self.top is not None and self.top < 1:
            raise BadInput(f"top must be at least 1; found {self.top}")
        object.__setattr__(self, "most", float(self.most))


def replicate(
    discovery: Path | str,
    barcodes: Path | str,
    out: Path | str,
    config: ReplicateConfig | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total, state: None,
) -> Replication:
    """Test the latents of a comparison in the barcodes of another cohort; a table and a figure in the folder `out`.

    The same call continues an interrupted one.
    Memory: as `compare`, of the patients that are compared.

    Parameters
    ----------
    discovery : a folder of `compare`
    barcodes : of the other cohort, by the same SAE and at the same tau
    say : called with the plan, its time and memory, before anything is read

    Raises
    ------
    BadInput
        If no latent was found in the discovery, a disease does not exist here, or the cohort is the discovery's own.
    SpecMismatch
        If SAE, normalisation, token set or tau are not those of the discovery, or `out` holds something else.
    """
    config, discovery, barcodes, out = config or ReplicateConfig(), Path(discovery), Path(barcodes), Path(out)
    found = Comparison(out=discovery, results=ResultStore(discovery, COMPARISON), was_complete=True)
    store = BarcodeStore(barcodes)
    _require_another_cohort(found, store)
    asked = replace(
        found.config, a=config.a or found.config.a, b=config.b or found.config.b, n_permutations=config.n_permutations,
        n_bootstraps=config.n_bootstraps, seed=config.seed, min_patients=0, min_mean=0.0,
    )  # fmt: skip
    chosen = choose_latents(found, config)
    spec = {
        "discovery": found.results.header.identity,
        "replication": store.header.identity,
        **asdict(config),
        "method": _METHOD,
    }
    packages = ("numpy", "scipy", "numba", "anndata")
    begin = partial(begin_results, out, REPLICATION, spec, overwrite=overwrite, inputs=[discovery, barcodes])
    if not overwrite and is_finished(out, REPLICATION, spec) and begin(packages=packages).is_complete:
        return _read(out)
    say(_plan(len(store.read_obs("patient", asked.tau)), int(found.summary["n_latents"]), len(chosen), config))
    patients = read_patients(store, asked.tau)
    n_latents = int(found.summary["n_latents"])
    if patients.n_vars != n_latents:
        raise SpecMismatch(f"{barcodes} has {patients.n_vars:,} latents, {discovery} {n_latents:,}: another SAE")
    prepared = _kept_patients(kept_before(out, REPLICATION, spec))
    if prepared is None:
        images = store.read_obs("image", asked.tau, needed=IMAGE_COLUMNS)
        latents = np.array([row["latent"] for row in chosen])
        prepared = _columns(prepare(store, images, choose_groups(patients, asked.a, asked.b), asked), latents)
    writer = begin(packages=packages)
    writer.watch(store.header, found.results.header)
    if writer.is_complete:
        return _read(out)
    parts = writer.parts
    _keep_patients(parts, prepared)
    rows, summary = _replicate(prepared, asked, chosen, config, parts, progress)
    summary |= {
        "names": {"a": asked.a, "b": asked.b},
        "discovery": discovery.name,
        "n_of_discovery": {group: int(found.summary[group]["n_patients"]) for group in ("a", "b")},
        "warnings": [*_warnings(found, store, prepared), *prepared.notes],
    }
    table = pa.Table.from_pylist(rows)
    writer.write_table("replication", table)
    plot_replication(rows, summary, writer.root / "replication")
    writer.finish(summary)
    return Replication(out=out, rows=rows, summary=summary)


def _read(out: Path) -> Replication:
    store = ResultStore(out, REPLICATION)
    summary = dict(store.header.summary or {})
    return Replication(out=out, rows=store.table("replication").to_pylist(), summary=summary, was_complete=True)


def choose_latents(found: Comparison, config: ReplicateConfig) -> list[dict[str, Any]]:
    """Rows of the discovery's latents, those with the smallest p first.

    Raises
    ------
    BadInput
        If there is none.
    """
    table = found.results.table("differential")
    if config.rule not in table.column_names:
        raise BadInput(f"{found.out} is of an older cyto and has no {config.rule}; choose another --rule")
    rows = [row for row in table.to_pylist() if row["is_tested"] and row["difference"]]
    if config.top is not None:
        kept = [row for row in rows if any((row[f"rank_{group}"] or config.top + 1) <= config.top for group in "ab")]
    else:
        kept = [row for row in rows if row[config.rule] <= config.most]
    if not kept:
        least = min((row[config.rule] for row in rows), default=1.0)
        raise BadInput(
            f"{found.out} has no latent with {config.rule} of {config.most:g} or less (the smallest is {least:.3g}): "
            f"nothing to replicate; --top 20 takes the first of both top lists, whatever their p"
        )
    return sorted(kept, key=lambda row: (row[config.rule], row["p"], -abs(row["difference"]), row["latent"]))


def _plan(n_patients: int, n_latents: int, n_chosen: int, config: ReplicateConfig) -> str:
    """In words what is computed, how long it takes and how much memory; rates and libraries as measured once."""
    seconds = 3 + n_patients * (n_latents / 2e7 + n_chosen * (config.n_permutations / 2e8 + config.n_bootstraps / 1e7))
    n_bytes = 0.7e9 + 24 * n_patients * n_latents
    return (
        f"plan: {counted(n_chosen, 'latent')} of the discovery in {counted(n_patients, 'patient')}, "
        f"{config.n_permutations:,} permutations; time: about {round(seconds):,} s, longer if images are drawn; "
        f"memory: at most about {n_bytes / 1e9:.1f} GB"
    )


def _require_another_cohort(found: Comparison, store: BarcodeStore) -> None:
    if found.results.header.spec["barcodes"] == store.header.identity:
        raise BadInput(
            f"{store.root} are the barcodes that {found.out} was found in: that is no replication. Give the barcodes "
            f"of other patients"
        )
    stated, held = found.summary.get("sae_sha256"), sae_of(store)
    if stated and held and stated != held:
        raise SpecMismatch(
            f"{found.out} is of another SAE (sha256 {', '.join(stated):.12}…) than {store.root} "
            f"({', '.join(held):.12}…): equal numbers are not the same latents; encode the cohort with the "
            f"discovery's SAE, or match the two with cyto concept match"
        )
    if found.summary.get("normalize", "images") != store.header.spec["normalize"]:
        raise SpecMismatch(
            f"{store.root} is normalised as {store.header.spec['normalize']}, {found.out} as "
            f"{found.summary.get('normalize', 'images')}; count the barcodes alike"
        )
    held_set = store.header.spec.get("token_set", "all")
    if (stated_set := found.summary.get("token_set", held_set)) != held_set:
        raise SpecMismatch(
            f"{store.root} counts {held_set} tokens, {found.out} is of {stated_set}; count the cohort again with "
            f"cyto barcode --token-set {stated_set}"
        )
    if (tau := found.summary.get("tau")) is not None and tau not in store.taus:
        raise SpecMismatch(
            f"{store.root} is counted at tau {', '.join(map(tau_text, store.taus))}, {found.out} at {tau_text(tau)}; "
            f"count the cohort again with cyto barcode --tau {tau_text(tau)}"
        )


# ------------------------------------------------------------------------------------------------- what is kept


def _columns(prepared: Prepared, latents: npt.NDArray[np.int64]) -> Prepared:
    """The same with these latents alone."""
    groups = prepared.groups
    values = groups.values[:, latents]
    return replace(
        prepared,
        groups=replace(groups, values=values),
        draws=[values if draw is groups.values else draw[:, latents] for draw in prepared.draws],
        crude=(values, [values], groups.is_a),  # plays no part here
    )


_TEXTS = ("names", "ids", "diseases", "datasets", "n_without_disease", "n_of_others")


def _keep_patients(parts: KeptParts, prepared: Prepared) -> None:
    """Keep what was read of the patients."""
    groups = prepared.groups
    said = {name: getattr(groups, name) for name in _TEXTS} | {"notes": [*prepared.notes]}
    further = {name: getattr(prepared, name) for name in ("strata", "covariates")}
    parts.write(
        "patients",
        {
            "values": groups.values,
            "draws": np.stack(prepared.draws),
            "n_images": groups.n_images,
            "is_a": groups.is_a.astype(np.uint8),
            "said": np.frombuffer(canonical_json(said), np.uint8),
            **{name: values for name, values in further.items() if values is not None},
        },
    )


def _kept_patients(parts: KeptParts) -> Prepared | None:
    """What an interrupted command had read of them, as `_columns` gives it; None if nothing."""
    kept = parts.read("patients")
    if kept is None:
        return None
    said = parse_json(kept["said"].tobytes())
    values, is_a = kept["values"], kept["is_a"].astype(bool)
    same = len(kept["draws"]) == 1 and np.array_equal(kept["draws"][0], values)
    return Prepared(
        groups=TwoGroups(values=values, n_images=kept["n_images"], is_a=is_a, **{name: said[name] for name in _TEXTS}),
        draws=[values] if same else [*kept["draws"]],
        crude=(values, [values], is_a),
        strata=kept.get("strata"),
        covariates=kept.get("covariates"),
        notes=tuple(said["notes"]),
    )


# ------------------------------------------------------------------------------------------------- the numbers


def _replicate(
    prepared: Prepared,
    asked: CompareConfig,
    chosen: list[dict[str, Any]],
    config: ReplicateConfig,
    keep: Keep,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row for each chosen latent, the summary); `prepared` holds the chosen latents alone."""
    latents = np.array([row["latent"] for row in chosen])
    groups = prepared.groups
    described = describe_groups(prepared)
    direction = np.sign([row["difference"] for row in chosen])
    g_before = np.array([np.nan if row["hedges_g"] is None else row["hedges_g"] for row in chosen], np.float64)
    g_now = described["hedges_g"]
    both = np.isfinite(g_before) & np.isfinite(g_now)
    nulls, overall = [], []
    for number, draw in enumerate(prepared.draws):

        def tell(done: int, total: int, state: str, number: int = number) -> None:
            progress(number * total + done, len(prepared.draws) * total, state)

        def compute(draw: npt.NDArray[np.float32] = draw, tell: Progress = tell) -> Arrays:
            test, observed, _ = signed_test(
                draw,
                groups.is_a,
                direction,
                n_permutations=config.n_permutations,
                seed=config.seed,
                strata=prepared.strata,
                covariates=prepared.covariates,
                progress=tell,
            )
            permuted = _without_difference(draw, prepared, direction, config)
            together = joint_test(observed, permuted, direction, g_before[both], both, floor=test.floor)
            found = {"p": test.p, "p_mid": test.p_mid, "floor": np.array([test.floor])}
            return found | {"together_p": together.p, "together_p_mid": together.p_mid}

        kept = keep(f"draw_{number}", compute)
        floor = float(kept["floor"][0])
        nulls.append(_one_sided(kept["p"], kept["p_mid"], floor, config.n_permutations))
        overall.append(_one_sided(kept["together_p"], kept["together_p_mid"], floor, config.n_permutations))
    p_same_sign, p_correlation = combine_draws(overall).p.tolist()
    p = combine_draws(nulls).p
    p = np.where(np.isfinite(described["difference"]) & (groups.values.max(0) > groups.values.min(0)), p, 1.0)
    holm = holm_adjusted(p)
    agrees = np.sign(described["difference"]) == direction
    bootstraps = keep("bootstraps", lambda: {"g": bootstrap_effects(prepared, config)})["g"]
    rows = [
        {
            "latent": int(latent),
            **{f"discovery_{name}": row.get(name) for name in _TAKEN},
            **{f"replication_{name}": _plain(described[name][at]) for name in _COMPUTED},
            "same_sign": bool(agrees[at]),
            "p_one_sided": float(p[at]),
            "p_holm": float(holm[at]),
            "is_replicated": bool(holm[at] <= 0.05),
            "ratio": _plain(g_now[at] / g_before[at]) if both[at] and g_before[at] else None,
        }
        for at, (latent, row) in enumerate(zip(latents, chosen, strict=True))
    ]
    n_agree = int(agrees.sum())
    correlation = _correlation(g_before[both], g_now[both])
    slope = _slope(g_before[both], g_now[both])
    drawn = bootstraps[:, both]
    slopes = np.array([_slope(g_before[both], each) for each in drawn])
    correlations = np.array([_correlation(g_before[both], each) for each in drawn])
    n_smaller = int(min(groups.is_a.sum(), (~groups.is_a).sum()))
    of_correlation = correlation_limits(correlation, correlations, n_smaller)
    of_ratio = ratio_limits(slope, slopes, n_smaller)
    return rows, {
        "n_latents": len(latents),
        "rule": f"the first {config.top} of both lists" if config.top else f"{config.rule} <= {config.most:g}",
        "n_patients": {"a": int(groups.is_a.sum()), "b": int((~groups.is_a).sum())},
        "n_permutations": config.n_permutations,
        "p_floor": nulls[0].floor,
        "n_same_sign": n_agree,
        "p_same_sign": p_same_sign,
        "n_p_at_most_0.05": int((p <= 0.05).sum()),
        "n_replicated": int((holm <= 0.05).sum()),
        "correlation": _plain(correlation),
        "correlation_low": of_correlation[0],
        "correlation_high": of_correlation[1],
        "p_correlation": p_correlation if np.isfinite(correlation) else None,
        "ratio": _plain(slope),
        "ratio_low": of_ratio[0],
        "ratio_high": of_ratio[1],
        "n_without_effect_size": int((~both).sum()),
    }


def joint_test(
    observed: Floats, permuted: Floats, direction: Floats, before: Floats, both: Bools, *, floor: float
) -> PermutationTest:
    """One-sided p of what all latents say together: how many have the discovery's sign; the correlation of effects.

    Parameters
    ----------
    observed, permuted : (latents,), (permutations, latents) of `signed_test`; the permuted where nothing differs
    direction : (latents,) 1 or -1, by which these are multiplied
    before : the discovery's effects of `both`, with their signs, as in the correlation that is shown
    both : (latents,) which have an effect in both cohorts
    floor : luck must not give a p that no way to share out the patients has
    """

    def figures(rows: Floats) -> Floats:
        return np.column_stack([(rows > 0).sum(1), correlations_with(before, (rows * direction)[:, both])])

    (seen,), null = figures(observed[None]), figures(permuted)
    seen = np.where(np.isnan(seen), -np.inf, seen)  # says nothing: p is 1
    null = np.where(np.isnan(null), -np.inf, null)
    as_far, farther = (null >= seen).sum(0), (null > seen).sum(0)
    p, p_mid = (np.maximum((1 + count) / (1 + len(null)), floor) for count in (as_far, (as_far + farther) / 2))
    return _one_sided(p, p_mid, floor, len(null))


def correlations_with(values: Floats, rows: Floats) -> Floats:
    """(n,) correlation of `values` (k,) with each of the rows (n, k), all finite; NaN where one does not vary."""
    if len(values) < 3 or np.ptp(values) == 0:
        return np.full(len(rows), np.nan)
    one, others = values - values.mean(), rows - rows.mean(1, keepdims=True)
    varies = np.ptp(rows, axis=1) > 0
    lengths = np.linalg.norm(one) * np.where(varies, np.linalg.norm(others, axis=1), 1)
    return np.where(varies, others @ one / lengths, np.nan)


def _without_difference(
    draw: npt.NDArray[np.float32], prepared: Prepared, direction: Floats, config: ReplicateConfig
) -> Floats:
    """(permutations, latents) statistics of `signed_test` when the difference of the groups is taken off before."""
    values, is_a, strata = draw.astype(np.float64), prepared.groups.is_a, prepared.strata
    strata = np.zeros(len(is_a), np.int64) if strata is None else strata
    covariates = np.zeros((len(is_a), 0)) if prepared.covariates is None else prepared.covariates
    group, _ = residual_group(is_a, covariates, strata)
    values -= np.outer(group, group @ values / (group @ group))
    found = signed_test(
        *(values, is_a, direction),
        n_permutations=config.n_permutations,
        seed=config.seed,
        strata=strata,
        covariates=covariates,
    )[2]
    return np.where(np.abs(found) < _LEAST, 0, found)  # groups as they are differ by rounding alone


_TAKEN = ("difference", "hedges_g", "hedges_g_low", "hedges_g_high", "auc", "p", "q", "p_max_t")
_COMPUTED = (
    *("mean_a", "mean_b", "difference", "difference_low", "difference_high"),
    *("hedges_g", "hedges_g_low", "hedges_g_high", "auc"),
)


def signed_test(
    values: npt.NDArray[np.floating],
    is_a: Bools,
    direction: Floats,
    *,
    n_permutations: int,
    seed: int,
    strata: npt.NDArray[np.int64] | None = None,
    covariates: Floats | None = None,
    progress: Progress = lambda done, total, state: None,
) -> tuple[PermutationTest, Floats, Floats]:
    """One-sided p-values in given directions; the observed statistics (columns,), and the permuted ones.

    Those are (permutations, columns). The statistics are multiplied by the direction: above 0 means the same direction.

    Parameters
    ----------
    values : (patients, columns)
    direction : (columns,) 1 or -1
    strata, covariates : (patients,), (patients, k)

    Raises
    ------
    BadInput
        If strata and covariates determine the groups.
    """
    n = len(is_a)
    strata = np.zeros(n, np.int64) if strata is None else strata
    group, base = residual_group(is_a, np.zeros((n, 0)) if covariates is None else covariates, strata)
    members = np.eye(strata.max() + 1)[strata]
    outside = np.column_stack([members / np.sqrt(members.sum(0)), base])
    residuals = values.astype(np.float64)
    residuals = residuals - outside @ (outside.T @ residuals)
    length = np.sqrt((residuals**2).sum(0))
    varies = length > 1e-6 * np.maximum(1e-300, np.abs(values).max(0, initial=0))
    residuals = np.where(varies, residuals / np.where(varies, length, 1), 0) * direction
    weights = np.vstack([group / np.linalg.norm(group), base.T])

    def statistics(permuted: Floats) -> Floats:
        """(permutations, columns) from weights (permutations, 1 + k, units)."""
        products = (permuted.reshape(-1, n) @ residuals).reshape(*permuted.shape[:2], -1)
        left = np.maximum(1 - (products[:, 1:] ** 2).sum(1), 1e-9)
        return products[:, 0] / np.sqrt(left)

    observed = statistics(weights[None])[0]
    rng = np.random.default_rng([seed, 5])
    rows_of = [np.flatnonzero(strata == name) for name in np.unique(strata)]
    found = np.empty((n_permutations, values.shape[1]))
    for done in range(0, n_permutations, _TOGETHER):
        progress(done, n_permutations, "")
        places = np.tile(np.arange(n), (min(_TOGETHER, n_permutations - done), 1))
        for rows in rows_of:
            places[:, rows] = rng.permuted(places[:, rows], axis=1)
        found[done : done + len(places)] = statistics(weights[:, places].transpose(1, 0, 2))
    progress(n_permutations, n_permutations, "")
    slack = _SLACK * np.maximum(np.abs(observed), 1e-3)
    as_far, farther = (found >= observed - slack).sum(0), (found > observed + slack).sum(0)
    # drawn with replacement: with few ways to share out the patients, luck must not give a p that no way has
    n_ways = math.prod(math.comb(len(rows), int(is_a[rows].sum())) for rows in rows_of)
    floor = max(1 / (1 + n_permutations), 0.0 if base.shape[1] else 1 / n_ways)
    p = np.maximum((1 + as_far) / (1 + n_permutations), floor)
    p_mid = np.maximum((1 + (as_far + farther) / 2) / (1 + n_permutations), floor)
    return _one_sided(p, p_mid, floor, n_permutations), observed, found


def _one_sided(p: Floats, p_mid: Floats, floor: float, n_permutations: int) -> PermutationTest:
    """Nothing here is adjusted by the largest statistic."""
    return PermutationTest(
        p=p, p_mid=p_mid, p_max_t=p, p_step_down=p, n_permutations=n_permutations, is_exact=False, floor=floor
    )


def holm_adjusted(p: Floats) -> Floats:
    """Holm's step-down adjustment: valid however the tests depend on each other.

    p : (tests,)
    """
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(np.minimum(1, p[order] * (len(p) - np.arange(len(p)))))
    found = np.empty(len(p))
    found[order] = steps
    return found


def bootstrap_effects(prepared: Prepared, config: ReplicateConfig) -> Floats:
    """(bootstraps, latents) Hedges' g of patients drawn anew within each group; NaN where nothing varies."""
    rng = np.random.default_rng([config.seed, 6])
    is_a, draws = prepared.groups.is_a, prepared.draws
    found = np.full((config.n_bootstraps, draws[0].shape[1]), np.nan)
    for number in range(config.n_bootstraps):
        places = np.concatenate([rng.choice(rows, len(rows)) for rows in (np.flatnonzero(is_a), np.flatnonzero(~is_a))])
        found[number] = effect_sizes(draws[number % len(draws)][places].astype(np.float64), int(is_a.sum()))
    return found


def effect_sizes(values: Floats, n_a: int) -> Floats:
    """(columns,) Hedges' g of the first `n_a` rows against the others; NaN where nothing varies."""
    one, other = values[:n_a], values[n_a:]
    n = len(values)
    pooled = ((one - one.mean(0)) ** 2).sum(0) + ((other - other.mean(0)) ** 2).sum(0)
    sd = np.sqrt(pooled / (n - 2))
    varies = sd > _SLACK * np.abs(values).max(0)  # not by rounding alone, as where one patient is drawn again and again
    g = np.where(varies, (one.mean(0) - other.mean(0)) / np.where(varies, sd, 1), np.nan)
    return np.asarray(g * (1 - 3 / (4 * (n - 2) - 1)), np.float64)


def _slope(before: Floats, now: Floats) -> float:
    """Of the replication's effects on the discovery's, through 0: 1 if they are as large, 0 if there are none."""
    some = np.isfinite(before) & np.isfinite(now)
    squares = float((before[some] ** 2).sum())
    return float((before[some] * now[some]).sum()) / squares if squares > 0 else float("nan")


def _correlation(before: Floats, now: Floats) -> float:
    some = np.isfinite(before) & np.isfinite(now)
    one, other = before[some], now[some]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def correlation_limits(observed: float, drawn: Floats, n_patients: int) -> tuple[float | None, float | None]:
    """95% limits of the correlation that other cohorts of this size would have; None without draws.

    Effects of patients drawn anew have the noise of the cohort a second time, so their correlations lie lower than the
    observed one, and quantiles of them may not even hold it. Their spread counts, about the observed one, after
    Fisher's transformation, widened for few patients (Student's t; Hesterberg 2015, doi 10.1080/00031305.2015.1089789).
    In simulations it holds the mean over cohorts in 89% to 93% (docs/benchmarks.md). The correlation without the noise
    of either cohort is larger.

    observed, drawn : correlations, drawn (bootstraps,)
    n_patients : of the smaller group
    """
    some = drawn[np.isfinite(drawn)]
    if not np.isfinite(observed) or not len(some) or len(some) < len(drawn) / 2 or n_patients < 2:
        return None, None
    z, z_drawn = (np.arctanh(np.clip(each, -1 + 1e-12, 1 - 1e-12)) for each in (observed, some))
    low, high = np.tanh(z + _wider(n_patients) * (np.quantile(z_drawn, [0.025, 0.975]) - z_drawn.mean()))
    return float(low), float(high)


def ratio_limits(observed: float, drawn: Floats, n_patients: int) -> tuple[float | None, float | None]:
    """95% limits of the slope; None without draws.

    A patient who is drawn twice makes the spread smaller and g larger, so slopes of draws lie further from 0 than the
    observed one, and their quantiles may not even hold it. Their distances from their median count, about the observed
    slope, widened for few patients as those of the correlation (simulated coverage: docs/log.md).

    observed, drawn, n_patients : as in `correlation_limits`
    """
    some = drawn[np.isfinite(drawn)]
    if not np.isfinite(observed) or not len(some) or len(some) < len(drawn) / 2 or n_patients < 2:
        return None, None
    low, high = observed + _wider(n_patients) * (np.quantile(some, [0.025, 0.975]) - np.median(some))
    return float(low), float(high)


def _wider(n_patients: int) -> float:
    """Factor on distances of a bootstrap of so few patients."""
    return float(student.ppf(0.975, n_patients - 1) / normal.ppf(0.975) * (n_patients / (n_patients - 1)) ** 0.5)


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _warnings(found: Comparison, store: BarcodeStore, prepared: Prepared) -> Sequence[str]:
    said = []
    if not found.summary.get("sae_sha256"):
        said.append(
            "the discovery is of an older cyto and does not say of which SAE it is; equal numbers are taken for the "
            "same latents"
        )
    theirs = {*found.results.table("patients")["patient"].to_pylist()}
    shared = sorted(theirs & {*prepared.groups.names})
    if shared:
        said.append(
            f"{len(shared):,} patients have names of the discovery's patients ({listed(shared)}); if these are the "
            f"same people, this is no replication"
        )
    return said
