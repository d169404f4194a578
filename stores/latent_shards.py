"""Several writers of one latent store: each writes the rows of its own images; joining them needs no model.

A writer's part is the folder `part-I-of-N/` in the store, with rows and a journal of its own. Chunk boundaries of the
whole store differ from those of the parts, so joining decodes, checks and encodes every row once. The result equals,
byte for byte, that of a single writer. A part is removed when its rows are committed to the whole store.
"""

import shutil
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pyarrow as pa

from .activation_writer import MergeResult, overlapping_writer, writer_lock
from .csr import CsrCommit, CsrReader, CsrRows, check_chunk
from .destination import claimed
from .errors import BadInput, DamagedStore, IncompleteStore, SpecMismatch
from .files import LOCK_SUFFIX, locked, sync_folder
from .latent_parts import LatentPart, finished_parts, missing_images
from .latent_spec import LatentSpec, part_folder, read_latent_spec
from .latent_store import LatentStore
from .latent_writer import LatentWriter
from .machine import n_cores
from .progress import Progress
from .runlog import shard_logs
from .shards import Shard
from .spec import LATENTS, Header, read_header
from .tables import listed, read_image_table

_MOST_READERS = 4  # threads that read rows which are joined; each holds the rows of one chunk of the cache


def open_writer(stack: ExitStack, root: Path, spec: LatentSpec, images: pa.Table, shard: Shard) -> LatentWriter:
    """The only writer of this shard while `stack` is open.

    Raises
    ------
    BadInput
        If another process is writing the same images, or joining the parts.
    DamagedStore
        If committed rows are missing or damaged.
    """
    root.mkdir(parents=True, exist_ok=True)
    other: Shard | None = shard
    if stack.enter_context(locked(writer_lock(root, shard))):
        other = overlapping_writer(root, shard, -(-spec.n_images // int(spec.cache["chunk_images"])))
    what = root if other is None or other.is_only else f"shard {other} of {root}"
    # a writer of all rows excludes joining, which writes the same rows
    is_free = stack.enter_context(locked(_finish_lock(root))) if shard.is_only else _is_free(_finish_lock(root))
    if other is not None or not is_free:
        raise BadInput(f"another process is writing {what} at this moment; wait until it ends, or stop it")
    for folder in (root, root.parent):
        sync_folder(folder)
    try:
        writer = LatentWriter(root, spec, images, shard)
    except DamagedStore as error:
        if shard.is_only:
            raise
        raise DamagedStore(f"{error}, or remove {part_folder(root, shard)} and run the same command again") from None
    stack.callback(writer.close)
    return writer


def copy_part(part: LatentPart, writer: LatentWriter) -> Iterator[int]:
    """Append the missing rows of a part to the whole store, one commit for each of the part's; yields images done.

    Rows are read and checked some commits ahead, in threads: a single one would be slower than several GPUs.

    Raises
    ------
    DamagedStore
        If the part is damaged: it has to be made again.
    """
    tokens, first = writer.spec.tokens_per_image, part.images.start
    try:
        files = CsrCommit.from_json(part.records).chunks
        reader = CsrReader(part.folder / "X", shape=(len(part.images) * tokens, writer.spec.n_latents))
        named = [(name, chunk, *file) for name, these in files.items() for chunk, file in enumerate(these)]
        with ThreadPoolExecutor(_n_readers(), thread_name_prefix="check") as threads:
            found = threads.map(
                lambda file: check_chunk(part.folder / "X" / file[0] / "c" / str(file[1]), *file[2:]), named
            )
            for (name, chunk, *_), what in zip(named, found, strict=True):
                if what:
                    raise DamagedStore(f"{part.folder}/X/{name}/c/{chunk} {what}")
        n_dropped, at, missing = 0, writer.n_images, list[tuple[range, int]]()
        for record in part.records[:-1]:  # the last one ends the part and has no rows
            stop = int(record["n_images"])
            if stop > at:
                missing.append((range(at, stop), int(record["n_dropped"]) - n_dropped))
                at = stop
            n_dropped = int(record["n_dropped"])
        ranges = [((images.start - first) * tokens, (images.stop - first) * tokens) for images, _ in missing]
        with closing(_rows_ahead(reader, ranges)) as reading:
            for (images, dropped), rows in zip(missing, reading, strict=True):
                writer.append_tokens(rows.indices, rows.values, np.diff(rows.indptr), n_dropped=dropped)
                writer.commit(images.stop)
                yield images.stop
    except (DamagedStore, KeyError) as error:
        raise DamagedStore(f"{error}. Remove {part.folder} and run its cyto sae encode --shard command again") from None


def _rows_ahead(reader: CsrReader, ranges: list[tuple[int, int]]) -> Generator[CsrRows, None, None]:
    """The rows of each range, in order; meanwhile threads read the next ones."""
    threads = ThreadPoolExecutor(_n_readers(), thread_name_prefix="join")
    waiting: deque[Future[CsrRows]] = deque()
    try:
        for start, stop in ranges:
            waiting.append(threads.submit(reader.read_rows, start, stop))
            if len(waiting) > _n_readers():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _n_readers() -> int:
    return min(_MOST_READERS, n_cores())


def remove_part(part: LatentPart) -> None:
    """Remove a part, its journal first: a folder without journal is not a part."""
    (part.folder / "journal.jsonl").unlink()
    sync_folder(part.folder)
    shutil.rmtree(part.folder)


def next_part(root: Path, writer: LatentWriter) -> LatentPart | None:
    """The finished part with the next images of the whole store, or else the first part after them."""
    later = [part for part in finished_parts(root, writer.spec) if part.images.stop > writer.n_images]
    return later[0] if later else None


def complete_latents(root: Path, *, progress: Progress = lambda done, total, state: None) -> Header | None:
    """Join the parts, and complete the store. After a crash it can be called again.

    None if another process is joining them. Memory: the rows of up to six chunks of the cache, and those that are being
    written. Disk: the size of the result and of the largest part.

    Raises
    ------
    IncompleteStore
        If a writer has not finished; then nothing is changed.
    DamagedStore
        If a part is damaged.
    """
    read_header(root, LATENTS, complete=False)  # refuse anything else before a file is written
    with ExitStack() as stack:
        if not stack.enter_context(locked(_finish_lock(root))):
            return None
        header: Header | None = read_header(root, LATENTS, complete=False)
        assert header is not None
        if not header.complete:
            spec = read_latent_spec(header, root)
            require_all_images(root, spec)
            writer = LatentWriter(root, spec, read_image_table(root / "images.parquet"))
            stack.callback(writer.close)
            progress(writer.n_images, spec.n_images, "joining")
            while writer.n_images < spec.n_images:
                part = next_part(root, writer)
                assert part is not None
                for done in copy_part(part, writer):
                    progress(done, spec.n_images, "joining")
                remove_part(part)
            header = writer.finish()
        remove_left_overs(root)
        return header


def merge_latents(root: Path | str, *, progress: Progress = lambda done, total, state: None) -> MergeResult:
    """Complete a latent store whose shards have all ended (`complete_latents`). No GPU, SAE or cache is needed.

    progress : images joined, images in all

    Raises
    ------
    IncompleteStore
        If rows of some images are not there.
    SpecMismatch
        If another process replaces or completes the store at this moment.
    """
    root = Path(root)
    was_complete = read_header(root, LATENTS, complete=False).complete  # before a lock file is made
    with claimed(root, shared=True):
        if complete_latents(root, progress=progress) is None:
            raise SpecMismatch(f"{root} is being completed by another process; wait until it ends")
    return MergeResult(out=root, stores=(root,), was_complete=was_complete, described=(LatentStore(root).line(root),))


def require_all_images(root: Path, spec: LatentSpec) -> None:
    """Raise IncompleteStore if rows of some images are not there."""
    missing = missing_images(root, spec)
    if missing:
        names = listed([f"{images.start:,} to {images.stop - 1:,}" for images in missing])
        raise IncompleteStore(
            f"{root} is incomplete: the latents of {sum(map(len, missing)):,} of {spec.n_images:,} images are not "
            f"there (images {names}). Run the cyto sae encode commands that did not end; without --shard, the command "
            f"makes all that is missing"
        )


def left_overs(root: Path) -> list[Path]:
    """Files and folders that a complete store no longer needs."""
    locks = [path for path in root.glob(f"writer-*{LOCK_SUFFIX}") if path.is_file()]
    return [*root.glob("part-*-of-*"), *shard_logs(root), *locks, *root.glob(f"finish{LOCK_SUFFIX}")]


def remove_left_overs(root: Path) -> None:
    """Remove them, except the lock that the caller holds."""
    for path in left_overs(root):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != f"finish{LOCK_SUFFIX}":
            path.unlink(missing_ok=True)


def _finish_lock(root: Path) -> Path:
    return root / f"finish{LOCK_SUFFIX}"


def _is_free(path: Path) -> bool:
    """Is this lock held by no process?"""
    if not path.exists():
        return True
    with locked(path) as is_free:
        return is_free
