"""Many SAEs trained side by side on the same batches.

Comes in: a grid of settings and token activations. Goes out: a folder of SAEs with tables and a figure.
Open first: `run.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
