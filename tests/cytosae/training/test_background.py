"""Background patches: the rule against a slow twin, and that they are neither trained on nor measured."""

import json
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from token_caches import write_cache
from training_runs import SETTINGS

from cli import cli
from cytosae.sae import load_sae, make_config
from cytosae.training.background import farthest_tenth, find_background, rim_threshold
from cytosae.training.data import open_data
from cytosae.training.train import train
from stores import ActivationStore, BadInput, DamagedStore, TokenStream

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, WIDTH = 6, 8
OPTIONS: dict[str, Any] = {**SETTINGS, "tokens": 400, "background": "first-component"}


def cells(n_images: int = 20, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(tokens (n, 1 + 36, 8), is background (n, 36)): a bright disc of varying size before a dark ground."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius = rng.uniform(1.2, 2.6, n_images)
    is_background = np.hypot(rows, columns).ravel()[None] > radius[:, None]
    cell, ground = rng.normal(size=(2, WIDTH))
    patches = np.where(is_background[..., None], ground, cell) + 0.2 * rng.normal(size=(n_images, SIDE**2, WIDTH))
    cls = rng.normal(size=(n_images, 1, WIDTH))
    return np.concatenate([cls, patches], 1).astype(np.float16), is_background


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray[Any, Any]]:
    tokens, is_background = cells()
    return write_cache(tmp_path_factory.mktemp("cells") / "a.zarr", tokens, unreadable=(4,)), is_background


def slow_threshold(values: np.ndarray[Any, Any], is_rim: np.ndarray[Any, Any]) -> tuple[float, bool]:
    """The inner edge of the histogram beyond which rim and other patches differ most, one after the other.

    Then the edges below and above it, as long as they are as good: the middle one of all these.
    """
    edges = np.linspace(values.min(), values.max(), 257)
    found = []
    for edge in edges[1:-1]:
        rim, other = (
            Fraction(int((values[:, mask] >= edge).sum()), values[:, mask].size) for mask in (is_rim, ~is_rim)
        )
        found.append((rim - other, float(edge)))
    largest = max(abs(difference) for difference, _ in found)
    best = next(number for number, (difference, _) in enumerate(found) if abs(difference) == largest)
    sign = 1 if found[best][0] > 0 else -1
    by_chance = 0.5 * (1 / values[:, is_rim].size + 1 / values[:, ~is_rim].size) ** 0.5
    as_good = [float(largest - sign * difference) <= by_chance for difference, _ in found]
    low = high = best
    while low > 0 and as_good[low - 1]:
        low -= 1
    while high < len(found) - 1 and as_good[high + 1]:
        high += 1
    return found[(low + high) // 2][1], sign > 0


def test_the_rule_finds_the_ground_and_equals_its_definition(drawn: tuple[Path, np.ndarray[Any, Any]]) -> None:
    store, is_background = ActivationStore(drawn[0]), drawn[1]
    found = find_background([store])
    readable = store.readable()
    assert found.keep[0][:, 0].all()  # CLS stays
    assert (found.keep[0][readable, 1:] == ~is_background[readable]).all()
    assert found.keep[0][4].all()  # of an unreadable image nothing is said
    assert (found.n_patches, found.n_left_out) == (19 * 36, int(is_background[readable].sum()))

    patches = np.concatenate([tokens for _, tokens in store.iter_chunks()])[readable, 1:].astype(float)
    flat = patches.reshape(-1, WIDTH)
    direction = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][0]
    projected = (patches - flat.mean(0)) @ direction
    is_rim = np.zeros((SIDE, SIDE), bool)
    is_rim[[0, 0, -1, -1], [0, -1, 0, -1]] = True  # of 36 patches the four that are farthest away
    threshold, is_high = slow_threshold(projected, is_rim.ravel())
    high = (projected > threshold) == is_high
    assert (found.keep[0][readable, 1:] == ~high).all()
    assert found.share_at_rim == pytest.approx(high[:, is_rim.ravel()].mean())
    assert found.share_elsewhere == pytest.approx(high[:, ~is_rim.ravel()].mean())


