"""Many calls of one command: a few at a time, answers taken in order, failures counted by reason."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .answers import Unfit
from .ask import Answerer, NoAnswer
from .config import AskConfig


@dataclass(frozen=True)
class Call:
    """One request, and what is done with its answer; `take` raises `Unfit` for one that is not as asked."""

    request: dict[str, Any]
    take: Callable[[dict[str, Any]], None]


@dataclass
class Tally:
    """How the calls went."""

    n_answered: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of calls without a usable answer
    gave_up: bool = False  # too many in a row

    @property
    def n_failed(self) -> int:
        """Calls without a usable answer."""
        return sum(self.reasons.values())


def ask_all(
    command: Answerer, calls: Iterable[Call], config: AskConfig, told: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """Make the calls; after `config.give_up` failures in a row no further one is made. `told` hears of each answer.

    Raises
    ------
    BadInput
        If there is no such program.
    """
    tally, streak = Tally(), 0
    waiting: deque[tuple[Call, Future[dict[str, Any]]]] = deque()
    pending = iter(calls)
    with ThreadPoolExecutor(config.at_once, thread_name_prefix="ask") as threads:
        try:
            while True:
                while len(waiting) < config.at_once and not tally.gave_up:
                    call = next(pending, None)
                    if call is None:
                        break
                    waiting.append((call, threads.submit(command.ask, call.request)))
                if not waiting:
                    return tally
                call, future = waiting.popleft()
                try:
                    call.take(future.result())
                    tally.n_answered += 1
                    streak = 0
                except (NoAnswer, Unfit) as error:
                    tally.reasons[str(error)] += 1
                    streak += 1
                    tally.gave_up |= streak >= config.give_up
                told(tally)
        except BaseException:
            command.stop()
            raise
