"""Stage two: activations to SAE, latents, barcodes and all that is read off them.

The names of `__init__.pyi` are the Python interface, each loaded when it is asked for; the rooms' doors have more.
"""

from stores.doors import open_door
from stores.machine import find_place_for_caches

from . import old_paths

find_place_for_caches()  # before numba compiles
old_paths.install()

__getattr__, __dir__, __all__ = open_door(__name__, __file__, callable_modules=("compare", "probe", "sweep"))
