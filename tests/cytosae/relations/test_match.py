"""Latents of two SAEs matched by images: equal to plain loops, planted pairs are found, strata alone are no match."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from barcode_maker import write_patient_barcodes
from command_line import fails, run
from decoders import directions, write_sae
from scipy import stats
from scipy.optimize import linear_sum_assignment
from search_cells import write_search_barcodes

from cytosae.compare import CompareConfig, compare
from cytosae.relations import MatchConfig, activation_match, match_latents
from cytosae.relations.activation_match import permute_within, standardize
from stores import MATCH, BarcodeStore, ResultStore
from stores.errors import BadInput, SpecMismatch
from stores.verify_any import verify_folder

Array = npt.NDArray[Any]
N_IMAGES, N_A, N_B, N_SHARED = 240, 30, 40, 8


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("cytosae.relations.activation_match.plot_match", lambda *given: None)


@pytest.fixture
def figures() -> None:
    """For tests that look at the figure."""


def images(n_types: int = 4) -> pd.DataFrame:
    """Ten patients in turn, types in turn."""
    number = np.arange(N_IMAGES)
    table = {
        "patient": [f"P{n % 10}" for n in number],
        "label": [f"type {n // 10 % n_types}" for n in number],
        "dataset": "drawn",
        "status": "ok",
        "content_hash": [f"{n:064x}" for n in number],
    }
    return pd.DataFrame(table, index=pd.Index([f"i{n:03d}" for n in number], name="image_id"))


def two_saes(seed: int, *, n_shared: int = N_SHARED, by_type: float = 2.0) -> tuple[Array, Array]:
    """(images, latents) of A and B: latent s of A is latent N_B - 1 - s of B, times 7; all follow the cell's type."""
    rng = np.random.default_rng(seed)
    kind = np.arange(N_IMAGES) // 10 % 4
    both = [
        rng.gamma(1, 1, (N_IMAGES, n)) * (rng.random((N_IMAGES, n)) < 0.5)
        + by_type * (kind[:, None] == np.arange(n) % 4)
        for n in (N_A, N_B)
    ]
    for s in range(n_shared):
        both[1][:, N_B - 1 - s] = 7 * both[0][:, s]
    return both[0].astype(np.float32), both[1].astype(np.float32)


def write_pair(root: Path, a: Array, b: Array, table: pd.DataFrame | None = None) -> tuple[Path, Path]:
    table = images() if table is None else table
    return tuple(  # type: ignore[return-value]
        write_search_barcodes(root / name, values, values, np.ceil(values), table, latents=name * 32)
        for name, values in (("aa", a), ("bb", b))
    )


def quick(**changes: Any) -> MatchConfig:
    return MatchConfig(**{"n_images": N_IMAGES, "n_permutations": 19, **changes})


# ------------------------------------------------------------------------------------------- slow twin


@pytest.mark.parametrize("by", ["activation", "within"])
def test_a_match_equals_plain_loops(tmp_path: Path, by: str) -> None:
    """Correlations by numpy.corrcoef pair by pair, the best assignment by scipy, p by counting."""
    a, b = two_saes(0)
    done = match_latents(*write_pair(tmp_path, a, b), tmp_path / "out", quick(by=by, n_permutations=9))
    strata = [f"{row.label}/{row.patient}" for row in images().itertuples()]
    assert (done.summary["n_images"], done.summary["n_strata"]) == (N_IMAGES, len({*strata}))

    def over_images(values: Array) -> Array:
        found = np.sqrt(values).astype(np.float64)
        if by == "within":
            for name in {*strata}:
                some = [n for n, each in enumerate(strata) if each == name]
                found[some] -= found[some].mean(0)
        return found

    one, other = over_images(a), over_images(b)
    correlation = np.array([[np.corrcoef(one[:, i], other[:, j])[0, 1] for j in range(N_B)] for i in range(N_A)])
    positive = np.maximum(0, correlation)
    best = positive[linear_sum_assignment(-positive)].sum()
    store = ResultStore(tmp_path / "out", MATCH)
    rows = store.table("matches").to_pylist()
    assert sum(row["correlation"] for row in rows) == pytest.approx(best, abs=1e-4)
    for row in rows:
        assert row["correlation"] == pytest.approx(correlation[row["latent_a"], row["latent_b"]], abs=1e-5)
    code = np.unique(strata, return_inverse=True)[1]
    rng = np.random.default_rng([0, 1])
    as_large = np.ones(N_A)
    drawn_code = activation_match.draw_images([BarcodeStore(tmp_path / n) for n in ("aa", "bb")], quick(), None)[1]
    assert [len({*zip(code.tolist(), drawn_code.tolist(), strict=True)})] == [code.max() + 1]  # the same strata
    for _ in range(9):
        order = permute_within(drawn_code, rng)
        shuffled = other[order]
        permuted = np.array([[np.corrcoef(one[:, i], shuffled[:, j])[0, 1] for j in range(N_B)] for i in range(N_A)])
        as_large += permuted.max(1) >= correlation.max(1) - 1e-6
    latents = [row for row in store.table("latents").to_pylist() if row["sae"] == "a"]
    assert [row["p"] for row in latents] == pytest.approx((as_large / 10).tolist())
    assert [row["best_correlation"] for row in latents] == pytest.approx(correlation.max(1).tolist(), abs=1e-5)


