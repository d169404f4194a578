"""What a saved probe says of an image before and after its latents were changed.

The probe of `cyto probe` reads barcodes: of each of its latents the number of tokens above tau. So it sees an edit of
latents directly, and not through the later blocks; a random direction is no change of latents, so of it nothing is
said. A model of patients reads each image as if it were the patient: its logits are linear in the barcode, so the mean
change over all images of a patient is the change of that patient.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cytosae.probe import ProbeModel, read_model
from stores.activation_spec import SAME_TOKENS
from stores.activation_store import ActivationStore
from stores.errors import BadInput, SpecMismatch
from stores.spec import Header, describe_difference, plain
from stores.token_sets import chosen_tokens

from .edits import Subject
from .places import Bools

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ProbeReadout:
    """A saved probe that reads the latents of single images."""

    header: Header
    model: ProbeModel
    counts: Bools  # (T,) tokens that its barcodes count
    divisor: float

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.model.card.classes

    def logits(self, subject: Subject, values: npt.NDArray[np.float32]) -> Floats:
        """(classes,) of the image with these values in place of its nonzeros."""
        above = self.counts[subject.tokens] & (values > self.model.card.tau)
        return self._of_counts(self._barcode(subject, above))

    def logits_of_column(self, subject: Subject, latent: int, new: npt.NDArray[np.float32]) -> Floats:
        """(classes,) of the image with the values (T,) for one latent."""
        barcode = self._barcode(subject, self.counts[subject.tokens] & (subject.rows.values > self.model.card.tau))
        at = int(np.searchsorted(self.model.latents, latent))
        if at < len(self.model.latents) and self.model.latents[at] == latent:
            barcode[at] = np.count_nonzero(new[self.counts] > self.model.card.tau)
        return self._of_counts(barcode)

    def _barcode(self, subject: Subject, above: Bools) -> Floats:
        indices = subject.rows.indices[above].astype(np.int64)
        at = np.searchsorted(self.model.latents, indices)
        known = at < len(self.model.latents)
        known[known] = self.model.latents[at[known]] == indices[known]
        return np.bincount(at[known], minlength=len(self.model.latents)).astype(np.float64)

    def _of_counts(self, barcode: Floats) -> Floats:
        found: Floats = barcode / self.divisor @ self.model.fit.weights + self.model.fit.intercept
        return found


def open_probe(
    root: Path, store: ActivationStore, sae_sha256: str, n_latents: int, min_activation: float
) -> ProbeReadout:
    """The probe in the folder `root`, which must read latents of this SAE and tokens of this kind.

    min_activation : values below it are not in the latent store that is read; 0: all are

    Raises
    ------
    SpecMismatch
        If the probe reads other latents or tokens.
    BadInput
        If it has no saved model, or its tau is below `min_activation`.
    """
    probe, model, _ = read_model(root)
    card = model.card
    if (card.sae_sha256, card.n_latents) != (sae_sha256, n_latents):
        raise SpecMismatch(
            f"{root} reads latents of another SAE ({card.sae_sha256:.12}…) than this one ({sae_sha256:.12}…); "
            f"give a probe of barcodes of this SAE: cyto sae encode, cyto barcode, cyto probe"
        )
    spec = store.spec.to_dict()
    tokens = {name: plain(spec.get(name)) for name in SAME_TOKENS}
    if card.tokens != tokens:
        raise SpecMismatch(
            f"{root} reads tokens of another kind than {store.root} holds "
            f"({describe_difference(card.tokens, tokens)}); give a probe of this kind of tokens"
        )
    if card.tau < min_activation:
        raise BadInput(
            f"the probe counts values above tau {card.tau:g}, but the latents hold none below {min_activation:g}; "
            f"leave out --latents"
        )
    counts = np.zeros(store.spec.tokens_per_image, bool)
    counts[chosen_tokens(card.token_set, store.spec.layout, root)] = True
    as_released = card.level == "patient" and card.normalize != "images"
    return ProbeReadout(probe.header, model, counts, float(n_latents if as_released else 1))
