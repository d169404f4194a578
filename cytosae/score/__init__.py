"""A scorecard of an SAE: does it hold concepts? Each figure beside what chance gives.

Comes in: latents, a cache, labels, what other commands have recorded. Goes out: one table, and a table for the latents.
Open first: `run.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
