"""Cells for the comparison of rules for tau: tokens with a planted dictionary, and cohorts drawn from labelled images.

A planted image has a cell type, and its type and its patient decide how often each atom of the dictionary is present
at a token. So it is known at which tokens an atom is there, what a latent should say, and which patients differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TYPES = ("granulocyte", "lymphocyte", "platelet")
MIXTURES = {"control": (0.34, 0.33, 0.33), "more granulocytes": (0.5, 0.25, 0.25), "more platelets": (0.25, 0.25, 0.5)}


@dataclass(frozen=True)
class Planted:
    """Tokens of which the truth is known."""

    tokens: npt.NDArray[np.float16]  # (n_images, tokens_per_image, width)
    present: npt.NDArray[np.bool_]  # (n_images * tokens_per_image, n_atoms)
    atoms: Floats  # (n_atoms, width), of norm 1
    label: list[str]  # of an image: its type
    patient: list[str]
    disease: list[str]


def planted_cells(
    n_images: int,
    *,
    tokens_per_image: int = 65,
    width: int = 64,
    n_atoms: int = 160,
    n_patients: int = 36,
    per_token: float = 5.0,
    noise: float = 0.1,
    seed: int = 0,
) -> Planted:
    """Images of three types, of patients with three mixtures of them.

    An atom has a strength of its own (log-uniform, 0.5 to 4; at a token log-normal about it), a popularity, and factors
    by which types and patients have it more often. Atoms are not orthogonal: 160 lie in 64 channels.
    """
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((n_atoms, width))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    strength = np.exp(rng.uniform(np.log(0.5), np.log(4), n_atoms))
    popularity = np.exp(rng.normal(0, 1, n_atoms))
    of_type = np.exp(rng.normal(0, 1.0, (len(TYPES), n_atoms)) * (rng.random((len(TYPES), n_atoms)) < 0.3))
    of_patient = np.exp(rng.normal(0, 0.7, (n_patients, n_atoms)) * (rng.random((n_patients, n_atoms)) < 0.1))
    diseases = [list(MIXTURES)[patient % len(MIXTURES)] for patient in range(n_patients)]
    patient_of = rng.permutation(np.arange(n_images) % n_patients)
    type_of = np.array([rng.choice(len(TYPES), p=MIXTURES[diseases[patient]]) for patient in patient_of])
    rate = popularity * of_type[type_of] * of_patient[patient_of]
    rate *= per_token / rate.sum(1, keepdims=True)
    present = rng.random((n_images, tokens_per_image, n_atoms)) < np.minimum(rate, 0.9)[:, None]
    present = present.reshape(-1, n_atoms)
    amount = present * strength * np.exp(rng.normal(0, 0.4, present.shape))
    tokens = amount @ atoms + rng.standard_normal(width) + noise * rng.standard_normal((len(amount), width))
    return Planted(
        tokens=tokens.reshape(n_images, tokens_per_image, width).astype(np.float16),
        present=present,
        atoms=atoms,
        label=[TYPES[kind] for kind in type_of],
        patient=[f"P{patient:03d}" for patient in patient_of],
        disease=[diseases[patient] for patient in patient_of],
    )


def write_planted(root: Path, cells: Planted, *, chunk_images: int = 64) -> None:
    """An activation cache with these tokens; one that is complete is kept."""
    from stores.activation_spec import ActivationSpec
    from stores.activation_writer import ActivationWriter
    from stores.spec import find_header
    from stores.tables import image_table, table_sha256

    header = find_header(root) if root.exists() else None
    if header is not None and header.complete:
        return
    n_images, tokens_per_image, width = cells.tokens.shape
    columns: dict[str, list[Any]] = {
        "path": [f"{image:05d}.png" for image in range(n_images)],
        **{name: getattr(cells, name) for name in ("label", "patient", "disease")},
    }
    table = image_table(columns, source="synthetic", dataset="planted")
    spec = ActivationSpec(
        backbone="planted dictionary",
        weights_sha256="0" * 64,
        trained=False,
        block=10,
        n_blocks=12,
        transform={"size": 224, "interpolation": "none"},
        precision="fp32",
        token_layout="cls, patches",
        n_images=n_images,
        tokens_per_image=tokens_per_image,
        width=width,
        chunk_images=chunk_images,
        manifest_sha256=table_sha256(table),
    )
    writer = ActivationWriter(root, spec, table)
    for chunk in range(spec.n_chunks):
        rows = spec.chunk_rows(chunk)
        hashes: list[str | None] = [f"{row:064x}" for row in rows]
        writer.write_chunk(chunk, cells.tokens[rows.start : rows.stop], hashes, [None] * len(rows))
    writer.finish()


def redrawn(label: Sequence[str], patient: Sequence[str], *, seed: int) -> list[str]:
    """Another cohort of the same mixtures: within each label the images are shared out among the same places anew."""
    rng, found = np.random.default_rng([7, seed]), list(patient)
    labels = np.array(label)
    for kind in sorted({*label}):
        places = np.flatnonzero(labels == kind)
        for place, source in zip(places, rng.permutation(places), strict=True):
            found[place] = patient[source]
    return found
