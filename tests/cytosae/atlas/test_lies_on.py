"""What a latent lies on, from drawn cells whose nucleus and ground are known."""

import numpy as np
import numpy.typing as npt
import pytest
from white_cells import SIDE, Bools, Pixels, blood, of_patches

from cytosae.atlas.lies_on import ON, PatchKinds, Rules, Share, on, rules_of

OFF_CELL, OFF_NUCLEUS = 0.05, 0.05


def kinds_of(made: list[tuple[Pixels, Bools, Bools]]) -> PatchKinds:
    """Of pictures that are all read; and of one more that is not."""
    pictures = [picture for picture, _, _ in made]
    kinds = PatchKinds(len(made) + 1, SIDE, rules_of(np.arange(len(made)), pictures.__getitem__, SIDE))
    for number, picture in enumerate(pictures):
        kinds.fill(number, picture)
    return kinds


@pytest.mark.parametrize(
    ("on_nucleus", "on_cytoplasm", "word"),
    [
        *((8, 0, "the nucleus"), (6, 2, "the nucleus"), (4, 4, "the cell"), (0, 8, "the cell")),
        *((4, 0, "both"), (0, 4, "both"), (0, 0, "the background"), (2, 0, "the background")),
    ],
)
def test_where_a_latent_lies(on_nucleus: int, on_cytoplasm: int, word: str) -> None:
    """By its eight strongest patches, each image counting once; an image not seen and a silent one do not count."""
    rng = np.random.default_rng(3)
    made = [blood(rng) for _ in range(6)]
    kinds, maps = kinds_of(made), np.zeros((8, SIDE**2), np.uint8)
    n_free = 8 - on_nucleus - on_cytoplasm
    for number, (_, is_cell, is_nucleus) in enumerate(made):
        cell, nucleus = of_patches(is_cell), of_patches(is_nucleus)
        places = (nucleus > 0.95, (cell > 0.95) & (nucleus < OFF_NUCLEUS), cell < OFF_CELL)
        for n, where in zip((on_nucleus, on_cytoplasm, n_free), places, strict=True):
            chosen = rng.permutation(np.flatnonzero(where))
            maps[number, chosen[:n]] = 255
            maps[number, chosen[n : n + 3]] = 100  # below half of the largest value
    maps[6, :] = 255  # of a picture that cannot be read
    found = kinds.share([0, 1, 2, 3, 4, 5, 6, -1], maps)
    assert found is not None
    assert found.strongest == pytest.approx(n_free / 8)
    assert found.nucleus == pytest.approx(on_nucleus / 8)
    cells = [of_patches(is_cell) for _, is_cell, _ in made]
    assert found.all == pytest.approx(np.mean([(cell < 0.5).mean() for cell in cells]), abs=0.03)
    of_cells = [of_patches(nucleus)[of_patches(cell) > 0.5] > 0.5 for _, cell, nucleus in made]
    assert found.nucleus_of_cells == pytest.approx(np.mean([each.mean() for each in of_cells]), abs=0.03)
    assert ON[on(found)] == word
    assert kinds.share([0, 1, 2, 6, -1], maps[[0, 1, 2, 6, 7]]) is not None
    assert kinds.share([0, 1, 6, -1], maps[[0, 1, 6, 7]]) is None, "two images are too few"


@pytest.mark.parametrize(
    ("share", "word"),
    [
        (Share(0.25, 0.4), "the cell"),
        (Share(0.26, 0.4), "both"),
        (Share(0.74, 0.4), "both"),
        (Share(0.75, 0.4), "the background"),
        (Share(0.0, 0.4, 0.75, 0.5), "the nucleus"),
        (Share(0.0, 0.4, 0.74, 0.2), "the cell"),
        (Share(0.0, 0.4, 0.9, 0.8), "the nucleus"),
        (Share(0.0, 0.4, 0.89, 0.8), "the cell"),  # the cells are nucleus nearly everywhere
        (Share(0.0, 0.4, 1.0, 1.0), "the nucleus"),
        (Share(0.3, 0.4, 0.7, 0.3), "both"),
        (Share(0.8, 0.4, 0.0, 0.3), "the background"),
        (None, ""),
    ],
)
def test_words_of_shares(share: Share | None, word: str) -> None:
    assert ON[on(share)] == word


def test_what_is_not_told() -> None:
    """Without ground nothing is; without chromatin no nucleus, and what lies on the cell is as it was before."""
    rng = np.random.default_rng(4)
    picture, is_cell, _ = blood(rng)
    everywhere = np.full((3, SIDE**2), 255, np.uint8)
    nothing = PatchKinds(1, SIDE)
    nothing.fill(0, picture)
    assert nothing.of(0) is None
    assert nothing.share([0, 0, 0], everywhere) is None
    ground_only = PatchKinds(1, SIDE, Rules(0.9))
    ground_only.fill(0, picture)
    found = ground_only.share([0, 0, 0], np.where(of_patches(is_cell) > 0.9, everywhere, 0).astype(np.uint8))
    assert found is not None
    assert found.nucleus is None
    assert ON[on(found)] == "the cell"


def test_a_picture_that_is_all_ground_has_no_nucleus() -> None:
    rng = np.random.default_rng(5)
    rules = rules_of(np.arange(6), [blood(rng)[0] for _ in range(6)].__getitem__, SIDE)
    assert rules.chromatin is not None
    for value in (0, 128, 255):
        kinds = PatchKinds(1, SIDE, rules)
        kinds.fill(0, np.full((64, 64, 3), value, np.uint8))
        found = kinds.share([0, 0, 0], np.full((3, SIDE**2), 255, np.uint8))
        assert found is not None
        assert (found.nucleus, found.nucleus_of_cells) == (0, 0)


def test_pictures_that_cannot_be_read_are_not_in_the_sample() -> None:
    rng = np.random.default_rng(6)
    made: list[npt.NDArray[np.uint8] | str] = [blood(rng)[0] for _ in range(6)]
    rules = rules_of(np.arange(6), made.__getitem__, SIDE)
    assert rules_of(np.arange(8), [*made, "no such file", "broken"].__getitem__, SIDE) == rules
    assert rules_of(np.arange(2), ["no such file", "broken"].__getitem__, SIDE) == Rules()
