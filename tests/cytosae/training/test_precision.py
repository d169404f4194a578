"""What each precision rounds, and what it must not round: sums, the encoder's bias, thresholds of jumprelu."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cytosae.causes.encoded as edits
import cytosae.latents.encode as encoding
from cytosae.latents.sparse_rows import Rounding
from cytosae.sae import SparseAutoencoder, TrainConfig
from cytosae.sae.config import ACTIVATIONS, PRECISIONS
from cytosae.training import (
    Objective,
    budget,
    kernels_cpu,
    loss_and_gradients,
    losses,
    measured_latents,
    measured_sums,
    objective,
    precision,
)
from cytosae.training.distributed import ALONE
from cytosae.training.encoder_product import EncoderProduct
from cytosae.training.precision import Dtypes, add_product, check_precision, cpu_has_bfloat16, dtypes_of
from stores.errors import BadInput

SHORT = [torch.bfloat16, torch.float16]
MATMUL = torch.backends.cuda.matmul
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def draws(*shape: int, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, 1, shape)).float()


def small_model(activation: str = "relu", *, width: int = 24, n_latents: int = 96) -> SparseAutoencoder:
    """Biases that half precision cannot hold, and pre-activations of which about half are positive."""
    model = SparseAutoencoder(width, n_latents, activation, k=8 if activation in ("topk", "batchtopk") else None)
    model.init_weights(torch.Generator().manual_seed(0), init="transpose", threshold=0.5)
    with torch.no_grad():
        model.b_enc.copy_(0.3 * draws(n_latents, seed=1))
        model.b_dec.copy_(draws(width, seed=2))
    return model


@pytest.fixture
def types_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are rounded as on a GPU; the products run here, on the rounded numbers, with sums in float32."""
    of = precision.dtypes_of
    monkeypatch.setattr(
        objective, "dtypes_of", lambda name, activation, weights, _: of(name, activation, weights, "cuda")
    )


@pytest.mark.parametrize("short", SHORT)
def test_a_sum_of_short_operands_is_float32(short: torch.dtype) -> None:
    """All of one sign, so that a sum rounded to `short` (2^-9 or 2^-12) would show; added to what was there."""
    left, right = draws(3, 4_096, mean=2).abs().to(short), draws(4_096, 5, mean=2, seed=1).abs().to(short)
    out = torch.full((3, 5), 0.1)
    wanted = out.double() + left.double() @ right.double()
    add_product(out, left, right)
    assert (out.double() - wanted).abs().max() <= 2e-6 * wanted.max()


