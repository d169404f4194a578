"""How fast are barcodes counted, against nothing but reading the latents?

Ours: `write_barcodes` (counts, max, mean, one tau; image, patient and disease stores written) on a local Dask cluster
as `cyto barcode` starts it. Against: the same worker processes reading and decoding the same chunks with zarr, one task
per whole chunks, results dropped. Target: 0.5 of that rate, and less than 2 GiB at the peak in every worker. Starting
the cluster is paid once per job and not counted. The page cache is warm for both, where memory holds the store.

The store is generated (`latent_generator.py`): a share of the bone-marrow dataset of 171,373 images; `--share 0.01`,
`0.1` and `1` show how cost grows. A job also writes some hundred small files for about a second, whatever its size: a
small share looks worse than it is. Its output stays to the end, unless it is large: ext4 does not soon give away an
inode again, and walking past 660 that were just freed took 0.4 s of the 5 s of a tenth. `cpu_ratio` compares the
processor time of the workers alone, which other programs on the machine disturb less.
Full size (15 GB of latents, made in 10 to 30 minutes): bench/barcode.py --share 1 --rounds 1 --folder /big/disk
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    DISTINCT_PER_IMAGE,
    N_LATENTS,
    TOKENS_PER_IMAGE,
    add_folder,
    alternate,
    arguments,
    emit,
    image_table,
    latent_frequency,
    now,
    say,
    scratch,
)
from latent_generator import Block, generate_block

from stores.machine import n_cores

ALL_IMAGES = 171_373
_COMMIT_IMAGES = 256
_KEPT_BYTES = 2**30
_CHUNKS_PER_TASK = 8  # about as many nonzeros as a block of 256 images


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_folder(parser)
    parser.add_argument("--share", type=float, default=0.02, help=f"of {ALL_IMAGES:,} images (%(default)s)")
    parser.add_argument("--l0", type=float, default=100, help="latents per token (%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--images-per-patient", type=int, default=430, help="(%(default)s)")
    parser.add_argument("--tau", type=float, default=0.2, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=n_cores(), help="processes (%(default)s)")
    parser.add_argument("--memory-limit", default="2GiB", help="of each worker (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--keep", type=Path, help="generate the store here and keep it; one that is there is used")
    options = parser.parse_args()
    n_images = max(1, round(options.share * ALL_IMAGES))

    with scratch(options.folder) as folder:
        root = options.keep or folder / "cells.latents.zarr"
        generated = generate(root, n_images, options)
        measured = measure(root, folder / "cells.barcodes", options)
    nnz = measured.pop("nnz")
    counting, reading = measured.pop("counting"), measured.pop("reading")
    emit(
        "barcode",
        ratio=reading.seconds / counting.seconds,
        target=0.5,
        ours=counting.to_json(nnz, "nonzeros")
        | {"images_per_second": n_images / counting.seconds}
        | measured.pop("memory"),
        baseline=reading.to_json(nnz, "nonzeros") | {"what": "reading and decoding the same chunks with zarr"},
        **measured,
        target_worker_peak_gib=2,
        store={"images": n_images, "tokens": n_images * TOKENS_PER_IMAGE, "nonzeros": nnz, **generated},
        params={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    )


def generate(root: Path, n_images: int, options: Any) -> dict[str, Any]:
    """Write the latent store, unless it is there; several processes draw, this one rounds, compresses and writes."""
    from cytosae.latents import round_mantissa  # imports torch: only here, never in a worker
    from stores.latent_spec import LatentSpec
    from stores.latent_writer import LatentWriter
    from stores.spec import find_header
    from stores.tables import table_sha256, with_outcome

    frequency, source = latent_frequency(options.latents)
    table = image_table(n_images, images_per_patient=options.images_per_patient)
    table = with_outcome(table, ["0" * 64] * n_images, [None] * n_images)
    spec = LatentSpec(
        sae_sha256="0" * 64,
        cache_sha256="0" * 64,
        cache={"backbone": "synthetic", "trained": False, "block": 10, "seed": options.seed, "l0": options.l0},
        images_sha256=table_sha256(table),
        n_images=n_images,
        tokens_per_image=TOKENS_PER_IMAGE,
        n_latents=options.latents,
        precision="fp32",
        value_bits=10,
        min_activation=0.0,
    )
    began, made = now(), 0
    header = find_header(root) if root.exists() else None
    if root.exists() and (header is None or header.spec != spec.to_dict()):
        raise SystemExit(f"{root} is there, and not the latent store that was asked for; choose another --keep")
    if header is None or not header.complete:
        say(f"generating the latents of {n_images:,} images")
        writer = LatentWriter(root, spec, table)
        for stop, (indices, values, lengths) in _blocks(writer.n_images, n_images, frequency, options):
            writer.append_tokens(indices, round_mantissa(values, 10), lengths)
            writer.commit(stop)
            made = writer.nnz
            if stop % (16 * _COMMIT_IMAGES) == 0:
                say(f"{stop:,} images, {made / (now() - began).seconds / 1e6:.1f} M nonzeros/s")
        writer.finish()
    size = sum(path.stat().st_size for path in (root / "X").rglob("*") if path.is_file())
    return {
        "bytes": size,
        "popularity": source,
        "distinct_per_image": float(frequency.sum()),
        "distinct_per_image_of_released": DISTINCT_PER_IMAGE,
        "generated_nonzeros_per_second": made / (now() - began).seconds if made else None,
    }


def _blocks(first: int, n_images: int, frequency: Any, options: Any) -> Iterator[tuple[int, Block]]:
    """(end, rows) of every block of images in order, drawn some blocks ahead by one process per core."""
    starts = list(range(first, n_images, _COMMIT_IMAGES))
    with ProcessPoolExecutor(n_cores(), mp_context=get_context("spawn")) as processes:
        ahead: deque[Any] = deque()
        for start in starts[: 2 * n_cores()]:
            ahead.append(_draw(processes, start, n_images, frequency, options))
        for number, start in enumerate(starts):
            block = ahead.popleft().result()
            later = number + 2 * n_cores()
            if later < len(starts):
                ahead.append(_draw(processes, starts[later], n_images, frequency, options))
            yield min(start + _COMMIT_IMAGES, n_images), block


def _draw(processes: ProcessPoolExecutor, start: int, n_images: int, frequency: Any, options: Any) -> Any:
    return processes.submit(
        generate_block,
        start,
        min(start + _COMMIT_IMAGES, n_images),
        frequency=frequency,
        l0=options.l0,
        tokens_per_image=TOKENS_PER_IMAGE,
        seed=options.seed,
    )


def measure(root: Path, barcodes: Path, options: Any) -> dict[str, Any]:
    """Both sides in turns on the same workers, and the memory of ours."""
    from distributed import as_completed

    from cytosae.barcodes import BarcodeConfig, write_barcodes
    from cytosae.cluster import open_client  # the cluster exactly as `cyto barcode` starts it
    from stores.latent_store import LatentStore

    store = LatentStore(root)
    n_chunks = -(-store.nnz // _chunk_entries(root))
    tasks = [
        (str(root), "data", first, min(first + _CHUNKS_PER_TASK, n_chunks))
        for first in range(0, n_chunks, _CHUNKS_PER_TASK)
    ]
    n_rows = store.spec.n_rows + 1
    row_chunks = -(-n_rows // _chunk_entries(root, "indptr"))
    tasks += [(str(root), "indptr", first, min(first + 64, row_chunks)) for first in range(0, row_chunks, 64)]
    peaks: list[dict[str, float]] = []
    cpu: dict[str, list[float]] = {"ours": [], "baseline": []}
    counted: list[float] = []
    written: list[Path] = []

    with open_client(None, workers=options.workers, memory_limit=options.memory_limit) as client:

        def ours() -> None:
            began = now()
            done_at: list[float] = []

            def progress(done: int, total: int, state: str) -> None:
                if done == total and not done_at:
                    done_at.append((now() - began).seconds)

            out = barcodes.with_name(f"{len(written)}-{barcodes.name}")
            written.append(out)
            write_barcodes(root, out, BarcodeConfig(tau=options.tau), client=client, progress=progress)
            counted.extend(done_at)

        def measured_ours() -> None:
            client.run(reset_peak)
            reset_peak()
            with worker_cpu_seconds(client, cpu["ours"]):
                ours()
            workers = client.run(peak_bytes)
            peaks.append({"worker": max(workers.values()), "finisher": peak_bytes()})

        def reading() -> None:
            with worker_cpu_seconds(client, cpu["baseline"]):
                futures = [client.submit(read_chunks, *task, pure=False) for task in tasks]
                for future in as_completed(futures):
                    future.result()

        counting, plain = alternate(
            measured_ours,
            reading,
            rounds=options.rounds,
            tidy=lambda: remove_large(written),
        )
    gib = 2**30
    return {
        "nnz": store.nnz,
        "counting": counting,
        "reading": plain,
        "memory": {
            "worker_peak_gib": max(peak["worker"] for peak in peaks) / gib,
            "finisher_peak_gib": max(peak["finisher"] for peak in peaks) / gib,
            "seconds_until_counted": sorted(counted)[len(counted) // 2] if counted else None,
        },
        "workers": options.workers,
        "worker_cpu_seconds": {side: sorted(spent)[len(spent) // 2] for side, spent in cpu.items()},
        "cpu_ratio": sorted(cpu["baseline"])[len(cpu["baseline"]) // 2] / sorted(cpu["ours"])[len(cpu["ours"]) // 2],
        "bytes_per_nonzero": sum(p.stat().st_size for p in (root / "X").rglob("c/*") if p.is_file()) / store.nnz,
    }


def remove_large(written: list[Path]) -> None:
    """Remove what takes more than `_KEPT_BYTES`, which would crowd the latents out of the page cache."""
    for out in written:
        if out.exists() and sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) > _KEPT_BYTES:
            shutil.rmtree(out)


def read_chunks(root: str, name: str, first: int, last: int) -> int:
    """The task of the baseline: decode whole chunks; `data` stands for `data` and `indices`, whose chunks lie alike."""
    import zarr

    n_entries = 0
    for array_name in ("indices", "data") if name == "data" else (name,):
        array = zarr.open_array(os.path.join(root, "X", array_name), mode="r")  # noqa: PTH118
        size = array.chunks[0]
        n_entries += len(np.asarray(array[first * size : min(last * size, array.shape[0])]))
    return n_entries


@contextmanager
def worker_cpu_seconds(client: Any, spent: list[float]) -> Iterator[None]:
    """Appends the processor time of all workers meanwhile."""
    before = sum(client.run(time.process_time).values())
    yield
    spent.append(sum(client.run(time.process_time).values()) - before)


def reset_peak() -> None:
    """Let this process's peak of resident memory begin anew (Linux)."""
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")


def peak_bytes() -> int:
    """Peak of resident memory since then: VmHWM, since ru_maxrss would hand down the peak of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(lines[0].split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _chunk_entries(root: Path, name: str = "data") -> int:
    import zarr

    return int(zarr.open_array(os.fspath(root / "X" / name), mode="r").chunks[0])


if __name__ == "__main__":
    main()
