"""From activation cache and SAE to a latent store. The dense latents never exist for more than a micro-batch."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stores.activation_store import ActivationStore, require_same_tokens
from stores.errors import BadInput, DamagedStore
from stores.latent_store import LatentSpec, LatentStore, LatentWriter
from stores.output import plan_output
from stores.runlog import append_run
from stores.spec import LATENTS, Header, check_choice, new_header, read_header
from stores.tables import table_sha256

from .checkpoint import SaeRun, load_sae
from .model import SparseAutoencoder

_MICRO_BATCH_BYTES = 128 << 20  # of one dense (tokens, latents) float32 matrix
VALUE_BITS = (10, 23)
_log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]  # images done, images in all, a word on the state


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """What lies in the finished latent store."""

    spec: LatentSpec
    nnz: int
    n_readable: int
    was_complete: bool

    @property
    def l0(self) -> float:
        """Mean number of active latents per token of a readable image."""
        return self.nnz / max(1, self.n_readable * self.spec.tokens_per_image)


def encode(
    cache: Path | str,
    run: Path,
    latents: Path,
    *,
    value_bits: int = 10,
    device: str = "cpu",
    assume_compatible: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> EncodeResult:
    """Write (or continue) the latents of every token of `cache` (a path or a URL) under the SAE `run` at `latents`.

    Memory: dense latents of one micro-batch (128 MiB), and one chunk of the cache with its nonzeros.

    assume_compatible : take an SAE that does not say which tokens it was trained on (an imported one), with a warning

    Raises
    ------
    SpecMismatch
        If the SAE was trained on another kind of tokens or does not say, or `latents` holds something else.
    DamagedStore
        If a token of a readable image is not finite.
    """
    check_choice("value_bits", value_bits, VALUE_BITS)
    store, sae = ActivationStore(cache), load_sae(run, device=device)
    assumed = require_same_tokens(
        sae.same_tokens,
        store.spec.same_tokens,
        f"the SAE {run}",
        f"the cache {cache}",
        assume_compatible=assume_compatible,
    )
    spec = _make_spec(store, sae, value_bits)
    inputs = (store.root, run) if isinstance(store.root, Path) else (run,)
    output = plan_output(latents, new_header(LATENTS, spec.to_dict()), overwrite=overwrite, inputs=inputs)
    n_readable = int(store.readable().sum())
    warn_of_precision(sae, store)
    if output.is_complete:
        output.publish()
        LatentStore(latents)  # a damaged one is not "already complete"
        return _result(read_header(latents, LATENTS), n_readable, was_complete=True)

    output.work.parent.mkdir(parents=True, exist_ok=True)
    writer = LatentWriter(output.work, spec, store.images)
    facts: dict[str, Any] = {"assumed_equal": assumed} if assumed else {}
    append_run(
        output.work,
        packages=("torch", "numpy", "zarr"),
        cache=str(store.root),
        sae=str(run.absolute()),
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        threads=torch.get_num_threads(),
        **facts,
    )
    is_readable = store.readable()
    progress(writer.n_images, spec.n_images, "")
    n_together = max(1, _MICRO_BATCH_BYTES // (4 * spec.n_latents * spec.tokens_per_image))
    first = -(-writer.n_images // store.spec.chunk_images)  # commits lie at chunk edges
    for rows, tokens in store.iter_chunks(first=first):
        for start in range(0, len(rows), n_together):
            some = slice(start, min(start + n_together, len(rows)))
            writer.append_tokens(*_encode_images(sae.model, tokens[some], is_readable[rows][some], value_bits, device))
            n_done = rows.start + some.stop
            progress(n_done, spec.n_images, f"{writer.nnz / (n_done * spec.tokens_per_image):.1f} active per token")
        writer.commit(rows.stop)
    header = writer.finish()
    output.publish()
    return _result(header, n_readable, was_complete=False)


def round_mantissa(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Positive float32 rounded to `bits` mantissa bits, nearest even; what would round to 0 stays the least above 0.

    A latent is zero or not before rounding (docs/formats.md). Relative error at most 2^-(bits + 1).
    """
    drop = 23 - bits
    if drop == 0:
        return values
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half, least = np.uint32((1 << (drop - 1)) - 1), np.uint32(1 << drop)
    rounded = (raw + half + ((raw >> np.uint32(drop)) & np.uint32(1))) & ~np.uint32((1 << drop) - 1)
    return np.maximum(rounded, least).view(np.float32)


@torch.inference_mode()
def _encode_images(
    model: SparseAutoencoder,
    tokens: npt.NDArray[np.float16],
    is_readable: npt.NDArray[np.bool_],
    value_bits: int,
    device: str,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(latent numbers, values, nonzeros per token) of some images, (n, T, D); an unreadable one has empty tokens."""
    n_images, n_tokens, width = tokens.shape
    row_lengths = np.zeros((n_images, n_tokens), np.int64)
    x = torch.from_numpy(tokens[is_readable].reshape(-1, width)).to(device).float()
    if not bool(torch.isfinite(x).all()):
        raise DamagedStore("a token of a readable image is NaN or infinite. cyto cache verify names it")
    kept = model.keep_active_(model.pre_activations(x))
    active = kept > 0
    values = round_mantissa(kept[active].cpu().numpy(), value_bits)
    # a NaN is not above 0 and would pass for silence; a sum shows it in one quick pass
    if not np.isfinite(values).all() or (not bool(torch.isfinite(kept.sum())) and bool(torch.isnan(kept).any())):
        raise BadInput("a latent became NaN or infinite: the SAE's weights do not fit these tokens")
    indices = active.nonzero()[:, 1].cpu().numpy()
    row_lengths[is_readable] = active.sum(1).cpu().numpy().reshape(-1, n_tokens)
    return indices, values, row_lengths.reshape(-1)


def warn_of_precision(sae: SaeRun, store: ActivationStore) -> None:
    """A line of warning if the cache was made in another precision than those the SAE was trained on."""
    trained_on = sorted({cache["precision"] for cache in sae.header.spec["caches"]} - {store.spec.precision})
    if trained_on:
        _log.warning("the SAE was trained on %s tokens, this cache holds %s", trained_on[0], store.spec.precision)


def _make_spec(store: ActivationStore, sae: SaeRun, value_bits: int) -> LatentSpec:
    return LatentSpec(
        sae_sha256=sae.sha256,
        cache_sha256=store.content_sha256,
        cache=store.spec.to_dict(),
        images_sha256=table_sha256(store.images),
        n_images=store.spec.n_images,
        tokens_per_image=store.spec.tokens_per_image,
        n_latents=sae.model.n_latents,
        precision="fp32",
        value_bits=value_bits,
        min_activation=0.0,
    )


def _result(header: Header, n_readable: int, *, was_complete: bool) -> EncodeResult:
    summary: dict[str, Any] = header.summary or {}
    spec = LatentSpec(**header.spec)
    return EncodeResult(spec=spec, nnz=summary["nnz"], n_readable=n_readable, was_complete=was_complete)
