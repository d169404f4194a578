"""The stream of training tokens: each token once per epoch, shuffled anew, the same for the same seed, from anywhere.

Tokens are tagged by value, so that a batch tells where its tokens come from. `write_cache` serves other tests too.
"""

import hashlib
import threading
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_caches import Tag, all_tags, tagged, taken, write_cache

from stores import (
    ActivationStore,
    BadInput,
    DamagedStore,
    SpecMismatch,
    TokenStream,
    open_caches,
)
from stores.gather_kernel import gather_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """11 images of 5 tokens, 3 a chunk (the last is short); a whole chunk (3, 4, 5) and image 9 are unreadable."""
    root = tmp_path_factory.mktemp("batches") / "cache.zarr"
    return ActivationStore(write_cache(root, tagged(0, 11, 5), unreadable=(3, 4, 5, 9), chunk_images=3))


READABLE = {0, 1, 2, 6, 7, 8, 10}


@pytest.mark.parametrize(
    ("token_set", "tokens"), [("all", range(5)), ("patch", range(1, 5)), ("cls", range(1))], ids=["all", "patch", "cls"]
)
def test_each_token_of_a_readable_image_comes_once_per_epoch(
    cache: ActivationStore, token_set: str, tokens: range
) -> None:
    stream = TokenStream([cache], token_set=token_set, pool_chunks=2)
    size = stream.tokens_per_epoch
    assert size == len(READABLE) * len(tokens)
    order = taken(stream, 3 * size)
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == all_tags(0, READABLE, tokens)


def test_the_order_is_new_in_every_epoch_and_shuffles_inside_images(cache: ActivationStore) -> None:
    stream = TokenStream([cache], pool_chunks=16)
    size = stream.tokens_per_epoch
    order = taken(stream, 3 * size)
    first, second, third = (order[epoch * size : (epoch + 1) * size] for epoch in range(3))
    assert first != second != third != first
    steps = sum(a[:2] == b[:2] for a, b in pairwise(first))
    assert steps < size / 3  # neighbours in a batch come from one image by chance only


@pytest.mark.parametrize("order", ["tokens", "images"])
def test_the_order_is_the_same_for_any_number_of_threads(cache: ActivationStore, order: str) -> None:
    alone = taken(TokenStream([cache], pool_chunks=2, order=order, threads=1), 100)
    for threads in (2, 5):
        stream = TokenStream([cache], pool_chunks=2, order=order, threads=threads)
        for batch_tokens in (7, 33):
            assert taken(stream, 100, batch_tokens=batch_tokens) == alone


def test_a_stream_that_is_closed_leaves_no_thread(cache: ActivationStore) -> None:
    before = threading.active_count()
    batches = TokenStream([cache], threads=3).batches(7)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E00, 0xFFFF])
