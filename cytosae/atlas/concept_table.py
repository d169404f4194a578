"""concepts.parquet of an atlas: concepts with their three strongest images, for the atlas that has it beside."""

import numpy as np
import pyarrow as pa

from .frames import Frames
from .other_atlas import SCHEMA, SHOWN


def concept_table(frames: Frames) -> pa.Table:
    """One row for each latent with a page; `images` are the numbers of the pages of the strongest images."""
    references, plan = frames.plan.references, frames.plan
    starts = np.searchsorted(references.latent, [plan.latents, plan.latents + 1])
    rows = []
    for latent, first, last in zip(plan.latents.tolist(), *starts.tolist(), strict=True):
        some = sorted(range(first, last), key=lambda at: (-references.value[at], references.image[at]))[:SHOWN]
        rows.append(
            {"latent": latent, "label": frames.concept(latent)["label"], **frames.numbers(latent)}
            | {"images": [plan.number_of[int(references.image[at])] for at in some]}
            | {"labels": [references.label[at] for at in some]}
            | {"maps": [frames.maps.read(at, 1).tobytes() for at in some]}
            | {"largest": [float(frames.maps.largest[at]) for at in some]}
        )
    return pa.Table.from_pylist(rows, SCHEMA)
