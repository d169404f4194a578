"""Latents beside latents, and a patient beside other patients.

Comes in: decoders, latent stores, barcodes. Goes out: tables of agreement, neighbours and what sets a patient apart.
Open first: `stability.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
