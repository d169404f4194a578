"""Import and export of SAEs: the released CytoSAE and PatchSAE `.pt`, and SAELens folders.

Imported files are not trusted: nothing in them is executed, every tensor is checked, and what they do not contain
(on which tokens the SAE was trained) stays unknown. All three programs store `W_enc` (D, L), `b_enc`, `W_dec` (L, D)
and `b_dec` with the same meaning: latents = ReLU((x - b_dec) W_enc + b_enc), reconstruction = latents W_dec + b_dec.
SAELens has our other activations too (saelens.py).
"""

import json
import math
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stores.destination import claimed, plan_output
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.files import PARTIAL_SUFFIX, is_dropping, sha256_file, sync_folder, sync_tree, write_json
from stores.runlog import append_run
from stores.spec import SAE, Header, check_choice, find_header, new_header, plain, write_header
from stores.tables import listed
from stores.torch_archive import Refused, TorchArchive, one_line, open_archive
from stores.wording import Report, size_on_disk

from . import saelens
from .checkpoint import SaeRun, load_sae, load_tensors, save_sae, save_tensors
from .config import activation_text
from .model import SparseAutoencoder
from .saelens import shown
from .safe_unpickle import Instance, Tensor, plain_config, read_pickle

LAYOUTS = ("cytosae", "saelens")
MAX_BYTES = 4 << 30  # largest file of weights; the released one has 302 MB
_MAX_PICKLE_BYTES = 256 << 10  # the released one has less than 4 KiB
_MAX_JSON_BYTES = 1 << 20  # largest cfg.json, and largest header of a safetensors file
_MAX_RECORDS = 64  # most tensors in a safetensors file; checked before any is read
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# where the config class of CytoSAE, PatchSAE and the code before them lived; a name here is compared, never imported
_CONFIG_CLASSES = frozenset(
    f"{package}sae_training.config.{name}" for package in ("", "src.") for name in ("ViTSAERunnerConfig", "Config")
)
_EXPECTED = "expected a .pt of CytoSAE or PatchSAE, or a SAELens folder with cfg.json and sae_weights.safetensors"
_HUB_NAMES = {f"dinobloom-{size}": f"dinov2_vit{size}14" for size in "sblg"}  # what the released code calls them
_UNKNOWN = ("backbone", "weights_sha256", "block", "transform", "token_layout", "tokens_per_image")


@dataclass(frozen=True, kw_only=True)
class ForeignSae:
    """An SAE that was read from the files of another program, as our model stores it."""

    format: str
    activation: str
    k: int | None  # for topk
    weights: dict[str, torch.Tensor]  # float32 state of our model: W_enc (D, L), W_dec (L, D), b_dec (D,), others (L,)
    says: dict[str, Any]  # its config as plain values; not checked, except the sizes
    files: dict[str, str]  # SHA-256 of the files that were read
    notes: list[str]  # one line for each thing that was changed or left out


@dataclass(frozen=True, kw_only=True)
class ImportReport(Report):
    """An SAE of another program, imported."""

    out: Path  # the folder
    header: Header  # of `sae.json`; its summary has what the file says, and notes
    was_complete: bool  # True: it was there already

    def lines(self) -> Iterator[str]:
        """What it is, what was changed or left out, and what is not known."""
        spec = self.header.spec
        yield (
            f"{self.out}: {spec['n_latents']:,} latents ({activation_text(spec)}) on tokens of width "
            f"{spec['width']}, from {spec['imported']['format']}"
        )
        for note in (self.header.summary or {})["notes"]:
            yield f"  {note}"
        yield "  which tokens it was trained on is not known: add --assume-compatible where it is used"


@dataclass(frozen=True, kw_only=True)
class ExportReport(Report):
    """An SAE of ours, written as another program stores it."""

    out: Path  # the file or folder
    sae: Path
    layout: str
    was_complete: bool  # True: it was there already

    def lines(self) -> Iterator[str]:
        """The file or folder, and its size."""
        n_bytes = size_on_disk(self.out) if self.out.is_dir() else self.out.stat().st_size
        yield f"{self.out}: {self.sae} in the {self.layout} layout, {n_bytes / 1e6:,.1f} MB"


