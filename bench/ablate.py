"""What does `cyto concept ablate` cost, with invented stores: time of the survey, edits a second, memory.

Ours: chosen latents with 100 matched latents and 100 random directions, as one job, from a latent store. Against: the
loop that one writes first, an edit at a time: encode the image, change the latent, decode twice, run the later blocks.
The later blocks are one transformer layer. Both count edits; the survey and all tables count as ours.

Full size of the survey: python bench/ablate.py --images 171373 --tokens 17 --width 64 --latents 49152 (the tokens are
few and narrow, so that the cache fits on a disk: the survey's cost goes by nonzeros, and `nonzeros` says how many).
"""

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_folder, alternate, arguments, emit, image_table, latent_frequency, say, scratch
from latent_generator import generate_block

from cytosae import AblateConfig, ablate_latents
from cytosae.sae import SparseAutoencoder, load_sae, save_sae
from stores.activation_spec import ActivationSpec
from stores.activation_store import ActivationStore
from stores.activation_writer import ActivationWriter
from stores.latent_spec import LatentSpec
from stores.latent_store import LatentStore
from stores.latent_writer import LatentWriter
from stores.spec import SAE, new_header
from stores.tables import table_sha256

_CHUNK = 1024


class LaterBlocks:
    """In the place of stage one: one transformer layer, and how many tokens sets it was given."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, batch_first=True).eval()
        self.layer.requires_grad_(False)

    def final_cls(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, T, width) -> (n, width)."""
        found: torch.Tensor = self.layer(tokens)[:, 0]
        return found

    def backbone_rest(self, *arguments: Any, **settings: Any) -> tuple[Any, None]:
        """As `cytocache.bridge.backbone_rest`, without images."""
        return self.final_cls, None


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=1)
    add_folder(parser)
    parser.add_argument("--images", type=int, default=400, help="(%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=257, help="of an image: CLS and a square of patches (%(default)s)"
    )
    parser.add_argument("--width", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--latents", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--l0", type=float, default=32, help="mean active latents per token (%(default)s)")
    parser.add_argument("--chosen", type=int, default=4, help="latents to change (%(default)s)")
    parser.add_argument("--controls", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--n-images", type=int, default=32, help="of each latent (%(default)s)")
    parser.add_argument("--loop-edits", type=int, default=50, help="edits of the loop (%(default)s)")
    options = parser.parse_args()
    with scratch(options.folder) as folder:
        nonzeros = write_stores(folder, options)
        rest: Any = LaterBlocks(options.width)  # stage one, as far as an ablation asks it
        latents = LatentStore(folder / "latents.zarr")
        some = latents.read_images(0, min(64, options.images))  # the chosen ones are active, whatever the size
        active = np.bincount(some.indices.astype(np.int64), minlength=options.latents)
        frequent = np.argsort(-active, kind="stable")[: options.chosen]
        config = AblateConfig(
            latents=tuple(frequent.tolist()), n_controls=options.controls, n_images=options.n_images, curve_images=8
        )
        said: list[str] = []
        seconds: dict[str, float] = {}
        done: list[Any] = []

        def ours() -> None:
            began = time.perf_counter()

            def surveyed(done: int, total: int, state: str) -> None:
                seconds["survey"] = time.perf_counter() - began

            done.append(
                ablate_latents(
                    folder / "run",
                    folder / "acts.zarr",
                    folder / "out",
                    config,
                    latents=folder / "latents.zarr",
                    stage_one=rest,
                    device="cpu",
                    overwrite=True,
                    say=said.append,
                    survey_progress=surveyed,
                )
            )

        fast, slow = alternate(ours, lambda: loop(folder, rest, options), rounds=options.rounds, warm_up=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        for line in said:
            say(line)
        n_edits = done[0].n_edits
        one, other = fast.to_json(n_edits, "edits"), slow.to_json(options.loop_edits, "edits")
        emit(
            "ablate",
            ratio=one["rate"] / other["rate"],
            target=2,
            ours=one | {"edits": n_edits, "survey_seconds": seconds["survey"], "said": said},
            baseline=other | {"what": "an edit at a time, decoded twice"},
            nonzeros=nonzeros,
            nonzeros_per_second=nonzeros / seconds["survey"],
            peak_gib=peak,
            results=sum(path.stat().st_size for path in (folder / "out").glob("*.parquet")),
            n_images=latents.spec.n_images,
            params={name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        )


@torch.inference_mode()
def loop(folder: Path, rest: LaterBlocks, options: Any) -> None:
    """Edits one at a time."""
    store, model = ActivationStore(folder / "acts.zarr"), load_sae(folder / "run", device="cpu").model
    for number in range(options.loop_edits):
        x = torch.from_numpy(store.read_images([number % options.images])[0]).float()
        z = model.encode(x)
        error = x - model.decode(z)
        z[:, number % options.latents] = 0
        before, after = (rest.final_cls(each[None]) for each in (x, model.decode(z) + error))
        float((after - before).norm() / before.norm())


def write_stores(folder: Path, options: Any) -> int:
    """acts.zarr, run and latents.zarr; returns the nonzeros of the latents."""
    table, side = image_table(options.images, images_per_patient=max(2, options.images // 400)), options.tokens - 1
    spec = ActivationSpec(
        backbone="synthetic",
        weights_sha256="0" * 64,
        trained=False,
        block=10,
        n_blocks=12,
        transform={"size": 224, "interpolation": "none"},
        precision="fp32",
        token_layout=f"1 CLS + {round(side**0.5)}x{round(side**0.5)} patches, row-major",
        n_images=options.images,
        tokens_per_image=options.tokens,
        width=options.width,
        chunk_images=min(_CHUNK, options.images),
        manifest_sha256=table_sha256(table),
    )
    writer, rng = ActivationWriter(folder / "acts.zarr", spec, table), np.random.default_rng(0)
    for chunk in range(spec.n_chunks):
        rows = spec.chunk_rows(chunk)
        tokens = rng.standard_normal((len(rows), options.tokens, options.width), np.float32).astype(np.float16)
        hashes: list[str | None] = [f"{row:064x}" for row in rows]  # of one hash, all but the first would be copies
        writer.write_chunk(chunk, tokens, hashes, [None] * len(rows))
    writer.finish()
    store = ActivationStore(folder / "acts.zarr")

    model = SparseAutoencoder(options.width, options.latents)
    model.init_weights(torch.Generator().manual_seed(0))
    (folder / "run").mkdir()
    settings = {"width": options.width, "n_latents": options.latents, "tokens": store.spec.same_tokens, "caches": []}
    header = save_sae(folder / "run", model, new_header(SAE, {**settings, "config": {}}), {"final": {}})

    latent_spec = LatentSpec(
        sae_sha256=str((header.summary or {})["sae_sha256"]),
        cache_sha256=store.content_sha256,
        cache=store.spec.to_dict(),
        images_sha256=table_sha256(store.images),
        n_images=options.images,
        tokens_per_image=options.tokens,
        n_latents=options.latents,
        precision="fp32",
        value_bits=10,
        min_activation=0.0,
    )
    frequency, _ = latent_frequency(options.latents)
    frequency = np.minimum(1, frequency * min(1, options.tokens / 64))  # few tokens show few latents
    latents = LatentWriter(folder / "latents.zarr", latent_spec, store.images)
    for first in range(0, options.images, 512):
        last = min(first + 512, options.images)
        block = generate_block(first, last, frequency=frequency, l0=options.l0, tokens_per_image=options.tokens, seed=0)
        latents.append_tokens(*block)
        latents.commit(last)
    latents.finish()
    return latents.nnz


if __name__ == "__main__":
    main()
