"""tau from the latents alone: exact counts, the same for any partitions and workers, and what is written of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from artefacts import contents
from click.testing import CliRunner
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_stores import Row, random_latents, write_latents

from cli import cli
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.barcodes.tau_rule import RULE, below, choose_tau, count_values, smaller_taus
from cytosae.barcodes.value_counts import N_BINS, ValueCounts, ValueScanner, lower_edges
from stores import BadInput, BarcodeStore, DamagedStore, LatentStore, SpecMismatch, verify_folder

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


ROWS: list[Row] = [(f"P{i % 5}", "AB"[i % 5 % 2], i % 7 != 3) for i in range(30)]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of 6 tokens and 40 latents, some unreadable; latents of very different scales, five of them dead."""
    dense = random_latents(4, (30, 6, 40), ROWS) * np.exp(np.linspace(-3, 3, 40)).astype(np.float32)
    dense[..., 35:] = 0
    return write_latents(tmp_path_factory.mktemp("tau") / "latents.zarr", dense, ROWS)


# ------------------------------------------------------------------------------------------- counts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 8), st.integers(2, 7), st.integers(1, 12)),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    token_set=st.sampled_from(["all", "patch", "cls"]),
    piece=st.integers(1, 40),
)
def test_counts_of_values_equal_the_twin(
    seed: int, shape: tuple[int, int, int], share: float, token_set: str, piece: int
) -> None:
    """Every bin and every maximum; entries in pieces that cut rows and images anywhere."""
    n_images, n_tokens, n_latents = shape
    dense = random_latents(seed, shape, [("P", "D", True)] * n_images, share=share).reshape(-1, n_latents)
    dense = reference.round_mantissa(dense, 10) if dense.size else dense
    indptr = 1000 + np.concatenate([[0], np.cumsum((dense != 0).sum(axis=1))])
    indices, values = np.nonzero(dense)[1].astype(np.uint16), np.ascontiguousarray(dense[dense != 0], np.float32)
    scanner = ValueScanner(indptr, n_latents=n_latents, tokens_per_image=n_tokens, token_set=token_set, place="here")
    for at in range(0, len(values), piece):
        scanner.add(1000 + at, indices[at : at + piece], values[at : at + piece])
    found = scanner.finish().whole()
    counts, largest = reference.value_counts(dense, n_tokens, token_set) if n_images else ({}, np.zeros(n_latents))
    there = np.flatnonzero(found.bins)
    assert dict(zip(lower_edges()[there].tolist(), found.bins[there].tolist(), strict=True)) == counts
    assert found.largest.tolist() == largest.tolist()


def test_bins_hold_all_of_float32() -> None:
    """Rising edges; the largest finite number and the least positive one have a bin."""
    edges = lower_edges()
    assert len(edges) == N_BINS
    finite = edges[np.isfinite(edges)]
    assert (np.diff(finite) > 0).all()
    scanner = ValueScanner(np.array([0, 2]), n_latents=2, tokens_per_image=1, token_set="all", place="")
    extremes = np.array([1e-45, np.finfo(np.float32).max], np.float32)
    scanner.add(0, np.array([0, 1], np.uint16), extremes)
    assert scanner.finish().whole().bins.sum() == 2


@pytest.mark.parametrize(
    ("indices", "values"), [([0, 0], [1, 1]), ([0, 9], [1, 1]), ([0, 1], [1, 0]), ([0, 1], [1, np.nan])]
)
def test_entries_that_break_a_promise_are_never_counted(indices: list[int], values: list[float]) -> None:
    scanner = ValueScanner(np.array([0, 2]), n_latents=3, tokens_per_image=1, token_set="all", place="here")
    with pytest.raises(DamagedStore, match="here: "):
        scanner.add(0, np.array(indices, np.uint16), np.array(values, np.float32))