@pytest.mark.parametrize("side", [3, 4, 16, 37])
def test_the_rim_is_the_farthest_tenth(side: int) -> None:
    """One patch after the other: those that fewer than a tenth of all are farther away than."""
    places = [(row - (side - 1) / 2, column - (side - 1) / 2) for row in range(side) for column in range(side)]
    squares = [x**2 + y**2 for x, y in places]
    wanted = [10 * sum(other > square for other in squares) < side**2 for square in squares]
    assert farthest_tenth(side).tolist() == wanted


def test_neighbours_at_the_edges_of_a_crop_are_kept(tmp_path: Path) -> None:
    """Pale cells that are cut off at all four edges, as in drawn smears: half of the edge, and none of the corners."""
    rng = np.random.default_rng(0)
    side, n_images = 8, 40
    place = np.add.outer(*[np.abs(np.arange(side) - (side - 1) / 2)] * 2)
    is_cell = np.broadcast_to((place < 4), (n_images, side, side)).copy()
    edges = np.zeros((side, side), bool)
    edges[[0, -1], 2:-2] = edges[2:-2, [0, -1]] = True
    cell, ground = np.array([1.0, 0, 0, 0]), np.zeros(4)
    pale = edges & (rng.random((n_images, side, side)) < 0.9)
    tokens = np.where(is_cell[..., None], cell, ground) + 0.03 * rng.normal(size=(n_images, side, side, 4))
    tokens[pale] += [0.4, 0, 0, 0]
    flat = tokens.reshape(n_images, side**2, 4)
    cache = write_cache(tmp_path / "n.zarr", np.concatenate([np.zeros((n_images, 1, 4)), flat], 1).astype(np.float16))
    kept = find_background([ActivationStore(cache)]).keep[0][:, 1:].reshape(n_images, side, side)
    assert kept[is_cell | pale].mean() > 0.99
    assert kept[~is_cell & ~pale].mean() < 0.05


@pytest.mark.parametrize("most_tokens", [65_536, 16 * SIDE**2], ids=["in the sample", "in none"])
def test_a_token_that_is_no_number_is_no_background(
    tmp_path: Path, most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cytosae.training.background._SAMPLE", most_tokens)
    tokens, _ = cells()
    assert find_background([ActivationStore(write_cache(tmp_path / "whole.zarr", tokens))]).n_left_out > 0
    tokens[17, 1 + 3, 2] = np.nan
    cache = ActivationStore(write_cache(tmp_path / "damaged.zarr", tokens))
    with pytest.raises(DamagedStore, match=r"token 4 of image 17 \(017\.png\) in .* is NaN or infinite"):
        find_background([cache])


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_equals_its_definition_and_lies_where_the_densities_cross(seed: int) -> None:
    """Three groups, as nuclei, red cells and ground are: ground is 3/4 of the rim and 1/4 of the rest, and is found."""
    rng = np.random.default_rng(seed)
    is_rim = np.arange(20) < 8
    sign = 1 if seed % 2 else -1  # ground may be the low side, too
    is_ground = rng.random((400, 20)) < np.where(is_rim, 0.75, 0.25)
    matter = np.where(rng.random((400, 20)) < 0.3, -12.0, 0.0)  # far away: a cut of all variance would lie beside it
    values = sign * (np.where(is_ground, 3.0, matter) + rng.normal(size=(400, 20)))
    threshold, is_high = rim_threshold(values, is_rim)
    slow, slow_is_high = slow_threshold(values, is_rim)
    assert threshold == pytest.approx(slow, abs=1e-9)
    assert is_high == slow_is_high == (sign > 0)
    assert sign * threshold == pytest.approx(1.5, abs=0.4)
    assert (((values > threshold) == is_high) == is_ground).mean() > 0.93


def test_the_stream_has_every_other_token_once_per_epoch(drawn: tuple[Path, np.ndarray[Any, Any]]) -> None:
    """From any position on, and for two ranks together."""
    store = ActivationStore(drawn[0])
    rng = np.random.default_rng(1)
    keep = rng.random((20, 37)) < 0.4
    tokens = np.concatenate([tokens for _, tokens in store.iter_chunks()])
    for token_set, first in (("all", 0), ("patch", 1)):
        wanted = tokens[store.readable()][:, first:][keep[store.readable()][:, first:]]
        stream = TokenStream([store], token_set=token_set, pool_chunks=2, keep=[keep], seed=3)
        assert stream.tokens_per_epoch == len(wanted)
        assert stream.mean_tokens_per_image == len(wanted) / 19
        epoch = np.concatenate(list(islice(stream.batches(1), len(wanted))))
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, wanted))
        two = np.concatenate(list(islice(stream.batches(1), 2 * len(wanted))))
        for position in (0, 5, len(wanted) - 1, len(wanted) + 7):
            some = next(stream.batches(11, position=position))
            assert (some == two[position : position + 11]).all()
            parts = [next(stream.batches(11, position=position, part=(rank, 2))) for rank in range(2)]
            assert (np.concatenate(parts) == some).all()


