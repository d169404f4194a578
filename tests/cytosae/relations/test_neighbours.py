"""Neighbours of latents: exact counts, equal to slow twins, whoever counts and in whatever pieces."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from command_line import fails, run
from decoders import directions, write_sae
from distributed import Client
from latent_stores import Row, local_client, write_latents

from cytosae.relations import NeighbourConfig, coactivation, find_neighbours, write_neighbours
from stores import NEIGHBOURS, ResultStore
from stores.errors import BadInput, SpecMismatch
from stores.files import sha256_file

Float = npt.NDArray[np.float32]
TOKEN_SETS = {"all": slice(0, None), "patch": slice(1, None), "cls": slice(0, 1)}
N_LATENTS = 12


def drawn(seed: int, n_images: int = 30, *, n_bad: int = 3) -> tuple[Float, list[Row]]:
    """Latents in blocks that are active together, one never, one always active; unreadable images."""
    rng = np.random.default_rng(seed)
    dense = np.zeros((n_images, 4, N_LATENTS), np.float32)
    for group in ((0, 1, 2), (3, 4), (5, 6, 7, 8)):
        is_on = rng.random((n_images, 4)) < 0.3
        for latent in group:
            mine = np.where(rng.random(is_on.shape) < 0.8, is_on, rng.random(is_on.shape) < 0.1)
            dense[..., latent] = np.where(mine, rng.choice([0.1, 0.2, 0.4], is_on.shape), 0)
    dense[..., 9] = dense[..., 0]  # twins: ties
    dense[..., 10] = 0.5
    is_readable = np.ones(n_images, bool)
    is_readable[:n_bad] = False
    dense[~is_readable] = 0
    return dense, [("P", "d", bool(ok)) for ok in is_readable]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[Float]]:
    """An SAE (one row zero, two equal), two latent stores by it, and their readable images, dense."""
    root = tmp_path_factory.mktemp("made")
    rows = directions(N_LATENTS, 5, 0)
    rows[4], rows[7] = 0, rows[2]
    sae = write_sae(root / "sae", rows)
    sha256 = sha256_file(sae / "sae.safetensors")
    stores, images = [], []
    for number in (0, 1):
        dense, readable = drawn(number, 30 + number)
        store = root / f"latents{number}.zarr"
        stores.append(write_latents(store, dense, readable, sae_sha256=sha256, dataset=f"d{number}"))
        images.append(dense[[ok for _, _, ok in readable]])
    return sae, stores, images


def twin(decoder: Float, images: list[Float], config: NeighbourConfig) -> list[dict[str, Any]]:
    """Every number by definition: pair by pair, token by token."""
    is_on = np.concatenate(images)[:, TOKEN_SETS[config.token_set]] > np.float32(config.tau)
    tokens = [{(i, t) for i, t in np.argwhere(is_on[..., s])} for s in range(N_LATENTS)]
    n = is_on.shape[0] * is_on.shape[1]
    rows = []
    for a in range(N_LATENTS):
        pairs: list[dict[str, Any]] = []
        for b in set(range(N_LATENTS)) - {a}:
            n_a, n_b, both = len(tokens[a]), len(tokens[b]), tokens[a] & tokens[b]
            norms = [float(np.linalg.norm(decoder[s].astype(np.float64))) for s in (a, b)]
            spread = math.sqrt(n_a * (n - n_a)) * math.sqrt(n_b * (n - n_b))
            pairs.append(
                {
                    "neighbour": b,
                    "cosine": float(decoder[a].astype(float) @ decoder[b]) / math.prod(norms) if all(norms) else None,
                    "n_tokens": n_a,
                    "n_tokens_neighbour": n_b,
                    "n_tokens_both": len(both),
                    "n_images_both": len({i for i, _ in both}),
                    "phi": (n * len(both) - n_a * n_b) / spread if spread else None,
                    "lift": n * len(both) / (n_a * n_b) if n_a * n_b else None,
                    "jaccard": len(both) / (n_a + n_b - len(both)) if n_a * n_b else None,
                }
            )
        near = [pair for pair in pairs if pair["cosine"] is not None]
        near.sort(key=lambda pair: (-round(pair["cosine"], 6), pair["neighbour"]))
        often = [pair for pair in pairs if (pair["phi"] or 0) > 0 and pair["n_images_both"] >= config.min_images]
        often.sort(key=lambda pair: (-round(pair["phi"], 9), pair["neighbour"]))
        for by, some in (("direction", near), ("tokens", often)):
            for rank, pair in enumerate(some[: config.n_top], start=1):
                rows.append({"latent": a, "by": by, "rank": rank, **pair})
    return rows


def assert_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6), ours


CASES = [
    NeighbourConfig(),
    NeighbourConfig(n_top=3, tau=0.2, min_images=1),
    NeighbourConfig(token_set="patch", tau=0.15, min_images=9),
    NeighbourConfig(token_set="cls", n_top=20),
    NeighbourConfig(tau=0.45),
]


@pytest.mark.stress
@pytest.mark.parametrize("config", CASES, ids=str)
@pytest.mark.parametrize("pieces", ["one", "many"])
def test_equals_the_twin(
    made: tuple[Path, list[Path], list[Float]], config: NeighbourConfig, pieces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores; blocks of a few images, groups of two latents."""
    sae, stores, images = made
    if pieces == "many":
        monkeypatch.setattr(coactivation, "_CHUNK_ENTRIES", 40)
        monkeypatch.setattr(coactivation, "_GROUP_BYTES", 2 * 16 * N_LATENTS)
    found = find_neighbours(sae, config, latents=stores)
    n_tokens = sum(len(each) for each in images) * len(range(4)[TOKEN_SETS[config.token_set]])
    assert (found.n_latents, found.n_tokens, found.n_images) == (N_LATENTS, n_tokens, 27 + 28)
    decoder = directions(N_LATENTS, 5, 0)
    decoder[4], decoder[7] = 0, decoder[2]
    assert_equal(found.table.to_pylist(), twin(decoder, images, config))
    some = find_neighbours(sae, config, latents=stores, chosen=[9, 4, 9]).table.to_pylist()
    assert some == [row for row in found.table.to_pylist() if row["latent"] in (4, 9)]


