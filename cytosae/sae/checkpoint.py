"""Save and load an SAE: a folder with `sae.safetensors` (weights) and `sae.json` (header)."""

import logging
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stores.activation_spec import ActivationSpec, require_same_tokens
from stores.devices import resolve_device
from stores.errors import DamagedStore
from stores.files import PARTIAL_SUFFIX, sha256_file, sync_folder
from stores.spec import Header, check_choice, require_unchanged, write_header

from .config import ACTIVATIONS
from .model import SparseAutoencoder
from .weights_file import WEIGHTS, find_weights, open_tensors

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaeRun:
    """A finished SAE: its folder, the model, its header, and the SHA-256 of its weights file."""

    root: Path
    model: SparseAutoencoder
    header: Header
    sha256: str

    @property
    def same_tokens(self) -> dict[str, Any]:
        """The kind of tokens it was trained on (`ActivationSpec.same_tokens`)."""
        return dict(self.header.spec["tokens"])

    def require_tokens(self, spec: ActivationSpec, place: str, *, assume_compatible: bool = False) -> list[str]:
        """Refuse tokens of another kind than the SAE was trained on; returns the properties that were assumed.

        spec : of the cache that error messages call `place`
        assume_compatible : accept an imported SAE, which does not say on which tokens it was trained

        Raises
        ------
        SpecMismatch
            If a property differs, or is not known and not to be assumed; the message names it.
        """
        return require_same_tokens(
            self.same_tokens, spec.same_tokens, f"the SAE {self.root}", place, assume_compatible=assume_compatible
        )

    def warn_of_precision(self, spec: ActivationSpec) -> None:
        """Log a warning if the tokens have another precision than those that the SAE was trained on."""
        trained_on = sorted({cache["precision"] for cache in self.header.spec["caches"]} - {spec.precision})
        if trained_on:
            _log.warning("the SAE was trained on %s tokens, this cache holds %s", trained_on[0], spec.precision)


def save_sae(root: Path, model: SparseAutoencoder, header: Header, summary: dict[str, Any]) -> Header:
    """Write the weights, then the header that marks the run as complete; returns that header.

    summary : results of the run, for the header
    """
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    save_tensors(root / WEIGHTS, tensors, _metadata(model))
    # tables of the images; not metrics.parquet: it has times, and a continued run must have the same header as one that
    # was never interrupted
    tables = {path.name: sha256_file(path) for path in sorted(root.glob("*.parquet")) if path.name != "metrics.parquet"}
    summary = {**summary, "sae_sha256": sha256_file(root / WEIGHTS), "files": tables}
    header = Header(**{**vars(header), "complete": True, "summary": summary})
    write_header(root, header)
    return header


def load_sae(root: Path | str, *, device: str = "auto") -> SaeRun:
    """The finished SAE at `root`, on `device`: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch
        If there is no finished SAE of a version that this program reads.
    DamagedStore
        If the weights are missing, were changed, have other shapes, or are NaN or infinite.
    BadInput
        If there is no such device.
    """
    root, device = Path(root), resolve_device(device)
    weights = find_weights(root)
    path, spec = weights.path, weights.header.spec
    activation = spec.get("activation", "relu")
    check_choice("the activation of this SAE", activation, ACTIVATIONS)
    tensors, _ = load_tensors(path)
    model = SparseAutoencoder(spec["width"], spec["n_latents"], activation, spec.get("k"))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        raise DamagedStore(f"{path} holds {_shapes(found)}, expected {_shapes(expected)}")
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise DamagedStore(f"{path} holds weights that are NaN or infinite")
    model.load_state_dict(tensors)
    require_unchanged(weights.header)
    return SaeRun(root, model.requires_grad_(False).to(device), weights.header, weights.sha256)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically and durably. Tensors that are not contiguous are copied in memory.

    Raises
    ------
    OSError
        If it cannot be written, for instance because the disk is full.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        try:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial, metadata)
        except SafetensorError as error:
            raise _of_system(error, path) from None
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; nothing in it is executed.

    Raises
    ------
    DamagedStore
        If it is not a complete safetensors file.
    """
    with open_tensors(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})


def _of_system(error: SafetensorError, path: Path) -> Exception:
    """The OSError behind an error of safetensors, which passes on its text only."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error


def _metadata(model: SparseAutoencoder) -> dict[str, str]:
    """What the tensors do not contain, so that the SHA-256 differs. One entry: the order of several is random."""
    k = "" if model.k is None else f" {model.k}"
    return {} if model.activation == "relu" else {"activation": f"{model.activation}{k}"}


def _shapes(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
