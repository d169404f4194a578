"""Stability across SAEs: the matching is the best there is, and says so only if it is; what chance gives; bad input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from command_line import fails, run
from decoders import Rows, directions, unit, write_sae
from scipy.optimize import linear_sum_assignment

from cytosae.relations import StabilityResult, stability, write_stability
from cytosae.relations.assignment import assign
from cytosae.relations.nearest_cosine import nearest
from cytosae.relations.stability import TOLERANCE, draw_like, match_directions, match_within
from cytosae.sae import read_decoder
from stores import CONCEPTS, STABILITY, ResultStore, begin_results
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.files import sha256_file


def write_concepts(root: Path, run: Path, mean_activation: list[float]) -> Path:
    spec = {"latents_spec": [{"sae_sha256": sha256_file(run / "sae.safetensors")}]}
    writer = begin_results(root, CONCEPTS, spec)
    latents = {"latent": range(len(mean_activation)), "dataset": ["d"] * len(mean_activation)}
    writer.write_table("latents", pa.table({**latents, "mean_activation": mean_activation}))
    writer.finish({})
    return root


def best_sum(a: Rows, b: Rows) -> float:
    """Of all one-to-one matchings; a cosine below 0 is no match."""
    cosines = np.maximum(0, a.astype(np.float64) @ b.T.astype(np.float64))
    return float(cosines[linear_sum_assignment(-cosines)].sum())


# ------------------------------------------------------------------------------------------- assignment and neighbours


@pytest.mark.parametrize("kind", ["whole numbers with ties", "any"])
def test_assignment_is_the_best_and_its_prices_prove_it(kind: str) -> None:
    """Small problems of all shapes, sparse to full, against scipy's dense solver."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        shape = rng.integers(1, 13, 2)
        weights = rng.normal(size=shape) if kind == "any" else rng.integers(-3, 6, shape).astype(float)
        is_listed = rng.random(shape) < rng.choice([0.2, 0.6, 1.0])
        row, column = np.nonzero(is_listed)
        order = rng.permutation(len(row))
        row, column = row[order], column[order]
        found = assign(row, column, weights[row, column], *shape)
        dense = np.where(is_listed, np.maximum(0, weights), 0)
        best = dense[linear_sum_assignment(-dense)].sum()
        matched = np.flatnonzero(found.column_of_row >= 0)
        columns = found.column_of_row[matched]
        assert len(set(columns)) == len(columns)
        assert (is_listed & (weights > 0))[matched, columns].all()
        assert weights[matched, columns].sum() == pytest.approx(best)
        assert found.row_prices.sum() + found.column_prices.sum() == pytest.approx(best)
        assert min(found.row_prices.min(), found.column_prices.min()) >= 0
        assert (found.row_prices[row] + found.column_prices[column] >= weights[row, column] - 1e-12).all()


@pytest.mark.parametrize("chunk", [(1, 1), (3, 4), (100, 100)], ids=str)
def test_nearest_equals_a_sort(chunk: tuple[int, int]) -> None:
    """Exact products (small whole numbers), so ties are many: the lower number comes first. Both ways, with prices."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (7, 10))
    prices, skip = rng.integers(0, 3, 10).astype(np.float64), np.array([0, 9, -1, 3, 3, 5, 6])
    products = (a @ b.T - prices).astype(np.float64)
    products[np.arange(7)[skip >= 0], skip[skip >= 0]] = -np.inf
    for k in (1, 4, 12):
        of_a, of_b = nearest(a, b, k, prices=prices, skip=skip, chunk=chunk)
        for found, values in ((of_a, products), (of_b, products.T)):
            for i, row in enumerate(values):
                expected = [j for j in sorted(range(len(row)), key=lambda j: (-row[j], j)) if row[j] > -np.inf][:k]
                assert found.index[i].tolist() == expected + [-1] * (k - len(expected))
                assert found.value[i, : len(expected)].tolist() == row[expected].tolist()


# ------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("n_candidates", [1, 2, 16])
@pytest.mark.parametrize(
    ("n_a", "n_b", "width"), [(1, 1, 3), (1, 40, 3), (40, 1, 3), (60, 60, 2), (50, 80, 6), (90, 40, 30)]
)
def test_matching_is_the_best_of_all_pairs(n_a: int, n_b: int, width: int, n_candidates: int) -> None:
    """Also from one candidate per row, where most pairs of the best matching are not listed at first."""
    for seed in range(3):
        a, b = directions(n_a, width, seed), directions(n_b, width, seed + 100)
        found = match_directions(a, b, n_candidates=n_candidates)
        matched = np.flatnonzero(found.partner >= 0)
        assert len(set(found.partner[matched])) == len(matched)
        assert found.cosine.sum() == pytest.approx(best_sum(a, b), abs=1e-6)
        assert found.is_optimal
        cosines = a.astype(np.float64) @ b.T.astype(np.float64)
        assert np.allclose(found.cosine[matched], cosines[matched, found.partner[matched]], atol=1e-9)
        assert (found.cosine[found.partner < 0] == 0).all()
        assert np.allclose(found.best_of_a, cosines.max(1), atol=1e-7)
        assert np.allclose(found.best_of_b, cosines.max(0), atol=1e-7)


def test_what_is_not_the_best_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after one round, the bound still holds, and the gap is what may be missing."""
    monkeypatch.setattr(stability, "_ROUNDS", 1)
    n_short = 0
    for seed in range(10):
        a, b = (unit(directions(60, 4, each) + np.array([2, 0, 0, 0])) for each in (seed, seed + 100))
        found, best = match_directions(a, b, n_candidates=1), best_sum(a, b)
        assert found.bound >= best - 1e-9
        if found.cosine.sum() < best - 60 * TOLERANCE:
            n_short += 1
            assert not found.is_optimal
            assert found.gap >= best - found.cosine.sum() - 1e-9
    assert n_short  # else nothing was tried here


