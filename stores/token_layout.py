"""Which token of an image is what, by the text `token_layout` of a store: CLS, registers and patches, each by name.

The order is that of timm: CLS, the distillation token of DeiT, registers, patches row by row from the top left. The
text names each group that there is: "1 CLS + 4 registers + 16x16 patches, row-major" (docs/formats.md).
"""

import math
import re
from dataclasses import dataclass

from .errors import BadInput, DamagedStore

_COUNT = "([1-9][0-9]{0,5})"
_TEXT = re.compile(
    rf"(?:{_COUNT} CLS \+ )?(?:{_COUNT} distillation \+ )?(?:{_COUNT} registers? \+ )?"
    rf"{_COUNT}x{_COUNT} patches, row-major"
)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """How many tokens of each kind an image has. Only patches have a place in the image."""

    n_cls: int = 1
    n_distillation: int = 0
    n_registers: int = 0
    n_patches: int

    @property
    def text(self) -> str:
        """As it stands in a store; needs a square of patches."""
        side = self.side
        named = {"CLS": self.n_cls, "distillation": self.n_distillation, "registers": self.n_registers}
        groups = [f"{n} {'register' if (name, n) == ('registers', 1) else name}" for name, n in named.items() if n]
        return " + ".join([*groups, f"{side}x{side} patches"]) + ", row-major"

    @property
    def tokens_per_image(self) -> int:
        """All tokens of an image."""
        return self.first_patch + self.n_patches

    @property
    def first_patch(self) -> int:
        """Position of the first patch: the number of tokens without a place in the image."""
        return self.n_cls + self.n_distillation + self.n_registers

    @property
    def side(self) -> int:
        """Number of patches along each side of the image.

        Raises
        ------
        BadInput
            If the patches do not fill a square.
        """
        side = math.isqrt(max(0, self.n_patches))
        if side < 1 or side * side != self.n_patches:
            kinds = "CLS and " if self.n_cls else ""
            raise BadInput(
                f"a map needs {kinds}a square of patches; this store has {self.tokens_per_image} tokens per image"
            )
        return side

    @property
    def cls(self) -> range:
        """Positions of CLS: none or one."""
        return range(0, self.n_cls)

    @property
    def registers(self) -> range:
        """Positions of the registers."""
        return range(self.first_patch - self.n_registers, self.first_patch)

    @property
    def patches(self) -> range:
        """Positions of the patches, row by row from the top left."""
        return range(self.first_patch, self.tokens_per_image)


def cls_first(tokens_per_image: int) -> TokenLayout:
    """One CLS token and then patches: the layout of every store whose text names no other one."""
    return TokenLayout(n_patches=tokens_per_image - 1)


def read_layout(text: str | None, tokens_per_image: int, place: object = "this store") -> TokenLayout:
    """The layout that a store's `token_layout` states; any text that is not of the form above means `cls_first`.

    Raises
    ------
    DamagedStore
        If it does not add up to `tokens_per_image`.
    """
    found = _TEXT.fullmatch(text or "")
    if found is None:
        return cls_first(tokens_per_image)
    n_cls, n_distillation, n_registers, rows, columns = (int(number or 0) for number in found.groups())
    layout = TokenLayout(n_cls=n_cls, n_distillation=n_distillation, n_registers=n_registers, n_patches=rows * columns)
    if layout.tokens_per_image != tokens_per_image or n_cls > 1 or rows != columns:
        raise DamagedStore(
            f"{place}: its header says token_layout {text!r} and {tokens_per_image:,} tokens per image, which do not "
            f"fit; make it again"
        )
    return layout
