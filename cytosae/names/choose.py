"""Which images does an item show, and which are kept back so that its name can be tested on them?

Patients are divided once for all latents, at random within each dataset: items show images of one half, tests take
images of the other. Identical images count as of one patient. Of what a page elsewhere shows (the top images of the
concepts) none is taken for a test of that latent either, since a name may come from there.

Strong images are the strongest tenth of the active ones on their side, at least as many as are asked for. They and
weaker ones are held against images in which the latent is not active. Where there are not enough of these, since it is
active nearly everywhere, against the quarter of least activation; weaker ones are then of the upper half. Images are
taken patient by patient, so that one patient's slide does not speak for all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.probe import connected_groups
from stores.tables import STATUS_OK

from .config import INACTIVE, LABEL, LEAST, STRONG, WEAKER, DescribeConfig

Ints = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
SHOWN, TEST, NEITHER = 0, 1, -1  # sides
SIDES = {SHOWN: "shown", TEST: "test", NEITHER: ""}
_STRONG = 0.1  # share of the active images that are strong
_FEWEST = 4  # groups that can be divided
_TRIES = 16


@dataclass(frozen=True)
class Images:
    """All n images of the barcodes: who they are, and on which side."""

    ids: list[str]
    datasets: npt.NDArray[np.object_]
    labels: npt.NDArray[np.object_]  # "" where unknown
    group: Ints  # (n,) images of one patient, and identical images, have one number
    side: Ints  # (n,) SHOWN, TEST, or NEITHER of an unreadable image
    stratum: Ints  # (n,) dataset and, if inactive images are matched by label, the label
    by_group: dict[tuple[int, int], Ints]  # (side, group) -> its images, rising
    by_stratum: dict[tuple[int, int], Ints]
    n_patients: int  # 0: none is known
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The images of one latent, and why there is no test."""

    rows: list[dict[str, Any]]  # of images.parquet
    n_active: int  # on the shown side
    n_active_test: int
    reason: str | None  # there is no test


def divide_images(table: Any, config: DescribeConfig) -> Images:
    """Put every image on a side. `table`: the images of the barcodes, a data frame with image ids as its index.

    Where fewer than four patients are known, images are divided instead, which is said.
    """
    cells = {
        name: table[name].astype(str).to_numpy(object)
        for name in ("patient", "dataset", "status", "content_hash", "label")
        if name in table.columns
    }
    n = len(table)
    labels = cells.get("label", np.full(n, "", object))
    labels = np.where(np.isin(labels.astype(str), ("nan", "None")), "", labels)
    patients = [
        f"{dataset}/{patient}" if patient else ""
        for patient, dataset in zip(cells["patient"], cells["dataset"], strict=True)
    ]
    hashes = [str(each) for each in cells["content_hash"]]
    readable = cells["status"] == STATUS_OK
    group = divided = connected_groups([patients, hashes])
    doubts: tuple[str, ...] = ()
    if len(np.unique(group[readable])) < _FEWEST:
        divided = connected_groups([hashes])  # sides alone: images of one patient stay so for pairs and intervals
        known = len({*patients} - {""})
        doubts = (
            f"{known} patients are too few to be divided: shown and test images are of the same patients, so a score "
            f"says nothing about other patients",
        )
    codes = np.unique(cells["dataset"].astype(str), return_inverse=True)[1].astype(np.int64)
    rng = np.random.default_rng([config.seed, 0])
    side_of = np.full(int(divided.max(initial=-1)) + 1, NEITHER, np.int64)
    first = np.unique(divided[readable], return_index=True)
    of_dataset = codes[np.flatnonzero(readable)[first[1]]]  # of what is divided, that of its first image
    for code in np.unique(of_dataset):
        members = rng.permutation(first[0][of_dataset == code])
        half = (len(members) + int(rng.integers(2))) // 2
        side_of[members[:half]], side_of[members[half:]] = SHOWN, TEST
    side = np.where(readable, side_of[divided], NEITHER)
    stratum = codes
    if config.match == LABEL:
        keys = [f"{code}/{label}" for code, label in zip(codes, labels, strict=True)]
        stratum = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return Images(
        ids=[str(name) for name in table.index],
        datasets=cells["dataset"],
        labels=labels.astype(object),
        group=group,
        side=side,
        stratum=stratum,
        by_group=_members(side, group),
        by_stratum=_members(side, stratum),
        n_patients=len({patient for patient, ok in zip(patients, readable, strict=True) if ok} - {""}),
        doubts=doubts,
    )


def _members(side: Ints, of: Ints) -> dict[tuple[int, int], Ints]:
    """(side, number) -> images, rising; without unreadable ones."""
    order = np.lexsort((of, side))
    order = order[side[order] != NEITHER]
    if not len(order):
        return {}
    keys = np.column_stack([side[order], of[order]])
    starts = np.flatnonzero(np.r_[True, (np.diff(keys, axis=0) != 0).any(1)])
    pieces = np.split(order, starts[1:])
    return {(int(a), int(b)): np.sort(piece) for (a, b), piece in zip(keys[starts], pieces, strict=True)}