def test_a_planted_permutation_is_found() -> None:
    """Through noise, and with some rows that have no counterpart."""
    rng = np.random.default_rng(0)
    a = directions(300, 32, 0)
    order = rng.permutation(300)
    b = unit(np.concatenate([a[order] + 0.05 * rng.normal(size=a.shape), directions(40, 32, 7)]))
    found = match_directions(a, b)
    assert (found.partner[order] == np.arange(300)).all()
    assert found.cosine.min() > 0.9
    assert found.cosine.max() < 1


def test_random_directions_share_what_decoders_share() -> None:
    """Mean and covariance: two SAEs whose rows all lean one way match well by chance, and the null knows."""
    rows = unit(directions(4000, 6, 0) * [1, 1, 1, 1, 0, 0] + [0, 0, 0, 0, 0, 1.5])
    drawn = draw_like(rows, np.random.default_rng(1))
    assert np.allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    assert np.allclose(drawn.mean(0), rows.mean(0), atol=0.03)
    assert np.allclose(np.cov(drawn.T), np.cov(rows.T), atol=0.03)
    assert (drawn[:, 4] == 0).all()  # a direction that the decoder does not use
    assert np.array_equal(drawn, draw_like(rows, np.random.default_rng(1)))


@pytest.mark.parametrize("n_rows", [30, 12, 1])
def test_matching_within_is_the_best_without_itself(n_rows: int) -> None:
    rows = directions(30, 5, 3)
    rng = np.random.default_rng(4)
    chosen = np.sort(rng.choice(30, n_rows, replace=False)) if n_rows < 30 else np.arange(30)
    cosines = np.maximum(0, rows[chosen].astype(np.float64) @ rows.T.astype(np.float64))
    cosines[np.arange(n_rows), chosen] = 0
    best = cosines[linear_sum_assignment(-cosines)].sum()
    assert match_within(rows, n_rows, np.random.default_rng(4)).sum() == pytest.approx(best, abs=1e-6)
    assert match_within(rows[:1], 1, rng).tolist() == [0]


