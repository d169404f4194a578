"""Is an SAE fit for barcodes? A few figures, each with its healthy range, and what to type where one is outside.

The ranges, and where they come from: docs/training.md, "Is the SAE fit for barcodes?". They are about barcodes, which
count how often a latent is active: an SAE may reconstruct almost everything and still be worthless for that.
No torch here: `cyto sae info` shows what was stored.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from stores.errors import DamagedStore
from stores.files import read_json, sha256_json, write_json
from stores.header_kinds import check_kinds
from stores.wording import Report, printable

if TYPE_CHECKING:
    from .substitution import Substitution

FORMAT, VERSION, FILE = "SAE health", 1, "health.json"
NEARLY_ALL = 0.9  # share of the images from which on a latent is active in nearly every image
LEAST_L0, MOST_L0_PER_CHANNEL, MOST_L0_PER_LATENT = 4.0, 0.25, 0.05
MOST_EVERYWHERE = 0.25  # of the latents that are not dead: active in nearly every image
MOST_DEAD = 0.6  # the paper's SAE has 0.57 (docs/reference/paper.md 1.3)
LEAST_EXPLAINED = 0.5  # of the variance about the mean token, which itself explains 0
LEAST_RECOVERED = 0.5  # of the way from the mean token's final CLS to the untouched one


@dataclass(frozen=True, kw_only=True)
class HealthRow:
    """One figure."""

    name: str
    value: float | None  # None: not known, for instance without variance
    low: float | None  # healthy from here ...
    high: float | None  # ... to here; None: no limit
    is_healthy: bool | None  # None: not known
    says: str  # the figure in words, and what it means
    next: str  # what to type where it is out of range; else empty
    is_needed: bool = (
        True  # False: out of range it is a waste, or could be better, and barcodes may be good all the same
    )
    error: float | None = None  # two standard errors of the value, where a sample was measured; None: not known

    @property
    def healthy(self) -> str:
        """The healthy range in words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:.3g} to {self.high:.3g}"
        if self.low is not None:
            return f"at least {self.low:.3g}"
        return "not known" if self.high is None else f"at most {self.high:.3g}"


@dataclass(frozen=True)
class SampleErrors:
    """Two standard errors of what was measured on a sample of the images; NaN for what is not known."""

    l0: float
    everywhere: float
    dead: float
    explained_variance: float


