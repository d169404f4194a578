"""What a latent answers to.

Comes in: latent stores. Goes out: statistics of every latent, its images with the largest values, and a selection.
Open first: `statistics.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
