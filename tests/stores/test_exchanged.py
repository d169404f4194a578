"""A store that another command replaces while it is read: never two stores' numbers under one name, always one line."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from exchanges import exchange
from places import GOLDEN

from cytosae.barcodes.tasks import Partition, count_partition
from stores.errors import StoreReplaced
from stores.latent_store import LatentStore
from stores.result_folder import ResultStore, begin_results
from stores.spec import COMPARISON, PROBE, require_unchanged

pytestmark = pytest.mark.stress


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    (found,) = [path for path in GOLDEN.rglob("*latents*.zarr") if (path / "journal.jsonl").exists()][:1]
    return Path(shutil.copytree(found, tmp_path / "l.zarr"))


def partition_of(store: LatentStore) -> Partition:
    spec = store.spec
    return Partition(
        latents=str(store.root),
        start=0,
        stop=spec.n_images,
        first=0,
        n_images=spec.n_images,
        tokens_per_image=spec.tokens_per_image,
        n_latents=spec.n_latents,
        seal=store.header.seal,
    )


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_worker_that_comes_behind_the_exchange_counts_nothing(latents: Path, tmp_path: Path, is_gone: bool) -> None:
    store = LatentStore(latents)
    parts = tmp_path / "parts"
    parts.mkdir()
    partition = partition_of(store)
    assert count_partition(partition, str(parts), "tag", (0.0,), "all").lengths.sum() > 0
    (parts / partition.name).unlink()
    if is_gone:
        shutil.rmtree(latents)
    else:
        exchange(latents)
    with pytest.raises(StoreReplaced, match=r"l\.zarr was replaced or changed .* Run the same command again"):
        count_partition(partition, str(parts), "tag", (0.0,), "all")
    assert [*parts.iterdir()] == []


def test_what_was_opened_is_not_opened_again_as_another(latents: Path) -> None:
    store = LatentStore(latents)
    kept = pickle.dumps(store)
    assert pickle.loads(kept).identity == store.identity
    require_unchanged(store.header)
    exchange(latents)
    with pytest.raises(StoreReplaced):
        pickle.loads(kept)
    with pytest.raises(StoreReplaced):
        require_unchanged(store.header)
    require_unchanged(LatentStore(latents).header)


def test_results_are_not_finished_from_an_input_that_was_exchanged(tmp_path: Path) -> None:
    """An input by its path alone, and one that was opened before the results were begun."""
    source = begin_results(tmp_path / "in", PROBE, {"a": "1"})
    source.write_json("numbers", [1])
    source.finish({})
    opened = ResultStore(tmp_path / "in", PROBE)
    for is_early in (False, True):
        writer = begin_results(tmp_path / f"out{is_early}", COMPARISON, {"a": "1"}, inputs=[tmp_path / "in"])
        exchange(tmp_path / "in")
        if is_early:
            writer.seals.clear()
            writer.watch(opened.header)
        with pytest.raises(StoreReplaced, match="in was replaced"):
            writer.finish({})
        assert '"complete": false' in (writer.root / "comparison.json").read_text()
        shutil.rmtree(tmp_path / "old")
    again = begin_results(tmp_path / "outTrue", COMPARISON, {"a": "1"}, inputs=[tmp_path / "in"])
    assert again.finish({}).complete


def test_a_chunk_that_is_gone_because_of_the_exchange_says_so(latents: Path) -> None:
    store = LatentStore(latents)
    exchange(latents)
    for path in (latents / "X" / "data" / "c").iterdir():
        path.write_bytes(np.random.default_rng(0).bytes(50))
    with pytest.raises(StoreReplaced):
        store.read_images(0, store.spec.n_images)
