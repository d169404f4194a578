"""How exactly a step multiplies: what each `precision` means on which device, and products with sums in float32.

    precision  encoder's operands  p, the pre-activations      operands of the other products
    fp32       float32             float32                     float32
    tf32       float32             float32                     float32; the GPU rounds operands to TF32 (10 bits)
    bf16       bfloat16            bfloat16                    bfloat16 (CPU: float32)
    fp16       float16             float16                     bfloat16

Every sum is float32, and so is the encoder's bias until it has been added (encoder_product.py). p is float32 with
every precision where more than its sign is compared: jumprelu looks into a window that may be finer than the spacing
of bfloat16, batchtopk into the whole batch for a threshold, and gated goes on computing with p.
float16 holds eight times finer steps than bfloat16, but nothing below 6e-8: gradients, which are divided by the number
of values of a batch, would become 0. So they are bfloat16.
What each costs in fidelity: docs/training.md, "Precision".
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from stores.errors import BadInput

_COMPARED_FINELY = ("jumprelu", "batchtopk", "gated")  # activations that read more of p than its sign
# torch's names for: partial sums may be rounded to these types
_SHORT_SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
_ON_GPU = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.bfloat16),
}


@dataclass(frozen=True)
class Dtypes:
    """Types of what a step multiplies."""

    encoder: torch.dtype  # operands of the encoder's product
    p: torch.dtype  # pre-activations
    others: torch.dtype  # operands of the other products


def dtypes_of(precision: str, activation: str, weights: torch.dtype, device: str) -> Dtypes:
    """The types for one of `PRECISIONS`, an activation, the type of the weights, and a kind of device."""
    if precision not in _ON_GPU:
        return Dtypes(weights, weights, weights)
    encoder, others = _ON_GPU[precision]
    return Dtypes(
        encoder,
        torch.float32 if activation in _COMPARED_FINELY else encoder,
        others if device == "cuda" else weights,
    )


def check_precision(precision: str, device: str) -> None:
    """Raise BadInput for a precision that this device does not have in hardware."""
    if precision == "fp32" or device.startswith("cuda"):
        return
    if precision != "bf16":
        raise BadInput(f"precision {precision!r} is for GPUs; found device {device!r}. Use precision fp32")
    if device != "cpu" or not cpu_has_bfloat16():
        raise BadInput(
            f"precision 'bf16' needs a GPU, or a processor with AMX or AVX512-BF16; found device {device!r} without "
            "them. Use precision fp32"
        )


def cpu_has_bfloat16() -> bool:
    """Does this processor multiply bfloat16 in hardware (AMX or AVX512-BF16)?"""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


def precision_lines(precision: str, device: str) -> Iterator[str]:
    """For the plan of a run: what bf16 gains on this processor, timed now, in less than a second."""
    if precision != "bf16" or device != "cpu":
        return
    ratio = seconds_of_product(torch.bfloat16) / seconds_of_product(torch.float32)
    yield f"precision: bf16 in the encoder's product, which here takes {ratio:.2g} times as long as in fp32"
    if ratio > 1:
        yield "precision: fp32 is faster here, and exact; the same command without --precision takes it"


def seconds_of_product(dtype: torch.dtype, *, rounds: int = 3) -> float:
    """The shortest time of a product as large as a small step's encoder, with operands of this type."""
    tokens, rows = torch.ones(512, 768, dtype=dtype), torch.ones(4_096, 768, dtype=dtype)
    found = []
    for _ in range(rounds + 1):  # the first one prepares
        began = time.perf_counter()
        torch.mm(tokens, rows.T)
        found.append(time.perf_counter() - began)
    return min(found[1:])


@contextmanager
def float32_products(precision: str, device: str) -> Iterator[None]:
    """On a GPU, products of float32 matrices are what `precision` says (TF32 or float32), whatever torch was told.

    Products of shorter numbers are summed in float32 (`float32_sums`).
    """
    if device != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    is_new = hasattr(matmul, "fp32_precision")  # torch 2.9, which warns of the old name
    name, wanted = (
        ("fp32_precision", "tf32" if precision == "tf32" else "ieee") if is_new else ("allow_tf32", precision == "tf32")
    )
    before = getattr(matmul, name)
    setattr(matmul, name, wanted)
    try:
        with float32_sums(device):
            yield
    finally:
        setattr(matmul, name, before)


@contextmanager
def float32_sums(device: str) -> Iterator[None]:
    """On a GPU, sums of bfloat16 and float16 products stay float32 until they are whole.

    Torch's default lets cuBLAS cut a long sum into pieces and round each to the type of the result before it adds them.
    """
    if device != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in _SHORT_SUMS}
    pieces = {name: getattr(matmul, f"{name}_split_k", None) for name in _SHORT_SUMS}  # may sums be cut? (torch 2.10)

    def let(name: str, is_short: bool) -> None:
        setattr(matmul, name, is_short if pieces[name] is None else (is_short, pieces[name]))

    for name in _SHORT_SUMS:
        let(name, False)
    try:
        yield
    finally:
        for name in _SHORT_SUMS:
            let(name, before[name])


def product(
    left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """left @ right, summed in `out_dtype`, or in float32 where that is shorter; the operands have one type.

    out : of type `out_dtype`, is written and returned
    """
    if left.dtype == out_dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8
        found: torch.Tensor = torch.mm(left, right, out_dtype=out_dtype, out=out)
        return found
    return torch.mm(left.to(out_dtype), right.to(out_dtype), out=out)  # products of short numbers are exact in float32


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out += left @ right, summed in the type of `out`; the operands as in `product`."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out += product(left, right, out.dtype)
