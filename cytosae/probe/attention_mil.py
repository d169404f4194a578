"""An attention-MIL head, for comparison only: a patient is a bag of images, weighted by attention.

Gated attention (Ilse, Tomczak, Welling 2018), the family of the deep baseline of Hehr et al. An instance is one image's
mean patch token. The number of epochs is fixed: nothing is chosen with the rows that are predicted.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .baselines import MilConfig

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class GatedAttention(nn.Module):
    """(patients, images, width) -> (patients, classes) logits."""

    def __init__(self, width: int, hidden: int, n_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, hidden)
        self.content, self.gate, self.weight = (
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1),
        )
        self.classify = nn.Linear(hidden, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of each bag."""
        h = torch.relu(self.embed(images))
        attention = self.weight(torch.tanh(self.content(h)) * torch.sigmoid(self.gate(h))).softmax(1)
        logits: torch.Tensor = self.classify((attention * h).sum(1))
        return logits


def fit_predict(
    images: Float,
    rows_of: Sequence[Ints],
    labels: Ints,
    training: npt.NDArray[np.bool_],
    n_classes: int,
    config: MilConfig,
    *,
    seed: Sequence[int],
) -> Float:
    """Train on some patients, predict the others from all their images: (others, n_classes) probabilities.

    Parameters
    ----------
    images : (n_images, width); standardised here by the images of the training patients
    rows_of : of each patient, the rows of its images
    """
    n_threads = torch.get_num_threads()
    # bags are small, so that threads cost more time than they save; and sums keep one order
    torch.set_num_threads(1)
    try:
        return _fit_predict(images, rows_of, labels, training, n_classes, config, np.random.default_rng(seed))
    finally:
        torch.set_num_threads(n_threads)


def _fit_predict(
    images: Float,
    rows_of: Sequence[Ints],
    labels: Ints,
    training: npt.NDArray[np.bool_],
    n_classes: int,
    config: MilConfig,
    rng: np.random.Generator,
) -> Float:
    seen = images[np.concatenate([rows for rows, mine in zip(rows_of, training, strict=True) if mine])]
    mean, spread = seen.mean(0), seen.std(0) + 1e-6
    with torch.random.fork_rng(devices=[]):  # torch's global generator stays as it was
        torch.manual_seed(int(rng.integers(2**31)))
        head = GatedAttention(images.shape[1], config.hidden, n_classes)
    adam = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    bags = [torch.from_numpy(((images[rows] - mean) / spread).astype(np.float32)) for rows in rows_of]
    known, truth = np.flatnonzero(training), torch.from_numpy(labels)
    for _ in range(config.epochs):
        order = rng.permutation(known)
        for start in range(0, len(order), config.batch_patients):
            patients = order[start : start + config.batch_patients]
            loss = nn.functional.cross_entropy(
                head(torch.stack([_draw(bags[k], config.images_per_step, rng) for k in patients])), truth[patients]
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        logits = torch.cat([head(bags[k][None]) for k in np.flatnonzero(~training)])
    return logits.softmax(1).numpy().astype(np.float64)


def _draw(bag: torch.Tensor, n: int, rng: np.random.Generator) -> torch.Tensor:
    return bag[torch.from_numpy(rng.choice(len(bag), n, replace=len(bag) < n))]
