"""Sparse rows on a GPU: the rows of the CPU, found without a wait, and copied beside the next micro-batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from artefacts import contents
from click.testing import CliRunner
from fake_cuda import FakeCuda
from sparse_tokens import random_tokens, write_sae
from token_caches import write_cache
from torch._subclasses.fake_tensor import FakeTensorMode

import cytosae.latents.encode as encoding
from cli import cli
from cytosae.latents.device_rows import DeviceCompactor, HostCopies, count_kept, select_kept
from cytosae.latents.encode import encode
from cytosae.latents.sparse_rows import INFINITY, Rounding, SparseRows
from cytosae.latents.sparsify import Compactor
from cytosae.sae import SparseAutoencoder, load_sae
from stores import BadInput, DamagedStore, LatentStore, verify_latents
from stores.errors import OutOfMemory

CUDA = torch.device("cuda")
ROUNDINGS = [Rounding(10), Rounding(23), Rounding(10, 0.2), Rounding(23, 1.0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acts.zarr: 7 images of 257 tokens, 3 a chunk, images 1 and 6 (a chunk of its own) unreadable; run: 40 latents."""
    root = tmp_path_factory.mktemp("encode")
    write_cache(root / "acts.zarr", random_tokens(7), unreadable=(1, 6), chunk_images=3)
    write_sae(root / "run", root / "acts.zarr", n_latents=40)
    return root


def on_cpu(p: torch.Tensor, rounding: Rounding) -> SparseRows:
    """The rows as the CPU makes them, in one piece."""
    compactor = Compactor(p.shape[1], rounding)
    pieces = compactor.rows(p)
    compactor.close()
    return SparseRows(
        np.concatenate([piece.indices for piece in pieces]),
        np.concatenate([piece.values for piece in pieces]),
        np.concatenate([piece.lengths for piece in pieces]),
        sum(piece.n_dropped for piece in pieces),
    )


