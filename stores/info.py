"""What is in a cache or latent store, complete or not: facts, a page in words, and JSON."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .activation_spec import ActivationSpec
from .latent_spec import LatentSpec
from .spec import Header
from .wording import Report, megabytes, page_html, page_lines, pruning, state_of

_RUNS_SHOWN = 5  # the last ones
_GROUPS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class StoreInfo(Report):
    """What is in a store: its header, how large it is, the runs that wrote it."""

    store: Path | str  # local path or URL
    header: Header
    n_bytes: int | None  # on the disk; None for a latent store at a URL
    runs: tuple[dict[str, Any], ...]  # of the run log, oldest first

    @property
    def title(self) -> str:
        """The first line of the page."""
        return f"{self.store}: {self.header.kind}, version {self.header.version}, {state_of(self.header.complete)}"

    def rows(self) -> dict[str, str]:
        """The named values of the page, in order."""
        raise NotImplementedError

    def lines(self) -> Iterator[str]:
        """The page of `cyto cache info` or `cyto latents info`."""
        yield from page_lines(self.title, self.rows())

    def _repr_html_(self) -> str:
        return page_html(self.title, self.rows())


@dataclass(frozen=True, kw_only=True)
class CacheInfo(StoreInfo):
    """What is in an activation cache."""

    spec: ActivationSpec
    n_images_written: int
    groups: dict[str, dict[str, int]]  # column (label, disease) -> value -> images; empty until complete
    n_patients: int  # 0 where none is known
    unreadable: str  # how many images could not be read, in words; else empty
    truncated: str = ""  # how many images are cut off, in words; else empty

    def rows(self) -> dict[str, str]:
        """The named values of the page; of the runs the last five."""
        spec, n_written = self.spec, self.n_images_written
        rows = {
            "images": f"{spec.n_images:,}" + (f" ({n_written:,} written)" if n_written != spec.n_images else ""),
            "tokens": f"{spec.tokens_per_image} per image ({spec.token_layout}), {spec.width} channels, float16",
            "backbone": f"{spec.backbone}, {'trained' if spec.trained else 'UNTRAINED (seeded random weights)'}",
            "block": f"{spec.block} of 0..{spec.n_blocks - 1}, {spec.precision}",
            "weights": f"sha256 {spec.weights_sha256}",
            "transform": f"{spec.transform['size']} px, {spec.transform['interpolation']}, "
            f"mean {spec.transform.get('mean')}, std {spec.transform.get('std')}",
            "chunks": f"{spec.n_chunks:,} of {spec.chunk_images} images",
            "size": megabytes(self.n_bytes),
            "identity": self.header.identity,
            "written by": self.header.created_by,
        }
        for number, run in enumerate(self.runs, start=1):
            if number > len(self.runs) - _RUNS_SHOWN:
                rows[f"run {number}"] = _describe_run(run)
        for name, counts in self.groups.items():
            shown = [f"{value} {number:,}" for value, number in sorted(counts.items())]
            rows[name] = ", ".join(shown[:_GROUPS_SHOWN]) + (", ..." if len(shown) > _GROUPS_SHOWN else "")
        if self.n_patients:
            rows["patients"] = f"{self.n_patients:,}"
        return rows

    def lines(self) -> Iterator[str]:
        """The page of `cyto cache info`."""
        yield from super().lines()
        if self.unreadable:
            yield f"  {self.unreadable}"
        if self.truncated:
            yield f"  {self.truncated}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + (f"<p>{html.escape(self.unreadable)}</p>" if self.unreadable else "")

    def to_json(self) -> dict[str, Any]:
        """Header, images written, bytes and runs as plain JSON values."""
        written = {"n_images_written": self.n_images_written, "bytes": self.n_bytes, "runs": list(self.runs)}
        return {**self.header.to_json(), **written}


@dataclass(frozen=True, kw_only=True)
class LatentsInfo(StoreInfo):
    """What is in a latent store."""

    spec: LatentSpec
    missing: tuple[range, ...]  # images whose latents are not there; none if complete
    nnz: int | None  # nonzeros; None until complete
    nnz_per_token: float | None  # of a readable image

    def rows(self) -> dict[str, str]:
        """The named values of the page."""
        spec = self.spec
        nonzeros = "(not finished)"
        if self.nnz is not None:
            size = f", {self.n_bytes / self.nnz:.2f} bytes each" if self.n_bytes is not None and self.nnz else ""
            nonzeros = f"{self.nnz:,} ({self.nnz_per_token:.1f} per token of a readable image{size})"
        rows = {
            "images": f"{spec.n_images:,} x {spec.tokens_per_image} tokens",
            "latents": f"{spec.n_latents:,}, encoded in {spec.precision}",
            "nonzeros": nonzeros,
            "values": f"float32, {spec.value_bits} mantissa bits, "
            + pruning(spec.min_activation, self.header.summary or {}),
            "SAE": f"sha256 {spec.sae_sha256}",
            "cache": f"{spec.cache['backbone']}{'' if spec.cache['trained'] else ' (UNTRAINED)'}, "
            f"block {spec.cache['block']}, sha256 {spec.cache_sha256}",
            "size": megabytes(self.n_bytes),
            "identity": self.header.identity,
            "written by": self.header.created_by,
        }
        if not self.header.complete:
            missing = [f"images {images.start:,} to {images.stop - 1:,}" for images in self.missing]
            rows["missing"] = ", ".join(missing) or "nothing"
        return rows

    def to_json(self) -> dict[str, Any]:
        """Header, missing images, bytes and runs as plain JSON values."""
        facts = {"n_images_missing": sum(map(len, self.missing)), "bytes": self.n_bytes, "runs": list(self.runs)}
        return {**self.header.to_json(), **facts}


def _describe_run(run: dict[str, Any]) -> str:
    """One line of the run log; the log of another program may lack any of it."""
    by = f"shard {run['shard']}, " if "shard" in run else ""
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    where = f"{run.get('device')}, batches of {run.get('batch_size')}, {run.get('threads')} threads"
    return f"{run.get('time')}: {by}{where}; images in {run.get('images_root')}; {versions}"
