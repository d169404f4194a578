"""What is on disk: formats, writers, readers, checks. numpy, zarr and pyarrow; no torch, no dask, no click.

The names of `__init__.pyi` are what others may use; each is loaded when it is asked for. Open first: `spec.py`.
"""

from .doors import open_door
from .machine import find_place_for_caches

find_place_for_caches()  # before numba compiles
if not __debug__:  # python -O
    from .without_asserts import mend_zarr

    mend_zarr()

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
