"""The GPU's kernels against the CPU's and a float64 twin: in Triton's interpreter, or on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cytosae.sae.config import ACTIVATIONS

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, below
pytest.importorskip("triton", reason="triton is not installed (it comes with torch's CUDA builds)")

import test_variants  # noqa: E402
from gpu_waits import waits_of_the_host  # noqa: E402
from objectives import L1, NAMES, OBJECTIVES  # noqa: E402
from reference import Array  # noqa: E402
from sae_variants import make_model  # noqa: E402

from cytosae.sae import SparseAutoencoder  # noqa: E402
from cytosae.training import (  # noqa: E402
    Objective,
    batch_top_k,
    dead_latents,
    dead_passes,
    kernels_cpu,
    kernels_gpu,
    latent_matrix,
    losses,
    nested,
    objective,
    precision,
    remove_parallel_gradient,
    residuals,
)

DEVICE = "cuda" if HAS_GPU else "cpu"
EQUAL = 1e-5  # max|difference| / max|reference|, per tensor
PENALTY = 0.1
SIZES = {  # tokens, latents, width: none is a multiple of a block, most need several blocks, chunks and parts
    "odd": (13, 37, 21),
    "one token": (1, 37, 21),
    "one latent": (13, 1, 21),
    "one column": (9, 17, 1),
    "no token": (0, 17, 5),
    "whole blocks": (8, 32, 16),
    "many words": (2, 150, 4),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small matrices have several blocks of words, columns and tokens, and several parts."""
    for name, value in {"_WORDS": 1, "PART": 5, "_COLUMNS": 16, "_TOKENS": 4}.items():
        monkeypatch.setattr(kernels_gpu, name, value)


def pre_activations(n_tokens: int, n_latents: int, *, pattern: str = "mixed") -> Array:
    """(B, L) float32. Mixed: silent latents, silent tokens, one latent active everywhere, others now and then."""
    p = np.random.default_rng(n_tokens).normal(-1, 1, (n_tokens, n_latents)).astype(np.float32)
    if pattern == "mixed":
        p[:, ::7] = -1
        p[::5] = -1
        p[:, n_latents // 2] = 1 + np.abs(p[:, n_latents // 2])
    return {"mixed": p, "none active": -np.abs(p), "all active": np.abs(p) + 1}[pattern]


def taken(p: Array, dtype: torch.dtype = torch.float32) -> kernels_gpu.Active:
    on_device = torch.from_numpy(p).to(DEVICE, dtype)
    return kernels_gpu.take_active(on_device, kernels_gpu.mark_active(on_device))


def worked_out(p: Array, width: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[Array]]:
    """(residuals, three gradients) added to what was there, and the same in float64 from the same operands."""
    rng = np.random.default_rng(1)
    n_tokens, n_latents = p.shape
    shapes = (n_latents, width), (n_tokens, width), (n_tokens, width)
    W_dec, d_x_hat, centred = (torch.from_numpy(rng.normal(size=shape)).to(DEVICE, dtype) for shape in shapes)
    sizes = (shapes[1], shapes[0], n_latents, shapes[0])
    before = [torch.from_numpy(rng.normal(size=size)).float().to(DEVICE) for size in sizes]
    out, grad_W_enc, grad_b_enc, grad_W_dec = found = [tensor.clone() for tensor in before]
    active = taken(p)
    kernels_gpu.add_decoded(active, W_dec, out)
    kernels_gpu.add_gradients(
        active,
        W_dec_LD=W_dec,
        d_x_hat_BD=d_x_hat,
        centred_BD=centred,
        penalty=PENALTY,
        grad_W_enc_LD=grad_W_enc,
        grad_b_enc_L=grad_b_enc,
        grad_W_dec_LD=grad_W_dec,
    )
    rows, d_out, x = (tensor.double().cpu().numpy() for tensor in (W_dec, d_x_hat, centred))
    z = np.maximum(p.astype(np.float64), 0)
    d_z = (d_out @ rows.T + PENALTY) * (p > 0)
    added = z @ rows, d_z.T @ x, d_z.sum(0), z.T @ d_out
    return found, [old.double().cpu().numpy() + new for old, new in zip(before, added, strict=True)]


@pytest.mark.parametrize("pattern", ["mixed", "none active", "all active"])
@pytest.mark.parametrize("size", SIZES)
def test_active_latents_are_those_of_the_cpu(size: str, pattern: str) -> None:
    """To the bit and in the same order; by token they are the rows of the dense matrix."""
    n_tokens, n_latents, _ = SIZES[size]
    p = pre_activations(n_tokens, n_latents, pattern=pattern)
    found, twin = taken(p), kernels_cpu.find_active(p)[1]
    for name in ("starts", "tokens", "values", "fired"):
        assert np.array_equal(getattr(found, name).cpu().numpy(), getattr(twin, name)), name
    tokens, latents = np.nonzero(p > 0)
    assert np.array_equal(found.latents.cpu().numpy(), latents)
    assert np.array_equal(found.token_values.cpu().numpy(), p[tokens, latents])
    assert found.token_starts.tolist() == [0, *(p > 0).sum(1).cumsum()]


@pytest.mark.parametrize(
    ("size", "pattern", "dtype"),
    [
        *(
            (size, pattern, torch.float32)
            for size in SIZES
            if size != "many words"  # a matter of finding the active ones
            for pattern in ("mixed", "none active", "all active")
        ),
        ("odd", "mixed", torch.bfloat16),
    ],
)
def test_reconstruction_and_gradients_equal_the_float64_twin(size: str, pattern: str, dtype: torch.dtype) -> None:
    """Operands in bfloat16 are taken as they are, and summed in float32; the same bits every time."""
    n_tokens, n_latents, width = SIZES[size]
    p = pre_activations(n_tokens, n_latents, pattern=pattern)
    found, wanted = worked_out(p, width, dtype)
    for ours, twin in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), twin, rtol=0, atol=EQUAL * np.abs(twin).max(initial=0))
    assert all(torch.equal(one, two) for one, two in zip(found, worked_out(p, width, dtype)[0], strict=True))