def test_images_stay_in_their_stratum() -> None:
    strata = np.array([2, 0, 1, 0, 2, 2, 1, 3])
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        order = permute_within(strata, rng)
        assert sorted(order.tolist()) == list(range(8))
        assert (strata[order] == strata).all()
        seen.add(tuple(order.tolist()))
    assert len(seen) == 2 * 2 * 6


def test_within_takes_off_what_strata_say() -> None:
    strata = np.array([0, 0, 1, 1])
    rows = np.array([[1, 3, 10, 10], [5, 5, 7, 7]], np.float32)
    assert standardize(rows, strata).tolist() == [True, False]
    assert rows.tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0]), [0, 0, 0, 0]]


# ------------------------------------------------------------------------------------------- what is found


def test_planted_pairs_are_found_and_strata_alone_are_not(tmp_path: Path) -> None:
    """All latents follow the type, so all correlate; only those that share images are counterparts."""
    done = match_latents(*write_pair(tmp_path, *two_saes(1)), tmp_path / "out", quick(n_permutations=99))
    rows = ResultStore(tmp_path / "out", MATCH).table("matches").to_pylist()
    planted = {(s, N_B - 1 - s) for s in range(N_SHARED)}
    found = {(row["latent_a"], row["latent_b"]) for row in rows if row["is_counterpart"]}
    assert planted <= found
    assert len(found) <= N_SHARED + 3
    mine = [row for row in rows if (row["latent_a"], row["latent_b"]) in planted]
    assert [row["correlation"] for row in mine] == pytest.approx([1.0] * N_SHARED)
    others = [row for row in rows if (row["latent_a"], row["latent_b"]) not in planted]
    assert np.median([row["correlation"] for row in others]) > 0.25  # by type alone
    assert abs(np.median([row["within_correlation"] for row in others])) < 0.15
    assert done.summary["null_mean_correlation"] > 0.2
    assert {row["p"] for row in mine} == {0.01}
    assert not verify_folder(tmp_path / "out").problems


