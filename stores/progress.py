"""How a long call tells how far it has come. What is shown of it, and how often, is for `cli.py` to say."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # done, in all, a word on the state; of what: the function's docstring
