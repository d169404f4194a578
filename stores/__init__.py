"""The stores on disk: formats, writers, readers, checks. Needs numpy, zarr and pyarrow; no torch, Dask or click.

Other packages use the names in `__init__.pyi`; each is imported on first use. Open first: `spec.py`.
"""

from .doors import open_door
from .machine import find_place_for_caches

find_place_for_caches()  # before numba compiles

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
