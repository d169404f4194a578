"""Small real things that many tests use: drawn cells, a cache, an SAE, latents. Made once, copied to be changed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from tiny_runs import tiny_config

import stores.devices
from cytocache.datasets import open_images
from cytocache.demo_cells import draw_cell

if TYPE_CHECKING:
    from distributed import Client

LABELS = ("neutrophil_segmented", "lymphocyte", "eosinophil")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The pages of the docs take minutes each: they are begun first, so that the last one does not run alone."""
    items.sort(key=lambda item: item.get_closest_marker("docs") is None)


@pytest.fixture(scope="session", autouse=True)
def auto_is_the_cpu() -> Iterator[None]:
    """`device="auto"` means the CPU, also beside a GPU: tests compare bits. Tests of a GPU name their device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores.devices, "_has_gpu", lambda: False)
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten drawn cells of 48 px in three classes, and what the pipeline makes of them; read-only: see `copied`.

    images/<label>/<n>.png · images.csv (patients of different size, one image unreadable) · acts.zarr (4 images a
    chunk, so the last one is short) · run (SAE, 2 x 192 latents) · latents.zarr
    """
    from cytocache.extract import ExtractConfig, extract  # these bring torch, which not every test needs
    from cytosae.latents.encode import encode
    from cytosae.training.train import train

    root = tmp_path_factory.mktemp("made")
    lines = ["path,label,patient,disease"]
    for n in range(10):
        label = LABELS[n % 3]
        path = root / "images" / label / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_cell(label, np.random.default_rng(n), size=48)).save(path)
        patient, disease = (("P1", "sick") if n < 6 else ("P2", "well")) if n < 9 else ("", "")
        lines.append(f"images/{label}/{n:02d}.png,{label},{patient},{disease}")
    torn = root / "images" / LABELS[1] / "04.png"
    torn.write_bytes(torn.read_bytes()[:200])
    (root / "images.csv").write_text("\n".join(lines) + "\n")

    config = ExtractConfig(chunk_images=4, batch_size=3, device="cpu")  # where there is a GPU, too
    extract(open_images(root / "images.csv"), root / "acts.zarr", config)
    train([root / "acts.zarr"], root / "run", tiny_config(), device="cpu")
    encode(root / "acts.zarr", root / "run", root / "latents.zarr", device="cpu")
    return root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "copied"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """fsync does nothing: no test switches the machine off, and thousands of small files would wait milliseconds each.

    Child processes do wait. Tests that count or order these calls put their own function in its place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are done before a second thread has woken up."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def threads() -> Iterator["Client"]:
    """A Dask client of two threads in this process."""
    from latent_stores import local_client

    with local_client(1, 2) as client:
        yield client


@pytest.fixture(scope="module")
def processes() -> Iterator["Client"]:
    """A Dask client of two worker processes of one thread, as `cyto barcode` starts them."""
    from latent_stores import local_client

    with local_client(2, 1, processes=True) as client:
        yield client