@pytest.mark.stress
@pytest.mark.parametrize("partition_images", [1, 7, None])
def test_counts_do_not_depend_on_partitions_or_workers(
    latents: Path, threads: Client, processes: Client, tmp_path: Path, partition_images: int | None
) -> None:
    stores = [LatentStore(latents)]
    found = [
        count_values(
            stores,
            client,
            tmp_path,
            token_set="patch",
            partition_images=partition_images,
            progress=lambda done, total, state: None,
        )
        for client in (threads, processes)
    ]
    rows = LatentStore(latents).read_images(0, 30)
    dense = np.zeros((180, 40), np.float32)
    dense[np.repeat(np.arange(180), np.diff(rows.indptr)), rows.indices] = rows.values
    counts, largest = reference.value_counts(dense, 6, "patch")
    for each in found:
        assert (each.n_values, each.n_alive, each.n_tokens) == (sum(counts.values()), 35, 26 * 5)
        assert each.largest.tolist() == largest.tolist()
        assert choose_tau(each) == choose_tau(found[0])


# ------------------------------------------------------------------------------------------- barcodes


@pytest.fixture(scope="module")
def automatic(latents: Path, threads: Client) -> Path:
    """Barcodes of these latents with tau auto."""
    root = latents.with_name("auto.barcodes")
    write_barcodes(latents, root, BarcodeConfig(tau="auto"), client=threads)
    return root


@pytest.mark.stress
def test_barcodes_say_the_rule_and_equal_those_of_a_given_tau(
    automatic: Path, latents: Path, tmp_path: Path, threads: Client
) -> None:
    """The number stands where a given one would; but for the hash and the rule, every byte is the same."""
    spec = BarcodeStore(automatic).header.spec
    tau = spec["tau"]
    assert BarcodeStore(automatic).taus == (tau,)
    assert spec["tau_rule"].items() >= RULE.items()
    assert float(f"{tau:.3g}") == tau  # short enough to type
    assert f"{tau:g}" in spec["tau_rule"]["words"]
    assert BarcodeStore(automatic).read("patient").uns["cyto"]["tau_rule"] == spec["tau_rule"]["words"]
    write_barcodes(latents, tmp_path / "given", BarcodeConfig(tau=tau), client=threads)
    ours, theirs = contents(automatic), contents(tmp_path / "given")
    differ = {name for name in ours if theirs.get(name) != ours[name]} | {*theirs} - {*ours}
    assert all(name == "barcodes.json" or "/uns/cyto/" in name for name in differ), differ
    assert "tau_rule" not in BarcodeStore(tmp_path / "given").header.spec
    assert verify_folder(automatic).is_whole


@pytest.mark.stress
@pytest.mark.parametrize("partition_images", [1, 11])
def test_the_same_bytes_for_any_workers_and_partitions(
    automatic: Path, latents: Path, tmp_path: Path, processes: Client, partition_images: int
) -> None:
    config = BarcodeConfig(tau="auto", partition_images=partition_images)
    write_barcodes(latents, tmp_path / "again", config, client=processes)
    assert contents(tmp_path / "again") == contents(automatic)


def test_it_can_be_worked_out_again(automatic: Path, latents: Path, tmp_path: Path, threads: Client) -> None:
    counts = count_values(
        [LatentStore(latents)],
        threads,
        tmp_path,
        token_set="all",
        partition_images=None,
        progress=lambda done, total, state: None,
    )
    spec = BarcodeStore(automatic).header.spec
    again = choose_tau(counts)
    assert (again.tau, again.rule) == (spec["tau"], spec["tau_rule"])


def test_labels_patients_and_diseases_are_not_looked_at(
    automatic: Path, latents: Path, tmp_path: Path, threads: Client
) -> None:
    ids = LatentStore(latents).images["image_id"].to_pylist()
    rows = [f"{name},Q{number % 2},{'xyz'[number % 2]},other" for number, name in enumerate(ids)]
    (tmp_path / "table.csv").write_text("\n".join(["image_id,patient,disease,label", *rows]))
    other = write_barcodes(
        latents, tmp_path / "b", BarcodeConfig(tau="auto"), client=threads, table=tmp_path / "table.csv"
    )
    assert other.n_patients == 2
    assert other.taus == BarcodeStore(automatic).taus


