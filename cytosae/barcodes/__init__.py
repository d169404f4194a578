"""Latents to barcodes of images, patients and diseases.

Comes in: latent stores and tau. Goes out: a folder of barcodes.
Open first: `build.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
