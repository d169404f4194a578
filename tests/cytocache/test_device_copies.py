"""Copies to and from a GPU: nothing is read too early, nothing is written over too early, buffers are reused."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import contents
from click.testing import CliRunner
from fake_cuda import FakeCuda
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from cli import cli
from cytocache.backbones import ARCHITECTURES, Backbone, _create, load_backbone
from cytocache.demo_cells import draw_cell
from cytocache.device_copies import ChunkBuffers, PixelSender
from cytocache.extract import ExtractConfig, extract
from cytocache.preprocess import Preprocess
from cytocache.vit import cut
from stores import verify_activations

CUDA = torch.device("cuda")


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Eleven drawn cells; one of them is torn."""
    folder = tmp_path / "cells"
    folder.mkdir()
    for n in range(11):
        Image.fromarray(draw_cell("lymphocyte", np.random.default_rng(n), size=40 + n)).save(folder / f"{n:02d}.png")
    torn = folder / "04.png"
    torn.write_bytes(torn.read_bytes()[:300])
    return folder


@pytest.mark.parametrize("computes_late", [False, True])
def test_pixels_arrive_whole_though_their_slot_is_filled_again(
    computes_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the GPU is ten batches behind: a pinned buffer waits for its copy before it is filled again."""
    cuda = FakeCuda(computes_late=computes_late)
    cuda.install(monkeypatch)
    sender = PixelSender(CUDA, batch_size=4, size=2)
    slot, sent = np.empty((4, 2, 2, 3), np.uint8), []
    for number in range(10):
        n = 3 if number == 9 else 4
        slot[:] = number
        sent.append(sender.send(slot[:n]))
        slot[:] = 200  # the readers fill it again
    if computes_late:
        assert sent[-1].unique().tolist() != [9]
        cuda.finish()
    assert [there.unique().tolist() for there in sent] == [[number] for number in range(10)]
    assert [len(there) for there in sent] == [4] * 9 + [3]
    assert cuda.pinned == [48] * 3  # made once
    assert cuda.n_recorded == 10


def test_tokens_are_there_when_they_were_waited_for_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go on while copies of earlier ones have not begun; a chunk that is used again is whole again."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    shape = (5, 3, 2)
    late, plain = (ChunkBuffers(device, n_chunks=2, n_blocks=2, shape=shape) for device in (CUDA, torch.device("cpu")))
    taken = []
    for number in range(6):
        chunk, twin = late.take(), plain.take()
        for images in (slice(0, 2), slice(2, 4), slice(4, 5)):
            full = [
                torch.randn(images.stop - images.start, 3, 2, generator=torch.Generator().manual_seed(number)) * block
                for block in (1, 100)
            ]
            late.fill(chunk, images, full)
            plain.fill(twin, images, full)
        assert not all(map(torch.equal, chunk.tokens, twin.tokens))
        chunk.wait()
        assert all(map(torch.equal, chunk.tokens + chunk.largest, twin.tokens + twin.largest))
        late.give_back(chunk)
        plain.give_back(twin)
        taken.append(chunk)
    assert len({id(chunk) for chunk in taken}) == 2
    assert len(cuda.pinned) == 2 * 2 * 2
    assert cuda.n_copies == cuda.n_recorded == 6 * 3 * 4


def test_a_chunk_is_filled_again_only_after_it_was_given_back() -> None:
    buffers = ChunkBuffers(torch.device("cpu"), n_chunks=1, n_blocks=1, shape=(1, 1, 1))
    chunk = buffers.take()
    again = threading.Thread(target=buffers.take)
    again.start()
    again.join(0.2)
    assert again.is_alive()
    buffers.give_back(chunk)
    again.join(10)
    assert not again.is_alive()


def test_through_a_late_gpu_the_cache_is_the_one_of_the_cpu(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks, short batches and a short chunk, an image that cannot be read: every file to the byte."""
    settings: dict[str, Any] = {"blocks": (0, 2), "chunk_images": 4, "batch_size": 3, "workers": 2, "precision": "fp32"}
    extract(cells, tmp_path / "cpu", ExtractConfig(device="cpu", **settings))
    cuda = FakeCuda()
    with monkeypatch.context() as patch:
        cuda.install(patch)
        extract(cells, tmp_path / "gpu", ExtractConfig(device="cuda", **settings))
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
    assert not any(verify_activations(tmp_path / "gpu" / "block2.zarr"))
    # three batches of pixels, and for each block the tokens and magnitudes of three chunks; nothing for each batch
    assert len(cuda.pinned) == 3 + 3 * 2 * 2


def test_mean_and_std_are_made_once_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("random-vit-tiny", blocks=(0,))
    n_made, real = 0, torch.tensor

    def tensor(*given: Any, **more: Any) -> torch.Tensor:
        nonlocal n_made
        n_made += 1
        return real(*given, **more)

    monkeypatch.setattr(torch, "tensor", tensor)
    pixels = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    with torch.inference_mode():
        first = backbone.tokens(pixels)[0].clone()
    assert torch.equal(backbone.tokens(pixels)[0], first)  # also outside of inference
    assert n_made == 2


def test_no_tensor_of_the_host_meets_one_of_the_gpu() -> None:
    """With torch's fake tensors, which have a device and no memory: so no value is asked for on the host, either."""
    model = cut(_create(ARCHITECTURES["random-vit-tiny"], on="meta"), 2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        backbone = Backbone(
            name="shapes",
            model=model.to_empty(device="cuda"),
            weights_sha256="",
            trained=False,
            blocks=(0, 2),
            n_blocks=4,
            width=192,
            preprocess=Preprocess(),
        )
        for _ in range(2):
            full = backbone.tokens(torch.empty(2, 224, 224, 3, dtype=torch.uint8, device="cuda"))
            assert [(tokens.device.type, tuple(tokens.shape)) for tokens in full] == [("cuda", (2, 257, 192))] * 2


def test_too_little_memory_is_one_line_and_a_smaller_batch_goes_on(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk does not fit: the first one stays, and is not computed again."""
    real, n_calls = Backbone.tokens, 0

    def tokens(self: Backbone, pixels: torch.Tensor) -> list[torch.Tensor]:
        nonlocal n_calls
        n_calls += 1
        if len(pixels) == 4 and n_calls > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79 GiB\nmore text")
        return real(self, pixels)

    monkeypatch.setattr(Backbone, "tokens", tokens)
    arguments = ["cache", "extract", str(cells), str(tmp_path / "a.zarr"), "--block", "0", "--chunk-images", "4"]
    failed = CliRunner().invoke(cli, [*arguments, "--batch-size", "4", "--workers", "1"])
    assert failed.exit_code == 1
    (line,) = [line for line in failed.output.splitlines() if line.startswith("Error")]
    assert line == (
        "Error: out of memory on the GPU: 2.50 GiB more were asked for. Run the same command with --batch-size 2 "
        "(now 4); chunks that are written stay"
    )
    n_calls = 0
    done = CliRunner().invoke(cli, [*arguments, "--batch-size", "2", "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert n_calls == 4  # of the seven images after the first chunk
