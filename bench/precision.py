"""What does each precision of `cyto sae train` cost, measured without a GPU?

Operands are rounded as a GPU rounds them (bfloat16, float16, or the 10 bits of TF32), and the products of the rounded
numbers are computed in float32 here. tf32 rounds the encoder's operands only. On the tokens of a cache:

- one step: an SAE trained in float32 takes the same batch in each precision: which latents change sides, how far the
  gradients are off (||difference|| / ||gradient||);
- a whole run: trained from its first step in each precision, then measured in float32 on images that were held out.
  What float32 itself leaves open is the yardstick: runs with other seeds.

The rule for a default: the fastest precision whose whole run ends within the spread of float32's seeds in the
unexplained share of the variance, and of whose active latents at most 0.5% change sides in a step.
With --cpu-step: a step in bf16 over one in fp32 on this processor, where it has bfloat16 in hardware.
"""

import statistics
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import add_folder, alternate, arguments, emit, say, scratch

from cytosae import TrainConfig, train
from cytosae.sae import SparseAutoencoder, load_sae
from cytosae.training import Objective, latent_matrix, loss_and_gradients, losses, objective
from cytosae.training import train as training_run
from cytosae.training.encoder_product import EncoderProduct
from cytosae.training.precision import Dtypes, cpu_has_bfloat16, dtypes_of
from stores.activation_store import ActivationStore

FASTEST_FIRST = ("fp16", "bf16", "tf32")  # the first two take the same time on tensor cores, so the finer one leads
MOST_CHANGED = 0.005  # share of active latents that may change sides
_SEEDS = (0, 1, 2)


