"""Encode an activation cache with an SAE into a latent store. Dense latents exist for one micro-batch at a time.

A micro-batch is encoded and made sparse on the device of the model (sparsify.py; on a GPU device_rows.py: there two
micro-batches are in memory at once). On the CPU, where few latents can be active, only these are computed
(sae/screen.py). Meanwhile a second thread appends and commits the rows of earlier micro-batches, in order, and further
threads compress whole chunks (stores/csr.py).
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import SaeRun, ScreenedEncoder, SparseAutoencoder, load_sae
from cytosae.training import float32_products, on_device
from stores.activation_store import ActivationStore
from stores.csr import CsrRows
from stores.destination import plan_output
from stores.devices import device_name, memory_told, resolve_device
from stores.doors import make_callable
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.latent_parts import committed_images, missing_images
from stores.latent_shards import (
    complete_latents,
    copy_part,
    left_overs,
    next_part,
    open_writer,
    remove_left_overs,
    remove_part,
)
from stores.latent_spec import LatentSpec, shard_images
from stores.latent_store import LatentStore
from stores.latent_writer import LatentWriter
from stores.progress import Progress
from stores.runlog import append_run
from stores.shards import ONE_WRITER, Shard
from stores.spec import LATENTS, Header, new_header, read_header, require_unchanged, stated
from stores.tables import table_sha256
from stores.wording import Report

from .device_rows import TOKEN_NOT_FINITE, DeviceCompactor, SelectedRows
from .settings import check_encoding
from .sparse_rows import Rounding, SparseRows
from .sparsify import Compactor, rows_of_active

# size of one dense (tokens, latents) float32 matrix; larger ones are not faster (docs/log.md)
_MICRO_BATCH_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
_MOST_WAITING = 4  # micro-batches of rows that wait to be written
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodeResult(Report):
    """Content of the finished latent store, or of a finished shard of it."""

    out: Path  # the store
    shard: str  # of the command, such as 0/1
    spec: LatentSpec
    nnz: int  # stored values, of the whole store or of the shard
    n_dropped: int  # values that were not stored, since they are below `min_activation`
    n_readable: int  # readable images, of the whole store or of the shard
    was_complete: bool  # True: the store existed already
    is_complete: bool = True  # False: other shards are not finished yet

    def lines(self) -> Iterator[str]:
        """What the store holds; or that other shards are missing."""
        if self.is_complete:
            yield LatentStore(self.out).line(self.out)
            return
        yield (
            f"{self.out}: shard {self.shard} is done, {self.n_readable:,} readable images; other shards are not, or "
            f"are being joined. The last one completes the store; if all have ended: cyto latents merge {self.out}"
        )

    @property
    def l0(self) -> float:
        """Mean number of active latents per token of a readable image, stored or dropped."""
        return (self.nnz + self.n_dropped) / max(1, self.n_readable * self.spec.tokens_per_image)

    @property
    def stored_per_token(self) -> float:
        """Mean number of stored latents per token of a readable image; equal to `l0` if nothing is pruned."""
        return self.nnz / max(1, self.n_readable * self.spec.tokens_per_image)


def encode(
    cache: Path | str,
    run: Path | str,
    latents: Path | str,
    *,
    value_bits: int = 10,
    min_activation: float = 0.0,
    precision: str = "fp32",
    device: str = "auto",
    shard: Shard = ONE_WRITER,
    batch_size: int | None = None,
    assume_compatible: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> EncodeResult:
    """Write (or continue) the latents of every token of `cache` (a path or a URL) under the SAE `run` at `latents`.

    Memory: dense latents of one micro-batch (256 MiB; on a GPU of two, 1 GiB of its memory), one chunk of the cache,
    the nonzeros of a few micro-batches, a few chunks of rows, and on the CPU a quarter of the encoder's matrix.

    Parameters
    ----------
    value_bits : mantissa bits that are kept of each value: 10, or 23 (all)
    min_activation : rounded values below it are not stored, >= 0; barcodes at a tau of at least this do not change
    precision : of the encoder product, fp32 or bf16. bf16: operands and results are rounded to bfloat16, sums are
        float32
    shard : the images that this process encodes; the last process to finish joins the shards and completes the store
    batch_size : images that are encoded together, at least 1; None: as many as fit the memory above. It changes speed
        and memory, and the last bits of latents; it is logged and not in the identity
    assume_compatible : accept an imported SAE, which does not say which tokens it was trained on

    Raises
    ------
    SpecMismatch
        If the SAE was trained on another kind of tokens or does not say on which, or `latents` holds something else.
    DamagedStore
        If a token of a readable image is NaN or infinite, or a chunk of the cache is damaged.
    BadInput
        If an argument is out of range, a latent is NaN or infinite, or another process writes the same images.
    OutOfMemory
        If memory is not enough for the SAE or the batch size.
    """
    check_encoding(value_bits=value_bits, min_activation=min_activation, precision=precision)
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"batch_size must be at least 1; found {batch_size}")
    if overwrite and not shard.is_only:
        raise BadInput("a shard cannot overwrite what other shards may be writing; remove the old store, or name a new")
    device = resolve_device(device)
    run, latents, min_activation = Path(run), Path(latents), float(min_activation)
    with memory_told("The SAE itself does not fit: take a GPU with more free memory, or --device cpu"):
        store, sae = ActivationStore(cache), load_sae(run, device=device)
    assumed = sae.require_tokens(store.spec, f"the cache {cache}", assume_compatible=assume_compatible)
    spec = _make_spec(store, sae, value_bits, min_activation, precision)
    inputs = (store.root, run) if isinstance(store.root, Path) else (run,)
    output = plan_output(latents, new_header(LATENTS, spec.to_dict()), overwrite=overwrite, inputs=inputs, shared=True)
    sae.warn_of_precision(store.spec)
    n_readable = int(store.readable().sum())
    if output.is_complete:
        if left_overs(output.work):
            complete_latents(output.work)
        output.publish()
        LatentStore(latents)  # a damaged one is not "already complete"
        return _result(latents, shard, read_header(latents, LATENTS), n_readable, was_complete=True)

    root = output.work
    facts: dict[str, Any] = {"assumed_equal": assumed} if assumed else {}
    nnz = n_dropped = 0
    with ExitStack() as stack:
        writer = open_writer(stack, root, spec, store.images, shard)
        append_run(
            root,
            packages=("torch", "numpy", "zarr"),
            shard=shard,
            cache=str(store.root),
            sae=str(run.absolute()),
            device=device_name(device),
            threads=torch.get_num_threads(),
            **({"batch_size": batch_size} if batch_size else {}),
            **facts,
        )
        if shard.is_only or committed_images(root) < writer.images.stop:
            _fill(writer, store, sae.model, device, batch_size, progress)
            require_unchanged(sae.header, store.header)
            header = writer.finish()
            nnz, n_dropped = writer.nnz, writer.n_dropped
        if shard.is_only:
            remove_left_overs(root)
        else:
            header = None if missing_images(root, spec) else complete_latents(root, progress=progress)
    if header is None:
        own = shard_images(spec, shard)
        return EncodeResult(
            out=latents,
            shard=str(shard),
            spec=spec,
            nnz=nnz,
            n_dropped=n_dropped,
            n_readable=int(store.readable()[own.start : own.stop].sum()),
            was_complete=False,
            is_complete=False,
        )
    output.publish()
    return _result(latents, shard, header, n_readable, was_complete=False)


def encode_image(tokens: npt.NDArray[np.float16], sae: SaeRun, spec: LatentSpec) -> CsrRows:
    """The rows of a latent store with `spec` for one image, tokens (T, D): same precision, rounding and pruning.

    Equal to the stored rows up to the last bits, which depend on the number of tokens that are encoded together, and on
    the device, which is that of `sae`.

    Raises
    ------
    SpecMismatch
        If the store was made with another SAE.
    BadInput
        If a latent is NaN or infinite.
    """
    if sae.sha256 != spec.sae_sha256:
        raise SpecMismatch(
            f"the latents were made with the SAE of sha256 {spec.sae_sha256[:12]}…, found {sae.sha256[:12]}…; give the "
            f"folder of the run that they were encoded with"
        )
    device, rounding = str(sae.model.W_enc.device), Rounding(spec.value_bits, spec.min_activation)
    with _Encoder(sae.model, rounding, spec.precision, device, most_rows=len(tokens)) as encoder:
        x = torch.from_numpy(np.array(tokens)).to(encoder.device)
        rows = encoder.begin(x, np.ones(1, bool), len(tokens))().rows()
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows.lengths)])
    return CsrRows(rows.indices, rows.values, indptr)


def _fill(
    writer: LatentWriter,
    store: ActivationStore,
    model: SparseAutoencoder,
    device: str,
    batch_size: int | None,
    progress: Progress,
) -> None:
    """Append what the writer lacks: rows of parts that other writers have finished, and all the rest encoded."""
    n_own, n_before = len(writer.images), writer.images.start
    progress(writer.n_images - n_before, n_own, "")
    while writer.n_images < writer.images.stop:
        part = next_part(writer.root, writer) if n_own == writer.spec.n_images else None
        if part is not None and part.images.start <= writer.n_images:
            for done in copy_part(part, writer):
                progress(done, n_own, "joining")
            remove_part(part)
        else:
            stop = writer.images.stop if part is None else part.images.start
            _encode_until(
                stop,
                writer,
                store,
                model,
                device,
                batch_size,
                lambda done, word: progress(done - n_before, n_own, word),
            )


def _encode_until(
    stop: int,
    writer: LatentWriter,
    store: ActivationStore,
    model: SparseAutoencoder,
    device: str,
    batch_size: int | None,
    report: Callable[[int, str], None],
) -> None:
    """Encode images from the writer's position to `stop`; both are the first image of a chunk, or the end."""
    spec, is_readable = writer.spec, store.readable()
    n_bytes = 4 * spec.n_latents * spec.tokens_per_image
    n_together = batch_size or max(1, _MICRO_BATCH_BYTES["cpu" if device == "cpu" else "cuda"] // n_bytes)
    first_chunk = -(-writer.n_images // store.spec.chunk_images)
    micro_batches = [
        range(rows.start + some.start, rows.start + some.stop)
        for rows in map(store.spec.chunk_rows, range(first_chunk, store.spec.n_chunks))
        if rows.start < stop
        for some in _equal_parts(len(rows), n_together)
    ]

    def readable_tokens() -> Generator[npt.NDArray[np.float16], None, None]:
        for rows, tokens in store.iter_chunks(first=first_chunk):
            if rows.start >= stop:
                return
            for some in _equal_parts(len(rows), n_together):
                yield tokens[some][is_readable[rows.start : rows.stop][some]].reshape(-1, store.spec.width)

    n_tokens, most_images = spec.tokens_per_image, max(map(len, micro_batches), default=0)
    begun: deque[tuple[range, Callable[[], SelectedRows]]] = deque()
    with ExitStack() as stack:
        stack.enter_context(memory_told(_less_memory(most_images)))
        if device != "cpu":  # else pinned memory belongs to GPU 0
            stack.enter_context(torch.cuda.device(device))
        writing = _RowWriting(writer, store.spec.chunk_images, stack.enter_context(_in_order(_MOST_WAITING)), report)
        rounding = Rounding(spec.value_bits, spec.min_activation)
        encoder = stack.enter_context(
            _Encoder(
                model, rounding, spec.precision, device, most_rows=most_images * n_tokens, screen=ScreenedEncoder(model)
            )
        )
        source = stack.enter_context(closing(readable_tokens()))
        coming = on_device(source, device)
        if isinstance(coming, Generator):  # its thread reads `source`, so it ends first
            stack.enter_context(closing(coming))

        for images, tokens in zip(micro_batches, coming, strict=True):
            begun.append((images, encoder.begin(tokens, is_readable[images.start : images.stop], n_tokens)))
            if len(begun) > encoder.n_ahead:
                writing.write(*begun.popleft())
        while begun:
            writing.write(*begun.popleft())


class _RowWriting:
    """Hands the rows of micro-batches to the writer, in a thread, in order; commits at the end of each chunk."""

    def __init__(
        self,
        writer: LatentWriter,
        chunk_images: int,
        submit_in_order: Callable[..., None],
        report: Callable[[int, str], None],
    ) -> None:
        self._writer, self._chunk_images, self._submit, self._report = writer, chunk_images, submit_in_order, report
        self._nnz = writer.nnz
        self._n_rows = (writer.n_images - writer.images.start) * writer.spec.tokens_per_image

    def write(self, images: range, select: Callable[[], SelectedRows]) -> None:
        """The rows of the next images; blocks while too many wait to be written."""
        selected = select()
        self._submit(self._append, selected)
        self._nnz, self._n_rows = self._nnz + selected.nnz, self._n_rows + selected.n_rows
        self._report(images.stop, f"{self._nnz / self._n_rows:.1f} active per token")
        if images.stop == self._writer.spec.n_images or images.stop % self._chunk_images == 0:  # the end of a chunk
            self._submit(self._writer.commit, images.stop)

    def _append(self, selected: SelectedRows) -> None:
        made = selected.rows()
        self._writer.append_tokens(made.indices, made.values, made.lengths, n_dropped=made.n_dropped)


def _less_memory(n_together: int) -> str:
    """What to type when memory has run out."""
    if n_together > 1:
        return (
            f"Run the same command with --batch-size {n_together // 2} (now {n_together}); images that were "
            f"encoded and committed stay"
        )
    return "The latents of one image do not fit: take a GPU with more free memory, or --device cpu"


def _equal_parts(n: int, at_most: int) -> list[slice]:
    """0..n in slices of about equal length, at most `at_most`: a product of few rows is slow.

    The slices depend on the arguments only, since the last bits of a product depend on its number of rows.
    """
    n_parts = -(-n // at_most)
    return [slice(part * n // n_parts, (part + 1) * n // n_parts) for part in range(n_parts)]


class _Encoder:
    """Encodes tokens of some images to sparse rows, on one device."""

    def __init__(
        self,
        model: SparseAutoencoder,
        rounding: Rounding,
        precision: str,
        device: str,
        *,
        most_rows: int,
        screen: ScreenedEncoder | None = None,
    ) -> None:
        """`most_rows`: the largest number of tokens that are encoded together; `screen`: worth it for many of these."""
        self._model, self.device, self._is_low = model, torch.device(device), precision == "bf16"
        self._on_gpu = self.device.type != "cpu"
        # micro-batches that are begun before the one before is selected
        self.n_ahead = 1 if self._on_gpu else 0
        self._host, self._rounding = Compactor(model.n_latents, rounding), rounding
        self._gpu = DeviceCompactor(rounding, self.device)
        self._dense = None if self._on_gpu or self._is_low else torch.empty(most_rows, model.n_latents)
        self._screen = None if self._dense is None else screen

    def __enter__(self) -> "_Encoder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._host.close()

    @torch.inference_mode()
    def begin(
        self, tokens: torch.Tensor, is_readable: npt.NDArray[np.bool_], n_tokens: int
    ) -> Callable[[], SelectedRows]:
        """The rows of some images; on a GPU they are only begun, and found by the function that is returned.

        Parameters
        ----------
        tokens : of the readable ones among the images, (n * n_tokens, D) float16, on the device
        is_readable : of every image; unreadable images get empty rows

        Raises (here, or when the returned function is called)
        ------
        DamagedStore
            If a token is not finite.
        BadInput
            If a latent is not finite.
        """
        x, n_rows = tokens.float(), len(is_readable) * n_tokens
        if not len(x):
            none = SparseRows(np.empty(0, np.uint16), np.empty(0, np.float32), np.zeros(n_rows, np.int64), 0)
            return lambda: SelectedRows(0, n_rows, lambda: none)
        if not self._on_gpu and not bool(torch.isfinite(x).all()):
            raise DamagedStore(TOKEN_NOT_FINITE)
        found = None
        if self._screen is not None and self._dense is not None:
            found = self._screen.latents(x, self._dense[: len(x)])
        if self._on_gpu:
            select = self._gpu.count(self._dense_latents(x), x)
        else:
            if found is not None:
                made = rows_of_active(found, self._rounding)
            else:
                made = _joined(self._host.rows(self._dense_latents(x)))
            select = partial(SelectedRows, len(made.values), len(made.lengths), lambda: made)

        def all_rows() -> SelectedRows:
            selected = select()
            return SelectedRows(selected.nnz, n_rows, lambda: _with_unreadable(selected.rows(), is_readable, n_tokens))

        return all_rows

    def _dense_latents(self, x_BD: torch.Tensor) -> torch.Tensor:
        """(B, L) float32 (relu on a GPU: the product's type): latents, and at most 0 where one is not active."""
        device = self.device.type
        with float32_products("fp32", device), torch.autocast(device, torch.bfloat16, enabled=self._is_low):
            p_BL = self._model.pre_activations(x_BD, out=None if self._dense is None else self._dense[: len(x_BD)])
        if self._model.activation != "relu" or not self._on_gpu:  # ReLU needs no other type to be told from 0
            p_BL = p_BL.float()
        return self._model.keep_active_(p_BL)


def _joined(pieces: list[SparseRows]) -> SparseRows:
    return SparseRows(
        np.concatenate([piece.indices for piece in pieces]),
        np.concatenate([piece.values for piece in pieces]),
        np.concatenate([piece.lengths for piece in pieces]),
        sum(piece.n_dropped for piece in pieces),
    )


def _with_unreadable(rows: SparseRows, is_readable: npt.NDArray[np.bool_], n_tokens: int) -> SparseRows:
    """The rows of readable images, and empty ones where an image is unreadable."""
    lengths = np.zeros((len(is_readable), n_tokens), np.int64)
    lengths[is_readable] = rows.lengths.reshape(-1, n_tokens)
    return replace(rows, lengths=lengths.reshape(-1))


@contextmanager
def _in_order(n_waiting: int) -> Iterator[Callable[..., None]]:
    """A function that runs jobs in one thread, in order, and blocks while `n_waiting` jobs wait.

    An error in a job is raised by a later call, or at the end; no job after it is run.
    """
    waiting: deque[Future[None]] = deque()
    has_failed = False

    def call(job: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        nonlocal has_failed
        if not has_failed:
            try:
                job(*args, **kwargs)
            except BaseException:
                has_failed = True
                raise

    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:

        def submit_in_order(job: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            while waiting and (waiting[0].done() or len(waiting) >= n_waiting):
                waiting.popleft().result()
            waiting.append(thread.submit(call, job, *args, **kwargs))

        yield submit_in_order
        while waiting:
            waiting.popleft().result()


def _make_spec(
    store: ActivationStore, sae: SaeRun, value_bits: int, min_activation: float, precision: str
) -> LatentSpec:
    return LatentSpec(
        sae_sha256=sae.sha256,
        cache_sha256=store.content_sha256,
        cache=store.spec.to_dict(),
        images_sha256=table_sha256(store.images),
        n_images=store.spec.n_images,
        tokens_per_image=store.spec.tokens_per_image,
        n_latents=sae.model.n_latents,
        precision=precision,
        value_bits=value_bits,
        min_activation=float(min_activation),
    )


def _result(out: Path, shard: Shard, header: Header, n_readable: int, *, was_complete: bool) -> EncodeResult:
    summary: dict[str, Any] = header.summary or {}
    return EncodeResult(
        out=out,
        shard=str(shard),
        spec=stated(LatentSpec, header.spec, "the latents"),
        nnz=summary["nnz"],
        n_dropped=summary.get("n_dropped", 0),
        n_readable=n_readable,
        was_complete=was_complete,
    )


make_callable(__name__, "encode")  # cytosae.latents.encode(...)
