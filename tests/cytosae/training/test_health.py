"""Is an SAE fit for barcodes: figures against slow twins, every verdict by hand, what is kept beside the SAE."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sparse_tokens import write_sae
from token_caches import write_cache
from training_runs import SETTINGS, tokens_of_cells

from cli import cli
from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae
from cytosae.training import Health, assess_health, healthy_l0, read_health, sae_info, write_health
from cytosae.training.evaluate import evaluate
from cytosae.training.health import FILE
from cytosae.training.health_sample import evenly_spaced
from cytosae.training.substitution import Change, Substitution
from cytosae.training.train import train
from stores import ActivationStore, BadInput, DamagedStore, verify_folder
from stores.files import sha256_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(**{**SETTINGS, "tokens": 120, "holdout": 0.2})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acts.zarr: 24 images of 5 tokens of width 8, image 3 unreadable; run: an SAE trained on it, with its health."""
    root = tmp_path_factory.mktemp("health")
    write_cache(root / "acts.zarr", tokens_of_cells(3), unreadable=(3,))
    train([root / "acts.zarr"], root / "run", CONFIG, exclude=["synthetic/005.png"])
    return root


# ------------------------------------------------------------------------------------------- figures


def slow_figures(cache: Path, run: Path, images: list[int]) -> dict[str, Any]:
    """Of all tokens of these images at once: L0, who is active where, PCA by a singular value decomposition."""
    model = load_sae(run).model
    tokens = ActivationStore(cache).read_images(np.array(images)).astype(np.float64)
    params = {name: getattr(model, name).double().numpy() for name in ("W_enc", "b_enc", "b_dec")}
    latents = np.maximum((tokens - params["b_dec"]) @ params["W_enc"] + params["b_enc"], 0)
    l0 = float((latents > 0).sum(2).mean())
    flat = tokens.reshape(-1, tokens.shape[2])
    lengths = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2
    return {
        "l0": l0,
        "n_images_active": (latents > 0).any(1).sum(0),
        "n_pca": min(round(l0), flat.shape[1]),
        "pca": lengths[: round(l0)].sum() / lengths.sum(),
    }


def fewer_active(model: SparseAutoencoder) -> None:
    """L0 2.3, a quarter of the latents dead."""
    model.b_dec.fill_(3)
    model.b_enc.sub_(1)


def test_figures_equal_the_slow_twin(made: Path) -> None:
    """Of the evaluation, and of the end of training: its images are the trained and held-out ones, no others."""
    readable = [image for image in range(24) if image != 3]
    drawn = write_sae(made / "drawn", made / "acts.zarr", n_latents=64, change=fewer_active)
    found = evaluate(made / "acts.zarr", drawn)
    twin = slow_figures(made / "acts.zarr", drawn, readable)
    assert 0 < twin["n_pca"] < 8
    assert 0 in twin["n_images_active"]
    assert found.l0 == pytest.approx(twin["l0"])
    assert (found.n_pca, found.width, found.activation) == (twin["n_pca"], 8, "relu")
    assert found.pca_explained_variance == pytest.approx(twin["pca"], rel=1e-8)
    rows = {row.name: row for row in found.health.rows}
    alive = [count for count in twin["n_images_active"] if count]
    assert rows["everywhere"].value == pytest.approx(sum(10 * n >= 9 * 23 for n in alive) / len(alive))
    assert rows["dead"].value == pytest.approx(sum(n == 0 for n in twin["n_images_active"]) / 64)

    kept = read_health(made / "run")
    assert kept is not None
    twin = slow_figures(made / "acts.zarr", made / "run", [image for image in readable if image != 5])
    assert (kept.n_images, kept.n_images_in_all, kept.n_tokens) == (22, 22, 110)
    rows = {row.name: row for row in kept.rows}
    assert rows["L0"].value == pytest.approx(twin["l0"])
    assert rows["against PCA"].low == pytest.approx(twin["pca"], rel=1e-8)


