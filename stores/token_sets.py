"""Sets of tokens of an image: all of them, its patches, its CLS token, or its registers."""

from .errors import BadInput
from .token_layout import TokenLayout

TOKEN_SETS = ("all", "patch", "cls", "register")


def chosen_tokens(token_set: str, layout: TokenLayout, place: object = "these tokens") -> range:
    """The positions, inside an image, of the tokens in a set; `token_set` is one of TOKEN_SETS.

    place : the store of the tokens, for the error

    Raises
    ------
    BadInput
        For `cls` or `register` where the backbone has no such token.
    """
    found = {
        "all": range(layout.tokens_per_image),
        "patch": layout.patches,
        "cls": layout.cls,
        "register": layout.registers,
    }[token_set]
    if token_set in ("cls", "register") and not found:
        what = "no CLS token" if token_set == "cls" else "no registers"
        there = [name for name in ("all", "patch", "cls") if name != "cls" or layout.n_cls]
        raise BadInput(f"{place} have {what}: their backbone has none; give --token-set {' or '.join(there)}")
    return found
