"""By how much an SAE beats baselines on the same held-out tokens: `cyto sae versus`.

For each SAE one pass over the images (measure.py), and its figures on the same bootstrap draws of patients or images
(figures_of_draws.py): a difference is taken draw by draw, so its interval is a paired one. Intervals of label purities
and of their differences come from leaving out each patient in turn, for both at once. Of several baselines of one kind,
with other seeds, each draw takes one at random: the interval then holds for another draw of such a baseline, too.

Directions that nobody trained may be ahead of a baseline as well, so a lead over it counts only if the SAE is ahead of
`random` baselines, too: what is judged is the SAE minus the better of both.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import norm as normal
from scipy.stats import t as student

from cytosae.concepts import shuffled_labels
from cytosae.sae import load_sae
from stores.activation_spec import require_same_tokens
from stores.activation_store import ActivationStore
from stores.content_hashes import find_trained_on
from stores.devices import resolve_device
from stores.errors import BadInput
from stores.progress import Progress
from stores.result_folder import ResultStore, ResultWriter, begin_results
from stores.spec import SAE, VERSUS, Header, read_header
from stores.tables import column, parquet_table
from stores.token_sets import chosen_tokens

from . import costs
from .config import VersusConfig
from .figures import plot_differences
from .figures_of_draws import METRICS, POSSIBLE, PURITIES, SHUFFLES, figures_of_draws, purity_without
from .measure import Floats, ImageSums, Ints, measure_images
from .reference import kind_of
from .report import VersusResult, lead_not_of_learning

JUDGED = ("explained_variance", "label_purity_above_chance")  # more is better; the others are shown beside them
# figures whose draws lie elsewhere than the figure, as they have fewer distinct images; purities have no draws
MOVED = ("dead_share",)
_MOST_LEFT_OUT = 50  # of groups that are left out together, for the intervals of purities
_RANDOM = "random"
_DRAWN_KINDS = (_RANDOM, "tokens", "frozen-decoder", "frozen-encoder")
_FEW_GROUPS = 20
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Member:
    """The SAE, or a baseline, with the cache of its tokens."""

    run: Path
    header: Header
    store: ActivationStore
    kind: str

    @property
    def sha256(self) -> str:
        return str((self.header.summary or {}).get("sae_sha256"))


def compare_with_baselines(
    run: Path | str,
    cache: Path | str,
    baselines: Sequence[Path | str],
    out: Path | str,
    config: VersusConfig | None = None,
    *,
    untrained: Sequence[tuple[Path | str, Path | str]] = (),
    assume_compatible: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total, state: None,
) -> VersusResult:
    """Measure an SAE and its baselines on the same held-out images, and write SAE minus baseline to the folder `out`.

    saes.parquet, differences.parquet, draws_*.parquet and a figure. The same call continues an interrupted one.
    Memory: one SAE, one micro-batch, and the latents of each image, 8 bytes for each that is active there.

    Parameters
    ----------
    run : folder of the SAE
    cache : tokens that neither it nor a baseline was trained on, in part at least; path or URL
    baselines : folders of SAEs on the same kind of tokens (`write_baseline`); several of a kind: other seeds
    untrained : an SAE and its cache, each of the same images through an untrained backbone; further rows
    assume_compatible : take imported SAEs, which do not say on which tokens they were trained
    device : auto, cpu, cuda or cuda:N
    say : called with lines of text: the plan, with its time and memory
    progress : called with images, done and in all, of one SAE after the other

    Raises
    ------
    BadInput
        If no baseline is given, one twice, or no image was held out from all of them.
    SpecMismatch
        If a baseline has another kind of tokens.
    """
    config, run, out, device = config or VersusConfig(), Path(run), Path(out), resolve_device(device)
    if not baselines and not untrained:
        raise BadInput("nothing to compare with: give --baseline RUN; cyto sae baseline makes one")
    store = ActivationStore(cache)
    places: list[tuple[Path, ActivationStore, bool]] = [(run, store, False)]
    places += [(Path(each), store, False) for each in baselines]
    places += [(Path(each), ActivationStore(its), True) for each, its in untrained]
    members = [_open_member(*place, assume_compatible) for place in places]
    seen: dict[str, Path] = {}
    for member in members:
        if member.sha256 in seen:
            raise BadInput(f"{seen[member.sha256]} and {member.run} are the same SAE; give each once")
        seen[member.sha256] = member.run
    token_set = str(members[0].header.spec.get("config", {}).get("token_set", "all"))
    images = _choose_images(members, config)
    labels, names = _labels(store, images.rows[0], config.label)
    groups, unit = _groups(store, images.rows[0])

    spec = {
        "sae": members[0].sha256,
        "baselines": [{"sae_sha256": each.sha256, "kind": each.kind} for each in members[1:]],
        "caches": [each.store.content_sha256 for each in members],
        "images_sha256": images.sha256,
        "token_set": token_set,
        "labels": names,
        "config": asdict(config),
    }
    local = [each.store.root for each in members if isinstance(each.store.root, Path)]
    writer = begin_results(
        out,
        VERSUS,
        spec,
        overwrite=overwrite,
        inputs=[*(each.run for each in members), *dict.fromkeys(local)],
        packages=("numpy", "numba", "torch"),
    )
    if writer.is_complete:
        return _result(out, was_complete=True)
    writer.watch(*(each.header for each in members), *(each.store.header for each in members))
    per_image = len(chosen_tokens(token_set, store.spec.layout))
    say(_plan(members, len(images.rows[0]), per_image, config, device))
    n_groups = int(groups.max()) + 1
    resampling = _resample(labels, groups, n_groups, config)
    draws, without = [], []
    for number, (member, rows) in enumerate(zip(members, images.rows, strict=True)):
        tell = partial(_tell, progress, f"{member.kind}, {number + 1} of {len(members)}")
        measure = partial(_measure, member, rows, token_set=token_set, device=device, progress=tell)
        figures = _figures_of(number, measure, resampling, writer)
        draws.append(figures[0])
        without.append(figures[1])
    differences = _differences(members, draws, without, config, n_groups)
    measured = [_row(*each, n_groups) for each in zip(members, draws, without, strict=True)]
    writer.write_table("saes", pa.Table.from_pylist(measured))
    writer.write_table("differences", pa.Table.from_pylist(differences))
    plot_differences([row for row in differences if row["metric"] in JUDGED], writer.root / "differences")
    summary = {
        "run": run.name,
        "n_images": len(images.rows[0]),
        "n_images_in_all": images.n_in_all,
        "n_labelled": int((labels >= 0).sum()) if len(names) > 1 else 0,
        "n_groups": n_groups,
        "unit": unit,
        "label": config.label,
        "is_held_out": not config.all_images,
        "warnings": _warnings(members, config, n_groups, unit, names) + _warnings_of_leads(members, differences),
    }
    writer.finish({"result": summary})
    return _result(out, was_complete=False)


@dataclass(frozen=True)
class _Resampling:
    """How figures vary over patients (or images), and what chance gives."""

    labels: Ints  # of each image; -1: none
    shuffled: Ints  # (shuffles, images) shuffled from patient to patient: the null of purities
    weights: Floats  # (1 + draws, images): all once, then how often the bootstrap draws the image's patient
    left_out_with: Ints  # of each image, the number of what is left out together
    least_images: int


def _resample(labels: Ints, groups: Ints, n_groups: int, config: VersusConfig) -> _Resampling:
    rng = np.random.default_rng([config.seed, 1])
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), config.draws).astype(np.float64)
    return _Resampling(
        labels=labels,
        shuffled=_shuffled(labels, groups, config.seed),
        weights=np.vstack([np.ones(n_groups), drawn])[:, groups],
        left_out_with=left_out_together(groups, n_groups, config.seed),
        least_images=config.least_images,
    )


def _measure(member: _Member, rows: Ints, *, token_set: str, device: str, progress: Progress) -> ImageSums:
    """What an SAE makes of each of the images."""
    model = load_sae(member.run, device=device).model
    return measure_images(model, member.store, rows, token_set=token_set, device=device, progress=progress)


def _figures_of(
    number: int, measure: Callable[[], ImageSums], resampling: _Resampling, writer: ResultWriter
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Figures of each draw, and purities with some left out; what an interrupted command has written is taken."""
    name, name_without = f"draws_{number:03d}", f"without_{number:03d}"
    draws, without = _kept(writer, name, METRICS), _kept(writer, name_without, PURITIES)
    if draws is not None and without is not None:
        return draws, without
    sums, by = measure(), resampling
    draws = figures_of_draws(sums, by.weights, by.labels, by.shuffled, least_images=by.least_images)
    without = purity_without(sums, by.labels, by.shuffled, by.left_out_with, least_images=by.least_images)
    writer.write_table(name, pa.table({"draw": np.arange(len(by.weights)), **draws}))
    writer.write_table(name_without, pa.table({"left_out": np.arange(len(without[PURITIES[0]])), **without}))
    return draws, without


