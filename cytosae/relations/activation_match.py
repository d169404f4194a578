"""Which latents of two SAEs answer to the same images? (`cyto concept match --by activation`)

The SAEs may differ in seed, width, block or backbone: nothing but the images is common. A latent is the vector of its
activations over the same images, sqrt of the mean over tokens (which a factor on a whole SAE does not change), and two
latents are compared by Pearson's correlation; latents are matched one to one with the largest sum (stability.py).

What is claimed: both answer to the same *images*, not just to cells of the same type or the same patients. So the null
permutes the images of B within strata (label and patient, by default): what follows from a latent's mean in each
stratum stays, what is shared image by image is lost. Each permutation is searched for the best partner anew:

    p[a] = (1 + permutations in which the best correlation of a with any latent of B is as large) / (1 + permutations)

A counterpart is a one-to-one partner whose correlation is above 99% of those that are matched after a permutation.
Images are drawn stratum by stratum, since a stratum with one image cannot be permuted. Twin: test_match.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import false_discovery_control

from cytosae.barcodes import IMAGE_COLUMNS
from cytosae.sae import pair_cosines, read_decoder
from stores.activation_store import one_or_more
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput, SpecMismatch
from stores.holdout import read_image_ids
from stores.machine import n_cores
from stores.part_files import Arrays, Keep, KeptParts, KeptState
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results, is_finished
from stores.spec import COMPARISON, MATCH, check_choice
from stores.tables import STATUS_OK, listed

from .figures import plot_match
from .match_report import MatchResult
from .nearest_cosine import nearest
from .stability import Matching, match_directions

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
BY = ("activation", "within")
_SAVE_SECONDS = 10.0  # between two states of the permutations
_FLOPS = 3e10  # a second and core: float32 products, and looking for the best of each row and column


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """How latents of two SAEs are matched.

    Raises
    ------
    BadInput
        If there is no such way, or a number is too small.
    """

    by: str = "activation"  # within: after the mean of each stratum is taken off, so that types and patients are out
    n_images: int = 2_000  # to draw, stratum by stratum; the last one is drawn whole
    per_stratum: int = 16  # images of a stratum, at most
    strata: tuple[str, ...] = ("label", "patient")  # columns of the image table
    min_images: int = 5  # of those drawn, in which a latent must be active to be compared
    n_permutations: int = 99
    most: float = 0.05  # q of a differential latent, with comparisons
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("by", self.by, BY)
        object.__setattr__(self, "strata", tuple(one_or_more(self.strata)))
        least = {"n_images": 4, "per_stratum": 2, "min_images": 1, "n_permutations": 1, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise BadInput(f"{name} must be at least {number}; found {getattr(self, name)}")
        if not 0 < self.most <= 1:
            raise BadInput(f"most must lie above 0 and be at most 1; found {self.most!r}")
        object.__setattr__(self, "most", float(self.most))


@dataclass(frozen=True)
class Side:
    """The latents of one SAE over the drawn images."""

    store: BarcodeStore
    rows: Rows  # (latents compared, images), mean 0 and norm 1
    latents: Ints  # their numbers
    n_active: Ints  # (latents compared,) drawn images with each
    n_latents: int  # of the SAE


def match_latents(
    a: Path | str,
    b: Path | str,
    out: Path | str,
    config: MatchConfig | None = None,
    *,
    sae_a: Path | str | None = None,
    sae_b: Path | str | None = None,
    only: Path | str | None = None,
    comparison: Path | str | None = None,
    comparison_b: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> MatchResult:
    """Match the latents of two SAEs by their activations on the same images; tables and a figure in the folder `out`.

    The same call continues an interrupted one, but for reading the images.
    Memory: 4 bytes for each latent and image of A, twice that of B (1.2 GB at 49,152 latents and 2,000 images), and a
    chunk of products.

    Parameters
    ----------
    a, b : barcodes of the same images by two SAEs; their tau plays no part
    sae_a, sae_b : the two SAEs: where their widths are equal, the cosine of decoder rows stands beside
    only : a list of image ids, one a line: only these are drawn, such as images held out in both trainings
    comparison : a folder of `compare` on `a`: says which share of its differential latents has a counterpart
    comparison_b : the same on `b`: and in how many the counterpart differs in the same direction

    Raises
    ------
    BadInput
        If the barcodes have too few images in common, or none of their latents is active in enough of them.
    SpecMismatch
        If an SAE or a comparison does not belong to the barcodes, or `out` holds something else.
    """
    config, out = config or MatchConfig(), Path(out)
    if (sae_a is None) != (sae_b is None):
        raise BadInput("give both SAEs or none")
    if comparison_b is not None and comparison is None:
        raise BadInput("a comparison on B needs the one on A")
    stores = [BarcodeStore(Path(a)), BarcodeStore(Path(b))]
    if stores[0].header.identity == stores[1].header.identity:
        raise BadInput(f"{a} and {b} are the same barcodes; give those of two SAEs")
    tested = [
        None if path is None else _read_comparison(Path(path), store)
        for path, store in zip((comparison, comparison_b), stores, strict=True)
    ]
    _require_same_groups(tested)
    ids = None if only is None else read_image_ids(Path(only))
    spec = {
        "a": [stores[0].header.identity],
        "b": [stores[1].header.identity],
        **asdict(config),
        "strata": [*config.strata],
        "saes": [_sae_of(path, store) for path, store in zip((sae_a, sae_b), stores, strict=True)],
        "only": None if ids is None else sorted({*ids}),
        "comparisons": [None if each is None else each.header.identity for each in tested],
    }
    # what cannot be matched is told before a folder is begun, and what is complete is not read again
    read = None if not overwrite and is_finished(out, MATCH, spec) else _read(stores, config, ids, progress)
    given = [path for path in (a, b, sae_a, sae_b, only, comparison, comparison_b) if path is not None]
    packages = ("numpy", "scipy", "numba", "anndata")
    writer = begin_results(
        out, MATCH, spec, overwrite=overwrite, inputs=[Path(path) for path in given], packages=packages
    )
    writer.watch(*(store.header for store in stores), *(each.header for each in tested if each is not None))
    if writer.is_complete:
        summary = dict(ResultStore(out, MATCH).header.summary or {})
        return MatchResult(out=out, summary=summary, was_complete=True)
    sides, strata, notes = read or _read(stores, config, ids, progress)
    latents, matched, summary, chance = _match(sides, strata, config, writer.parts, progress)
    partner = {int(row["latent_a"]): row for row in matched}
    if sae_a is not None and sae_b is not None:
        notes += _add_cosines(matched, Path(sae_a), Path(sae_b), progress)
    summary |= {
        "names": [Path(a).name, Path(b).name],
        "n_images": len(strata),
        "n_strata": int(strata.max()) + 1,
        "median_cosine": _median(row["cosine"] for row in matched),
        "share_nearest_by_decoder": _share(row["is_nearest_by_decoder"] for row in matched),
        "differential": _differential(tested, partner, {int(each) for each in sides[0].latents}, summary, config),
        "notes": notes,
    }
    writer.write_table("matches", pa.Table.from_pylist(matched, _MATCHES))
    writer.write_table("latents", latents)
    correlations = [row["correlation"] for row in matched]
    plot_match(correlations, chance.tolist(), summary["null_p99"], writer.root / "match")
    writer.finish(summary)
    return MatchResult(out=out, summary=summary)


def match_scale(a: Path | str, b: Path | str, config: MatchConfig) -> str:
    """In words how much a match computes, and about how long it takes, before it starts.

    Raises
    ------
    StoreNotFound, DamagedStore
        If a folder is no barcodes, or damaged.
    """
    shapes = [store.matrix("image", store.taus[0]).shape for store in map(BarcodeStore, (a, b))]
    n_images = min(config.n_images, *(shape[0] for shape in shapes))
    passes = 3 + 3 + config.n_permutations - 1  # two matchings of about three passes, and a pass for each permutation
    seconds = passes * 2 * n_images * shapes[0][1] * shapes[1][1] / (_FLOPS * n_cores())
    memory = 0.45 + 4 * n_images * (shapes[0][1] + 2 * shapes[1][1]) / 2**30
    return (
        f"{n_images:,} images, {shapes[0][1]:,} and {shapes[1][1]:,} latents, {config.n_permutations:,} permutations: "
        f"at most about {max(1, round(seconds)):,} s with {n_cores()} cores and {memory:.1f} GiB of memory"
    )


# ------------------------------------------------------------------------------------------------- which images


def draw_images(
    stores: Sequence[BarcodeStore], config: MatchConfig, only: Sequence[str] | None
) -> tuple[list[Ints], Ints, list[str]]:
    """(rows of each store, stratum of each image, notes) of images that are readable in both, drawn stratum by stratum.

    Raises
    ------
    BadInput
        If a column or an image does not exist, or fewer than 4 images are left.
    """
    tables = [store.read_obs("image", store.taus[0], needed=IMAGE_COLUMNS) for store in stores]
    missing = [name for name in config.strata if name not in tables[0].columns]
    if missing:
        raise BadInput(f"{stores[0].root} has no column {listed(missing)} of images to permute within")
    rows = [
        {
            str(name): row
            for row, (name, ok) in enumerate(zip(each.index, each["status"], strict=True))
            if ok == STATUS_OK
        }
        for each in tables
    ]
    common = [name for name in rows[0] if name in rows[1]]
    if only is not None:
        wanted = {*only}
        unknown = sorted(wanted - {*common})
        if unknown:
            raise BadInput(
                f"{len(unknown):,} of the listed images are not readable in both barcodes ({listed(unknown)})"
            )
        common = [name for name in common if name in wanted]
    of_a = np.array([rows[0][name] for name in common], np.int64)
    cells = [tables[0][name].astype(str).to_numpy(object)[of_a] for name in ("dataset", *config.strata)]
    keys = list(zip(*cells, strict=True))
    members: dict[tuple[str, ...], list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)
    rng = np.random.default_rng([config.seed, 0])
    chosen: list[int] = []
    strata: list[int] = []
    several = sorted(key for key, places in members.items() if len(places) > 1)
    for number, at in enumerate(rng.permutation(len(several)).tolist()):
        if len(chosen) >= config.n_images:
            break
        places = members[several[at]]
        drawn = rng.choice(places, min(config.per_stratum, len(places)), replace=False).tolist()
        chosen += drawn
        strata += [number] * len(drawn)
    if len(chosen) < 4:
        raise BadInput(
            f"{stores[0].root} and {stores[1].root} have {len(common):,} readable images in common, and "
            f"{len(chosen):,} of them share their {' and '.join(config.strata)} with another: too few to compare; "
            f"name other columns with --strata"
        )
    n_alone = sum(len(places) == 1 for places in members.values())
    notes = [f"{n_alone:,} images are alone in their stratum and were not drawn"] if n_alone else []
    order = np.argsort(of_a[chosen], kind="stable")
    numbers = np.unique(np.array(strata)[order], return_inverse=True)[1].astype(np.int64)
    names = [common[chosen[at]] for at in order.tolist()]
    hashes = [table["content_hash"].astype(str).to_dict() for table in tables]
    others = [name for name in names if hashes[0][name] and hashes[1][name] and hashes[0][name] != hashes[1][name]]
    if others:
        notes.append(
            f"{len(others):,} of the {len(names):,} images drawn have other content under the same image_id in the "
            f"second barcodes ({listed(others)}): if these are other cells, the match means nothing"
        )
    return [np.array([each[name] for name in names], np.int64) for each in rows], numbers, notes


def read_side(store: BarcodeStore, rows: Ints, strata: Ints, config: MatchConfig, progress: Progress) -> Side:
    """The latents of one SAE that are active in enough of the drawn images, over these, centred, at norm 1.

    Raises
    ------
    BadInput
        If there is none, or no layer of means.
    """
    tau = store.taus[0]
    if not (store.path("image", tau) / "layers" / "mean").is_dir():
        raise BadInput(f"{store.root} has no layer 'mean' of images; count again with cyto barcode")
    order = np.argsort(rows, kind="stable")
    matrix = store.read_rows("image", rows[order], tau, layer="mean")
    progress(len(rows), len(rows), "images")
    n_active = np.bincount(matrix.indices, minlength=matrix.shape[1])
    enough = np.flatnonzero(n_active >= config.min_images)
    if not len(enough):
        raise BadInput(
            f"{store.root}: no latent is active in {config.min_images} of the {len(rows):,} images drawn; draw more "
            f"(--n-images), or ask for fewer (--min-images)"
        )
    columns = matrix.tocsc()[:, enough]
    dense = np.zeros((len(enough), len(rows)), np.float32)
    for at in range(len(enough)):
        some = slice(columns.indptr[at], columns.indptr[at + 1])
        dense[at, order[columns.indices[some]]] = np.sqrt(columns.data[some])
    varies = standardize(dense, strata if config.by == "within" else np.zeros_like(strata))
    if not varies.any():
        raise BadInput(
            f"{store.root}: no latent differs between the {len(rows):,} images drawn"
            f"{' of a stratum' if config.by == 'within' else ''}, so there is nothing to correlate; draw more "
            f"(--n-images)"
        )
    return Side(store, dense[varies], enough[varies], n_active[enough][varies].astype(np.int64), matrix.shape[1])


def standardize(rows: Rows, strata: Ints) -> npt.NDArray[np.bool_]:
    """Take off the mean of each stratum, and scale to norm 1, in place; which rows vary at all.

    rows : (latents, images)
    """
    counts = np.bincount(strata)
    varies = np.zeros(len(rows), bool)
    for at in range(len(rows)):
        row = rows[at].astype(np.float64)
        before = np.linalg.norm(row)
        row -= (np.bincount(strata, row) / counts)[strata]
        norm = np.linalg.norm(row)
        varies[at] = norm > 1e-6 * before
        rows[at] = row / norm if varies[at] else 0
    return varies


# ------------------------------------------------------------------------------------------------- the match


def _read(
    stores: Sequence[BarcodeStore], config: MatchConfig, ids: Sequence[str] | None, progress: Progress
) -> tuple[list[Side], Ints, list[str]]:
    """Both sides, the stratum of each image, and notes."""
    places, strata, notes = draw_images(stores, config, ids)
    sides = [
        read_side(store, rows, strata, config, partial(_tell_half, progress, n))
        for n, (store, rows) in enumerate(zip(stores, places, strict=True))
    ]
    return sides, strata, notes


def _tell_half(progress: Progress, number: int, done: int, total: int, state: str) -> None:
    progress(number * total + done, 2 * total, "images")


def _kept_matching(a: Rows, b: Rows, keep: Keep, name: str, progress: Progress) -> Matching:
    def compute() -> Arrays:
        found = match_directions(a, b, progress=progress)
        return {each.name: np.asarray(getattr(found, each.name)) for each in fields(Matching)}

    kept: dict[str, Any] = {**keep(name, compute)}
    return Matching(**kept | {"bound": float(kept["bound"])})


@dataclass(frozen=True)
class _Null:
    """What is found where the images of B are permuted within strata."""

    correlations: Floats  # of the pairs matched in the first permutation
    p: list[Floats]  # of each latent of A, and of B: how often its best correlation is at least as large

    @property
    def p99(self) -> float:
        """A correlation above it is one that chance hardly gives."""
        return float(np.quantile(self.correlations, 0.99, method="higher")) if len(self.correlations) else 0.0


def _match(
    sides: Sequence[Side], strata: Ints, config: MatchConfig, parts: KeptParts, progress: Progress
) -> tuple[pa.Table, list[dict[str, Any]], dict[str, Any], Floats]:
    """Table of all latents, rows of the matched pairs, summary, and the correlations that chance gives."""
    a, b = sides
    found = _kept_matching(a.rows, b.rows, parts, "match", lambda done, total, state: progress(done, total, "match"))
    null = _permuted(found, sides, strata, config, parts, progress)
    pairs = _pair_rows(found, sides, strata, null)
    best = (found.best_of_a, found.best_of_b)
    q = [false_discovery_control(values) for values in null.p]
    table = pa.concat_tables(
        pa.table(
            {
                "sae": ["ab"[number]] * len(side.latents),
                "latent": side.latents,
                "n_images": side.n_active,
                "best_correlation": best[number],
                "p": null.p[number],
                "q": q[number],
            }
        )
        for number, side in enumerate(sides)
    )
    n_smaller = min(len(side.latents) for side in sides)
    n_counterparts = sum(bool(pair["is_counterpart"]) for pair in pairs)
    summary = {
        "n_latents": [side.n_latents for side in sides],
        "n_compared": [len(side.latents) for side in sides],
        "n_matched": len(pairs),
        "n_counterparts": n_counterparts,
        "share": n_counterparts / n_smaller,
        "mean_correlation": float(found.cosine.sum()) / n_smaller,
        "null_mean_correlation": float(null.correlations.sum()) / n_smaller,
        "null_p99": null.p99,
        "n_q_at_most_0.05": [int((values <= 0.05).sum()) for values in q],
        "p_floor": 1 / (1 + config.n_permutations),
        "is_optimal": found.is_optimal,
    }
    return table, pairs, summary, null.correlations


def _permuted(
    found: Matching, sides: Sequence[Side], strata: Ints, config: MatchConfig, parts: KeptParts, progress: Progress
) -> _Null:
    """The null, kept from time to time: an interrupted command goes on from there."""
    a, b = sides
    rng = np.random.default_rng([config.seed, 1])
    n_as_large = [np.ones(len(side.latents), np.int64) for side in sides]
    null: Floats = np.empty(0)
    state = KeptState(parts, "permutations", _SAVE_SECONDS)
    kept = state.read()
    n_kept = 0 if kept is None else int(kept["done"][0])
    if kept is not None:
        n_as_large, null = [kept["a"], kept["b"]], kept["null"]
    for number in range(config.n_permutations):
        order = permute_within(strata, rng)
        if number < n_kept:
            continue
        permuted = np.ascontiguousarray(b.rows[:, order])
        if number == 0:
            drawn = _kept_matching(a.rows, permuted, parts, "null", lambda done, total, state: None)
            null, best = drawn.cosine[drawn.partner >= 0], (drawn.best_of_a, drawn.best_of_b)
        else:
            of_a, of_b = nearest(a.rows, permuted, 1)
            best = of_a.value[:, 0].astype(np.float64), of_b.value[:, 0].astype(np.float64)
        for count, values, observed in zip(n_as_large, best, (found.best_of_a, found.best_of_b), strict=True):
            count += values >= observed - 1e-6
        if state.is_due:
            counts = dict(zip("ab", n_as_large, strict=True))
            state.write({"done": np.array([number + 1]), **counts, "null": null})
        progress(number + 1, config.n_permutations, "permutations")
    return _Null(null, [count / (1 + config.n_permutations) for count in n_as_large])


def _pair_rows(found: Matching, sides: Sequence[Side], strata: Ints, null: _Null) -> list[dict[str, Any]]:
    """A row for each matched pair, in the order of A; decoder cosines are added later."""
    a, b = sides
    of_a = np.flatnonzero(found.partner >= 0)
    within, p99 = _within_correlation(a.rows, b.rows, of_a, found.partner[of_a], strata), null.p99
    p, q = null.p[0], false_discovery_control(null.p[0])
    return [
        {
            "latent_a": int(a.latents[at]),
            "latent_b": int(b.latents[found.partner[at]]),
            "correlation": float(found.cosine[at]),
            "within_correlation": float(inside),
            "p": float(p[at]),
            "q": float(q[at]),
            "is_counterpart": bool(found.cosine[at] > p99),
            "n_images_a": int(a.n_active[at]),
            "n_images_b": int(b.n_active[found.partner[at]]),
            "cosine": None,
            "is_nearest_by_decoder": None,
        }
        for at, inside in zip(of_a.tolist(), within.tolist(), strict=True)
    ]


def permute_within(strata: Ints, rng: np.random.Generator) -> Ints:
    """(images,) a random order that keeps every image in its stratum."""
    order = np.arange(len(strata))
    by_stratum = np.argsort(strata, kind="stable")
    shuffled = np.lexsort((rng.random(len(strata)), strata))
    order[by_stratum] = shuffled
    return order


def _within_correlation(a: Rows, b: Rows, rows: Ints, partners: Ints, strata: Ints) -> Floats:
    """(n,) correlation of pairs of rows after the mean of each stratum is taken off; 0 where one does not vary."""
    found = np.zeros(len(rows))
    for at, (row, partner) in enumerate(zip(rows.tolist(), partners.tolist(), strict=True)):
        pair = np.stack([a[row], b[partner]])
        if standardize(pair, strata).all():
            found[at] = float(pair[0].astype(np.float64) @ pair[1])
    return found


# ------------------------------------------------------------------------------------------------- beside it


def _add_cosines(matched: list[dict[str, Any]], sae_a: Path, sae_b: Path, progress: Progress) -> list[str]:
    """Fill `cosine` and `is_nearest_by_decoder` where the decoders have one width; a note where they do not."""
    one, other = read_decoder(sae_a), read_decoder(sae_b)
    if one.rows.shape[1] != other.rows.shape[1]:
        return [f"the SAEs have widths {one.rows.shape[1]:,} and {other.rows.shape[1]:,}: decoder rows have no cosine"]
    if {**one.tokens, "tokens_per_image": None} != {**other.tokens, "tokens_per_image": None}:
        return ["the SAEs were trained on different kinds of tokens: the cosine of decoder rows would mean nothing"]
    pairs = [np.array([row[name] for row in matched], np.int64) for name in ("latent_a", "latent_b")]
    cosines = pair_cosines(one.rows, other.rows, *pairs)
    chosen = one.rows[pairs[0]]
    best, _ = nearest(chosen, other.rows, 1, progress=lambda done, total, state: progress(done, total, "decoders"))
    for row, cosine, index in zip(matched, cosines.tolist(), best.index[:, 0].tolist(), strict=True):
        row["cosine"], row["is_nearest_by_decoder"] = cosine, index == row["latent_b"]
    return []


def _sae_of(path: Path | str | None, store: BarcodeStore) -> str | None:
    if path is None:
        return None
    held = read_decoder(path).sae_sha256
    specs = store.header.spec.get("latents_spec", [])
    stated = {str(each["sae_sha256"]) for each in (specs if isinstance(specs, list) else [specs])}
    if stated and stated != {held}:
        raise SpecMismatch(f"{store.root} was not made with the SAE {path}; give the SAEs in the order of the barcodes")
    return held


def _read_comparison(path: Path, store: BarcodeStore) -> ResultStore:
    found = ResultStore(path, COMPARISON)
    if found.header.spec["barcodes"] != store.header.identity:
        raise SpecMismatch(f"the comparison {path} is not of {store.root}; compare these barcodes")
    return found


def _require_same_groups(tested: Sequence[ResultStore | None]) -> None:
    """Raise BadInput if both comparisons are there and their A and B are not the same: directions would be turned."""
    groups = [(each.root, each.header.spec["a"], each.header.spec["b"]) for each in tested if each is not None]
    if len(groups) == 2 and groups[0][1:] != groups[1][1:]:
        said = " and ".join(f"{root} compares {a!r} with {b!r}" for root, a, b in groups)
        raise BadInput(
            f"{said}: the same A and B in the same order are needed to compare directions; compare the second barcodes "
            f"so: cyto compare"
        )


def _differential(
    tested: Sequence[ResultStore | None],
    partner: dict[int, dict[str, Any]],
    compared: set[int],
    summary: dict[str, Any],
    config: MatchConfig,
) -> dict[str, Any] | None:
    """How many latents that differ in A have a counterpart in B, and how many counterparts differ in the same way."""
    first, second = tested
    if first is None:
        return None
    rows = first.table("differential").to_pylist()
    differ = [row for row in rows if row["q"] is not None and row["q"] <= config.most]
    found = [row for row in differ if row["latent"] in partner and partner[row["latent"]]["is_counterpart"]]
    said: dict[str, Any] = {
        "n": len(differ),
        "n_compared": sum(row["latent"] in compared for row in differ),
        "n_with_counterpart": len(found),
        "share": len(found) / len(differ) if differ else None,
        "share_of_all": summary["n_counterparts"] / max(1, summary["n_compared"][0]),
        "n_same_direction": None,
        "n_replicated": None,
        "share_replicated": None,
    }
    if second is not None:
        of_b = {row["latent"]: row for row in second.table("differential").to_pylist()}
        pairs = [(row, of_b[partner[row["latent"]]["latent_b"]]) for row in found]
        same = [(row, other) for row, other in pairs if row["difference"] * other["difference"] > 0]
        both = [other for _, other in same if other["q"] is not None and other["q"] <= config.most]
        said |= {"n_same_direction": len(same), "n_replicated": len(both)}
        said["share_replicated"] = len(both) / len(differ) if differ else None
    return said


def _median(values: Any) -> float | None:
    some = [value for value in values if value is not None]
    return float(np.median(some)) if some else None


def _share(values: Any) -> float | None:
    some = [value for value in values if value is not None]
    return float(np.mean(some)) if some else None


_MATCHES = pa.schema(
    [
        ("latent_a", pa.int64()), ("latent_b", pa.int64()), ("correlation", pa.float64()),
        ("within_correlation", pa.float64()), ("p", pa.float64()), ("q", pa.float64()), ("is_counterpart", pa.bool_()),
        ("n_images_a", pa.int64()), ("n_images_b", pa.int64()), ("cosine", pa.float64()),
        ("is_nearest_by_decoder", pa.bool_()),
    ]
)  # fmt: skip
