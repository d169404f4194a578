"""Tokens that are made of known directions, and an SAE that knows them: what tests of baselines share."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from token_caches import write_cache

from cytosae.sae import SparseAutoencoder, TrainConfig, save_sae
from cytosae.training import measure_held_out, open_data, plan_training
from stores.content_hashes import write_trained_on
from stores.files import write_atomic
from stores.spec import write_header
from stores.tables import parquet_bytes

WIDTH, N_ATOMS, ACTIVE, TOKENS, N_IMAGES, N_LABELS = 48, 96, 3, 8, 240, 4
CENTRE = 2.0


def planted_atoms(seed: int = 0) -> npt.NDArray[np.float64]:
    """(N_ATOMS, WIDTH) directions of norm 1, which resemble each other little."""
    atoms = np.random.default_rng([seed, 0]).normal(size=(N_ATOMS, WIDTH))
    return np.asarray(atoms / np.linalg.norm(atoms, axis=1, keepdims=True))


def planted_cache(root: Path, seed: int = 0, n_images: int = N_IMAGES) -> Path:
    """Each token is the centre and three atoms, most of them of its image's label; 8 images of each patient."""
    rng, atoms = np.random.default_rng([seed, 1]), planted_atoms(seed)
    per_label = N_ATOMS // N_LABELS
    labels = [number // 3 % N_LABELS for number in range(n_images)]
    tokens = np.empty((n_images, TOKENS, WIDTH))
    for image, label in enumerate(labels):
        for token in range(TOKENS):
            own = rng.choice(per_label, ACTIVE, replace=False) + label * per_label
            chosen = np.where(rng.random(ACTIVE) < 0.9, own, rng.choice(N_ATOMS, ACTIVE, replace=False))
            tokens[image, token] = CENTRE + rng.uniform(2, 3, ACTIVE) @ atoms[chosen] + rng.normal(0, 0.02, WIDTH)
    return write_cache(
        root,
        tokens.astype(np.float16),
        chunk_images=16,
        patients=[f"P{number // 8}" for number in range(n_images)],
        labels=[f"label {label}" for label in labels],
    )


def planted_config(**changes: object) -> TrainConfig:
    """Settings that an SAE of these tokens could be trained with in seconds."""
    settings = {"expansion": N_ATOMS // WIDTH, "activation": "topk", "k": ACTIVE, "batch_tokens": 128, "lr": 3e-3}
    settings |= {"tokens": 128 * 300, "warmup_steps": 10, "holdout": 0.25, "holdout_by": "patient", "pool_chunks": 4}
    return TrainConfig(**(settings | changes))  # type: ignore[arg-type]


def planted_sae(root: Path, cache: Path, seed: int = 0) -> Path:
    """The SAE whose latents are the atoms, as training would have left it."""
    config = planted_config()
    data = open_data([cache], config)
    header = plan_training(data, root, config).header
    model = SparseAutoencoder(WIDTH, N_ATOMS, "topk", ACTIVE)
    with torch.no_grad():
        model.W_dec.copy_(torch.from_numpy(planted_atoms(seed)))
        model.W_enc.copy_(model.W_dec.T)
        model.b_dec.fill_(CENTRE)
    root.mkdir(parents=True)
    write_header(root, header)
    summary = {"steps": 300, "tokens": 128 * 300, "trained_on": write_trained_on(root, data.trained_on())}
    summary["held_out"] = measure_held_out(model, data, config, device="cpu")
    write_atomic(root / "held_out.parquet", parquet_bytes(data.held_out_table()))
    save_sae(root, model, header, summary)
    return root