@pytest.mark.stress
def test_a_finished_or_interrupted_job_does_not_look_again(
    automatic: Path, latents: Path, tmp_path: Path, threads: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int, state: str) -> None:
        if state == "joining":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_barcodes(latents, tmp_path / "b", BarcodeConfig(tau="auto"), client=threads, progress=stop)
    monkeypatch.setattr("cytosae.barcodes.tau_rule.count_values", lambda *_, **__: pytest.fail("it looked again"))
    write_barcodes(latents, tmp_path / "b", BarcodeConfig(tau="auto"), client=threads)
    assert contents(tmp_path / "b") == contents(automatic)
    again = write_barcodes(latents, automatic, BarcodeConfig(tau="auto"), client=threads)
    assert again.was_complete
    assert again.tau_rule is not None
    with pytest.raises(SpecMismatch, match="holds barcodes with other settings"):
        write_barcodes(latents, automatic, BarcodeConfig(tau=0.123), client=threads)


@pytest.mark.stress
def test_stores_that_follow_each_other_are_counted_together(
    automatic: Path, latents: Path, tmp_path: Path, threads: Client
) -> None:
    """Two halves of the images in two stores: the tau of the whole."""
    whole = LatentStore(latents)
    rows = whole.read_images(0, 30)
    dense = np.zeros((180, 40), np.float32)
    dense[np.repeat(np.arange(180), np.diff(rows.indptr)), rows.indices] = rows.values
    images = dense.reshape(30, 6, 40)
    halves = [
        write_latents(tmp_path / f"{name}.zarr", images[some], ROWS[some], dataset=name)
        for name, some in (("a", slice(0, 13)), ("b", slice(13, 30)))
    ]
    done = write_barcodes(halves, tmp_path / "b", BarcodeConfig(tau="auto"), client=threads)
    assert done.taus == BarcodeStore(automatic).taus


def test_what_has_no_tau_is_refused(tmp_path: Path, threads: Client) -> None:
    silent = write_latents(tmp_path / "silent.zarr", np.zeros((3, 4, 5), np.float32), ROWS[:3])
    with pytest.raises(BadInput, match="no latent is active at any all token: there is no tau to choose"):
        write_barcodes(silent, tmp_path / "b", BarcodeConfig(tau="auto"), client=threads)
    assert not (tmp_path / "b").exists()
    dense = np.full((3, 4, 5), 2, np.float32)
    pruned = write_latents(tmp_path / "pruned.zarr", dense, [("P", "A", True)] * 3, min_activation=0.5)
    with pytest.raises(BadInput, match=r"was pruned below 0\.5: tau auto looks at all values; encode without"):
        write_barcodes(pruned, tmp_path / "b", BarcodeConfig(tau="auto"), client=threads)
    with pytest.raises(BadInput, match="tau must be one or several numbers, or 'auto'; found 'otsu'"):
        BarcodeConfig(tau="otsu")


@pytest.mark.stress
def test_the_command(latents: Path, tmp_path: Path) -> None:
    def run(*taus: str) -> Any:
        options = [word for tau in taus for word in ("--tau", tau)]
        return CliRunner().invoke(cli, ["barcode", str(latents), "-o", str(tmp_path / "b"), "--workers", "1", *options])

    done = run("auto")
    assert done.exit_code == 0, done.output
    spec = json.loads((tmp_path / "b" / "barcodes.json").read_text())["spec"]
    assert f"tau auto: {spec['tau_rule']['words']}" in done.stdout.splitlines()
    assert f"latents, tau {spec['tau']:g}" in done.stdout
    assert "give it alone" in run("auto", "0.2").stderr
    assert "'high' is not a valid float" in run("high").stderr


