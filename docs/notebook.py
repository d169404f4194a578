# %% [markdown]
# # Notebook: from images to a comparison, in Python
#
# The calls behind the commands, cell by cell: on drawn cells of twelve invented patients, with an untrained backbone,
# so that it runs anywhere in half a minute and downloads nothing. Open [notebook.py](notebook.py) as a notebook
# (VS Code, PyCharm, Jupytext), or run it: `python docs/notebook.py`. It writes into a new folder where it is started.
#
# What each call takes and returns: [Python API](api/index.md). The same as commands: [Tutorial](tutorial.md).

# %%
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
from distributed import Client

from cytocache.datasets import open_images
from cytocache.demo_cells import write_demo_images
from cytocache.extract import ExtractConfig, extract
from cytosae import encode, train
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.compare import CompareConfig, compare
from cytosae.concepts import ConceptConfig, concept_statistics
from cytosae.probe import ProbeConfig, probe
from cytosae.sae import TrainConfig
from stores import ActivationStore, ConceptStore, LatentStore
from stores.machine import n_cores

here = Path("cyto-notebook")

# %% [markdown]
# ## Images
#
# A folder and a table: `path`, and where known `label`, `patient`, `disease`, `dataset`.

# %%
write_demo_images(here, n_patients=12, images_per_patient=10, size=64)
images = open_images(here / "images.csv")
print(images.table.num_rows, "images;", images.table.column_names)

# %% [markdown]
# ## Tokens
#
# The backbone runs once. A cache is opened like any store, and its tokens are ordinary arrays.

# %%
done = extract(images, here / "acts.zarr", ExtractConfig(workers=n_cores()))
cache = ActivationStore(here / "acts.zarr")
print(done.n_readable, "images read,", done.n_unreadable, "not;", cache.spec.width, "channels of", cache.spec.backbone)
tokens = cache.read_images([0, 1])  # (2, 257, width): CLS, then 16 x 16 patches row by row
print(tokens.shape, tokens.dtype)

# %% [markdown]
# ## An SAE
#
# Settings for some seconds of drawn cells; `TrainConfig()` is the paper's. Called again, it finds itself finished.

# %%
settings = TrainConfig(expansion=4, l1=2e-4, lr=1e-3, warmup_steps=30, batch_tokens=2048, tokens=300_000)
header = train([here / "acts.zarr"], here / "sae", settings)
final = (header.summary or {})["final"]
print(f"{header.spec['n_latents']} latents, L0 {final['l0']:.1f}, explained variance {final['explained_variance']:.3f}")

# %% [markdown]
# ## Latents of every token
#
# Sparse rows, one per token. Patch k of an image sits at row k // 16, column k % 16; token 0 is CLS.

# %%
encode(here / "acts.zarr", here / "sae", here / "latents.zarr")
latents = LatentStore(here / "latents.zarr")
rows = latents.read_images(0, 1)
dense = np.zeros((rows.n_rows, latents.spec.n_latents), np.float32)
dense[np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr)), rows.indices] = rows.values
strongest = int(dense[1:].sum(0).argmax())
figure, axes = plt.subplots(figsize=(3, 3))
axes.imshow(dense[1:, strongest].reshape(16, 16), cmap="inferno")
axes.set_title(f"latent {strongest} in image 0")
figure.savefig(here / "map.png")

# %% [markdown]
# ## Barcodes and statistics
#
# Both are counted with Dask. One worker in this process is enough here; on a large store give `Client` the address of a
# [cluster](cluster.md), or let it start processes (in a script then below `if __name__ == "__main__":`).

# %%
with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as client:
    counted = write_barcodes(here / "latents.zarr", here / "barcodes", BarcodeConfig(tau=0.2), client=client)
    concept_statistics(here / "latents.zarr", here / "concepts", ConceptConfig(), client=client)
print(counted.n_patients, "patients,", counted.n_diseases, "diseases;", f"{counted.share_above_tau[0]:.0%} above tau")

# %%
patients = anndata.read_zarr(here / "barcodes" / "patient.zarr")
values = np.sqrt(patients.X.toarray())
likeness = np.corrcoef(values - values.mean(0))
disease = np.asarray(patients.obs["disease"])
same = (disease[:, None] == disease) & ~np.eye(len(disease), dtype=bool)
print(f"patients of one disease correlate by {likeness[same].mean():.2f}, of two by", end=" ")
print(f"{likeness[disease[:, None] != disease].mean():.2f}")

# %% [markdown]
# ## What latents answer to
#
# Low entropy: the top images of a latent have one label. `label_entropy_null` is what shuffled labels would give.

# %%
concepts = ConceptStore(here / "concepts")
table = concepts.latents(concepts.datasets[0]).to_pandas()
meaningful = table[table["mean_activation"] >= 1e-3].sort_values("label_entropy")
shown = ["latent", "frequency", "mean_activation", "label_entropy", "label_entropy_null", "top_label"]
print(meaningful[shown].head().round(3).to_string(index=False))
top = concepts.top_images(int(meaningful["latent"].iloc[0]), concepts.datasets[0]).to_pandas()
print(top[["rank", "image_id", "value", "label"]].head(3).to_string(index=False))

# %% [markdown]
# ## Two diseases
#
# The unit is the patient: four against four can be dealt in 70 ways, so no p-value below 2/70 is possible, whatever
# the images show.

# %%
comparison = compare(here / "barcodes", here / "comparison", CompareConfig(a="CBFB_MYH11", b="PML_RARA"))
for group, found in comparison.top(3).items():
    for row in found:
        print(group, f"latent {row['latent']:>3}  difference {row['difference']:7.2f}  p {row['p']:.3f}")
print("\n".join(comparison.warnings))

# %% [markdown]
# ## Do barcodes tell diseases apart?
#
# On patients that no fit has seen, beside what the commonest class and the number of images alone give. A small
# example: the defaults of `ProbeConfig` are for real cohorts.

# %%
question = ProbeConfig(folds=2, inner_folds=2, repeats=2, permutations=9)
probed = probe(here / "barcodes", here / "probe", question)
for name, method in probed.scores["methods"].items():
    print(f"{name:>10}  weighted F1 {method['weighted_f1']['mean']:.2f}")
print("\n".join(probed.warnings))
