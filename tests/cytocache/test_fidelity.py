"""Fidelity: the counts and sums equal those of a slow twin that holds everything at once."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result

from cli import cli
from cytocache import sample as sample_module
from cytocache.backbones import Backbone, load_backbone
from cytocache.datasets import open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.fidelity import Fidelity, measure_fidelity
from cytocache.images import read_image
from cytosae.sae import load_sae
from stores.activation_spec import chunk_path
from stores.activation_store import ActivationStore
from stores.errors import BadInput, CytoError, IncompleteStore, SpecMismatch

UNREADABLE = 4  # of the ten images of the fixture `made`
Floats = npt.NDArray[np.float32]
NUMBERS = ["n_images", "n_tokens", "fvu", "fvu_cls", "largest_magnitude", "largest_difference"]
NUMBERS += ["n_active", "n_cross_zero", "n_above_tau", "n_cross_tau"]


@pytest.fixture(scope="module")
def low(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the same images from a bfloat16 forward pass, which differs more than by rounding."""
    store = tmp_path_factory.mktemp("low") / "low.zarr"
    config = ExtractConfig(blocks=(-2,), precision="bf16", chunk_images=4, workers=1)
    extract(open_images(made / "images.csv"), store, config)
    return store


@pytest.fixture(scope="module")
def full(made: Path) -> Floats:
    """(10, 257, 192) float32 tokens of block 2, one image after the other; NaN for the unreadable one."""
    backbone, tokens = load_backbone("random-vit-tiny", blocks=(-2,)), np.full((10, 257, 192), np.nan, np.float32)
    for row, path in enumerate(ActivationStore(made / "acts.zarr").images["path"].to_pylist()):
        picture = read_image(made / path)[0]
        if picture is not None:
            pixels = torch.from_numpy(backbone.preprocess.resize(picture).copy())[None]
            with torch.inference_mode():
                tokens[row] = backbone.tokens(pixels)[0][0].numpy()
    assert [row for row in range(10) if np.isnan(tokens[row]).any()] == [UNREADABLE]
    return tokens


def slow_twin(full: Floats, cached: Floats, latents: Any = None, tau: float = 0.2) -> Fidelity:
    """Everything from its definition, in float64, over (images, tokens, width) of readable images."""
    x, y = full.astype(np.float64), cached.astype(np.float64)

    def fvu(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
        return float(((x - y) ** 2).sum() / ((x - x.mean((0, 1))) ** 2).sum())

    counts = [0, 0, 0, 0]
    if latents is not None:
        for image in range(len(x)):
            a, b = latents(torch.from_numpy(full[image])), latents(torch.from_numpy(cached[image]))
            for value, other in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
                counts[0] += value > 0
                counts[1] += (value > 0) != (other > 0)
                counts[2] += value > tau
                counts[3] += (value > tau) != (other > tau)
    return Fidelity(
        n_images=len(x),
        n_tokens=x.shape[0] * x.shape[1],
        fvu=fvu(x, y),
        fvu_cls=fvu(x[:, :1], y[:, :1]),
        largest_magnitude=float(np.abs(x).max()),
        largest_difference=float(np.abs(x - y).max()),
        n_active=counts[0],
        n_cross_zero=counts[1],
        n_above_tau=counts[2],
        n_cross_tau=counts[3],
    )


def assert_close(found: Fidelity, expected: Fidelity) -> None:
    for name in NUMBERS:
        value = getattr(expected, name)
        assert getattr(found, name) == (value if isinstance(value, int) else pytest.approx(value, rel=1e-6)), name


class NoisyTokens:
    """A backbone whose tokens are what a test says, so that CLS, too, varies from image to image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
        real = Backbone.tokens
        monkeypatch.setattr(Backbone, "tokens", lambda backbone, pixels: [change(t) for t in real(backbone, pixels)])


@pytest.mark.stress
@pytest.mark.parametrize("which", ["float16 alone", "bfloat16"])
def test_it_equals_the_slow_twin(which: str, made: Path, low: Path, full: Floats) -> None:
    store = made / "acts.zarr" if which == "float16 alone" else low
    rows = [row for row in range(10) if row != UNREADABLE]
    cached = ActivationStore(store).read_images(rows).astype(np.float32)
    encode = load_sae(made / "run").model.encode
    tau = float(np.median([value for value in encode(torch.from_numpy(full[0])).flatten().tolist() if value > 0]))
    found = measure_fidelity(store, root=made, latents=encode, tau=tau, workers=2)
    with torch.inference_mode():
        expected = slow_twin(full[rows], cached, encode, tau)
    assert np.isnan(found.fvu_cls)  # an untrained backbone's CLS is the same for every image: nothing to explain
    assert_close(Fidelity(**{**vars(found), "fvu_cls": 0}), Fidelity(**{**vars(expected), "fvu_cls": 0}))
    assert found.n_active > found.n_above_tau > 1000
    assert (found.n_cross_zero > 0, found.n_cross_tau > 0) == (True, True)
    assert found.fvu < (1e-6 if which == "float16 alone" else 1e-3)
    assert found.fvu > (1e-9 if which == "float16 alone" else 1e-6)


def test_damage_by_hand_is_measured_exactly(
    made: Path, full: Floats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLS and patches that vary, one cached number that is off by 3, and it shows in each figure where it must."""
    scale = iter(range(1, 100))
    NoisyTokens(monkeypatch, lambda tokens: tokens * next(scale))
    readable = [row for row in range(10) if row != UNREADABLE]
    scaled = np.stack([full[row] * np.float32(n) for n, row in enumerate(readable, start=1)])
    store = Path(shutil.copytree(made / "acts.zarr", tmp_path / "acts.zarr"))
    cached = np.full((12, 257, 192), np.nan, np.float16)
    cached[readable] = scaled
    cached[7, 0, 5] += 3
    for chunk in range(3):
        path = chunk_path(store, chunk)
        path.write_bytes(cached[chunk * 4 : chunk * 4 + 4].tobytes() + path.read_bytes()[-4:])  # a map checks no more
    found = measure_fidelity(store, root=made, workers=1)
    assert_close(found, slow_twin(scaled, cached[readable].astype(np.float32)))
    assert found.largest_difference == pytest.approx(3, abs=0.1)
    assert found.fvu_cls > 10 * found.fvu


@pytest.mark.stress
def test_the_sample_is_readable_repeatable_and_each_image_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    real = ActivationStore.read_images

    def read_images(self: ActivationStore, rows: Any) -> Any:
        seen[-1].append(int(rows[0]))
        return real(self, rows)

    monkeypatch.setattr(ActivationStore, "read_images", read_images)
    calls: list[tuple[int, int]] = []
    for seed, n_images in [(0, 4), (0, 4), (1, 4), (0, 64)]:
        seen.append([])
        found = measure_fidelity(
            made / "acts.zarr",
            root=made,
            n_images=n_images,
            seed=seed,
            workers=1,
            progress=lambda done, total, state: calls.append((done, total)),
        )
        assert found.n_images == len(seen[-1]) == min(n_images, 9)
        assert found.n_tokens == 257 * found.n_images
    assert seen[0] == seen[1] != seen[2]
    assert seen[3] == [row for row in range(10) if row != UNREADABLE]
    assert calls[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ------------------------------------------------------------------------------------------------------ refused


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "moved"))