def test_the_twins_are_found(made: tuple[Path, list[Path], list[Float]]) -> None:
    """Latent 9 is 0 again: phi 1. Latent 10 is always active: phi undefined, so nobody's neighbour. 11 never is."""
    sae, stores, _ = made
    rows = find_neighbours(sae, NeighbourConfig(), latents=stores).table.to_pylist()
    first = {row["latent"]: row for row in rows if row["by"] == "tokens" and row["rank"] == 1}
    assert (first[0]["neighbour"], first[0]["phi"], first[0]["jaccard"]) == (9, pytest.approx(1), 1)
    assert first[1]["neighbour"] == 0  # and 9 as much: the lower number
    assert not {10, 11} & {row[name] for row in rows if row["by"] == "tokens" for name in ("latent", "neighbour")}
    always = next(row for row in rows if row["neighbour"] == 10)
    assert always["phi"] is None
    assert always["lift"] == pytest.approx(1)


@pytest.fixture(scope="module")
def threads() -> Iterator[Client]:
    with local_client(3, 1) as client:
        yield client


def test_workers_write_what_this_process_finds(
    made: tuple[Path, list[Path], list[Float]], threads: Client, tmp_path: Path
) -> None:
    sae, stores, _ = made
    config, out = NeighbourConfig(), tmp_path / "out"
    assert not write_neighbours(sae, out, config, latents=stores, client=threads).was_complete
    assert write_neighbours(sae, out, config, latents=stores, client=threads).was_complete
    table = ResultStore(out, NEIGHBOURS).table("neighbours")
    assert table.to_pylist() == find_neighbours(sae, config, latents=stores).table.to_pylist()
    with pytest.raises(SpecMismatch, match="with other settings"):
        write_neighbours(sae, out, NeighbourConfig(tau=0.1), latents=stores, client=threads)