def test_pre_activations_in_bfloat16_and_what_is_not_finite() -> None:
    """Values are kept as they are; NaN counts as active, so that it is not lost."""
    p = pre_activations(37, 70)
    p[3, 4], p[5, 6], p[7, 8] = np.nan, np.inf, -np.inf
    rounded = torch.from_numpy(p).bfloat16().float().numpy()
    found, twin = taken(p, torch.bfloat16), kernels_cpu.find_active(rounded)[1]
    assert twin is not None
    assert np.array_equal(found.tokens.cpu().numpy(), twin.tokens)
    assert np.array_equal(found.values.cpu().numpy(), twin.values, equal_nan=True)
    assert int(found.values.isnan().sum()) == 1


@pytest.mark.parametrize("loss", ["normed", "eq1"])
@pytest.mark.parametrize("size", [(13, 21), (1, 21), (9, 1), (0, 5), (8, 16)])
def test_a_comparison_in_one_pass_is_that_of_the_cpu(size: tuple[int, int], loss: str) -> None:
    """Tokens far from zero, one of them all zero; in bfloat16 only the gradient itself is rounded."""
    rng = np.random.default_rng(2)
    x, x_hat = (torch.from_numpy(rng.normal(3, 1, size).astype(np.float32)) for _ in range(2))
    x[:1] = 0
    on_device = x_hat.to(DEVICE), x.to(DEVICE)
    wanted = residuals.compare_plainly(x_hat, x, losses.loss_weight(x, loss), 0.3, torch.float32)
    weight = losses.loss_weight(on_device[1], loss)
    found = residuals.compare_in_one_pass(*on_device, weight, 0.3, torch.float32)
    for name, twin in vars(wanted).items():
        ours = getattr(found, name).cpu()
        assert (ours.shape, ours.dtype) == (twin.shape, twin.dtype), name
        torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6 * float(twin.abs().max()) if twin.numel() else 0)
    rounded = residuals.compare_in_one_pass(*on_device, weight, 0.3, torch.bfloat16)
    torch.testing.assert_close(rounded.d_x_hat_BD.float(), found.d_x_hat_BD, rtol=2**-7, atol=0)  # here it truncates
    assert torch.equal(rounded.d_sum_D, found.d_sum_D)


