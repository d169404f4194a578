"""The type of progress callbacks. The caller decides what is shown, and how often."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # done, total, state in words; the function's docstring gives the unit