@pytest.mark.skipif(not hasattr(MATMUL, "allow_bf16_reduced_precision_reduction_split_k"), reason="torch 2.10")
@pytest.mark.parametrize("may_be_cut", [True, False])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_gpu_is_told_to_sum_in_float32(name: str, may_be_cut: bool) -> None:
    """In a step, whatever torch was told; afterwards as before, also whether cuBLAS may cut a sum into pieces."""
    names = [f"allow_{short}_reduced_precision_reduction" for short in ("bf16", "fp16")]
    every = [*names, *(f"{each}_split_k" for each in names), "fp32_precision"]
    before = [getattr(MATMUL, each) for each in every]
    seen: list[bool] = []

    @losses._at_its_precision
    def step(*given: object, **more: object) -> Any:
        seen.extend(getattr(MATMUL, each) for each in every)

    given = Objective(precision=name)
    tokens: Any = SimpleNamespace(device=torch.device("cuda"))  # only its device is read
    try:
        for each in names:
            setattr(MATMUL, each, (may_be_cut, may_be_cut))  # torch lets only what is cut be rounded
        asked = [getattr(MATMUL, each) for each in every]
        step(small_model(), tokens, given)
        assert [getattr(MATMUL, each) for each in every] == asked
    finally:
        for each, is_short, is_cut in zip(names, before[:2], before[2:4], strict=True):
            setattr(MATMUL, each, (is_short, is_cut))
    assert seen == [False, False, may_be_cut, may_be_cut, "tf32" if name == "tf32" else "ieee"]
    assert [getattr(MATMUL, each) for each in every] == before


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="torch 2.9")
@pytest.mark.parametrize("place", ["measured sums", "watched tokens", "edited tokens", "latents"])
def test_what_is_measured_and_encoded_on_a_gpu_is_float32(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch was told to take TF32, by a setting or by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE."""
    seen: list[str] = []
    before = MATMUL.fp32_precision
    for module in (measured_latents, edits, encoding):  # as if this were a GPU
        monkeypatch.setattr(module, "float32_products", lambda name, _: precision.float32_products(name, "cuda"))
    model = small_model()

    def spied(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def seen_first(*given: Any, **more: Any) -> torch.Tensor:
            seen.append(MATMUL.fp32_precision)
            return real(*given, **more)

        return seen_first

    for name in ("pre_activations", "decode"):
        monkeypatch.setattr(SparseAutoencoder, name, spied(getattr(SparseAutoencoder, name)))
    tokens = draws(10, 24)
    try:
        MATMUL.fp32_precision = "tf32"
        with torch.no_grad():
            if place == "measured sums":
                measured_sums.MeasuredSums(model, loss="normed", step=5, window_begins=0).add(tokens[None])
            elif place == "watched tokens":
                watch = budget.Watch.__new__(budget.Watch)
                vars(watch).update(_n=10, _config=TrainConfig(), _device="cpu", _ranks=ALONE, _tokens_ND=tokens.half())
                watch.check(model, 1, 1.0)
            elif place == "edited tokens":
                edits.encoded(model, tokens)
            else:
                with encoding._Encoder(model, Rounding(23), "fp32", "cpu", most_rows=10) as encoder:
                    encoder.begin(tokens.half(), np.ones(1, bool), 10)().rows()
        assert MATMUL.fp32_precision == "tf32"
    finally:  # monkeypatch cannot: the setting is no attribute
        MATMUL.fp32_precision = before
    assert seen
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("short", SHORT)
def test_the_bias_is_added_in_float32(activation: str, short: torch.dtype) -> None:
    """p is off by its own rounding only; with jumprelu p is float32, and off by nothing but the order of a sum."""
    model = small_model(activation)
    with torch.no_grad():
        model.b_enc.add_(100.0)  # rounded to bfloat16 it would be off by up to 0.25, far from p's bits
        x_BD = draws(50, 24, seed=3)
        model.b_dec.zero_()
        model.W_enc.mul_(100)
    dtypes = dtypes_of({BF16: "bf16", F16: "fp16"}[short], activation, F32, "cuda")
    encoder = EncoderProduct(model, dtypes)
    operand = encoder.operand(x_BD)
    found = encoder.pre_activations(operand, torch.empty(50, 96, dtype=dtypes.p))
    wanted = x_BD.to(short).double() @ model.W_enc.detach().to(short).double() + model.b_enc.detach().double()
    size = float(wanted.abs().max())
    own = torch.finfo(found.dtype).eps / 2 * wanted.abs()
    assert ((found.double() - wanted).abs() <= own + 1e-6 * size).all()
    rounded_bias = (model.b_enc.detach().to(short).float() - model.b_enc.detach()).abs().max()
    assert rounded_bias > 1e-5 * size, "this test would not see a bias that was rounded first"
    some = torch.tensor([4, 7, 90])
    assert (encoder.of_latents(operand, some).double() - wanted[:, some]).abs().max() <= 1e-6 * size
    assert encoder.centred(x_BD, operand).shape == x_BD.shape


@pytest.mark.usefixtures("types_of_a_gpu")
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_thresholds_of_jumprelu_learn_with_short_operands(name: str) -> None:
    """The window of 1e-3 is a quarter of bfloat16's step at 0.5 to 1: with p in bfloat16 most latents never meet it."""
    model = small_model("jumprelu", n_latents=512)
    with torch.no_grad():
        model.log_threshold.copy_((0.5 + 0.5 * torch.rand(512, generator=torch.Generator().manual_seed(4))).log())
    x_ND = draws(20_000, 24, seed=3) + model.b_dec.detach()

    def learned(precision_name: str) -> torch.Tensor:
        given = Objective(precision=precision_name)
        loss_and_gradients(model, x_ND, given, l1=1.0, micro_batch=5_000, sparse_below=0)
        assert model.log_threshold.grad is not None
        return model.log_threshold.grad != 0

    wanted, found = learned("fp32"), learned(name)
    assert wanted.float().mean() > 0.9
    assert found.float().mean() >= 0.98 * wanted.float().mean()
    threshold = model.log_threshold.detach().exp()
    p_rounded = model.pre_activations(x_ND).detach().bfloat16().float()
    met = ((p_rounded - threshold).abs() < 0.5e-3).any(0)
    assert met.float().mean() < 0.6, "this test would not see that p was rounded"


@pytest.mark.usefixtures("types_of_a_gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounding_is_ordered_as_the_bits_are(activation: str) -> None:
    """The loss: off by at most 1% with bf16, half of that with fp16, and by nothing with tf32, which a CPU ignores."""
    model = small_model(activation)
    x_ND = draws(400, 24, seed=3) + model.b_dec.detach()
    dead = torch.arange(96) % 4 == 0

    def loss(name: str) -> float:
        given = Objective(precision=name, jump_bandwidth=0.1)
        return loss_and_gradients(model, x_ND, given, l1=1e-2, dead_L=dead, micro_batch=150, sparse_below=0).mse

    exact = loss("fp32")
    assert loss("tf32") == exact
    assert 0 < abs(loss("bf16") - exact) <= 0.01 * exact
    assert abs(loss("fp16") - exact) <= 0.005 * exact


def test_types_by_precision_activation_and_device() -> None:
    assert dtypes_of("fp32", "relu", torch.float64, "cpu") == Dtypes(torch.float64, torch.float64, torch.float64)
    assert dtypes_of("tf32", "jumprelu", F32, "cuda") == Dtypes(F32, F32, F32)
    assert dtypes_of("bf16", "relu", F32, "cuda") == Dtypes(BF16, BF16, BF16)
    assert dtypes_of("fp16", "topk", F32, "cuda") == Dtypes(F16, F16, BF16)
    assert dtypes_of("bf16", "topk", F32, "cpu") == Dtypes(BF16, BF16, F32)
    for activation in ("jumprelu", "batchtopk", "gated"):
        assert dtypes_of("fp16", activation, F32, "cuda") == Dtypes(F16, F32, BF16)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_products_on_a_gpu_have_these_types(name: str, activation: str) -> None:
    """With torch's fake tensors of a GPU: types and shapes, and no operation between two devices."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = SparseAutoencoder(24, 96, activation)
        dtypes = Objective(precision=name).dtypes(model)
        encoder = EncoderProduct(model, dtypes)
        x_BD = torch.empty(50, 24, device="cuda")
        operand = encoder.operand(x_BD)
        if operand.dtype == F32:
            return  # torch has no fake of `addmm` into given memory
        found = encoder.pre_activations(operand, torch.empty(50, 96, dtype=dtypes.p, device="cuda"))
        assert (found.dtype, found.device.type, operand.dtype) == (dtypes.p, "cuda", dtypes.encoder)
        assert encoder.of_latents(operand, torch.empty(7, dtype=torch.int64, device="cuda")).dtype == F32
        out = torch.empty(24, 96, device="cuda")
        centred = encoder.centred(x_BD, operand).to(dtypes.others)
        add_product(out, centred.T, torch.empty(50, 96, dtype=dtypes.others, device="cuda"))


def test_bfloat16_entries_are_found_by_their_bits() -> None:
    """As the same numbers in float32 are found: both zeros, infinities, and NaN of either sign, which is active."""
    values = draws(37, 70).bfloat16()
    values[3, :6] = torch.tensor([0.0, -0.0, np.inf, -np.inf, 1e-40, -1e-40]).bfloat16()
    bits = values.view(torch.uint16).numpy()
    bits[3, 6:8] = 0x7FC0, 0xFFC0
    assert values[3, 6:8].isnan().all()
    floats = values.float().numpy()
    (n_found, found), (n_twin, twin) = kernels_cpu.find_active(bits), kernels_cpu.find_active(floats)
    assert n_found == n_twin
    assert found is not None
    assert twin is not None
    assert np.array_equal(found.starts, twin.starts)
    assert np.array_equal(found.tokens, twin.tokens)
    assert np.array_equal(found.values, twin.values, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_on_a_cpu_rounds_the_encoder_s_operands_only(activation: str) -> None:
    """Sparse and dense work agree, and both are near float32."""
    model = small_model(activation)
    x_ND = draws(400, 24, seed=3) + model.b_dec.detach()

    def gradients(name: str, sparse_below: float) -> tuple[float, torch.Tensor]:
        given = Objective(precision=name, jump_bandwidth=0.1, dead_latents="none")
        found = loss_and_gradients(model, x_ND, given, l1=1e-2, micro_batch=150, sparse_below=sparse_below)
        assert model.W_dec.grad is not None
        return found.mse, model.W_dec.grad.clone()

    exact, wanted = gradients("fp32", 2.0)
    (sparse, of_sparse), (dense, of_dense) = gradients("bf16", 2.0), gradients("bf16", 0.0)
    assert sparse == pytest.approx(dense, rel=1e-5)
    assert (of_sparse - of_dense).norm() <= 1e-4 * of_dense.norm()
    assert 0 < abs(sparse - exact) <= 0.01 * exact
    assert 0 < (of_sparse - wanted).norm() <= 0.1 * wanted.norm()


@pytest.mark.parametrize(("bf16_seconds", "word"), [(0.5, "0.5"), (4.0, "4")])
def test_the_plan_says_what_bf16_gains_here(bf16_seconds: float, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.seconds_of_product(BF16, rounds=1) > 0
    monkeypatch.setattr(precision, "seconds_of_product", lambda dtype: 1.0 if dtype == F32 else bf16_seconds)
    first, *more = precision.precision_lines("bf16", "cpu")
    assert f"which here takes {word} times as long as in fp32" in first
    assert any("fp32 is faster here" in line for line in more) == (bf16_seconds > 1)
    assert not [*precision.precision_lines("fp32", "cpu"), *precision.precision_lines("bf16", "cuda")]


def test_a_precision_that_the_device_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tf32", "fp16"):
        with pytest.raises(BadInput, match=f"precision '{name}' is for GPUs; found device 'cpu'. Use precision fp32"):
            check_precision(name, "cpu")
    for name in PRECISIONS:
        check_precision(name, "cuda:1")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not cpu_has_bfloat16()
    check_precision("fp32", "cpu")
    with pytest.raises(BadInput, match="needs a GPU, or a processor with AMX or AVX512-BF16; found device 'cpu'"):
        check_precision("bf16", "cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    check_precision("bf16", "cpu")
