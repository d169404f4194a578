"""Token activations to sparse latents.

Comes in: an activation cache and an SAE. Goes out: a latent store.
Open first: `encode.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
