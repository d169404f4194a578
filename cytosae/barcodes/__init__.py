"""Latents to barcodes of images, patients and diseases.

Comes in: latent stores and tau. Goes out: a folder of barcodes.
Open first: `build.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
