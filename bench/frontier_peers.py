"""Trains SAEs of other libraries on given tokens and measures them: the other side of frontier.py, in its own process.

Runs in an environment that has sae-lens, dictionary-learning or overcomplete (none of them is a dependency of ours).
Reads one JSON object with `folder`, `threads` and `jobs` from stdin, prints one JSON line per job. Every peer gets the
batches, schedule, warm-up and window of dead latents that ours gets, and its own remedy for dead latents.
"""

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

LIBRARIES = {"sae-lens": "sae_lens", "dictionary-learning": "dictionary_learning", "overcomplete": "overcomplete"}
Encode = Callable[[torch.Tensor], torch.Tensor]
_AT_ONCE = 4_096


def main() -> None:
    """Do the jobs."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    folder = Path(asked["folder"])
    train, test = (torch.from_numpy(np.load(folder / f"{name}.npy")).float() for name in ("train", "test"))
    for job in asked["jobs"]:
        if importlib.util.find_spec(LIBRARIES[job["library"]]) is None:
            print(json.dumps(job | {"not_run": f"{job['library']} is not installed"}), flush=True)
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):  # libraries print their progress
                torch.manual_seed(job["seed"])
                began = time.perf_counter()
                encode, decode = TRAINERS[job["library"]](train, job)
                seconds = time.perf_counter() - began
                found = measure(encode, decode, train[:: job["every"]], test[:: job["every"]])
        except Exception as error:  # of a library that is not ours: said, and the others go on
            print(json.dumps(job | {"not_run": f"{type(error).__name__}: {error}"[:300]}), flush=True)
            continue
        known = {"seconds": seconds, "version": version(job["library"])}
        print(json.dumps(job | found | known), flush=True)


@torch.no_grad()
def measure(encode: Encode, decode: Encode, train: torch.Tensor, test: torch.Tensor) -> dict[str, float]:
    """Explained variance about the mean and L0 of the test tokens, and the share of latents never active on any token.

    Also used by frontier.py, so that all are measured alike.
    """
    mean = test.double().mean(0)
    error = total = active = 0.0
    fired: torch.Tensor | None = None
    for tokens, is_test in ((test, True), (train, False)):
        for x in tokens.split(_AT_ONCE):
            z = encode(x)
            here = (z != 0).any(0)
            fired = here if fired is None else fired | here
            if is_test:
                active += float((z != 0).sum())
                error += float((decode(z).double() - x.double()).square().sum())
                total += float((x.double() - mean).square().sum())
    assert fired is not None
    return {
        "explained_variance": 1 - error / total,
        "l0": active / len(test),
        "dead": 1 - float(fired.double().mean()),
    }


def batches(train: torch.Tensor, job: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Endless batches: all tokens once per epoch, in a new order each time."""
    draws = np.random.default_rng(job["seed"])
    left = np.zeros(0, np.int64)
    while True:
        while len(left) < job["batch"]:
            left = np.concatenate([left, draws.permutation(len(train))])
        yield train[torch.from_numpy(left[: job["batch"]])]
        left = left[job["batch"] :]


def _with_sae_lens(train: torch.Tensor, job: dict[str, Any]) -> tuple[Encode, Encode]:
    import sae_lens.saes as saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    common = {"d_in": train.shape[1], "d_sae": job["n_latents"]}
    sparsity, warmup = job["sparsity"], job["steps"] // 10
    method = job["method"]
    if method == "relu":
        config = saes.StandardTrainingSAEConfig(**common, l1_coefficient=sparsity, l1_warm_up_steps=warmup)
        sae = saes.StandardTrainingSAE(config)
    elif method == "topk":
        sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**common, k=sparsity))
    elif method == "batchtopk":
        sae = saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**common, k=sparsity))
    elif method == "jumprelu":
        bandwidth = {"jumprelu_init_threshold": job["threshold"], "jumprelu_bandwidth": job["bandwidth"]}
        config = saes.JumpReLUTrainingSAEConfig(**common, **bandwidth, l0_coefficient=sparsity, l0_warm_up_steps=warmup)
        sae = saes.JumpReLUTrainingSAE(config)
    elif method == "gated":
        sae = saes.GatedTrainingSAE(
            saes.GatedTrainingSAEConfig(**common, l1_coefficient=sparsity, l1_warm_up_steps=warmup)
        )
    else:
        widths = [round(share * job["n_latents"]) for share in (*job["nested"], 1.0)]
        config = saes.MatryoshkaBatchTopKTrainingSAEConfig(**common, k=sparsity, matryoshka_widths=widths)
        sae = saes.MatryoshkaBatchTopKTrainingSAE(config)
    with torch.no_grad():
        sae.b_dec.copy_(train.mean(0))  # as its runner can; without it every peer loses
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=job["steps"] * job["batch"],
            train_batch_size_samples=job["batch"],
            lr=job["lr"],
            lr_end=0.0,
            lr_warm_up_steps=job["warmup"],
            lr_decay_steps=job["decay"],
            dead_feature_window=job["dead_after"],
        ),
        sae,
        batches(train, job),
    )
    done = trainer.fit()
    done.eval()
    if method in ("batchtopk", "matryoshka"):  # in use it is a jumprelu with one threshold
        threshold = done.topk_threshold
        norm = done.W_dec.norm(dim=1)

        def encode(x: torch.Tensor) -> torch.Tensor:
            _, pre = done.encode_with_hidden_pre(x)
            return torch.relu(pre) * (pre > threshold) / norm

        return encode, lambda z: z @ done.W_dec + done.b_dec
    return done.encode, done.decode


