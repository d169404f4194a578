"""Which tau makes the best barcodes? Rules that see no labels, on planted cells and, where they are given, real ones.

For every SAE (relu and top-k, dense and sparse, several seeds) each rule gives a tau, for the SAE or for each latent;
then image and patient barcodes are counted, and measured:

    types     macro F1 of cell types from image barcodes, ridge classifier, five folds that keep fields of view together
    neighbour share of images whose nearest other image (cosine of log counts, another field) has their type
    patients  macro F1 of diseases from patient barcodes, over several cohorts of the same mixtures
    halves    correlation of the barcodes of two halves of a patient's images, about the mean of all patients
    seeds     rank correlation of the distances between patients, of two SAEs that differ in their seed only
    planted   F1 of "the value exceeds tau" against "the atom is there", mean over the latents that found an atom
    remain    share of the living latents that exceed tau anywhere; dense: share of images x latents with a count

One JSON line; `table` has the means over SAEs. The ratio is `cyto barcode --tau auto` against a fixed tau: time.
"""

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import add_folder, alternate, arguments, emit, say, scratch
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from tau_cells import Planted, planted_cells, redrawn, write_planted

Floats = npt.NDArray[np.float64]
Taus = npt.NDArray[np.float32]  # (n_latents,)
MEASURES = ("types", "neighbour", "patients", "halves", "seeds", "planted", "remain", "dense")
SCORED = MEASURES[:6]
_MATCH = 0.9  # cosine from which a latent has found an atom


@dataclass(frozen=True)
class Encoded:
    """Latents of one SAE on all images."""

    sae: str  # its settings; SAEs of the same ones differ in their seed
    latents: csr_matrix  # (n_images * per_image, n_latents)
    per_image: int
    label: list[str]
    group: list[str]  # images of one are kept together
    patient: list[str]  # "": of nobody
    disease: dict[str, str]  # of a patient
    decoder: Floats
    planted: Planted | None


# ------------------------------------------------------------------------------------------- the rules


Rule = Callable[[Encoded], Taus]


def per_latent(rule: Callable[[Floats], float]) -> Rule:
    """Of each latent's values, sorted; 0 for a latent without any."""

    def choose(encoded: Encoded) -> Taus:
        by_latent = encoded.latents.tocsc()
        found = np.zeros(by_latent.shape[1], np.float32)
        for latent, (low, high) in enumerate(pairwise(by_latent.indptr)):
            if high > low:
                found[latent] = rule(np.sort(by_latent.data[low:high]).astype(np.float64))
        return found

    return choose


def per_sae(rule: Callable[[Floats], float]) -> Rule:
    """Of all values of the SAE, sorted: the same for every latent."""

    def choose(encoded: Encoded) -> Taus:
        values = np.sort(encoded.latents.data).astype(np.float64)
        return np.full(encoded.latents.shape[1], rule(values) if len(values) else 0.0, np.float32)

    return choose


def always(tau: float) -> Rule:
    """The same number whatever the SAE."""
    return lambda encoded: np.full(encoded.latents.shape[1], tau, np.float32)


def quantile(share: float) -> Callable[[Floats], float]:
    """The smallest value that at least `share` of the values do not exceed."""
    return lambda ordered: float(ordered[max(0, int(np.ceil(share * len(ordered))) - 1)])


def share_of_largest(share: float) -> Callable[[Floats], float]:
    """A share of the largest value."""
    return lambda ordered: share * float(ordered[-1])


def otsu(ordered: Floats) -> float:
    """Where two groups of the logarithms differ most (Otsu 1979): the largest variance between them."""
    logs = np.log(ordered)
    n, below = len(logs), np.cumsum(logs)
    k = np.arange(1, n)
    if n < 2 or logs[0] == logs[-1]:
        return 0.0
    between = (below[-1] * k / n - below[:-1]) ** 2 / (k * (n - k) / n**2)
    return float(np.exp((logs[np.argmax(between)] + logs[np.argmax(between) + 1]) / 2))


