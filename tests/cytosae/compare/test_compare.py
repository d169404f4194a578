"""A comparison of two diseases: numbers equal to slow twins and scipy, what is left out is said, folders are whole."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from barcode_maker import write_patient_barcodes
from command_line import fails, run
from PIL import Image
from places import ROOT
from scipy import stats

from cytosae.compare import CompareConfig, Comparison, compare
from cytosae.compare.differential import correlate
from cytosae.compare.top_list_stability import bootstrap_stability
from stores import COMPARISON, ResultStore
from stores.errors import BadInput, DamagedStore, SpecMismatch

SICK, WELL, OTHER = "CBFB::MYH11", "control", "PML::RARA"
DISEASES = [SICK] * 9 + [WELL] * 12 + [OTHER] * 4 + [""] * 2
N_LATENTS, PLANTED_A, PLANTED_B = 120, [3, 40], [7]
SILENT, ALWAYS = 50, 51  # latents that are 0 everywhere, and 5 everywhere


def drawn(seed: int = 0) -> npt.NDArray[np.float32]:
    """(patients, latents): skewed counts, most of them rare; two latents higher in SICK, one in WELL."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-2, 2, N_LATENTS)
    values = rng.gamma(1.5, scale, (len(DISEASES), N_LATENTS)) * (rng.random((len(DISEASES), N_LATENTS)) < 0.7)
    values[:9, PLANTED_A] = rng.uniform(60, 90, (9, 2))
    values[9:21, PLANTED_A] = rng.uniform(0, 20, (12, 2))
    values[9:21, PLANTED_B] = rng.uniform(300, 400, (12, 1))
    values[:, SILENT], values[:, ALWAYS] = 0, 5
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def barcodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patient_barcodes(tmp_path_factory.mktemp("compare") / "b", drawn(), DISEASES)


