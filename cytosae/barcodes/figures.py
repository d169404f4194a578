"""The figure of patients by latents, and the choice of latents to show."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as ss

from cytosae.plotting import new_figure, plain, save_figure, text_color

if TYPE_CHECKING:
    from anndata import AnnData


def plot_patient_barcodes(patients: "AnnData", path: Path, *, n_latents: int = 60) -> None:
    """Patients (rows, by disease) against the latents whose barcode varies most between patients.

    Chosen, blind to the disease, by the standard deviation of the barcode's square root (which counts need, or the
    commonest latents would win); each latent is scaled to its own largest value; columns are ordered by the disease in
    which their mean is largest.
    """
    order = np.argsort(np.asarray(patients.obs["disease"]), kind="stable")
    diseases = np.asarray(patients.obs["disease"])[order]
    names = sorted(set(diseases))
    values = ss.csr_matrix(patients.X).toarray()[order]
    scaled = values / np.maximum(values.max(0), np.finfo(np.float32).tiny)
    chosen = np.argsort(-np.sqrt(values).std(0), kind="stable")[:n_latents]
    means = np.array([scaled[diseases == name][:, chosen].mean(0) for name in names])
    chosen = chosen[np.lexsort((-means.max(0), means.argmax(0)))]

    figure, axes = new_figure(width=3 + 0.16 * len(chosen), height=1.6 + 0.2 * len(order))
    image = axes.imshow(scaled[:, chosen], aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(chosen)), [str(latent) for latent in chosen], rotation=90, fontsize=6)
    labels = [
        f"{plain(name)}  {plain(patient)}" for name, patient in zip(diseases, patients.obs_names[order], strict=True)
    ]
    axes.set_yticks(range(len(order)), labels, fontsize=7)
    for tick, name in zip(axes.get_yticklabels(), diseases, strict=True):
        tick.set_color(text_color(names.index(name)))
    for edge in np.flatnonzero(diseases[1:] != diseases[:-1]):
        axes.axhline(edge + 0.5, color="white", linewidth=2)
    axes.set_xlabel(f"latent ({len(chosen)} of {patients.n_vars:,}: those that vary most between patients)")
    axes.set_title(f"Patient barcodes, tau {patients.uns['cyto']['tau']:g}", fontsize=10, loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("tokens above tau per image,\nrelative to the latent's largest", fontsize=7)
    save_figure(figure, path)


def characteristic_latents(images: "AnnData", *, group: str, min_images: int = 5) -> dict[str, int]:
    """For each value of the obs column `group`: the latent that sets its images apart most, to be looked at.

    Largest difference of the mean image activation, inside against outside, over their pooled standard deviation; only
    latents active in at least `min_images` images of the group. A choice for a picture, not a test.
    """
    values = ss.csr_matrix(images.layers["mean"]).toarray()
    labels = np.asarray(images.obs[group])
    chosen = {}
    for name in sorted(set(labels) - {""}):
        inside, outside = values[labels == name], values[labels != name]
        if len(inside) < 2 or len(outside) < 2:
            continue
        spread = np.sqrt((inside.var(0) + outside.var(0)) / 2) + 1e-9
        effect = (inside.mean(0) - outside.mean(0)) / spread
        effect[(inside > 0).sum(0) < min(min_images, len(inside))] = -np.inf
        if np.isfinite(effect.max()):
            chosen[str(name)] = int(effect.argmax())
    return chosen
