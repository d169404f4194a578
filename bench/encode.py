"""What does `cyto sae encode` cost beyond the work that cannot be spared?

Ours: a cache through an SAE into a latent store, as one job. Against two parts of that work alone, on the same cores:
the encoder's matrix product on float32 tokens in memory (best of several micro-batches, result dropped), and
compression: the very same sparse rows written from memory with `CsrWriter`. The slower of the two is the baseline;
target 0.7 of its tokens/s.

Latents are as popular as in the released SAE (or Zipf-like), tokens of an image are alike. Loading and hashing the SAE
is paid once per job: it is taken off, and reported as `setup_seconds`. Full size: python bench/encode.py --images 256
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    N_LATENTS,
    TOKENS_PER_IMAGE,
    WIDTH,
    Spent,
    add_folder,
    alternate,
    arguments,
    chunk_sizes,
    emit,
    latent_frequency,
    now,
    say,
    scratch,
    setup_timed,
    similar_tokens,
    token_share,
    write_cache,
)
from sae_step import make_model, numbers

import cytosae.latents.encode
from cytosae import encode
from cytosae.sae import SparseAutoencoder, save_sae
from stores.activation_store import ActivationStore
from stores.csr import CsrRows, CsrWriter, index_dtype
from stores.latent_store import LatentStore
from stores.spec import SAE, new_header

_RESIDENT = 1 << 30  # bytes of float32 tokens that the product alone goes round among


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_folder(parser)
    parser.add_argument("--images", type=int, default=48, help="(%(default)s)")
    parser.add_argument("--chunk-images", type=int, default=16, help="of the cache (%(default)s)")
    parser.add_argument("--l0", type=float, default=100, help="mean active latents per token (%(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="(%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--value-bits", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--precision", help="passed on to encode where it takes one")
    parser.add_argument("--micro-batches", type=numbers, default="257,514,1028,2056", help="product (%(default)s)")
    options = parser.parse_args()
    n_tokens = options.images * TOKENS_PER_IMAGE
    more = {"value_bits": options.value_bits, "device": options.device}
    if options.precision:
        if "precision" not in inspect.signature(encode).parameters:
            raise SystemExit("this encode takes no precision")
        more["precision"] = options.precision

    with scratch(options.folder) as folder:
        cache, run, latents, plain = (folder / name for name in ("a.acts.zarr", "run", "l.latents.zarr", "plain"))
        say(f"writing {options.images:,} images of tokens and an SAE of {options.latents:,} latents")
        rng = np.random.default_rng(0)
        sizes = chunk_sizes(options.images, options.chunk_images)
        blocks = (similar_tokens(rng, size, options.width) for size in sizes)
        write_cache(cache, blocks, n_images=options.images, width=options.width, chunk_images=options.chunk_images)
        frequency, source = latent_frequency(options.latents)
        share = token_share(frequency, options.l0)
        model = make_model(options.width, share, mean=np.zeros(options.width, np.float32))
        save_run(run, model, ActivationStore(cache))
        setups: list[Spent] = []

        def ours() -> Spent:
            with setup_timed(cytosae.latents.encode, "load_sae") as spent:
                encode(cache, run, latents, **more)
            setups.append(spent[0])
            return spent[0]

        def tidy() -> None:
            shutil.rmtree(latents, ignore_errors=True)
            shutil.rmtree(plain, ignore_errors=True)

        ours()  # one unmeasured job, whose rows the compression alone writes again
        store = LatentStore(latents)
        pieces = list(_pieces(store, options.chunk_images))
        nnz, n_bytes = store.nnz, sum(path.stat().st_size for path in (latents / "X").rglob("*") if path.is_file())
        tidy()
        setups.clear()

        product = EncoderProduct(model.to(options.device), ActivationStore(cache), options)
        sync = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
        micro_batch = product.fastest(options.micro_batches, sync)
        encoding, multiplying, compressing = alternate(
            ours,
            lambda: product(n_tokens, micro_batch),
            lambda: compress(plain, pieces, options.latents),
            rounds=options.rounds,
            warm_up=False,
            sync=sync,
            tidy=tidy,
        )

    parts = {
        "product": multiplying.to_json(n_tokens, "tokens") | {"micro_batch": micro_batch},
        "compression": compressing.to_json(n_tokens, "tokens") | {"nonzeros_per_second": nnz / compressing.seconds},
    }
    lower = min(parts, key=lambda name: parts[name]["rate"])
    emit(
        "encode",
        ratio=n_tokens / encoding.seconds / parts[lower]["rate"],
        target=0.7,
        ours=encoding.to_json(n_tokens, "tokens")
        | {
            "setup_seconds": sorted(spent.seconds for spent in setups)[len(setups) // 2],
            "nonzeros_per_second": nnz / encoding.seconds,
        },
        baseline=parts[lower] | {"what": lower},
        parts=parts,
        # against the product: what other programs of the machine take changes seconds more than processor time
        ratio_of_processor_time=None
        if options.device.startswith("cuda")
        else multiplying.cpu_seconds / encoding.cpu_seconds,
        ratio_of_rounds=[
            one.seconds / other.seconds for one, other in zip(multiplying.rounds, encoding.rounds, strict=True)
        ],
        l0=nnz / n_tokens,
        bytes_per_nonzero=n_bytes / nnz,
        params={**vars(options), "folder": str(options.folder or "temporary"), "popularity": source},
        device=options.device,
    )


class EncoderProduct:
    """(tokens - b_dec) W_enc + b_enc and nothing else, on float tokens that lie on the device."""

    def __init__(self, model: SparseAutoencoder, store: ActivationStore, options: Any) -> None:
        low = torch.bfloat16 if options.precision == "bf16" else torch.float32
        n_images = min(options.images, max(1, _RESIDENT // (4 * TOKENS_PER_IMAGE * options.width)))
        tokens = torch.from_numpy(store.read_images(np.arange(n_images)).reshape(-1, options.width))
        self.tokens = (tokens.to(options.device).float() - model.b_dec.detach()).to(low)
        self.W_enc, self.b_enc = model.W_enc.detach().to(low), model.b_enc.detach().to(low)

    @torch.inference_mode()
    def __call__(self, n_tokens: int, micro_batch: int) -> None:
        """Multiply `n_tokens` tokens, going round among those that are there."""
        micro_batch = min(micro_batch, len(self.tokens))
        out = torch.empty((micro_batch, len(self.b_enc)), dtype=self.tokens.dtype, device=self.tokens.device)
        at = 0
        for start in range(0, n_tokens, micro_batch):
            size = min(micro_batch, n_tokens - start)
            at = at if at + size <= len(self.tokens) else 0
            torch.addmm(self.b_enc, self.tokens[at : at + size], self.W_enc, out=out[:size])
            at += size

    def fastest(self, micro_batches: list[int], sync: Any) -> int:
        """The micro-batch with the highest rate on about 2,056 tokens each."""
        self(min(micro_batches), min(micro_batches))
        speeds = {}
        for size in micro_batches:
            n = max(size, 2_056 // size * size)
            sync()
            began = now()
            self(n, size)
            sync()
            speeds[size] = n / (now() - began).seconds
            say(f"product, micro-batch {size:,}: {speeds[size]:,.0f} tokens/s")
        return max(speeds, key=lambda size: speeds[size])


def save_run(root: Path, model: SparseAutoencoder, store: ActivationStore) -> None:
    """A finished SAE that fits the cache, as far as `encode` looks at it."""
    root.mkdir()
    spec = {
        "width": model.width,
        "n_latents": model.n_latents,
        "activation": "relu",
        "tokens": store.spec.same_tokens,
        "trained_backbone": False,
        "caches": [
            {"identity": store.identity, "sha256": store.content_sha256, "precision": store.spec.precision},
        ],
    }
    save_sae(root, model, new_header(SAE, spec), {})


def compress(path: Path, pieces: list[CsrRows], n_latents: int) -> None:
    """The same rows, from memory to disk, one commit at the end."""
    writer = CsrWriter(path, n_columns=n_latents, indices=index_dtype(n_latents))
    for rows in pieces:
        writer.append(rows.indices, rows.values, np.diff(rows.indptr))
    writer.finish()


def _pieces(store: LatentStore, chunk_images: int) -> Any:
    n_images = store.spec.n_images
    for start in range(0, n_images, chunk_images):
        yield store.read_images(start, min(start + chunk_images, n_images))


if __name__ == "__main__":
    main()