def test_by_direction_alone(made: tuple[Path, list[Path], list[Float]], tmp_path: Path) -> None:
    sae, stores, _ = made
    both = find_neighbours(sae, NeighbourConfig(), latents=stores).table.to_pylist()
    assert not write_neighbours(sae, tmp_path / "out").was_complete
    alone = ResultStore(tmp_path / "out", NEIGHBOURS).table("neighbours").to_pylist()
    names = ("latent", "rank", "neighbour", "cosine")
    assert [[row[name] for name in names] for row in alone] == [
        [row[name] for name in names] for row in both if row["by"] == "direction"
    ]
    assert {row["phi"] for row in alone} == {None}
    assert 4 not in {row["latent"] for row in alone}  # has no direction


def test_what_is_refused(made: tuple[Path, list[Path], list[Float]], tmp_path: Path) -> None:
    sae, _, _ = made
    sha256 = sha256_file(sae / "sae.safetensors")
    dense, readable = drawn(5)
    dense[dense < 0.2] = 0
    pruned = write_latents(tmp_path / "pruned.zarr", dense, readable, sae_sha256=sha256, min_activation=0.2)
    foreign = write_latents(tmp_path / "foreign.zarr", dense, readable)
    nothing = write_latents(tmp_path / "nothing.zarr", 0 * dense, [("P", "d", False)] * len(dense), sae_sha256=sha256)
    with pytest.raises(BadInput, match=r"no latent 12 in .*: it has 12 latents, counted from 0; give 0 to 11"):
        find_neighbours(sae, chosen=[12])
    with pytest.raises(BadInput, match="no latent -1 in"):
        find_neighbours(sae, chosen=[-1])
    with pytest.raises(BadInput, match=r"pruned below 0.2: tau 0 would count too few; choose a larger --tau"):
        find_neighbours(sae, NeighbourConfig(), latents=[pruned])
    assert find_neighbours(sae, NeighbourConfig(tau=0.2), latents=[pruned]).n_images == 27
    with pytest.raises(SpecMismatch, match=r"foreign.zarr holds latents of another SAE"):
        find_neighbours(sae, NeighbourConfig(), latents=[foreign])
    with pytest.raises(BadInput, match=r"3[01] image ids of .* are also in .*each store once"):
        find_neighbours(sae, latents=[made[1][0]] * 2)
    with pytest.raises(BadInput, match="no readable image in"):
        find_neighbours(sae, NeighbourConfig(), latents=[nothing])
    with pytest.raises(BadInput, match="tau must be a number of at least 0"):
        NeighbourConfig(tau=math.nan)
    with pytest.raises(BadInput, match=r"neighbours 1 to 1,000; found 5 and 1001"):
        NeighbourConfig(n_top=1001)
    with pytest.raises(BadInput, match="token_set must be one of all, patch, cls, register; found 'image'"):
        NeighbourConfig(token_set="image")


@pytest.mark.stress
def test_command(made: tuple[Path, list[Path], list[Float]], tmp_path: Path) -> None:
    sae, stores, _ = made
    command = ("concept", "neighbours", sae, "--latents", stores[0], "--latents", stores[1])
    printed = run(*command, "--latent", 0, "--latent", 4).stdout
    assert "latent 0, active at" in printed
    assert "phi 1.000" in printed
    assert "nearest direction: none" in printed  # of latent 4
    assert printed.splitlines() == list(find_neighbours(sae, latents=stores, chosen=[4, 0]).lines())
    rows = json.loads(run(*command, "--latent", 0, "--json").stdout)
    assert rows == find_neighbours(sae, NeighbourConfig(), latents=stores, chosen=[0]).table.to_pylist()
    assert "active at the same tokens" not in run("concept", "neighbours", sae, "--latent", 0).stdout
    done = run(*command, "-o", tmp_path / "out", "--workers", 1)
    assert "neighbours of 12 latents by direction and activity at 220 tokens of 55 images" in done.stdout
    assert "1 latent without a direction" in done.stdout
    found = write_neighbours(sae, tmp_path / "out", latents=stores)
    assert found.was_complete
    assert done.stdout.splitlines() == list(found.lines())
    assert "already complete" in run(*command, "-o", tmp_path / "out", "--workers", 1).stderr
    assert run(*command).exit_code == 2
    alone = run("concept", "neighbours", sae, "--latent", 0, "--tau", 1, "--min-images", 9)
    assert (alone.exit_code, "--tau, --min-images: only with --latents" in alone.stderr) == (2, True)
    fails("no latent 99", *command, "--latent", 99)