class _Tf32Encoder(EncoderProduct):
    """Operands with the 10 bits of TF32."""

    def __init__(self, model: SparseAutoencoder, dtypes: Dtypes) -> None:
        super().__init__(model, dtypes)
        self._W_enc_CL = rounded_to_tf32(self._W_enc_CL.T).T

    def operand(self, x_BD: torch.Tensor) -> torch.Tensor:
        return rounded_to_tf32(super().operand(x_BD))


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=3)
    add_folder(parser)
    parser.add_argument("cache", type=Path, help="activation cache")
    parser.add_argument("--activations", default="relu,topk,batchtopk", help="(%(default)s)")
    parser.add_argument("--expansion", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--l0", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="(%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4_096, help="(%(default)s)")
    parser.add_argument("--cpu-step", action="store_true", help="also time bf16 on this processor")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with scratch(options.folder) as folder:
        for activation in options.activations.split(","):
            found[activation] = measured(options, activation, folder)
    fits = [name for name in FASTEST_FIRST if all(of[name]["fits"] for of in found.values())]
    proposal = (*fits, "fp32")[0]
    emit(
        "precision",
        ratio=min(
            1 / (1 + of.get(proposal, {}).get("mean_difference", 0) / of["fp32"]["mean"]) for of in found.values()
        ),
        target=1,
        ours={"precision": proposal},
        baseline={"precision": "fp32"},
        found=found,
        cpu_step=cpu_step(options.rounds) if options.cpu_step else None,
        params={**vars(options), "folder": str(options.folder or "temporary"), "cache": str(options.cache)},
    )


def measured(options: Namespace, activation: str, folder: Path) -> dict[str, Any]:
    """Step and whole run of each precision, for one activation."""
    ends: dict[str, list[float]] = {"fp32": [run(options, activation, folder, "fp32", seed) for seed in _SEEDS]}
    for name in FASTEST_FIRST:
        ends[name] = [run(options, activation, folder, name, seed) for seed in _SEEDS]
    low, high = min(ends["fp32"]), max(ends["fp32"])
    spread = high - low
    model = load_sae(folder / f"{activation}-fp32-0").model
    tokens = batch_of(options.cache, options.batch_tokens)
    exact = step_in("fp32", model, tokens)
    rows: dict[str, Any] = {
        "fp32": {"unexplained": ends["fp32"], "mean": statistics.mean(ends["fp32"]), "spread": spread}
    }
    for name in FASTEST_FIRST:
        changed, gradients = compared(exact, step_in(name, model, tokens))
        mean = statistics.mean(ends[name]) - statistics.mean(ends["fp32"])
        rows[name] = {
            "unexplained": ends[name],
            "mean_difference": mean,
            "changed_sides": changed,
            "gradients_off": gradients,
            "fits": mean <= spread and changed <= MOST_CHANGED,
        }
        say(f"{activation} {name}: {rows[name]}")
    return rows


def run(options: Namespace, activation: str, folder: Path, name: str, seed: int) -> float:
    """Unexplained share of the variance of held-out images after a run in a precision, measured in float32."""
    sparsity = {"k": options.l0} if activation in ("topk", "batchtopk") else {"target_l0": float(options.l0)}
    config = TrainConfig(
        activation=activation,
        expansion=options.expansion,
        batch_tokens=options.batch_tokens,
        tokens=options.steps * options.batch_tokens,
        lr=1e-3,
        warmup_steps=20,
        holdout=0.1,
        order_seed=0,
        b_dec_init="mean",
        seed=seed,
        precision=name,
        **sparsity,
    )
    with rounding(name):
        report = train([options.cache], folder / f"{activation}-{name}-{seed}", config)
    return 1 - float(report.summary["held_out"]["explained_variance"])


@contextmanager
def rounding(name: str) -> Iterator[None]:
    """This processor rounds operands as a GPU does in a precision."""
    with ExitStack() as stack:
        put = stack.enter_context
        put(mock.patch.object(training_run, "check_precision"))
        if name == "tf32":
            put(mock.patch.object(losses, "EncoderProduct", _Tf32Encoder))
        if name in ("bf16", "fp16"):
            put(
                mock.patch.object(
                    objective,
                    "dtypes_of",
                    lambda name, activation, weights, _: dtypes_of(name, activation, weights, "cuda"),
                )
            )
            put(mock.patch.object(latent_matrix, "SPARSE_BELOW", 0.0))  # numba's kernels know no short operands
        yield


def rounded_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """To the nearest number with 10 bits behind the leading one."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def batch_of(cache: Path, n_tokens: int) -> torch.Tensor:
    """(n, D): tokens of the last images."""
    store = ActivationStore(cache)
    n_images = -(-n_tokens // store.spec.tokens_per_image)
    tokens = torch.from_numpy(store.read_images(range(store.spec.n_images - n_images, store.spec.n_images)))
    return tokens.reshape(-1, store.spec.width)[:n_tokens]


def step_in(name: str, model: SparseAutoencoder, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(which latents are active, (N, L); gradients by parameter) of one step."""
    with rounding(name):
        given = Objective(precision=name, dead_latents="none", loss="eq1")
        loss_and_gradients(model, tokens, given, l1=1e-3)
        dtypes = given.dtypes(model)
        encoder = (_Tf32Encoder if name == "tf32" else EncoderProduct)(model, dtypes)
        operand = encoder.operand(tokens.float())
        p_NL = encoder.pre_activations(operand, torch.empty(len(tokens), model.n_latents, dtype=dtypes.p))
        with torch.no_grad():
            active = model.keep_active_(p_NL) > 0
    return active, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def compared(
    exact: tuple[torch.Tensor, dict[str, torch.Tensor]], found: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> tuple[float, dict[str, float]]:
    """(pairs that are active in one only, over those that are active; how far each gradient is off)."""
    changed = float((exact[0] ^ found[0]).sum() / exact[0].sum())
    off = {name: float((found[1][name] - wanted).norm() / wanted.norm()) for name, wanted in exact[1].items()}
    return changed, off


def cpu_step(rounds: int, *, n_tokens: int = 1_028, width: int = 768, n_latents: int = 24_576) -> dict[str, Any]:
    """Seconds of loss and gradients in both precisions, on this processor; about 50 active latents per token."""
    if not cpu_has_bfloat16():
        return {"has_bfloat16": False}
    model = SparseAutoencoder(width, n_latents)
    model.init_weights(torch.Generator().manual_seed(0), init="transpose")
    with torch.no_grad():
        model.b_enc.fill_(-2.88)  # of pre-activations with deviation 1: 0.2% are above
    tokens = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(1)).half()
    sides = [
        lambda name=name: loss_and_gradients(model, tokens, Objective(precision=name), l1=1e-3) and None
        for name in ("fp32", "bf16")
    ]
    fp32, bf16 = alternate(*sides, rounds=rounds)
    return {"has_bfloat16": True, "fp32_seconds": fp32.seconds, "bf16_seconds": bf16.seconds}


if __name__ == "__main__":
    main()