def test_other_or_missing_images_are_refused(moved: Path) -> None:
    words = r"2\.png is missing, or not the file that was cached; say where the images are with --root"
    (path,) = (moved / "images").rglob("02.png")
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0")
    with pytest.raises(BadInput, match=words):
        measure_fidelity(moved / "acts.zarr", root=moved)
    path.unlink()
    with pytest.raises(BadInput, match=r"2\.png is missing, .* cached \(no such file\); say where"):
        measure_fidelity(moved / "acts.zarr", root=moved)


def test_an_image_that_can_no_longer_be_decoded_is_no_black_image(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, but another Pillow: its zeros must not enter the sums."""
    from cytocache.readers import ImageReaders

    real = ImageReaders.read

    def read(self: ImageReaders, batches: Any) -> Any:
        for pictures in real(self, batches):
            yield type(pictures)(pictures.pixels * 0, pictures.content_hash, ["cannot be decoded: too new"])

    monkeypatch.setattr(ImageReaders, "read", read)
    with pytest.raises(BadInput, match="cannot be decoded: too new"):
        measure_fidelity(made / "acts.zarr", root=made, workers=1)


def test_other_weights_or_an_unfinished_cache_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Backbone:
        return replace(load_backbone(*args, **kwargs), weights_sha256="0" * 64)

    monkeypatch.setattr(sample_module, "load_backbone", load)
    with pytest.raises(SpecMismatch, match=r"was made with weights of sha256 .*…, found 000000000000…; give the file"):
        measure_fidelity(made / "acts.zarr", root=made)
    with pytest.raises(CytoError, match="no activation cache at"):
        measure_fidelity(made / "latents.zarr")
    with pytest.raises(KeyboardInterrupt):
        extract(open_images(made / "images.csv"), tmp_path / "begun.zarr", ExtractConfig(), stop=lambda: True)
    with pytest.raises(IncompleteStore):
        measure_fidelity(tmp_path / "begun.zarr")


# ------------------------------------------------------------------------------------------------------ the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["cache", "fidelity", *map(str, arguments)])


def test_the_command(made: Path, low: Path) -> None:
    """The images are found where they lay; numbers as JSON, with null for what is not defined; words for people."""
    result = run(made / "acts.zarr", "--json", "--sample", 3, "--workers", 1, "--sae", made / "run", "--tau", 0.1)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["n_images"], found["n_tokens"], found["tau"], found["fvu_cls"]) == (3, 771, 0.1, None)
    assert found["n_active"] > 0
    result = run(low, "--sample", 3, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "of the float32 tokens' variance is lost; of CLS alone n/a (it does not vary)" in result.stdout
    assert "3 images, 771 tokens (seed 0)" in result.stdout
    assert "latents" not in result.stdout
    result = run(low, "--sample", 3, "--workers", 1, "--sae", made / "run")
    assert "cross zero (" in result.stdout
    assert "exceed 0.2; " in result.stdout


def test_a_mistake_is_one_line(made: Path, tmp_path: Path) -> None:
    for arguments, words in [
        ((made / "latents.zarr",), "no activation cache at"),
        ((made / "acts.zarr", "--root", tmp_path), "say where the images are with --root"),
        ((made / "acts.zarr", "--sae", made / "acts.zarr"), "no SAE at"),
        ((made / "acts.zarr", "--sae", made / "run", "--tau", "nan"), "tau must be a number of at least 0; found nan"),
        ((made / "acts.zarr", "--sae", made / "run", "--tau", -1), "tau must be a number of at least 0; found -1"),
        ((made / "acts.zarr", "--weights", "x.pth"), "is of an untrained backbone, .*leave --weights out"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        assert re.search(words, result.stderr)
        assert result.stderr.count("\n") == 1
    result = run(made / "acts.zarr", "--tau", 0.1)
    assert (result.exit_code, "--tau is of use only with --sae" in result.stderr) == (2, True)
