"""Which latents differ between two diseases.

Comes in: barcodes. Goes out: differences with permutation p-values, intervals and figures.
Open first: `differential.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