def _open_member(run: Path, store: ActivationStore, is_untrained: bool, assume_compatible: bool) -> _Member:
    header = read_header(run, SAE)
    if store.spec.trained and is_untrained:
        raise BadInput(
            f"{store.root} was made with a trained backbone; give it with --baseline, or extract with random weights"
        )
    member = _Member(run, header, store, "untrained backbone" if is_untrained else kind_of(header))
    require_same_tokens(
        dict(header.spec["tokens"]),
        store.spec.same_tokens,
        f"the SAE {run}",
        f"the cache {store.root}",
        assume_compatible=assume_compatible,
    )
    return member


@dataclass(frozen=True, eq=False)
class _Images:
    """The images that all are measured on."""

    rows: list[Ints]  # for each member their places in its cache; the same images in the same order
    n_in_all: int  # held out from all, of which these may be a sample
    sha256: str  # of their names


def _choose_images(members: Sequence[_Member], config: VersusConfig) -> _Images:
    """Images that no member was trained on, in all caches, by dataset and name."""
    places = []
    for member in members:
        table = member.store.images
        names = [*zip(column(table, "dataset"), column(table, "image_id"), strict=True)]
        kept = member.store.readable()
        if not config.all_images:
            known = find_trained_on(member.run, member.header, table, cache_sha256=member.store.content_sha256)
            kept &= known.is_known & ~known.is_trained_on
        places.append({names[row]: row for row in np.flatnonzero(kept).tolist()})
    shared = sorted(set.intersection(*map(set, places)), key=lambda name: (name[0] or "", name[1] or ""))
    if len(shared) < 2:
        counts = ", ".join(f"{each.run} {len(place):,}" for each, place in zip(members, places, strict=True))
        what = "that all caches have and can be read" if config.all_images else "known to be held out from all of them"
        raise BadInput(
            f"at least two images are needed {what}; found {len(shared)} (for itself: {counts}). Train with "
            f"--holdout and make the baselines with --like, or measure on all images (--all-images), which flatters "
            f"what was trained"
        )
    n_in_all = len(shared)
    if 0 < config.most_images < n_in_all:
        drawn = np.random.default_rng([config.seed, 0]).choice(n_in_all, config.most_images, replace=False)
        shared = [shared[number] for number in np.sort(drawn)]
    rows = [np.array([place[name] for name in shared], np.int64) for place in places]
    names_text = "".join(f"{dataset}\t{name}\n" for dataset, name in shared)
    return _Images(rows, n_in_all, hashlib.sha256(names_text.encode()).hexdigest())


