"""How well barcodes predict a class: classifiers, tested on held-out groups.

Comes in: barcodes and a column to predict. Goes out: folds, predictions, scores with intervals, figures.
Open first: `run.py`.
"""

from stores.doors import make_callable, open_door

__getattr__, __dir__, __all__ = open_door(__name__, __file__)
make_callable(__name__, "probe")
