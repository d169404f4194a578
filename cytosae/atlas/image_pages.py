"""One pass over all images of the atlas: pictures, pages, and the latents of their tokens.

A page also shows the images most like this one, by the fingerprints of `cyto concept search`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as ss

from cytosae.maps import Pixels
from stores.token_layout import TokenLayout

from .alike import Alike
from .examples import LATENTS_OF_IMAGE
from .frames import Frames
from .inputs import Inputs
from .pictures import jpeg, reduced
from .plan import Plan
from .site import Site, packed

_NONZEROS_PER_READ = 1 << 21
_HIDDEN = "its file is missing or cannot be read"  # the full reason may contain a path with a patient's name


def write_images(site: Site, frames: Frames, *, chosen: npt.NDArray[np.int64] | None = None) -> Iterator[int]:
    """Write all files of the images of the plan, in the order of the stores; yields steps, two for each image.

    First pictures and what is in their tokens, then the pages, which show other images, too. Fills the
    maps of `frames`, their kinds of patches, and the marks. Memory: the tokens of a few images.

    chosen : only these images (for an estimate)
    """
    inputs, plan, config, maps = frames.inputs, frames.plan, frames.config, frames.maps
    images = plan.images if chosen is None else chosen
    order = np.argsort(images)
    latents, mapped = plan.mapped
    by_image = np.argsort(mapped, kind="stable")
    in_order_of_images = mapped[by_image]
    n_active = np.zeros(len(images), np.int64)
    in_order = zip(order.tolist(), _tokens(inputs, images[order].tolist()), strict=True)
    for n_done, (at_image, (image, tokens)) in enumerate(in_order, start=1):
        number, row = inputs.place(image)
        layout = inputs.stores[number].layout
        patches = tokens[layout.first_patch :].tocsc()
        picture = inputs.sources.pictures[number](row)
        if isinstance(picture, str):
            maps.unseen[image] = _HIDDEN if config.pseudonyms else picture
        else:
            site.write(f"pictures/{plan.number_of[image]}.jpg", jpeg(reduced(picture, config.pixels)))
            maps.kinds.fill(plan.place_of[image], picture)
            maps.sizes.add((picture.shape[0], picture.shape[1]))
        first, last = np.searchsorted(in_order_of_images, [image, image + 1])
        numbers = by_image[first:last].tolist()
        for at, latent in zip(numbers, latents[by_image[first:last]].tolist(), strict=True):
            start, stop = patches.indptr[latent : latent + 2]
            values = np.zeros(layout.n_patches, np.float32)
            values[patches.indices[start:stop]] = patches.data[start:stop]
            maps.set(at, values, aspect=1.0 if isinstance(picture, str) else _aspect(picture))
        frames.marks.fill(image, patches)
        site.data(f"image-{plan.number_of[image]}", _token_data(tokens, patches, layout, plan))
        n_active[at_image] = (tokens.getnnz(axis=0) > 0).sum()
        yield n_done
    alike = Alike(frames.cohort, plan, images, top=config.alike)
    for n_done, at in enumerate(order.tolist(), start=len(images) + 1):
        image = int(images[at])
        first, last = np.searchsorted(in_order_of_images, [image, image + 1])
        references = [number for number in by_image[first:last].tolist() if number < len(plan.references.image)]
        of_image = {
            "n_fingerprint": LATENTS_OF_IMAGE,
            "n_active": int(n_active[at]),
            "alike": alike.of(image, maps.unseen),
        }
        _write_page(site, frames, image, references, of_image)
        yield n_done


def write_pictured(site: Site, frames: Frames, *, most: int | None = None) -> Iterator[int]:
    """Write the pictures of images without a page, in the order of the stores; yields the number written so far.

    What cannot be shown is added to `frames.maps.unseen`.

    most : only the first ones (for an estimate)
    """
    inputs, plan, config, maps = frames.inputs, frames.plan, frames.config, frames.maps
    for n_done, image in enumerate(np.sort(plan.pictured)[:most].tolist(), start=1):
        number, row = inputs.place(image)
        picture = inputs.sources.pictures[number](row)
        if isinstance(picture, str):
            maps.unseen[image] = _HIDDEN if config.pseudonyms else picture
        else:
            site.write(f"pictures/{plan.number_of[image]}.jpg", jpeg(reduced(picture, config.pixels)))
        yield n_done


def _aspect(picture: Pixels) -> float:
    """Width by height."""
    return float(picture.shape[1] / picture.shape[0])


def _tokens(inputs: Inputs, images: list[int]) -> Iterator[tuple[int, ss.csr_matrix]]:
    """(image_index, tokens) for increasing indices; images of the same chunks are read in one call."""
    places = [inputs.place(image) for image in images]
    first = 0
    while first < len(images):
        number, row = places[first]
        starts, end = inputs.stores[number].image_indptr, first + 1
        while (
            end < len(images)
            and places[end][0] == number
            and starts[places[end][1] + 1] - starts[row] <= _NONZEROS_PER_READ
        ):
            end += 1
        n_tokens = inputs.stores[number].spec.tokens_per_image
        rows = inputs.stores[number].read_images(row, places[end - 1][1] + 1)
        together = rows.to_scipy(inputs.n_latents)
        for image, (_, at) in zip(images[first:end], places[first:end], strict=True):
            yield image, together[(at - row) * n_tokens : (at - row + 1) * n_tokens]
        first = end


def _write_page(site: Site, frames: Frames, image: int, references: list[int], further: dict[str, Any]) -> None:
    inputs, cohort, plan = frames.inputs, frames.cohort, frames.plan
    patient, called = int(cohort.patient_of[image]), plan.number_of[image]
    datasets = inputs.concepts.datasets
    site.page(
        f"images/{called}.html",
        "image.html",
        **frames.shared,
        **further,
        image=called,
        name=frames.image_name(image),
        label=cohort.labels[image],
        dataset=cohort.image_datasets[image],
        patient=None if patient < 0 else {"number": patient, "name": cohort.names[patient]},
        disease="" if patient < 0 else cohort.disease_name(patient),
        disease_number=-1 if patient < 0 else int(cohort.disease_of[patient]),
        unseen=frames.maps.unseen.get(image),
        layout=inputs.stores[inputs.place(image)[0]].layout,
        references=[
            {"latent": int(plan.references.latent[n]), "rank": int(plan.references.rank[n])}
            | {"dataset": datasets[plan.references.dataset[n]]}
            for n in references
        ],
    )


def _token_data(tokens: ss.csr_matrix, patches: ss.csc_matrix, layout: TokenLayout, plan: Plan) -> dict[str, Any]:
    """All values of an image relative to its largest, as float16: patches sorted by latent; CLS, registers apart.

    Of registers, which have no place in the image, the sum.
    """
    counts = np.diff(patches.indptr)
    latents, cls = np.flatnonzero(counts), _sum_of(tokens, layout.cls)
    registers = _sum_of(tokens, layout.registers)
    either = np.union1d(np.union1d(latents, cls.indices), registers.indices).astype(np.int64).tolist()
    largest = float(tokens.data.max(initial=0))
    number = np.uint16 if tokens.shape[1] <= 1 << 16 else np.uint32
    return {
        "largest": largest,
        "latents": packed(latents.astype(number)),
        "counts": packed(counts[latents].astype(np.uint16)),  # patches of each
        "patches": packed(patches.indices.astype(np.uint8 if patches.shape[0] <= 256 else np.uint16)),
        "values": packed((patches.data / (largest or 1)).astype(np.float16)),
        "cls_latents": packed(cls.indices.astype(number)),
        "cls_values": packed((cls.data / (largest or 1)).astype(np.float16)),
        **(
            {
                "register_latents": packed(registers.indices.astype(number)),
                "register_values": packed((registers.data / (largest or 1)).astype(np.float16)),
            }
            if layout.n_registers
            else {}
        ),
        "has_page": packed(np.array([*filter(plan.has_page, either)], number)),
    }


def _sum_of(tokens: ss.csr_matrix, positions: range) -> ss.csr_matrix:
    """(1, n_latents): the values at these tokens, added up; of one token its values as they are."""
    if not positions:
        return ss.csr_matrix((1, tokens.shape[1]), dtype=np.float32)
    if len(positions) == 1:
        return tokens[positions.start]
    total = tokens[positions.start : positions.stop].sum(axis=0)
    return ss.csr_matrix(np.asarray(total, np.float32).reshape(1, tokens.shape[1]))
