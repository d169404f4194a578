"""Runs the later blocks of the backbone on edited tokens, image by image, and says how the final CLS embedding moved.

Each batch has the unedited tokens in its first row: an edit is compared with what the very same computation gives
without it. An edit that changes no token is not run: its change is exactly 0. What was measured of some images is
written at once as a part file, so that an interrupted command goes on from there.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stores.errors import BadInput, DamagedStore
from stores.part_files import open_part, write_part
from stores.progress import Progress

from .cls_probe import ClsProbe
from .config import AblateConfig
from .edits import Subject, is_removed, is_single, new_column, random_direction
from .places import Bools, Ints, Places
from .plan import DIRECTION, Plan
from .readout import Floats, ProbeReadout
from .survey import LatentSource, Survey

CLS = ("cls_change", "cls_norm", "cls_cosine", "edit_norm", "cls_gain")  # see `quantities`
_IMAGES_PER_PART = 8
_BATCH_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of the widest activations of a block
_WIDEST = 4  # of a block's activations, in widths
Values = npt.NDArray[np.float64]
Outputs = Callable[[Ints], Iterator[tuple[int, npt.NDArray[np.floating]]]]


@dataclass(frozen=True)
class Bench:
    """All that an edit needs, but for the plan."""

    source: LatentSource
    outputs: Outputs  # (image index, its tokens at the block (T, D)), of rising images
    final_cls: Callable[[torch.Tensor], torch.Tensor]
    decoder: torch.Tensor  # (L, D) float32 on the device
    norms: Floats  # (L,) of its rows
    places: Places
    survey: Survey
    config: AblateConfig
    probe: ProbeReadout | None
    device: str
    owner_of: Ints  # (n_images,) the patient of each image
    cls_probe: ClsProbe | None = None

    @property
    def quantities(self) -> tuple[str, ...]:
        """What is said of an edit, with c and c' the final CLS embeddings before and after.

        cls_change: ||c' - c|| / ||c||; cls_norm: ||c' - c||; cls_cosine: 1 - cosine of c and c'; edit_norm: the norm
        of what is added to the tokens; cls_gain: cls_norm / edit_norm (0 of no edit), which does not depend on how well
        the norms of controls match; then of each class of the probe the change of its logit and its probability,
        and the same of the probe of the final CLS embedding (`cls_logit`, `cls_probability`).
        """
        return (*CLS, *_of_classes("", self.probe), *_of_classes("cls_", self.cls_probe))


def _of_classes(before: str, probe: ProbeReadout | ClsProbe | None) -> list[str]:
    classes = probe.classes if probe else []
    return [f"{before}{what}:{name}" for what in ("logit", "probability") for name in classes]


def measure(plan: Plan, bench: Bench, ranked: Ints, folder: Path, tag: str, *, progress: Progress) -> Values:
    """(n, quantities): what each edit of the plan changes; NaN where nothing can be said.

    Parameters
    ----------
    ranked : the chosen latents in the order of the curves
    folder, tag : of the part files: those that are there and have the tag are not measured again
    """
    found = np.full((len(plan), len(bench.quantities)), np.nan)
    images = plan.images
    missing: list[list[int]] = []
    for first in range(0, len(images), _IMAGES_PER_PART):
        some = images[first : first + _IMAGES_PER_PART].tolist()
        mine = slice(plan.of(some[0]).start, plan.of(some[-1]).stop)
        try:
            found[mine] = open_part(_part(folder, some[0]), tag, verify=True)["values"].reshape(found[mine].shape)
        except (DamagedStore, KeyError, ValueError):  # of an older cyto, too
            missing.append(some)
    wanted = np.array([image for some in missing for image in some], np.int64)
    n_done = len(images) - len(wanted)
    progress(n_done, len(images), "")
    subjects = zip(bench.outputs(wanted), bench.source.rows(wanted), strict=True)
    for some in missing:
        for image in some:
            (at, tokens), (also_at, rows) = next(subjects)
            assert at == also_at == image
            subject = Subject.of(rows, bench.places.mask(image))
            found[plan.of(image)] = edit_image(image, tokens, subject, plan, bench, ranked)
            n_done += 1
            progress(n_done, len(images), "")
        mine = slice(plan.of(some[0]).start, plan.of(some[-1]).stop)
        write_part(_part(folder, some[0]), tag, {"values": found[mine]})
    return found


def _part(folder: Path, image: int) -> Path:
    return folder / f"{image:09d}.part"


@torch.inference_mode()
def edit_image(
    image: int, tokens: npt.NDArray[np.floating], subject: Subject, plan: Plan, bench: Bench, ranked: Ints
) -> Values:
    """(edits of this image, quantities)."""
    mine = plan.of(image)
    x_TD = torch.as_tensor(np.asarray(tokens, np.float32), device=bench.device)
    values = np.full((mine.stop - mine.start, len(bench.quantities)), np.nan)
    size = max(1, _batch_images(x_TD, bench.device) - 1)
    waiting: list[tuple[int, torch.Tensor]] = []

    owner, cls_probe = int(bench.owner_of[image]), bench.cls_probe
    of_cls = len(bench.quantities) - (2 * len(cls_probe.classes) if cls_probe else 0)  # the first column of its classes

    def run() -> None:
        if waiting:
            some = [row for row, _ in waiting]
            embedded = embed_edits(x_TD, torch.stack([change for _, change in waiting]), bench.final_cls)
            values[some, :3] = moved = cls_moves(embedded)
            values[some, 4] = moved[:, 1] / values[some, 3]
            if cls_probe:
                logits = cls_probe.logits(owner, embedded)
                values[some, of_cls:] = _moves_of_classes(logits[:1], logits[1:])
            waiting.clear()

    before = bench.probe.logits(subject, subject.rows.values) if bench.probe else None
    for row, at in enumerate(range(mine.start, mine.stop)):
        change_TD, after = _change(image, subject, plan, at, bench, ranked)
        norm = float(change_TD.double().norm())
        values[row, : len(CLS)] = 0, 0, 0, norm, 0
        values[row, of_cls:] = 0
        if before is not None and after is not None:
            values[row, len(CLS) : of_cls] = _moves_of_classes(before[None], after[None])[0]
        if norm > 0:
            waiting.append((row, change_TD))
        if len(waiting) == size:
            run()
    run()
    return values


def _moves_of_classes(before: Floats, after: Floats) -> Floats:
    """(n, 2 classes): changes of logits, then of probabilities."""
    return np.concatenate([after - before, _softmax(after) - _softmax(before)], 1)


def _change(
    image: int, subject: Subject, plan: Plan, at: int, bench: Bench, ranked: Ints
) -> tuple[torch.Tensor, Floats | None]:
    """What an edit adds to the tokens (T, D), and the probe's logits after it."""
    role, what, number = int(plan.role[at]), int(plan.what[at]), int(plan.number[at])
    config, probe = bench.config, bench.probe
    if is_single(role):
        mean = float(bench.survey.mean[what])
        if role == DIRECTION:
            where = random_direction(what, number, float(bench.norms[what]), bench.decoder.shape[1], config.seed)
            direction = torch.from_numpy(where).to(bench.device)
        else:
            direction = bench.decoder[what]
        old, new = new_column(subject, what, config, mean)
        after = probe.logits_of_column(subject, what, new) if probe and role != DIRECTION else None
        return torch.outer(torch.from_numpy(new - old).to(bench.device), direction), after
    removed = is_removed(subject, image, role, what, number, ranked, bench.norms, config.seed)
    values = np.where(removed, np.float32(0), subject.rows.values)
    after = probe.logits(subject, values) if probe else None
    return -_decoded(subject, removed, bench), after


