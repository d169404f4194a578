"""How often the host waits for a GPU: torch's own warnings about it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORDS = "called a synchronizing"  # torch also warns that the mode itself is a prototype


@contextmanager
def waits_of_the_host() -> Iterator[list[str]]:
    """A list that holds, behind the block, a warning for each time that the host waited in it.

    The mode is off again afterwards, also where warnings are errors.
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield said
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said += [str(warning.message) for warning in caught if _WORDS in str(warning.message)]