def require_equal(found: SparseRows, wanted: SparseRows) -> None:
    for name in ("indices", "values", "lengths"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
    assert found.n_dropped == wanted.n_dropped


def to_cpu(run: Path, device: str) -> object:
    return load_sae(run, device="cpu")


# ------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", [1, 7, 10, 22, 23])
@pytest.mark.parametrize("least", [0.0, 2.0**-149, 1e-41, 1e-20, 0.2, 1.0, 3.1e38, float(np.finfo(np.float32).max)])
def test_what_is_kept_is_known_before_rounding(bits: int, least: float) -> None:
    """The first number that is kept once it is rounded, and the one below it, which is not."""
    rounding = Rounding(bits, least)
    first = rounding.first_kept
    assert 1 <= first <= INFINITY
    assert rounding.rounded(first) >= rounding.smallest or first == INFINITY
    assert first == 1 or rounding.rounded(first - 1) < rounding.smallest


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("n_latents", [1, 200, 1 << 16, 70_000])
def test_late_rows_are_those_of_the_cpu(n_latents: int, rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches are counted before the first is selected; the rows are taken at the very end."""
    generator = torch.Generator().manual_seed(n_latents)
    batches = [torch.randn(n, n_latents, generator=generator) for n in (5, 3, 7, 1)]
    batches[2][1], batches[2][2, 0] = -1.0, 2.0**-149
    batches[2][3, -1] = -np.inf
    wanted = [on_cpu(p, rounding) for p in batches]
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    compactor = DeviceCompactor(rounding, CUDA)
    selects = [compactor.count(p) for p in batches[:1]]
    rows: list[Callable[[], SparseRows]] = []
    for p in [*batches[1:], None]:
        if p is not None:
            selects.append(compactor.count(p))
        selected = selects.pop(0)()
        assert (selected.nnz, selected.n_rows) == (len(wanted[len(rows)].values), len(wanted[len(rows)].lengths))
        rows.append(selected.rows)
    for found, expected in zip(rows, wanted, strict=True):
        require_equal(found(), expected)
    assert cuda.n_copies == cuda.n_recorded == 4 * 3


def test_bfloat16_gives_what_its_float32_gives() -> None:
    """ReLU latents are not copied into a larger type first; a threshold between two bfloat16 numbers is no trap."""
    p = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    at = p[p > 0][0].item()
    for rounding in (*ROUNDINGS, Rounding(23, at), Rounding(23, at * 1.0001), Rounding(23, at * 0.9999)):
        require_equal(DeviceCompactor(rounding, p.device).count(p)().rows(), on_cpu(p.float(), rounding))


def test_pinned_buffers_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are copies on their way, however many copies there are; never one that was not read yet."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    copies = HostCopies(CUDA)
    waiting: list[tuple[int, Callable[[], list[npt.NDArray[np.int32]]]]] = []
    for number in range(20):
        sent = [torch.full((n,), number, dtype=torch.int32) for n in (10 + number % 3, 0, 5)]
        waiting.append((number, copies.begin(*sent)))
        if len(waiting) == 3:
            expected, arrive = waiting.pop(0)
            assert [array.tolist() for array in arrive()] == [[expected] * (10 + expected % 3), [], [expected] * 5]
    assert len(cuda.pinned) == 3


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, 3.4028e38])
def test_nothing_passes_that_is_not_finite(bad: float) -> None:
    p = torch.full((4, 60), -1.0)
    p[2, 7] = bad
    with pytest.raises(BadInput, match="a latent became NaN or infinite"):
        DeviceCompactor(Rounding(10), p.device).count(p)()
    for token in (np.nan, np.inf, -np.inf):
        with pytest.raises(DamagedStore, match="a token of a readable image is NaN or infinite"):
            DeviceCompactor(Rounding(10), p.device).count(p, torch.tensor([1.0, token]))()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [Rounding(10), Rounding(23, 0.3)])
def test_no_tensor_of_the_host_meets_one_of_the_gpu(dtype: torch.dtype, rounding: Rounding) -> None:
    """With torch's fake tensors, which have a device and no memory: nothing here needs a value on the host, either."""
    with FakeTensorMode(), torch.inference_mode():
        p = torch.empty(514, 49_152, dtype=dtype, device="cuda")
        is_kept, numbers = count_kept(p, rounding, torch.empty(514, 768, device="cuda"))
        columns, bits = select_kept(p, is_kept, 4_000, rounding)
        found = [(each.device.type, each.dtype, tuple(each.shape)) for each in (is_kept, numbers, columns, bits)]
    assert found == [
        ("cuda", torch.bool, (514, 49_152)),
        ("cuda", torch.int32, (514 + 6,)),
        ("cuda", torch.int16, (4_000,)),
        ("cuda", torch.int32, (4_000,)),
    ]


# ------------------------------------------------------------------------------------------- the whole job


@pytest.mark.parametrize("least", [0.0, 0.4])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_through_a_late_gpu_the_store_is_the_one_of_the_cpu(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int | None, least: float
) -> None:
    """Unreadable images, a chunk without a readable one, parts of a chunk: every file to the byte."""
    cpu, gpu = tmp_path / "cpu.zarr", tmp_path / "gpu.zarr"
    settings: dict[str, Any] = {"min_activation": least, "batch_size": batch_size}
    plain = encode(made / "acts.zarr", made / "run", cpu, device="cpu", **settings)
    cuda = FakeCuda()
    with monkeypatch.context() as patch:
        cuda.install(patch)
        patch.setattr(encoding, "load_sae", to_cpu)
        late = encode(made / "acts.zarr", made / "run", gpu, device="cuda", **settings)
    assert contents(gpu) == contents(cpu)
    assert (late.nnz, late.n_dropped, late.l0) == (plain.nnz, plain.n_dropped, plain.l0)
    assert list(verify_latents(gpu)) == [None]
    assert cuda.n_recorded


def test_an_error_on_the_gpu_leaves_what_was_committed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk cannot be encoded: the first is committed, no thread stays, and the job goes on from there."""
    real, n_calls = SparseAutoencoder.pre_activations, 0

    def pre_activations(self: SparseAutoencoder, tokens: torch.Tensor, **more: object) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0")
        return real(self, tokens, **more)  # type: ignore[arg-type]

    latents = tmp_path / "l.zarr"
    with monkeypatch.context() as patch:
        FakeCuda().install(patch)
        patch.setattr(encoding, "load_sae", to_cpu)
        patch.setattr(SparseAutoencoder, "pre_activations", pre_activations)
        with pytest.raises(OutOfMemory) as found:
            encode(made / "acts.zarr", made / "run", latents, device="cuda", batch_size=2)
    assert str(found.value) == (
        "out of memory on the GPU: 512.00 MiB more were asked for. Run the same command with --batch-size 1 (now 2); "
        "images that were encoded and committed stay"
    )
    encode(made / "acts.zarr", made / "run", latents, device="cpu", batch_size=2)
    encode(made / "acts.zarr", made / "run", tmp_path / "never.zarr", device="cpu", batch_size=2)
    assert contents(latents) == contents(tmp_path / "never.zarr")


def test_images_together_are_an_option_and_change_no_latent(made: Path, tmp_path: Path) -> None:
    arguments = ["sae", "encode", str(made / "acts.zarr"), str(made / "run"), "--device", "cpu", "-o"]
    for n in ("1", "3"):
        done = CliRunner().invoke(cli, [*arguments, str(tmp_path / n), "--batch-size", n])
        assert done.exit_code == 0, done.output
    one, three = (LatentStore(tmp_path / n).read_images(0, 7) for n in ("1", "3"))
    assert one.indices.tolist() == three.indices.tolist()
    np.testing.assert_allclose(one.values, three.values, rtol=2**-9)
    refused = CliRunner().invoke(cli, [*arguments, str(tmp_path / "0"), "--batch-size", "0"])
    assert refused.exit_code == 2
    with pytest.raises(BadInput, match="batch_size must be at least 1; found 0"):
        encode(made / "acts.zarr", made / "run", tmp_path / "0", batch_size=0)