# ------------------------------------------------------------------------------------------- a tau that is too large


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=st.floats(2.0**-100, 2.0**100, width=32), digits=st.integers(2, 3))
def test_below_is_the_next_short_number(value: float, digits: int) -> None:
    found = below(value, digits)
    assert np.float32(found) < np.float32(value)
    assert float(f"{found:.{digits}g}") == found
    exponent = int(np.floor(np.log10(value)))
    assert value - found <= 1.001 * 10.0 ** (exponent + 1 - digits)


@pytest.mark.parametrize(("value", "two", "three"), [(1.0, 0.99, 0.999), (10.0, 9.9, 9.99), (0.1, 0.099, 0.0999)])
def test_below_a_power_of_ten_the_next_number_is_a_finer_one(value: float, two: float, three: float) -> None:
    """0.99 is not the largest number of three digits below 1: values from 0.99 to 1 would change sides."""
    assert below(value) == two
    assert below(value, 3) == three


def test_a_cut_at_one_leaves_all_weak_values_below_tau() -> None:
    weak, clear = np.full(50, 0.9951171875, np.float32), np.full(50, 1.0, np.float32)
    found = choose_tau(counted(np.concatenate([weak, clear])))
    assert found.tau == 0.999
    assert weak.max() < np.float32(found.tau) < clear.min()


def test_smaller_taus_by_hand() -> None:
    """Ten living latents of 1 to 10 (times 0.01), two dead: half of them exceed 0.059, nine 0.019, all 0.0099."""
    largest = (np.array([0, *range(1, 11), 0]) / 100).astype(np.float32)
    assert smaller_taus(largest, 0.2, 0.0) == [[0.059, 5], [0.019, 9], [0.0099, 10], [0.0, 10]]
    assert smaller_taus(largest, 0.065, 0.3) == [[0.059, 5], [0.019, 9], [0.0099, 10], [0.0, 10]]  # 4 of 10 remain
    assert smaller_taus(largest, 0.055, 0.3) == []  # 5 remain
    assert smaller_taus(largest, 0.055, 0.009)[0] == [0.019, 9]  # only smaller ones
    assert smaller_taus(np.zeros(3, np.float32), 0.2, 0.0) == []


@pytest.mark.stress
def test_a_tau_that_leaves_most_latents_out_says_which_would_not(
    latents: Path, tmp_path: Path, threads: Client
) -> None:
    done = write_barcodes(latents, tmp_path / "b", BarcodeConfig(tau=30.0), client=threads)
    var = BarcodeStore(tmp_path / "b").read("image").var
    largest = var["max_activation"].to_numpy()
    assert done.would_keep == tuple((tau, int((largest > np.float32(tau)).sum())) for tau, _ in done.would_keep)
    assert [n for _, n in done.would_keep] == sorted(n for _, n in done.would_keep)
    assert done.would_keep[-1] == (0.0, 35)
    assert done.would_keep[0][1] >= 18
    (warning,) = done.warnings
    assert f"{done.would_keep[0][1]:,} latents exceed tau {done.would_keep[0][0]:g}" in warning
    assert "--tau auto chooses one" in warning
    again = write_barcodes(latents, tmp_path / "b", BarcodeConfig(tau=30.0), client=threads)
    assert again.warnings == done.warnings
    fine = write_barcodes(latents, tmp_path / "c", BarcodeConfig(tau=0.001), client=threads)
    assert (fine.would_keep, fine.warnings) == ((), ())


# ------------------------------------------------------------------------------------------- the rule


