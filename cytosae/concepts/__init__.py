"""What a latent responds to.

Comes in: latent stores. Goes out: statistics of every latent, its images with the largest values, and a selection.
Open first: `statistics.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__, callable_modules=("label_entropy",))