def import_sae(source: Path | str, run: Path | str, *, overwrite: bool = False) -> ImportReport:
    """Import the SAE at `source` into the folder `run`.

    Weights are not changed (rows of `W_dec` keep their norm). Memory: the source twice.

    source : a `.pt` file of CytoSAE or PatchSAE, or a SAELens folder

    Raises
    ------
    BadInput
        If `source` is not an SAE that can be imported, or could execute code.
    SpecMismatch
        If `run` holds something else.
    """
    source, run = Path(source), Path(run)
    foreign = read_foreign(source)
    width, n_latents = foreign.weights["W_enc"].shape
    spec: dict[str, Any] = {
        "width": width,
        "n_latents": n_latents,
        "activation": foreign.activation,
        **({} if foreign.k is None else {"k": foreign.k}),
        "tokens": {**dict.fromkeys(_UNKNOWN), "width": width},
        "trained_backbone": None,
        "caches": [],
        "imported": {"format": foreign.format, "files": foreign.files},
    }
    header = new_header(SAE, spec)
    output = plan_output(run, header, overwrite=overwrite, inputs=(source,))
    if output.is_complete:
        output.publish()
        return ImportReport(out=run, header=load_sae(run, device="cpu").header, was_complete=True)
    root = output.work
    root.mkdir(parents=True, exist_ok=True)
    write_header(root, header)
    append_run(root, packages=("torch", "safetensors"), imported=source.name)
    model = SparseAutoencoder(width, n_latents, foreign.activation, foreign.k)
    model.load_state_dict(foreign.weights)
    header = save_sae(root, model, header, {"says": foreign.says, "notes": foreign.notes})
    sync_tree(root)
    output.publish()
    return ImportReport(out=run, header=header, was_complete=False)


def read_foreign(source: Path) -> ForeignSae:
    """The SAE at `source`: a `.pt` file of CytoSAE or PatchSAE, or a SAELens folder.

    Raises
    ------
    BadInput
        If it is neither, or an SAE whose latents our model cannot reproduce.
    """
    try:
        if source.is_dir():
            foreign = _read_saelens(source)
        elif source.is_file():
            foreign = _read_cytosae(source)
        else:
            raise Refused("is not there" if not source.exists() else "is neither a file nor a folder")
        _check_weights(foreign.weights, foreign.says)
    except Refused as refused:
        raise BadInput(f"{source} {refused}; {_EXPECTED}") from None
    return foreign


def export_sae(run: Path | str, out: Path | str, *, format: str) -> ExportReport:
    """Write the SAE in `run` as another program stores it.

    format : cytosae (one file, which PyTorch loads with `weights_only`; relu only) or saelens (a folder)

    Raises
    ------
    BadInput
        If the format has no place for the activation, or for this file name.
    SpecMismatch
        If anything else exists at `out`: it is never replaced.
    """
    check_choice("format", format, LAYOUTS)
    run, given, out = Path(run), Path(out), Path(out).absolute()
    sae = load_sae(run, device="cpu")
    if format == "cytosae" and sae.model.activation != "relu":
        raise BadInput(
            f"{run} has the activation {sae.model.activation}, and the released CytoSAE code computes relu only; "
            f"use --format saelens"
        )
    if out.is_symlink():
        raise SpecMismatch(f"{out} is a link; give the path that it points to")
    for folder in (out, *out.parents):
        found = find_header(folder)
        if found is not None:
            raise SpecMismatch(f"{out} is or lies inside {folder}, which holds our own {found.kind}; choose another -o")
    if format == "cytosae" and out.suffix != ".pt":  # by which the released code chooses how to load it
        raise BadInput(f"a CytoSAE file ends in .pt; found {out.name!r}")
    with ExitStack() as stack:
        stack.enter_context(claimed(out))
        if out.exists():
            if _is_export(out, sae, format):
                return ExportReport(out=given, sae=run, layout=format, was_complete=True)
            raise SpecMismatch(f"{out} is there already, and is not this SAE in the {format} layout; choose another -o")
        partial = stack.enter_context(_built_beside(out))
        if format == "cytosae":
            with partial.open("xb") as file:
                torch.save(plain(_cytosae_content(sae)), file)
                file.flush()
                os.fsync(file.fileno())
        else:
            partial.mkdir()
            config, stored = _saelens_content(sae)
            save_tensors(partial / "sae_weights.safetensors", stored, {})
            write_json(partial / "cfg.json", config)
            sync_tree(partial)
    return ExportReport(out=given, sae=run, layout=format, was_complete=False)