def mixture(ordered: Floats) -> float:
    """Two normal distributions of the logarithms, by EM from Otsu's split: where both are equally likely."""
    logs, split = np.log(ordered), otsu(ordered)
    high = logs > np.log(max(split, 1e-30))
    if len(logs) < 8 or not 2 <= high.sum() <= len(logs) - 2:
        return 0.0
    logs = logs[:: max(1, len(logs) // 2_000)]
    high = logs > np.log(split)
    share = high.astype(np.float64)
    for _ in range(50):
        weights = np.stack([1 - share, share])
        mean = (weights @ logs) / weights.sum(1)
        sd = np.sqrt((weights * (logs - mean[:, None]) ** 2).sum(1) / weights.sum(1)).clip(0.05)
        prior = weights.mean(1)
        densities = prior[:, None] / sd[:, None] * np.exp(-0.5 * ((logs - mean[:, None]) / sd[:, None]) ** 2)
        share = densities[1] / densities.sum(0).clip(1e-300)
    between = (logs > mean[0]) & (share >= 0.5)
    return float(np.exp(logs[between].min())) if between.any() and mean[1] > mean[0] else 0.0


def keeping(share: float) -> Rule:
    """The largest tau that this share of the living latents exceed somewhere."""

    def choose(encoded: Encoded) -> Taus:
        largest = np.sort(encoded.latents.max(axis=0).toarray().ravel())
        largest = largest[largest > 0]
        least = largest[max(0, int(np.ceil((1 - share) * len(largest))) - 1)] if len(largest) else 0.0
        return np.full(encoded.latents.shape[1], np.nextafter(np.float32(least), np.float32(0)), np.float32)

    return choose


def at_most(rule: Rule, other: Rule) -> Rule:
    """The smaller of two."""
    return lambda encoded: np.minimum(rule(encoded), other(encoded))


def sparser(most: float, by: Callable[[Callable[[Floats], float]], Rule]) -> Rule:
    """The quantile above which a token has at most `most` active latents on average; 0 if it has no more anyway."""

    def choose(encoded: Encoded) -> Taus:
        share = 1 - most / (encoded.latents.nnz / encoded.latents.shape[0])
        return (by(quantile(share)) if share > 0 else always(0.0))(encoded)

    return choose


RULES: dict[str, Rule] = {
    "0": always(0.0),
    "0.2, released": always(0.2),
    **{f"quantile {share} of the nonzeros": per_sae(quantile(share)) for share in (0.5, 0.9)},
    "Otsu, SAE": per_sae(otsu),
    "auto: Otsu, SAE, but 0.9 of the latents": at_most(per_sae(otsu), keeping(0.9)),
    "keeps 0.9 of the latents": keeping(0.9),
    **{f"L0 at most {most}, SAE": sparser(most, per_sae) for most in (8, 16)},
    **{f"L0 at most {most}, latent": sparser(most, per_latent) for most in (8, 16)},
    **{f"quantile {share}, latent": per_latent(quantile(share)) for share in (0.5, 0.9)},
    **{f"{share} of the largest, latent": per_latent(share_of_largest(share)) for share in (0.1, 0.2)},
    "Otsu of logs, latent": per_latent(otsu),
    "mixture of logs, latent": per_latent(mixture),
}


# ------------------------------------------------------------------------------------------- what is measured


def image_counts(encoded: Encoded, tau: Taus) -> Floats:
    """(n_images, n_latents): tokens above tau."""
    latents = encoded.latents
    above = (latents.data > tau[latents.indices]).astype(np.float64)
    n_images = latents.shape[0] // encoded.per_image
    starts = latents.indptr[:: encoded.per_image]
    return csr_matrix((above, latents.indices, starts), shape=(n_images, latents.shape[1])).toarray()


def standardized(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """By mean and SD of the rows to train on; constant columns become 0."""
    mean, sd = train.mean(0), train.std(0)
    scale = np.where(sd > 0, sd, np.inf)
    return (train - mean) / scale, (test - mean) / scale


def classified(rows: Floats, labels: npt.NDArray[Any], folds: Iterator[Any]) -> float:
    """Macro F1 over all folds together."""
    predicted = labels.copy()
    for train, test in folds:
        inside, outside = standardized(rows[train], rows[test])
        model = RidgeClassifier(alpha=max(1.0, 0.1 * rows.shape[1]))
        predicted[test] = model.fit(inside, labels[train]).predict(outside)
    return float(f1_score(labels, predicted, average="macro"))


def cell_types(logs: Floats, encoded: Encoded) -> tuple[float, float]:
    """(types, neighbour)."""
    labels, groups = np.array(encoded.label), np.unique(encoded.group, return_inverse=True)[1]
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(logs, labels, groups)
    types = classified(logs, labels, folds)
    centred = logs - logs.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
    cosine = unit @ unit.T
    cosine[groups[:, None] == groups] = -2
    return types, float((labels[cosine.argmax(1)] == labels).mean())


def patient_means(counts: Floats, patient: list[str]) -> tuple[list[str], Floats]:
    """Patients by name, and log1p of their mean barcodes."""
    names = sorted({*patient} - {""})
    column = np.array(patient)
    return names, np.log1p(np.stack([counts[column == name].mean(0) for name in names]))


def diseases(counts: Floats, encoded: Encoded, *, n_cohorts: int) -> float:
    """patients: mean over cohorts of three repeats of five folds."""
    found = []
    for cohort in range(n_cohorts):
        patient = redrawn(encoded.label, encoded.patient, seed=cohort) if cohort else encoded.patient
        names, rows = patient_means(counts, patient)
        labels = np.array([encoded.disease[name] for name in names])
        for repeat in range(3):
            folds = StratifiedKFold(5, shuffle=True, random_state=repeat).split(rows, labels)
            found.append(classified(rows, labels, folds))
    return float(np.mean(found))


def halves(counts: Floats, encoded: Encoded, *, n_splits: int = 5) -> float:
    """Mean correlation of a patient's two halves, about the mean of all patients with two images or more."""
    found = []
    column = np.array(encoded.patient)
    several = [name for name in sorted({*encoded.patient} - {""}) if (column == name).sum() > 1]
    for split in range(n_splits):
        rng = np.random.default_rng([3, split])
        sides: list[list[Floats]] = [[], []]
        for name in several:
            mine = rng.permutation(np.flatnonzero(column == name))
            for side, some in zip(sides, (mine[: len(mine) // 2], mine[len(mine) // 2 :]), strict=True):
                side.append(np.log1p(counts[some].mean(0)))
        about = [np.stack(rows) - np.mean(rows, axis=0) for rows in sides]
        found += [float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)) for a, b in zip(*about, strict=True)]
    return float(np.mean(found))


def distances(counts: Floats, encoded: Encoded) -> Floats:
    """Of all pairs of patients: 1 - correlation of their barcodes about the mean."""
    _, rows = patient_means(counts, encoded.patient)
    rows = rows - rows.mean(0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return 1 - (unit @ unit.T)[np.triu_indices(len(rows), 1)]


def detection(encoded: Encoded, tau: Taus) -> float | None:
    """planted: mean F1 over atoms that a latent has found, each by the latent nearest to it."""
    if encoded.planted is None:
        return None
    cosine = encoded.decoder / np.linalg.norm(encoded.decoder, axis=1, keepdims=True).clip(1e-12)
    cosine = cosine @ encoded.planted.atoms.T
    by_latent = encoded.latents.tocsc()
    found = []
    for atom in range(cosine.shape[1]):
        latent = int(cosine[:, atom].argmax())
        if cosine[latent, atom] < _MATCH:
            continue
        inside = slice(by_latent.indptr[latent], by_latent.indptr[latent + 1])
        on = by_latent.indices[inside][by_latent.data[inside] > tau[latent]]
        truth = encoded.planted.present[:, atom]
        found.append(2 * truth[on].sum() / max(1, len(on) + truth.sum()))
    return float(np.mean(found)) if found else None


def measure(encoded: list[Encoded], *, n_cohorts: int) -> dict[str, list[dict[str, Any]]]:
    """Rule -> one row per settings of SAEs, means over their seeds."""
    by_sae: dict[str, list[Encoded]] = {}
    for each in encoded:
        by_sae.setdefault(each.sae, []).append(each)
    table: dict[str, list[dict[str, Any]]] = {}
    for sae, seeds in by_sae.items():
        for name, rule in RULES.items():
            began, rows, apart = time.perf_counter(), [], []
            for each in seeds:
                tau = rule(each)
                counts = image_counts(each, tau)
                logs = np.log1p(counts)
                types, neighbour = cell_types(logs, each)
                alive = np.diff(each.latents.tocsc().indptr) > 0
                rows.append(
                    {
                        "types": types,
                        "neighbour": neighbour,
                        "patients": diseases(counts, each, n_cohorts=n_cohorts),
                        "halves": halves(counts, each),
                        "planted": detection(each, tau),
                        "remain": float((counts.any(0) & alive).sum() / max(1, alive.sum())),
                        "dense": float((counts > 0).mean()),
                        "tau": float(np.median(tau[alive])),
                    }
                )
                apart.append(distances(counts, each))
            seen = [float(spearmanr(a, b).statistic) for i, a in enumerate(apart) for b in apart[:i]]
            means: dict[str, Any] = {key: _mean([row[key] for row in rows]) for key in rows[0]}
            l0 = _mean([each.latents.nnz / each.latents.shape[0] for each in seeds])
            means |= {"sae": sae, "seeds": _mean(seen), "l0": l0}
            table.setdefault(name, []).append(means)
            shown = " ".join(f"{key} {means[key]:.3f}" for key in MEASURES if means[key] is not None)
            say(f"{sae}: {name}: {shown} ({time.perf_counter() - began:.1f} s)")
    return table


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def means_over_saes(table: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """Rule -> measure -> mean; `score`: the mean of all but `remain` and `dense`."""
    found = {}
    for name, rows in table.items():
        means = {key: _mean([row[key] for row in rows]) for key in MEASURES}
        found[name] = {"score": _mean([means[key] for key in SCORED]), **means}
    return found


# ------------------------------------------------------------------------------------------- the SAEs


def encoded_by(cache: Path, folder: Path, settings: dict[str, Any], seed: int) -> tuple[str, Path, Path]:
    """Train and encode; what is there is kept."""
    from cytosae import encode, train
    from cytosae.sae import TrainConfig

    name = " ".join(f"{key}={value}" for key, value in settings.items() if key in ("activation", "k", "l1"))
    place = folder / f"{cache.stem}-{name.replace(' ', '-')}-{seed}"
    run, latents = (place.with_name(f"{place.name}.{kind}") for kind in ("sae", "latents.zarr"))
    train([cache], run, TrainConfig(**settings, seed=seed), device="cpu")
    encode(cache, run, latents)
    return name, run, latents


def read_encoded(
    cache: Path,
    folder: Path,
    settings: dict[str, Any],
    seed: int,
    cohort: dict[str, dict[str, str]],
    planted: Planted | None,
) -> Encoded:
    """The latents in memory, with what is known of the images."""
    from cytosae.sae import load_sae
    from stores import LatentStore
    from stores.tables import column

    name, run, latents = encoded_by(cache, folder, settings, seed)
    store = LatentStore(latents)
    rows = store.read_images(0, store.spec.n_images)
    matrix = csr_matrix((rows.values, rows.indices, rows.indptr), shape=(store.spec.n_rows, store.spec.n_latents))
    ids = [str(image) for image in column(store.images, "image_id")]
    said = [cohort.get(image.split("/", 1)[1].rsplit(".", 1)[0], {}) for image in ids]
    label = [str(value) for value in column(store.images, "label")]
    patient = [str(value or "") for value in column(store.images, "patient")]
    disease = [str(value or "") for value in column(store.images, "disease")]
    if cohort:
        patient = [each.get("patient", "") for each in said]
        disease = [each.get("disease", "") for each in said]
        group = [str(value) for value in column(store.images, "field")]
    else:
        group = ids
    return Encoded(
        sae=f"{cache.stem.split('.')[0]}: {name}",
        latents=matrix,
        per_image=store.spec.tokens_per_image,
        label=label,
        group=group,
        patient=patient,
        disease={p: d for p, d in zip(patient, disease, strict=True) if p},
        decoder=load_sae(run).model.W_dec.double().numpy(),
        planted=planted,
    )


def extract_real(images: Path, backbone: str, root: Path) -> None:
    """The activation cache of all crops, once."""
    from cytocache import ExtractConfig, extract

    weights = None if backbone == "random-vit-tiny" else "random"
    extract(images / "cells.csv", root, ExtractConfig(backbone=backbone, weights=weights, device="cpu"), root=images)


def read_cohort(images: Path) -> dict[str, dict[str, str]]:
    """image without its suffix -> patient and disease."""
    with (images / "simulated_cohort.csv").open(newline="") as file:
        return {row["path"].rsplit(".", 1)[0]: row for row in csv.DictReader(file)}


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=3)
    add_folder(parser)
    parser.add_argument("--images", type=Path, help="real cells: a folder with cells.csv and simulated_cohort.csv")
    parser.add_argument("--backbone", default="random-vit-tiny", help="of the real cells (%(default)s)")
    parser.add_argument("--planted", type=int, default=900, help="planted images (%(default)s); 0: none")
    parser.add_argument(
        "--tokens", type=int, default=400_000, help="to train an SAE of planted cells on; real ones 5/8 (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=2, help="SAEs of each settings (%(default)s)")
    parser.add_argument("--cohorts", type=int, default=4, help="that patients are drawn into (%(default)s)")
    parser.add_argument("--keep", type=Path, help="caches, SAEs and latents stay here, and are used again")
    options = parser.parse_args()
    with scratch(options.folder) as folder:
        keep = options.keep or folder
        keep.mkdir(parents=True, exist_ok=True)
        encoded: list[Encoded] = []
        plain = {"tokens": options.tokens, "batch_tokens": min(2_048, options.tokens), "lr": 1e-3, "warmup_steps": 30}
        if options.planted:
            cells, cache = planted_cells(options.planted), keep / "planted.acts.zarr"
            write_planted(cache, cells)
            for settings in PLANTED_SAES:
                for seed in range(options.seeds):
                    encoded.append(read_encoded(cache, keep, {**plain, **settings}, seed, {}, cells))
        if options.images:
            cache = keep / f"{options.backbone}.acts.zarr"
            extract_real(options.images, options.backbone, cache)
            cohort = read_cohort(options.images)
            for settings in REAL_SAES:
                for seed in range(options.seeds):
                    given = {**plain, "tokens": options.tokens * 5 // 8, **settings}
                    encoded.append(read_encoded(cache, keep, given, seed, cohort, None))
        table = measure(encoded, n_cohorts=options.cohorts)
        fixed, auto, nnz = timed(sorted(keep.glob("*.latents.zarr"))[0], folder, rounds=options.rounds)
    means = means_over_saes(table)
    emit(
        "tau",
        ratio=fixed.seconds / auto.seconds,
        target=0.5,
        ours=auto.to_json(nnz, "nonzeros"),
        baseline=fixed.to_json(nnz, "nonzeros") | {"what": "cyto barcode --tau 0.2"},
        table=means,
        by_sae=table,
        best=max(means, key=lambda name: means[name]["score"] or 0),
        params={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    )


PLANTED_SAES: tuple[dict[str, Any], ...] = (
    {"expansion": 4, "activation": "relu", "l1": 2e-3},
    {"expansion": 4, "activation": "topk", "k": 8},
)
_REAL: dict[str, Any] = {"expansion": 4, "lr": 2e-3, "warmup_steps": 10}
REAL_SAES: tuple[dict[str, Any], ...] = (
    {**_REAL, "activation": "relu", "l1": 2e-4},
    *({**_REAL, "activation": "topk", "k": k} for k in (4, 16, 64)),
)


def timed(latents: Path, folder: Path, *, rounds: int) -> Any:
    """(fixed tau, tau by the rule, nonzeros): the whole job on the same workers."""
    import shutil

    from cytosae.barcodes import BarcodeConfig, write_barcodes
    from cytosae.cluster import open_client
    from stores import LatentStore

    with open_client(None, workers=1, memory_limit="2GiB") as client:
        sides = [
            lambda tau=tau: write_barcodes(latents, folder / "barcodes", BarcodeConfig(tau=tau), client=client)
            for tau in (0.2, "auto")
        ]
        fixed, auto = alternate(
            *[lambda side=side: (side(), None)[1] for side in sides],
            rounds=rounds,
            tidy=lambda: shutil.rmtree(folder / "barcodes", ignore_errors=True),
        )
    return fixed, auto, LatentStore(latents).nnz


if __name__ == "__main__":
    main()
