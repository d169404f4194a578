"""The SAE training step on a GPU: sparse gradients in bf16 against dense bf16 with torch.compile.

Ours: the encoder's product in bfloat16, everything after it on active latents only (`cytosae/training/kernels_gpu.py`),
float32 master weights, at the fastest of several micro-batches. Baseline: the same loss, dense, under bf16 autocast in
one compiled function, float32 master weights, at the fastest of several micro-batches and compile modes; decoder norms
and the projection of the gradient compiled, Adam fused. Target: 2 times, and 1 M tokens/s on an H100. Gradients of both
are compared with dense float32 ones, ||difference|| / ||reference||; "float32" are those of our sparse work in float32.

`parts`: milliseconds of each part of one micro-batch. Three optimisations are timed against the plain way: one kernel
for the comparison, the fused optimizer step, batches sent ahead. `waits`: how often the host waits for the device in a
step, as torch counts it.

`--run` also times a whole run from initialisation, with loader, ghost gradients and start-up, on a cache of tokens that
are sums of a few atoms. Without CUDA it prints one line that says so; `--device cpu` with small sizes rehearses it.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from typing import Any

import torch
from common import (
    add_folder,
    alternate,
    arguments,
    chunk_sizes,
    emit,
    emit_skipped,
    now,
    say,
    scratch,
    write_cache,
)
from sae_run import tokens_of_few_atoms
from sae_step import L1, Case, add_sizes, dense, make_case, numbers, ours

from cytosae import train
from cytosae.sae import TrainConfig
from cytosae.training import compare_in_one_pass, compare_plainly, loss_weight, on_device

TARGET, TARGET_RATE = 2, 1e6
RUN_TOKENS = 257_000_000  # the paper's
FED = 8  # steps per measurement with batches from the host's memory

Loss = Callable[..., torch.Tensor]


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=10)
    add_sizes(parser, tokens=16_448)
    add_folder(parser)
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--micro-batches", type=numbers, default="4112,16448", help="dense (%(default)s)")
    parser.add_argument("--modes", default="default,max-autotune-no-cudagraphs", help="torch.compile (%(default)s)")
    parser.add_argument("--fold-b-dec", action="store_true", help="spare dense autograd its sixth matrix product")
    parser.add_argument("--our-micro-batches", type=numbers, default="4112,8224,16448", help="sparse (%(default)s)")
    parser.add_argument("--run", action="store_true", help="also a whole training run, loader included")
    parser.add_argument("--run-tokens", type=int, default=32_896_000, help="of that run (%(default)s)")
    parser.add_argument(
        "--run-images", type=int, default=8_192, help="in its cache, read again and again (%(default)s)"
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        reason = "no CUDA device in this machine"
        emit_skipped("sae_step_gpu", reason=reason, target=TARGET, params=_params(options))
        return

    on_gpu = options.device.startswith("cuda")
    sync = torch.cuda.synchronize if on_gpu else lambda: None
    case = make_case(options, options.l0, 0.0, device=options.device)
    case.model.normalise_decoder()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.0, fused=True)

    candidates: dict[str, Callable[[], Any]] = {}
    for mode in options.modes.split(","):
        loss = torch.compile(dense_loss, mode=mode, dynamic=False, fullgraph=True)
        for size in _sizes(options.micro_batches, options.tokens):
            candidates[f"{mode}, {size}"] = partial(compiled, case, loss, size, options.fold_b_dec)
    dense_speeds = tune(candidates, options.tokens, sync)
    best = max(dense_speeds, key=lambda name: dense_speeds[name])
    ours_by_size = {
        f"{size}": partial(ours, case, micro_batch=size, precision="bf16")
        for size in _sizes(options.our_micro_batches, options.tokens)
    }
    our_speeds = tune(ours_by_size, options.tokens, sync)
    our_best = max(our_speeds, key=lambda name: our_speeds[name])

    # every gradient against dense float32: bf16 rounds both, so neither is the reference
    torch.backends.cuda.matmul.allow_tf32 = False
    dense(case, min(2_056, options.tokens))
    reference = _gradients(case)
    ours(case, sparse_below=1.0)
    float32_difference = _differences(_gradients(case), reference)
    losses = ours_by_size[our_best]()
    difference = _differences(_gradients(case), reference)
    candidates[best]()
    dense_difference = _differences(_gradients(case), reference)
    del reference

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    around = torch.compile(project), torch.compile(normalise)
    our_step = fused_step if on_gpu else partial(plain_step, project=project, normalise=normalise)
    fast, slow = alternate(
        lambda: our_step(case, optimizer, ours_by_size[our_best]),
        lambda: plain_step(case, optimizer, candidates[best], *around),
        rounds=options.rounds,
        sync=sync,
    )
    our_size = int(our_best)
    step_of = partial(our_case_step, optimizer=optimizer, micro_batch=our_size)
    sides = fast.to_json(options.tokens, "tokens"), slow.to_json(options.tokens, "tokens")
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    emit(
        "sae_step_gpu",
        ratio=slow.seconds / fast.seconds,
        target=TARGET,
        target_rate=TARGET_RATE,
        ours=sides[0] | {"precision": "bf16", "micro_batch": our_best},
        baseline=sides[1] | {"what": "dense bf16 autocast with torch.compile", "mode_and_micro_batch": best},
        l0=losses.l0,
        gradient_differences=difference,
        float32_gradient_differences=float32_difference,
        dense_gradient_differences=dense_difference,
        tokens_per_second_by_micro_batch=our_speeds,
        dense_tokens_per_second=dense_speeds,
        peak_gib=peak,
        parts=parts(case, our_size, options.rounds, sync) if on_gpu else None,
        optimizer_step=step_alone(case, optimizer, *around, rounds=options.rounds, sync=sync) if on_gpu else None,
        batches_from_the_host=fed(case, step_of, options, sync) if on_gpu else None,
        waits=waits(partial(step_of, case)) if on_gpu else None,
        run=whole_run(options) if options.run else None,
        params={**_params(options), "l1": L1},
        device=options.device,
    )


def tune(candidates: Mapping[str, Callable[[], Any]], n_tokens: int, sync: Callable[[], None]) -> dict[str, float]:
    """Tokens/s of each candidate's gradients, after a first run that compiles; out of memory: left out."""
    speeds: dict[str, float] = {}
    for name, gradients in candidates.items():
        try:
            timing, *_ = alternate(gradients, rounds=3, sync=sync)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            say(f"{name}: out of memory")
            continue
        speeds[name] = n_tokens / timing.seconds
        say(f"{name}: {speeds[name]:,.0f} tokens/s")
    return speeds


