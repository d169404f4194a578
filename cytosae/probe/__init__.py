"""What a barcode can tell: classifiers, tested on held-out groups.

Comes in: barcodes and a column to predict. Goes out: folds, predictions, scores with intervals, figures.
Open first: `run.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
