"""The SAE training step on a GPU: sparse gradients in bf16 against dense bf16 with torch.compile.

Ours: the step of `sae_step.py` with products in bfloat16 and float32 master weights. Against: the same loss, dense,
under bf16 autocast in one compiled function, float32 master weights, at the fastest of several micro-batches and
compile modes; everything around the gradients is the same. Target: 2 times, and 1 M tokens/s on an H100. Gradients of
both are compared with dense float32 ones, ||difference|| / ||reference||.

Without CUDA it prints one line that says so; `--device cpu` with small sizes tries the program out.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import alternate, arguments, emit, emit_skipped, say
from sae_step import L1, Case, add_sizes, dense, make_case, numbers, ours, step

from cytosae.losses import loss_and_gradients

TARGET, TARGET_RATE = 2, 1e6

Loss = Callable[..., torch.Tensor]


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=10)
    add_sizes(parser, tokens=16_448)
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--micro-batches", type=numbers, default="4112,16448", help="dense (%(default)s)")
    parser.add_argument("--modes", default="default,max-autotune-no-cudagraphs", help="torch.compile (%(default)s)")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        reason = "no CUDA device in this machine"
        emit_skipped("sae_step_gpu", reason=reason, target=TARGET, params=vars(options))
        return

    on_gpu = options.device.startswith("cuda")
    sync = torch.cuda.synchronize if on_gpu else lambda: None
    case = make_case(options, options.l0, 0.0, device=options.device)
    case.model.normalise_decoder()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.0, fused=True)

    speeds: dict[str, float] = {}
    candidates: dict[str, Callable[[], None]] = {}
    for mode in options.modes.split(","):
        loss = torch.compile(dense_loss, mode=mode, dynamic=False, fullgraph=True)
        for size in sorted({min(size, options.tokens) for size in options.micro_batches}):
            name = f"{mode}, {size}"
            candidates[name] = partial(compiled, case, loss, size)
            try:
                timing, *_ = alternate(candidates[name], rounds=3, sync=sync)  # its warm-up compiles
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                say(f"dense, {name}: out of memory")
                continue
            speeds[name] = options.tokens / timing.seconds
            say(f"dense, {name}: {speeds[name]:,.0f} tokens/s")
    best = max(speeds, key=lambda name: speeds[name])

    # every gradient against dense float32: bf16 rounds both, so neither is the reference
    dense(case, min(2_056, options.tokens))
    reference = _gradients(case)
    losses, how = ours_bf16(case)
    difference = _differences(_gradients(case), reference)
    candidates[best]()
    dense_difference = _differences(_gradients(case), reference)
    del reference

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    fast, slow = alternate(
        lambda: step(case.model, optimizer, lambda: ours_bf16(case)),
        lambda: step(case.model, optimizer, candidates[best]),
        rounds=options.rounds,
        sync=sync,
    )
    sides = fast.to_json(options.tokens, "tokens"), slow.to_json(options.tokens, "tokens")
    emit(
        "sae_step_gpu",
        ratio=slow.seconds / fast.seconds,
        target=TARGET,
        target_rate=TARGET_RATE,
        ours=sides[0] | {"bf16_by": how},
        baseline=sides[1] | {"what": "dense bf16 autocast with torch.compile", "mode_and_micro_batch": best},
        l0=losses.l0,
        gradient_differences=difference,
        dense_gradient_differences=dense_difference,
        dense_tokens_per_second=speeds,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        params={**vars(options), "l1": L1},
        device=options.device,
    )


def ours_bf16(case: Case) -> tuple[Any, str]:
    """The product's gradients in bf16: by its own switch where it has one, else under autocast."""
    if "precision" in inspect.signature(loss_and_gradients).parameters:
        return ours(case, precision="bf16"), "the product's precision argument"
    with torch.autocast(case.tokens.device.type, torch.bfloat16):
        return ours(case), "autocast around it"


def dense_loss(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    n_tokens: int,
) -> torch.Tensor:
    """The loss of one micro-batch as a share of the batch's; products in bf16, error and sums in float32."""
    x = x.float()
    with torch.autocast(x.device.type, torch.bfloat16):
        z = torch.relu(torch.addmm(b_enc, x - b_dec, W_enc))
        x_hat = torch.addmm(b_dec, z, W_dec)
    error = ((x_hat.float() - x) ** 2 / x.norm(dim=1, keepdim=True)).sum() / (n_tokens * x.shape[1])
    return error + L1 * z.sum(dtype=torch.float32) / n_tokens


def compiled(case: Case, loss: Loss, micro_batch: int) -> None:
    """Dense gradients of the whole batch."""
    model = case.model
    for parameter in model.parameters():
        parameter.grad = None
    for x in case.tokens.split(micro_batch):
        loss(x, model.W_enc, model.b_enc, model.W_dec, model.b_dec, len(case.tokens)).backward()


def _gradients(case: Case) -> dict[str, torch.Tensor]:
    """The gradients as they are, taken away from the parameters so that nobody writes into them."""
    grads = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    for parameter in case.model.parameters():
        parameter.grad = None
    return grads


def _differences(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """In bf16 a pre-activation near zero changes sides now and then, so norms say more than the largest entry."""
    return {name: float((found[name].float() - reference[name]).norm() / reference[name].norm()) for name in reference}


if __name__ == "__main__":
    main()
