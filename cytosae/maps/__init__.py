"""Where in the cell a latent is active.

Comes in: latents of an image and its pixels. Goes out: maps, sheets of reference images, agreement with masks.
Open first: `patch_maps.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
