"""The settings of encoding, checked before anything is read: a run of hours must not end on one of them. No torch."""

import numpy as np

from stores.errors import BadInput
from stores.spec import check_choice

VALUE_BITS = (10, 23)
PRECISIONS = ("fp32", "bf16")


def check_encoding(*, value_bits: int = 10, min_activation: float = 0.0, precision: str = "fp32") -> None:
    """Raise BadInput for settings that `encode` does not take.

    Parameters
    ----------
    value_bits, min_activation, precision : as of `encode`
    """
    check_choice("value_bits", value_bits, VALUE_BITS)
    check_choice("precision", precision, PRECISIONS)
    if not 0 <= min_activation <= float(np.finfo(np.float32).max):
        raise BadInput(f"min_activation must be a number of at least 0; found {min_activation!r}")
