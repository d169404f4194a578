"""Patient-specific concepts: z by hand, what is planted is found, noise is not, and who cannot be compared."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import scipy.sparse as ss
from command_line import fails, run
from latent_stores import Row, local_client, write_latents
from scipy.stats import norm
from scipy.stats import t as student

from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.relations import PatientConfig, dispersion_of, write_patient_concepts
from cytosae.relations.figures import plot_patient
from cytosae.relations.patient_concepts import PatientConcepts, compare_patient, image_spread
from stores import PATIENT_CONCEPTS, BarcodeStore, ResultStore
from stores.errors import BadInput, DamagedStore

Floats = npt.NDArray[np.float64]


def compared(
    images: Floats,
    others: Floats,
    *,
    clumps: Floats | None = None,
    min_images: int = 1,
    n_splits: int = 200,
    seed: int = 0,
) -> PatientConcepts:
    latents = np.arange(images.shape[1]) * 10
    found = compare_patient(
        latents,
        ss.csr_matrix(images.astype(np.float32)),
        others,
        dispersion=np.ones(len(latents)) if clumps is None else clumps,
        images_per_patient=float(len(images)),
        min_images=min_images,
        n_splits=n_splits,
        rng=np.random.default_rng(seed),
    )
    assert (np.diff(np.abs(found.z)) <= 0).all()
    return found


def z_by_hand(mine: float, theirs: Floats, n_images: int, k: float, clumps: float) -> float:
    """The definition, a latent at a time: prediction of one more on two scales, the less far one counts."""
    n, error = len(theirs), np.sqrt(max(clumps * max(mine, theirs.mean()) / n_images, 1 / n_images**2))
    logs = np.log(theirs + 1 / k)
    t = (mine - theirs.mean()) / np.sqrt(theirs.var(ddof=1) * (1 + 1 / n) + error**2)
    log_error = error / (max(mine, theirs.mean()) + 1 / k)
    t_log = (np.log(mine + 1 / k) - logs.mean()) / np.sqrt(logs.var(ddof=1) * (1 + 1 / n) + log_error**2)
    t = min(t, t_log, key=abs) if t * t_log > 0 else 0
    return float(np.sign(t) * norm.isf(student.sf(abs(t), n - 1)))


def test_z_by_hand() -> None:
    """Latents 0 to 6: raised against spread, at a MAD of 0, in a single image; lowered; absent; equal; constant."""
    images = np.array(
        [[4, 2, 8, 0, 0, 1, 3], [6, 2, 0, 1, 0, 1, 3], [5, 0, 0, 0, 0, 1, 3], [5, 0, 0, 0, 0, 1, 3]], float
    )
    others = np.array(
        [
            [1, 0, 0, 2, 4, 1, 0],
            [2, 0, 0, 3, 4, 1, 0],
            [3, 0, 0, 4, 4, 2, 0],
            [4, 0, 0, 5, 4, 0, 0],
            [9, 1, 0, 6, 4, 1, 3],
        ],
        float,
    )
    clumps = np.array([1, 2, 1.5, 1, 1, 3, 1])
    found = compared(images, others, clumps=clumps)
    by_latent = {int(latent) // 10: i for i, latent in enumerate(found.latent)}
    assert sorted(by_latent) == [0, 1, 2, 3, 4, 6]  # 5 equals the mean
    for latent, i in by_latent.items():
        mine, theirs = images[:, latent], others[:, latent]
        assert found.z[i] == pytest.approx(z_by_hand(mine.mean(), theirs, 4, 4, clumps[latent]))
        assert (found.median[i], found.mad[i]) == (np.median(theirs), np.median(np.abs(theirs - np.median(theirs))))
        assert (found.mean[i], found.sd[i]) == (pytest.approx(theirs.mean()), pytest.approx(theirs.std(ddof=1)))
    columns = ("n_images_active", "n_others_active", "n_others_beyond")
    counts = {s: [int(getattr(found, name)[i]) for name in columns] for s, i in by_latent.items()}
    assert {s: counts[s] for s in (0, 2, 3, 4)} == {0: [4, 5, 1], 2: [1, 0, 0], 3: [1, 5, 0], 4: [0, 5, 0]}
    replicated = {s: found.replicated[i] for s, i in by_latent.items()}
    assert replicated[2] == 0  # one half never has it
    # 3 of t of 6.6 in the halves of two images: 4 less than 4 of no spread is t -2.8
    assert replicated[4] == 0
    sure = compared(np.full((40, 1), 4.0), np.zeros((5, 1)))
    assert (sure.replicated.tolist(), sure.sets_apart.tolist()) == ([1], [True])
    # all images together are far enough, half of them are not
    some = compared(np.full((40, 1), 1.5), np.zeros((5, 1)))
    assert some.z[0] > 3
    assert (some.replicated.tolist(), some.sets_apart.tolist()) == ([0], [False])


def test_clumps_are_the_variance_of_images_over_their_mean() -> None:
    """Pooled over patients, by their images less one; at least 1, and 1 where nothing is."""
    rng = np.random.default_rng(0)
    counts = np.stack([rng.poisson(3, 500), 30 * (rng.random(500) < 0.1), np.zeros(500), np.full(500, 2)], axis=1)
    patients = [counts[:1], counts[1:50], counts[50:]]
    spread = np.sum([image_spread(ss.csr_matrix(each.astype(np.float32))) for each in patients], axis=0)
    slow = [
        sum(((each[:, s] - each[:, s].mean()) ** 2).sum() for each in patients)
        / (sum((len(each) - 1) * each[:, s].mean() for each in patients) or np.inf)
        for s in range(4)
    ]
    assert dispersion_of(*spread) == pytest.approx(np.maximum(1, slow))
    assert slow[0] == pytest.approx(1, abs=0.2)
    assert slow[1] > 20


@pytest.mark.stress
@pytest.mark.parametrize("n_others", [5, 35])
@pytest.mark.parametrize("sd", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("n_images", "frequency"), [(300, 0.3), (300, 0.01), (20, 0.1)])
def test_exchangeable_patients_are_not_set_apart(n_others: int, sd: float, n_images: int, frequency: float) -> None:
    """Levels skewed over patients, tokens in clumps, and a patient with fewer images than the others (300)."""
    rng = np.random.default_rng([n_others, int(10 * sd), n_images])
    n_latents, far, apart = 400, 0.0, 0.0
    rates = np.minimum(1, frequency * np.exp(rng.normal(0, sd, (n_others + 4, n_latents))))
    made = [clumped(rng, 300, rate) for rate in rates[4:]]
    others = np.array([images.mean(0) for images in made])
    for rate in rates[:4]:
        patient = clumped(rng, n_images, rate)
        spread = np.sum([image_spread(ss.csr_matrix(images)) for images in (patient, *made)], axis=0)
        found = compared(patient, others, clumps=dispersion_of(*spread), n_splits=20)
        far += (np.abs(found.z) >= 3).sum() / n_latents / 4
        apart += found.sets_apart.sum() / n_latents / 4
    assert far <= 0.0027
    assert apart <= 0.0027


def clumped(rng: np.random.Generator, n_images: int, rates: Floats) -> Floats:
    """Tokens per image: an image has a latent or not, and then at 1 to 40 tokens."""
    shape = (n_images, len(rates))
    return np.where(rng.random(shape) < rates, rng.integers(1, 41, shape), 0).astype(float)


def test_nobody_else_is_as_far() -> None:
    """A latent that few patients have sets none of them apart, however large z is, but the one that has most of it."""
    others = np.zeros((100, 1))
    others[0] = 4
    found = compared(np.full((60, 1), 3.9), others)
    assert (found.z[0] > 3, found.replicated.tolist()) == (True, [1])
    assert (found.n_others_beyond.tolist(), found.sets_apart.tolist()) == ([1], [False])
    assert compared(np.full((60, 1), 4.1), others).sets_apart.tolist() == [True]
    many = np.zeros((741, 1))  # beyond 3 a normal distribution has 0.135%
    many[0] = 4
    assert compared(np.full((60, 1), 3.9), many).sets_apart.tolist() == [True]


def test_support_and_least_step() -> None:
    """A raised latent needs images; the error is never below one token in one image."""
    images = np.zeros((50, 2))
    images[:2, 0] = 1
    images[:3, 1] = 1
    assert compared(images, np.zeros((5, 2)), min_images=3).latent.tolist() == [10]
    assert compared(np.ones((4, 1)), np.full((5, 1), 0.999)).se.tolist() == [0.5]


def drawn_images(rng: np.random.Generator, rates: Floats, n_images: int) -> Floats:
    """Tokens per image, in clumps: a latent is in an image or not, and then at several tokens."""
    return np.where(rng.random((n_images, len(rates))) < rates, rng.poisson(3, (n_images, len(rates))), 0).astype(float)


def test_what_is_planted_is_found_and_noise_is_not() -> None:
    """Patients of one kind, 300 latents; in one of them ten are raised and ten lowered."""
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.05, 0.6, 300)
    patients = [drawn_images(rng, rates, int(n)) for n in rng.integers(40, 90, 12)]
    means = np.array([images.mean(0) for images in patients])
    n_noise = [int(compared(images, np.delete(means, p, axis=0)).sets_apart.sum()) for p, images in enumerate(patients)]
    assert sum(n_noise) < 12 * 300 * 0.005
    changed = rates.copy()
    changed[:10], changed[10:20] = 0.95, 0.0
    rates[:10], rates[10:20] = 0.1, 0.6
    patients = [drawn_images(rng, rates, int(n)) for n in rng.integers(40, 90, 12)]
    special = drawn_images(rng, changed, 60)
    found = compared(special, np.array([images.mean(0) for images in patients]))
    apart = set((found.latent[found.sets_apart] // 10).tolist())
    assert set(range(20)) <= apart
    assert len(apart) < 25
    assert (found.z[np.isin(found.latent, np.arange(10) * 10)] > 0).all()
    assert (found.z[np.isin(found.latent, np.arange(10, 20) * 10)] < 0).all()


def test_halves_agree_about_a_patient_and_not_about_noise() -> None:
    rng = np.random.default_rng(1)
    rates = rng.uniform(0.1, 0.6, 200)
    others = np.array([drawn_images(rng, rates, 200).mean(0) for _ in range(9)])
    same = [compared(drawn_images(rng, rates, 60), others, n_splits=20).halves_correlation for _ in range(5)]
    other = compared(drawn_images(rng, rng.permutation(rates), 60), others, n_splits=20).halves_correlation
    assert abs(np.mean(same)) < 0.15
    assert other > 0.6


def test_a_patient_without_any_latent_is_drawn(tmp_path: Path) -> None:
    """Nobody of the disease exceeds tau: nothing to compare, and no warning of Matplotlib's."""
    found = compared(np.zeros((4, 0)), np.zeros((5, 0)))
    assert len(found.latent) == 0
    plot_patient("nothing", [], found.z, found.others, found.sets_apart, tmp_path / "p")
    assert (tmp_path / "p.png").is_file()


