"""tau from the latents alone: `cyto barcode --tau auto`.

No label, patient or disease is looked at, only how large the stored values are (value_counts.py). The rule, its
parameters and the tau that came of them stand in the `spec` of the barcodes, what was counted in their `summary`: so
anybody can work it out again. Which rule, and against which others: docs/benchmarks.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cytosae.cluster import Watch, cluster_job
from stores.errors import BadInput, DamagedStore
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.spec import BARCODES, find_header, plain
from stores.token_sets import chosen_tokens

from . import tasks
from .partitions import plan_partitions
from .value_counts import SHIFT, ValueCounts, lower_edges

if TYPE_CHECKING:
    from distributed import Client

AUTO = "auto"
DIGITS = 3  # of the tau: short enough to be typed
KEEPS = 0.9  # of the latents that have any value: at least so many exceed tau
RULE: dict[str, Any] = {  # a tau of an equal rule is taken again, so a change of `choose_tau` needs another version
    "name": "otsu of logarithms, at least a share of the latents",
    "version": 1,
    "digits": DIGITS,
    "keeps": KEEPS,
}


@dataclass(frozen=True)
class TauChoice:
    """A tau, and how it came about."""

    tau: float
    rule: dict[str, Any]  # `RULE`, `words`, and what was counted; part of the barcodes' identity


def choose_tau(counts: ValueCounts) -> TauChoice:
    """The tau that separates weak from clear values; at least nine of ten latents keep a value above it.

    The number between the two groups of values whose logarithms differ most (Otsu 1979); 0 if all are alike. Weak
    activations, which an SAE makes at nearly every token, and clear ones differ by a factor, not by a distance: so
    logarithms. Of all places to cut, it is where the variance between the groups' means is largest: sizes n1, n2 and
    means m1, m2 of the logarithms, n1 n2 / (n1 + n2)^2 (m1 - m2)^2. The number is the largest one of three digits
    below the upper group. A few latents may have most of the large values, and alone exceed it: then the largest
    number of three digits is taken that `KEEPS` of the latents with any value exceed.

    counts : of at least one value
    """
    there = np.flatnonzero(counts.bins)
    middle = ((there.astype(np.uint32) << np.uint32(SHIFT)) + np.uint32(1 << (SHIFT - 1))).view(np.float32)
    logs, share = np.log(middle.astype(np.float64)), counts.bins[there] / counts.n_values
    mean = float((share * logs).sum())
    variance = float((share * (logs - mean) ** 2).sum())
    cut, between = 0.0, 0.0
    if len(there) > 1:
        low = np.cumsum(share)[:-1]
        apart = (mean * low - np.cumsum(share * logs)[:-1]) ** 2 / (low * (1 - low))
        place = int(np.argmax(apart))
        between = float(apart[place]) / variance
        cut = below(float(lower_edges()[there[place + 1]]), DIGITS)
    alive = np.sort(counts.largest[counts.largest > 0])[::-1]
    most = below(float(alive[math.ceil(KEEPS * len(alive)) - 1]), DIGITS)
    tau = min(cut, most)
    counted = {
        "n_values": counts.n_values,
        "n_tokens": counts.n_tokens,
        "n_latents_alive": counts.n_alive,
        "n_latents_remaining": counts.n_remaining(tau),
        "cut": cut,
        "share_of_variance_between": float(f"{between:.6g}"),
    }
    parts = (
        f"parts the {counts.n_values:,} values into weak and clear ones (Otsu's cut of their logarithms; "
        f"{between:.0%} of the variance lies between the two)"
    )
    instead = f"is the largest that {KEEPS:.0%} of the latents exceed; {cut:g} {parts}, but fewer latents exceed that"
    words = (
        f"{tau:g} {parts if tau == cut else instead}; {counts.n_remaining(tau):,} of {counts.n_alive:,} latents "
        f"exceed {tau:g}"
    )
    return TauChoice(tau, {**RULE, **counted, "words": words})


def tau_of(
    stores: Sequence[LatentStore],
    client: "Client",
    out: Path,
    token_set: str,
    partition_images: int | None,
    progress: Progress,
) -> TauChoice:
    """The tau of these latents by the rule; as barcodes of them at `out`, complete or not, say already, or counted.

    Raises
    ------
    BadInput
        If a store was pruned, or no latent is active at any token of the set.
    """
    for store in stores:
        if store.spec.min_activation:
            raise BadInput(
                f"{store.root} was pruned below {store.spec.min_activation:g}: tau auto looks at all values; encode "
                f"without --min-activation, or give a number with --tau"
            )
    out = out.absolute()
    latents = [store.identity for store in stores]
    for place in (out, out.with_name(f".{out.name}.new")):
        known = _known(place, latents[0] if len(latents) == 1 else latents, token_set)
        if known is not None:
            return known
    folder = next(parent for parent in out.parents if parent.is_dir())
    counts = count_values(
        stores, client, folder, token_set=token_set, partition_images=partition_images, progress=progress
    )
    if not counts.n_values:
        raise BadInput(f"no latent is active at any {token_set} token: there is no tau to choose")
    return choose_tau(counts)


def _known(place: Path, latents: str | list[str], token_set: str) -> TauChoice | None:
    """What the barcodes at `place` say, if they are of the same latents, tokens and rule."""
    try:
        header = find_header(place)
    except DamagedStore:
        return None
    spec = header.spec if header is not None and header.kind == BARCODES.kind else {}
    said, tau = spec.get("tau_rule"), spec.get("tau")
    if not isinstance(said, dict) or (spec.get("latents"), spec.get("token_set")) != (latents, token_set):
        return None
    is_same = {name: said.get(name) for name in RULE} == RULE
    return TauChoice(float(tau), plain(said)) if is_same and isinstance(tau, int | float) else None


def count_values(
    stores: Sequence[LatentStore],
    client: "Client",
    folder: Path,
    *,
    token_set: str,
    partition_images: int | None,
    progress: Progress,
) -> ValueCounts:
    """Count the values of all images of the stores, on the workers of `client`. Nothing is written.

    Memory of this process: a few numbers per latent, and 2 MiB for each partition that has just ended.
    folder : one that is there, which workers of a running cluster are checked to share
    """
    total = ValueCounts.zeros(stores[0].spec.n_latents)
    n_images, n_done = sum(store.spec.n_images for store in stores), 0
    watch = Watch(client, progress)
    with cluster_job(client, folder, {store.root: store.journal_sha256 for store in stores}):
        plan = list(plan_partitions(stores, folder / "no parts", client, n_taus=1, partition_images=partition_images))
        futures = {client.submit(tasks.scan_partition, each, token_set, pure=False): each for each in plan}
        watch.tell(0, n_images, "looking for tau")
        for future, found in watch.completed(list(futures)):
            total += found.whole()
            n_done += futures[future].stop - futures[future].start
            watch.tell(n_done, n_images, "looking for tau")
            future.release()
    n_set = len(chosen_tokens(token_set, stores[0].layout))
    n_readable = sum(int(store.readable().sum()) for store in stores)
    return ValueCounts(total.bins, total.largest, n_readable * n_set)


def smaller_taus(largest: npt.NDArray[np.float32], tau: float, share_above: float) -> list[list[float]]:
    """Where tau is too large: smaller ones of two digits, and how many latents exceed each; else nothing.

    Too large: under 1% of the stored values exceed it, or under half of the latents that have any. Those given keep
    half, 90% and 99% of these latents at least, and the last one, 0, all.

    largest : (n_latents,) the largest value of each
    """
    alive = np.sort(largest[largest > 0])[::-1].astype(np.float64)
    if not len(alive) or (share_above >= 0.01 and 2 * int((alive > np.float32(tau)).sum()) >= len(alive)):
        return []
    found = [0.0]
    for share in (0.99, 0.9, 0.5):
        found.append(below(float(alive[math.ceil(share * len(alive)) - 1])))
    kept = [each for each in sorted({*found}, reverse=True) if each < tau]
    return [[each, int((alive > np.float32(each)).sum())] for each in kept]


def below(value: float, digits: int = 2) -> float:
    """The largest number of so many digits that is smaller than `value` as float32; value above 0."""
    exponent = math.floor(math.log10(value)) + 1
    for unit in (
        10.0 ** (exponent - digits),
        10.0 ** (exponent - digits - 1),
    ):  # below a power of ten the next is finer
        steps = math.ceil(min(value / unit, 10.0**digits))
        while steps >= 10 ** (digits - 1):
            if np.float32(steps * unit) < np.float32(value):
                return float(f"{steps * unit:.{digits}g}")
            steps -= 1
    return 0.0