def _labels(store: ActivationStore, rows: Ints, name: str) -> tuple[Ints, list[str]]:
    """(n,) numbers, -1 for none, and the names of the labels."""
    given = column(store.images.take(rows), name)
    names = sorted({value for value in given if value is not None})
    number_of = {value: number for number, value in enumerate(names)}
    return np.array([-1 if value is None else number_of[value] for value in given], np.int64), names


def _groups(store: ActivationStore, rows: Ints) -> tuple[Ints, str]:
    """(n,) numbers of what is drawn, and what it is: patients, or images where fewer than two patients are known."""
    table = store.images.take(rows)
    of_patient = [*zip(column(table, "dataset"), column(table, "patient"), strict=True)]
    patients = sorted({each for each in of_patient if each[1] is not None}, key=str)
    if len(patients) < 2:
        return np.arange(len(rows)), "image"
    number_of: dict[Any, int] = {each: number for number, each in enumerate(patients)}
    found = [number_of.get(each, -1) for each in of_patient]
    alone = iter(range(len(patients), len(patients) + len(rows)))
    return np.array([next(alone) if number < 0 else number for number in found], np.int64), "patient"


def _shuffled(labels: Ints, groups: Ints, seed: int) -> Ints:
    """(SHUFFLES, n): labels shuffled from patient to patient."""
    if not (labels >= 0).any():
        return np.tile(labels, (SHUFFLES, 1))
    return np.stack([*shuffled_labels(labels, groups, shuffles=SHUFFLES, seed=seed)])