# ---------------------------------------------------------------------------------------------------- in


def _read_cytosae(path: Path) -> ForeignSae:
    """{"cfg" or "config": object, "state_dict": tensors}, as `SparseAutoencoder.save_model` of both writes it."""
    try:
        files = {"weights": sha256_file(path)}
        with open_archive(path, max_bytes=MAX_BYTES, max_pickle_bytes=_MAX_PICKLE_BYTES, what="an SAE") as archive:
            content = read_pickle(archive.pickled, classes=_CONFIG_CLASSES)
            if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
                found = listed(list(content)) if isinstance(content, dict) else type(content).__name__
                raise Refused(f"holds no state_dict (found: {shown(found) or 'nothing'})")
            config = content.get("cfg", content.get("config"))
            if not isinstance(config, dict | Instance):
                raise Refused("holds no config beside its state_dict (cfg or config)")
            says = plain_config(config)
            state = content["state_dict"]
            if "r_mag" in state or "b_mag" in state or says.get("gated_sae"):
                raise Refused("holds a gated SAE, whose latents the released code leaves undefined; only relu is taken")
            _check_names(list(state), _NAMES, "ReLU")
            byteorder = f"{next(iter(archive.zip.namelist())).partition('/')[0]}/byteorder"
            if byteorder in archive.zip.namelist() and archive.zip.read(byteorder) != b"little":
                raise Refused("was written on a big-endian machine")
            weights = {name: _read_tensor(archive, name, state[name]) for name in _NAMES}
            others = [name for name in content if name not in ("cfg", "config", "state_dict")]
            notes = [f"left out: {shown(listed(others))}"] if others else []
            stored = sorted({state[name].dtype for name in _NAMES} - {"float32"})
    except (Refused, OSError):
        raise
    except Exception as error:  # zipfile and pickletools raise almost anything
        raise Refused(f"is no whole archive of torch.save ({one_line(error)})") from None
    notes += [f"{dtype} became float32" for dtype in stored]
    return ForeignSae(format="cytosae", activation="relu", k=None, weights=weights, says=says, files=files, notes=notes)


def _read_tensor(archive: TorchArchive, name: str, tensor: Any) -> torch.Tensor:
    """One tensor as float32; its record is read whole, so that its checksum counts."""
    if not isinstance(tensor, Tensor):
        raise Refused(f"holds no plain floating-point tensor as {name}")
    dtype = _DTYPES[tensor.dtype]
    record = archive.check_storage(tensor.key, tensor.length * dtype.itemsize)
    rows_first = _strides(tensor.shape)
    columns_first = tuple(reversed(_strides(tensor.shape[::-1])))
    # every number of the record exactly once: a stride of 0 could make terabytes of one number, and a view of a larger
    # record would leave numbers unread
    if tensor.strides not in (rows_first, columns_first) or (tensor.offset, tensor.length) != (
        0,
        math.prod(tensor.shape),
    ):
        raise Refused(
            f"holds {name} of shape {tensor.shape} as a view (strides {tensor.strides}, from {tensor.offset:,}) "
            f"of {tensor.length:,} numbers, and not whole"
        )
    content = bytearray(record.file_size)
    with archive.zip.open(record) as file:
        n_read = 0
        while n_read < len(content):  # raises at the end if the checksum does not fit
            piece = file.read(min(1 << 20, len(content) - n_read))
            if not piece:
                raise Refused(f"is cut off in the middle of {name}")
            content[n_read : n_read + len(piece)] = piece
            n_read += len(piece)
    numbers = torch.frombuffer(content, dtype=dtype)
    return numbers.as_strided(tensor.shape, tensor.strides).float().contiguous()


