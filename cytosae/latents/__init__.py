"""Encode token activations as sparse latents.

Comes in: an activation cache and an SAE. Goes out: a latent store.
Open first: `encode.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__, callable_modules=("encode",))