def _with_dictionary_learning(train: torch.Tensor, job: dict[str, Any]) -> tuple[Encode, Encode]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    method, sparsity = job["method"], job["sparsity"]
    common = {"steps": job["steps"], "activation_dim": train.shape[1], "dict_size": job["n_latents"], "layer": 0}
    common |= {"lm_name": "none", "lr": job["lr"], "warmup_steps": job["warmup"], "seed": job["seed"], "device": "cpu"}
    common |= {"decay_start": job["steps"] - job["decay"]} if job["decay"] else {}
    in_use = {"threshold_beta": 0.9, "threshold_start_step": job["steps"] // 2}
    warmup = {"sparsity_warmup_steps": job["steps"] // 10}
    if method == "topk":
        trainer = TopKTrainer(**common, **in_use, k=sparsity)
    elif method == "batchtopk":
        trainer = BatchTopKTrainer(**common, **in_use, k=sparsity)
    elif method == "matryoshka":
        shares = np.diff([0.0, *job["nested"], 1.0]).tolist()
        trainer = MatryoshkaBatchTopKTrainer(**common, **in_use, k=sparsity, group_fractions=shares)
    elif method == "relu":
        resample = None if job["decay"] else job["steps"] // 4  # it does not take both
        trainer = StandardTrainer(**common, **warmup, l1_penalty=sparsity, resample_steps=resample)
    elif method == "gated":
        trainer = GatedSAETrainer(**common, **warmup, l1_penalty=sparsity)
    else:
        trainer = JumpReluTrainer(
            **common, **warmup, target_l0=sparsity, sparsity_penalty=job["penalty"], bandwidth=job["bandwidth"]
        )
        with torch.no_grad():
            trainer.ae.threshold.fill_(job["threshold"])
    trainer.dead_feature_threshold = job["dead_after"] * job["batch"]
    with torch.no_grad():  # the others take the geometric median of their first batch themselves
        if method in ("relu", "gated"):
            getattr(trainer.ae, "bias" if method == "relu" else "decoder_bias").copy_(train.mean(0))
        elif method == "jumprelu":
            trainer.ae.b_dec.copy_(train.mean(0))
    for step, x in zip(range(job["steps"]), batches(train, job), strict=False):
        trainer.update(step, x)
    trainer.ae.eval()
    if method == "topk":
        return lambda x: trainer.ae.encode(x, use_threshold=False), trainer.ae.decode
    return trainer.ae.encode, trainer.ae.decode


def _with_overcomplete(train: torch.Tensor, job: dict[str, Any]) -> tuple[Encode, Encode]:
    from overcomplete.sae import BatchTopKSAE, JumpSAE, TopKSAE
    from overcomplete.sae.losses import mse_l1, top_k_auxiliary_loss
    from overcomplete.sae.train import train_sae

    method, sparsity = job["method"], job["sparsity"]
    center = train.mean(0)  # its models have no bias of the decoder, and its guide says to standardise
    common = {"input_shape": train.shape[1], "nb_concepts": job["n_latents"]}
    criterion: Any = top_k_auxiliary_loss
    if method == "topk":
        model = TopKSAE(**common, top_k=sparsity)
    elif method == "batchtopk":
        model = BatchTopKSAE(**common, top_k=sparsity * job["batch"])
    elif method == "jumprelu":
        model = JumpSAE(**common, bandwidth=job["bandwidth"])

        def criterion(x: Any, x_hat: Any, pre: Any, z: Any, dictionary: Any) -> Any:
            return mse_l1(x, x_hat, pre, z, dictionary, penalty=sparsity)

    else:
        raise ValueError(f"overcomplete has no {method} in this comparison")
    optimizer = torch.optim.Adam(model.parameters(), lr=job["lr"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, job))
    stream = batches(train - center, job)
    given = [next(stream) for _ in range(job["steps"])]
    train_sae(model, given, criterion, optimizer, scheduler, nb_epochs=1, monitoring=0)
    model.eval()
    return lambda x: model.encode(x - center)[1], lambda z: model.decode(z) + center


def factor(step: int, job: dict[str, Any]) -> float:
    """Of the learning rate: up during the warm-up, down in the last `decay` steps."""
    up = min(1.0, (step + 1) / max(1, job["warmup"]))
    down = min(1.0, (job["steps"] - step) / job["decay"]) if job["decay"] else 1.0
    return max(0.0, min(up, down)) if math.isfinite(up) else 0.0


TRAINERS: dict[str, Callable[[torch.Tensor, dict[str, Any]], tuple[Encode, Encode]]] = {
    "sae-lens": _with_sae_lens,
    "dictionary-learning": _with_dictionary_learning,
    "overcomplete": _with_overcomplete,
}

if __name__ == "__main__":
    main()
