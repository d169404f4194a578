"""Where in the cell a latent is active.

Comes in: latents of an image and its pixels. Goes out: maps, sheets of reference images, agreement with masks.
Open first: `patch_maps.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