def left_out_together(groups: Ints, n_groups: int, seed: int) -> Ints:
    """(n,) numbers from 0 of what is left out together: a group; at random several, so that there are at most 50."""
    if n_groups <= _MOST_LEFT_OUT:
        return groups
    numbers: Ints = np.random.default_rng([seed, 3]).permutation(n_groups)[groups] % _MOST_LEFT_OUT
    return numbers


def _kept(writer: ResultWriter, name: str, columns: Sequence[str]) -> dict[str, Floats] | None:
    """The figures of an SAE that this job had finished before it was interrupted."""
    path = writer.root / f"{name}.parquet"
    try:
        metadata = pq.read_metadata(path).metadata or {}
        table = parquet_table(path.read_bytes())
        if metadata.get(b"cyto") != writer.header.identity.encode():
            return None
        return {metric: np.array(table[metric], np.float64) for metric in columns}
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


def interval_of_draws(
    observed: float, drawn: Floats, n_groups: int, *, is_moved: bool = False
) -> tuple[float | None, float | None]:
    """95% limits: quantiles over draws, further from the observed value by what few groups need; None without draws.

    Quantiles of a bootstrap over n groups are too near, as a normal quantile in place of Student's t is, and a variance
    with n in place of n - 1: distances are multiplied by the ratio of both (Hesterberg 2015, the expanded percentile
    interval, doi 10.1080/00031305.2015.1089789).

    is_moved : for shares of dead latents, which are larger in every draw, as it has fewer images: quantiles are taken
        about the mean of the draws
    """
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(observed) or not len(drawn) or n_groups < 2:
        return None, None
    wider = student.ppf(0.975, n_groups - 1) / normal.ppf(0.975) * np.sqrt(n_groups / (n_groups - 1))
    centre = float(drawn.mean()) if is_moved else observed
    low, high = observed + wider * (np.quantile(drawn, [0.025, 0.975]) - centre)
    return float(low), float(high)


def interval_without(observed: float, without: Floats) -> tuple[float | None, float | None]:
    """95% limits from the figure without each block of groups (a jackknife, Miller 1974); None with fewer than two.

    For purities: a bootstrap draw has fewer distinct images than there are, which moves a purity by more than its
    interval is wide, and how much of that is its own bias is not known. Leaving one block out hardly moves it.
    """
    figure = np.array([[observed, *without]])
    return interval_of_difference(figure, np.zeros_like(figure))


def interval_of_difference(ours: Floats, theirs: Floats) -> tuple[float | None, float | None]:
    """95% limits of mean of ours minus mean of theirs, from both without the same blocks; None with fewer than two.

    The variance is the mean over pairs of that of the pair's difference, by leaving out each block from both, and that
    between the rows of each side: as if each draw took one of them at random.

    ours, theirs : (SAEs, 1 + blocks), for each the figure, then the figure without each block
    """
    pairs = (ours[:, None] - theirs).reshape(-1, ours.shape[1])
    observed, without = float(pairs[:, 0].mean()), pairs[:, 1:]
    without = without[:, np.isfinite(without).all(0)]
    n_blocks = without.shape[1]
    if not np.isfinite(observed) or n_blocks < 2:
        return None, None
    variance = (n_blocks - 1) * float(without.var(axis=1).mean()) + float(ours[:, 0].var() + theirs[:, 0].var())
    far = float(student.ppf(0.975, n_blocks - 1)) * variance**0.5
    return observed - far, observed + far


