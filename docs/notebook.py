# %% [markdown]
# # Notebook: from images to a comparison, in Python
#
# Each command of the command line is one call in Python. This page runs all of them on drawn cells of twelve invented
# patients, with an untrained backbone, so that it runs on any machine in about a minute and downloads nothing.
# Open [notebook.py](notebook.py) as a notebook (VS Code, PyCharm, Jupytext). It writes into a new folder.
#
# The last line of a cell shows its value: each call returns a result that says what was done.
# What each call takes and returns: [Python API](api/index.md). The same as commands: [Tutorial](tutorial.md).

# %%
from pathlib import Path

import cytocache
import cytosae

here = Path("cyto-notebook")
cytocache.write_demo_images(here, n_patients=12, images_per_patient=10, size=64)

# %% [markdown]
# ## From images to a patient table
#
# - **Images** are a folder, or a table with the column `path` and, where known, `label`, `patient`, `disease`,
#   `dataset`.
# - `extract` runs the backbone once. A transformer turns an image into 257 *tokens* (vectors): CLS for the whole image,
#   then 16 x 16 patches. They are stored in an *activation cache*.
# - `train` fits a *sparse autoencoder* (SAE) to the tokens. A *latent* is one of its hidden units; *L0* is the mean
#   number of active latents per token. These settings are for a few seconds on drawn cells;
#   `cytosae.TrainConfig()` has those of the paper.
# - `encode` stores the latents of every token.
# - `write_barcodes` counts: a *barcode* has one number per latent, the mean number of tokens per image at which that
#   latent is above a threshold, *tau*.

# %%
images = cytocache.open_images(here / "images.csv")
cytocache.extract(images, here / "acts.zarr", cytocache.ExtractConfig(workers=2))
settings = cytosae.TrainConfig(expansion=4, l1=2e-4, lr=1e-3, warmup_steps=30, batch_tokens=2048, tokens=300_000)
cytosae.train([here / "acts.zarr"], here / "sae", settings)
cytosae.encode(here / "acts.zarr", here / "sae", here / "latents.zarr")
counted = cytosae.write_barcodes(here / "latents.zarr", here / "barcodes")
patients = cytosae.BarcodeStore(here / "barcodes").read("patient")
patients.to_df().iloc[:, :8]

# %% [markdown]
# `patients` is an AnnData object: one row per patient, one column per latent, the disease in `patients.obs`. scanpy and
# scikit-learn take it as it is. The result of the call says what was counted and what was left out:

# %%
counted

# %% [markdown]
# The counting runs in worker processes of a Dask cluster that is started for the call. For a large store, give the call
# a client of your [cluster](cluster.md): `with cytosae.open_client("tcp://HOST:PORT") as client: ...`.
#
# ## What latents respond to
#
# A latent is easy to name if its *top images*, in which it is most active, have one label: then their label entropy is
# low. `label_entropy_null` is the entropy that shuffled labels would give.

# %%
cytosae.concept_statistics(here / "latents.zarr", here / "concepts")

# %%
concepts = cytosae.ConceptStore(here / "concepts")
table = concepts.latents(concepts.datasets[0]).to_pandas()
meaningful = table[table["mean_activation"] >= 1e-3].sort_values("label_entropy")
meaningful[["latent", "frequency", "mean_activation", "label_entropy", "label_entropy_null", "top_label"]].head()

# %% [markdown]
# ## Where in the cell
#
# Maps of two latents over one image, and the reference images of both. Images are read by stage one, so these calls
# take `stage_one=cytocache.bridge`. A new image that is in no store is mapped in the same way: give `file` and `sae`
# instead of `image_id`.

# %%
latents = meaningful["latent"].iloc[:2].tolist()
image_id = concepts.top_images(latents[0], concepts.datasets[0])["image_id"][0].as_py()
cytosae.write_maps(
    here / "latents.zarr",
    here / "map",
    image_id=image_id,
    latents=latents,
    concepts=here / "concepts",
    stage_one=cytocache.bridge,
)

# %%
cytosae.write_maps(
    here / "latents.zarr",
    here / "new_map",
    file=here / "images" / "P001" / "000.png",
    sae=here / "sae",
    latents=latents,
    stage_one=cytocache.bridge,
)

# %% [markdown]
# ## Two diseases
#
# The unit is the patient: four against four can be split into two groups in 70 ways, so no p-value below 2/70 is
# possible, whatever the images show.

# %%
pair = cytosae.CompareConfig(a="CBFB_MYH11", b="PML_RARA")
cytosae.compare(here / "barcodes", here / "comparison", pair)

# %% [markdown]
# ## Can barcodes predict the disease?
#
# On patients that no fit has seen, beside two baselines: the most frequent class, and the number of images alone. This
# is a small example: the defaults of `cytosae.ProbeConfig` are for real cohorts.

# %%
question = cytosae.ProbeConfig(folds=2, inner_folds=2, repeats=2, permutations=9)
cytosae.probe(here / "barcodes", here / "probe", question)

# %% [markdown]
# ## An atlas for experts
#
# Web pages of concepts, images, patients and diseases, which open without a server or a network.

# %%
cytosae.build_atlas(
    here / "barcodes",
    here / "concepts",
    here / "latents.zarr",
    here / "atlas",
    comparisons=[here / "comparison"],
    stage_one=cytocache.bridge,
)

# %% [markdown]
# Read next: [Concepts](concepts.md) on the statistics, [Comparison](compare.md) and [Probe](probe.md) on the tests,
# [Atlas](atlas.md) and [Review](review.md) on what experts do with the pages.