# ------------------------------------------------------------------------------------------- the folder

N_IMAGES = {"A": 9, "B": 6, "C": 5, "D": 8, "E": 4, "F": 6, "tiny": 3, "lone": 7, "unknown": 6}
DISEASES = {**dict.fromkeys("ABCDEF", "flu"), "tiny": "flu", "lone": "cold", "unknown": None}


@pytest.fixture(scope="module")
def barcodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven patients with flu, two others; the images of all are mixed; A has latent 3 everywhere."""
    root = tmp_path_factory.mktemp("patients")
    rng = np.random.default_rng(0)
    rows: list[Row] = [(name, DISEASES[name], k > 0) for name, n in N_IMAGES.items() for k in range(n + 1)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    dense = np.where(rng.random((len(rows), 6, 20)) < 0.1, np.float32(1), np.float32(0))
    dense[:, :, 3] = [[name == "A"] * 6 for name, _, _ in rows]
    dense[[not ok for _, _, ok in rows]] = 0
    write_latents(root / "latents.zarr", dense, rows)
    with local_client(1, 2) as client:
        write_barcodes(root / "latents.zarr", root / "b", BarcodeConfig(tau=0.5), client=client)
        write_barcodes(root / "latents.zarr", root / "several", BarcodeConfig(tau=(0.5, 2)), client=client)
        released = BarcodeConfig(tau=0.5, normalize="cytosae-release")
        write_barcodes(root / "latents.zarr", root / "released", released, client=client)
    return root / "b"


@pytest.mark.stress
def test_one_and_all_say_the_same(barcodes: Path, tmp_path: Path) -> None:
    """And what they say is what `compare` says of the images; those who cannot be compared are named."""
    settings = PatientConfig(min_images=2)
    one = write_patient_concepts(barcodes, "A", tmp_path / "one", settings)
    assert one.top[0]["latent"] == 3
    assert one.top[0]["z"] == pytest.approx(norm.isf(student.sf(6 / np.sqrt(6 / 9), 5)))
    (row,) = one.patients
    assert (row["n_others_counted"], row["others_least"]) == (5, 0)  # tiny has too few images
    assert not one.top[0]["sets_apart"]  # halves of four and five images are not enough against six others
    assert one.patients[0]["n_others"] == 6  # tiny's barcode counts, though it is not compared itself
    everybody = write_patient_concepts(barcodes, None, tmp_path / "all", settings)
    assert everybody.top == []
    usual = {row["patient"]: row for row in everybody.patients}
    assert usual["A"] == row
    numbers = [usual[name]["n_raised"] + usual[name]["n_lowered"] for name in "BCDEF"]
    assert (row["others_least"], row["others_median"], row["others_most"]) == (
        min(numbers),
        np.median(numbers),
        max(numbers),
    )
    table = ResultStore(tmp_path / "all", PATIENT_CONCEPTS).table("patient_concepts").to_pylist()
    mine = ResultStore(tmp_path / "one", PATIENT_CONCEPTS).table("patient_concepts").to_pylist()
    assert [row for row in table if row["patient"] == "A"] == mine
    assert mine[:10] == one.top
    skipped = {row["patient"]: row["skipped"] for row in everybody.patients}
    assert skipped == {
        **dict.fromkeys("ABCDEF"),
        "lone": "0 others with cold",
        "tiny": "3 readable images",
        "unknown": "no disease",
    }
    store = BarcodeStore(barcodes)
    images, patients = store.read("image"), store.read("patient")
    is_its = (images.obs["patient"] == "A") & (images.obs["status"] == "ok")
    assert is_its.sum() == 9
    others = patients[(patients.obs["disease"] == "flu") & (patients.obs_names != "A")]
    same = set(others.obs["patient_id"]) | {"A"}
    is_flu = np.array([name in same for name in images.obs["patient"]]) & (images.obs["status"] == "ok")
    rows = [images.X[(images.obs["patient"] == name).to_numpy() & is_flu.to_numpy()] for name in same]
    clumps = dispersion_of(*np.sum([image_spread(one) for one in rows], axis=0))
    k = float(np.mean([one.shape[0] for one in rows]))
    mine_by_hand = images.X.toarray()[is_its].astype(float)
    by_latent = {row["latent"]: row["z"] for row in mine}
    expected = [
        z_by_hand(mine_by_hand[:, s].mean(), others.X.toarray()[:, s].astype(float), 9, k, clumps[s]) for s in by_latent
    ]
    assert list(by_latent.values()) == pytest.approx(expected, rel=1e-5)
    for name in ("one/patient_concepts", "all/patients"):
        assert (tmp_path / f"{name}.png").is_file()
        assert (tmp_path / f"{name}.svg").is_file()
    again = write_patient_concepts(barcodes, "A", tmp_path / "one", settings)
    assert again.was_complete
    assert (again.patients, again.top) == (one.patients, one.top)


@pytest.mark.stress
def test_who_cannot_be_compared(barcodes: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", PatientConfig()
    words = "need a disease, 4 readable images and 5 other patients of the same disease and dataset"
    for patient, reason in (
        ("lone", "'lone' has 0 others with cold in"),
        ("tiny", "'tiny' has 3 readable images in"),
        ("unknown", "'unknown' has no disease in"),
    ):
        with pytest.raises(BadInput, match=f"{reason} .*{words}"):
            write_patient_concepts(barcodes, patient, out, settings)
    with pytest.raises(BadInput, match=r"no patient 'X' in .*; it has 9: A, B, C and 6 more"):
        write_patient_concepts(barcodes, "X", out, settings)
    with pytest.raises(BadInput, match=r"is normalised by cytosae-release.*--normalize images"):
        write_patient_concepts(barcodes.with_name("released"), "A", out, settings)
    with pytest.raises(BadInput, match=r"holds barcodes at several tau: choose one of 0.5, 2"):
        write_patient_concepts(barcodes.with_name("several"), "A", out, settings)
    with pytest.raises(BadInput, match="min_images and n_splits must be at least 1; found 3 and 0"):
        PatientConfig(n_splits=0)
    assert not out.exists()
    write_patient_concepts(barcodes.with_name("several"), "A", out, PatientConfig(tau=0.5))
    found = pq.read_table(out / "patient_concepts.parquet")
    write_patient_concepts(barcodes, "A", tmp_path / "single", settings)
    assert found.equals(pq.read_table(tmp_path / "single" / "patient_concepts.parquet"))


@pytest.mark.stress
def test_images_that_do_not_give_the_barcode(barcodes: Path, tmp_path: Path) -> None:
    """Chunks of another run among ours."""
    mixed = tmp_path / "mixed"
    shutil.copytree(barcodes, mixed)
    shutil.rmtree(mixed / "image.zarr" / "X")
    shutil.copytree(barcodes.with_name("several") / "image_tau2.zarr" / "X", mixed / "image.zarr" / "X")
    with pytest.raises(DamagedStore, match=r"image\.zarr/X/.* (is missing|bytes|checksum)"):
        write_patient_concepts(mixed, "A", tmp_path / "out", PatientConfig())
    forget_files(mixed)
    with pytest.raises(DamagedStore, match="the images of patient 'A' do not give its barcode; count again"):
        write_patient_concepts(mixed, "A", tmp_path / "out", PatientConfig())


def forget_files(barcodes: Path) -> None:
    """As an older cyto left them: without a record of the files."""
    header = json.loads((barcodes / "barcodes.json").read_text())
    del header["summary"]["store_files"]
    (barcodes / "barcodes.json").write_text(json.dumps(header))


@pytest.mark.stress
def test_damage_and_nobody(barcodes: Path, tmp_path: Path) -> None:
    """A lost chunk would read as zeros; a changed one is told; and without patients there is nobody to compare."""
    for name, words, older in (
        ("changed", r"patient\.zarr/X/data/.* is not the file that was written", "patient.zarr cannot be read"),
        ("lost", r"patient\.zarr/X/data/.* is missing; count again", "is missing; count again"),
    ):
        copy = Path(shutil.copytree(barcodes, tmp_path / name))
        chunk = next(path for path in (copy / "patient.zarr" / "X" / "data" / "c").rglob("*") if path.is_file())
        if name == "lost":
            chunk.unlink()
        else:
            chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
        with pytest.raises(DamagedStore, match=words):
            write_patient_concepts(copy, "A", tmp_path / "out")
        forget_files(copy)
        with pytest.raises(DamagedStore, match=older):
            write_patient_concepts(copy, "A", tmp_path / "out")
    rows: list[Row] = [(None, None, True)] * 3
    write_latents(tmp_path / "latents.zarr", np.ones((3, 6, 20), np.float32), rows)
    with local_client(1, 2) as client:
        write_barcodes(tmp_path / "latents.zarr", tmp_path / "nobody", BarcodeConfig(tau=0.5), client=client)
    with pytest.raises(BadInput, match="has no patient: no image has one"):
        write_patient_concepts(tmp_path / "nobody", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.stress
def test_command(barcodes: Path, tmp_path: Path) -> None:
    command = ("concept", "patient", barcodes)
    done = run(*command, "A", "-o", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert "A: 9 images against 6 others with flu; 0 latents raised and 0 lowered" in done.stdout
    assert "latent 3      z     3.4  6 against 0 tokens per image, in 9 images; 0 others as far" in done.stdout
    assert "without p- or q-values" in done.stdout
    everybody = run(*command, "--all", "-o", tmp_path / "all", "--json")
    assert len(json.loads(everybody.stdout)["patients"]) == 9
    assert "lone: left out (0 others with cold)" in run(*command, "--all", "-o", tmp_path / "all").stdout
    assert run(*command, "-o", tmp_path / "x").exit_code == 2
    assert run(*command, "A", "--all", "-o", tmp_path / "x").exit_code == 2
    fails("no patient 'Z'", *command, "Z", "-o", tmp_path / "x")
    fails("has no barcodes at tau 3", *command, "A", "-o", tmp_path / "x", "--tau", 3)
