"""Evaluation: every figure equals a slow twin in float64 over the whole store at once, whatever the batches.

For the effect on the backbone the reference is timm's own, unmodified model with a hook that replaces a block's output.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
from checkpoints import _lively_state, _published, _timm
from click.testing import CliRunner, Result
from PIL import Image
from reference import Params
from sparse_tokens import WIDTH, random_tokens, write_sae
from token_caches import write_cache

from cli import cli
from cytocache.backbones import ARCHITECTURES, Architecture, load_backbone
from cytocache.datasets import open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.images import read_image
from cytocache.preprocess import Preprocess
from cytocache.sample import draw_sample, load_backbone_of, read_sample
from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae, save_sae
from cytosae.training import DEAD_WINDOW, BackboneSample, Evaluation, Objective, loss_and_gradients
from cytosae.training import held_out as module
from cytosae.training.evaluate import PERCENTILES, decoder_coherence, evaluate
from cytosae.training.substitution import Substitution
from cytosae.training.train import train
from stores import SAE, ActivationStore, BadInput, DamagedStore, SpecMismatch, new_header, write_header
from stores.activation_spec import chunk_path
from stores.content_hashes import find_trained_on, write_trained_on
from stores.tables import column, image_table, with_outcome

Float = npt.NDArray[np.float64]
PER_IMAGE = 9
UNREADABLE = (1, 6)


def change_weights(model: SparseAutoencoder) -> None:
    """Latents 3 and 5 are dead, 7 active everywhere, many rare; rows 8 and 9 are one direction, row 11 is zero."""
    model.b_enc[12:] = torch.linspace(0, -2.5, 28)
    model.b_enc[[3, 5]] = -1e3
    model.b_enc[7] = 8
    model.W_dec[9] = -2 * model.W_dec[8]
    model.W_dec[11] = 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acts.zarr: 8 images of 9 tokens, 3 a chunk, two unreadable; run: 40 latents, some of them odd."""
    root = tmp_path_factory.mktemp("small")
    tokens = random_tokens(8, PER_IMAGE)
    write_cache(root / "acts.zarr", tokens, unreadable=UNREADABLE, chunk_images=3)
    write_sae(root / "run", root / "acts.zarr", n_latents=40, change=change_weights)
    return root


def write_run(root: Path, cache: Path, model: SparseAutoencoder, **header: Any) -> Path:
    """A finished SAE with these weights and these settings in its header."""
    settings = {"width": model.width, "n_latents": model.n_latents, "caches": [], "config": {}, **header}
    settings["tokens"] = ActivationStore(cache).spec.same_tokens
    root.mkdir(parents=True)
    save_sae(root, model, new_header(SAE, settings), {"final": {}})
    return root


def chosen_tokens(cache: Path, token_set: str) -> Float:
    """(readable images, T, D) float64."""
    store = ActivationStore(cache)
    images = np.flatnonzero(store.readable())
    tokens = store.read_images(images).astype(np.float64)
    return {"all": tokens, "patch": tokens[:, 1:], "cls": tokens[:, :1]}[token_set]


def percentiles(values: list[Any]) -> dict[int, Any]:
    """The least value that at least p % do not exceed, looked for one by one."""
    found = {}
    for p in PERCENTILES:
        enough = [value for value in values if 100 * sum(other <= value for other in values) >= p * len(values)]
        found[p] = min(enough)
    return found


