"""The atlas: the results of one run as a folder of web pages, and the server that shows them with the review. No torch.

Comes in: barcodes, concepts, latents, comparisons. Goes out: pages that open without a server; with it, verdicts.
Open first: `build.py` for the pages, `review_server.py` for the server.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
