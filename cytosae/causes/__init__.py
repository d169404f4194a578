"""Does a latent matter to the backbone? It is changed inside the network, and the network goes on with the change.

Comes in: an SAE, its activation cache, the later blocks of the backbone. Goes out: the change of the final CLS
embedding and of a probe, beside matched latents and random directions. Open first: `ablate.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