def small(a: str = SICK, b: str = WELL, **settings: Any) -> CompareConfig:
    return CompareConfig(a=a, b=b, **{"n_permutations": 500, "top": 10, "n_bootstraps": 100, **settings})


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second; only `compared` and who asks for `figures` draws them."""
    if "figures" not in request.fixturenames:
        for name in ("plot_scatter", "plot_patients", "plot_correlation"):
            monkeypatch.setattr(f"cytosae.compare.differential.{name}", lambda *given: None)


@pytest.fixture
def figures() -> None:
    """For tests that look at figures."""


@pytest.fixture(scope="module")
def compared(barcodes: Path) -> Comparison:
    return compare(barcodes, barcodes.with_name("compared"), small())


def columns(done: Comparison) -> dict[str, npt.NDArray[Any]]:
    table = done.results.table("differential")
    return {name: np.asarray(table[name].to_pandas()) for name in table.column_names}


@pytest.mark.stress
def test_planted_latents_lead_both_lists(compared: Comparison) -> None:
    top, found = compared.top(10), columns(compared)
    assert {row["latent"] for row in top["a"][:2]} <= {*PLANTED_A, *np.argsort(-found["difference"])[:2]}
    for latents, group in ((PLANTED_A, "a"), (PLANTED_B, "b")):
        assert {*latents} <= {row["latent"] for row in top[group]}
        assert (found["p_max_t"][latents] == 1 / 501).all()
        assert (found["stability"][latents] == 1).all()
    assert compared.summary["n_p_max_t_at_most_0.05"] == 3
    assert (found["hedges_g"][PLANTED_A] > 2).all()
    assert (found["auc"][PLANTED_A] == 1).all()
    assert (found["auc"][PLANTED_B] == 0).all()


def test_every_column_is_explained(compared: Comparison) -> None:
    page = (ROOT / "docs" / "compare.md").read_text()
    missing = [name for name in columns(compared) if f"`{name}`" not in page]
    assert not missing, f"say in docs/compare.md what these mean: {missing}"


def test_every_column_is_what_scipy_and_a_loop_say(compared: Comparison) -> None:
    found, values = columns(compared), drawn().astype(np.float64)
    assert np.array_equal(found["latent"], np.arange(N_LATENTS))
    for latent in range(N_LATENTS):
        a, b = values[:9, latent], values[9:21, latent]
        assert found["mean_a"][latent] == pytest.approx(a.mean(), rel=1e-12)
        assert found["mean_b"][latent] == pytest.approx(b.mean(), rel=1e-12)
        assert found["difference"][latent] == pytest.approx(a.mean() - b.mean(), rel=1e-9, abs=1e-12)
        assert found["n_patients_a"][latent] == sum(a > 0)
        assert found["n_patients_b"][latent] == sum(b > 0)
        assert found["auc"][latent] == pytest.approx(stats.mannwhitneyu(a, b).statistic / (9 * 12), rel=1e-12)
        is_tested = len({*a, *b}) > 1
        assert found["is_tested"][latent] == is_tested
        assert np.isnan(found["p"][latent]) == (not is_tested)
        assert np.isnan(found["hedges_g"][latent]) == (not is_tested)
        if is_tested:
            spread = (((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) ** 0.5 / 19**0.5
            g = (a.mean() - b.mean()) / spread * (1 - 3 / (4 * 19 - 1))
            assert found["hedges_g"][latent] == pytest.approx(g, rel=1e-9)
    p = found["p"][found["is_tested"]]
    order, q, lowest = np.argsort(p), np.empty(len(p)), 1.0
    for place in range(len(p) - 1, -1, -1):
        lowest = min(lowest, p[order[place]] * len(p) / (place + 1))
        q[order[place]] = lowest
    assert np.allclose(found["q"][found["is_tested"]], q, rtol=1e-12)
    assert compared.summary["left_out"] == {"not_listed": 0, "equal_in_all": 2, "few_patients": 0, "low_mean": 0}
    assert not found["is_tested"][[SILENT, ALWAYS]].any()
    for group, sign in (("a", 1), ("b", -1)):
        ours = [latent for latent in np.argsort(-sign * found["difference"]) if sign * found["difference"][latent] > 0]
        assert [found[f"rank_{group}"][latent] for latent in ours] == [*range(1, len(ours) + 1)]
        assert np.isnan(found[f"rank_{group}"]).sum() == N_LATENTS - len(ours)


def test_the_other_tables(compared: Comparison, barcodes: Path) -> None:
    values, found = drawn(), columns(compared)
    chosen = {latent for latent in range(N_LATENTS) if min(found["rank_a"][latent], found["rank_b"][latent]) <= 10} | {
        latent for latent in range(N_LATENTS) if found["rank_a"][latent] <= 10 or found["rank_b"][latent] <= 10
    }
    rows = compared.results.table("patients").to_pylist()
    assert len(rows) == 20 * 21
    assert {row["latent"] for row in rows} == chosen
    for row in rows:
        patient = int(row["patient"][1:])
        assert row["value"] == values[patient, row["latent"]]
        assert (row["disease"], row["group"]) == (DISEASES[patient], "a" if patient < 9 else "b")
    correlation = compared.results.table("correlation").to_pylist()
    assert len(correlation) == 21 * 21
    tested = np.flatnonzero(found["is_tested"])
    for row in correlation[::17]:
        one, other = (values[int(row[name][1:]), tested].astype(np.float64) for name in ("patient", "other"))
        assert row["correlation"] == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-9)
    for name in ("scatter", "patients", "correlation"):
        with Image.open(compared.results.root / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10
        assert (compared.results.root / f"{name}.svg").stat().st_size > 1000


def test_stability_is_the_share_of_bootstraps_in_the_top_list() -> None:
    """A loop that draws the same patients, and ranks them as the list is ranked."""
    rng, is_a = np.random.default_rng(0), np.arange(11) < 5
    values = rng.exponential(1, (11, 30))
    values[:, 4] = 0
    values[is_a, 2] += 9
    found = bootstrap_stability(values, is_a, top=3, n_bootstraps=70, seed=9)
    again = np.random.default_rng([9, 1])
    hits, done = np.zeros(30), 0
    direction = np.sign(values[is_a].mean(0) - values[~is_a].mean(0))
    while done < 70:
        size = min(64, 70 - done)
        times = [again.multinomial(n, np.full(n, 1 / n), size) for n in (5, 6)]
        for of_a, of_b in zip(*times, strict=True):
            a, b = np.repeat(values[is_a], of_a, axis=0), np.repeat(values[~is_a], of_b, axis=0)
            difference = a.mean(0) - b.mean(0)
            for sign in (1, -1):
                best = np.argsort(-sign * difference)[:3]
                hits[[latent for latent in best if direction[latent] == sign]] += 1
        done += size
    assert np.allclose(found, np.where(direction == 0, np.nan, hits / 70), equal_nan=True)
    assert np.isnan(found[4])
    assert found[2] > 0.9
    assert np.isnan(bootstrap_stability(values, is_a, top=3, n_bootstraps=0, seed=9)).all()
    (alone,) = bootstrap_stability(values[:, [5]], is_a, top=3, n_bootstraps=70, seed=9)
    assert 0.5 < alone < 1  # a list with room for all still has no latent of the other side


@pytest.mark.stress
def test_the_order_of_patients_has_no_part(barcodes: Path, compared: Comparison, tmp_path: Path) -> None:
    """Nor does which disease is called A, but for the sides."""
    order = np.random.default_rng(1).permutation(len(DISEASES))
    names = [f"P{patient:03d}" for patient in order]
    moved = write_patient_barcodes(tmp_path / "b", drawn()[order], [DISEASES[i] for i in order], names=names)
    other = compare(moved, tmp_path / "moved", small())
    for name in ("differential", "patients", "correlation"):
        assert other.results.table(name).equals(compared.results.table(name))
    one, swapped = columns(compared), columns(compare(barcodes, tmp_path / "swapped", small(WELL, SICK)))
    for name in ("p", "q", "p_max_t"):
        assert np.array_equal(one[name], swapped[name], equal_nan=True)
    assert np.array_equal(one["rank_a"], swapped["rank_b"], equal_nan=True)
    assert np.allclose(one["hedges_g"], -swapped["hedges_g"], equal_nan=True)


@pytest.mark.stress
def test_one_against_the_rest(barcodes: Path, tmp_path: Path) -> None:
    """Of all that have a disease; unless one is called so."""
    done = compare(barcodes, tmp_path / "out", small(b="rest"))
    assert done.summary["b"]["n_patients"] == 16
    assert (done.summary["n_patients_without_disease"], done.summary["n_patients_of_other_diseases"]) == (2, 0)
    assert {row["disease"] for row in done.results.table("patients").to_pylist()} == {SICK, WELL, OTHER}
    named = write_patient_barcodes(tmp_path / "b", drawn(), [d.replace(OTHER, "rest") for d in DISEASES])
    done = compare(named, tmp_path / "named", small(b="rest"))
    assert done.summary["b"]["n_patients"] == 4
    assert done.summary["n_patients_of_other_diseases"] == 12


@pytest.mark.stress
def test_few_patients_are_enumerated_and_told(barcodes: Path, tmp_path: Path) -> None:
    """9 + 4 patients: 715 ways. 2 + 2: six, and nothing can be found."""
    done = compare(barcodes, tmp_path / "few", small(SICK, OTHER, n_permutations=1_000))
    assert done.summary["is_exact"]
    assert done.summary["n_permutations"] == 715
    assert done.summary["p_floor"] == 1 / 715
    four = write_patient_barcodes(tmp_path / "b", drawn()[[0, 1, 20, 19]], [SICK, SICK, WELL, WELL])
    done = compare(four, tmp_path / "four", small())
    assert done.summary["p_floor"] == 2 / 6
    assert done.summary["warnings"][:-1] == [
        "no p can be below 0.33 with 2 against 2 patients: it takes more patients to say more"
    ]
    assert done.summary["warnings"][-1].startswith(f"{done.summary['n_without_interval']} tested latents are above 0")


def test_what_a_q_can_reach_is_told(barcodes: Path, tmp_path: Path) -> None:
    assert compare(barcodes, tmp_path / "out", small(n_permutations=400)).summary["warnings"] == [
        "q <= 0.05 takes 6 latents at the smallest p that is possible (0.0025); a single one can have it with "
        "--permutations 2360, or with fewer tested (--min-patients)"
    ]
    assert compare(barcodes, tmp_path / "enough", small(n_permutations=2_360)).summary["warnings"] == []
    few = compare(barcodes, tmp_path / "few", small(SICK, OTHER)).summary["warnings"]  # 715 ways are no 2,360
    assert few[-1].endswith(
        "smallest p that is possible (0.002); a single one can have it with fewer tested (--min-patients)"
    )


def test_filters_see_no_diseases_and_are_counted(barcodes: Path, tmp_path: Path) -> None:
    values = drawn()[:21]
    n_positive, mean = (values > 0).sum(0), values.mean(0, dtype=np.float64)
    done = compare(barcodes, tmp_path / "out", small(min_patients=15, min_mean=0.5))
    kept = (n_positive >= 15) & (mean >= 0.5)
    kept[ALWAYS] = False
    assert np.array_equal(columns(done)["is_tested"], kept)
    left_out = done.summary["left_out"]
    assert left_out["few_patients"] > 0 < left_out["low_mean"]
    assert sum(left_out.values()) == N_LATENTS - kept.sum() == N_LATENTS - done.summary["n_tested"]
    shuffled = np.random.default_rng(0).permutation(DISEASES[:21]).tolist() + DISEASES[21:]
    other = write_patient_barcodes(tmp_path / "b", drawn(), shuffled)
    again = compare(other, tmp_path / "again", small(min_patients=15, min_mean=0.5))
    assert np.array_equal(columns(again)["is_tested"], kept)
    with pytest.raises(BadInput, match=r"none of 120 latents is left to be tested \(2 equal in all patients, 118 of a"):
        compare(barcodes, tmp_path / "none", small(min_mean=1e9))
    assert not (tmp_path / "none").exists()  # so that the next try may have other settings


def test_a_list_of_latents(barcodes: Path, tmp_path: Path) -> None:
    """Made elsewhere; a list that names what is no latent is refused."""
    listed = tmp_path / "list.parquet"
    pq.write_table(pa.table({"latent": [40, 3, 51, 3, 7], "note": ["x"] * 5}), listed)
    done = compare(barcodes, tmp_path / "out", small(), latents=listed)
    assert [*np.flatnonzero(columns(done)["is_tested"])] == [3, 7, 40]
    assert done.summary["left_out"] == {"not_listed": 116, "equal_in_all": 1, "few_patients": 0, "low_mean": 0}
    with pytest.raises(SpecMismatch, match="with other settings \\(latents"):
        compare(barcodes, tmp_path / "out", small())
    text = tmp_path / "list.csv"
    for content, words in {
        "latents\n3\n": "has no column 'latent' \\(found: latents",
        "latent\n": "must name latents from 0 to 119; found none",
        "latent\n3\n120\n-1\n": r"must name latents from 0 to 119; found 1 that are not \('-1'\)",
        "latent\n3\n120\n": r"found 1 that are not \(120\)",
        "latent,x\n,1\n": r"found 1 that are not \(None\)",
        f"latent\n{'9' * 5000}\n": "that are not",
    }.items():
        text.write_text(content)
        with pytest.raises(BadInput, match=words):
            compare(barcodes, tmp_path / "bad", small(), latents=text)
    assert not (tmp_path / "bad").exists()


def test_what_else_may_make_groups_differ_is_said(tmp_path: Path) -> None:
    datasets = ["here"] * 9 + ["there"] * 18
    n_images = [300] * 9 + [100] * 18
    uneven = write_patient_barcodes(
        tmp_path / "b", drawn(), DISEASES, datasets=datasets, n_images=n_images, normalize="cytosae-release"
    )
    warnings = compare(uneven, tmp_path / "out", small(n_permutations=3_000)).summary["warnings"]
    assert len(warnings) == 3
    assert warnings[0].startswith("images per patient differ: median 300 in CBFB::MYH11, 100 in control")
    assert warnings[1].startswith("these barcodes are normalised as cytosae-release")
    assert warnings[2].startswith("no dataset has patients of both groups (here against there)")


def test_patients_with_an_image_in_common_are_named(tmp_path: Path) -> None:
    """Only of those who are compared."""
    hashes = [f"h{number}" for number in range(len(DISEASES))]
    hashes[12], hashes[22], hashes[24] = hashes[3], hashes[4], ""
    root = write_patient_barcodes(tmp_path / "b", drawn(), DISEASES, content_hashes=hashes)
    warnings = compare(root, tmp_path / "out", small(n_permutations=3_000)).summary["warnings"]
    assert [warning.split(":")[0] for warning in warnings] == [
        "2 patients have an image that is also another's (P003, P012)"
    ]


@pytest.mark.stress
def test_hostile_names_and_undefined_correlations_are_drawn(figures: None, tmp_path: Path) -> None:
    """Mathematics and control characters in the names; a patient without any count."""
    bad = "$\\frac{\x1b[31m"
    values = drawn()[:21]
    values[4] = 0
    values[:, ALWAYS] = 0
    diseases = [bad] * 9 + [WELL] * 12
    root = write_patient_barcodes(tmp_path / "b", values, diseases, names=[f"$^{i}" for i in range(21)])
    command = ("compare", root, bad, WELL, "-o", tmp_path / "out", "--permutations", 50)
    shown = run(*command)
    assert shown.exit_code == 0
    assert "\x1b[31m" not in shown.output
    assert (tmp_path / "out" / "patients.svg").is_file()
    rows = ResultStore(tmp_path / "out", COMPARISON).table("correlation").to_pylist()
    assert sum(row["correlation"] is None for row in rows) == 2 * 21 - 1


def test_values_that_no_barcode_has_are_refused(barcodes: Path, tmp_path: Path) -> None:
    values = drawn()
    values[2, 5] = -1
    negative = write_patient_barcodes(tmp_path / "b", values, DISEASES)
    with pytest.raises(DamagedStore, match=r"patient.zarr has values that are negative or not finite; count again"):
        compare(negative, tmp_path / "out", small())
    copy = Path(shutil.copytree(barcodes, tmp_path / "copy"))
    chunk = next(path for path in (copy / "patient.zarr" / "X" / "data" / "c").rglob("*") if path.is_file())
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(DamagedStore, match=r"patient.zarr cannot be read"):
        compare(copy, tmp_path / "out", small())
    chunk.unlink()
    with pytest.raises(DamagedStore, match="is missing; count again with cyto barcode --overwrite"):
        compare(copy, tmp_path / "out", small())
    assert not (tmp_path / "out").exists()


def test_correlation_of_equal_and_opposite() -> None:
    values = np.array([[1, 2, 3], [2, 4, 6], [3, 2, 1], [5, 5, 5]], np.float32)
    found = correlate(values)
    assert np.allclose(found[:3, :3], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    assert np.isnan(found[3]).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_permutations": 0}, "n_permutations must be at least 1; found 0"),
        ({"top": 0}, "top must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"min_mean": float("nan")}, "min_mean must be a number of at least 0; found nan"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        small(**settings)


def test_the_command(barcodes: Path, tmp_path: Path) -> None:
    """What it prints, once more when it is complete, and as JSON; another setting is refused."""
    out = tmp_path / "out"
    command = ("compare", barcodes, SICK, WELL, "-o", out, "--permutations", 400, "--top", 5, "--bootstraps", 20)
    done = run(*command)
    assert done.exit_code == 0, done.output
    for line in (
        "A: CBFB::MYH11, 9 patients with 90 images (10 to 10, median 10 each)",
        "B: control, 12 patients with 120 images (10 to 10, median 10 each)",
        "tested: 118 of 120 latents at tau 0.2; not: 2 equal in all patients",
        "400 permutations to share out the patients, seed 0; no p can be below 0.0025",
        "p_max_t <= 0.05: 3",
        "; first those with p_max_t, then q, then p of at most 0.05, each by difference; then the others by p\n",
    ):
        assert line in done.stdout
    assert "warning: q <= 0.05 takes 6 latents" in done.stderr
    again = run(*command)
    assert "already complete" in again.stderr
    assert again.stdout == done.stdout
    found = json.loads(run(*command, "--json").stdout)
    assert found["n_tested"] == 118
    assert len(found["top"]["a"]) == 5
    assert found["top"]["b"][0]["rank_b"] == 1
    fails("a comparison with other settings", *command, "--seed", 1)
    assert run(*command, "--seed", 1, "--overwrite").exit_code == 0
    ResultStore(out, COMPARISON).check()


@pytest.mark.stress
def test_mistakes_get_one_line(barcodes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails(
        r"no disease 'cbfb'.*; there are CBFB::MYH11, PML::RARA, control", "compare", barcodes, "cbfb", WELL, "-o", out
    )
    fails("no disease 'rest'", "compare", barcodes, "rest", WELL, "-o", out)
    fails("both groups are 'control'", "compare", barcodes, WELL, WELL, "-o", out)
    fails("has no barcodes at tau 0.3", "compare", barcodes, SICK, WELL, "-o", out, "--tau", 0.3)
    fails("no barcodes at", "compare", tmp_path / "nothing", SICK, WELL, "-o", out)
    fails("contains an input", "compare", barcodes, SICK, WELL, "-o", barcodes, "--overwrite")
    alone = write_patient_barcodes(tmp_path / "alone", drawn()[8:], DISEASES[8:])
    fails("'CBFB::MYH11' has 1 patient, and a comparison needs at least 2", "compare", alone, SICK, WELL, "-o", out)
    two = write_patient_barcodes(tmp_path / "two", drawn(), DISEASES, taus=(0.1, 0.2))
    fails("several tau: choose one of 0.1, 0.2", "compare", two, SICK, WELL, "-o", out)
    assert not out.exists()
    assert run("compare", two, SICK, WELL, "-o", out, "--tau", 0.1, "--permutations", 50).exit_code == 0


@pytest.mark.stress
def test_ctrl_c_in_the_permutations_is_one_line(barcodes: Path, tmp_path: Path) -> None:
    """And the half folder is made whole by the next run."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cli", "compare", barcodes, SICK, WELL, "-o", out, "--permutations", "1000000000"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("compare:")
    process.send_signal(signal.SIGTERM)  # treated like Ctrl-C, which a background job may have switched off
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    fails("with other settings", *command[3:-1], "100")
    assert run(*command[3:-1], "100", "--overwrite").exit_code == 0


def test_a_notebook_shows_what_the_command_prints(compared: Comparison, barcodes: Path) -> None:
    """The same lines and warnings, the settings, and as HTML both lists and the figure; names are escaped."""
    command = ("compare", barcodes, SICK, WELL, "-o", compared.out, "--permutations", 500, "--top", 10)
    done = run(*command, "--bootstraps", 100)
    assert "already complete" in done.stderr
    assert [*compared.lines()] == done.stdout.splitlines()
    assert [f"warning: {warning}" for warning in compared.warnings] == done.stderr.splitlines()[1:]
    assert str(compared).splitlines() == [*compared.lines(), *(f"warning: {each}" for each in compared.warnings)]
    assert compared.config == small(tau=0.2)
    assert json.loads(run(*command, "--bootstraps", 100, "--json").stdout) == compared.to_json()
    shown = compared._repr_html_()
    assert shown.count("<table>") == 2
    assert '<img alt="scatter" src="data:image/png;base64,' in shown
    assert "p_max_t &lt;= 0.05" in shown
