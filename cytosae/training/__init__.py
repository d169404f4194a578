"""How an SAE learns, and how good it is.

Comes in: token activations and a `TrainConfig`. Goes out: a folder with the SAE, its state and its metrics.
Open first: `train.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
