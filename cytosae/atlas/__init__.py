"""The atlas: one run as a folder of web pages that an expert opens without a server, and the review of its concepts.

Reading order: config, inputs, cohort, plan, then build.py, which writes what the pages modules describe. The review:
review_items (what is asked), questions (what may be seen), review_server, reviews, agreement. No torch.

"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
