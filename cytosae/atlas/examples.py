"""Which images show a latent besides its reference images? Twin: test_examples.py, with all values in a dense array.

deciles      examples from the whole range of its activation: the readable images of all datasets in which it is active,
             in the order of their image activation (equal ones in a random order that never changes), are cut into ten
             tenths; from each some are drawn at random
near misses  images that resemble its reference images in all other latents, in which it is active nowhere: the cosine
             of their fingerprint (`cyto concept search`) with the mean fingerprint of the reference images, the latent
             itself left out
best cells   of each patient the image with the largest image activation

Out of core: two passes over the image activations of the barcodes, block by block, and one more for as many patients as
fit `_CELLS`. The images of deciles are taken from a random sample of `SAMPLE` images a latent; their ranks are counted
exactly in the second pass. Memory beside a block: 1.2 kB and the bins of the histograms for each latent with a page,
256 bytes for each image.
"""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cytosae.search import Fingerprints, blocks_of, rarity
from stores.csr import CsrReader, CsrRows
from stores.files import named

from .cohort import Cohort, positions
from .inputs import Inputs

DECILES, SAMPLE = 10, 96
FEWEST = 20  # active images, of which deciles are shown; fewer are nearly all among the reference images
LATENTS_OF_IMAGE = 32  # of a fingerprint, as `cyto concept search` has it
_LATENTS_OF_CENTRE = 64  # of a mean fingerprint
_BLOCK = 1 << 21  # nonzeros of a block
_CELLS = 1 << 24  # patients x latents whose best images are held at a time
_IN_MEMORY = 1 << 26  # bytes of the best cells; more of them lie in an unnamed temporary file
_NOBODY = np.iinfo(np.int32).max
BIN_EDGES = np.arange(-7, 3.01, 0.125)  # log10 of image activation; values outside are counted in the outermost bins
Ints = npt.NDArray[np.int64]
Short = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Examples:
    """What two passes over all images have found; rows are the latents that were asked for."""

    latents: Ints
    histograms: Short  # (datasets, latents, bins): images by image activation above 0
    n_active: Ints  # (latents,) readable images in which it is active
    deciles: Short  # (latents, 10, each) image indices from the weakest tenth on, the strongest first; -1: none
    values: Float32s  # (latents, 10, each) their image activations
    near: Short  # (latents, near misses) image indices, the most similar first; -1: none
    near_cosines: Float32s
    best: Short  # (latents, patients) image indices; -1: the latent is active in none of the patient's images
    fingerprints: Fingerprints  # of all images


def find_examples(
    inputs: Inputs,
    cohort: Cohort,
    latents: Ints,
    references: tuple[Ints, Ints],
    *,
    per_decile: int,
    n_near: int,
    seed: int,
) -> Examples:
    """Examples of some latents, increasing, from the image activations of all images.

    references : latents (rising) and image indices of the reference images
    """
    tau = inputs.tau if len(inputs.barcodes.taus) > 1 else None
    reader = inputs.barcodes.matrix("image", tau, "mean")
    n_images, n = reader.shape[0], len(latents)
    readable = cohort.is_readable
    codes = {name: number for number, name in enumerate(inputs.concepts.datasets)}
    dataset_of = np.array([codes.get(name, -1) for name in cohort.image_datasets], np.int32)
    draw = np.random.default_rng([seed, n_images]).permutation(n_images).astype(np.int32)
    position = positions(latents, inputs.n_latents).astype(np.int32)
    weights = rarity(inputs.barcodes, tau, int(readable.sum()))

    fingerprints = Fingerprints.empty(n_images, LATENTS_OF_IMAGE)
    histograms = np.zeros((len(codes), n, len(BIN_EDGES) - 1), np.int32)
    n_active = np.zeros(n, np.int64)
    drawn, values = np.full((n, SAMPLE), _NOBODY, np.int32), np.full((n, SAMPLE), np.inf, np.float32)
    for first, rows in _blocks(reader):
        fingerprints.fill(first, rows, weights)
        _sample(
            *(rows.indptr, rows.indices, rows.values, _bins(rows.values), first, readable, position, dataset_of, draw),
            *(histograms, n_active, drawn, values),
        )

    order = np.lexsort((drawn, values), axis=-1)
    drawn, values = np.take_along_axis(drawn, order, 1), np.take_along_axis(values, order, 1)
    del order
    below = np.zeros((n, SAMPLE + 1), np.int32)
    near, cosines = np.full((n, n_near), -1, np.int32), np.zeros((n, n_near), np.float32)
    starts, centres, parts = _centres(fingerprints, latents, references, inputs.n_latents)
    scores, touched = np.zeros(n, np.float32), np.zeros(n, np.int32)
    for first, rows in _blocks(reader):
        _count_below(rows.indptr, rows.indices, rows.values, first, readable, position, draw, drawn, values, below)
        if n_near:
            _near_misses(
                *(rows.indptr, rows.indices, first, readable, latents, fingerprints.latents, fingerprints.values),
                *(starts, centres, parts, scores, touched, near, cosines),
            )
    deciles, shown = np.full((n, DECILES, per_decile), -1, np.int32), np.zeros((n, DECILES, per_decile), np.float32)
    if per_decile:
        image_of = np.argsort(draw).astype(np.int32)
        _choose(np.cumsum(below[:, :SAMPLE], axis=1), n_active, drawn, values, image_of, deciles, shown)
    return Examples(
        latents=latents,
        histograms=histograms,
        n_active=n_active,
        deciles=deciles,
        values=shown,
        near=near,
        near_cosines=cosines,
        best=_best_cells(reader, cohort, position, n),
        fingerprints=fingerprints,
    )


