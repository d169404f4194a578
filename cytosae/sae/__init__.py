"""Sparse autoencoders: model, settings, checkpoints, and exchange with other programs.

Comes in: settings, or weights (ours, or of CytoSAE, PatchSAE, SAELens). Goes out: a `SparseAutoencoder`.
Open first: `model.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
