"""Stage one: images to activations.

The names in `__init__.pyi` are the Python interface; each is imported on first use. Open first: `extract.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__, callable_modules=("extract", "repair"))
