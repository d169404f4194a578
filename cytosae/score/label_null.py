"""Labels by chance: exchanged between images as `cyto probe` does it, within groups or between whole groups.

Another null than that of `cyto concept stats`, where labels move from patient to patient (concepts/label_entropy.py).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cytosae.probe import choose_null, shuffle_labels

Ints = npt.NDArray[np.int64]


def exchanged_labels(labels: Ints, groups: Ints, shuffles: int, seed: int) -> Sequence[Ints]:
    """(n,) labels of each shuffle; -1, no label, is exchanged like a label."""
    numbers = labels - min(0, int(labels.min()))
    null = choose_null(numbers, groups)
    offset = numbers[0] - labels[0]
    return [
        shuffle_labels(numbers, groups, np.random.default_rng((seed, 2, number)), null) - offset
        for number in range(shuffles)
    ]
