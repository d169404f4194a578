"""SAEs that learnt nothing, or less: `cyto sae baseline` writes one in the folder of an ordinary SAE.

All commands that take an SAE take it: encode, barcode, concept, compare, probe and stability do not know that it is a
baseline. It has the tokens, held-out images, L0 and, where the kind allows, the number of latents of the SAE that it
is to be like. The fits are in directions.py; frozen-decoder and frozen-encoder are trained by training/train.py.

Sources: random and frozen baselines, arXiv 2602.14111; neurons and PCA as baselines of dictionaries, arXiv 2309.08600.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae, save_sae
from cytosae.training import TrainingData, initial_b_dec, measure_held_out
from stores.content_hashes import write_trained_on
from stores.destination import plan_output
from stores.devices import resolve_device
from stores.errors import BadInput
from stores.files import sweep_partials, sync_tree, write_atomic
from stores.part_files import KeptParts, KeptState
from stores.progress import Progress
from stores.runlog import append_run
from stores.spec import SAE, Header, new_header, require_unchanged, write_header
from stores.tables import parquet_bytes
from stores.wording import Report, counted, decimals

from . import costs
from .config import FROZEN_KINDS, BaselineConfig
from .directions import (
    Weights,
    fit_ica,
    fit_kmeans,
    fit_neurons,
    fit_nmf,
    fit_pca,
    fit_random,
    fit_tokens,
    fitting_scale,
)
from .reference import Reference, frozen_settings, open_reference

_SAMPLE_NUMBERS = 65_536 * 768  # of the sample of tokens: 200 MB
_SCALE_TOKENS = 8192  # of the sample, for the factor of the decoder
_MOST_HELD_OUT = 512  # held-out images that the finished baseline is measured on
_NEAR = 0.1  # L0 is matched within this share
_BATCH = 65_536  # tokens that kmeans takes at once, at least as many as latents
_log = logging.getLogger(__name__)
_SIGNED = ("pca", "ica", "neurons")


@dataclass(frozen=True, kw_only=True)
class BaselineReport(Report):
    """A baseline that was written."""

    out: Path  # the folder
    header: Header  # of `sae.json`
    kind: str
    was_complete: bool  # it was there already
    warnings: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """What it is, and what was measured on held-out images."""
        spec, summary = self.header.spec, self.header.summary or {}
        k = f", k {spec['k']}" if spec.get("k") else ""
        yield f"{self.out}: baseline {self.kind}, {spec['n_latents']:,} latents ({spec['activation']}{k})"
        yield from summary.get("notes", ())
        if found := summary.get("held_out"):
            yield (
                f"held out: {counted(found['n_images'], 'image')}, L0 {found['l0']:.1f}, explained variance "
                f"{decimals(found['explained_variance'])}"
            )


def write_baseline(
    caches: Sequence[Path | str],
    out: Path | str,
    config: BaselineConfig,
    *,
    like: Path | str | None = None,
    settings: TrainConfig | None = None,
    exclude: Collection[str] = (),
    assume_compatible: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total, state: None,
) -> BaselineReport:
    """Write a baseline of the SAE `like` to the folder `out`, as an SAE of ours; the same call finds it complete.

    The same call continues an interrupted one, to the same bits: from a saved state of what is trained, and of kmeans,
    ica and nmf; with the sample of tokens as it was read.

    Parameters
    ----------
    caches : finished activation stores, by path or URL: those that `like` was trained on, in the same order
    like : folder of the SAE; None: the one that `settings` would train
    settings : default: width and L0 from the data (`cytosae.sae.make_config`)
    exclude : ids of images that `like` was trained without
    assume_compatible : take an imported SAE, which does not say on which tokens it was trained
    device : auto, cpu, cuda or cuda:N; ica and nmf run on the CPU
    say : called with lines of text: what will be done, its time and memory
    progress : called with tokens, done and in all

    Raises
    ------
    SpecMismatch
        If `like` was trained on other data, or `out` holds something else.
    BadInput
        If the kind does not fit the data.
    StoreNotFound, IncompleteStore, DamagedStore
        If a cache or the SAE cannot be read.
    """
    out, like, device = Path(out), None if like is None else Path(like), resolve_device(device)
    reference = open_reference(caches, like, settings, exclude=exclude, assume_compatible=assume_compatible)
    if config.kind in FROZEN_KINDS:
        frozen = frozen_settings(reference, config.kind.removeprefix("frozen-"), config.seed)
        from cytosae import train

        done = train(
            caches,
            out,
            frozen,
            exclude=exclude,
            device=device,
            overwrite=overwrite,
            inputs=() if like is None else (like,),
            say=say,
            progress=lambda done, total, metrics: progress(done, total, ""),
        )
        return BaselineReport(
            out=out,
            header=done.header,
            kind=config.kind,
            was_complete=done.was_complete,
            warnings=(*done.warnings, *_far_from(reference, done.header)),
        )

    job = _Job(reference, config, device, progress)
    header = new_header(SAE, job.spec())
    local = [store.root for store in reference.data.stores if isinstance(store.root, Path)]
    output = plan_output(out, header, overwrite=overwrite, inputs=(*local, *([like] if like else [])))
    try:
        if output.is_complete:
            output.publish()
            found = load_sae(out, device="cpu").header
            return BaselineReport(out=out, header=found, kind=config.kind, was_complete=True)
        root = output.work
        root.mkdir(parents=True, exist_ok=True)
        write_header(root, header)
        sweep_partials(root)
        append_run(root, packages=("torch", "numpy"), baseline=config.kind)
        say(job.costs_line())
        parts = KeptParts(root / "parts", header.identity)
        model, summary, notes = job.fit(parts)
        data = reference.data
        require_unchanged(*(store.header for store in data.stores), *([reference.sae.header] if reference.sae else []))
        summary["trained_on"] = write_trained_on(root, data.trained_on())
        if any(mask.any() for mask in data.chosen.held_out):
            few = _few_held_out(data)
            summary["held_out"] = measure_held_out(model.to(device), few, reference.config, device=device)
            write_atomic(root / "held_out.parquet", parquet_bytes(data.held_out_table()))
        parts.remove()
        header = save_sae(root, model, header, {**summary, "notes": list(notes)})
        sync_tree(root)
        output.publish()
    finally:
        output.release()
    return BaselineReport(out=out, header=header, kind=config.kind, was_complete=False)


def _far_from(reference: Reference, header: Header) -> Iterator[str]:
    """A warning if the L0 of a trained baseline is not within a tenth of that of the SAE."""
    summary = header.summary or {}
    l0 = (summary.get("held_out") or summary["final"])["l0"]
    if abs(l0 / reference.l0 - 1) > _NEAR:
        yield f"L0 is {l0:.1f}, and that of the SAE {reference.l0:.1f}: its sparsity was not reached in as many tokens"


class _Job:
    """A fit in closed form: what it will be, what it costs, and the fit."""

    def __init__(self, reference: Reference, config: BaselineConfig, device: str, progress: Progress) -> None:
        self.reference, self.config, self.device, self.progress = reference, config, device, progress
        self.kind, self.data, self.width = config.kind, reference.data, reference.data.width
        self.seed = reference.config.seed if config.seed is None else config.seed
        n_latents = reference.n_latents
        wanted = config.components or self.width
        self.n_directions = {
            "pca": min(self.width, wanted),
            "ica": min(self.width, wanted),
            "neurons": self.width,
            "nmf": min(wanted, n_latents),
        }.get(self.kind, n_latents)
        least = {"tokens": 2 * n_latents, "kmeans": 20 * n_latents}.get(self.kind, 0)
        asked = config.sample_tokens or max(least, _SAMPLE_NUMBERS // self.width)
        self.n_tokens = min(asked, self.data.stream.tokens_per_epoch)
        if self.kind in ("random", "neurons"):
            self.n_tokens = min(self.n_tokens, _SCALE_TOKENS)

    @property
    def n_latents(self) -> int:
        """Of the baseline: both signs of a direction are latents."""
        return 2 * self.n_directions if self.kind in _SIGNED else self.n_directions

    @property
    def k(self) -> int:
        """Active latents per token."""
        return 1 if self.kind == "kmeans" else min(self.reference.k, self.n_directions)

    def spec(self) -> dict[str, Any]:
        """What decides the numbers; as that of a training run, as far as it applies."""
        config, sae = self.reference.config, self.reference.sae
        of_data = {name: getattr(config, name) for name in ("token_set", "loss", "holdout", "holdout_by", "order")}
        of_data["order_seed"] = config.seed if config.order_seed is None else config.order_seed
        if self.kind == "random":  # equal to the beginning of a run of this seed, which stability must know
            of_data |= {"seed": self.seed, "init": config.init}
        return {
            "width": self.width,
            "n_latents": self.n_latents,
            "activation": "topk",
            "k": self.k,
            **self.data.to_spec(),
            "config": of_data,
            "baseline": {
                "kind": self.kind,
                "like": None if sae is None else sae.sha256,
                "l0": self.reference.l0,
                "sample_tokens": self.n_tokens,
                "seed": self.seed,
                **({"iterations": self.config.iterations} if self.kind in ("ica", "nmf") else {}),
            },
        }

    def costs_line(self) -> str:
        """`plan: ...`: size, time and memory."""
        sizes = {
            "n_tokens": self.n_tokens,
            "width": self.width,
            "n_latents": self.n_latents,
            "n_directions": self.n_directions,
        }
        few = sum(int(mask.sum()) for mask in _few_held_out(self.data).chosen.held_out)
        measured = few * self.data.stream.mean_tokens_per_image + min(self.n_tokens, _SCALE_TOKENS)
        work = costs.operations(self.kind, **sizes, iterations=self.config.iterations)
        on_cpu = self.kind in ("pca", "ica", "nmf")
        seconds = work / costs.speed("cpu" if on_cpu else self.device)
        seconds += 4 * measured * self.n_latents * self.width / costs.speed(self.device)
        return (
            f"plan: {self.kind}, {counted(self.n_latents, 'latent')}, k {self.k}, from {self.n_tokens:,} training "
            f"tokens; time: at most about {max(1, round(seconds)):,} s, memory: about "
            f"{costs.memory(self.kind, **sizes) / 1e9:.1f} GB"
        )

    def fit(self, parts: KeptParts) -> tuple[SparseAutoencoder, dict[str, Any], tuple[str, ...]]:
        """The SAE, what is to be said of it in its header, and notes."""
        n_sample = self.n_tokens if self.kind != "kmeans" else min(self.n_tokens, _SCALE_TOKENS)
        sample = torch.from_numpy(parts("sample", lambda: {"tokens": self._sample(n_sample)})["tokens"]).float()
        if self.kind == "random":
            centre = initial_b_dec(self.data, self.reference.config).float()
        else:
            centre = sample.mean(0, dtype=torch.float64).float()
        seconds = 60.0 if self.kind == "nmf" else 10.0  # its state is as large as the sample
        found = self._weights(sample, centre, KeptState(parts, "fit", seconds))
        model = SparseAutoencoder(self.width, len(found.bias), "topk", min(self.k, len(found.bias)))
        with torch.no_grad():
            model.W_enc.copy_(found.encoder.T)
            model.W_dec.copy_(found.decoder)
            model.b_enc.copy_(found.bias)
            model.b_dec.copy_(centre)
        model.requires_grad_(False).to(self.device)
        notes = list(found.notes)
        scale = 1.0
        if self.kind != "kmeans":
            scale = fitting_scale(model, sample[:_SCALE_TOKENS])
            if scale != scale:
                notes.append("the reconstruction has nothing in common with the tokens, so its scale was not fitted")
                scale = 1.0
            model.W_dec.mul_(scale)
        if self.n_latents != self.reference.n_latents:
            most = "" if self.config.components else "no more than "
            notes.append(f"{self.kind} has {most}{self.n_latents:,} latents; the SAE has {self.reference.n_latents:,}")
        if self.k != self.reference.k:
            notes.append(f"{self.kind} has L0 {self.k}; the SAE has {self.reference.l0:.1f}")
        return model, {"tokens": self.n_tokens, "scale": scale}, tuple(notes)

    def _weights(self, sample: torch.Tensor, centre: torch.Tensor, state: KeptState) -> Weights:
        n, seed, iterations = self.n_directions, self.seed, self.config.iterations
        if self.kind == "random":
            return fit_random(self.width, n, init=self.reference.config.init, seed=seed)
        if self.kind == "neurons":
            return fit_neurons(self.width)
        if self.kind == "kmeans":
            return fit_kmeans(self._batches(), centre, n, seed=seed, device=self.device, state=state)
        sample = sample - centre
        if self.kind == "tokens":
            return fit_tokens(sample, n, seed=seed)
        if self.kind == "pca":
            return fit_pca(sample, n)
        if self.kind == "ica":
            return fit_ica(sample, n, seed=seed, iterations=iterations, state=state)
        return fit_nmf(sample, n, seed=seed, iterations=iterations, state=state)

    def _sample(self, n_tokens: int) -> npt.NDArray[np.float16]:
        """(n, D): the first tokens of the stream, which come from all over the caches."""
        with closing(self.data.stream.batches(n_tokens)) as batches:
            found: npt.NDArray[np.float16] = next(batches)
        self.progress(n_tokens, n_tokens, "sample")
        return found

    def _batches(self) -> Iterator[torch.Tensor]:
        """Tokens for kmeans, in equal batches of at least as many as there are clusters."""
        n_batches = max(1, self.n_tokens // max(_BATCH, self.n_latents))
        size = self.n_tokens // n_batches
        if size < self.n_latents:
            raise BadInput(
                f"the baseline kmeans begins with a token for each of the {self.n_latents:,} clusters; there are "
                f"{self.n_tokens:,} training tokens. Compare with a smaller SAE (--expansion), or leave it out"
            )
        with closing(self.data.stream.batches(size)) as batches:
            for number, batch in enumerate(islice(batches, n_batches), start=1):
                yield torch.from_numpy(batch).float()
                self.progress(number * size, n_batches * size, "clusters")


def _few_held_out(data: TrainingData) -> TrainingData:
    """The same data with at most 512 held-out images, evenly over all."""
    total = data.chosen.n_held_out
    if total <= _MOST_HELD_OUT:
        return data
    kept = np.zeros(total, bool)
    kept[np.arange(_MOST_HELD_OUT) * total // _MOST_HELD_OUT] = True
    masks, first = [], 0
    for mask in data.chosen.held_out:
        few, n = np.zeros_like(mask), int(mask.sum())
        few[mask] = kept[first : first + n]
        masks.append(few)
        first += n
    return dataclasses.replace(data, chosen=dataclasses.replace(data.chosen, held_out=masks))
