"""Caches mixed by weights: exact shares, each token once per pass of its cache, from anywhere, in any part."""

import hashlib
from collections import Counter
from fractions import Fraction
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_caches import Tag, all_tags, tagged, taken, write_cache

from stores import ActivationStore, BadInput, DamagedStore, TokenMix, TokenStream
from stores.token_mix import store_seed

SIZES = (11, 30, 5)  # images of 4 tokens


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[ActivationStore]:
    """Three caches, of different sizes and chunks; image 1 of the first is unreadable. Tags: (cache, image, token)."""
    root = tmp_path_factory.mktemp("mix")
    options: list[dict[str, Any]] = [{"chunk_images": 3, "unreadable": (1,)}, {"chunk_images": 4}, {"chunk_images": 2}]
    return [
        ActivationStore(write_cache(root / f"{number}.zarr", tagged(number, n_images, 4), **option))
        for number, (n_images, option) in enumerate(zip(SIZES, options, strict=True))
    ]


def batches_of(mix: TokenMix, batch_tokens: int, n: int, **where: Any) -> list[list[Tag]]:
    found = list(islice(mix.batches(batch_tokens, **where), n))
    assert {batch.dtype for batch in found} == {np.dtype(np.float16)}
    return [[tuple(int(value) for value in token) for token in batch] for batch in found]


@pytest.mark.stress
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.floats(0.01, 0.2) | st.integers(1, 9), min_size=3, max_size=3),
    spare=st.integers(0, 40),
    seed=st.integers(0, 3),
)
def test_shares_are_exact_and_each_cache_is_its_own_stream(
    caches: list[ActivationStore], weights: list[float], spare: int, seed: int
) -> None:
    """After every batch each cache has given its share to less than a token: the next ones of its own stream."""
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    batch_tokens = ceil(1 / min(shares)) + spare  # the smallest batch that each cache has a token for, or larger
    given_so_far: list[list[Tag]] = [[], [], []]
    for number, batch in enumerate(batches_of(TokenMix(caches, weights, seed=seed, pool_chunks=2), batch_tokens, 9)):
        assert len(batch) == batch_tokens
        for cache, share in enumerate(shares):
            given_so_far[cache].extend(sorted(tag for tag in batch if tag[0] == cache))
            assert abs(len(given_so_far[cache]) - share * batch_tokens * (number + 1)) < 1
    for store, found in zip(caches, given_so_far, strict=True):
        stream = TokenStream([store], seed=store_seed(seed, store), pool_chunks=2)
        assert sorted(taken(stream, len(found))) == sorted(found)


def test_a_small_cache_comes_round_more_often_each_token_once_per_pass(caches: list[ActivationStore]) -> None:
    mix = TokenMix(caches, [1, 1, 2], pool_chunks=2)
    assert mix.tokens_per_epoch == (10 + 30 + 5) * 4
    found = [tag for batch in batches_of(mix, 20, 12) for tag in batch]  # 60, 60 and 120 tokens
    assert Counter(tag[0] for tag in found) == {0: 60, 1: 60, 2: 120}
    assert set(Counter(tag for tag in found if tag[0] == 2).values()) == {6}
    assert set(Counter(tag for tag in found if tag[0] == 1).values()) == {1}
    for token_set, tokens in (("patch", range(1, 4)), ("cls", range(1))):
        mix = TokenMix(caches, [1, 1, 1], token_set=token_set)
        assert mix.tokens_per_image == len(tokens)
        found = [tag for batch in batches_of(mix, 3, 30 * len(tokens)) for tag in batch if tag[0] == 1]
        assert sorted(found) == all_tags(1, set(range(30)), tokens)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch_tokens=st.integers(12, 70),
    first=st.integers(0, 12),
    n_ranks=st.integers(1, 9),
    threads=st.integers(1, 4),
    order=st.permutations([0, 1, 2]),
)
def test_neither_ranks_nor_threads_nor_where_one_enters_nor_the_order_of_caches_matters(
    caches: list[ActivationStore], batch_tokens: int, first: int, n_ranks: int, threads: int, order: list[int]
) -> None:
    weights, options = [3.0, 1.0, 0.5], {"seed": 4, "pool_chunks": 2}
    whole = batches_of(TokenMix(caches, weights, **options), batch_tokens, 16)  # type: ignore[arg-type]
    mix = TokenMix([caches[i] for i in order], [weights[i] for i in order], threads=threads, **options)  # type: ignore[arg-type]
    parts = [
        batches_of(mix, batch_tokens, 4, position=first * batch_tokens, part=(rank, n_ranks)) for rank in range(n_ranks)
    ]
    joined = [[*chain(*batch)] for batch in zip(*parts, strict=True)]
    assert joined == whole[first : first + 4]


