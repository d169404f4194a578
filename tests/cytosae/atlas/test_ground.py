"""Ground told from pictures: against cells that are drawn with a known place, and the rule as plain loops."""

import numpy as np
from white_cells import SIDE, Bools, Pixels, of_patches

from cytosae.atlas.ground import ground_of, ground_threshold, light_of, points_of


def smear(rng: np.random.Generator, *, is_dark: bool = False) -> tuple[Pixels, Bools]:
    """A nucleus in pale cytoplasm in the middle, a red ring with a pale middle beside it; and which pixels are cell."""
    size = 16 * SIDE
    y, x = np.mgrid[:size, :size].astype(float)
    middle = rng.uniform(0.42, 0.58, 2) * size
    from_middle, from_ring = np.hypot(y - middle[0], x - middle[1]), np.hypot(y - 40, x - 40)
    cell, nucleus, ring = from_middle < 70, from_middle < 40, from_ring < 30
    picture = np.full((size, size, 3), (228, 224, 232), float)
    picture[cell] = (205, 190, 215)
    picture[nucleus] = (90, 50, 150)
    picture[ring] = (215, 150, 150)
    picture[from_ring < 12] = (230, 224, 230)
    picture += rng.normal(0, 2, picture.shape)
    picture = 255 - picture if is_dark else picture
    return picture.clip(0, 255).astype(np.uint8), cell | ring


def test_background_is_told_from_cells_of_every_colour() -> None:
    """Pale cytoplasm, the nucleus and the pale middle of a red cell are cell; only patches at an edge may be either."""
    rng = np.random.default_rng(0)
    made = [smear(rng) for _ in range(12)]
    threshold = ground_threshold([points_of(picture, SIDE) for picture, _ in made], SIDE)
    assert threshold is not None
    for picture, is_cell in made:
        found, share = ground_of(light_of(points_of(picture, SIDE)), threshold), of_patches(is_cell)
        assert found[share < 0.1].all()
        assert not found[share > 0.9].any()


def test_the_rule_as_plain_loops() -> None:
    """Without what matter encloses, which another test has."""
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 255, (48, 80, 3), dtype=np.uint8)  # no square: stretched as its map is
    light = light_of(points_of(picture, 4))
    darkest = [
        [min(picture[3 * r : 3 * r + 3, 5 * c : 5 * c + 5, k].mean() for k in range(3)) for c in range(16)]
        for r in range(16)
    ]
    bright = sorted(value for row in darkest for value in row)[round(0.95 * 255)]
    np.testing.assert_allclose(light, np.array(darkest) / bright, atol=0.03)
    plain = np.full((12, 12), 1.0, np.float32)
    plain[:4, 4:6] = plain[4:6, :2] = 0.5  # half of one patch, at the rim, and a quarter of another
    plain[8:, 8:] = 0.5
    assert ground_of(plain, 0.8).tolist() == [True, True, True, True, True, True, True, True, False]


def test_it_is_not_told_where_the_rule_does_not_hold() -> None:
    """Of dark pictures, of full fields without a rim, of too few patches, of nothing."""
    rng = np.random.default_rng(2)
    dark = [smear(rng, is_dark=True)[0] for _ in range(8)]
    full = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(8)]
    for pictures in (dark, full, [], [np.full((64, 64, 3), 200, np.uint8)]):
        assert ground_threshold([points_of(picture, SIDE) for picture in pictures], SIDE) is None
    assert ground_threshold([points_of(smear(rng)[0], 2)], 2) is None