def choose_images(
    images: Images, latent: int, active: Ints, values: Float32s, known: Ints, config: DescribeConfig
) -> Choice:
    """The images of a latent's item and of its test.

    Parameters
    ----------
    active, values : images in which the latent is active, and its mean activation there
    known : images that other pages show for this latent, and that no test may have
    """
    rng = np.random.default_rng([config.seed, 1, latent])
    value_of = dict(zip(active.tolist(), values.tolist(), strict=True))
    is_active = np.zeros(len(images.ids), bool)
    is_active[active] = True
    rows: list[dict[str, Any]] = []
    found: dict[int, int] = {}
    for side, n_strong, n_weaker, n_inactive in (
        (SHOWN, config.n_shown, config.n_shown // 2, config.n_shown // 2),
        (TEST, -(-config.n_test // 2), config.n_test // 2, config.n_test),
    ):
        is_mine = images.side[active] == side
        if side == TEST:
            is_mine &= ~np.isin(active, known)
        mine = active[is_mine]
        found[side] = len(mine)
        strengths = np.array([value_of[image] for image in mine.tolist()])
        mine = mine[np.lexsort((mine, -strengths))]  # the strongest first
        n_pool = max(n_strong, round(_STRONG * len(mine)))
        strong, rest = mine[:n_pool], mine[n_pool:]
        against, kind = (images.side == side) & ~is_active, INACTIVE
        if int(against.sum()) < n_inactive:
            against, kind = _least_active(images, side, active, values), LEAST
            rest = mine[n_pool : int((images.side == side).sum()) // 2]
            strong, rest = strong[~against[strong]], rest[~against[rest]]
        if side == SHOWN:
            picked = _spread(strong, images.group)[:n_strong]
        else:
            picked = _spread(rng.permutation(strong), images.group)[:n_strong]
        weaker = _spread(rng.permutation(rest), images.group)[:n_weaker]
        like = np.concatenate([picked, weaker])[:n_inactive] if side == TEST else picked[:n_inactive]
        inactive = _matched(images, side, like, against, config, rng)
        described = [
            *((int(image), STRONG, None) for image in picked),
            *((int(image), WEAKER, None) for image in weaker),
            *((image, kind, how) for image, how in inactive),
        ]
        if side == TEST and (len(picked) + len(weaker) < config.min_test or len(inactive) < config.min_test):
            described = []
        order = np.arange(len(described)) if side == SHOWN else rng.permutation(len(described))
        for number, at in enumerate(order.tolist(), start=1):  # in a test, the order says nothing
            image, row, how = described[at]
            rows.append(
                {
                    "latent": latent,
                    "side": SIDES[side],
                    "number": number,
                    "row": row,
                    "image_id": images.ids[image],
                    "image_index": image,
                    "patient_group": int(images.group[image]),
                    "activation": value_of.get(image, 0.0),
                    "matched_by": how,
                }
            )
    return Choice(rows, found[SHOWN], found[TEST], _reason(rows, found[TEST], config))


def _reason(rows: list[dict[str, Any]], n_active_test: int, config: DescribeConfig) -> str | None:
    if any(row["side"] == SIDES[TEST] for row in rows):
        return None
    if n_active_test < config.min_test:
        return f"active in {n_active_test} test images only, {config.min_test} are needed"
    return "too few test images to hold the active ones against"


def _least_active(images: Images, side: int, active: Ints, values: Float32s) -> npt.NDArray[np.bool_]:
    """(n,) the quarter of the images of a side in which a latent is least active; ties: the later image is left out."""
    strength = np.zeros(len(images.ids))
    strength[active] = values
    members = np.flatnonzero(images.side == side)
    found = np.zeros(len(images.ids), bool)
    found[members[np.argsort(strength[members], kind="stable")[: len(members) // 4]]] = True
    return found


def _spread(candidates: Ints, groups: Ints) -> Ints:
    """The candidates in another order: the first of each group, then the second of each, and so on."""
    seen: dict[int, int] = {}
    turn = []
    for group in groups[candidates].tolist():
        turn.append(seen.get(group, 0))
        seen[group] = turn[-1] + 1
    return candidates[np.argsort(np.array(turn, np.int64), kind="stable")]


def _matched(
    images: Images,
    side: int,
    like: Ints,
    against: npt.NDArray[np.bool_],
    config: DescribeConfig,
    rng: np.random.Generator,
) -> list[tuple[int, str]]:
    """For each image of `like` one of those to hold it against, and what both have in common; none twice."""
    used: set[int] = set()
    found: list[tuple[int, str]] = []
    everywhere = np.flatnonzero(images.side == side)
    for image in like.tolist():
        of_stratum = images.by_stratum.get((side, int(images.stratum[image])), everywhere[:0])
        ways = [(of_stratum, "label" if config.match == LABEL else "dataset")]
        if config.match != LABEL:
            ways = [(images.by_group.get((side, int(images.group[image])), everywhere[:0]), "patient"), *ways]
            ways.append((everywhere, "nothing"))
        for members, how in ways:
            chosen = _draw(members, against, used, rng)
            if chosen is not None:
                used.add(chosen)
                found.append((chosen, how))
                break
    return found


def _draw(members: Ints, against: npt.NDArray[np.bool_], used: set[int], rng: np.random.Generator) -> int | None:
    """One of the members at random that is wanted and not used; None if there is none."""
    for at in rng.integers(len(members), size=_TRIES if len(members) else 0).tolist():  # mostly an early try will do
        if against[members[at]] and int(members[at]) not in used:
            return int(members[at])
    free = [one for one in members[against[members]].tolist() if one not in used]
    return free[int(rng.integers(len(free)))] if free else None