def test_an_interrupted_match_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped among the permutations: the matching and the permutations that are done are not done again."""
    pair, config = write_pair(tmp_path, *two_saes(1)), quick(n_permutations=9)
    whole = match_latents(*pair, tmp_path / "whole", config)
    monkeypatch.setattr(activation_match, "_SAVE_SECONDS", -1.0)
    calls: list[str] = []
    for name in ("match_directions", "nearest", "read_side"):
        plain = getattr(activation_match, name)

        def counted(*given: Any, plain: Any = plain, name: str = name, **settings: Any) -> Any:
            calls.append(name)
            return plain(*given, **settings)

        monkeypatch.setattr(activation_match, name, counted)

    def stop(done: int, total: int, state: str) -> None:
        if state == "permutations" and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match_latents(*pair, tmp_path / "out", config, progress=stop)
    assert (calls.count("match_directions"), calls.count("nearest")) == (2, 5)
    calls.clear()
    done = match_latents(*pair, tmp_path / "out", config)
    assert (calls.count("match_directions"), calls.count("nearest")) == (0, 3)
    assert done.summary | {"files": 0, "figures": 0} == whole.summary | {"files": 0, "figures": 0}
    for name in ("matches", "latents"):
        again, once = (ResultStore(tmp_path / each, MATCH).table(name) for each in ("out", "whole"))
        assert again.equals(once)
    calls.clear()
    assert match_latents(*pair, tmp_path / "out", config).was_complete
    assert not calls  # the images are not read again


@pytest.mark.stress
def test_where_images_are_not_shared_p_is_uniform(tmp_path: Path) -> None:
    """20 pairs of SAEs that have types and patients in common, and nothing else."""
    found, n_counterparts = [], 0
    for seed in range(20):
        pair = write_pair(tmp_path / f"w{seed}", *two_saes(seed, n_shared=0))
        done = match_latents(*pair, tmp_path / f"out{seed}", quick(n_permutations=39))
        table = ResultStore(tmp_path / f"out{seed}", MATCH).table("latents").to_pylist()
        found += [row["p"] for row in table]
        n_counterparts += done.summary["n_counterparts"]
    jittered = np.array(found) - np.random.default_rng(0).random(len(found)) / 40
    assert stats.kstest(jittered, "uniform").statistic < 0.05
    assert abs(np.mean(np.array(found) <= 0.05) - 0.05) < 0.025
    assert n_counterparts / (20 * N_A) < 0.06


@pytest.mark.stress
def test_differential_latents_and_cosines_stand_beside(tmp_path: Path) -> None:
    """Two of A's latents differ between diseases; their partners in B do, too."""
    a, b = two_saes(2)
    folders: list[Path] = []
    table = images().assign(patient=[f"P{n % 10:03d}" for n in range(N_IMAGES)])
    diseases = ["AML"] * 12 + ["well"] * 12
    for name, values, latents in (("aa", a, (0, 1)), ("bb", b, (N_B - 1, N_B - 2))):
        rng = np.random.default_rng(len(folders))
        patients = rng.normal(20, 1, (24, values.shape[1])).astype(np.float32)
        patients[:12, latents] += 30
        names = [f"{name}{n}" for n in range(24)]
        folder = write_patient_barcodes(tmp_path / name, patients, diseases, names=names)
        shutil.rmtree(folder / "image.zarr")
        made = write_search_barcodes(tmp_path / f"{name}.images", values, values, np.ceil(values), table)
        shutil.move(str(made / "image.zarr"), folder / "image.zarr")
        folders.append(folder)
        config = CompareConfig(a="AML", b="well", n_permutations=2000, n_bootstraps=2, images_per_patient="all")
        compare(folder, tmp_path / f"{name}.compared", config)
    decoders = (("aa", N_A, 0), ("bb", N_B, 1))
    saes = [write_sae(tmp_path / f"{name}.sae", directions(n, 16, seed)) for name, n, seed in decoders]
    done = match_latents(
        folders[0], folders[1], tmp_path / "out", quick(), sae_a=saes[0], sae_b=saes[1],
        comparison=tmp_path / "aa.compared", comparison_b=tmp_path / "bb.compared",
    )  # fmt: skip
    said = done.summary["differential"]
    assert said["n"] >= 2
    assert said["n_replicated"] == 2
    assert said["share_replicated"] == 2 / said["n"]
    assert said["n_with_counterpart"] >= 2
    row = ResultStore(tmp_path / "out", MATCH).table("matches").to_pylist()[0]
    one, other = (np.asarray(directions(n, 16, seed), np.float64) for n, seed in ((N_A, 0), (N_B, 1)))
    assert row["cosine"] == pytest.approx(float(one[row["latent_a"]] @ other[row["latent_b"]]), abs=1e-5)
    assert row["is_nearest_by_decoder"] == (int((other @ one[row["latent_a"]]).argmax()) == row["latent_b"])
    compare(folders[1], tmp_path / "turned", replace(config, a="well", b="AML"))
    with pytest.raises(
        BadInput, match=r"aa.compared compares 'AML' with 'well' and .*turned compares 'well' with 'AML'"
    ):
        match_latents(
            folders[0], folders[1], tmp_path / "none", quick(),
            comparison=tmp_path / "aa.compared", comparison_b=tmp_path / "turned",
        )  # fmt: skip
    with pytest.raises(SpecMismatch, match=r"the comparison .*bb.compared is not of .*aa"):
        match_latents(folders[0], folders[1], tmp_path / "none", quick(), comparison=tmp_path / "bb.compared")


