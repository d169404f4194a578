"""Train an SAE, and evaluate it.

Comes in: token activations and a `TrainConfig`. Goes out: a folder with the SAE, its state and its metrics.
Open first: `train.py`.
"""

from stores.doors import open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
