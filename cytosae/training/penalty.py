"""`target_l0`: the weight of the sparsity term is steered until the running mean of L0 is what was asked, then held.

L0 falls when the weight rises, but only after the SAE's weights have followed, some dozens of steps later. So the law
looks ahead: where L0 falls already, the weight does not rise any more. In every step, with K the wanted L0 and L0 that
of the batch,

    mean   *= (L0 / mean) ** (1 / 50)                the running mean, geometric (jumprelu: mean += (L0 - mean) / 50)
    recent += (log L0 - recent) / 6
    before += (log L0 - before) / 24
    gap     = recent - log K + LOOK_AHEAD x (1 + many) / 2 x (recent - before)
    weight *= exp(pace x min(MOST, max(-MOST, GAIN x gap)))     not while it is held; GAIN / many where gap < 0

pace is the learning rate as a share of its largest value: what cannot move the SAE does not move the weight either. The
weight is held when `mean` and `recent` have been near K for `STEADY` steps, and steered again when the running mean has
left the wider band. All of it follows from the L0 of the batches, which is equal on all ranks. The running mean is
geometric since L0 begins at half of the latents, by which an arithmetic one would be off for 300 steps.

many is 1 up to a K of `MANY`, then K / MANY, at most 2. The more latents stay active, the shorter is the way down, and
a weight that has grown on it is too high for long: so one looks further ahead. Where L0 has fallen below K, the weight
falls more slowly: latents come back late, and L0 rises by itself while the learning rate decays.

The first weight is in the unit of the loss and of the tokens: an active latent costs a small share of what it can gain.
For relu and gated that share is smaller where K is above `MANY`. A weight that is too high would drive L0 below K, and
at a high learning rate it would stay there, even without any penalty. So one law serves every loss, activation and
width.

Thresholds of jumprelu move slowly, by about the learning rate per step, in proportion, and a penalty can only raise
them, while L0 falls by itself as latents learn. So they start where `FIRST_L0` x K latents per token are active; the
window of their gradient is `jump_bandwidth / jump_threshold` times as wide as they are large. They are steered, too,
both ways, behind the weights' own step, all by the same factor: from `FIRST_L0` x K down to K, and down again where L0
has fallen too far, which no penalty can undo:

    threshold *= exp(speed x min(MOST, max(-MOST, SHIFT_GAIN x (recent - log K))))      held or not

speed is the learning rate over 1e-3, at most 1. L0 answers to that at once, so that it needs no look-ahead. The weight
then decides how thresholds differ.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from cytosae.sae import SparseAutoencoder, TrainConfig

from .losses import loss_weight

MEAN_STEPS, RECENT_STEPS, BEFORE_STEPS = 50, 6, 24  # time constants of the means
LOOK_AHEAD = 3.0  # the two means of the logarithm are 18 steps apart in age: so much, times 18 steps
GAIN, MOST = 0.04, 0.03  # per step, of the logarithm of the weight; MOST is the largest step
MANY = 32  # K from which it looks further ahead, and the first share of relu and gated is FIRST_SHARE x MANY / K
SHIFT_GAIN = 0.05  # per step, of the logarithm of jumprelu's thresholds, by at most MOST
_FULL_SPEED = 1e-3  # the learning rate at which thresholds move as fast
PROMISED_WITHIN = 0.1  # of |mean / K - 1|
HOLD_WITHIN, RELEASE_BEYOND = 0.05, 0.08  # of |log(mean / K)|
_HOLD_RECENT_WITHIN = 0.08
STEADY = 20  # steps near K before the weight is held
FIRST_SHARE = 0.02  # the weight grows faster than latents that it has killed come back: rather too low at first
FIRST_L0 = 4  # jumprelu, in K, but at most half of the latents
_LEAST_WEIGHT = 1e-30  # tokens that are all equal leave nothing to gain
_LEAST_L0 = 0.01  # of K: an L0 of 0 has no logarithm
_THRESHOLD_TOKENS = 1_024  # from which the first thresholds are taken
_FIELDS = ("target", "weight", "bandwidth", "mean", "recent", "before", "n_near", "held_since", "n_releases")


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """A steered weight between two steps. `after` gives the next one; nothing changes in place."""

    target: float  # K
    weight: float  # of the sparsity term in the next step: `l1_weight` in the metrics, `l1` in sae.json
    bandwidth: float | None = None  # jumprelu: the width of the window
    mean: float | None = None  # running mean of L0; None: no step was taken
    recent: float | None = None  # means of log L0
    before: float | None = None
    n_near: int = 0  # steps in a row with both means near K
    held_since: int | None = None  # the step since which it is held; None: it is steered
    n_releases: int = 0  # how often it was held and steered again

    @property
    def is_held(self) -> bool:
        """True while the weight stays as it is."""
        return self.held_since is not None

    @property
    def is_reached(self) -> bool:
        """True if the running mean of L0 is within 10% of K."""
        return self.mean is not None and abs(self.mean / self.target - 1) <= PROMISED_WITHIN

    def after(self, l0: float, *, step: int, pace: float) -> "Penalty":
        """The penalty behind a step with this L0 of the batch.

        step : steps taken, that one included
        pace : its learning rate as a share of the largest one, 0 to 1
        """
        l0 = max(l0, _LEAST_L0 * self.target)
        if self.bandwidth is not None:
            mean = _nearer(self.mean, l0, step, MEAN_STEPS)
        else:
            mean = l0 if self.mean is None else self.mean * (l0 / self.mean) ** (1 / min(step, MEAN_STEPS))
        recent = _nearer(self.recent, math.log(l0), step, RECENT_STEPS)
        before = _nearer(self.before, math.log(l0), step, BEFORE_STEPS)
        off, off_now = math.log(mean / self.target), recent - math.log(self.target)
        is_near = abs(off) <= HOLD_WITHIN and abs(off_now) <= _HOLD_RECENT_WITHIN
        found = replace(self, mean=mean, recent=recent, before=before, n_near=self.n_near + 1 if is_near else 0)
        if self.is_held:
            is_released = abs(off) > RELEASE_BEYOND
            return replace(found, held_since=None, n_releases=self.n_releases + 1) if is_released else found
        if found.n_near >= STEADY:
            return replace(found, held_since=step)
        many = min(2.0, max(1.0, self.target / MANY))
        gap = off_now + LOOK_AHEAD * (1 + many) / 2 * (recent - before)
        speed = min(MOST, max(-MOST, (GAIN / many if gap < 0 else GAIN) * gap))
        return replace(found, weight=self.weight * math.exp(pace * speed))

    def threshold_shift(self, lr: float) -> float:
        """What is added to the logarithm of every threshold of jumprelu behind a step with this learning rate.

        0 for an SAE without thresholds.
        """
        if self.bandwidth is None or self.recent is None:
            return 0.0
        gap = self.recent - math.log(self.target)
        return min(1.0, lr / _FULL_SPEED) * min(MOST, max(-MOST, SHIFT_GAIN * gap))

    def to_tensor(self) -> torch.Tensor:
        """All of it as float64, exactly, for the saved state; NaN for None."""
        return torch.tensor([_number(getattr(self, name)) for name in _FIELDS], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: torch.Tensor) -> "Penalty":
        """What `to_tensor` wrote."""
        found: dict[str, Any] = dict(zip(_FIELDS, values.tolist(), strict=True))
        found = {name: None if math.isnan(value) else value for name, value in found.items()}
        whole = {name: int(found[name]) for name in ("n_near", "held_since", "n_releases") if found[name] is not None}
        return cls(**{**found, **whole})

    def to_summary(self, metrics: list[dict[str, float | None]]) -> dict[str, Any]:
        """What `sae.json` says of it, with its course: at most 100 rows of the metrics, evenly over the run."""
        every = max(1, -(-len(metrics) // 100))
        rows = [row for number, row in enumerate(metrics, start=1) if number % every == 0 or number == len(metrics)]
        return {
            "target_l0": self.target,
            "l1": self.weight,
            "running_mean_l0": self.mean,
            "held_since_step": self.held_since,
            "n_releases": self.n_releases,
            "course": [{name: row[name] for name in ("step", "l1_weight", "l0", "l0_mean")} for row in rows],
        }


@torch.no_grad()
def begin_steering(
    model: SparseAutoencoder, config: TrainConfig, tokens_ND: torch.Tensor, *, goes_on: bool = False
) -> Penalty:
    """The penalty of step 0; jumprelu also gets its first thresholds, in place.

    A latent that takes over the part c of a token's residual r gains at most 2 w ||r|| / D per unit of activation, and
    w ||r||^2 / D in all, with w the weight of the loss. relu and gated pay per unit, jumprelu per latent.

    model : with its first weights
    tokens_ND : (N, D) some tokens, scaled as in training
    goes_on : the weights are those of an SAE that was trained: its thresholds stay
    """
    assert config.target_l0 is not None
    assert config.target_l0 != "auto"
    residual_N1 = (tokens_ND - model.b_dec).norm(dim=1, keepdim=True).double()
    of_loss = loss_weight(tokens_ND, config.loss)
    bandwidth = None
    if config.activation == "jumprelu":
        gain = (of_loss * residual_N1.square()).mean() * FIRST_SHARE**2
        if goes_on:
            threshold = math.exp(float(model.log_threshold.mean()))
        else:
            some_ND = tokens_ND[:_THRESHOLD_TOKENS]
            n_active = max(1, round(min(FIRST_L0 * config.target_l0, model.n_latents / 2) * len(some_ND)))
            threshold = float(model.pre_activations(some_ND).flatten().topk(n_active).values[-1])
            model.log_threshold.fill_(math.log(max(threshold, config.jump_threshold)))
        bandwidth = max(threshold, config.jump_threshold) * config.jump_bandwidth / config.jump_threshold
    else:
        share = FIRST_SHARE * min(1.0, MANY / config.target_l0)
        gain = (of_loss * residual_N1).mean() * 2 * share
    weight = max(float(gain) / tokens_ND.shape[1], _LEAST_WEIGHT)
    return Penalty(target=float(config.target_l0), weight=weight, bandwidth=bandwidth)


def _nearer(mean: float | None, value: float, step: int, steps: int) -> float:
    """The running mean over about so many steps, with one more value; a plain mean while there are fewer."""
    return value if mean is None else mean + (value - mean) / min(step, steps)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
