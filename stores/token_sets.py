"""Sets of tokens of an image: all, the patches, or CLS, which is the first token."""

TOKEN_SETS = {"all": slice(0, None), "patch": slice(1, None), "cls": slice(0, 1)}


def chosen_tokens(token_set: str, tokens_per_image: int) -> range:
    """The positions, inside an image, of the tokens in a set; `token_set` is a key of TOKEN_SETS."""
    return range(tokens_per_image)[TOKEN_SETS[token_set]]
