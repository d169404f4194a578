"""Latents compared with latents, and a patient with other patients.

Comes in: decoders, latent stores, barcodes. Goes out: tables of agreement, neighbours and what sets a patient apart.
Open first: `stability.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