def test_the_error_of_a_sample_equals_the_slow_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 images in chunks of 10, at most 64 are measured on: each figure without each of the chunks, by itself."""
    monkeypatch.setattr("cytosae.training.health_sample.MOST_TOKENS", 5)  # whatever the budget is
    cache = write_cache(tmp_path / "acts.zarr", tokens_of_cells(1, n_images=200), chunk_images=10)
    health = train([cache], tmp_path / "run", dataclasses.replace(CONFIG, tokens=6_000, holdout=0.0)).health
    assert health is not None
    assert health.n_images == 60
    chunks = [[*range(10 * k, 10 * k + 10)] for k in evenly_spaced([10] * 20, 64)]
    model = load_sae(tmp_path / "run").model
    without = []
    for k in range(6):
        images = [image for chunk in (*chunks[:k], *chunks[k + 1 :]) for image in chunk]
        twin = slow_figures(cache, tmp_path / "run", images)
        tokens = torch.from_numpy(ActivationStore(cache).read_images(np.array(images))).float().reshape(-1, model.width)
        error = (model(tokens).double() - tokens.double()).square().sum().item()
        variance = (tokens.double() - tokens.double().mean(0)).square().sum().item()
        alive = [count for count in twin["n_images_active"] if count]
        everywhere = sum(10 * n >= 9 * 50 for n in alive) / len(alive)
        dead = float((twin["n_images_active"] == 0).mean())
        without.append((twin["l0"], everywhere, dead, 1 - error / variance))
    errors = 2 * np.sqrt((1 - 60 / 200) * 5 / 6 * np.square(np.array(without) - np.mean(without, 0)).sum(0))
    rows = {row.name: row for row in health.rows}
    found = [rows[name].error for name in ("L0", "everywhere", "dead", "explained")]
    assert found == pytest.approx([*errors], rel=1e-4)
    assert errors[0] > 0
    assert f" ± {errors[0]:.2g}; healthy" in str(health)
    assert "may be missed" in rows["dead"].says
    assert next(health.lines()).endswith("300 tokens); ±: two standard errors of this sample")
    assert rows["against PCA"].error is None
    assert read_health(tmp_path / "run") == health


def test_of_all_images_there_is_no_error(made: Path) -> None:
    """Nor in a file of before, whose rows have no such figure."""
    kept = read_health(made / "run")
    assert kept is not None
    assert all(row.error is None for row in kept.rows)
    assert "±" not in str(kept)
    rows = [{name: value for name, value in row.items() if name != "error"} for row in kept.to_json()["rows"]]
    content = {"format": "SAE health", "format_version": 1, "measured": [{**kept.to_json(), "rows": rows}]}
    before = Path(shutil.copytree(made / "run", made / "before"))
    write_json(before / FILE, {**content, "sha256": sha256_json(content)})
    assert read_health(before) == kept


@pytest.mark.parametrize("n_chunks", [1, 2, 7, 100])
@pytest.mark.parametrize("most", [1, 5, 64, 10_000])
def test_a_sample_lies_evenly_and_is_no_larger_than_asked(n_chunks: int, most: int) -> None:
    sizes = [4] * n_chunks
    found = evenly_spaced(sizes, most)
    assert found == sorted(set(found))
    assert 1 <= len(found) <= n_chunks
    assert sum(sizes[k] for k in found) <= max(most, 4)
    if sum(sizes) <= most:
        assert found == list(range(n_chunks))
    elif len(found) > 1:
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1


# ------------------------------------------------------------------------------------------- verdicts


@dataclasses.dataclass
class Drawn:
    """Figures of an SAE that is fit: width 192, 1,536 latents, L0 20."""

    sae_sha256: str = "1" * 64
    cache_sha256: str = "2" * 64
    token_set: str = "all"
    activation: str = "relu"
    width: int = 192
    n_latents: int = 1536
    n_images: int = 100
    n_tokens: int = 25_700
    l0: float = 20.0
    n_images_active: Any = dataclasses.field(default_factory=lambda: np.repeat([95, 40, 3, 0], [100, 500, 500, 436]))
    explained_variance: float = 0.9
    n_pca: int = 20
    pca_explained_variance: float = 0.8
    substitution: Substitution | None = None


UNCHANGED = Change(cosine=1.0, relative_l2=0.1)
SPOILT = Substitution(
    n_images=4,
    seed=0,
    reconstruction=UNCHANGED,
    zeros=UNCHANGED,
    mean_token=UNCHANGED,
    recovered=0.9,
    recovered_from_mean=0.1,
)


def verdicts(**changes: Any) -> tuple[Health, dict[str, Any]]:
    health = assess_health(Drawn(**changes))
    return health, {row.name: row for row in health.out_of_range}


def test_an_sae_that_is_fit_says_so() -> None:
    health, bad = verdicts()
    assert (health.is_fit, bad, health.warnings) == (True, {}, ())
    assert next(health.lines()) == "health: fit for barcodes (measured on 100 images, 25,700 tokens)"
    assert not any("next:" in line for line in health.lines())
    assert all(row.value is not None and row.healthy for row in health.rows)


def test_the_readme_sae_of_the_issue_is_not_fit() -> None:
    """318 of 1,536 latents active per token and every latent in every image, explained variance 0.98."""
    health, bad = verdicts(
        l0=318.0, n_images_active=np.full(1536, 100), explained_variance=0.98, n_pca=192, pca_explained_variance=1.0
    )
    assert {"L0", "everywhere"} <= set(bad)
    assert not health.is_fit
    assert "NOT fit for barcodes" in str(health)
    assert "318.0 latents active per token, of width 192 and 1,536 latents (20.7%)" in str(health)
    assert "--target-l0 14" in bad["L0"].next
    assert "--k 14" in verdicts(l0=318.0, activation="topk")[1]["L0"].next
    assert health.warnings[0].startswith("this SAE is not fit for barcodes: L0, everywhere")


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"l0": 1.5}, "L0", "too few to say what a token shows"),
        ({"l0": 49.0}, "L0", "so many that every image shows nearly all"),
        ({"n_images_active": np.full(1536, 90)}, "everywhere", "100.0% of the living latents are active in 90%"),
        ({"n_images_active": np.repeat([5, 0], [500, 1036])}, "dead", "67.4% of 1,536 latents are active nowhere"),
        ({"explained_variance": 0.4, "pca_explained_variance": 0.3}, "explained", "0.400 of the variance"),
        ({"explained_variance": 0.7}, "against PCA", "0.700 against 0.800 of PCA with L0 components (20)"),
        (
            {"substitution": SPOILT},
            "final CLS",
            "0.100 recovered against the mean token",
        ),
    ],
)
def test_each_figure_alone_is_found_out_of_range(changes: dict[str, Any], name: str, words: str) -> None:
    health, bad = verdicts(**changes)
    assert list(bad) == [name]
    assert health.is_fit == (
        name in ("dead", "against PCA")
    )  # these could be better; barcodes may be good all the same
    mark = "  !" if health.is_fit else "  OUT"
    assert next(health.lines()).startswith(
        "health: fit for barcodes, 1 could be better"
        if health.is_fit
        else "health: NOT fit for barcodes, 1 out of range"
    )
    assert words in bad[name].says
    assert "cyto " in bad[name].next
    assert next(line for line in health.lines() if line.startswith(mark)).removeprefix(mark).lstrip().startswith(name)


def test_what_cannot_be_said_is_not_judged() -> None:
    health, bad = verdicts(explained_variance=math.nan, pca_explained_variance=math.nan)
    assert not bad
    assert [row.name for row in health.rows if row.is_healthy is None] == ["explained", "against PCA"]
    assert "NaN" not in json.dumps(health.to_json())
    assert verdicts(n_images_active=np.zeros(1536, int))[1]["dead"].value == 1  # nobody is alive, nobody everywhere


def test_the_range_of_l0_follows_width_and_latents() -> None:
    assert healthy_l0(768, 49_152) == (4, 192)
    assert healthy_l0(192, 1_536) == (4, 48)
    assert healthy_l0(192, 384)[1] == pytest.approx(19.2)
    assert healthy_l0(8, 16) == (4, 8)  # never empty


# ------------------------------------------------------------------------------------------- beside the SAE


def test_what_is_kept_is_what_was_measured(made: Path, tmp_path: Path) -> None:
    health, _ = verdicts()
    other = dataclasses.replace(health, cache_sha256="3" * 64, n_images=7)
    for each in (health, other, dataclasses.replace(health, n_images=9)):
        write_health(tmp_path, each)
    assert read_health(tmp_path, cache_sha256="3" * 64) == other
    assert read_health(tmp_path, sae_sha256="1" * 64) == dataclasses.replace(health, n_images=9)
    assert read_health(tmp_path, sae_sha256="9" * 64) is None
    assert len(json.loads((tmp_path / FILE).read_text())["measured"]) == 2
    for number in range(40):
        write_health(tmp_path, dataclasses.replace(health, cache_sha256=f"{number:064d}"))
    assert len(json.loads((tmp_path / FILE).read_text())["measured"]) == 16  # it does not grow for ever


def test_a_run_that_is_complete_is_not_measured_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cytosae.training.health_sample.measure_sample", lambda *_, **__: pytest.fail("measured"))
    before = (made / "run" / FILE).read_bytes()
    done = train([made / "acts.zarr"], made / "run", CONFIG, exclude=["synthetic/005.png"])
    assert done.was_complete
    assert done.health == read_health(made / "run")
    assert (made / "run" / FILE).read_bytes() == before
    assert "health: " in str(done)


def test_a_health_that_cannot_be_had_does_not_spoil_the_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cytosae.training.health_sample.write_health", full)
    done = train([made / "acts.zarr"], tmp_path / "run", CONFIG)
    assert done.header.complete
    assert done.health is None
    assert "health: not measured ([Errno 28] No space left on device); cyto sae eval --keep" in str(done)


def test_a_sample_is_called_a_sample(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "acts.zarr", tokens_of_cells(1, n_images=200), chunk_images=10)
    done = train([cache], tmp_path / "run", TrainConfig(**{**SETTINGS, "tokens": 20}))  # type: ignore[arg-type]
    assert done.health is not None
    assert (done.health.n_images, done.health.n_images_in_all) == (60, 200)
    assert "(measured on 60 of 200 images, 300 tokens)" in str(done.health)


@pytest.mark.stress
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b'"is_fit": true', b'"is_fit": false'),
        lambda raw: raw.replace(b"100", b"101", 1),
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"[]",
        lambda raw: b"[" * 100_000,
        lambda raw: b'{"format": "SAE health", "format_version": 1, "measured": 3, "sha256": "x"}',
    ],
    ids=["text", "number", "cut", "list", "nested", "kinds"],
)
def test_a_damaged_file_is_told_and_found_by_verify(made: Path, tmp_path: Path, damage: Any) -> None:
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    assert verify_folder(run).is_whole
    health, _ = verdicts()
    write_health(run, health)
    assert verify_folder(run).is_whole
    raw = damage((run / FILE).read_bytes())
    (run / FILE).write_bytes(raw)
    with pytest.raises(DamagedStore, match=r"health\.json"):
        read_health(run)
    (problem,) = verify_folder(run).problems
    assert "health.json is not what was written" in problem
    info = sae_info(run)
    assert info.health is None
    assert "health: not measured" in str(info)


def test_texts_of_a_foreign_file_cannot_move_the_cursor(tmp_path: Path) -> None:
    health, _ = verdicts()
    row = dataclasses.replace(health.rows[0], says="\x1b[2J gone", next="\x1b]0;x\x07")
    write_health(tmp_path, dataclasses.replace(health, rows=(row,)))
    read = read_health(tmp_path)
    assert read is not None
    assert "\x1b" not in str(read)


# ------------------------------------------------------------------------------------------- commands


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


def test_commands_say_and_keep_it(made: Path, tmp_path: Path) -> None:
    sae = Path(shutil.copytree(made / "run", tmp_path / "run"))
    (sae / FILE).unlink()
    assert "health: not measured; cyto sae eval RUN STORE --keep" in run("sae", "info", sae).stdout
    page = run("sae", "eval", sae, made / "acts.zarr").stdout
    assert "health: " in page
    assert "  PCA        1.000 of the variance by the first 8 principal components" in page
    assert not (sae / FILE).exists()
    done = run("sae", "eval", sae, made / "acts.zarr", "--keep", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["health"]
    kept = read_health(sae)
    assert kept is not None
    assert {name: kept.to_json()[name] for name in ("is_fit", "rows")} == said
    assert kept.n_images == 23
    assert json.loads(run("sae", "info", sae, "--json").stdout)["health"] == kept.to_json()
    assert "".join(f"{line}\n" for line in kept.lines()) in run("sae", "info", sae).stdout
    refused = run("sae", "eval", sae, made / "acts.zarr", "--keep", "--only", sae / "held_out.parquet")
    assert refused.exit_code == 2
    assert "--keep is for all images of STORE" in refused.stderr


def test_train_prints_it_at_its_end(made: Path, tmp_path: Path) -> None:
    settings = ["--expansion", 4, "--tokens", 60, "--batch-tokens", 10, "--warmup-steps", 2]
    done = run("sae", "train", made / "acts.zarr", "-o", tmp_path / "run", *settings)
    assert done.exit_code == 0, done.output
    assert [
        line.split()[1] for line in done.stdout.splitlines() if line.startswith(("  ok", "  OUT", "  ?", "  !"))
    ] == [*("L0", "everywhere", "dead", "explained", "against")]


def test_bad_input_is_refused_before(made: Path) -> None:
    with pytest.raises(BadInput, match="the window of dead latents"):
        evaluate(made / "acts.zarr", made / "run", dead_window=0)
