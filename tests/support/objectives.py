"""What test_losses.py and other tests share."""

from typing import Any

OBJECTIVES: dict[str, dict[str, Any]] = {  # the twin's name -> our two settings
    "default": {"loss": "normed", "ghost_scale": "scalar"},
    "cytosae": {"loss": "normed", "ghost_scale": "elementwise"},
    "paper": {"loss": "eq1", "ghost_scale": "scalar"},
}


NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


L1 = 1e-2
