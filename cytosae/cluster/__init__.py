"""Where Dask work runs, and whether its workers fit.

Comes in: the address of a scheduler, or nothing. Goes out: a Dask client whose workers run this version of the code.
Open first: `client.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