def fused_step(case: Case, optimizer: torch.optim.Adam, gradients: Callable[[], Any]) -> None:
    """A step as the product does it on a GPU."""
    from cytosae.training import kernels_gpu

    gradients()
    kernels_gpu.step(case.model, optimizer, normalise=True)


def plain_step(
    case: Case, optimizer: torch.optim.Adam, gradients: Callable[[], Any], project: Any, normalise: Any
) -> None:
    """The same in several passes over the decoder."""
    gradients()
    with torch.no_grad():
        project(case.model.W_dec, case.model.W_dec.grad)
        optimizer.step()
        normalise(case.model.W_dec)


def our_case_step(case: Case, *, optimizer: torch.optim.Adam, micro_batch: int) -> None:
    """Our whole step on the tokens of `case`."""
    fused_step(case, optimizer, partial(ours, case, micro_batch=micro_batch, precision="bf16"))


def parts(case: Case, micro_batch: int, rounds: int, sync: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each part of one micro-batch by itself, including launches and waiting."""
    from cytosae.training import kernels_gpu

    model, compute_dtype = case.model, torch.bfloat16
    x = case.tokens[:micro_batch].float()
    W_enc, b_enc, W_dec = (weight.detach().to(compute_dtype) for weight in (model.W_enc, model.b_enc, model.W_dec))
    centred = (x - model.b_dec.detach()).to(compute_dtype)
    p = torch.addmm(b_enc, centred, W_enc)
    marks = kernels_gpu.mark_active(p)
    active = kernels_gpu.take_active(p, marks)
    x_hat = model.b_dec.detach().repeat(len(x), 1)
    weight, factor = loss_weight(x, "normed"), 2 / x.numel()
    d_x_hat = compare_in_one_pass(x_hat, x, weight, factor, compute_dtype).d_x_hat_BD
    grads = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (W_dec, b_enc, W_dec)]
    works: dict[str, Callable[[], Any]] = {
        "copies of the weights": lambda: (
            model.W_enc.detach().to(compute_dtype),
            model.W_dec.detach().to(compute_dtype),
        ),
        "product": lambda: torch.addmm(b_enc, centred, W_enc, out=p),
        "marking": lambda: kernels_gpu.mark_active(p),
        "taking and sorting": lambda: kernels_gpu.take_active(p, marks),
        "reconstruction": lambda: kernels_gpu.add_decoded(active, W_dec, x_hat),
        "comparison": lambda: compare_in_one_pass(x_hat, x, weight, factor, compute_dtype),
        "comparison, plain": lambda: compare_plainly(x_hat, x, weight, factor, compute_dtype),
        "gradients": lambda: kernels_gpu.add_gradients(
            active,
            W_dec_LD=W_dec,
            d_x_hat_BD=d_x_hat,
            centred_BD=centred,
            penalty=L1,
            grad_W_enc_LD=grads[0],
            grad_b_enc_L=grads[1],
            grad_W_dec_LD=grads[2],
        ),
    }
    timings = alternate(*works.values(), rounds=rounds, sync=sync)
    return {name: timing.seconds * 1e3 for name, timing in zip(works, timings, strict=True)}


def step_alone(
    case: Case, optimizer: torch.optim.Adam, project: Any, normalise: Any, *, rounds: int, sync: Callable[[], None]
) -> dict[str, float]:
    """Milliseconds of the optimizer step, fused as in the product, and in several compiled passes."""
    fused, plain = alternate(
        lambda: fused_step(case, optimizer, lambda: None),
        lambda: plain_step(case, optimizer, lambda: None, project, normalise),
        rounds=rounds,
        sync=sync,
    )
    return {"fused": fused.seconds * 1e3, "plain": plain.seconds * 1e3}


def fed(case: Case, step_of: Callable[[Case], None], options: Any, sync: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step whose batch is in the host's memory: copied ahead, or copied when it is needed."""
    batch = case.tokens.cpu().numpy()

    def ahead() -> None:
        for tokens in islice(on_device(repeat(batch), options.device), FED):
            step_of(replace(case, tokens=tokens))

    def waited_for() -> None:
        for _ in range(FED):
            step_of(replace(case, tokens=torch.from_numpy(batch).to(options.device)))

    timings = alternate(ahead, waited_for, rounds=options.rounds, sync=sync)
    return {name: timing.seconds / FED * 1e3 for name, timing in zip(("ahead", "waited for"), timings, strict=True)}


def waits(step: Callable[[], None]) -> int:
    """Number of times that a step makes the host wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")  # warns that it is a prototype, which is not counted
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def project(W_dec: torch.Tensor, grad: torch.Tensor) -> None:
    """The gradient without its part along each row."""
    grad.sub_((grad * W_dec).sum(1, keepdim=True) * W_dec)


def normalise(W_dec: torch.Tensor) -> None:
    """Rows to norm 1."""
    norm = W_dec.norm(dim=1, keepdim=True)
    W_dec.div_(torch.where(norm == 0, 1, norm))


def whole_run(options: Any) -> dict[str, Any]:
    """A training run from its first line to the finished folder, and what the paper's 257 M tokens would take."""
    config = TrainConfig(
        expansion=options.latents // options.width,
        tokens=options.run_tokens,
        batch_tokens=options.tokens,
        precision="bf16" if options.device.startswith("cuda") else "fp32",
    )
    with scratch(options.folder) as folder:
        say(f"writing {options.run_images:,} images")
        sizes = chunk_sizes(options.run_images, 256)
        cache = folder / "run.acts.zarr"
        blocks = (tokens_of_few_atoms(n, options.width, seed=number) for number, n in enumerate(sizes))
        write_cache(cache, blocks, n_images=options.run_images, width=options.width, chunk_images=256)
        began = now()
        header = train([cache], folder / "run", config, device=options.device, checkpoint_every=10**9)
        seconds = (now() - began).seconds
    assert header.summary is not None
    rate = options.run_tokens / seconds
    return {
        "tokens": options.run_tokens,
        "seconds": seconds,
        "rate": rate,
        "unit": "tokens/s",
        "minutes_for_257_million_tokens_at_this_rate": RUN_TOKENS / rate / 60,
        "precision": config.precision,
        "final": header.summary["final"],
    }


def _sizes(micro_batches: list[int], n_tokens: int) -> list[int]:
    return sorted({min(size, n_tokens) for size in micro_batches})


def _params(options: Any) -> dict[str, Any]:
    return {**vars(options), "folder": str(options.folder or "temporary")}


def dense_loss(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    subtracted: torch.Tensor,
    b_dec: torch.Tensor,
    n_tokens: int,
) -> torch.Tensor:
    """The loss of one micro-batch as a share of the batch's; products in bf16, error and sums in float32."""
    x = x.float()
    with torch.autocast(x.device.type, torch.bfloat16):
        z = torch.relu(torch.addmm(b_enc, x - subtracted, W_enc))
        x_hat = torch.addmm(b_dec, z, W_dec)
    error = ((x_hat.float() - x) ** 2 / x.norm(dim=1, keepdim=True)).sum() / (n_tokens * x.shape[1])
    return error + L1 * z.sum(dtype=torch.float32) / n_tokens


def compiled(case: Case, loss: Loss, micro_batch: int, fold_b_dec: bool) -> None:
    """Dense gradients of the whole batch."""
    model = case.model
    for parameter in model.parameters():
        parameter.grad = None
    for x in case.tokens.split(micro_batch):
        inner = model.b_dec.detach() if fold_b_dec else model.b_dec
        loss(x, model.W_enc, model.b_enc, model.W_dec, inner, model.b_dec, len(case.tokens)).backward()
    if fold_b_dec:
        with torch.no_grad():
            model.b_dec.grad -= model.W_enc @ model.b_enc.grad  # type: ignore[operator]  # set above


def _gradients(case: Case) -> dict[str, torch.Tensor]:
    """The gradients as they are, taken away from the parameters so that nobody writes into them."""
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    for parameter in case.model.parameters():
        parameter.grad = None
    return grads


def _differences(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """In bf16 a pre-activation near zero changes sides now and then, so norms say more than the largest entry."""
    return {name: float((found[name].float() - reference[name]).norm() / reference[name].norm()) for name in reference}


if __name__ == "__main__":
    main()