def _blocks(reader: CsrReader) -> Iterator[tuple[int, CsrRows]]:
    """(first image, rows) of every block; the next one is decoded meanwhile."""
    bounds = blocks_of(reader, _BLOCK)
    with ThreadPoolExecutor(1, thread_name_prefix="examples") as ahead:
        waiting = None
        for number, (first, _) in enumerate(bounds):
            waiting = waiting or ahead.submit(reader.read_rows, *bounds[number])
            rows = waiting.result()
            waiting = ahead.submit(reader.read_rows, *bounds[number + 1]) if number + 1 < len(bounds) else None
            yield first, rows


def _bins(values: Float32s) -> npt.NDArray[np.int16]:
    """The bin of each value in `BIN_EDGES`, which are eighths: the product is exact."""
    step = BIN_EDGES[1] - BIN_EDGES[0]
    found = np.floor((np.log10(values).astype(np.float64) - BIN_EDGES[0]) / step)
    return np.clip(found, 0, len(BIN_EDGES) - 2).astype(np.int16)


def _centres(
    fingerprints: Fingerprints, latents: Ints, references: tuple[Ints, Ints], n_latents: int
) -> tuple[Ints, Short, Float32s]:
    """The mean fingerprint of the reference images of each latent, by the latents of the fingerprints.

    (starts (n_latents + 1,), row of the latent it is the centre of, part of it); norm 1, the latent itself left out.
    """
    n = len(latents)
    which, parts = np.full((n, _LATENTS_OF_CENTRE), -1, np.int32), np.zeros((n, _LATENTS_OF_CENTRE), np.float32)
    bounds = np.searchsorted(references[0], np.r_[latents, n_latents])
    _average(bounds, latents, references[1], fingerprints.latents, fingerprints.values, n_latents, which, parts)
    used = which >= 0
    order = np.argsort(which[used], kind="stable")
    starts = np.r_[0, np.cumsum(np.bincount(which[used], minlength=n_latents))].astype(np.int64)
    return starts, np.nonzero(used)[0][order].astype(np.int32), parts[used][order]


