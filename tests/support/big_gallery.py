"""The columns of an overview of very many concepts, drawn at random."""

import numpy as np

from cytosae.atlas.gallery import Gallery

PAIRS = [{"a": "AML", "b": "control", "file": "0-1"}, {"a": "AML", "b": "all others", "file": "0-rest"}]


def big_gallery(n: int) -> Gallery:
    """`n` concepts of twenty labels, three datasets and two comparisons; every third has the cells of another."""
    rng = np.random.default_rng(0)
    frequency = rng.permutation(np.linspace(0.001, 1, n))
    specificity = rng.gamma(2, 0.4, n)
    specificity[rng.random(n) < 0.05] = np.nan
    is_tested = rng.random(n) < 0.8
    cells = np.arange(n)
    cells[2::3] = cells[1::3][: len(cells[2::3])]
    return Gallery(
        images=[np.arange(3) if at % 97 else np.zeros(0, np.int64) for at in range(n)],
        frequency=frequency,
        mean=rng.gamma(1, 0.5, n),
        labels=[f"a type of cell {number:02d}" for number in range(20)],
        label=rng.integers(-1, 20, n),
        share=rng.random(n),
        specificity=specificity,
        dataset=rng.integers(-1, 3, n),
        pair=np.where(is_tested, rng.integers(0, 2, n), -1),
        g=np.where(is_tested, rng.normal(0, 1, n), np.nan),
        q=np.where(is_tested, rng.random(n) ** 3, np.nan),
        verdict=rng.integers(0, 6, n).astype(np.uint8),
        cells=cells,
        names={int(at): f"lobes {at}" for at in range(0, n, 1000)},
    )