def test_a_batch_and_each_part_of_it_is_a_fair_mixture(caches: list[ActivationStore]) -> None:
    """Every place of a batch has each cache's tokens as often as its weight says (within 4 standard deviations)."""
    n_batches, batch_tokens = 2_000, 16
    mix = TokenMix(caches, [2, 1, 1], seed=1)
    cache = np.array([[tag[0] for tag in batch] for batch in batches_of(mix, batch_tokens, n_batches)])
    for number, share in enumerate((0.5, 0.25, 0.25)):
        is_of = cache == number
        assert (is_of.sum(1) == share * batch_tokens).all()
        spread = (share * (1 - share) / n_batches) ** 0.5
        assert np.abs(is_of.mean(0) - share).max() < 4 * spread
        quarter = is_of[:, :4].sum(1)  # hypergeometric: 4 drawn of 16
        assert abs(quarter.var() / (4 * share * (1 - share) * 12 / 15) - 1) < 0.2
    same = (cache[:, 1:] == cache[:, :-1]).mean()
    assert abs(same - (0.5 * 7 + 0.5 * 3) / 15) < 0.02


def test_the_seed_decides_the_order(caches: list[ActivationStore]) -> None:
    orders = [batches_of(TokenMix(caches, [1, 2, 3], seed=seed), 30, 3) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len({store_seed(0, store) for store in caches} | {store_seed(1, store) for store in caches}) == 6


def test_the_order_stays_as_it_is(caches: list[ActivationStore]) -> None:
    """Where a run was interrupted, another version goes on with the same tokens."""
    found = batches_of(TokenMix(caches, [1, 2, 3], seed=5, pool_chunks=2), 24, 12)
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == "b1059cc0c585b4af"


def test_images_left_out_never_come(caches: list[ActivationStore]) -> None:
    masks = [np.arange(n_images) % 2 == 0 for n_images in SIZES]
    mix = TokenMix(caches, [1, 1, 1], images=masks)
    assert mix.tokens_per_epoch == (6 + 15 + 3) * 4
    found = {tag[:2] for batch in batches_of(mix, 60, 6) for tag in batch}
    assert found == {(number, image) for number, mask in enumerate(masks) for image in np.flatnonzero(mask).tolist()}


def test_what_cannot_be_mixed_is_refused(caches: list[ActivationStore]) -> None:
    for weights in ([], [1, 2], [1, 2, 0], [1, 2, -1], [1, 2, float("nan")], [1, float("inf"), 2]):
        with pytest.raises(BadInput, match="expected one weight above 0 for each of the 3 caches; found"):
            TokenMix(caches, weights)
    with pytest.raises(BadInput, match="whole images in order cannot be mixed by weights"):
        TokenMix(caches, [1, 1, 1], order="images")
    with pytest.raises(BadInput, match="order must be one of tokens, images; found 'other'"):
        TokenMix(caches, [1, 1, 1], order="other")
    with pytest.raises(BadInput, match="images must be given for each of the 3 caches; found 1"):
        TokenMix(caches, [1, 1, 1], images=[np.ones(11, bool)])
    with pytest.raises(BadInput, match="no readable and chosen image"):
        TokenMix(caches, [1, 1, 1], images=[np.ones(11, bool), np.ones(30, bool), np.zeros(5, bool)])
    mix = TokenMix(caches, [1, 1, 1e-3])
    with pytest.raises(
        BadInput, match=r"with a share of 0.0005, .*2\.zarr would give less than one token to a batch of 1,"
    ):
        mix.batches(1_000)
    for position in (-20, 7, 19):
        with pytest.raises(BadInput, match=f"beginning of a batch, a multiple of 20; found {position}"):
            TokenMix(caches, [1, 1, 1]).batches(20, position=position)
    with pytest.raises(BadInput, match="batch_tokens must be above 0; found 0"):
        mix.batches(0)
    with pytest.raises(BadInput, match="part must be a rank and the number of ranks"):
        mix.batches(4_000, part=(2, 2))


def test_a_value_that_is_not_finite_is_an_error_for_the_rank_that_meets_it(tmp_path: Path) -> None:
    tokens = tagged(0, 6, 3)
    tokens[4, 1, 2] = np.inf
    stores = [
        ActivationStore(write_cache(tmp_path / f"{name}.zarr", values, chunk_images=2))
        for name, values in (("a", tokens), ("b", tagged(1, 6, 3)))
    ]
    with pytest.raises(DamagedStore, match=r"a\.zarr holds NaN or infinity in a readable image of chunk 2"):
        batches_of(TokenMix(stores, [1, 1]), 12, 3)
