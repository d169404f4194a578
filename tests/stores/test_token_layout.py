"""Which token is what, by the text in a store: the old text and every older one mean CLS first."""

import pytest

from stores.errors import BadInput, DamagedStore
from stores.token_layout import TokenLayout, cls_first, read_layout
from stores.token_sets import TOKEN_SETS, chosen_tokens

LAYOUTS = {
    "1 CLS + 16x16 patches, row-major": TokenLayout(n_patches=256),
    "1 CLS + 4 registers + 16x16 patches, row-major": TokenLayout(n_registers=4, n_patches=256),
    "1 CLS + 1 register + 2x2 patches, row-major": TokenLayout(n_registers=1, n_patches=4),
    "1 CLS + 1 distillation + 14x14 patches, row-major": TokenLayout(n_distillation=1, n_patches=196),
    "14x14 patches, row-major": TokenLayout(n_cls=0, n_patches=196),
    "8 registers + 1x1 patches, row-major": TokenLayout(n_cls=0, n_registers=8, n_patches=1),
}


@pytest.mark.parametrize("text", LAYOUTS)
def test_text_and_layout_mean_each_other(text: str) -> None:
    layout = LAYOUTS[text]
    assert layout.text == text
    assert read_layout(text, layout.tokens_per_image) == layout
    positions = [*layout.cls, *range(layout.n_cls, layout.n_cls + layout.n_distillation), *layout.registers]
    assert [*positions, *layout.patches] == [*range(layout.tokens_per_image)]


@pytest.mark.parametrize(
    "text", ["", None, "cls, 2x2 patches row-major", "1 CLS + 1 something + 2x2 patches, row-major"]
)
def test_any_other_text_means_cls_first(text: str | None) -> None:
    assert read_layout(text, 5) == cls_first(5) == TokenLayout(n_patches=4)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1 CLS + 16x16 patches, row-major", 256),
        ("16x16 patches, row-major", 257),
        ("2 CLS + 2x2 patches, row-major", 6),
        ("1 CLS + 2x3 patches, row-major", 7),
        ("1 CLS + 999999 registers + 2x2 patches, row-major", 5),
    ],
)
def test_a_layout_that_does_not_add_up_is_damage(text: str, tokens: int) -> None:
    with pytest.raises(DamagedStore, match=r"here: its header says token_layout .* which do not fit"):
        read_layout(text, tokens, "here")


def test_sets_are_by_name() -> None:
    full = LAYOUTS["1 CLS + 4 registers + 16x16 patches, row-major"]
    assert {name: chosen_tokens(name, full) for name in TOKEN_SETS} == {
        "all": range(261),
        "patch": range(5, 261),
        "cls": range(1),
        "register": range(1, 5),
    }
    old = cls_first(257)
    assert [chosen_tokens(name, old) for name in ("all", "patch", "cls")] == [range(257), range(1, 257), range(1)]
    with pytest.raises(BadInput, match=r"here have no registers: .* give --token-set all or patch or cls"):
        chosen_tokens("register", old, "here")
    with pytest.raises(BadInput, match=r"no CLS token: their backbone has none; give --token-set all or patch$"):
        chosen_tokens("cls", LAYOUTS["14x14 patches, row-major"])


def test_a_map_needs_a_square() -> None:
    assert LAYOUTS["14x14 patches, row-major"].side == 14
    with pytest.raises(BadInput, match="a map needs CLS and a square of patches; this store has 6 tokens per image"):
        _ = TokenLayout(n_patches=5).side
