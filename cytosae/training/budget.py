"""`tokens = "auto"`: a run ends when the error and L0 of held-out images have settled.

From time to time the SAE is measured on the same `WATCHED_TOKENS` tokens, at most, of held-out images: every 20 steps,
and half as often whenever the number of steps has doubled (`check_interval`). Steps count from the end of the warm-up.
The run has settled when, over the last quarter of its steps against the quarter before,

    the mean error has fallen by less than `LEAST_GAIN`, or by less than `LEAST_SHARE` of the variance, and
    the mean L0 has changed by less than `L0_CHANGE`,

and a steered L0 is within 10% of what is wanted (penalty.py). What is said of L0 counts for the first `GIVE_UP` steps
only, so that a run also ends where L0 cannot come there, or jumps about. The variance is the error of the mean token:
where almost all of it is explained, the small rest may go on falling for hours, and latents die meanwhile. Quarters
grow with the run, so the rule asks: does half as much training again bring anything? Then the learning rate decays
(`TrainConfig.end_after`), and the run ends. A run that never settles ends, decayed, at the largest budget. The decision
depends on the steps only, never on time: a run that is continued decides the same, and so does every rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cytosae.sae import Active, SparseAutoencoder, TrainConfig
from stores.errors import DamagedStore
from stores.token_sets import chosen_tokens

from .data import TrainingData
from .distributed import Ranks
from .losses import loss_weight
from .measured_latents import MeasuredLatents

_SHORTEST_INTERVAL, _SHORT_UNTIL = 20, 1_280  # steps between two checks, and until when they are so few
WATCHED_TOKENS = 8_192
LEAST_STEPS = 200  # behind the warm-up, before the first decision
GIVE_UP = 1_500  # behind the warm-up: L0 is where it can be, and only the error counts
LEAST_GAIN, L0_CHANGE = 0.01, 0.05
LEAST_SHARE = 0.002  # more of the variance, which is what 1% of the error is where 80% are explained
FIRST_GUESS, MOST_FORESEEN = 2, 8  # times the fewest steps, times the steps so far
_MICRO_BATCH_BYTES = 128 << 20  # of one dense (tokens, latents) float32 matrix


@dataclass(frozen=True)
class Check:
    """The watched tokens at one step."""

    step: int
    error: float  # as in training: the mean of w_x (x_hat - x)^2 (losses.py)
    l0: float


@dataclass(frozen=True)
class Budget:
    """How far a run goes, as known between two steps. `after` gives the next one; nothing changes in place."""

    end: int | None = None  # the number of steps; None: still open (or given by the settings)
    settled_at: int | None = None  # the step of the deciding check
    checks: tuple[Check, ...] = ()

    def is_due(self, step: int) -> bool:
        """Is there a check before the step that follows `step` steps?"""
        is_known = bool(self.checks) and self.checks[-1].step == step  # the run was interrupted behind the check
        return step > 0 and step % check_interval(step) == 0 and not is_known

    def after(self, check: Check, config: TrainConfig, variance: float, *, most: int, is_steady: bool) -> "Budget":
        """With one more check; `end` is known once they have settled.

        variance : of the watched tokens (`Watch.variance`)
        most : the largest number of steps
        is_steady : False while a steered L0 is not where it is wanted
        """
        found = replace(self, checks=(*self.checks, check))
        first = first_step(config)
        is_ready = is_steady or check.step >= first + GIVE_UP
        if self.end is not None or not is_ready or not has_settled(found.checks, first, variance):
            return found
        return replace(found, end=config.end_after(check.step, most), settled_at=check.step)

    def to_tensor(self) -> torch.Tensor:
        """The checks as float64, exactly, for the saved state; the first row holds what is decided, NaN for None."""
        decided = [math.nan if value is None else value for value in (self.end, self.settled_at, 0)]
        rows = [decided, *([check.step, check.error, check.l0] for check in self.checks)]
        return torch.tensor(rows, dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: torch.Tensor) -> "Budget":
        """What `to_tensor` wrote."""
        (end, settled_at, _), *rows = values.tolist()
        return cls(
            end=None if math.isnan(end) else int(end),
            settled_at=None if math.isnan(settled_at) else int(settled_at),
            checks=tuple(Check(int(step), error, l0) for step, error, l0 in rows),
        )

    def to_summary(self) -> dict[str, Any]:
        """What `sae.json` says of it: the rule with its numbers, and at most 100 checks, evenly over the run."""
        kept = self.checks[:: max(1, -(-len(self.checks) // 100))]
        return {
            "rule": f"error of held-out images fell by less than {LEAST_GAIN:.0%}, or {LEAST_SHARE:.1%} of the "
            f"variance, over the last quarter of the steps, and L0 changed by less than {L0_CHANGE:.0%}",
            "settled_at_step": self.settled_at,
            "checks": [vars(check) for check in kept],
        }


def has_settled(checks: Sequence[Check], first_step: int, variance: float) -> bool:
    """Have error and L0 settled at the last of these checks?

    first_step : from which steps count
    variance : the error of the mean token
    """
    steps = checks[-1].step - first_step
    if steps < LEAST_STEPS:
        return False
    before, last = _quarters(checks, steps)
    if not before:  # late in a run checks are rare: after a long warm-up, a quarter may have none yet
        return False
    error_before, error = _mean([check.error for check in before]), _mean([check.error for check in last])
    is_flat = error_before - error < max(LEAST_GAIN * error_before, LEAST_SHARE * variance)
    change = _mean([check.l0 for check in last]) / max(1e-9, _mean([check.l0 for check in before])) - 1
    return is_flat and (abs(change) < L0_CHANGE or steps >= GIVE_UP)


def foreseen_steps(checks: Sequence[Check], config: TrainConfig, variance: float, step: int, most: int) -> int:
    """The number of steps of a run after `step` steps that has not settled, as its error falls now; for progress only.

    An error that falls as steps^-p gains a (s / t)^p-th of the gain at step s at step t > s.
    """
    least, first = fewest_steps(config, step, most), first_step(config)
    steps = checks[-1].step - first if checks else 0
    quarters = _quarters(checks, steps) if steps >= LEAST_STEPS else ([], [])
    if not all(quarters):
        return min(most, FIRST_GUESS * least)
    before, last = (_mean([check.error for check in part]) for part in quarters)
    wanted = max(LEAST_GAIN * before, LEAST_SHARE * variance)
    if not before - last > wanted or last <= 0:
        return least
    power = math.log(before / last) / math.log(7 / 5)  # the middles of the two quarters
    times = min(MOST_FORESEEN, ((before - last) / wanted) ** (1 / power))
    return max(least, config.end_after(min(first + round(times * steps), most), most))


def _quarters(checks: Sequence[Check], steps: int) -> tuple[list[Check], list[Check]]:
    """The checks of the last quarter but one of so many steps, and of the last one."""
    now, quarter = checks[-1].step, steps / 4
    last = [check for check in checks if check.step > now - quarter]
    before = [check for check in checks if now - 2 * quarter < check.step <= now - quarter]
    return before, last


def first_step(config: TrainConfig) -> int:
    """The step at which learning rate and penalty have warmed up."""
    return max(config.warmup_steps, config.l1_warmup_steps)


def fewest_steps(config: TrainConfig, step: int, most: int) -> int:
    """The smallest number of steps of a run that has not settled after `step` steps.

    most : the largest number
    """
    decides = max(first_step(config) + LEAST_STEPS, step + 1)
    next_check = math.ceil(decides / check_interval(decides)) * check_interval(decides)
    return config.end_after(min(next_check, most), most)


def check_interval(step: int) -> int:
    """Steps between two checks around this step: 20 below step 1,280, 40 below 2,560, and so on."""
    return _SHORTEST_INTERVAL * 2 ** max(0, (step // _SHORT_UNTIL).bit_length())


class Watch:
    """The watched tokens. Every rank has its slice of them."""

    def __init__(self, data: TrainingData, config: TrainConfig, device: str, ranks: Ranks) -> None:
        """Read whole images, evenly over the held-out ones of all caches. Memory: 8,192 tokens, in float16."""
        tokens_ND = _watched_tokens(data, config)
        self._n, self._config, self._device, self._ranks = len(tokens_ND), config, device, ranks
        self._tokens_ND = tokens_ND[ranks.local_slice(len(tokens_ND))]
        self._variance = ranks.broadcast(
            _variance(tokens_ND, config)
        )  # processors round differently; ranks decide alike

    def variance(self, token_scale: float) -> float:
        """The error of the mean token, as `Check.error` counts, which is what an SAE can explain."""
        # w_x (x - mean)^2 with x scaled: "normed" divides by the norm, and grows as the scale, the others as its square
        return self._variance * token_scale ** (1 if self._config.loss == "normed" else 2)

    @torch.no_grad()
    def check(self, model: SparseAutoencoder, step: int, token_scale: float) -> Check:
        """Measure the SAE as it is after `step` steps."""
        sums, latents = torch.zeros(2, dtype=torch.float64, device=self._device), MeasuredLatents(model)
        for part_BD in self._tokens_ND.split(max(1, _MICRO_BATCH_BYTES // (4 * model.n_latents))):
            x_BD = part_BD.to(self._device).float() * token_scale
            z = latents.of(x_BD)
            error_BD = (latents.decoded(z) - x_BD).square() * loss_weight(x_BD, self._config.loss)
            sums[0] += error_BD.sum(dtype=torch.float64)
            sums[1] += len(z.values) if isinstance(z, Active) else (z > 0).sum()
        self._ranks.all_reduce_sum_(sums)
        error, n_active = sums.tolist()
        return Check(step, error / (self._n * model.width), n_active / self._n)


def _watched_tokens(data: TrainingData, config: TrainConfig) -> torch.Tensor:
    """(N, D) float16, read once for all SAEs of a sweep with these images."""
    if config.token_set not in data.watched:
        every = data.chosen.n_held_out / max(1, WATCHED_TOKENS // data.stream.tokens_per_image)
        tokens, first = [], 0  # `first`: held-out images of the caches before
        keep = data.background.keep if data.background else [None] * len(data.stores)
        chosen = chosen_tokens(config.token_set, data.stores[0].spec.layout)
        for store, mask, kept in zip(data.stores, data.chosen.held_out, keep, strict=True):
            images = np.flatnonzero(mask)
            is_taken = np.floor((first + np.arange(len(images)) + 1) / max(1.0, every)) > np.floor(
                (first + np.arange(len(images))) / max(1.0, every)
            )
            here_NTD = store.read_images(images[is_taken])[:, chosen.start : chosen.stop]
            if kept is not None:
                tokens.append(here_NTD[kept[images[is_taken]][:, chosen.start : chosen.stop]])
            else:
                tokens.append(here_NTD.reshape(-1, data.width))
            first += len(images)
        tokens_ND = np.concatenate(tokens)
        if not np.isfinite(tokens_ND).all():
            raise DamagedStore(
                "a token of a held-out image is NaN or infinite, and the image is a readable one. cyto cache verify "
                "lists every bad chunk"
            )
        data.watched[config.token_set] = torch.from_numpy(tokens_ND)
    return data.watched[config.token_set]


def _variance(tokens_ND: torch.Tensor, config: TrainConfig) -> float:
    """The mean of w_x (x - mean)^2, unscaled; in parts, so that 8,192 tokens are not held a second time as float64."""
    mean_D = tokens_ND.double().mean(0).float()
    parts = [part_ND.float() for part_ND in tokens_ND.split(1_024)]
    sums = [((part - mean_D).square() * loss_weight(part, config.loss)).sum(dtype=torch.float64) for part in parts]
    return math.fsum(map(float, sums)) / tokens_ND.numel()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