def _tell(progress: Progress, state: str, done: int, total: int, _: str) -> None:
    progress(done, total, state)


def _row(member: _Member, found: dict[str, Floats], without: dict[str, Floats], n_groups: int) -> dict[str, Any]:
    """A row of saes.parquet."""
    row: dict[str, Any] = {
        "run": member.run.name,
        "kind": member.kind,
        "sae_sha256": member.sha256,
        "n_latents": int(member.header.spec["n_latents"]),
        "seed": member.header.spec.get("baseline", member.header.spec.get("config", {})).get("seed"),
    }
    for metric in METRICS:
        values = found[metric]
        if metric in PURITIES:
            low, high = interval_without(values[0], without[metric])
        else:
            low, high = interval_of_draws(values[0], values[1:], n_groups, is_moved=metric in MOVED)
        if low is not None and high is not None:
            low, high = (float(limit) for limit in np.clip((low, high), *POSSIBLE[metric]))
        row |= {metric: _plain(values[0]), f"{metric}_low": low, f"{metric}_high": high}
    return row


@dataclass(frozen=True)
class Lead:
    """A difference with its 95% limits, None where there are none."""

    difference: float
    low: float | None
    high: float | None

    @property
    def is_ahead(self) -> bool | None:
        """Is the whole interval above 0?"""
        return None if self.low is None else self.low > 0

    @property
    def is_behind(self) -> bool | None:
        """Is the whole interval below 0?"""
        return None if self.high is None else self.high < 0


def smaller_lead(one: Lead, other: Lead) -> Lead:
    """Of one SAE over the better of two baselines: the smaller lead, with the smaller of both limits.

    The lower limit is above the truth no more often than that of one lead is, so nothing is corrected for there being
    two (an intersection-union test: Berger 1982, Technometrics 24, 295).
    """
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Lead(min(one.difference, other.difference), None, None)
    return Lead(min(one.difference, other.difference), min(one.low, other.low), min(one.high, other.high))


def _differences(
    members: Sequence[_Member],
    found: Sequence[dict[str, Floats]],
    without: Sequence[dict[str, Floats]],
    config: VersusConfig,
    n_groups: int,
) -> list[dict[str, Any]]:
    """Rows of differences.parquet: for each kind of baseline and metric the SAE minus it."""
    kinds: dict[str, list[int]] = {}
    for number, member in enumerate(members[1:], start=1):
        is_kind = member.kind not in ("trained", "imported")
        kinds.setdefault(member.kind if is_kind else f"{member.kind}: {member.run.name}", []).append(number)
    random = kinds.get(_RANDOM, [0] if members[0].kind == _RANDOM else [])  # untrained, it is no better than itself
    rows = []
    for kind, numbers in kinds.items():
        for metric in METRICS:
            lead_of = partial(_lead, found, without, metric, config, n_groups)
            lead, of_random, beyond = lead_of([0], numbers), _NO_LEAD, _NO_LEAD
            is_judged = metric in JUDGED and lead.low is not None
            if is_judged and random:
                beyond = smaller_lead(lead, lead_of([0], random))
                of_random = lead_of(random, numbers) if numbers != random else _NO_LEAD
            rows.append(
                {
                    "baseline": kind,
                    "n_baselines": len(numbers),
                    "metric": metric,
                    "sae": _plain(found[0][metric][0]),
                    "of_baseline": _plain(float(np.mean([found[number][metric][0] for number in numbers]))),
                    "difference": _plain(lead.difference),
                    "low": lead.low,
                    "high": lead.high,
                    "is_better": (beyond if random else lead).is_ahead if is_judged else None,
                    "is_worse": lead.is_behind if is_judged else None,
                    "is_ahead": lead.is_ahead if is_judged else None,
                    "random_lead": _plain(of_random.difference),
                    "random_lead_low": of_random.low,
                    "random_lead_high": of_random.high,
                    "beyond_random": _plain(beyond.difference),
                    "beyond_random_low": beyond.low,
                    "beyond_random_high": beyond.high,
                }
            )
    return rows


_NO_LEAD = Lead(float("nan"), None, None)