def test_other_images_under_the_same_names_are_told(tmp_path: Path) -> None:
    """An image is known by its id; two cohorts may both have a 0001.png."""
    a, b = two_saes(5)
    first, second = write_pair(tmp_path / "one", a, b)
    told = match_latents(first, second, tmp_path / "same", quick(n_permutations=1)).notes
    assert not any("content" in note for note in told)
    table = images()
    table.loc[["i001", "i002"], "content_hash"] = ["f" * 64, ""]  # of the second nothing is known
    _, other = write_pair(tmp_path / "two", a, b, table)
    told = match_latents(first, other, tmp_path / "other", quick(n_permutations=1)).notes
    assert any(
        "1 of the 240 images drawn have other content under the same image_id in the second barcodes (i001)" in note
        for note in told
    )


# ------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_matched(tmp_path: Path) -> None:
    a, b = write_pair(tmp_path, *two_saes(3))
    with pytest.raises(BadInput, match="are the same barcodes"):
        match_latents(a, a, tmp_path / "out")
    with pytest.raises(BadInput, match="no column stain of images to permute within"):
        match_latents(a, b, tmp_path / "out", quick(strata=("stain",)))
    with pytest.raises(BadInput, match=r"no latent is active in 400 of the 240 images drawn"):
        match_latents(a, b, tmp_path / "out", quick(min_images=400))
    with pytest.raises(BadInput, match="give both SAEs or none"):
        match_latents(a, b, tmp_path / "out", quick(), sae_a=tmp_path)
    flat, _ = write_pair(tmp_path / "flat", *(np.full_like(each, 0.5) for each in two_saes(3)))
    with pytest.raises(BadInput, match=r"flat.aa: no latent differs between the 240 images drawn, so there is nothing"):
        match_latents(flat, b, tmp_path / "out", quick())
    by_type = np.zeros((N_IMAGES, N_A), np.float32) + 1 + (np.arange(N_IMAGES) // 10 % 4)[:, None].astype(np.float32)
    types, _ = write_pair(tmp_path / "types", by_type, two_saes(3)[1])
    with pytest.raises(BadInput, match=r"types.aa: no latent differs between the 240 images drawn of a stratum"):
        match_latents(types, b, tmp_path / "out", quick(by="within"))
    (tmp_path / "ids.txt").write_text("i001\nnobody\n")
    with pytest.raises(BadInput, match=r"1 of the listed images are not readable in both barcodes \(nobody\)"):
        match_latents(a, b, tmp_path / "out", quick(), only=tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("i001\ni002\ni003\ni004\n")
    with pytest.raises(BadInput, match="4 readable images in common, and 0 of them share their label and patient"):
        match_latents(a, b, tmp_path / "out", quick(), only=tmp_path / "ids.txt")


@pytest.mark.stress
@pytest.mark.usefixtures("figures")
def test_the_command(tmp_path: Path) -> None:
    a, b = write_pair(tmp_path, *two_saes(4))
    given = ("concept", "match", a, b, "-o", tmp_path / "out", "--permutations", 19)
    done = run(*given)
    assert done.exit_code == 0, done.output
    assert "240 images, 30 and 40 latents, 19 permutations: at most about 1 s" in done.stderr
    assert "matched one to one, mean correlation" in done.stdout
    assert (tmp_path / "out" / "match.png").is_file()
    assert json.loads(run(*given, "--json").stdout)["n_compared"] == [30, 40]
    old = run(*given, "--images", 2_000)  # the old name of --n-images, for one release
    assert "--images is now --n-images" in old.stderr
    assert "already complete with these settings" in old.stderr
    fails("n_images", *given, "--images", 100)
    fails("n_images", *given, "--n-images", 100)
    assert "--images" not in run("concept", "match", "--help").stdout
    fails("no barcodes at", "concept", "match", a, tmp_path / "none", "-o", tmp_path / "x")