@pytest.mark.parametrize("width", [1, 16, 21])
def test_the_fused_step_is_the_plain_step(width: int) -> None:
    """Four steps of each kind in turn, a decoder row of zeros, the last without norms: weights and Adam's state."""
    plain, fused = (SparseAutoencoder(width, 9) for _ in range(2))
    for model in (plain, fused):
        model.init_weights(torch.Generator().manual_seed(0))
        model.W_dec.data[4] = 0
        model.to(DEVICE)
    by_plain, by_fused = (torch.optim.Adam(model.parameters(), lr=1e-2, fused=True) for model in (plain, fused))
    draws = torch.Generator().manual_seed(1)
    for number in range(4):
        for ours, twin in zip(fused.parameters(), plain.parameters(), strict=True):
            twin.grad = torch.randn(twin.shape, generator=draws).to(DEVICE)
            if ours is fused.W_dec:
                twin.grad[4] *= number > 1  # no gradient: the row stays zero
            ours.grad = twin.grad.clone()
        if number == 2:  # the plain step goes on from the fused one's state, and the other way round
            plain, fused, by_plain, by_fused = fused, plain, by_fused, by_plain
        remove_parallel_gradient(plain)
        by_plain.step()
        if number < 3:
            plain.normalise_decoder()
        kernels_gpu.step(fused, by_fused, normalise=number < 3)
    for ours, twin in zip(fused.parameters(), plain.parameters(), strict=True):
        one, two = by_fused.state[ours], by_plain.state[twin]
        assert one.keys() == two.keys()
        assert one["step"] == two["step"] == 4
        assert (one["step"].dtype, one["step"].device) == (two["step"].dtype, two["step"].device)
        pairs = (ours.detach(), twin.detach()), *((one[name], two[name]) for name in ("exp_avg", "exp_avg_sq"))
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=0, atol=EQUAL * float(wanted.abs().max()))
    assert fused.W_dec.norm(dim=1).sub(1).abs().max() > 1e-6


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cytosae.training import kernels_gpu as g

def compiled(kernel, types, **constants):
    signature = dict(zip(kernel.arg_names, types.split() + ["constexpr"] * len(constants), strict=True))
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))

def no_spills(kernel):
    assert ".local" not in kernel.asm["ptx"]  # registers hold all of it

for half in ("*bf16", "*fp16", "*fp32"):
    compiled(g._mark, f"{half} *i32 *i32 fp32 i32 i32", WORDS=g._WORDS)
    compiled(g._take, f"{half} *i32 *i64 *i32 *fp32 i32 i32", WORDS=4 * g._WORDS)
    compiled(
        g._compare, f"*fp32 *fp32 *fp32 fp32 {half} *fp32 *fp64 *fp64 i32 i32",
        TOKENS=g._TOKENS, BLOCK=1024,
    )
    compiled(g._add_decoded, f"*i64 *i32 *fp32 {half} *fp32 i32", ROWS=g._ROWS, COLUMNS=g._COLUMNS)
    others = "*fp32" if half == "*fp32" else "*bf16"
    compiled(
        g._add_gradients,
        f"*i64 *i32 *fp32 *i64 *i64 *i64 {others} {others} {half} fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32",
        PART=g.PART, PAIRS=g._PAIRS, BLOCK=1024,
    )
    dead = {"TOKENS": g._DEAD_TOKENS, "ROWS": g._DEAD_ROWS, "BLOCK": g._DEAD}
    no_spills(compiled(g._exp_of, f"{half} *i32 {others} i32 i32 i32 i32", **dead))
    for is_exp in (True, False):
        no_spills(compiled(g._times_slope, f"{others} {others} *fp32 i32 i32", IS_EXP=is_exp, **dead))
