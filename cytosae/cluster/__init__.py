"""Where Dask work runs, and whether its workers fit.

Comes in: the address of a scheduler, or nothing. Goes out: a Dask client whose workers run this version of the code.
Open first: `client.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