def _lead(
    found: Sequence[dict[str, Floats]],
    without: Sequence[dict[str, Floats]],
    metric: str,
    config: VersusConfig,
    n_groups: int,
    ours: Sequence[int],
    theirs: Sequence[int],
) -> Lead:
    """Mean of some SAEs minus mean of others, by their numbers: all of one kind, as if each draw took one of them."""
    our_draws, their_draws = (np.stack([found[number][metric] for number in each]) for each in (ours, theirs))
    observed = float(our_draws[:, 0].mean() - their_draws[:, 0].mean())
    if ours == theirs:
        return Lead(0.0, 0.0, 0.0) if np.isfinite(observed) else _NO_LEAD
    if metric in PURITIES:
        both = [
            np.stack([[found[number][metric][0], *without[number][metric]] for number in each])
            for each in (ours, theirs)
        ]
        return Lead(observed, *interval_of_difference(*both))
    columns = 1 + np.arange(config.draws)
    our_which, their_which = (
        np.random.default_rng([config.seed, stream, len(each)]).integers(len(each), size=config.draws)
        for stream, each in ((4, ours), (2, theirs))
    )
    drawn = our_draws[our_which, columns] - their_draws[their_which, columns]
    return Lead(observed, *interval_of_draws(observed, drawn, n_groups, is_moved=metric in MOVED))


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _plan(members: Sequence[_Member], n_images: int, per_image: int, config: VersusConfig, device: str) -> str:
    sizes = [(int(each.header.spec["n_latents"]), int(each.header.spec["width"])) for each in members]
    work = sum(4.0 * n_images * per_image * n_latents * width for n_latents, width in sizes)
    n_latents, width = max(sizes)
    entries = n_images * min(n_latents, per_image * 64)
    n_bytes = 8 * n_latents * width + 25 * entries + 4 * (128 << 20) + 8 * n_images * (config.draws + width)
    n_bytes += (700 << 20) + 600 * max(each.store.spec.n_images for each in members)  # libraries, and the image table
    seconds = work / costs.speed(device) + len(members) * entries * config.draws * 2e-9
    return (
        f"plan: {len(members)} SAEs on {n_images:,} images of {per_image} tokens; time: about "
        f"{max(1, round(seconds)):,} s, memory: at most about {n_bytes / 1e9:.1f} GB"
    )


def _warnings(
    members: Sequence[_Member], config: VersusConfig, n_groups: int, unit: str, names: Sequence[str]
) -> list[str]:
    found = []
    if config.all_images:
        found.append("measured on all images, also those that the SAE or a baseline was trained on")
    if n_groups < _FEW_GROUPS:
        found.append(f"the intervals are over {n_groups} {unit}s, too few to trust them")
    if len(names) < 2:
        found.append(f"the images have no two values of {config.label}: label purity is not measured")
    for kind in _DRAWN_KINDS:
        if sum(each.kind == kind for each in members[1:]) == 1:
            found.append(
                f"one draw of {kind}: its interval does not contain how such baselines differ; make more with --seed"
            )
    ours = members[0]
    if ours.kind not in ("trained", "imported"):
        found.append(f"{ours.run.name} is itself a baseline ({ours.kind})")
    return found


def _warnings_of_leads(members: Sequence[_Member], differences: Sequence[dict[str, Any]]) -> list[str]:
    """Leads that say nothing of learning, or of which that is not known."""
    ahead = [row for row in differences if row["is_ahead"]]
    kinds = {each.kind for each in members}
    if _RANDOM not in kinds and ahead:
        return [
            "without a random baseline a lead cannot be told from that of untrained directions; make one with "
            f"cyto sae baseline CACHE -o random.sae --kind random --like {members[0].run.name}, and add "
            f"--baseline random.sae"
        ]
    return [lead_not_of_learning(row) for row in ahead if not row["is_better"]]


def _result(out: Path, *, was_complete: bool) -> VersusResult:
    store = ResultStore(out, VERSUS)
    return VersusResult(
        out=out,
        saes=store.table("saes").to_pylist(),
        differences=store.table("differences").to_pylist(),
        summary=dict((store.header.summary or {})["result"]),
        was_complete=was_complete,
    )
