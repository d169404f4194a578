"""From edits of images to effects of latents: means over patients, intervals, and ranks among controls.

An effect is the mean over patients of the mean over a patient's images, so no patient counts for more than another.
Intervals are over patients (a bootstrap, as for a probe's scores). A latent is held against the mean of its controls
without the tenth with the largest and the tenth with the smallest effect: among a hundred there are often one or two
that matter to the backbone by themselves, and these move a mean to many times what the others do. The median does not
centre on zero where no latent matters more than another: effects are skewed. A p-value is (1 + controls at least as
extreme) / (1 + controls), of the size of the change; of logits and probabilities, whose sign means something, of the
absolute value. Over several chosen latents it is adjusted by Holm's method, for each quantity on its own.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import trim_mean

from cytosae.probe import WIDER, draw_groups, interval
from stores.tables import column

from .config import AblateConfig
from .measure import CLS, Values
from .places import Ints, Owners
from .plan import CHOSEN, CONTROL, DIRECTION, KEEP, ORDERS, REMOVE, ROLES, Plan
from .survey import Floats, Survey

_TRIMMED = 0.1  # of the controls that count in no mean, at each end
SHARE = "share_of_all"  # of a curve: ||c' - c|| over what it is when all latents of the image are removed


def patient_means(values: Values, owners: Ints) -> Values:
    """(patients, columns): the mean of each patient's rows, patients by rising number."""
    names, which = np.unique(owners, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, which, values)
    found: Values = sums / np.bincount(which)[:, None]
    return found


def over_patients(values: Values, owners: Ints, seed: Sequence[int]) -> tuple[Values, int]:
    """(1 + draws, columns) means over patients, row 0 the data as they are; and the number of patients."""
    means = patient_means(values, owners)
    weights = draw_groups(np.arange(len(means)), seed).weights
    found: Values = weights @ means / len(means)
    return found, len(means)


def rank_latents(plan: Plan, values: Values, owners: Owners, chosen: Ints) -> Ints:
    """The chosen latents by the change of the final CLS, the largest first."""
    effects = _effects(plan, values, owners, CHOSEN)
    return chosen[np.argsort([-effects[latent, 0][0] for latent in chosen.tolist()], kind="stable")]


def effect_table(
    plan: Plan,
    values: Values,
    quantities: Sequence[str],
    owners: Owners,
    survey: Survey,
    norms: Floats,
    controls_of: dict[int, Ints],
    config: AblateConfig,
) -> pa.Table:
    """A row for each chosen latent and quantity."""
    controls = _effects(plan, values, owners, CONTROL)
    directions = _effects(plan, values, owners, DIRECTION)
    rows = []
    for latent, matched in controls_of.items():
        mine = np.flatnonzero((plan.role == CHOSEN) & (plan.what == latent))
        of_image = owners.of_image[plan.image[mine]]
        draws, n_patients = over_patients(values[mine], of_image, [config.seed, latent, 3])
        others = np.array([controls[control, 0] for control in matched.tolist()])
        by_lot = np.array([directions[latent, number] for number in range(config.n_directions)])
        by_lot = by_lot.reshape(config.n_directions, len(quantities))
        picks = np.random.default_rng([config.seed, latent, 4]).integers(
            len(others), size=(len(draws) - 1, len(others))
        )
        for at, quantity in enumerate(quantities):
            other = others[:, at]
            middles = np.append(trim_mean(other, _TRIMMED), trim_mean(other[picks], _TRIMMED, axis=1))
            signed = quantity not in CLS
            rows.append(
                {
                    "latent": latent,
                    "quantity": quantity,
                    "effect": draws[0, at],
                    **_limits(draws[:, at], n_patients),
                    "n_images": len(mine),
                    "n_patients": n_patients,
                    "n_images_active": int(survey.n_images_active[latent]),
                    "frequency": survey.n_images_active[latent] / survey.n_images,
                    "norm": norms[latent],
                    "n_controls": len(other),
                    **_spread(other, "control"),
                    "difference": draws[0, at] - middles[0],
                    **_limits(draws[:, at] - middles, n_patients, "difference_"),
                    "p": _p_value(draws[0, at], other, signed=signed),
                    **_spread(by_lot[:, at], "direction"),
                    "p_directions": _p_value(draws[0, at], by_lot[:, at], signed=signed),
                }
            )
    for quantity in quantities:
        some = [row for row in rows if row["quantity"] == quantity]
        for row, p in zip(some, holm([row["p"] for row in some]), strict=True):
            row["p_holm"] = p
    return pa.Table.from_pylist(rows)


def control_table(
    plan: Plan,
    values: Values,
    quantities: Sequence[str],
    owners: Owners,
    survey: Survey,
    norms: Floats,
    controls_of: dict[int, Ints],
) -> pa.Table:
    """A row for each chosen latent and each latent that it is held against, the nearest first."""
    effects = _effects(plan, values, owners, CONTROL)
    rows = [
        {
            "latent": latent,
            "control": control,
            "rank": rank,
            "n_images_active": int(survey.n_images_active[control]),
            "norm": float(norms[control]),
            **dict(zip(quantities, effects[control, 0].tolist(), strict=True)),
        }
        for latent, matched in controls_of.items()
        for rank, control in enumerate(matched.tolist(), start=1)
    ]
    return pa.Table.from_pylist(rows)


