"""Which tokens of an image count: all, its patches, or CLS, which comes first."""

TOKEN_SETS = {"all": slice(0, None), "patch": slice(1, None), "cls": slice(0, 1)}


def chosen_tokens(token_set: str, tokens_per_image: int) -> range:
    """The positions in an image of the tokens that count; `token_set` is a key of TOKEN_SETS."""
    return range(tokens_per_image)[TOKEN_SETS[token_set]]