def _best_cells(reader: CsrReader, cohort: Cohort, position: Short, n: int) -> Short:
    n_patients = cohort.n_patients
    if 4 * n * n_patients <= _IN_MEMORY or not n * n_patients:
        found = np.full((n, n_patients), -1, np.int32)
    else:
        with named(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:  # it stays until the array is gone
            if hasattr(os, "posix_fallocate"):  # else a full disk ends the process by a signal, at the first entry
                os.posix_fallocate(file.fileno(), 0, 4 * n * n_patients)
            found = np.memmap(file, np.int32, "w+", shape=(n, n_patients))
    patient_of, at_once = cohort.patient_of.astype(np.int32), max(1, _CELLS // max(1, n))
    for start in range(0, n_patients, at_once):
        stop = min(start + at_once, n_patients)
        most, image = np.zeros((stop - start, n), np.float32), np.full((stop - start, n), -1, np.int32)
        for first, rows in _blocks(reader):
            _keep_best(
                *(rows.indptr, rows.indices, rows.values, first, cohort.is_readable, position, patient_of),
                *(start, stop, most, image),
            )
        found[:, start:stop] = image.T
    return found


# ------------------------------------------------------------------------------------------------- kernels


@numba.njit(cache=True, nogil=True)
def _sample(
    indptr: Any, indices: Any, values: Any, bins: Any, first: Any, readable: Any, position: Any, dataset_of: Any,
    draw: Any, histograms: Any, n_active: Any, drawn: Any, kept: Any,
) -> None:  # fmt: skip
    """Count images in histograms, and keep of each latent the images of the smallest draws, these rising."""
    size = drawn.shape[1]
    for row in range(len(indptr) - 1):
        image = first + row
        if not readable[image]:
            continue
        mine, dataset = draw[image], dataset_of[image]
        for at in range(indptr[row], indptr[row + 1]):
            n = position[indices[at]]
            if n < 0:
                continue
            n_active[n] += 1
            if dataset >= 0:
                histograms[dataset, n, bins[at]] += 1
            if mine >= drawn[n, size - 1]:
                continue
            place = size - 1
            while place > 0 and drawn[n, place - 1] > mine:
                drawn[n, place], kept[n, place] = drawn[n, place - 1], kept[n, place - 1]
                place -= 1
            drawn[n, place], kept[n, place] = mine, values[at]


@numba.njit(cache=True, nogil=True)
def _count_below(
    indptr: Any, indices: Any, values: Any, first: Any, readable: Any, position: Any, draw: Any, drawn: Any, kept: Any,
    below: Any,
) -> None:  # fmt: skip
    """Count each active image at the first image of the sample (by value, then draw) that comes after it."""
    for row in range(len(indptr) - 1):
        image = first + row
        if not readable[image]:
            continue
        mine = draw[image]
        for at in range(indptr[row], indptr[row + 1]):
            n = position[indices[at]]
            if n < 0:
                continue
            value, low, high = values[at], 0, drawn.shape[1]
            while low < high:
                middle = (low + high) // 2
                other = kept[n, middle]
                if other > value or (other == value and drawn[n, middle] > mine):
                    high = middle
                else:
                    low = middle + 1
            below[n, low] += 1


@numba.njit(cache=True, nogil=True)
def _choose(ranks: Any, n_active: Any, drawn: Any, kept: Any, image_of: Any, deciles: Any, shown: Any) -> None:
    """Of each decile the images of the smallest draws, then in the order of their values, the largest first."""
    each = deciles.shape[2]
    draws = np.zeros((deciles.shape[1], each), np.int32)
    for n in range(len(n_active)):
        if n_active[n] < FEWEST:
            continue
        draws[:] = _NOBODY
        for place in range(kept.shape[1]):
            mine = drawn[n, place]
            if mine == _NOBODY:
                break
            decile = ranks[n, place] * DECILES // n_active[n]
            if mine >= draws[decile, each - 1]:
                continue
            at = each - 1
            while at > 0 and draws[decile, at - 1] > mine:
                draws[decile, at], shown[n, decile, at] = draws[decile, at - 1], shown[n, decile, at - 1]
                at -= 1
            draws[decile, at], shown[n, decile, at] = mine, kept[n, place]
        for decile in range(deciles.shape[1]):
            for at in range(each):
                if draws[decile, at] == _NOBODY:
                    break
                mine, value, place = draws[decile, at], shown[n, decile, at], at
                while place > 0 and shown[n, decile, place - 1] < value:
                    shown[n, decile, place] = shown[n, decile, place - 1]
                    deciles[n, decile, place] = deciles[n, decile, place - 1]
                    place -= 1
                shown[n, decile, place], deciles[n, decile, place] = value, image_of[mine]


@numba.njit(cache=True, nogil=True)
def _average(
    bounds: Any, latents: Any, images: Any, fp_latents: Any, fp_values: Any, n_latents: Any, which: Any, parts: Any
) -> None:
    """The sum of the fingerprints of the images of each latent, without it: its largest parts, scaled to norm 1."""
    total, seen = np.zeros(n_latents, np.float32), np.zeros(n_latents, np.int32)
    size = which.shape[1]
    for n in range(len(latents)):
        n_seen = 0
        for at in range(bounds[n], bounds[n + 1]):
            for place in range(fp_latents.shape[1]):
                latent = fp_latents[images[at], place]
                if latent < 0:
                    break
                if latent == latents[n]:
                    continue
                if total[latent] == 0:
                    seen[n_seen] = latent
                    n_seen += 1
                total[latent] += fp_values[images[at], place]
        kept = 0
        for at in range(n_seen):
            latent = seen[at]
            value = total[latent]
            total[latent] = 0
            if kept == size and (value, -latent) <= (parts[n, size - 1], -which[n, size - 1]):
                continue
            kept = min(kept + 1, size)
            place = kept - 1
            while place > 0 and (parts[n, place - 1], -which[n, place - 1]) < (value, -latent):
                parts[n, place], which[n, place] = parts[n, place - 1], which[n, place - 1]
                place -= 1
            parts[n, place], which[n, place] = value, latent
        squares = 0.0
        for place in range(kept):
            squares += parts[n, place] * parts[n, place]
        for place in range(kept):
            parts[n, place] = np.float32(parts[n, place] / np.sqrt(squares))


@numba.njit(cache=True, nogil=True)
def _near_misses(
    indptr: Any, indices: Any, first: Any, readable: Any, latents: Any, fp_latents: Any, fp_values: Any, starts: Any,
    centres: Any, parts: Any, scores: Any, touched: Any, near: Any, cosines: Any,
) -> None:  # fmt: skip
    """Keep the images of largest cosine with each centre in which its latent is not active; equal ones: the earlier."""
    size = near.shape[1]
    for row in range(len(indptr) - 1):
        image = first + row
        if not readable[image]:
            continue
        n_touched = 0
        for place in range(fp_latents.shape[1]):
            latent = fp_latents[image, place]
            if latent < 0:
                break
            part = fp_values[image, place]
            for at in range(starts[latent], starts[latent + 1]):
                n = centres[at]
                if scores[n] == 0:
                    touched[n_touched] = n
                    n_touched += 1
                scores[n] += part * parts[at]
        for at in range(n_touched):
            n = touched[at]
            score = scores[n]
            scores[n] = 0
            if score <= cosines[n, size - 1]:
                continue
            low, high = indptr[row], indptr[row + 1]
            while low < high:
                middle = (low + high) // 2
                if indices[middle] < latents[n]:
                    low = middle + 1
                else:
                    high = middle
            if low < indptr[row + 1] and indices[low] == latents[n]:
                continue
            place = size - 1
            while place > 0 and cosines[n, place - 1] < score:
                cosines[n, place], near[n, place] = cosines[n, place - 1], near[n, place - 1]
                place -= 1
            cosines[n, place], near[n, place] = score, image


@numba.njit(cache=True, nogil=True)
def _keep_best(
    indptr: Any, indices: Any, values: Any, first: Any, readable: Any, position: Any, patient_of: Any, start: Any,
    stop: Any, most: Any, image: Any,
) -> None:  # fmt: skip
    """The image of the largest value of each latent and patient from `start` to `stop`; of equal ones the earlier."""
    for row in range(len(indptr) - 1):
        number = first + row
        patient = patient_of[number]
        if not readable[number] or patient < start or patient >= stop:
            continue
        for at in range(indptr[row], indptr[row + 1]):
            n = position[indices[at]]
            if n >= 0 and values[at] > most[patient - start, n]:
                most[patient - start, n] = values[at]
                image[patient - start, n] = number
