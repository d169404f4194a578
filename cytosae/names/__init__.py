"""Names for latents: from experts, colleagues or models, and whether a name tells the cells of its latent.

Comes in: concepts, barcodes, latents, and answers of others. Goes out: an item for each latent, names with who gave
them, and their scores beside those of other latents' names. Open first: `run.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