def otsu_twin(values: list[float]) -> tuple[float, float]:
    """(largest value of the lower group, smallest of the upper one): every cut tried, means by hand."""
    ordered = sorted(values)
    logs = [math.log(value) for value in ordered]
    best, found = -1.0, (0.0, 0.0)
    for cut in range(1, len(ordered)):
        if ordered[cut - 1] == ordered[cut]:
            continue
        low, high = logs[:cut], logs[cut:]
        between = len(low) * len(high) * (sum(low) / len(low) - sum(high) / len(high)) ** 2
        if between > best * (1 + 1e-9):
            best, found = between, (ordered[cut - 1], ordered[cut])
    return found


def counted(values: Any, n_latents: int = 1) -> ValueCounts:
    """Counts of these values, all of one latent."""
    values = np.asarray(values, np.float32)
    rows = np.arange(len(values) + 1)
    scanner = ValueScanner(rows, n_latents=n_latents, tokens_per_image=1, token_set="all", place="")
    scanner.add(0, np.zeros(len(values), np.uint16), values)
    found = scanner.finish().whole()
    return ValueCounts(found.bins, found.largest, len(values))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 60), spread=st.floats(0.1, 6))
def test_the_cut_equals_the_twin(seed: int, n: int, spread: float) -> None:
    """Values with ten mantissa bits, as they are stored: tau lies below the upper group, by less than three digits."""
    values = reference.round_mantissa(np.random.default_rng(seed).lognormal(-2, spread, n).astype(np.float32), 10)
    low, high = otsu_twin(values.tolist())
    tau = choose_tau(counted(values)).tau
    assert tau < high
    assert tau >= min(low, high * 0.99) * (1 - 1e-6)
    assert float(f"{tau:.3g}") == tau


def test_weak_and_clear_values_are_parted() -> None:
    """A thousand about 0.01 and a hundred about 1: tau lies between, and says how much lies between the groups."""
    rng = np.random.default_rng(0)
    weak, clear = np.exp(rng.normal(np.log(0.01), 0.3, 1000)), np.exp(rng.normal(0, 0.3, 100))
    found = choose_tau(counted(np.concatenate([weak, clear])))
    assert weak.max() * 0.99 < found.tau < clear.min()
    assert found.rule["n_values"] == 1100
    assert found.rule["share_of_variance_between"] > 0.9
    assert found.rule["words"].startswith(f"{found.tau:g} parts the 1,100 values into weak and clear ones")


def test_values_that_are_all_alike_are_not_parted() -> None:
    found = choose_tau(counted([0.5] * 7))
    assert (found.tau, found.rule["n_latents_remaining"], found.rule["share_of_variance_between"]) == (0.0, 1, 0.0)


def test_a_loud_latent_does_not_silence_the_others() -> None:
    """Nine latents of about 0.01 and one of about 10: cut between them, one of ten would remain; nine do at least."""
    rng = np.random.default_rng(2)
    values = np.exp(rng.normal(np.log([0.01] * 9 + [10.0]), 0.2, (300, 10))).astype(np.float32)
    rows, indices = np.arange(0, 3001, 10), np.tile(np.arange(10, dtype=np.uint16), 300)
    scanner = ValueScanner(rows, n_latents=12, tokens_per_image=1, token_set="all", place="")
    scanner.add(0, indices, values.ravel())
    found = choose_tau(scanner.finish().whole())
    largest = values.max(axis=0)
    assert (largest > np.float32(found.rule["cut"])).sum() == 1
    assert found.rule["n_latents_remaining"] == (largest > np.float32(found.tau)).sum() == 9
    assert (largest > np.float32(found.tau * 1.02)).sum() < 9  # it is the largest such number, to its digits
    assert f"{found.tau:g} is the largest that 90% of the latents exceed" in found.rule["words"]


def test_a_scale_of_the_latents_scales_tau() -> None:
    """tau is in the unit of the SAE: latents 8 times as large have a tau 8 times as large, to its three digits."""
    values = np.random.default_rng(1).lognormal(-3, 2, 500)
    one, eight = (choose_tau(counted(values * factor)).tau for factor in (1, 8))
    assert eight == pytest.approx(8 * one, rel=0.02)
