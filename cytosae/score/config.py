"""What is asked of a scorecard."""

from dataclasses import dataclass

from stores.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """All settings of a scorecard.

    Raises
    ------
    BadInput
        If a number is too small, or the numbers of latents do not rise.
    """

    label: str = "label"  # column of the image table
    parent: str | None = "label_common"  # column of the coarser label; None: no hierarchy
    ks: tuple[int, ...] = (1, 2, 5, 10, 50)  # latents of a sparse probe
    folds: int = 5
    shuffles: int = 9  # of every null
    max_images: int = 10_000  # drawn at random where there are more; 0: all
    min_images: int = 5  # in which a latent must be active, to have a monosemanticity or a Moran's I
    map_images: int = 5  # of a latent, those of the largest mean activation, whose maps are measured
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"folds": 3, "shuffles": 1, "max_images": 0, "min_images": 2, "map_images": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise BadInput(f"{name} must be at least {low}; found {getattr(self, name)}")
        object.__setattr__(self, "ks", tuple(self.ks))
        if not self.ks or self.ks[0] < 1 or list(self.ks) != sorted(set(self.ks)):
            raise BadInput(
                f"numbers of latents must be 1 or more, differ and rise; found {', '.join(map(str, self.ks))}"
            )
        if self.parent == self.label:
            raise BadInput(f"the coarser label must be another column than {self.label!r}; name one with --parent")