@dataclass(frozen=True, kw_only=True)
class Health(Report):
    """Figures of an SAE on the tokens of a cache, each judged by its healthy range."""

    sae_sha256: str
    cache_sha256: str  # of the cache; of several, the SHA-256 of the list of theirs
    token_set: str
    n_images: int  # that were measured on
    n_images_in_all: int  # readable images; more than `n_images` where a sample was taken
    n_tokens: int
    rows: tuple[HealthRow, ...]

    kinds: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("sae_sha256", "cache_sha256", "token_set"), str),
        **dict.fromkeys(("n_images", "n_images_in_all", "n_tokens"), int),
        "rows": [
            {
                **dict.fromkeys(("name", "says", "next"), str),
                **dict.fromkeys(("value", "low", "high"), (int, float, NoneType)),
                "is_healthy": (bool, NoneType),
                "is_needed": bool,
                "error": (int, float, NoneType),  # not there in files of before
            }
        ],
    }

    @property
    def is_fit(self) -> bool:
        """No needed figure that is known is out of its range."""
        return not any(row.is_needed for row in self.out_of_range)

    @property
    def out_of_range(self) -> tuple[HealthRow, ...]:
        """The figures that are."""
        return tuple(row for row in self.rows if row.is_healthy is False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """That it is not fit, and for what reason."""
        if self.is_fit:
            return ()
        bad = [printable(row.name) for row in self.out_of_range if row.is_needed]
        return (f"this SAE is not fit for barcodes: {', '.join(bad)} out of range",)

    def lines(self) -> Iterator[str]:
        """The verdict, then a line for each figure, and below it what to type next."""
        n_bad = sum(row.is_needed for row in self.out_of_range)
        verdict = "fit for barcodes" if self.is_fit else f"NOT fit for barcodes, {n_bad} out of range"
        if n_better := len(self.out_of_range) - n_bad:
            verdict += f", {n_better} could be better"
        of = f" of {self.n_images_in_all:,}" if self.n_images < self.n_images_in_all else ""
        how = "; ±: two standard errors of this sample" if any(row.error is not None for row in self.rows) else ""
        yield f"health: {verdict} (measured on {self.n_images:,}{of} images, {self.n_tokens:,} tokens){how}"
        for row in self.rows:
            mark = {True: "ok ", False: "OUT" if row.is_needed else "!  ", None: "?  "}[row.is_healthy]
            yield f"  {mark} {printable(row.name):<12} {printable(row.says)}; healthy: {row.healthy}"
            if row.next:
                yield f"      {'':<12} next: {printable(row.next)}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the verdict."""
        rows = [{**asdict(row), "healthy": row.healthy} for row in self.rows]
        return {**{name: getattr(self, name) for name in self.kinds}, "rows": rows, "is_fit": self.is_fit}


class Figures(Protocol):
    """What is judged, as an `Evaluation` has it; L latents."""

    @property
    def sae_sha256(self) -> str: ...
    @property
    def cache_sha256(self) -> str: ...
    @property
    def token_set(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def n_latents(self) -> int: ...
    @property
    def n_images(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def l0(self) -> float: ...
    @property
    def n_images_active(self) -> npt.NDArray[np.int64]: ...
    @property
    def explained_variance(self) -> float: ...
    @property
    def n_pca(self) -> int: ...
    @property
    def pca_explained_variance(self) -> float: ...
    @property
    def substitution(self) -> "Substitution | None": ...


def assess_health(found: Figures, *, n_images_in_all: int | None = None, errors: SampleErrors | None = None) -> Health:
    """Judge what was measured: L0, latents that are active everywhere, dead latents, what is explained, final CLS.

    Parameters
    ----------
    found : of `cytosae.evaluate`; with a `BackboneSample` the final CLS is judged too
    n_images_in_all : readable images, where `found` is of a sample of them
    errors : of that sample, where they are known

    Returns
    -------
    A row for each figure. Ranges: docs/training.md.
    """
    everywhere = share_everywhere(found.n_images_active, found.n_images)
    how = _Settings(found.activation, found.width, found.n_latents)
    rows = [_l0(found, how), _everywhere(everywhere, how), _dead(found), _explained(found, how), _pca(found, how)]
    if errors is not None:
        rows = [*_with_errors(rows, errors, found.n_images)]
    if found.substitution is not None:
        rows.append(_final_cls(found.substitution.recovered_from_mean))
    return Health(
        sae_sha256=found.sae_sha256,
        cache_sha256=found.cache_sha256,
        token_set=found.token_set,
        n_images=found.n_images,
        n_images_in_all=n_images_in_all or found.n_images,
        n_tokens=found.n_tokens,
        rows=tuple(rows),
    )


def share_everywhere(n_images_active: npt.NDArray[np.int64], n_images: int) -> float:
    """Of the latents that are not dead, the share that is active in nearly every image; NaN if all are dead."""
    alive = n_images_active[n_images_active > 0]
    least = math.ceil(round(NEARLY_ALL * n_images, 6))
    return float((alive >= least).mean()) if len(alive) else math.nan


def _with_errors(rows: list[HealthRow], errors: SampleErrors, n_images: int) -> Iterator[HealthRow]:
    """The rows with the errors of their figures, in words and for programs."""
    missed = (
        f"; a latent that is active in fewer than 1 of {n_images // 3:,} images may be missed"  # 95%: rule of three
    )
    of = {
        "L0": (errors.l0, f" ± {errors.l0:.2g}"),
        "everywhere": (errors.everywhere, f" ± {errors.everywhere:.1%}"),
        "dead": (errors.dead, f" ± {errors.dead:.1%}{missed}"),
        "explained": (errors.explained_variance, f" ± {errors.explained_variance:.2g}"),
    }
    for row in rows:
        error, words = of.get(row.name, (math.nan, ""))
        is_known = row.value is not None and not math.isnan(error)
        yield replace(row, says=f"{row.says}{words}", error=error) if is_known else row


def healthy_l0(width: int, n_latents: int) -> tuple[float, float]:
    """From which L0 to which an SAE is fit for barcodes, by the width of its tokens and its number of latents."""
    return LEAST_L0, max(2 * LEAST_L0, min(MOST_L0_PER_CHANNEL * width, MOST_L0_PER_LATENT * n_latents))


@dataclass(frozen=True)
class _Settings:
    """Of an SAE: how its L0 is changed."""

    activation: str
    width: int
    n_latents: int

    @property
    def good_l0(self) -> int:
        """The geometric middle of the healthy range, for what to type next."""
        low, high = healthy_l0(self.width, self.n_latents)
        return round(math.sqrt(low * high))

    @property
    def option(self) -> str:
        name = "--k" if self.activation in ("topk", "batchtopk") else "--target-l0"
        return f"cyto sae train with {name} {self.good_l0}"


def _row(
    name: str,
    value: float,
    says: str,
    next: str,
    *,
    low: float | None = None,
    high: float | None = None,
    is_needed: bool = True,
) -> HealthRow:
    is_healthy = None
    if not math.isnan(value):
        is_healthy = (low is None or value >= low) and (high is None or value <= high)
    return HealthRow(
        name=name,
        value=None if is_healthy is None else value,
        low=low,
        high=high,
        is_healthy=is_healthy,
        says="not known" if is_healthy is None else says,
        next=next if is_healthy is False else "",
        is_needed=is_needed,
    )


def _l0(found: Figures, how: _Settings) -> HealthRow:
    says = (
        f"{found.l0:.1f} latents active per token, of width {how.width:,} and {how.n_latents:,} latents "
        f"({found.l0 / how.n_latents:.1%})"
    )
    low, high = healthy_l0(how.width, how.n_latents)
    too_many = found.l0 > high
    means = ": so many that every image shows nearly all of them" if too_many else ""
    means = ": too few to say what a token shows" if found.l0 < low else means
    return _row("L0", found.l0, says + means, f"{how.option}, a new -o", low=low, high=high)


def _everywhere(share: float, how: _Settings) -> HealthRow:
    says = f"{share:.1%} of the living latents are active in {NEARLY_ALL:.0%} of the images or more"
    next = f"{how.option}, a new -o; or count their strong places only: cyto barcode --tau auto"
    return _row("everywhere", share, says, next, high=MOST_EVERYWHERE)


def _dead(found: Figures) -> HealthRow:
    share = float((found.n_images_active == 0).mean())
    says = f"{share:.1%} of {found.n_latents:,} latents are active nowhere"
    next = "cyto sae train with a smaller --expansion, more --tokens, or --dead-latents auxk, a new -o"
    return _row("dead", share, says, next, high=MOST_DEAD, is_needed=False)


def _explained(found: Figures, how: _Settings) -> HealthRow:
    says = f"{found.explained_variance:.3f} of the variance about the mean token (the mean alone: 0)"
    next = f"cyto sae train with more --tokens, or {how.option.removeprefix('cyto sae train with ')}, a new -o"
    return _row("explained", found.explained_variance, says, next, low=LEAST_EXPLAINED)


def _pca(found: Figures, how: _Settings) -> HealthRow:
    n = found.n_pca
    low = found.pca_explained_variance
    says = f"{found.explained_variance:.3f} against {low:.3f} of PCA with L0 components ({n:,})"
    next = f"cyto sae train with more --tokens, a larger --lr, or {how.option.removeprefix('cyto sae train with ')}"
    value = math.nan if math.isnan(low) else found.explained_variance
    low_or_none = None if math.isnan(low) else low
    return _row("against PCA", value, says, f"{next}, a new -o", low=low_or_none, is_needed=False)


def _final_cls(recovered: float) -> HealthRow:
    says = f"{recovered:.3f} recovered against the mean token (1: as without the SAE)"
    next = "cyto sae train with more --tokens or a larger --expansion, a new -o"
    return _row("final CLS", recovered, says, next, low=LEAST_RECOVERED)


# ------------------------------------------------------------------------------------------- beside the SAE


def write_health(run: Path | str, health: Health) -> Path:
    """Keep it in the folder of the SAE, as `health.json`; what was measured on other caches stays. Returns the file."""
    run = Path(run)
    known = [each for each in _entries(run) if each.get("cache_sha256") != health.cache_sha256]
    entries = [*known[-15:], health.to_json()]
    content = {"format": FORMAT, "format_version": VERSION, "measured": entries}
    write_json(run / FILE, {**content, "sha256": sha256_json(content)})
    return run / FILE


def read_health(run: Path | str, *, sae_sha256: str | None = None, cache_sha256: str | None = None) -> Health | None:
    """What was kept last in the folder of an SAE; None if there is nothing of these weights, or of this cache.

    Raises
    ------
    DamagedStore
        If the file is not what was written.
    """
    run = Path(run)
    for entry in reversed(_entries(run)):
        if sae_sha256 not in (None, entry["sae_sha256"]) or cache_sha256 not in (None, entry["cache_sha256"]):
            continue
        try:
            rows = tuple(
                HealthRow(**{name: {"error": None, **row}[name] for name in HealthRow.__dataclass_fields__})
                for row in entry["rows"]
            )
            return Health(**{**{name: entry[name] for name in Health.kinds}, "rows": rows})
        except (KeyError, TypeError):
            raise DamagedStore(f"{run / FILE} lacks figures: {_AGAIN}") from None
    return None


_AGAIN = "it only repeats what cyto sae eval --keep measures; remove it, or measure again"


def _entries(run: Path) -> list[dict[str, Any]]:
    path = run / FILE
    if not path.is_file():
        return []
    try:
        said = read_json(path)
        is_ours = isinstance(said, dict) and said.get("format") == FORMAT and said.get("format_version") == VERSION
        if not is_ours or said.get("sha256") != sha256_json({k: v for k, v in said.items() if k != "sha256"}):
            raise ValueError("its hash does not fit")
        entries: list[dict[str, Any]] = said["measured"]
        check_kinds(entries, [{**Health.kinds}], "measured", path)
        if any(name not in entry for entry in entries for name in Health.kinds):
            raise ValueError("a figure is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStore(f"{path} is not what was written ({error}): {_AGAIN}") from None
    return entries