@pytest.mark.parametrize("width", [21, 24])
def test_gathering_copies_tokens_to_their_places_and_sees_what_is_not_finite(bad: int, width: int) -> None:
    """Out of images that lie anywhere: here 3 of 3 tokens, each in memory of its own, of which the last 2 are asked."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x7C00, (3, 3, width)).astype(np.uint16)
    bits |= (rng.integers(0, 2, bits.shape) << 15).astype(np.uint16)
    blocks, out = [image.copy() for image in bits], np.zeros((6, width), np.float16)
    images = np.array([block[1:].ctypes.data for block in blocks], np.uintp)
    order, places = np.array([5, 0, 3], np.int32), np.array([5, 1, 0])
    assert gather_rows(images, order, 2, out, places) == -1
    assert np.array_equal(out[[5, 1, 0]].view(np.uint16), bits[[2, 0, 1], [2, 1, 2]])
    assert not out[[2, 3, 4]].any()
    blocks[1][2, width - 1] = bad
    assert gather_rows(images, order, 2, out, places) == 2
    assert gather_rows(images, order[:2], 2, out, places[:2]) == -1  # it is in no token that was asked for


def twin(readable: list[list[tuple[int, int]]], n_tokens: int, pool_chunks: int, seed: int, epoch: int) -> list[Tag]:
    """The order of an epoch, written down once more; `readable`: of each part (cache, image)."""
    n_chunks = len({(cache, image // CHUNK_SIZES[cache]) for part in readable for cache, image in part})
    order = np.random.default_rng([seed, epoch]).permutation(len(readable))
    found: list[Tag] = []
    for number, pool in enumerate(np.array_split(order, -(-n_chunks // pool_chunks)), start=1):
        tags = [(cache, image, token) for part in pool for cache, image in readable[part] for token in range(n_tokens)]
        found += [tags[i] for i in np.random.default_rng([seed, epoch, number]).permutation(len(tags))]
    return found


CHUNK_SIZES = (20, 3)


def test_pools_are_made_of_parts_of_chunks(tmp_path: Path) -> None:
    """Parts of 8 images of a chunk, or the rest of it, less what may not come; permuted anew in every epoch."""
    first = write_cache(tmp_path / "a.zarr", tagged(0, 50, 4), unreadable=(*range(8, 16), 20), chunk_images=20)
    second = write_cache(tmp_path / "b.zarr", tagged(1, 7, 4), chunk_images=3)
    images = [~np.isin(np.arange(50), [3, 19]), np.arange(7) < 6]
    edges = [[0, 8, 16, 20, 28, 36, 40, 48, 50], [0, 3, 6, 7]]
    parts = [
        [
            (cache, image)
            for image in range(*edge)
            if images[cache][image] and (cache or image not in {*range(8, 16), 20})
        ]
        for cache in (0, 1)
        for edge in pairwise(edges[cache])
    ]
    parts = [part for part in parts if part]
    assert len(parts) == 7 + 2
    for pool_chunks in (1, 2, 16):
        stream = TokenStream(open_caches([first, second]), pool_chunks=pool_chunks, seed=4, images=images)
        assert stream.tokens_per_epoch == 4 * sum(map(len, parts))
        wanted = [tag for epoch in range(3) for tag in twin(parts, 4, pool_chunks, 4, epoch)]
        assert taken(stream, len(wanted), batch_tokens=50) == wanted


def test_caches_of_one_chunk_are_parts_of_their_own(tmp_path: Path) -> None:
    """The last chunk of a cache and the first one of the next have the same number here."""
    caches = [
        write_cache(tmp_path / "a.zarr", tagged(0, 5, 4), chunk_images=20),
        write_cache(tmp_path / "b.zarr", tagged(1, 3, 4), chunk_images=3),
    ]
    parts = [[(0, image) for image in range(5)], [(1, image) for image in range(3)]]
    for pool_chunks in (1, 2):
        stream = TokenStream(open_caches(caches), pool_chunks=pool_chunks, seed=4)
        wanted = [tag for epoch in range(3) for tag in twin(parts, 4, pool_chunks, 4, epoch)]
        assert taken(stream, len(wanted), batch_tokens=16) == wanted


def test_a_cache_sorted_by_class_is_mixed(tmp_path: Path) -> None:
    """8 classes of 64 images in stretches; a pool of a quarter of them has nearly all, where whole chunks have 2."""
    root = write_cache(tmp_path / "a.zarr", tagged(0, 512, 2), chunk_images=64)
    found = taken(TokenStream([ActivationStore(root)], pool_chunks=2), 1024, batch_tokens=256)
    for begin in range(0, 1024, 256):
        counts = np.bincount([tag[1] // 64 for tag in found[begin : begin + 256]], minlength=8)
        assert (counts > 0).sum() >= 6


def test_the_seed_decides_the_order(cache: ActivationStore) -> None:
    orders = [
        taken(TokenStream([cache], seed=seed, order=order), 70) for order in ("tokens", "images") for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == orders[4] != orders[5]


@pytest.mark.parametrize(
    ("order", "token_set", "digest"),
    [
        ("tokens", "all", "d9adcd5b7c5e5d28"),
        ("tokens", "patch", "b8ca8985b65bc21e"),
        ("images", "all", "bcb607c33183717e"),
        ("images", "patch", "541bc5a6d5ece25c"),
    ],
)
def test_the_order_stays_as_it_is(
    cache: ActivationStore, tmp_path: Path, order: str, token_set: str, digest: str
) -> None:
    """Where a run was interrupted, another version goes on with the same tokens."""
    other = ActivationStore(write_cache(tmp_path / "b.zarr", tagged(1, 7, 5), chunk_images=2))
    stream = TokenStream([cache, other], order=order, token_set=token_set, pool_chunks=2, seed=5)
    assert hashlib.sha256(repr(taken(stream, 300)).encode()).hexdigest()[:16] == digest


@pytest.mark.stress
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch_tokens=st.integers(1, 90),
    position=st.integers(0, 150),
    pool_chunks=st.integers(1, 5),
    order=st.sampled_from(["tokens", "images"]),
    seed=st.integers(0, 5),
)
def test_the_order_depends_neither_on_batches_nor_on_where_one_enters(
    cache: ActivationStore, batch_tokens: int, position: int, pool_chunks: int, order: str, seed: int
) -> None:
    """Batches reach across pools and epochs; entering at a position equals skipping there from the start."""
    stream = TokenStream([cache], order=order, pool_chunks=pool_chunks, seed=seed)
    from_start = taken(stream, 260, batch_tokens=1)
    assert taken(stream, 110, batch_tokens=batch_tokens, position=position) == from_start[position : position + 110]


@pytest.mark.stress
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch_tokens=st.integers(1, 90),
    position=st.integers(0, 150),
    n_ranks=st.integers(1, 100),
    threads=st.integers(1, 4),
    order=st.sampled_from(["tokens", "images"]),
)
def test_the_parts_of_all_ranks_are_the_batch(
    cache: ActivationStore, batch_tokens: int, position: int, n_ranks: int, threads: int, order: str
) -> None:
    """Also where there are more ranks than tokens, and where a part lies in two pools or epochs."""
    whole = list(islice(TokenStream([cache], order=order, pool_chunks=2).batches(batch_tokens, position=position), 3))
    stream = TokenStream([cache], order=order, pool_chunks=2, threads=threads)
    for rank in {0, n_ranks // 3, n_ranks - 1}:
        low, high = rank * batch_tokens // n_ranks, (rank + 1) * batch_tokens // n_ranks
        parts = list(islice(stream.batches(batch_tokens, position=position, part=(rank, n_ranks)), 3))
        assert [part.tolist() for part in parts] == [batch[low:high].tolist() for batch in whole]
        assert {part.shape for part in parts} == {(high - low, 3)}
    joined = [next(stream.batches(batch_tokens, position=position, part=(r, 3))).tolist() for r in range(3)]
    assert [*chain(*joined)] == whole[0].tolist()


def test_a_rank_gathers_its_own_rows_only(cache: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []

    def counting(images: Any, order: Any, tokens_per_image: int, out: Any, places: Any) -> int:
        gathered.append(len(order))
        return gather_rows(images, order, tokens_per_image, out, places)

    monkeypatch.setattr("stores.gather_kernel.gather_rows", counting)
    batches = TokenStream([cache], pool_chunks=2, threads=1).batches(30, part=(1, 4))
    assert len(next(batches)) == 8
    batches.close()
    assert sum(gathered) in (8, 16)  # and perhaps those of the next batch, which is gathered ahead


@pytest.mark.parametrize("order", ["tokens", "images"])
def test_images_left_out_never_come(cache: ActivationStore, order: str) -> None:
    """Of those asked for the readable ones; a choice of all changes nothing."""
    wanted = np.isin(np.arange(11), [0, 3, 6, 7, 9, 10])
    stream = TokenStream([cache], pool_chunks=2, order=order, images=[wanted])
    assert stream.tokens_per_epoch == 4 * 5
    found = taken(stream, 3 * 20)
    for epoch in range(3):
        assert sorted(found[20 * epoch : 20 * (epoch + 1)]) == all_tags(0, {0, 6, 7, 10}, range(5))
    everything = [np.ones(11, bool)]
    plain, all_chosen = (TokenStream([cache], order=order, seed=2, images=images) for images in (None, everything))
    assert taken(plain, 80) == taken(all_chosen, 80)


def test_a_choice_of_images_that_does_not_fit_is_refused(cache: ActivationStore) -> None:
    refused: list[tuple[list[Any], str]] = [
        ([], "nothing"),
        ([np.ones(10, bool)], r"bool \(10,\)"),
        ([np.ones(11, np.int64)], r"int64 \(11,\)"),
        ([np.ones(11, bool)] * 2, r"bool \(11,\), bool \(11,\)"),
    ]
    for images, found in refused:
        with pytest.raises(BadInput, match=rf"each image of each cache: expected bool \(11,\); found {found}"):
            TokenStream([cache], images=images)
    with pytest.raises(BadInput, match="no readable and chosen image in the given caches"):
        TokenStream([cache], images=[np.isin(np.arange(11), [3, 4, 5, 9])])


def test_what_no_stream_has_is_refused_at_once(cache: ActivationStore) -> None:
    stream = TokenStream([cache])
    for batch_tokens, position in ((0, 0), (7, -1)):
        with pytest.raises(BadInput, match=f"above 0 and position not below; found {batch_tokens}, {position}"):
            stream.batches(batch_tokens, position=position)
    for part in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(BadInput, match=f"rank from 0 to one less; found {part[0]}, {part[1]}"):
            stream.batches(7, part=part)
    with pytest.raises(BadInput, match="pool_chunks must be above 0; found 0"):
        TokenStream([cache], pool_chunks=0)
    with pytest.raises(BadInput, match="order must be one of tokens, images; found 'shuffled'"):
        TokenStream([cache], order="shuffled")


def test_whole_images_come_in_the_same_order_in_every_pass(tmp_path: Path) -> None:
    """Order `images`, as released: tokens of an image in their own order; more images than are read at once (64)."""
    root = write_cache(tmp_path / "cache.zarr", tagged(0, 150, 2), unreadable=(7, 149), chunk_images=16)
    stream = TokenStream([ActivationStore(root)], order="images", seed=3)
    order = taken(stream, 3 * 296)
    first = order[:296]
    assert order == first * 3
    assert [tag[2] for tag in first] == [0, 1] * 148
    images = [tag[1] for tag in first[::2]]
    assert [tag[1] for tag in first[1::2]] == images
    assert sorted(images) == sorted(set(range(150)) - {7, 149})
    assert images != sorted(images)


def test_several_caches_are_mixed_in_proportion(tmp_path: Path) -> None:
    """Each token of each cache once per epoch; pools draw chunks from both, whatever their chunk size and dataset."""
    first = write_cache(tmp_path / "a.zarr", tagged(0, 30, 3), chunk_images=2)
    second = write_cache(tmp_path / "b.zarr", tagged(1, 15, 3), chunk_images=1, unreadable=(4,), precision="bf16")
    for order in ("tokens", "images"):
        stream = TokenStream(open_caches([first, second]), order=order, pool_chunks=10)
        found = taken(stream, stream.tokens_per_epoch)
        wanted = all_tags(0, set(range(30)), range(3)) + all_tags(1, set(range(15)) - {4}, range(3))
        assert sorted(found) == wanted
        half = [tag[0] for tag in found[: len(found) // 2]]
        assert 0.15 < np.mean(half) < 0.5  # 14 of 44 images are the second cache's


def test_caches_of_different_tokens_are_refused_with_the_difference(tmp_path: Path) -> None:
    first = write_cache(tmp_path / "a.zarr", tagged(0, 2, 3))
    other = write_cache(tmp_path / "b.zarr", tagged(1, 2, 3), block=9)
    with pytest.raises(
        SpecMismatch, match=r"a\.zarr and .*b\.zarr do not hold the same kind of tokens: block 10 against 9"
    ):
        open_caches([first, other])
    wider = write_cache(tmp_path / "c.zarr", np.zeros((2, 3, 4), np.float16))
    with pytest.raises(SpecMismatch, match="width 3 against 4"):
        open_caches([first, wider])


def test_caches_without_a_readable_image_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Today none is completed; one of an older version may be."""
    with pytest.raises(BadInput, match="none of the 2 images could be read"):
        write_cache(tmp_path / "a.zarr", tagged(0, 2, 3), unreadable=(0, 1))
    root = write_cache(tmp_path / "b.zarr", tagged(0, 2, 3))
    monkeypatch.setattr(ActivationStore, "readable", lambda self: np.zeros(2, bool))
    with pytest.raises(BadInput, match="no readable image in the given caches"):
        TokenStream([ActivationStore(root)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", ["tokens", "images"])
def test_a_value_that_is_not_finite_in_a_readable_image_is_an_error(tmp_path: Path, value: float, order: str) -> None:
    """NaN stands for an unreadable image only; anywhere else it would spoil a whole training run."""
    tokens = tagged(0, 6, 3)
    tokens[4, 1, 2] = value
    stream = TokenStream([ActivationStore(write_cache(tmp_path / "a.zarr", tokens, chunk_images=2))], order=order)
    with pytest.raises(DamagedStore, match=r"a\.zarr holds NaN or infinity in a readable image of chunk 2"):
        taken(stream, stream.tokens_per_epoch)


def test_a_chunk_that_is_lost_later_is_an_error(tmp_path: Path) -> None:
    stream = TokenStream([ActivationStore(write_cache(tmp_path / "a.zarr", tagged(0, 6, 3), chunk_images=2))])
    (tmp_path / "a.zarr" / "tokens" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(DamagedStore, match="is missing"):
        taken(stream, stream.tokens_per_epoch)


def test_a_pool_of_more_tokens_than_can_be_counted_is_refused(cache: ActivationStore, monkeypatch: Any) -> None:
    monkeypatch.setattr("stores.token_stream._MOST_TOKENS", 2 * 8 * 5)
    TokenStream([cache], pool_chunks=2)  # two parts, of 8 images at most
    with pytest.raises(BadInput, match="pools of 3 chunks have up to 120 tokens; take pool_chunks smaller"):
        TokenStream([cache], pool_chunks=3)


def test_what_lies_under_a_batch_is_kept_while_it_is_gathered(cache: ActivationStore) -> None:
    """Of many streams at once over one store, whose maps are given up meanwhile; nothing is read after it was freed."""
    wanted = taken(TokenStream([cache], pool_chunks=1), 120)
    streams = [TokenStream([cache], pool_chunks=1).batches(3) for _ in range(4)]
    found: list[list[Tag]] = [[] for _ in streams]
    for _ in range(40):
        cache._chunks._maps.clear()  # type: ignore[union-attr]
        for tags, batches in zip(found, streams, strict=True):
            tags += [tuple(int(value) for value in token) for token in next(batches)]
    assert all(tags == wanted for tags in found)