def _read_saelens(folder: Path) -> ForeignSae:
    """cfg.json and sae_weights.safetensors, as SAELens 6 writes them and as the versions before did."""
    paths = {"config": folder / "cfg.json", "weights": folder / "sae_weights.safetensors"}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise Refused(f"has no {' and no '.join(missing)}")
    says = _read_config(paths["config"])
    architecture, k = saelens.read_config(says)
    _check_safetensors_header(paths["weights"])
    files = {name: sha256_file(path) for name, path in paths.items()}
    try:
        stored, _ = load_tensors(paths["weights"])
    except DamagedStore as error:
        raise Refused(f"has a damaged sae_weights.safetensors ({one_line(error)})") from None
    _check_names(list(stored), saelens.TENSORS[architecture], architecture)
    for name, tensor in stored.items():
        if tensor.dtype not in _DTYPES.values():
            raise Refused(f"holds no plain floating-point tensor as {name} ({tensor.dtype})")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()} - {"float32"}
    stored = {name: tensor.float().contiguous() for name, tensor in stored.items()}
    _check_weights(stored, says)
    activation, weights, changes = saelens.to_ours(architecture, k, stored, says)
    notes = [*(f"{dtype} became float32" for dtype in sorted(dtypes)), *changes]
    others = sorted(path.name for path in folder.iterdir() if path not in paths.values() and not is_dropping(path.name))
    if others:
        notes.append(f"left out: {shown(listed(others))}")
    return ForeignSae(
        format="saelens", activation=activation, k=k, weights=weights, says=says, files=files, notes=notes
    )


