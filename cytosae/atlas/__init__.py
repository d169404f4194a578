"""The atlas: the results of one run as a folder of web pages, and the review of its concepts by experts. No torch.

Comes in: barcodes, concepts, latents, comparisons. Goes out: pages that open without a server; verdicts, agreement.
Open first: `build.py` for the pages, `review_items.py` (what is asked) and `review_report.py` for the review.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
