"""What an SAE is, in memory and on disk.

Comes in: settings, or weights (ours, CytoSAE's, PatchSAE's, SAELens's). Goes out: a `SparseAutoencoder`.
Open first: `model.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