def test_background_is_neither_trained_on_nor_measured(
    drawn: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    """Other numbers there change neither the weights nor what is measured on held-out images."""
    cache, is_background = drawn
    config = make_config(options={**OPTIONS, "holdout": 0.25, "b_dec_init": "mean"})
    report = train([cache], tmp_path / "run", config)
    left_out = int(is_background[ActivationStore(cache).readable()].sum())
    assert report.spec["background"]["left_out"] == left_out
    assert report.spec["tokens_per_epoch"] == open_data([cache], config).stream.tokens_per_epoch
    assert f"background: {left_out} of 684 patch tokens left out" in str(report)
    held_out = pq.read_table(tmp_path / "run" / "held_out.parquet")["image_id"].to_pylist()
    rows = [i for i in range(20) if any(f"{i:03d}.png" in name for name in held_out)]
    assert report.summary["held_out"]["n_tokens"] == len(rows) + int((~is_background[rows]).sum())

    tokens, _ = cells()
    ground = np.concatenate([np.zeros((20, 1), bool), is_background], 1)
    tokens[ground] += np.float16(3) * (tokens[ground] - tokens[~ground].mean(0))  # further away, in its own direction
    other = write_cache(tmp_path / "other.zarr", tokens, unreadable=(4,))
    again = train([other], tmp_path / "other", config)
    assert again.spec["background"]["sha256"] == report.spec["background"]["sha256"]
    assert (tmp_path / "other" / "sae.safetensors").read_bytes() == (tmp_path / "run" / "sae.safetensors").read_bytes()
    assert again.summary["held_out"] == report.summary["held_out"]


def test_interrupted_and_continued_equals_never_stopped(
    drawn: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    config = make_config(options=OPTIONS)
    train(drawn[:1], tmp_path / "whole", config)

    def interrupt(done: int, total: int, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(drawn[:1], tmp_path / "cut", config, progress=interrupt)
    train(drawn[:1], tmp_path / "cut", config)
    assert (tmp_path / "cut" / "sae.safetensors").read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()


def test_the_command_counts_it_and_info_says_it(drawn: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    arguments = ["sae", "train", drawn[0], "-o", tmp_path / "run", "--background", "first-component"]
    arguments += ["--tokens", 100, "--batch-tokens", 20, "--expansion", 2, "--device", "cpu"]
    done = CliRunner().invoke(cli, [str(part) for part in arguments])
    assert done.exit_code == 0, done.output
    assert "patch tokens left out" in done.stdout
    page = CliRunner().invoke(cli, ["sae", "info", str(tmp_path / "run")]).stdout
    assert "by the rule first-component; in the corners of images" in page
    spec = json.loads((tmp_path / "run" / "sae.json").read_text())["spec"]
    assert spec["config"]["background"] == "first-component"
    assert load_sae(tmp_path / "run").header.spec["background"]["rule"] == "first-component"


def test_what_it_cannot_tell_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(12, 37, WIDTH)).astype(np.float16)
    cache = write_cache(tmp_path / "noise.zarr", noise)
    with pytest.raises(BadInput, match="does not tell background from cells here: it would call"):
        find_background([ActivationStore(cache)])
    odd = write_cache(tmp_path / "odd.zarr", np.zeros((4, 1200, 2), np.float16))
    with pytest.raises(BadInput, match="background is a matter of patches in a square; found 1200 tokens"):
        find_background([ActivationStore(odd)])
    for changes in ({"order": "images"}, {"token_set": "cls"}):
        with pytest.raises(BadInput, match="background is left out of patch tokens: it needs"):
            make_config(options={"background": "first-component", **changes})
