"""What test_stability.py and other tests share."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from stores import SAE, Header, new_header, write_header
from stores.files import sha256_file

Rows = npt.NDArray[np.float32]


TOKENS = {"backbone": "drawn", "weights_sha256": "1" * 64, "block": 10, "transform": {"size": 224}, "width": 8}


def write_sae(
    root: Path, rows: Rows, tokens: dict[str, Any] | None = None, seed: int | None = None, **stored: Any
) -> Path:
    """An SAE with this decoder, (L, D); `stored` replaces a tensor in the file behind its header's back."""
    n_latents, width = rows.shape
    spec = {"width": width, "n_latents": n_latents, "tokens": {**TOKENS, **(tokens or {}), "width": width}}
    header = new_header(SAE, spec | ({} if seed is None else {"config": {"seed": seed}}))
    root.mkdir()
    weights = {"W_enc": np.ascontiguousarray(rows.T), "b_enc": np.zeros(n_latents, "f4"), "W_dec": rows}
    save_file({**weights, "b_dec": np.zeros(width, "f4"), **stored}, root / "sae.safetensors")
    summary = {"sae_sha256": sha256_file(root / "sae.safetensors")}
    write_header(root, Header(**{**vars(header), "complete": True, "summary": summary}))
    return root


def unit(rows: Any) -> Rows:
    rows = np.asarray(rows, np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def directions(n: int, width: int, seed: int) -> Rows:
    return unit(np.random.default_rng(seed).normal(size=(n, width)))
