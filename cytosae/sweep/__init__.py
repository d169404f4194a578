"""Train many SAEs on the same batches.

Comes in: a grid of settings and token activations. Goes out: a folder of SAEs with tables and a figure.
Open first: `run.py`.
"""

from stores.doors import make_callable, open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
make_callable(__name__, "sweep")
