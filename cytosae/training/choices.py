"""Width and L0 from the data where the settings say `auto`, and what is said of a run before it starts.

n_latents: expansion x width, with the largest expansion that is a power of two, at most 64 (the paper's), and leaves at
least `TOKENS_PER_LATENT` distinct tokens per latent; a token that comes again in the next pass is not another one.
L0: the power of two that is nearest to sqrt(width), from 8 to 64, but at most an eighth of the latents.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cytosae.sae import TrainConfig
from stores.errors import BadInput
from stores.wording import counted

from .budget import fewest_steps, first_step
from .data import TrainingData

TOKENS_PER_LATENT = 32
LARGEST_EXPANSION = 64
L0_RANGE = (8, 64)
_FEW_TOKENS_PER_LATENT = 8  # below it, a warning
_TIMED_STEPS = 5  # steps from which the time is estimated, without the first one, which also compiles and reads


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The settings of a run, with nothing left to choose but the end of tokens `auto`, and the reasons."""

    config: TrainConfig
    reasons: tuple[str, ...]  # a line for each setting that was `auto`
    warnings: tuple[str, ...]


def choose_settings(config: TrainConfig, data: TrainingData) -> Choices:
    """`config` with numbers for `expansion` and `target_l0`; for topk and batchtopk `target_l0` becomes `k`.

    Raises BadInput if `target_l0` is not below the number of latents.
    """
    reasons, n_tokens, width = [], data.stream.tokens_per_epoch, data.width
    expansion = auto_expansion(n_tokens, width) if config.expansion == "auto" else config.expansion
    n_latents = expansion * width
    if config.expansion == "auto":
        what = {LARGEST_EXPANSION: "the largest", 1: "the smallest"}.get(expansion, "a power of two")
        reasons.append(
            f"width: {n_latents:,} latents, expansion {expansion} ({what}; {n_tokens:,} distinct tokens are "
            f"{n_tokens / n_latents:,.0f} per latent, {TOKENS_PER_LATENT} or more are wanted)"
        )
    target = config.target_l0
    if target == "auto":
        target = float(min(auto_l0(width), max(1, n_latents // 8)))
        reasons.append(f"L0: {target:g} active latents per token (from the root of the tokens' width, {width:,})")
    if target is not None and target >= n_latents:
        raise BadInput(
            f"target_l0 {target:g} is not below the number of latents, {n_latents:,}; lower it, or raise --expansion"
        )
    is_k = config.takes_k and target is not None
    config = dataclasses.replace(
        config,
        expansion=expansion,
        k=max(1, round(target)) if is_k and target is not None else config.k,
        target_l0=None if is_k else target,
    )
    return Choices(config=config, reasons=tuple(reasons), warnings=tuple(_warnings(config, n_tokens, width)))


def auto_expansion(n_tokens: int, width: int) -> int:
    """Latents per channel for so many distinct tokens of this width: 1, 2, 4, ... 64."""
    most = n_tokens / (TOKENS_PER_LATENT * width)
    return min(LARGEST_EXPANSION, 2 ** max(0, math.floor(math.log2(most)))) if most > 0 else 1


def auto_l0(width: int) -> int:
    """Active latents per token for tokens of this width: 8, 16, 32 or 64."""
    least, most = L0_RANGE
    return min(most, max(least, 2 ** round(math.log2(width) / 2)))


def plan_lines(choices: Choices, data: TrainingData, n_steps: int) -> Iterator[str]:
    """Tokens, passes and steps of a run, the reasons for what was chosen.

    n_steps : of the run; with tokens `auto` the largest number
    """
    config, n_tokens = choices.config, data.stream.tokens_per_epoch
    yield (
        f"data: {n_tokens:,} tokens of {counted(data.chosen.n_train, 'image')} to train on, "
        f"{counted(data.chosen.n_held_out, 'image')} held out"
    )
    yield from choices.reasons
    if config.tokens == "auto":
        least = _amount(fewest_steps(config, 0, n_steps), config, n_tokens)
        yield f"budget: until error and L0 of held-out images have settled; at least {least}"
        yield f"budget: at most {_amount(n_steps, config, n_tokens)}"
    else:
        yield f"budget: {_amount(n_steps, config, n_tokens)}"


class StepClock:
    """Estimates the time of a run from its first steps."""

    def __init__(self, config: TrainConfig, step: int, n_steps: int) -> None:
        """Begin before step `step` of `n_steps`, or, with tokens `auto`, of at most so many."""
        self._config, self._first, self._n_steps = config, step, n_steps
        self._began = 0.0

    def lines(self, step: int) -> Iterator[str]:
        """Called after each step with the number of steps taken: one line, once enough of them are timed."""
        if step == self._first + 1:
            self._began = time.perf_counter()
        elif step == self._first + 1 + _TIMED_STEPS:
            seconds = (time.perf_counter() - self._began) / _TIMED_STEPS
            yield f"time: {seconds:.2g} s per step, {self._in_all(seconds, step)}"

    def _in_all(self, seconds: float, step: int) -> str:
        most = duration((self._n_steps - step) * seconds)
        if self._config.tokens != "auto":
            return f"{most} in all"
        least = fewest_steps(self._config, step, self._n_steps) - step
        return f"at least {duration(least * seconds)} (at most {most}, if it never settles)"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if name == "h" else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"


def _amount(n_steps: int, config: TrainConfig, tokens_per_epoch: int) -> str:
    n_tokens = n_steps * config.batch_tokens
    passes = n_tokens / tokens_per_epoch
    return f"{n_tokens:,} tokens = {n_steps:,} steps of {config.batch_tokens:,} = {passes:,.1f} passes"


def _warnings(config: TrainConfig, n_tokens: int, width: int) -> Iterator[str]:
    if config.warning:
        yield config.warning
    assert config.expansion != "auto"
    n_latents, fits = config.expansion * width, auto_expansion(n_tokens, width)
    if n_tokens < _FEW_TOKENS_PER_LATENT * n_latents and fits < config.expansion:
        yield (
            f"{n_latents:,} latents for {n_tokens:,} distinct tokens: {n_tokens / n_latents:.2g} tokens per latent are "
            f"too few to learn what it means. --expansion {fits} fits this data, or take more images"
        )
    n_steps = config.n_steps(n_tokens)
    if config.tokens != "auto" and n_steps <= first_step(config):
        yield (
            f"the budget of {counted(n_steps, 'step')} ends within the warm-up of {first_step(config):,}: the SAE will "
            f"have learned little. Lower --warmup-steps or --batch-tokens, or raise --tokens (auto finds it)"
        )