def _decoded(subject: Subject, some: Bools, bench: Bench) -> torch.Tensor:
    """(T, D): what some of the nonzeros, (nnz,), add to the tokens."""
    n_of_token = np.bincount(subject.tokens[some], minlength=len(subject.mask))
    return torch.nn.functional.embedding_bag(
        torch.from_numpy(subject.rows.indices[some].astype(np.int64)).to(bench.device),
        bench.decoder,
        torch.from_numpy(np.cumsum(n_of_token) - n_of_token).to(bench.device),
        mode="sum",
        per_sample_weights=torch.from_numpy(subject.rows.values[some]).to(bench.device),
    )


def embed_edits(
    x_TD: torch.Tensor, changes_NTD: torch.Tensor, final_cls: Callable[[torch.Tensor], torch.Tensor]
) -> Values:
    """(1 + N, width) float64: the final CLS embeddings of x, and of x + each change.

    Raises
    ------
    BadInput
        If an embedding is NaN or infinite.
    """
    embedded = final_cls(torch.cat([x_TD[None], x_TD + changes_NTD])).double().cpu()
    if not bool(torch.isfinite(embedded).all()):
        raise BadInput("a final CLS embedding became NaN or infinite: the edit is too large for the backbone")
    return np.asarray(embedded.numpy())


def cls_moves(embedded: Values) -> Values:
    """(N, 3): ||c' - c|| / ||c||, ||c' - c|| and 1 - cosine of c and c', of (1 + N, width): c, and the others."""
    c, others = embedded[0], embedded[1:]
    far, length = np.linalg.norm(others - c, axis=1), float(np.linalg.norm(c))
    cosine = others @ c / (np.linalg.norm(others, axis=1) * length)
    found: Values = np.stack([far / length, far, 1 - cosine], 1)
    return found


@torch.inference_mode()
def embed_images(images: Ints, bench: Bench, progress: Progress) -> Values:
    """(n, width): the final CLS embeddings of images that are not edited."""
    found = []
    for n_done, (_, tokens) in enumerate(bench.outputs(images), start=1):
        x_TD = torch.as_tensor(np.asarray(tokens, np.float32), device=bench.device)
        found.append(embed_edits(x_TD, x_TD.new_zeros(0, *x_TD.shape), bench.final_cls)[0])
        progress(n_done, len(images), "probe")
    return np.array(found)


def _batch_images(x_TD: torch.Tensor, device: str) -> int:
    """Images in a batch, the unedited one included."""
    return max(2, _BATCH_BYTES["cpu" if device == "cpu" else "cuda"] // (4 * _WIDEST * x_TD.numel()))


def _softmax(logits: Floats) -> Floats:
    """(n, classes)."""
    shares: Floats = np.exp(logits - logits.max(1, keepdims=True))
    found: Floats = shares / shares.sum(1, keepdims=True)
    return found


def seconds_per_edit(x_TD: torch.Tensor, final_cls: Callable[[torch.Tensor], torch.Tensor], device: str) -> float:
    """How long the later blocks take for one edit: a batch is run twice, and the second time is measured."""
    changes = torch.zeros(_batch_images(x_TD, device) - 1, *x_TD.shape, device=x_TD.device)
    with torch.inference_mode():
        embed_edits(x_TD, changes, final_cls)
        began = time.perf_counter()
        embed_edits(x_TD, changes, final_cls)
    return (time.perf_counter() - began) / len(changes)