def _read_config(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        raise Refused(f"has a cfg.json of more than {_MAX_JSON_BYTES:,} bytes")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(f"has a cfg.json that is not JSON ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise Refused("has a cfg.json that is not an object")
    try:
        says: dict[str, Any] = plain_config(content)
    except UnicodeEncodeError:
        raise Refused("has a cfg.json with text that is not UTF-8") from None
    return says


def _check_safetensors_header(path: Path) -> None:
    """Before the library reads it: its size, and how many tensors it has."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise Refused(f"has weights of {size:,} bytes, more than the {MAX_BYTES:,} that an SAE can need")
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if n_bytes > min(size, _MAX_JSON_BYTES):
            raise Refused("has a damaged sae_weights.safetensors, or one with far more tensors than an SAE has")
        try:
            n_records = len(json.loads(file.read(n_bytes)))
        except (ValueError, RecursionError, TypeError):
            raise Refused("has a damaged sae_weights.safetensors") from None
    if n_records > _MAX_RECORDS:
        raise Refused(f"has {n_records:,} tensors, an SAE has 4 to 6")


def _check_names(found: list[str], expected: tuple[str, ...], kind: str) -> None:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        raise Refused(f"lacks {', '.join(missing)}; found {shown(listed(found)) or 'nothing'}")
    if unknown:
        raise Refused(f"holds {shown(listed(unknown))} beside the weights of a {kind} SAE")


def _check_weights(weights: dict[str, torch.Tensor], says: dict[str, Any]) -> None:
    width, n_latents = _check_shapes(weights)
    for name, size in (("d_in", width), ("d_sae", n_latents)):
        if says.get(name, size) != size:
            raise Refused(f"says {name} {shown(str(says[name])):.40}, but its weights have {size:,}")
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Refused(f"holds {name} with numbers that are NaN or infinite")


def _check_shapes(weights: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(width, n_latents)"""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    width, n_latents = shapes["W_enc"] if len(shapes["W_enc"]) == 2 else (0, 0)
    matrices = {"W_enc": (width, n_latents), "W_dec": (n_latents, width), "b_dec": (width,)}
    expected = {name: matrices.get(name, (n_latents,)) for name in shapes}
    if len(shapes["b_dec"]) == 2 and shapes["b_dec"][1] == width:  # what its "mean" start of b_dec leaves behind
        raise Refused(f"holds b_dec {shapes['b_dec']}: one bias per position, which CytoSAE itself cannot load again")
    if shapes != expected or not (width and n_latents):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        others = " and ".join(name for name in shapes if name not in matrices)
        raise Refused(f"holds {found}; W_enc (D, L), W_dec (L, D), b_dec (D,) and (L,) of {others} belong together")
    return width, n_latents


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous array, the last axis fastest."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


# ---------------------------------------------------------------------------------------------------- out


def _weights(sae: SaeRun) -> dict[str, torch.Tensor]:
    return {name: getattr(sae.model, name).detach() for name in _NAMES}


def _provenance(sae: SaeRun, format: str) -> dict[str, Any]:
    """What an export contains under the key `cyto`, for information only: an import does not use it."""
    spec = sae.header.spec
    names = ("tokens", "trained_backbone", "config", "imported")
    said = {"said_before": _said(sae)} if spec.get("imported", {}).get("format", format) != format else {}
    return {"sae_sha256": sae.sha256, **{name: spec[name] for name in names if name in spec}, **said}


def _said(sae: SaeRun, format: str | None = None) -> dict[str, Any]:
    """The config of an imported SAE (if it was in this format), without what an earlier export of ours has added."""
    said = dict((sae.header.summary or {}).get("says", {}))
    if format not in (None, sae.header.spec.get("imported", {}).get("format")):
        return {}
    if isinstance(said.get("metadata"), dict):
        said["metadata"] = {name: value for name, value in said["metadata"].items() if name != "cyto"}
    return {name: value for name, value in said.items() if name != "cyto"}


def _cytosae_content(sae: SaeRun) -> dict[str, Any]:
    """The content that the released `load_sae` accepts: its config may be a dict, so no class is pickled."""
    spec, tokens = sae.header.spec, sae.same_tokens
    config: dict[str, Any] = {"d_in": spec["width"], "d_sae": spec["n_latents"]}
    # required by the released class; all but `gated_sae` matter for training only
    config |= {"gated_sae": None, "l1_coefficient": 0.0, "use_ghost_grads": False, "mse_cls_coefficient": 1.0}
    config |= {"device": "cpu"}
    if tokens["backbone"] is not None:
        size = tokens["transform"]["size"]
        config |= {"model_name": _HUB_NAMES.get(tokens["backbone"], tokens["backbone"]), "block_layer": tokens["block"]}
        config |= {"image_width": size, "image_height": size, "module_name": "resid"}
    if "config" in spec:
        ours = spec["config"]
        config |= {"l1_coefficient": ours["l1"], "lr": ours["lr"], "lr_warm_up_steps": ours["warmup_steps"]}
        config |= {
            "use_ghost_grads": ours["dead_latents"] == "ghost",
            "seed": ours["seed"],
            "expansion_factor": ours["expansion"],
        }
        config |= {"class_token": True if ours["token_set"] == "cls" else None}
    config |= {**_said(sae, "cytosae"), "dtype": torch.float32, "cyto": _provenance(sae, "cytosae")}
    return {"cfg": config, "state_dict": OrderedDict(_weights(sae))}


def _saelens_content(sae: SaeRun) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """cfg.json and the tensors."""
    spec, tokens, before = sae.header.spec, sae.same_tokens, _said(sae, "saelens").get("metadata")
    metadata = dict(before) if isinstance(before, dict) else {}
    if tokens["backbone"] is not None:
        metadata |= {"model_name": tokens["backbone"], "hook_name": f"blocks.{tokens['block']}.hook_resid_post"}
    # the layout of cfg.json, not who trained it: without it, SAELens takes the file for one from before version 6
    metadata |= {"sae_lens_version": "6.0.0", "sae_lens_training_version": None}
    metadata |= {"cyto": _provenance(sae, "saelens")}
    architecture, stored = saelens.from_ours(sae.model)
    config = {
        **architecture,
        "d_in": spec["width"],
        "d_sae": spec["n_latents"],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    return config, stored


def _is_export(out: Path, sae: SaeRun, format: str) -> bool:
    """True if `out` already contains what would be written."""
    try:
        found = read_foreign(out)
    except BadInput:
        return False
    if found.format != format:
        return False
    if format == "cytosae":
        stored, says, weights = found.weights, {**_cytosae_content(sae)["cfg"], "dtype": "float32"}, _weights(sae)
    else:  # in its own terms: a threshold's logarithm does not tell neighbours apart
        stored, _ = load_tensors(out / "sae_weights.safetensors")
        says, weights = _saelens_content(sae)
    same = stored.keys() == weights.keys() and all(torch.equal(stored[name], weights[name]) for name in stored)
    return same and found.says == plain_config(says)


@contextmanager
def _built_beside(out: Path) -> Iterator[Path]:
    """A temporary path for a file or folder; it is renamed to `out` if no error occurs. Nothing is replaced."""
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        yield partial
        if out.exists():
            raise SpecMismatch(f"{out} has appeared meanwhile; choose another -o")
        partial.rename(out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    sync_folder(out.parent)