compiled(g._add_parts, "*i64 *fp32 *fp32 *fp32 *fp32 i32", BLOCK=1024)
compiled(
    g._update, "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32",
    BETA1=0.9, BETA2=0.999, EPS=1e-8, NORMALISE=True, BLOCK=1024,
)
print("compiled")
"""


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    """Without a GPU: the interpreter runs what the compiler may refuse."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """losses.py does what it would do on a GPU, where few latents are active."""

    def latents_of(values_BL: torch.Tensor, sparse_below: float | None = None) -> latent_matrix.Latents:
        return latent_matrix.CscLatentsGpu(kernels_gpu.take_active(values_BL, kernels_gpu.mark_active(values_BL)))

    def piece_above(p_BL: torch.Tensor, bound: float) -> batch_top_k._GpuPiece:
        found = kernels_gpu.take_by_token(p_BL, kernels_gpu.mark_active(p_BL, bound))
        return batch_top_k._GpuPiece(found, p_BL.shape[1])

    for module in (losses, latent_matrix):
        monkeypatch.setattr(module, "latents_of", latents_of)
    for module in (losses, nested):
        monkeypatch.setattr(module, "compare_reconstruction", residuals.compare_in_one_pass)
    monkeypatch.setattr(batch_top_k, "_piece_above", piece_above)
    monkeypatch.setattr(batch_top_k, "_largest", lambda values, n: values.topk(min(n, len(values))).values)
    monkeypatch.setattr(latent_matrix, "SPARSE_BELOW_ON_GPU", 2.0)
    monkeypatch.setattr(dead_latents, "exp_of", dead_passes.exp_in_one_pass)
    monkeypatch.setattr(dead_latents, "times_slope_", dead_passes.times_in_one_pass_)
    of_gpu = precision.dtypes_of
    monkeypatch.setattr(
        objective, "dtypes_of", lambda name, activation, weights, _: of_gpu(name, activation, weights, "cuda")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(300, 1_100, 703), (1, 5, 1), (257, 513, 513), (0, 9, 4)])
def test_the_passes_for_dead_latents_at_real_block_sizes(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Several blocks of tokens and columns, the last ones not full: equal to PyTorch's operations, sums to 1e-6."""
    n_tokens, n_latents, n_dead = size
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.normal(-1, 2, (n_tokens, n_latents))).to(DEVICE, dtype)
    columns = torch.from_numpy(np.sort(rng.permutation(n_latents)[:n_dead])).to(DEVICE)
    n_columns = -(-n_dead // 16) * 16
    short = torch.float32 if dtype == torch.float32 else torch.bfloat16
    rtol = 1e-6 if short == torch.float32 else 2**-7  # the interpreter cuts, it does not round
    for given in (columns, None):
        n_out = n_columns if given is not None else n_latents
        wanted = dead_passes.exp_plainly(p.clone(), given, torch.float32, n_out)
        found = dead_passes.exp_in_one_pass(p, given, short, n_out)
        assert found.dtype == short
        torch.testing.assert_close(found.float(), wanted, rtol=rtol, atol=0)
    z = dead_passes.exp_in_one_pass(p, columns, short, n_columns)
    for slope, of_z in (("exp", z), ("relu", z - 0.5)):
        d_z = torch.from_numpy(rng.normal(size=(n_tokens, n_columns))).to(DEVICE, short)
        exact = d_z.double() * (of_z.double() if slope == "exp" else of_z > 0)
        given_memory = d_z.data_ptr()
        d_p, sums = dead_passes.times_in_one_pass_(d_z, of_z, slope)
        assert d_p.data_ptr() == given_memory
        torch.testing.assert_close(d_p.double(), exact, rtol=rtol, atol=0)
        torch.testing.assert_close(
            sums.double(), exact.sum(0), rtol=0, atol=1e-6 * float(exact.abs().sum(0).max()) if n_tokens else 0
        )


def test_active_latents_above_a_bound_and_parts_of_them() -> None:
    """What batchtopk keeps of them, in two steps, and for ranges of latents."""
    p = pre_activations(37, 70)
    p[3, 4] = np.nan
    on_device = torch.from_numpy(p).to(DEVICE)
    found = kernels_gpu.take_by_token(on_device, kernels_gpu.mark_active(on_device, 0.25))
    for least, low, high in ((0.25, 0, 70), (0.9, 3, 41), (50.0, 0, 5)):
        left = found.kept(~(found.values < least)).part(low, high)
        wanted = ~(p[:, low:high] <= max(0.25, np.nextafter(np.float32(least), np.float32(0))))
        tokens, latents = np.nonzero(wanted)
        assert np.array_equal(left.latents.cpu().numpy(), latents)
        assert np.array_equal(left.values.cpu().numpy(), p[:, low:high][tokens, latents], equal_nan=True)
        assert np.array_equal(left.counts.cpu().numpy(), wanted.sum(1))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("precision_name", ["bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_short_operands_stay_near_the_equations(activation: str, precision_name: str) -> None:
    """The GPU's types through the GPU's kernels. fp16's pre-activations are eight times finer; gradients are bf16."""
    model = make_model(activation, 3).to(DEVICE)
    tokens, dead = test_variants.make_tokens(model, 8).to(DEVICE), torch.arange(40, device=DEVICE) % 3 == 0

    def gradients(name: str) -> tuple[float, dict[str, torch.Tensor]]:
        found = losses.loss_and_gradients(
            model,
            tokens,
            Objective(loss="normed", jump_bandwidth=0.5, precision=name),
            l1=L1,
            dead_L=dead,
            micro_batch=5,
        )
        return found.loss, {
            key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None
        }

    loss, wanted = gradients("fp32")
    short_loss, found = gradients(precision_name)
    assert short_loss == pytest.approx(loss, rel=0.02)
    assert short_loss != loss
    for name, ours in found.items():
        assert (ours - wanted[name]).norm() <= 0.2 * wanted[name].norm(), name


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_whole_loss_through_these_kernels_equals_the_equations(activation: str) -> None:
    """Gated and jumprelu have work that the others do not."""
    model = make_model(activation, 3).to(DEVICE)
    tokens, dead = test_variants.make_tokens(model, 8).to(DEVICE), torch.arange(40, device=DEVICE) % 3 == 0
    found = test_variants.ours(model, tokens, loss="normed", way="ghost", dead=dead, micro_batch=5)
    wanted = test_variants.twin(model, tokens, loss="normed", way="ghost", dead=dead)
    test_variants.assert_same(model, tokens, found, wanted, EQUAL)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers read, and results whose size hangs on values.

    `tolist`, a copy, passes here unseen.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        is_mask = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for arg in args
            for one in (arg if isinstance(arg, list) else [])
        )
        if name.startswith(self.NAMES) or is_mask or (name == "repeat_interleave" and "output_size" not in kwargs):
            self.seen.append(name)
        return func(*args, **kwargs)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("with_dead", [False, True])
def test_the_host_waits_once_per_micro_batch(with_dead: bool) -> None:
    """For the number of active latents; once more for which latents are dead, and in `tolist` for all numbers."""
    model = make_model("relu", 3).to(DEVICE)
    tokens, dead = test_variants.make_tokens(model, 8).to(DEVICE), torch.arange(40, device=DEVICE) % 3 == 0
    for n_micro_batches, size in ((1, len(tokens)), (3, -(-len(tokens) // 3))):
        with Waits() as waits:
            test_variants.ours(
                model, tokens, loss="normed", way="ghost", dead=dead if with_dead else None, micro_batch=size
            )
        assert waits.seen == ["nonzero"] * with_dead + ["_local_scalar_dense"] * n_micro_batches


# -- on a real device, at real size ---------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["default", "paper"])  # the element-wise ghost multiplies rounding by thousands
def test_sparse_and_dense_work_agree_on_the_gpu(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """768 -> 49,152, a real batch, L0 of some 200, popular latents, dead ones: in float32, and twice the same bits."""
    monkeypatch.undo()  # blocks of real size
    model = SparseAutoencoder(768, 49_152)
    model.init_weights(torch.Generator().manual_seed(0))
    rank = torch.arange(1, 49_153, dtype=torch.float64)
    share = (25 / rank).clamp(1e-4, 0.9)  # adds up to some 200, the first latents active on most tokens
    with torch.no_grad():
        model.b_enc.copy_(model.W_enc.norm(dim=0) * torch.special.ndtri(share).float())
    model.to(DEVICE)
    tokens = torch.randn(4_112, 768, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    dead = torch.arange(49_152, device=DEVICE) % 50 == 49
    spied: list[int] = []
    take = kernels_gpu.take_active

    def spy(*given: Any) -> Any:
        spied.append(1)
        return take(*given)

    monkeypatch.setattr(kernels_gpu, "take_active", spy)

    def gradients(sparse_below: float) -> tuple[losses.BatchLosses, list[torch.Tensor]]:
        found = losses.loss_and_gradients(
            model, tokens, Objective(**OBJECTIVES[objective]), l1=L1, dead_L=dead, sparse_below=sparse_below
        )
        return found, [getattr(model, name).grad.clone() for name in NAMES]

    dense, wanted = gradients(0)
    assert not spied
    sparse, found = gradients(2)
    assert spied
    assert sparse.loss == pytest.approx(dense.loss, rel=EQUAL)
    assert sparse.l0 == pytest.approx(dense.l0, rel=1e-6)
    for ours, twin in zip(found, wanted, strict=True):
        assert (ours - twin).abs().max() <= EQUAL * twin.abs().max()
    again = gradients(2)[1]
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_a_step_on_the_gpu_waits_no_more_often_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own warnings about waiting: two micro-batches, all numbers, and the optimiser none."""
    monkeypatch.undo()
    model = SparseAutoencoder(64, 4_096)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.b_enc.fill_(-0.3)  # few are active, so that work is sparse
    model.to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randn(512, 64, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)

    def step() -> None:
        losses.loss_and_gradients(model, tokens, Objective(precision="bf16"), l1=L1, micro_batch=256)
        kernels_gpu.step(model, optimizer, normalise=True)

    step()
    with waits_of_the_host() as said:
        step()
    assert len(said) == 3, said
