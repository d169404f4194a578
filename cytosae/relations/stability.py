"""Do several SAEs find the same concepts? Their decoder rows matched one to one by cosine (`cyto concept stability`).

The matching has the largest sum of cosines of all one-to-one matchings, and proves it: dual prices u and v with
u[i] + v[j] >= cosine for *every* pair bound every matching by their sum. It is found among the pairs of nearest rows;
then all products are computed once more, chunk by chunk, and pairs that break the bound are added, until there are
none.
So no S x S matrix is ever held. A pair with a cosine of 0 or less is no match.

Beside each pair of SAEs stands what chance gives, matched in the same way, and of the three the largest 99th percentile
counts (`chance`):

- `directions`: Gaussian rows with the mean and the covariance of each decoder. Too weak by itself: tokens lie in
  clusters, which mean and covariance do not describe, and decoders of nothing but random tokens have half their rows
  above it.
- `within a`, `within b`: each decoder against itself, no row with itself: two different latents of one SAE, so all the
  geometry of the rows stays. If the rows of two decoders are draws from one source, they are as near to each other as
  the rows of one are among themselves. Too weak by itself for a decoder with rows far from each other (an
  orthonormal one).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.sae import Decoder, pair_cosines, read_decoder, require_comparable
from stores.activation_store import one_or_more
from stores.concept_store import MEANINGFUL, threshold_warning
from stores.errors import BadInput, SpecMismatch
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import CONCEPTS, STABILITY
from stores.tables import listed

from .assignment import assign
from .figures import plot_stability
from .nearest_cosine import nearest
from .report import StabilityResult

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
TOLERANCE = 1e-6  # of a bound, above the error of a float32 product of unit rows
THRESHOLDS = (0.7, 0.9)
_NEAREST = 16  # candidates of a row to begin with, and what is added to it in a round
_ROUNDS = 20
_SAME_NUMBER = 10  # pairs matched under one number; by chance their number is Poisson of mean 1 (10: p 1e-7)


@dataclass(frozen=True, eq=False)
class Matching:
    """Rows of a and b, one to one."""

    partner: Ints  # (n_a,) row of b; -1: none
    cosine: Floats  # (n_a,) with the partner; 0 without
    best_of_a: Floats  # (n_a,) the largest cosine with any row of b
    best_of_b: Floats  # (n_b,)
    bound: float  # no matching has a larger sum of cosines

    @property
    def gap(self) -> float:
        """How far the sum of cosines may be from the largest there is; about TOLERANCE per row when it is proven."""
        return max(0.0, self.bound - float(self.cosine.sum()))

    @property
    def is_optimal(self) -> bool:
        """The sum of cosines is the largest there is, up to TOLERANCE per row."""
        return self.gap <= TOLERANCE * max(1, len(self.best_of_a), len(self.best_of_b))


def write_stability(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    concepts: Path | str | Sequence[Path | str] = (),
    min_mean_activation: float = MEANINGFUL,
    seed: int = 0,
    assume_compatible: bool = False,
    allow_same_seed: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> StabilityResult:
    """Match every two of the SAEs; matches.parquet, stability.parquet, pairs.parquet and a figure in the folder `out`.

    Parameters
    ----------
    concepts : folders of `cyto concept stats`, one for each SAE, or none; then only latents count whose mean
        activation is at least `min_mean_activation` in one of the folder's datasets
    seed : of what chance gives
    assume_compatible : take imported SAEs, which do not say what they were trained on
    allow_same_seed : compare SAEs of one seed nevertheless, with a warning

    Raises
    ------
    BadInput
        With fewer than two SAEs, one given twice, or fewer than one latent to compare in one of them; if two were
        trained from one seed (and not `allow_same_seed`): they begin with equal weights.
    SpecMismatch
        If the SAEs were trained on different kinds of tokens, or concepts belong to none of them.
    """
    saes, out = [Path(run) for run in one_or_more(runs)], Path(out)
    of_concepts = [Path(folder) for folder in one_or_more(concepts)]
    decoders = [read_decoder(sae) for sae in saes]
    if len(decoders) < 2:
        raise BadInput(f"stability needs two SAEs or more; found {len(decoders)}")
    _refuse_twice(decoders)
    if not allow_same_seed:
        _refuse_same_seed(decoders)
    pairs_of = list(combinations(range(len(decoders)), 2))
    unknown: set[str] = set()
    for a, b in pairs_of:
        unknown.update(require_comparable(decoders[a], decoders[b], assume_compatible=assume_compatible))
    of_sae = _concepts_of(decoders, of_concepts)
    chosen = [_chosen(decoder, of_sae.get(number), min_mean_activation) for number, decoder in enumerate(decoders)]
    spec = {
        "saes": [{"sae_sha256": each.sae_sha256, "n_latents": each.n_latents} for each in decoders],
        "concepts": [store.header.identity for _, store in sorted(of_sae.items())],
        "min_mean_activation": float(min_mean_activation) if of_sae else None,
        "assumed_equal": sorted(unknown),
        "seed": seed,
        "chance": "directions, within",
    }
    writer = begin_results(
        out, STABILITY, spec, overwrite=overwrite, inputs=[*saes, *of_concepts], packages=("numpy", "scipy", "numba")
    )
    writer.watch(*(decoder.header for decoder in decoders), *(store.header for store in of_sae.values()))
    scale = {
        threshold_warning(
            store.header.spec["latents_spec"], min_mean_activation, "choose another --min-mean-activation"
        )
        for store in of_sae.values()
    }
    scale_warnings = sorted(warning for warning in scale if warning is not None)
    n_without = [int((~each.has_direction).sum()) for each in decoders]
    was_complete = writer.is_complete
    if was_complete:
        rows = ResultStore(out, STABILITY).table("pairs").to_pylist()
    else:
        matches, rows, null_cosines = _match_all(decoders, chosen, pairs_of, seed, progress)
        writer.write_table("pairs", pa.Table.from_pylist(rows))
        writer.write_table("matches", _match_table(pairs_of, matches, chosen))
        writer.write_table("stability", _latent_table(decoders, pairs_of, matches, chosen))
        plot_stability([each.cosine for each in matches], null_cosines, writer.root / "stability")
        writer.finish({"saes": [sae.name for sae in saes], "n_without_direction": n_without})
    return StabilityResult(
        out=out,
        saes=tuple(saes),
        pairs=rows,
        n_without_direction=n_without,
        was_complete=was_complete,
        warnings=(*scale_warnings, *_warnings(saes, rows)),
    )


def _match_all(
    decoders: Sequence[Decoder],
    chosen: Sequence[Ints],
    pairs_of: Sequence[tuple[int, int]],
    seed: int,
    progress: Progress,
) -> tuple[list[Matching], list[dict[str, Any]], list[Floats]]:
    """Of every two SAEs: their matching, what is said of it, and the cosines of the null that counts.

    chosen : the latents of each SAE that are compared
    """
    matches, rows, null_cosines = [], [], []
    passes = _Passes(progress)
    within: dict[tuple[int, int], Floats] = {}  # by SAE and number of rows matched
    for a, b in pairs_of:
        directions = [decoders[each].rows[chosen[each]] for each in (a, b)]
        passes.state = f"SAE {a} and {b}"
        matches.append(match_directions(*directions, progress=passes))
        n_rows = min(len(each) for each in directions)
        for number, rows_of in zip((a, b), directions, strict=True):
            if (number, n_rows) not in within:
                passes.state = f"SAE {number} within itself"
                rng = np.random.default_rng((seed, number, n_rows))
                within[number, n_rows] = match_within(rows_of, n_rows, rng, progress=passes)
        passes.state = f"SAE {a} and {b}, random directions"
        rng = np.random.default_rng((seed, a, b))
        drawn = [draw_like(each, rng) for each in directions]
        nulls = {
            "directions": match_directions(*drawn, progress=passes).cosine,
            "within a": within[a, n_rows],
            "within b": within[b, n_rows],
        }
        described = _describe(matches[-1], nulls)
        null_cosines.append(nulls[described["chance"]])
        partner = matches[-1].partner
        is_same = (chosen[a] == chosen[b][partner]) & (partner >= 0)
        beginning = {
            "seed_a": decoders[a].seed,
            "seed_b": decoders[b].seed,
            "n_same_number": int(is_same.sum()),
        }
        rows.append({"sae_a": a, "sae_b": b, **described, **beginning})
    return matches, rows, null_cosines


class _Passes:
    """Progress in chunks of cosines, over all passes so far; the number of passes is not known before."""

    def __init__(self, progress: Progress) -> None:
        self.state = ""
        self._progress, self._n_before = progress, 0

    def __call__(self, done: int, total: int, state: str) -> None:
        self._progress(self._n_before + done, self._n_before + total, self.state)
        if done == total:
            self._n_before += total


def match_directions(
    a: npt.NDArray[np.float32],
    b: npt.NDArray[np.float32],
    *,
    n_candidates: int = _NEAREST,
    skip: Ints | None = None,
    progress: Progress = lambda done, total, state: None,
) -> Matching:
    """The one-to-one matching of rows of norm 1, (n_a, D) and (n_b, D), with the largest sum of cosines.

    Memory: some `n_candidates` pairs per row, and a chunk of products. Equally good matchings exist where rows are
    equal; which of them is found is not promised.

    skip : (n_a,): a row of b that this row of a may not be matched with
    """
    of_a, of_b = nearest(a, b, max(1, min(n_candidates, len(a), len(b))), skip=skip, progress=progress)
    best_of_a, best_of_b = _best(a, b, of_a.index[:, 0]), _best(b, a, of_b.index[:, 0])
    pairs = np.unique(np.concatenate([_pairs(of_a.index, len(b)), _pairs(of_b.index, len(b), turned=True)]))
    weights = pair_cosines(a, b, *np.divmod(pairs, len(b)))
    for _ in range(_ROUNDS):
        found = assign(*np.divmod(pairs, len(b)), weights, len(a), len(b))
        over, _ = nearest(a, b, of_a.value.shape[1], prices=found.column_prices, skip=skip, progress=progress)
        # the bound must hold for all pairs, not only for the candidates
        short = np.maximum(0, over.value[:, 0] - found.row_prices)
        bound = float(found.row_prices.sum() + found.column_prices.sum() + short.sum())
        breaks = over.value > found.row_prices[:, None] + TOLERANCE
        new = np.setdiff1d(_pairs(np.where(breaks, over.index, -1), len(b)), pairs)
        if not len(new):
            break
        pairs = np.concatenate([pairs, new])
        weights = np.concatenate([weights, pair_cosines(a, b, *np.divmod(new, len(b)))])
    cosine, matched = np.zeros(len(a)), np.flatnonzero(found.column_of_row >= 0)
    cosine[matched] = pair_cosines(a, b, matched, found.column_of_row[matched])
    return Matching(found.column_of_row, cosine, best_of_a, best_of_b, bound)


def match_within(
    rows: npt.NDArray[np.float32],
    n_rows: int,
    rng: np.random.Generator,
    *,
    progress: Progress = lambda done, total, state: None,
) -> Floats:
    """(n_rows,) cosines when `n_rows` of these rows, (n, D) of norm 1, are matched one to one with the others of them.

    All rows may be taken as a partner, but a row never by itself; 0 without a partner.

    n_rows : drawn at random where they are not all
    """
    chosen = np.arange(len(rows)) if n_rows >= len(rows) else np.sort(rng.choice(len(rows), n_rows, replace=False))
    return match_directions(rows[chosen], rows, skip=chosen, progress=progress).cosine


def _best(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], index: npt.NDArray[np.int32]) -> Floats:
    """(n_a,) cosine of each row of a with row `index` of b; 0 where that is -1: none."""
    found, has_one = np.zeros(len(a)), np.flatnonzero(index >= 0)
    found[has_one] = pair_cosines(a, b, has_one, index[has_one])
    return found


def draw_like(rows: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """As many random directions with the mean and the covariance of these, (n, D): Gaussian, then of norm 1.

    What decoders have in common without having learned the same: the mean token's direction, and how many dimensions
    the tokens fill. Directions drawn evenly would make any two SAEs look alike.
    """
    mean = rows.mean(0, dtype=np.float64)
    covariance = (rows.T @ rows).astype(np.float64) / max(1, len(rows)) - np.outer(mean, mean)
    variances, axes = np.linalg.eigh(covariance)
    spread = (axes * np.sqrt(np.maximum(variances, 0))).T.astype(np.float32)
    drawn: npt.NDArray[np.float32] = rng.standard_normal(rows.shape, np.float32) @ spread
    drawn += mean.astype(np.float32)
    norms = np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn /= np.where(norms > 0, norms, 1)
    return drawn


def _pairs(index: npt.NDArray[np.int32], n_b: int, *, turned: bool = False) -> Ints:
    """Pairs (row, index[row, k]) as one number, row of a x n_b + row of b; an index of -1: none. Turned: rows of b."""
    row, other = np.broadcast_to(np.arange(len(index))[:, None], index.shape), index.astype(np.int64)
    pairs: Ints = (other * n_b + row if turned else row * n_b + other)[index >= 0]
    return pairs


def _describe(matching: Matching, nulls: dict[str, Floats]) -> dict[str, Any]:
    """Shares are of the latents of the smaller SAE: those without a match count as below every threshold."""
    n_smaller = min(len(matching.best_of_a), len(matching.best_of_b))
    cosine, is_matched = matching.cosine, matching.partner >= 0
    p99 = {name: _p99(values) for name, values in nulls.items()}
    chance = max(p99, key=p99.__getitem__)
    return {
        "n_latents_a": len(matching.best_of_a),
        "n_latents_b": len(matching.best_of_b),
        "n_matched": int(is_matched.sum()),
        "mean_cosine": float(cosine.sum()) / n_smaller,
        **{f"share_above_{threshold}": int((cosine > threshold).sum()) / n_smaller for threshold in THRESHOLDS},
        "null_mean_cosine": float(nulls[chance].sum()) / n_smaller,
        "null_p99": p99[chance],
        "share_above_null_p99": int((cosine > p99[chance]).sum()) / n_smaller,
        "chance": chance,
        **{f"null_p99_{name.replace(' ', '_')}": value for name, value in p99.items()},
        "is_optimal": matching.is_optimal,
        "gap": matching.gap,
    }


def _p99(cosines: Floats) -> float:
    matched = cosines[cosines > 0]
    return float(np.quantile(matched, 0.99, method="higher")) if len(matched) else 0.0


def _warnings(runs: Sequence[Path], pairs: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for pair in pairs:
        a, b = runs[pair["sae_a"]], runs[pair["sae_b"]]
        if pair["seed_a"] is not None and pair["seed_a"] == pair["seed_b"]:
            found.append(
                f"{a} and {b} were trained from one seed ({pair['seed_a']}), so they may have begun with equal "
                f"weights, and what they share may be these. This is not agreement"
            )
        elif pair["n_same_number"] >= _SAME_NUMBER:
            found.append(
                f"{pair['n_same_number']:,} latents of {a} are matched with the latent of the same number in {b} (by "
                f"chance about 1): one was made from the other, or both from equal weights. This is not agreement"
            )
    return found


def _match_table(pairs_of: list[tuple[int, int]], matches: list[Matching], chosen: list[Ints]) -> pa.Table:
    columns: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("sae_a", "sae_b", "latent_a", "latent_b", "cosine")
    }
    for (a, b), matching in zip(pairs_of, matches, strict=True):
        matched = np.flatnonzero(matching.partner >= 0)
        columns["sae_a"].append(np.full(len(matched), a))
        columns["sae_b"].append(np.full(len(matched), b))
        columns["latent_a"].append(chosen[a][matched])
        columns["latent_b"].append(chosen[b][matching.partner[matched]])
        columns["cosine"].append(matching.cosine[matched])
    return pa.table({name: np.concatenate(parts) for name, parts in columns.items()})


def _latent_table(
    decoders: list[Decoder], pairs_of: list[tuple[int, int]], matches: list[Matching], chosen: list[Ints]
) -> pa.Table:
    """A row per latent of every SAE, over the other SAEs; null where it was not compared (see `_chosen`)."""
    tables = []
    for number, decoder in enumerate(decoders):
        best, matched = [], []
        for (a, b), matching in zip(pairs_of, matches, strict=True):
            if number == a:
                best.append(matching.best_of_a)
                matched.append(matching.cosine)
            elif number == b:
                of_b = np.zeros(len(matching.best_of_b))
                is_matched = matching.partner >= 0
                of_b[matching.partner[is_matched]] = matching.cosine[is_matched]
                best.append(matching.best_of_b)
                matched.append(of_b)
        columns: dict[str, Any] = {"sae": np.full(decoder.n_latents, number), "latent": np.arange(decoder.n_latents)}
        is_compared = np.zeros(decoder.n_latents, bool)
        is_compared[chosen[number]] = True
        for name, values in {
            "n_matched": np.count_nonzero(matched, axis=0),
            "mean_matched": np.mean(matched, axis=0),
            "min_matched": np.min(matched, axis=0),
            "mean_best": np.mean(best, axis=0),
            "min_best": np.min(best, axis=0),
        }.items():
            whole = np.zeros(decoder.n_latents, values.dtype)
            whole[chosen[number]] = values
            columns[name] = pa.array(whole, mask=~is_compared)
        tables.append(pa.table({**columns, "has_direction": decoder.has_direction}))
    return pa.concat_tables(tables)


def _refuse_twice(decoders: list[Decoder]) -> None:
    first_at: dict[str, Path] = {}
    for decoder in decoders:
        if decoder.sae_sha256 in first_at:
            first = first_at[decoder.sae_sha256]
            raise BadInput(f"{first} and {decoder.root} are the same SAE; give each SAE once")
        first_at[decoder.sae_sha256] = decoder.root


def _refuse_same_seed(decoders: list[Decoder]) -> None:
    first_at: dict[int, Path] = {}
    for decoder in decoders:
        if decoder.seed is None:  # an imported SAE
            continue
        if decoder.seed in first_at:
            raise BadInput(
                f"{first_at[decoder.seed]} and {decoder.root} were trained from one seed ({decoder.seed}): they began "
                f"with equal weights, so what they share is no agreement. Train one from another seed: cyto sae train "
                f"... --seed {decoder.seed + 1}. To compare them all the same, add --allow-same-seed"
            )
        first_at[decoder.seed] = decoder.root


def _concepts_of(decoders: list[Decoder], concepts: Sequence[Path]) -> dict[int, ResultStore]:
    """Number of an SAE -> its concepts; of all SAEs, or of none."""
    number_of = {decoder.sae_sha256: number for number, decoder in enumerate(decoders)}
    found: dict[int, ResultStore] = {}
    for folder in concepts:
        store = ResultStore(folder, CONCEPTS)
        number = number_of.get(store.header.spec["latents_spec"][0]["sae_sha256"])
        if number is None or number in found:
            what = "are of none of these SAEs" if number is None else "are a second folder of the same SAE"
            raise SpecMismatch(f"the concepts {folder} {what}; give one folder for each SAE")
        found[number] = store
    missing = [str(decoder.root) for number, decoder in enumerate(decoders) if number not in found]
    if concepts and missing:
        raise BadInput(f"no concepts given for {listed(missing)}; give --concepts for every SAE, or for none")
    return found


def _chosen(decoder: Decoder, concepts: ResultStore | None, min_mean_activation: float) -> Ints:
    """The latents that are compared: those with a direction, and with enough activation in some dataset."""
    counts = decoder.has_direction.copy()
    if concepts is not None:
        table = concepts.table("latents")
        enough = np.array(table["mean_activation"]) >= min_mean_activation
        is_active = np.zeros(decoder.n_latents, bool)
        is_active[np.array(table["latent"])[enough]] = True
        counts &= is_active
    if not counts.any():
        reason = f" with a mean activation of {min_mean_activation:g} or more" if concepts is not None else ""
        raise BadInput(f"{decoder.root} has no latent{reason} whose decoder row is not zero: nothing to compare")
    return np.flatnonzero(counts)
