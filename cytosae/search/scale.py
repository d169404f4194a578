"""What a search will take, said before it starts; rates as measured by bench/search.py."""

from collections.abc import Sequence
from pathlib import Path

from stores.activation_store import ActivationStore
from stores.machine import n_cores

from .config import BARCODE, FINGERPRINT, OF_LATENTS, REGION, SearchConfig, SearchEvaluationConfig
from .scan import open_collection, reader_of

_NONZEROS = {FINGERPRINT: 15e6, BARCODE: 15e6, REGION: 15e6}  # a second and core: decoded, checked, compared
_PRODUCTS = 300e6  # a second and core: of an evaluation's queries with the nonzeros of barcodes
_TOKEN_BYTES = 1e9  # a second: of a cache that is read


def search_scale(
    barcodes: Path | str, config: SearchConfig | SearchEvaluationConfig, *, caches: Sequence[Path | str] = ()
) -> str:
    """In words how much is read, and about how long it takes; nothing but headers is opened.

    Raises
    ------
    BadInput, DamagedStore
        As the search.
    """
    collection = open_collection(barcodes, config.tau, config.weigh)
    ways = config.ways if isinstance(config, SearchConfig) else OF_LATENTS
    n_queries = 1 if isinstance(config, SearchConfig) else config.n_queries
    seconds, nonzeros = 0.0, {way: reader_of(collection, way).nnz for way in ways}
    for way, nnz in nonzeros.items():
        products = min(nnz, config.k * collection.n_images) if way == FINGERPRINT else nnz
        seconds += nnz / _NONZEROS[way] / n_cores() + (n_queries - 1) * products / _PRODUCTS / n_cores()
    of_tokens = ""
    if caches:
        specs = [ActivationStore(cache).spec for cache in caches]
        n_bytes = sum(spec.n_images * spec.image_bytes for spec in specs)
        seconds += n_bytes / _TOKEN_BYTES
        of_tokens = f"; {n_bytes / 1e9:,.1f} GB of tokens, unless --keep has their means"
    read = ", ".join(f"{nnz / 1e6:,.1f} M nonzeros for {way}" for way, nnz in nonzeros.items())
    memory = 0.5 + (1_600 * collection.n_images + 8 * n_queries * collection.n_latents) / 2**30  # libraries first
    return (
        f"{collection.n_images:,} images, {read}{of_tokens}: about {max(1, round(seconds)):,} s with {n_cores()} cores "
        f"and {memory:.1f} GiB of memory"
    )
