"""No token of a readable image is NaN or infinite: whoever reads them for training looks, and names the first one."""

from typing import Any

import numpy as np
import numpy.typing as npt

from stores.activation_spec import Float16
from stores.activation_store import ActivationStore
from stores.errors import DamagedStore
from stores.tables import column


def check_finite(
    store: ActivationStore, x_NTD: Float16, images: npt.NDArray[np.integer[Any]], *, first_token: int
) -> None:
    """Raise DamagedStore for the first token of (N, T, D) that is not finite; its number counts from `first_token`."""
    bad = np.argwhere(~np.isfinite(x_NTD).all(axis=2))
    if len(bad):
        image, token = int(images[bad[0, 0]]), int(bad[0, 1]) + first_token
        raise DamagedStore(
            f"token {token} of image {image:,} ({column(store.images, 'path')[image]}) in {store.root} is NaN or "
            f"infinite, and the image is a readable one. cyto cache verify lists every bad chunk"
        )