def curve_table(
    plan: Plan, values: Values, quantities: Sequence[str], owners: Owners, config: AblateConfig
) -> pa.Table:
    """A row for each order of latents, edit (remove or keep), k and quantity; and one with k 0: all are removed."""
    values, quantities = with_share(plan, values), [*quantities, SHARE]
    keys = np.unique(np.stack([plan.what, plan.role, plan.number], 1), axis=0)
    rows = []
    for what, role, number in keys.tolist():
        mine = np.flatnonzero((plan.what == what) & (plan.role == role) & (plan.number == number))
        for at, quantity in enumerate(quantities):
            some = mine[np.isfinite(values[mine, at])]
            if not len(some):
                continue
            of_image = owners.of_image[plan.image[some]]
            draws, n_patients = over_patients(values[some][:, [at]], of_image, [config.seed, 5])
            rows.append(
                {
                    "order": ORDERS[what] if number else "all",
                    "edit": ROLES[role],
                    "k": number,
                    "quantity": quantity,
                    "effect": draws[0, 0],
                    **_limits(draws[:, 0], n_patients),
                    "n_images": len(some),
                    "n_patients": n_patients,
                }
            )
    return pa.Table.from_pylist(rows)


def with_share(plan: Plan, values: Values) -> Values:
    """The values with one more column, `SHARE`; NaN where removing all latents changes nothing."""
    is_all = (plan.role == REMOVE) & (plan.number == 0)
    of_all = values[is_all, 1][np.searchsorted(plan.image[is_all], plan.image)]
    share = np.divide(values[:, 1], of_all, out=np.full(len(values), np.nan), where=of_all > 0)
    return np.column_stack([values, share])


def image_table(
    plans: Sequence[Plan], values: Sequence[Values], quantities: Sequence[str], images: pa.Table, owners: Owners
) -> pa.Table:
    """A row for each edit of each image."""
    image, role, what, number = (
        np.concatenate([getattr(plan, name) for plan in plans]) for name in ("image", "role", "what", "number")
    )
    ids = np.array([str(name) for name in column(images, "image_id")], object)
    names = np.array(owners.names, object)
    is_curve = np.isin(role, (REMOVE, KEEP))
    orders = np.where(number > 0, np.array(ORDERS, object)[np.where(is_curve, what, 0)], "all")
    found = {
        "image_id": pa.array(ids[image], pa.string()),
        "patient": pa.array(names[owners.of_image[image]], pa.string()),
        "edit": pa.array(np.array(ROLES, object)[role], pa.string()),
        "latent": pa.array(what, pa.int64(), mask=is_curve),
        "order": pa.array(orders, pa.string(), mask=~is_curve),
        "number": pa.array(number, pa.int64()),
    }
    every = np.concatenate(values)
    for at, name in enumerate(quantities):
        found[name] = pa.array(every[:, at], pa.float64(), mask=~np.isfinite(every[:, at]))
    return pa.table(found)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method."""
    values = np.array(p, np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    found = np.empty(len(values))
    found[order] = np.minimum(1, steps)
    return [float(each) for each in found]


def _effects(plan: Plan, values: Values, owners: Owners, role: int) -> dict[tuple[int, int], Values]:
    """(latent, number) -> (quantities,) means over patients, of the edits of one role."""
    mine = np.flatnonzero(plan.role == role)
    order = mine[np.lexsort((plan.number[mine], plan.what[mine]))]
    keys = np.stack([plan.what[order], plan.number[order]], 1)
    begins = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=-1), axis=1)) if len(keys) else np.zeros(0, np.int64)
    return {
        (int(plan.what[some[0]]), int(plan.number[some[0]])): patient_means(
            values[some], owners.of_image[plan.image[some]]
        ).mean(0)
        for some in np.split(order, begins[1:])
        if len(some)
    }


def _limits(draws: npt.NDArray[np.float64], n_patients: int, before: str = "") -> dict[str, float | None]:
    """The 95% interval; none of a single patient."""
    found = interval(draws, WIDER) if n_patients > 1 else {"low": None, "high": None}
    return {f"{before}{name}": value for name, value in found.items()}


def _spread(values: npt.NDArray[np.float64], name: str) -> dict[str, float | None]:
    """Mean, trimmed mean and 95% range of controls or directions."""
    known = values[np.isfinite(values)]
    if not len(known):
        return {f"{name}_{each}": None for each in ("mean", "trimmed", "low", "high")}
    low, high = np.quantile(known, [0.025, 0.975])
    return {
        f"{name}_mean": float(known.mean()),
        f"{name}_trimmed": float(trim_mean(known, _TRIMMED)),
        f"{name}_low": float(low),
        f"{name}_high": float(high),
    }


def _p_value(effect: float, others: npt.NDArray[np.float64], *, signed: bool) -> float | None:
    known = others[np.isfinite(others)]
    if not len(known):
        return None
    as_large = np.abs(known) >= abs(effect) if signed else known >= effect
    return float((1 + as_large.sum()) / (1 + len(known)))
