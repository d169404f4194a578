"""Which latents differ between two diseases.

Comes in: barcodes. Goes out: differences with permutation p-values, intervals and figures.
Open first: `differential.py`.
"""

from stores.doors import make_callable, open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
make_callable(__name__, "compare")
