"""The report's section of latents: the paper's Fig. 2A, and some latents with the images that they answer to."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cytosae.concepts import FILE, read_selection
from cytosae.maps import FrameRow, plot_concepts, reference_rows
from stores.concept_store import ConceptStore
from stores.result_folder import ResultStore
from stores.spec import CONCEPTS

from . import stages
from .page_blocks import Block, Caveats, Cell, Concept, Concepts, Figure, Prose, Section
from .page_inputs import RunFolder
from .page_pictures import figure_picture, map_thumbnail, thumbnail

CONCEPTS_PICTURE = "reference_images.png"
_SHOWN = 10  # latents
_IMAGES = 6  # of each
_EVERYWHERE = 0.9  # a latent that is active in so large a share of the images tells few of them apart
_LEAST_IMAGES = 5


def concept_section(run: RunFolder) -> Section | None:
    """None if there are no concepts."""
    store = run.concepts
    if store is None:
        return None
    section = Section(id="concepts", title="What the latents answer to")
    section.blocks += _scatter_blocks(run, store)
    chosen = choose_shown(run, store)
    if not chosen:
        section.blocks.append(Prose(text="No latent is active in enough images to be shown."))
        return section
    rows = _reference_rows(run, store, chosen)
    section.blocks.append(
        Prose(
            text="For each latent the images in which it is most active: above as they are, below in grey with the "
            "place where it is active. A latent is a hypothesis: only an expert's blinded review (cyto atlas serve) "
            "says whether it is a concept."
        )
    )
    section.blocks.append(Concepts(rows=[_concept(run, store, latent, why, row) for latent, why, row in rows]))
    if run.sources is not None:
        plot_concepts([row for _, _, row in rows], run.root / CONCEPTS_PICTURE)
    return section


def _scatter_blocks(run: RunFolder, store: ConceptStore) -> Iterator[Block]:
    results = ResultStore(run.root / stages.CONCEPTS, CONCEPTS)
    said, caveats = [], []
    of_whom = "from patient to patient" if run.has_patients else "from image to image"
    for found in store.by_dataset:
        table = store.latents(found["dataset"])
        frequency = table["frequency"].to_numpy()
        n_alive = int((frequency > 0).sum())
        n_everywhere = int((frequency >= _EVERYWHERE).sum())
        where = f"In {found['dataset']}, " if len(store.by_dataset) > 1 else ""
        said.append(
            f"{where}{n_alive:,} of {store.n_latents:,} latents are active, {n_everywhere:,} of them in nine of ten "
            f"images or more"
            + (
                f"; the top images of {found['n_divergence_q_05']:,} differ in label from the rest beyond chance "
                f"(q ≤ 0.05, labels shuffled {of_whom})"
                if "n_divergence_q_05" in found and found["n_labelled"]
                else ""
            )
            + "."
        )
        if n_alive and n_everywhere > n_alive / 4:
            caveats.append(f"{where}{n_everywhere / n_alive:.0%} of the living latents are active nearly everywhere.")
        if not found["n_labelled"]:
            caveats.append(f"{where}no image has a label, so nothing is known of what the latents answer to.")
    yield Prose(text=" ".join(said))
    run.short.append(said[0])
    yield Figure(
        picture=figure_picture(results.content("scatter.png")),
        alt="A point for each latent: how often it is active against how strongly, coloured by the entropy of labels",
        caption="The paper's Fig. 2A: a point per latent, by how often it is active and how strongly; dark ones answer "
        "to few kinds of images. The dotted line, a mean activation of 0.001, belongs to the paper's own SAE.",
    )
    if caveats:
        yield Caveats(lines=caveats)


def choose_shown(run: RunFolder, store: ConceptStore) -> dict[int, str]:
    """Latent -> why it is shown: for each label the one that answers to it most purely, then some of the draw.

    Of the latents whose top images have most of their activation in a label, the one with the largest divergence from
    the labels of the dataset; ties go to the larger mean activation, then to the lower number.
    """
    dataset = max(store.by_dataset, key=lambda found: found["n_readable"])["dataset"]
    table = store.latents(dataset)
    n_images = table["n_images"].to_numpy()
    mean = np.nan_to_num(table["mean_activation"].to_numpy())
    divergence = np.nan_to_num(table["label_divergence"].to_numpy(zero_copy_only=False).astype(np.float64), nan=-1.0)
    top = np.array([name or "" for name in table["top_label"].to_pylist()], object)
    labels = [name for name in dict.fromkeys(top.tolist()) if name]
    counts = {name: int((top == name).sum()) for name in labels}
    chosen: dict[int, str] = {}
    for name in sorted(labels, key=lambda name: (-counts[name], name))[:_SHOWN]:
        of_label = np.flatnonzero((top == name) & (n_images >= _LEAST_IMAGES) & (divergence > 0))
        if len(of_label):
            best = of_label[np.lexsort((of_label, -mean[of_label], -np.round(divergence[of_label], 6)))][0]
            chosen.setdefault(int(best), f"of the latents whose top images are mostly {name}, the purest")
    for latent, why in _drawn(run, store, mean):
        if len(chosen) >= _SHOWN:
            break
        chosen.setdefault(latent, why)
    return chosen


def _drawn(run: RunFolder, store: ConceptStore, mean: Any) -> Iterator[tuple[int, str]]:
    """The first latent of each cluster of the draw; without a draw the largest mean activations."""
    if (store.root / FILE).is_file():
        found = read_selection(store)
        clusters = found.table["cluster"].to_pylist()
        seen: set[int] = set()
        for latent, cluster in zip(found.latents, clusters, strict=True):
            if cluster not in seen:
                seen.add(cluster)
                yield latent, f"drawn from cluster {cluster} of {len(found.cluster_sizes)}, for an expert to look at"
        return
    for latent in np.argsort(-mean, kind="stable")[:_SHOWN].tolist():
        if mean[latent] > 0:
            yield latent, "one of the largest mean activations"


def _reference_rows(run: RunFolder, store: ConceptStore, chosen: dict[int, str]) -> list[tuple[int, str, FrameRow]]:
    """(latent, why, its images in the largest dataset)."""
    if run.sources is None:
        return [(latent, why, FrameRow(heading=(), frames=(), largest=0.0)) for latent, why in chosen.items()]
    dataset = max(store.by_dataset, key=lambda found: found["n_readable"])["dataset"]
    found = []
    for latent, why in chosen.items():
        (row,) = reference_rows(store, run.sources, latent, n_images=_IMAGES, datasets=[dataset])
        found.append(
            (
                latent,
                why,
                FrameRow(heading=(f"latent {latent}", *row.heading[1:]), frames=row.frames, largest=row.largest),
            )
        )
    return found


def _concept(run: RunFolder, store: ConceptStore, latent: int, why: str, row: FrameRow) -> Concept:
    dataset = max(store.by_dataset, key=lambda found: found["n_readable"])["dataset"]
    facts = {name: value for name, (value,) in store.latents(dataset).slice(latent, 1).to_pydict().items()}
    entropy, q = facts["label_entropy"], facts["label_divergence_q"]
    said = [f"in {facts['frequency']:.1%} of the images", f"mean activation {facts['mean_activation']:.3g}"]
    said += (
        [f"label entropy {entropy:.2f} (by chance {facts['label_entropy_null']:.2f})"]
        if _is_known(entropy, facts)
        else []
    )
    said += [f"its labels differ from the rest with q = {q:.2g}"] if q is not None else []
    page = f"{stages.ATLAS}/concepts/{latent}.html"
    cells = []
    for frame in row.frames:
        if isinstance(frame.picture, str):
            cells.append(Cell(cell=None, map=None, label=f"{frame.caption}: {frame.picture}"))
        else:
            cells.append(
                Cell(
                    cell=thumbnail(frame.picture),
                    map=map_thumbnail(frame.picture, frame.patches, row.largest),
                    label=frame.caption,
                )
            )
    return Concept(
        name=f"latent {latent}",
        link=page if (run.root / page).is_file() else "",
        why=why,
        facts=", ".join(said),
        cells=cells,
    )


def _is_known(entropy: float | None, facts: dict[str, Any]) -> bool:
    return entropy is not None and facts["label_entropy_null"] is not None