def slow_twin(cache: Path, run: Path, token_set: str, dead_window: int) -> dict[str, Any]:
    """All but the substitution, from the definitions."""
    images, model = chosen_tokens(cache, token_set), load_sae(run).model
    params = Params(*(getattr(model, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
    n_images, per_image, width = images.shape
    x = images.reshape(-1, width)
    p, h, x_hat = reference.sae_forward(params, x)
    assert np.abs(p).min() > 1e-6, "float32 may see the other side of zero; take another seed"
    active = h > 0
    n_active = active.reshape(n_images, per_image, -1)
    n_window = math.ceil(dead_window / per_image) * per_image
    error = [sum((x_hat[t] - x[t]) ** 2) for t in range(len(x))]
    centred, uncentred = reference.explained_variance(x, x_hat)
    l0 = active.sum(1).tolist()
    different = [int(image.any(0).sum()) for image in n_active]
    rows = [row for row in params.W_dec if any(row)]
    nearest = [
        max(abs(sum(a * b)) / math.sqrt(sum(a * a) * sum(b * b)) for j, b in enumerate(rows) if j != i)
        for i, a in enumerate(rows)
    ]
    return {
        "token_set": token_set,
        "n_latents": model.n_latents,
        "n_images": n_images,
        "n_unreadable": len(UNREADABLE),
        "n_tokens": len(x),
        "mse": sum(e / math.sqrt(sum(x[t] ** 2)) for t, e in enumerate(error)) / (len(x) * width),
        "mse_plain": sum(error) / (len(x) * width),
        "explained_variance": centred,
        "explained_variance_uncentered": uncentred,
        "l0": sum(l0) / len(x),
        "l0_percentiles": percentiles(l0),
        "latents_per_image": sum(different) / n_images,
        "latents_per_image_percentiles": percentiles(different),
        "dead_fraction_whole": sum(not column.any() for column in active.T) / model.n_latents,
        "dead_fraction_window": sum(not column.any() for column in active[-n_window:].T) / model.n_latents,
        "dead_window_tokens": min(n_window, len(x)),
        "n_images_active": n_active.any(1).sum(0).tolist(),
        "n_tokens_active": active.sum(0).tolist(),
        "coherence": {
            "n_zero_rows": model.n_latents - len(rows),
            "largest": max(nearest),
            "mean": sum(nearest) / len(rows),
            "percentiles": percentiles(nearest),
        },
    }


def assert_close(found: Any, expected: Any, name: str = "") -> None:
    """Whole numbers and words exactly, floats to 1e-5."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_close(found[key], value, f"{name} {key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True), name
    else:
        assert found == expected, name


def values_of(found: Evaluation) -> dict[str, Any]:
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    values["coherence"] = dataclasses.asdict(found.coherence)
    return values | {name: values[name].tolist() for name in ("n_images_active", "n_tokens_active")}


# ------------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("micro_batch", [None, 4, 20])  # the whole chunk, parts of an image, two images
@pytest.mark.parametrize("token_set", ["all", "patch", "cls"])
def test_everything_equals_the_slow_twin(small: Path, token_set: str, micro_batch: int | None) -> None:
    for dead_window in (1, 10, 10_000):
        found = evaluate(
            small / "acts.zarr", small / "run", token_set=token_set, dead_window=dead_window, micro_batch=micro_batch
        )
        expected = slow_twin(small / "acts.zarr", small / "run", token_set, dead_window)
        assert_close(values_of(found), expected)
        if dead_window == 1 and token_set != "cls":  # the figures of this test differ from each other
            assert found.dead_fraction_window > found.dead_fraction_whole > 0
    assert found.coherence.largest == pytest.approx(1)
    assert found.coherence.largest <= 1
    assert found.coherence.n_zero_rows == 1
    assert (found.sae_sha256, found.substitution, found.loss) == (load_sae(small / "run").sha256, None, "normed")


@pytest.mark.parametrize("loss", ["normed", "eq1"])
def test_the_names_of_the_training_log_mean_the_same(small: Path, tmp_path: Path, loss: str) -> None:
    """All tokens as one batch of training: mse, L0 and both explained variances are the logged ones."""
    cache, model = small / "acts.zarr", load_sae(small / "run").model
    store = ActivationStore(cache)
    caches = [{"identity": store.identity, "sha256": store.content_sha256, "precision": "fp32"}]
    run = write_run(tmp_path / "run", cache, model, config={"loss": loss, "token_set": "patch"}, caches=caches)
    found = evaluate(cache, run)
    assert (found.loss, found.token_set, found.is_training_cache) == (loss, "patch", True)  # as it was trained
    assert not evaluate(cache, small / "run").is_training_cache
    assert evaluate(cache, small / "run").token_set == "all"
    tokens = torch.from_numpy(chosen_tokens(cache, "patch").reshape(-1, WIDTH).astype(np.float32))
    logged = loss_and_gradients(model.requires_grad_(), tokens, Objective(loss=loss), l1=1e-3)
    for name in ("mse", "l0", "explained_variance", "explained_variance_uncentered"):
        assert getattr(found, name) == pytest.approx(getattr(logged, name), rel=1e-5), name
    assert (found.n_tokens_active > 0).tolist() == logged.fired.tolist()


def test_batches_and_chunks_do_not_matter(tmp_path: Path) -> None:
    """Numbers with few bits, so that no order of summation rounds: every figure is equal to the last bit."""
    rng = np.random.default_rng(0)
    tokens = (rng.integers(-8, 9, (13, 5, WIDTH)) / 4).astype(np.float16)
    model = SparseAutoencoder(WIDTH, 30)
    for parameter in model.parameters():
        parameter.data = torch.from_numpy(rng.integers(-3, 4, tuple(parameter.shape)) / 4).float()
    model.b_enc.data -= 2
    seen, errors = [], []
    for chunk_images in (1, 4, 13):
        cache = write_cache(tmp_path / f"{chunk_images}.zarr", tokens, unreadable=(0, 7), chunk_images=chunk_images)
        run = write_run(tmp_path / f"run{chunk_images}", cache, model)
        for micro_batch in (1, 2, 7, 15, None):
            found = evaluate(cache, run, micro_batch=micro_batch, dead_window=7).to_json(per_latent=True)
            del found["cache_sha256"]
            errors.append(found.pop("mse"))  # divided by norms, so rounded
            seen.append(json.dumps(found))
    assert len(set(seen)) == 1
    assert max(errors) == pytest.approx(min(errors), rel=1e-14)
    assert 0 < json.loads(seen[0])["l0"] < 30
    assert json.loads(seen[0])["dead_window_tokens"] == 10


def test_no_more_tokens_at_a_time_than_the_memory_allows(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = SparseAutoencoder.encode

    def encode(self: SparseAutoencoder, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        return real(self, tokens)

    monkeypatch.setattr(SparseAutoencoder, "encode", encode)
    for n_tokens, largest in [(7, 7), (18, 18), (26, 18), (1000, 27)]:  # part of an image, images, a whole chunk
        seen.clear()
        monkeypatch.setattr(module, "_MICRO_BATCH_BYTES", n_tokens * 4 * 40)
        evaluate(small / "acts.zarr", small / "run")
        assert max(seen) == largest if n_tokens != 1000 else max(seen) <= largest
        assert sum(seen) == 6 * PER_IMAGE


def test_an_sae_that_is_dead_everywhere(small: Path, tmp_path: Path) -> None:
    run = write_sae(tmp_path / "run", small / "acts.zarr", n_latents=20, change=lambda model: model.b_enc.fill_(-1e3))
    found = evaluate(small / "acts.zarr", run)
    assert (found.l0, found.latents_per_image) == (0, 0)
    assert found.l0_percentiles == found.latents_per_image_percentiles == dict.fromkeys(PERCENTILES, 0)
    assert (found.dead_fraction_whole, found.dead_fraction_window) == (1, 1)
    assert found.explained_variance < 0  # b_dec alone is no better than the mean token
    histogram = found.histogram
    assert (histogram.n_never, sum(histogram.images), sum(histogram.tokens)) == (20, 0, 0)


def test_what_cannot_be_said_is_null(tmp_path: Path) -> None:
    """Equal tokens leave no variance to explain, one decoder row has no neighbour: not 0, not infinite, no noise."""
    rng = np.random.default_rng(0)
    token = (rng.normal(0, 1, 768) * 10.0 ** rng.uniform(-4, 3, 768)).astype(
        np.float16
    )  # its squares round when summed
    cache = write_cache(tmp_path / "acts.zarr", np.tile(token, (5, 9, 1)))
    run = write_sae(tmp_path / "run", cache, n_latents=1)
    values = evaluate(cache, run).to_json()
    assert values["explained_variance"] is None
    assert isinstance(values["explained_variance_uncentered"], float)
    assert values["coherence"] == {"n_zero_rows": 0, "largest": None, "mean": None, "percentiles": {}}
    assert "NaN" not in json.dumps(values)


# ------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("block", [1, 3, 10, 11, 4096])
def test_coherence_is_exact_for_any_block(block: int) -> None:
    """Rows of any length, also one whose square would overflow or vanish; a row is never its own neighbour."""
    decoder = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    decoder[4] = 0
    decoder[2], decoder[9] = decoder[2] * 1e-30, decoder[9] * 1e30
    found = decoder_coherence(decoder, tile=block)
    rows = np.delete(decoder.double().numpy(), 4, axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = [max(abs(float(a @ b)) for j, b in enumerate(rows) if i != j) for i, a in enumerate(rows)]
    assert found.n_zero_rows == 1
    assert found.largest == pytest.approx(max(nearest), rel=1e-6)
    assert found.mean == pytest.approx(np.mean(nearest), rel=1e-6)
    assert found.percentiles == pytest.approx(percentiles(nearest), rel=1e-6)
    orthogonal = decoder_coherence(torch.eye(6), tile=block)
    assert (orthogonal.largest, orthogonal.mean) == (0, 0)


def test_bins_of_the_histogram_are_those_stated(small: Path) -> None:
    """The lower edge belongs to the bin; frequency 1 to the last; all below the first edge to the first."""
    counts = np.zeros(40, np.int64)
    counts[:6] = [10**9, 10**8, 10**6, 10**6 - 1, 1, 3 * 10**8]  # of 10^9: 1, exactly 10^-1, exactly 10^-3, ...
    found = dataclasses.replace(
        evaluate(small / "acts.zarr", small / "run"), n_images=10**9, n_images_active=counts, n_tokens=10**9
    )
    histogram = found.histogram
    assert histogram.n_never == 34
    shown = {edge: n for edge, n in zip(histogram.edges, histogram.images, strict=False) if n}
    assert shown == {-8.0: 1, -3.5: 1, -3.0: 1, -1.0: 2, -0.5: 1}
    assert histogram.edges[-1] == 0
    assert len(histogram.images) == len(histogram.tokens) == len(histogram.edges) - 1


# ------------------------------------------------------------------------------------------------------ refused


def test_what_does_not_fit_or_is_not_there_is_refused(small: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other.zarr", random_tokens(2), block=9)
    with pytest.raises(SpecMismatch, match=r"the SAE .*run and the cache .*other\.zarr .*: block 10 against 9"):
        evaluate(other, small / "run")
    alone = write_cache(tmp_path / "alone.zarr", random_tokens(2, 1))
    with pytest.raises(
        BadInput, match=r"no readable image with patch tokens in .*alone\.zarr: there is nothing to eval"
    ):
        evaluate(alone, write_sae(tmp_path / "run", alone, n_latents=4), token_set="patch")
    with pytest.raises(BadInput, match="the window of dead latents must be at least 1 token; found 0"):
        evaluate(small / "acts.zarr", small / "run", dead_window=0)
    for found in (0, -1):
        with pytest.raises(BadInput, match=f"micro_batch must be at least 1; found {found}"):
            evaluate(small / "acts.zarr", small / "run", micro_batch=found)
    with pytest.raises(BadInput, match="token_set must be one of all, patch, cls, register; found 'CLS'"):
        evaluate(small / "acts.zarr", small / "run", token_set="CLS")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_is_named(small: Path, tmp_path: Path, value: float) -> None:
    tokens = random_tokens(8, PER_IMAGE)
    tokens[5, 4, 3] = value
    cache = write_cache(tmp_path / "acts.zarr", tokens, unreadable=UNREADABLE, chunk_images=3)
    for token_set in ("all", "patch"):
        with pytest.raises(DamagedStore, match=r"token 4 of image 5 \(005\.png\) in .* is NaN or infinite"):
            evaluate(cache, small / "run", token_set=token_set)
    assert evaluate(cache, small / "run", token_set="cls").n_tokens == 6  # nothing is wrong with these


def _to_nan(model: SparseAutoencoder) -> None:
    model.W_enc[::2], model.W_enc[1::2] = 3e38, -3e38


@pytest.mark.parametrize("change", [_to_nan, lambda model: model.W_enc.mul_(3e38)], ids=["NaN", "infinite"])
def test_latents_that_overflow_are_refused(
    small: Path, tmp_path: Path, change: Callable[[SparseAutoencoder], object]
) -> None:
    run = write_sae(tmp_path / "run", small / "acts.zarr", n_latents=40, change=change)
    with pytest.raises(BadInput, match="a reconstruction became NaN or infinite: the SAE's weights do not fit"):
        evaluate(small / "acts.zarr", run)


# ------------------------------------------------------------------------------------------------------ the backbone


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.pth: a small ViT in the published layout whose every block matters."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        _add_tiny(patch)
        torch.save(_published(_lively_state(_timm("tiny"))), root / "tiny.pth")
    return root


def _add_tiny(patch: pytest.MonkeyPatch) -> None:
    options = {"embed_dim": 32, "num_heads": 2, "depth": 3}
    name = ARCHITECTURES["dinobloom-s"].timm_name
    patch.setitem(ARCHITECTURES, "tiny", Architecture(timm_name=name, options=options, weights_file="tiny.pth"))


def hooked_model(weights: Path, block: int) -> Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], Float]:
    """timm's own model: (pixels, what becomes of the block's output) -> CLS embedding in float64."""
    model = _timm("tiny").to_empty(device="cpu")
    state = {key.removeprefix("backbone."): value for key, value in torch.load(weights)["teacher"].items()}
    model.load_state_dict({key: state[key] for key in model.state_dict()}, assign=True)

    def embed(pixels: torch.Tensor, replace: Callable[[torch.Tensor], torch.Tensor]) -> Float:
        hook = model.blocks[block].register_forward_hook(lambda module, given, output: replace(output))
        with torch.inference_mode():
            embedding = model(pixels)
        hook.remove()
        return np.asarray(embedding[0].double().numpy())

    return embed


def normalised_pixels(path: Path) -> torch.Tensor:
    """(1, 3, 224, 224), by hand."""
    picture, *_ = read_image(path)
    assert picture is not None
    pixels = Preprocess().resize(picture).astype(np.float32) / 255
    pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()


def slow_substitution(
    cache: Path, run: Path, root: Path, weights: Path, rows: list[int], token_set: str
) -> list[Float]:
    """Means over the images of (cosine, relative change) for reconstruction, zeros and mean token."""
    store, model = ActivationStore(cache), load_sae(run).model
    embed = hooked_model(weights, store.spec.block)
    mean = torch.from_numpy(chosen_tokens(cache, token_set).mean((0, 1))).float()
    places = {"all": range(257), "patch": range(1, 257), "cls": [0]}[token_set]

    def replacing(new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def replace(output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            for place in places:
                output[0, place] = new(output[0, place])
            return output

        return replace

    changes: list[list[tuple[float, float]]] = [[], [], []]
    for row in rows:
        pixels = normalised_pixels(root / store.images["path"][row].as_py())
        untouched = embed(pixels, lambda output: output)
        for which, new in enumerate((lambda x: model(x[None])[0], torch.zeros_like, lambda x: mean)):
            changed = embed(pixels, replacing(new))
            length = np.linalg.norm(untouched)
            cosine = changed @ untouched / (np.linalg.norm(changed) * length)
            changes[which].append((float(cosine), float(np.linalg.norm(changed - untouched) / length)))
    return [np.mean(change, axis=0) for change in changes]


def substituted(found: Evaluation) -> Substitution:
    assert found.substitution is not None
    return found.substitution


@pytest.mark.stress
@pytest.mark.parametrize(("block", "token_set"), [(-2, "all"), (-2, "patch"), (-3, "cls"), (-1, "all")])
def test_substitution_equals_the_unmodified_model_with_a_hook(
    made: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, token_set: str
) -> None:
    _add_tiny(monkeypatch)
    cache, weights = tmp_path / "acts.zarr", trained / "tiny.pth"
    config = ExtractConfig(backbone="tiny", weights=str(weights), blocks=(block,), workers=1)
    extract(open_images(made / "images.csv"), cache, config)
    run = write_sae(tmp_path / "run", cache, n_latents=400)
    store = ActivationStore(cache)
    backbone = load_backbone_of(store, weights=str(weights), device="cpu", keep_tail=True)
    rows = draw_sample(store, n_images=4, seed=3)
    outputs = read_sample(store, rows, backbone, root=made, device="cpu", workers=1)
    sample = BackboneSample(outputs=outputs, final_cls=backbone.final_cls, seed=3)
    found = substituted(evaluate(cache, run, token_set=token_set, sample=sample, micro_batch=100))
    twin = slow_substitution(cache, run, made, weights, rows.tolist(), token_set)
    for change, expected in zip((found.reconstruction, found.zeros, found.mean_token), twin, strict=True):
        assert (change.cosine, change.relative_l2) == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.recovered == pytest.approx(1 - twin[0][1] / twin[1][1], rel=1e-3, abs=1e-5)  # zero-ablation
    assert found.recovered_from_mean == pytest.approx(1 - twin[0][1] / twin[2][1], rel=1e-3, abs=1e-5)
    assert (found.n_images, found.seed) == (4, 3)
    lengths = [change.relative_l2 for change in (found.reconstruction, found.zeros, found.mean_token)]
    assert min(lengths) > 1e-3
    assert len({round(length, 4) for length in lengths}) == 3  # else this test could not tell them apart


def test_the_tail_is_kept_only_on_request_and_changes_nothing(made: Path) -> None:
    bare, whole = (load_backbone("random-vit-tiny", blocks=(-2,), keep_tail=keep) for keep in (False, True))
    assert bare.tail is None
    assert bare.weights_sha256 == whole.weights_sha256
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(bare.tokens(pixels)[0], whole.tokens(pixels)[0])
    with pytest.raises(AssertionError, match="loaded without its tail"):
        bare.final_cls(torch.zeros(1, 257, 192))


def test_patches_at_the_last_block_do_not_reach_cls(small: Path) -> None:
    """Nothing changes, so nothing can be recovered: not a number, and not a division by zero."""
    outputs = [torch.from_numpy(random_tokens(1, PER_IMAGE, seed=seed)[0]).float() for seed in range(3)]
    sample = BackboneSample(outputs=outputs, final_cls=lambda tokens: tokens[:, 0], seed=0)
    found = substituted(evaluate(small / "acts.zarr", small / "run", token_set="patch", sample=sample))
    assert [change.relative_l2 for change in (found.reconstruction, found.zeros, found.mean_token)] == [0, 0, 0]
    assert math.isnan(found.recovered)
    zeros = substituted(evaluate(small / "acts.zarr", small / "run", token_set="all", sample=sample)).zeros
    assert math.isnan(zeros.cosine)
    assert zeros.relative_l2 == 1


# ------------------------------------------------------------------------------------------------------ training images


def test_training_images_are_known_by_their_content(made: Path, tmp_path: Path) -> None:
    """In another cache, under other names, in another order: the hash of the file decides, and says how many."""
    rows = ActivationStore(made / "acts.zarr").images.to_pylist()
    good = [row["path"] for row in rows if row["status"] == "ok"]
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(good[:6]):  # six known cells with new names
        shutil.copy(made / path, folder / f"renamed{9 - number}{Path(path).suffix}")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"new{number}.png")
    config = ExtractConfig(backbone="random-vit-tiny", blocks=(-2,), workers=1)
    extract(open_images(folder), tmp_path / "other.zarr", config)
    spec = ActivationStore(made / "acts.zarr").spec.same_tokens
    assert ActivationStore(tmp_path / "other.zarr").spec.same_tokens == spec
    settings = TrainConfig(tokens=2_000, batch_tokens=500, expansion=1, holdout=0.3)
    header = train([made / "acts.zarr"], tmp_path / "run", settings).header
    held_out = pq.read_table(tmp_path / "run" / "held_out.parquet")["image_id"].to_pylist()
    path_of = {row["image_id"]: row["path"] for row in rows}
    kept_out = {path_of[name] for name in held_out}
    expected = sum(path not in kept_out for path in good[:6])
    found = evaluate(tmp_path / "other.zarr", tmp_path / "run")
    assert (found.is_training_cache, found.n_images, found.n_known) == (False, 8, 8)
    assert (found.n_trained_on, found.n_held_out) == (expected, 8 - expected)
    assert 0 < expected < 6
    page = run_eval(tmp_path / "run", tmp_path / "other.zarr").stdout
    assert f"another cache; 8 of 8 images are known: {expected} trained on, {8 - expected} not" in page
    ids = column(ActivationStore(tmp_path / "other.zarr").images, "image_id")
    new = [str(name) for name in ids if "new" in str(name)]
    found = evaluate(tmp_path / "other.zarr", tmp_path / "run", only=new)
    assert (found.n_images, found.n_trained_on, found.n_held_out) == (2, 0, 2)

    path = tmp_path / "run" / "trained_on.parquet"  # what an older SAE lacks: nothing is called held out
    listed = path.read_bytes()
    path.write_bytes(listed[:-9] + b"x" + listed[-8:])
    with pytest.raises(DamagedStore, match=r"trained_on.parquet is not the list .* cyto sae train --overwrite"):
        evaluate(tmp_path / "other.zarr", tmp_path / "run")
    path.unlink()
    with pytest.raises(DamagedStore, match=r"trained_on.parquet is not the list"):
        evaluate(tmp_path / "other.zarr", tmp_path / "run")
    older = dict(header.summary or {})
    assert older.pop("trained_on")["n_images"] == len(good) - len(held_out)
    write_header(tmp_path / "run", dataclasses.replace(header, summary=older))
    found = evaluate(tmp_path / "other.zarr", tmp_path / "run")
    assert (found.n_known, found.n_trained_on, found.n_held_out) == (0, 0, 0)
    assert "not known of any of the 8 images: none is called held out" in found.trained_on_line
    found = evaluate(made / "acts.zarr", tmp_path / "run")  # of the very cache, names tell
    assert (found.n_known, found.n_held_out) == (len(good), len(held_out))


def test_what_hashes_and_names_tell(tmp_path: Path) -> None:
    """A hash counts before a name; an image that was trained on without a hash leaves the unlisted ones unknown."""

    def table(hashes: list[str | None]) -> pa.Table:
        nothing: list[str | None] = [None] * len(hashes)
        columns: dict[str, list[str | None]] = {
            "path": [f"{i}.png" for i in range(len(hashes))],
            "image_id": [f"{i}" for i in range(len(hashes))],
        }
        return with_outcome(image_table(columns, source="test", dataset="d"), hashes, nothing)

    a, b, c = (letter * 64 for letter in "abc")
    spec = {"caches": [{"sha256": "this"}], "images": {"excluded": 0}}
    header = new_header(SAE, spec)

    def known(summary: dict[str, Any], shown: pa.Table, cache: str, **changed: Any) -> list[bool | None]:
        """Per image: trained on, or not; None: not known."""
        now = dataclasses.replace(header, spec={**spec, **changed}, summary=summary)
        found = find_trained_on(tmp_path, now, shown, cache_sha256=cache)
        return [
            bool(on) if is_known else None for on, is_known in zip(found.is_trained_on, found.is_known, strict=True)
        ]

    said = {"trained_on": write_trained_on(tmp_path, [table([a, a.upper(), b])])}
    assert (said["trained_on"]["n_images"], said["trained_on"]["n_hashes"]) == (3, 2)
    images = table([a, c, None, b])
    assert known(said, images, "other") == [True, False, None, True]
    assert known({}, images, "other") == [None] * 4
    said = {"trained_on": write_trained_on(tmp_path, [table([a, None])])}
    assert known(said, images, "other") == [True, None, None, None]
    pq.write_table(pa.table({"image_id": ["1", "2", "3"]}), tmp_path / "held_out.parquet")
    assert known({}, images, "this") == [True, False, False, False]
    assert known({}, table([a, a, None, b]), "this") == [True, True, False, False]  # held out by name, but a copy
    assert known({}, images, "this", images={"excluded": 2}) == [None, False, False, False]
    assert known(said, images, "this") == [True, False, False, False]


# ------------------------------------------------------------------------------------------------------ the command


def run_eval(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["sae", "eval", *map(str, arguments)])


def test_the_command(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    options = ("--images", made, "--sample", 2, "--workers", 1, "--seed", 5, "--dead-window", 300)
    result = run_eval(made / "run", made / "acts.zarr", "--json", "--per-latent", *options)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    store, sae = ActivationStore(made / "acts.zarr"), load_sae(made / "run")
    assert (values["n_images"], values["n_unreadable"], values["n_tokens"]) == (9, 1, 9 * 257)
    assert (values["cache_sha256"], values["sae_sha256"]) == (store.content_sha256, sae.sha256)
    assert (values["is_training_cache"], values["dead_window_tokens"]) == (True, 2 * 257)
    assert len(values["n_tokens_active"]) == len(values["n_images_active"]) == 384
    assert sum(values["n_tokens_active"]) == pytest.approx(values["l0"] * 9 * 257)
    assert (values["substitution"]["n_images"], values["substitution"]["seed"]) == (2, 5)
    assert 0 < values["substitution"]["reconstruction"]["relative_l2"]
    shorter = json.loads(run_eval(made / "run", made / "acts.zarr", "--json").stdout)
    assert (shorter["substitution"], shorter["dead_window_tokens"]) == (None, 9 * 257)
    assert "n_tokens_active" not in shorter
    assert shorter["mse"] == values["mse"]

    page = run_eval(made / "run", made / "acts.zarr", *options).stdout
    for words in (
        "acts.zarr (UNTRAINED backbone)",
        "9 readable, 1 not (left out); 2,313 tokens (token set all)",
        "this very cache; 9 of 9 images are known: 9 trained on, 0 not",
        f"{values['mse']:.4g} as trained (loss normed), {values['mse_plain']:.4g} plain",
        f"{values['l0']:.1f} per token; percentiles 5: ",
        "over the last 514 tokens",
        "2 images, seed 5",
        "10^-0.5 to 10^0 ",
    ):
        assert words in page, page
    assert "nan" not in page
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert DEAD_WINDOW == 1_052_672  # as the help says


def test_a_mistake_is_one_line(made: Path, small: Path, tmp_path: Path) -> None:
    for arguments, words in [
        ((made / "acts.zarr", made / "run"), "no activation cache at"),
        ((made / "acts.zarr", made / "acts.zarr"), "no SAE at"),
        ((small / "run", made / "acts.zarr"), "do not hold the same kind of tokens"),
        ((made / "run", made / "acts.zarr", "--images", tmp_path), "say where the images are with --images"),
        ((small / "run", small / "acts.zarr", "--images", tmp_path), "no backbone 'none: synthetic tokens'"),
    ]:
        result = run_eval(*arguments)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        assert words in result.stderr
        assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
    result = run_eval(made / "run", made / "acts.zarr", "--weights", "x.pth")
    assert result.exit_code == 2
    assert "--weights: of use only with --images" in result.stderr
    result = run_eval(made / "run", made / "acts.zarr", "--sample", "8", "--seed", "1", "--workers", "1")
    assert result.exit_code == 2
    assert "--sample, --seed, --workers: of use only with --images" in result.stderr


def test_a_missing_image_is_told_before_the_long_pass(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationStore, "iter_chunks", lambda *_, **__: pytest.fail("the pass began"))
    next((copied / "images").rglob("02.png")).unlink()
    result = run_eval(copied / "run", copied / "acts.zarr", "--images", copied, "--workers", 1)
    assert result.exit_code == 1
    assert "02.png is missing, or not the file that was cached (no such file); say where" in result.stderr


def test_damage_in_the_cache_is_not_averaged_away(copied: Path) -> None:
    path = chunk_path(copied / "acts.zarr", 0)
    raw = bytearray(path.read_bytes())
    raw[1000:1002] = np.float16(np.nan).tobytes()
    path.write_bytes(raw)
    result = run_eval(copied / "run", copied / "acts.zarr")
    assert result.exit_code == 1
    assert "token 2 of image 0 (images/neutrophil_segmented/00.png) in" in result.stderr