def clustered_tokens(n: int, world: int, seed: int) -> Rows:
    """Random tokens about a mean, in 20 clusters of very different size and width: not what a covariance tells."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(world)
    mean, centres, widths = fixed.normal(size=48), 2 * fixed.normal(size=(20, 48)), fixed.uniform(0.2, 1.5, 20)
    cluster = rng.choice(20, n, p=fixed.dirichlet(np.full(20, 0.5)))
    return unit(1.5 * mean + centres[cluster] + rng.normal(size=(n, 48)) * widths[cluster, None])


def test_decoders_of_random_tokens_do_not_agree_and_shared_atoms_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but random tokens: 1% above the 99th percentile, where random directions alone would say half of them.

    With 60 atoms that both have, a little turned, these are found.
    """
    monkeypatch.setattr(stability, "plot_stability", lambda *_: None)
    above, above_directions, n = [], [], 400
    for world in range(4):
        rows = [clustered_tokens(n + 200 * extra, world, 10 * world + extra) for extra in (0, 1)]
        if world % 2:
            rows[1] = rows[1][:n]
        runs = [write_sae(tmp_path / f"{world}{k}", rows[k], seed=k) for k in (0, 1)]
        pair = write_stability(runs, tmp_path / f"out{world}").pairs[0]
        assert pair["chance"].startswith("within")
        assert pair["null_p99"] == max(pair[f"null_p99_{name}"] for name in ("directions", "within_a", "within_b"))
        above.append(pair["share_above_null_p99"])
        matched = ResultStore(tmp_path / f"out{world}", STABILITY).table("matches")["cosine"].to_numpy()
        above_directions.append(float((matched > pair["null_p99_directions"]).sum() / n))
    assert np.mean(above) <= 0.015
    assert np.mean(above_directions) > 0.2

    rng = np.random.default_rng(0)
    atoms = directions(60, 48, 5)
    turned = unit(atoms + 0.02 * rng.normal(size=atoms.shape))[rng.permutation(60)]
    tokens = [clustered_tokens(300, 0, seed) for seed in (1, 2)]
    wide = [unit(each + 0.12 * rng.normal(size=each.shape)) for each in tokens]  # no two of one SAE are near as these
    runs = [write_sae(tmp_path / f"p{k}", np.concatenate([(atoms, turned)[k], wide[k]]), seed=k) for k in (0, 1)]
    pair = write_stability(runs, tmp_path / "planted").pairs[0]
    matches = ResultStore(tmp_path / "planted", STABILITY).table("matches").to_pylist()
    found = [match for match in matches if match["cosine"] > pair["null_p99"]]
    assert sum(match["latent_a"] < 60 and match["latent_b"] < 60 for match in found) >= 57
    assert len(found) <= 66


# ------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def saes(tmp_path: Path) -> list[Path]:
    """Three SAEs: 6 latents along the axes; the same in another order without one, and two zero rows; 3 latents."""
    axes = np.eye(8, dtype=np.float32)
    second = np.concatenate([axes[[5, 4, 3, 2, 1]], np.zeros((2, 8), np.float32)])
    return [
        write_sae(tmp_path / name, rows)
        for name, rows in (("a", 3 * axes[:6]), ("b", second), ("c", unit(axes[:3] + 0.5 * axes[[6, 7, 6]])))
    ]


def test_tables_by_hand(saes: list[Path], tmp_path: Path) -> None:
    """Latent 0 of a has no counterpart in b, latents 5 and 6 of b no direction; c is off by a known angle."""
    out = tmp_path / "out"
    done = write_stability(saes, out)
    assert not done.was_complete
    assert done.n_without_direction == [0, 2, 0]
    store = ResultStore(out, STABILITY)
    c = 1 / np.sqrt(1.25)
    expected = [(0, 1, i, 5 - i, 1.0) for i in range(1, 6)] + [(0, 2, i, i, c) for i in range(3)]
    expected += [(1, 2, 3, 2, c), (1, 2, 4, 1, c)]
    found = [tuple(row.values()) for row in store.table("matches").to_pylist()]
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    assert [row[4] for row in found] == pytest.approx([row[4] for row in expected])
    pairs = store.table("pairs").to_pylist()
    assert [(pair["n_latents_a"], pair["n_latents_b"], pair["n_matched"]) for pair in pairs] == [
        (6, 5, 5),
        (6, 3, 3),
        (5, 3, 2),
    ]
    assert [pair["mean_cosine"] for pair in pairs] == pytest.approx([1, c, 2 * c / 3])
    assert [pair["share_above_0.9"] for pair in pairs] == pytest.approx([1, 0, 0])
    assert [pair["share_above_0.7"] for pair in pairs] == pytest.approx([1, 1, 2 / 3])
    latents = {(row["sae"], row["latent"]): row for row in store.table("stability").to_pylist()}
    assert len(latents) == 6 + 7 + 3
    row = latents[0, 1]
    assert [row[name] for name in ("n_matched", "mean_matched", "min_matched")] == pytest.approx([2, (1 + c) / 2, c])
    assert [row[name] for name in ("mean_best", "min_best")] == pytest.approx([(1 + c) / 2, c])
    row = latents[0, 0]  # none in b: 0 there
    assert [row[name] for name in ("n_matched", "mean_matched", "min_matched")] == pytest.approx([1, c / 2, 0])
    assert not latents[1, 6]["has_direction"]
    assert latents[1, 6]["mean_best"] is latents[1, 6]["n_matched"] is None
    assert (out / "stability.png").is_file()
    assert (out / "stability.svg").is_file()
    assert write_stability(saes, out).was_complete
    assert write_stability(saes, out).pairs == done.pairs


