"""What an SAE is and what it was trained on: the page of `cyto sae info`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae.sae import activation_text
from stores.errors import DamagedStore
from stores.info import StoreInfo
from stores.runlog import read_runs
from stores.spec import SAE, Header, read_header
from stores.wording import printable, size_on_disk

from .health import Health, read_health
from .report import background_line, held_out_line, training_line


@dataclass(frozen=True, kw_only=True)
class SaeInfo(StoreInfo):
    """What an SAE is and what it was trained on."""

    health: Health | None = None  # what was measured last; None: nothing of these weights is kept, or
    no_health: str = ""  # it cannot be read

    def lines(self) -> Iterator[str]:
        """The page of `cyto sae info`."""
        yield from super().lines()
        if self.health is not None:
            yield from self.health.lines()
        elif self.header.complete:
            yield f"health: not measured{printable(self.no_health)}; cyto sae eval RUN STORE --keep measures it"

    def rows(self) -> dict[str, str]:
        """The named values of the page, in order."""
        if "imported" in self.header.spec:
            return _imported_rows(self.header)
        return (_baseline_rows if "baseline" in self.header.spec else _trained_rows)(self.header)

    def to_json(self) -> dict[str, Any]:
        """Header and runs as plain JSON values."""
        health = None if self.health is None else self.health.to_json()
        return {**self.header.to_json(), "runs": list(self.runs), "health": health}


def sae_info(run: Path | str) -> SaeInfo:
    """What is in the folder of an SAE, finished or not. Reads the header and the run log, not the weights; no torch.

    Raises
    ------
    StoreNotFound, SpecMismatch, DamagedStore
        If there is no SAE of a version that this program reads, or its header is damaged.
    """
    run = Path(run)
    header = read_header(run, SAE, complete=False)
    health, no_health = None, ""
    try:
        health = read_health(run, sae_sha256=(header.summary or {}).get("sae_sha256", ""))
    except DamagedStore as error:
        no_health = f" ({error})"
    runs = tuple(read_runs(run))
    return SaeInfo(store=run, header=header, n_bytes=size_on_disk(run), runs=runs, health=health, no_health=no_health)


def _trained_rows(header: Header) -> dict[str, str]:
    """The page of an SAE that was trained here."""
    spec, summary, config = header.spec, header.summary or {}, header.spec["config"]
    return {
        "latents": f"{spec['n_latents']:,} ({activation_text(spec)}) on tokens of width {spec['width']}",
        "backbone": f"{spec['tokens']['backbone']}{'' if spec['trained_backbone'] else ' (UNTRAINED)'}, "
        f"block {spec['tokens']['block']}",
        "caches": ", ".join(cache["identity"][:12] for cache in spec["caches"]),
        **({"baseline": f"frozen {config['frozen']}: it keeps its initial value"} if "frozen" in config else {}),
        "objective": f"loss {config['loss']}, "
        + _sparsity(spec, summary)
        + f"dead latents: {config['dead_latents']}"
        + (f" ({config['ghost_scale']})" if config["dead_latents"] == "ghost" else "")
        + (f", init {config['init']}" if "init" in config else "")
        + (f", gradients clipped to {config['clip_norm']:g}" if config.get("clip_norm") else "")
        + (f", nested at {', '.join(map(str, config['nested']))}" if config.get("nested") else ""),
        **({"begun from": f"sha256 {spec['init_from']['sae_sha256']}"} if "init_from" in spec else {}),
        **({"background": background_line(spec["background"])[12:]} if "background" in spec else {}),
        "training": f"{_steps(spec, summary)} of {config['batch_tokens']:,} tokens, lr {config['lr']:g}, "
        f"order {config['order']}, token set {config['token_set']}, seed {config['seed']}",
        "weights": f"sha256 {summary.get('sae_sha256', '(not finished)')}",
        "images": f"{spec['images']['trained_on']:,} trained on, {spec['images']['held_out']:,} held out, "
        f"{spec['images']['excluded']:,} excluded",
        "last batch": training_line(summary["final"]) if summary else "(not finished)",
        **({"held out": held_out_line(summary["held_out"])} if "held_out" in summary else {}),
        "identity": header.identity,
    }


def _sparsity(spec: dict[str, Any], summary: dict[str, Any]) -> str:
    """The weight of the sparsity term, or what it was steered to."""
    config = spec["config"]
    if spec["activation"] in ("topk", "batchtopk"):
        return ""
    if config.get("target_l0") is None:
        return f"l1 {config['l1']:g}, "
    steered = summary.get("penalty")
    return f"L0 steered to {config['target_l0']:g}" + (f" (l1 {steered['l1']:.3g}), " if steered else ", ")


def _steps(spec: dict[str, Any], summary: dict[str, Any]) -> str:
    """How many steps the run took, and what ended it."""
    if spec["config"].get("tokens") != "auto":
        return f"{spec['n_steps']:,} steps"
    if "budget" not in summary:
        return f"at most {spec['n_steps']:,} steps"
    settled = summary["budget"]["settled_at_step"]
    return f"{summary['steps']:,} steps ({'settled' if settled is not None else 'never settled'})"


def _baseline_rows(header: Header) -> dict[str, str]:
    """The page of a baseline that was not trained (cytosae/baselines)."""
    spec, summary = header.spec, header.summary or {}
    made = spec["baseline"]
    like = "settings" if made.get("like") is None else f"the SAE sha256 {made['like']}"
    return {
        "latents": f"{spec['n_latents']:,} ({activation_text(spec)}) on tokens of width {spec['width']}",
        "baseline": f"{made['kind']}, not trained, from {made['sample_tokens']:,} training tokens, seed {made['seed']}",
        "like": f"{like}, L0 {made['l0']:.1f}",
        "backbone": f"{spec['tokens']['backbone']}{'' if spec['trained_backbone'] else ' (UNTRAINED)'}, "
        f"block {spec['tokens']['block']}",
        "caches": ", ".join(cache["identity"][:12] for cache in spec["caches"]),
        "weights": f"sha256 {summary.get('sae_sha256', '(not finished)')}",
        "images": f"{spec['images']['trained_on']:,} trained on, {spec['images']['held_out']:,} held out, "
        f"{spec['images']['excluded']:,} excluded",
        "notes": "; ".join(summary.get("notes", [])) or "none",
        **({"held out": held_out_line(summary["held_out"])} if "held_out" in summary else {}),
        "identity": header.identity,
    }


def _imported_rows(header: Header) -> dict[str, str]:
    spec, summary = header.spec, header.summary or {}
    says = summary.get("says", {})
    names = ("model_name", "block_layer", "module_name", "class_token", "hook_name", "dataset_path", "l1_coefficient")
    metadata = says.get("metadata")
    claims = {**(metadata if isinstance(metadata, dict) else {}), **says}
    shown = [f"{name} {printable(str(claims[name]))}" for name in names if claims.get(name) is not None]
    return {
        "latents": f"{spec['n_latents']:,} ({activation_text(spec)}) on tokens of width {spec['width']}",
        "imported": f"from {spec['imported']['format']}, sha256 {spec['imported']['files']['weights']}",
        "tokens": f"not known: {', '.join(name for name, value in spec['tokens'].items() if value is None)}",
        "says": ", ".join(shown) or "nothing of where it comes from",
        "notes": "; ".join(summary.get("notes", [])) or "none",
        "weights": f"sha256 {summary.get('sae_sha256', '(not finished)')}",
        "identity": header.identity,
    }
