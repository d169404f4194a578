"""Baselines: what an SAE must do better than, before its latents are worth a look.

Comes in: caches, and an SAE to be like. Goes out: SAEs that learnt nothing, or less (`build.py`), and what the SAE has
more than they (`versus.py`). Open first: `build.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