def test_concepts_restrict(saes: list[Path], tmp_path: Path) -> None:
    """Only latents active enough are compared, and only with such; folders are found by the SAE that they are of."""
    active: list[list[float]] = [[1, 1, 0, 1e-3, 0, 0], [1, 1, 1, 0, 0, 1, 1], [1, 1, 1]]
    folders = [write_concepts(tmp_path / f"concepts{i}", saes[i], active[i]) for i in range(3)]
    write_stability(saes[:2], tmp_path / "out", concepts=[folders[1], folders[0]])
    store = ResultStore(tmp_path / "out", STABILITY)
    found = [(row["latent_a"], row["latent_b"]) for row in store.table("matches").to_pylist()]
    assert found == [(3, 2)]  # 3 at 1e-3 exactly; 1 is not active enough in b
    latents = {(row["sae"], row["latent"]): row for row in store.table("stability").to_pylist()}
    assert latents[0, 4]["mean_best"] is None
    assert latents[0, 0]["mean_best"] == 0
    with pytest.raises(BadInput, match=r"no concepts given for .*b; give --concepts for every SAE, or for none"):
        write_stability(saes[:2], tmp_path / "o", concepts=folders[:1])
    with pytest.raises(SpecMismatch, match="are of none of these SAEs; give one folder for each"):
        write_stability(saes[:2], tmp_path / "o", concepts=folders)
    with pytest.raises(SpecMismatch, match="are a second folder of the same SAE"):
        write_stability(saes[:2], tmp_path / "o", concepts=[folders[0], folders[0]])
    with pytest.raises(BadInput, match="a has no latent with a mean activation of 5 or more"):
        write_stability(saes[:2], tmp_path / "o", concepts=folders[:2], min_mean_activation=5)
    assert not (tmp_path / "o").exists()


def test_what_cannot_be_compared(saes: list[Path], tmp_path: Path) -> None:
    out, axes = tmp_path / "out", np.eye(8, dtype=np.float32)
    other_block = write_sae(tmp_path / "block", axes[:3], {"block": 4})
    imported = write_sae(tmp_path / "imported", axes[:4], {"backbone": None, "block": None})
    narrow = write_sae(tmp_path / "narrow", axes[:3, :4], {"backbone": None})
    zero = write_sae(tmp_path / "zero", 0 * axes[:3])
    cases: list[tuple[type[Exception], str, list[Path]]] = [
        (BadInput, "needs two SAEs or more; found 1", saes[:1]),
        (BadInput, "are the same SAE; give each SAE once", [saes[0], saes[1], saes[0]]),
        (SpecMismatch, "not trained on the same kind of tokens: block 10 against 4", [saes[0], other_block]),
        (
            SpecMismatch,
            r"does not say on which tokens .*\(backbone, block\).*add --assume-compatible",
            [saes[0], imported],
        ),
        (SpecMismatch, "same kind of tokens: width 8 against 4", [imported, narrow]),
        (BadInput, "zero has no latent whose decoder row is not zero", [saes[0], zero]),
    ]
    for error, words, runs in cases:
        with pytest.raises(error, match=words):
            write_stability(runs, out)
    assert not out.exists()
    write_stability([saes[0], imported], out, assume_compatible=True)
    assert ResultStore(out, STABILITY).header.spec["assumed_equal"] == ["backbone", "block"]


@pytest.mark.stress
def test_equal_beginnings_are_no_agreement(tmp_path: Path) -> None:
    """One seed is refused, or warned of where it is asked for; unknown seeds betray themselves by the numbers."""
    rng = np.random.default_rng(0)
    begin = directions(40, 8, 1)
    nearby = [unit(begin + 0.05 * rng.normal(size=begin.shape)) for _ in range(2)]
    same = [write_sae(tmp_path / f"same{k}", nearby[k], seed=7) for k in (0, 1)]
    other = write_sae(tmp_path / "other", directions(40, 8, 2), seed=8)
    with pytest.raises(BadInput, match=r"same0 and .*same1 were trained from one seed \(7\).*--allow-same-seed"):
        write_stability([other, *same], tmp_path / "o")
    assert not (tmp_path / "o").exists()
    done = write_stability([same[0], same[1], other], tmp_path / "o", allow_same_seed=True)
    assert len(done.warnings) == 1
    assert "same0 and" in done.warnings[0]
    assert "from one seed (7)" in done.warnings[0]
    assert [(pair["seed_a"], pair["seed_b"]) for pair in done.pairs] == [(7, 7), (7, 8), (7, 8)]
    assert write_stability([same[0], same[1], other], tmp_path / "o", allow_same_seed=True).warnings == done.warnings
    unknown = [write_sae(tmp_path / f"unknown{k}", nearby[k]) for k in (0, 1)]
    done = write_stability(unknown, tmp_path / "unknown")
    assert done.pairs[0]["n_same_number"] >= 35
    assert "with the latent of the same number" in done.warnings[0]
    fails("from one seed", "concept", "stability", *same, "-o", tmp_path / "cli")
    assert "warning: " in run("concept", "stability", *same, "-o", tmp_path / "cli", "--allow-same-seed").stderr


