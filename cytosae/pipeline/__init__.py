"""From a folder of images to an atlas and a report: the other rooms' calls in one order, with one recipe.

Comes in: images (through stage one) or a recipe. Goes out: a folder with all stores and results, a recipe, a page.
Open first: `run.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
