"""How fast is an SAE measured (held-out images, health, `cyto sae eval`) on the CPU?

Ours: `MeasuredSums` over tokens in memory, of active latents alone. Against: the same sums of dense latents, encoded
and decoded by full matrix products. Tokens are sums of `--k` decoder rows with noise, so about as many latents are
active.
"""

from typing import Any

import torch
from common import N_LATENTS, TOKENS_PER_IMAGE, WIDTH, alternate, arguments, emit

from cytosae.sae import SparseAutoencoder
from cytosae.training.held_out import tokens_at_a_time
from cytosae.training.measured_sums import MeasuredSums


class DenseLatents:
    """In the place of `MeasuredLatents`."""

    def __init__(self, model: SparseAutoencoder) -> None:
        self.of, self.decoded = model.encode, model.decode


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="(%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--k", type=int, default=64, help="active latents per token (%(default)s)")
    options = parser.parse_args()
    model = SparseAutoencoder(options.width, options.latents, activation="topk", k=options.k)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.W_enc.copy_(model.W_dec.T)
    images = tokens_of(model, options)
    together = max(1, tokens_at_a_time(model) // TOKENS_PER_IMAGE)

    @torch.inference_mode()
    def measured(latents: Any = None) -> MeasuredSums:
        sums = MeasuredSums(model, loss="eq1", step=tokens_at_a_time(model), window_begins=0)
        sums._latents = latents or sums._latents
        for some in images.split(together):
            sums.add(some)
        return sums

    ours, dense = measured(), measured(DenseLatents(model))
    assert torch.equal(ours.n_images_active, dense.n_images_active)
    fast, slow = alternate(measured, lambda: measured(DenseLatents(model)), rounds=options.rounds)
    n_tokens = options.images * TOKENS_PER_IMAGE
    one, other = fast.to_json(n_tokens, "tokens"), slow.to_json(n_tokens, "tokens")
    emit(
        "measure",
        ratio=one["rate"] / other["rate"],
        target=3,
        ours=one | {"l0": ours.l0},
        baseline=other | {"what": "dense latents"},
        params=vars(options),
    )


@torch.inference_mode()
def tokens_of(model: SparseAutoencoder, options: Any) -> torch.Tensor:
    """(images, 257, width) float32."""
    draws = torch.Generator().manual_seed(1)
    n_tokens = options.images * TOKENS_PER_IMAGE
    rows = torch.randint(0, options.latents, (n_tokens, options.k), generator=draws)
    sums = torch.stack([model.W_dec[some].sum(0) for some in rows])
    return (sums + 0.05 * torch.randn(sums.shape, generator=draws)).view(options.images, TOKENS_PER_IMAGE, -1)


if __name__ == "__main__":
    main()