@pytest.mark.parametrize(
    ("words", "damage"),
    [
        (r"holds W_dec \(8, 6\) of F32, expected \(6, 8\)", lambda rows: {"W_dec": np.ascontiguousarray(rows.T)}),
        ("holds W_dec .* of F64", lambda rows: {"W_dec": rows.astype(np.float64)}),
        ("NaN or infinite", lambda rows: {"W_dec": np.where(rows > 0, np.float32("inf"), rows)}),
    ],
    ids=["shape", "type", "infinite"],
)
def test_weights_that_do_not_fit(words: str, damage: Callable[[Rows], dict[str, Any]], tmp_path: Path) -> None:
    rows = np.eye(8, dtype=np.float32)[:6]
    with pytest.raises(DamagedStore, match=words):
        read_decoder(write_sae(tmp_path / "sae", rows, **damage(rows)))


def test_changed_weights_and_extreme_norms(saes: list[Path], tmp_path: Path) -> None:
    extreme = np.array([[1e-30, 1e-30], [3e38, 3e38], [0, 0], [1e-45, 0]], np.float32)
    decoder = read_decoder(write_sae(tmp_path / "extreme", extreme))
    assert np.allclose(decoder.rows, [[0.5**0.5] * 2, [0.5**0.5] * 2, [0, 0], [1, 0]])
    assert decoder.has_direction.tolist() == [True, True, False, True]
    weights = saes[0] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedStore, match="was changed"):
        read_decoder(saes[0])
    weights.unlink()
    with pytest.raises(DamagedStore, match="is missing"):
        read_decoder(saes[0])


def test_command(saes: list[Path], tmp_path: Path) -> None:
    command = ("concept", "stability", *saes[:2], "-o", tmp_path / "out")
    printed = run(*command).stdout
    assert "b: 2 latents left out: without a direction" in printed
    assert "all 5 latents matched, mean cosine 1.000 (by chance 0." in printed
    assert "100" not in printed.replace(str(tmp_path), "")  # what all do is said in one word
    assert printed.splitlines() == list(write_stability(saes[:2], tmp_path / "out").lines())
    again = run(*command, "--json")
    assert "already complete" in again.stderr
    assert '"n_matched": 5' in again.stdout
    fails("with other settings", *command, "--seed", 1)
    fails("is or contains an input of this command", "concept", "stability", *saes[:2], "-o", saes[0])
    fails("needs two SAEs", "concept", "stability", saes[0], "-o", tmp_path / "o")
    fails("no SAE at", "concept", "stability", saes[0], tmp_path / "nowhere", "-o", tmp_path / "o")


def test_lines_say_what_tells_something(tmp_path: Path) -> None:
    """Shares of all are said once, by the highest threshold; many pairs are summed up."""
    pair = {
        "sae_a": 0, "sae_b": 1, "n_latents_a": 8, "n_latents_b": 9, "n_matched": 8, "mean_cosine": 0.8, "gap": 0.1,
        "null_mean_cosine": 0.2, "null_p99": 0.5, "chance": "within a", "is_optimal": True,
        "share_above_0.7": 1.0, "share_above_0.9": 0.25, "share_above_null_p99": 1.0,
    }  # fmt: skip

    def lines(pairs: list[dict[str, Any]], n: int = 2) -> list[str]:
        saes = tuple(tmp_path / f"s{number}" for number in range(n))
        return list(
            StabilityResult(
                out=tmp_path, saes=saes, pairs=pairs, n_without_direction=[0] * n, was_complete=False
            ).lines()
        )

    few = lines([pair, pair | {"n_matched": 7, "is_optimal": False, "share_above_null_p99": 0.5}])
    assert few[0].endswith(
        "all 8 latents matched, mean cosine 0.800 (by chance 0.200, 99% of them up to 0.500, within a), all above 0.7, "
        "25.0% above 0.9"
    )
    assert "7 of 8 latents matched (the best sum is larger by at most 0.1)" in few[1]
    assert few[1].endswith("all above 0.7, 25.0% above 0.9")
    some = [pair | {"sae_a": a, "sae_b": a + 1, "share_above_null_p99": 0.1 * a} for a in range(9)]
    many = lines(some, 10)
    assert len(many) == 6
    assert "9 pairs of SAEs" in many[0]
    assert "40.0% (0.0% to 80.0%) of the latents above 99%" in many[0]
    assert "s0 and" in many[2]
