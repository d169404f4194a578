"""Cells like this one: images and patients with the most similar latents, and how well such a search works.

Comes in: barcodes, and an image. Goes out: ranked images and patients; precision beside the backbone's own tokens.
Open first: `run.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
