"""A latent's neighbours: which others write nearly the same direction, and which are active with it.

The first comes from the decoder alone (cosine); the second from latent stores (`coactivation.py`, with Dask).
The two need not agree: latents of one direction often share the tokens between them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.barcodes import check_one_sae, check_tau, check_token_set, join_tables
from cytosae.cluster import client_or_own, cluster_job
from cytosae.sae import Decoder, pair_cosines, read_decoder
from stores.errors import BadInput, SpecMismatch
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.result_folder import begin_results
from stores.spec import NEIGHBOURS
from stores.token_sets import chosen_tokens

from . import coactivation
from .coactivation import GroupCounts, NeighbourConfig
from .nearest_cosine import nearest
from .report import Neighbours, NeighboursResult

if TYPE_CHECKING:
    from distributed import Client

Ints = npt.NDArray[np.int64]
_DEFAULTS = NeighbourConfig()
_COUNTS = ("n_tokens", "n_tokens_neighbour", "n_tokens_both", "n_images_both")
_MEASURES = ("phi", "lift", "jaccard")


def find_neighbours(
    run: Path | str,
    config: NeighbourConfig = _DEFAULTS,
    *,
    latents: Path | str | Sequence[Path | str] = (),
    chosen: Sequence[int] = (),
    client: "Client | None" = None,
    progress: Progress = lambda done, total, state: None,
) -> Neighbours:
    """The `config.n_top` neighbours of the `chosen` latents (none: of all) of the SAE at `run`, as a table in memory.

    Memory: the decoder, and in a worker 256 MiB of counts and a chunk of the store.

    Parameters
    ----------
    latents : paths or URLs of latent stores by this SAE; none: neighbours by direction only
    client : of a Dask cluster whose workers see the stores; None: counted in this process

    Raises
    ------
    BadInput
        If a latent does not exist, a store was pruned above tau, two images have the same id (a store given twice), or
        nothing is readable.
    SpecMismatch
        If a store holds latents of another SAE, or of another kind of tokens than the others.
    """
    decoder = read_decoder(run)
    return _find(decoder, _open(decoder, latents, config), _chosen(decoder, chosen), config, client, progress)


def _find(
    decoder: Decoder,
    stores: list[LatentStore],
    numbers: Ints,
    config: NeighbourConfig,
    client: "Client | None",
    progress: Progress,
) -> Neighbours:
    near = _by_direction(decoder, numbers, config.n_top, progress)
    if not stores:
        return Neighbours(latents=numbers, table=_table(decoder, numbers, near, None, 0))
    n_workers = len(client.scheduler_info()["workers"]) if client else 1
    groups = list(_groups(numbers, near, n_workers, decoder.n_latents))
    paths = [store.root for store in stores]
    if client:
        counts = _count_on_workers(client, paths, groups, config, progress)
    else:
        counts = [coactivation.count_group(paths, *group, config) for group in groups]
    n_images = sum(int(store.readable().sum()) for store in stores)
    n_tokens = n_images * len(chosen_tokens(config.token_set, stores[0].layout))
    table = _table(decoder, numbers, near, counts, n_tokens)
    return Neighbours(latents=numbers, table=table, n_tokens=n_tokens, n_images=n_images)


def write_neighbours(
    run: Path | str,
    out: Path | str,
    config: NeighbourConfig = _DEFAULTS,
    *,
    latents: Path | str | Sequence[Path | str] = (),
    chosen: Sequence[int] = (),
    client: "Client | None" = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> NeighboursResult:
    """The neighbours of `find_neighbours` as neighbours.parquet in the folder `out`.

    Parameters
    ----------
    latents, chosen : as of `find_neighbours`
    client : of a Dask cluster whose workers see the stores and `out`; None: one is started for this call if there are
        latent stores

    Raises
    ------
    BadInput
        As `find_neighbours`.
    SpecMismatch
        As `find_neighbours`, and if `out` holds neighbours with other settings (and not `overwrite`), or something
        else.
    """
    run, out = Path(run), Path(out)
    decoder = read_decoder(run)
    stores = _open(decoder, latents, config)
    numbers = _chosen(decoder, chosen)
    spec = {
        "sae_sha256": decoder.sae_sha256,
        "latents": [store.identity for store in stores],
        "chosen": [int(latent) for latent in numbers] if len(chosen) else "all",
        "n_top": config.n_top,
        **({name: getattr(config, name) for name in ("tau", "token_set", "min_images")} if stores else {}),
    }
    inputs = [run, *(store.root for store in stores if isinstance(store.root, Path))]
    writer = begin_results(out, NEIGHBOURS, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "numba"))
    if writer.is_complete:
        return NeighboursResult(out=out, summary=writer.header.summary or {}, was_complete=True)
    writer.watch(decoder.header, *(store.header for store in stores))
    with ExitStack() as stack:
        if stores:
            client = stack.enter_context(client_or_own(client))
            journals = {store.root: store.journal_sha256 for store in stores}
            stack.enter_context(cluster_job(client, writer.root, journals))
        found = _find(decoder, stores, numbers, config, client, progress)
    writer.write_table("neighbours", found.table)
    summary = {"n_latents": found.n_latents, "n_tokens": found.n_tokens, "n_images": found.n_images}
    header = writer.finish({**summary, "n_without_direction": int((~decoder.has_direction).sum())})
    return NeighboursResult(out=out, summary=header.summary or {}, was_complete=False)


def _open(decoder: Decoder, latents: Path | str | Sequence[Path | str], config: NeighbourConfig) -> list[LatentStore]:
    stores = [LatentStore(path) for path in ([latents] if isinstance(latents, Path | str) else latents)]
    for store in stores:
        if store.spec.sae_sha256 != decoder.sae_sha256:
            raise SpecMismatch(
                f"{store.root} holds latents of another SAE (sha256 {store.spec.sae_sha256[:12]} against "
                f"{decoder.sae_sha256[:12]} of {decoder.root}); give the SAE that it was encoded with"
            )
    if stores:
        check_one_sae(stores)
        check_tau(stores, config.tau)
        check_token_set(stores, config.token_set)
        join_tables(stores)  # no image twice
        if not any(store.readable().any() for store in stores):
            raise BadInput(f"no readable image in {', '.join(str(store.root) for store in stores)}")
    return stores


def _chosen(decoder: Decoder, chosen: Sequence[int]) -> Ints:
    for latent in chosen:
        decoder.check_latent(latent)
    return np.unique(np.array(chosen, np.int64)) if len(chosen) else np.arange(decoder.n_latents)


def _by_direction(decoder: Decoder, numbers: Ints, n_top: int, progress: Progress) -> npt.NDArray[np.int32]:
    """(chosen, n_top): the latents of largest cosine; -1 where there are fewer, or the row has no direction."""
    others = np.flatnonzero(decoder.has_direction)
    place = np.full(decoder.n_latents, -1)
    place[others] = np.arange(len(others))
    found = np.full((len(numbers), n_top), -1, np.int32)
    asking = np.flatnonzero(decoder.has_direction[numbers])
    if not len(asking):
        return found
    mine = numbers[asking]
    of_mine, _ = nearest(
        decoder.rows[mine],
        decoder.rows[others],
        n_top,
        skip=place[mine],
        progress=lambda d, t, s: progress(d, t, "cosines"),
    )
    found[asking] = np.where(of_mine.index >= 0, others[of_mine.index], -1)
    return found


def _count_on_workers(
    client: "Client",
    paths: list[Path | str],
    groups: list[tuple[Ints, npt.NDArray[np.int32]]],
    config: NeighbourConfig,
    progress: Progress,
) -> list[GroupCounts]:
    """One task per group of latents, in order."""
    from distributed import CancelledError, as_completed

    futures = {
        client.submit(coactivation.count_group, paths, *group, config, pure=False): n for n, group in enumerate(groups)
    }
    found: dict[int, GroupCounts] = {}
    progress(0, len(groups), "passes over the latents")
    try:
        for future, counts in as_completed(list(futures), with_results=True):
            if isinstance(counts, CancelledError):  # as_completed does not raise it
                raise counts
            found[futures[future]] = counts
            progress(len(found), len(groups), "passes over the latents")
    finally:
        if client.status == "running":  # else the scheduler is gone
            client.cancel(list(futures))
    return [found[n] for n in range(len(groups))]


def _groups(
    numbers: Ints, near: npt.NDArray[np.int32], n_workers: int, n_latents: int
) -> Iterator[tuple[Ints, npt.NDArray[np.int32]]]:
    """The chosen latents in groups that a worker can count for; every worker gets one if there are enough."""
    size = min(coactivation.group_size(n_latents), -(-len(numbers) // max(1, n_workers)))
    for at in range(0, len(numbers), size):
        yield numbers[at : at + size], near[at : at + size]


def _table(
    decoder: Decoder, numbers: Ints, near: npt.NDArray[np.int32], groups: list[GroupCounts] | None, n_tokens: int
) -> pa.Table:
    """A row per latent and neighbour: first those by direction, then those by co-activation, by rank."""
    if groups is None:
        return _rows(decoder, numbers, near, "direction", None, 0)
    n_top, first = near.shape[1], groups[0]
    both, images = (np.concatenate([getattr(g, name) for g in groups]) for name in ("n_tokens_both", "n_images_both"))
    top = np.concatenate([group.top for group in groups])
    tables = [
        _rows(decoder, numbers, index, by, (first.n_tokens, both[:, some], images[:, some]), n_tokens)
        for by, index, some in (("direction", near, slice(n_top, None)), ("tokens", top, slice(0, n_top)))
    ]
    return pa.concat_tables(tables).sort_by([("latent", "ascending"), ("by", "ascending"), ("rank", "ascending")])


def _rows(
    decoder: Decoder,
    numbers: Ints,
    index: npt.NDArray[np.int32],
    by: str,
    counts: tuple[Ints, Ints, Ints] | None,
    n_tokens: int,
) -> pa.Table:
    """The pairs (numbers[i], index[i, k]); `counts`: tokens of every latent, tokens and images of these pairs."""
    at, rank = np.nonzero(index >= 0)
    latent, other = numbers[at], index[at, rank].astype(np.int64)
    cosine = pair_cosines(decoder.rows, decoder.rows, latent, other)
    column = rank  # of `counts`
    if by == "direction":  # by the exact cosines, and of equals the lower number first
        order = np.lexsort((other, -cosine, latent))
        at, latent, other, column, cosine = at[order], latent[order], other[order], rank[order], cosine[order]
    has_cosine = decoder.has_direction[latent] & decoder.has_direction[other]
    columns: dict[str, Any] = {
        "latent": latent,
        "by": pa.array([by] * len(latent), pa.string()),
        "rank": rank + 1,
        "neighbour": other,
        "cosine": pa.array(cosine, mask=~has_cosine),
    }
    if counts is None:
        nothing = {name: pa.nulls(len(latent), pa.int64()) for name in _COUNTS}
        return pa.table({**columns, **nothing, **{name: pa.nulls(len(latent), pa.float64()) for name in _MEASURES}})
    of_latent, of_pair, images = counts
    n_a, n_b, n_ab = of_latent[latent], of_latent[other], of_pair[at, column]
    phi = coactivation.phi_of(n_tokens, n_a, n_b, n_ab)
    is_defined = (n_a > 0) & (n_b > 0)
    least = np.where(is_defined, n_a, 1), np.where(is_defined, n_b, 1)
    measures = phi, n_ab / least[0] * (n_tokens / least[1]), n_ab / np.maximum(1, n_a + n_b - n_ab)
    undefined = [(n_a % n_tokens == 0) | (n_b % n_tokens == 0), ~is_defined, ~is_defined]
    columns |= dict(zip(_COUNTS, (n_a, n_b, n_ab, images[at, column]), strict=True))
    for name, values, mask in zip(_MEASURES, measures, undefined, strict=True):
        columns[name] = pa.array(values, mask=mask)
    return pa.table(columns)
