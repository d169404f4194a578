"""What test_train.py and other tests share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

TOKENS, WIDTH, BATCH = 5, 8, 10  # a batch is two images


SETTINGS = {"expansion": 8, "batch_tokens": BATCH, "warmup_steps": 4, "dead_after_steps": 1, "l1": 1e-2, "log_every": 1}


def tokens_of_cells(seed: int = 0, n_images: int = 24) -> npt.NDArray[np.float16]:
    """(n, 5, 8): a mean far from zero, and tokens of an image that resemble each other, so that latents fall silent."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 1, (n_images, 1, WIDTH))
    return (3 + image + rng.normal(0, 0.4, (n_images, TOKENS, WIDTH))).astype(np.float16)


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def _what_was_trained(run: Path) -> dict[str, Any]:
    """Everything in a finished run that must not depend on interruptions: all but the clock and the run log."""
    header = json.loads((run / "sae.json").read_text())
    header["summary"]["final"].pop("tokens_per_second")
    return {"weights": (run / "sae.safetensors").read_bytes(), "metrics": _metrics(run), "header": header}
