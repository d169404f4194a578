"""What an SAE is, in memory and on disk.

Comes in: settings, or weights (ours, CytoSAE's, PatchSAE's, SAELens's). Goes out: a `SparseAutoencoder`.
Open first: `model.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
