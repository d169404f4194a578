"""What the table of images allows: who and what is in it, which comparisons and probes, which not and why."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pyarrow as pa

from cytosae.barcodes import group_images
from stores.tables import MANIFEST_COLUMNS, OUTCOME_COLUMNS, column, listed, with_outcome
from stores.wording import counted

MOST_COMPARISONS = 12
MOST_DISEASES = 20  # more are no diseases
_FOLDS = 5
_LEAST_FOLDS = 3
_LEAST_WAYS = 20  # to share out the patients: fewer, and no p-value can be 0.05
_MOST_CLASSES = 30
REST = "rest"


@dataclass(frozen=True)
class CohortFacts:
    """Who and what is in a table of images."""

    n_images: int
    datasets: Mapping[str, int]  # images of each
    labels: Mapping[str, int]  # images of each; without those that have none
    label_groups: Mapping[str, int]  # label -> patients with such an image; an image of nobody counts as one
    n_patients: int
    n_with_patient: int  # images
    diseases: Mapping[str, int]  # patients of each
    n_without_disease: int  # patients
    other_columns: tuple[str, ...]  # of the table, which nothing looks at unless it is told to

    def lines(self) -> Iterator[str]:
        """The same in words."""
        several = f" in {len(self.datasets)} datasets" if len(self.datasets) > 1 else ""
        yield counted(self.n_images, "image") + several
        if self.labels:
            yield f"labels: {counts_text(self.labels)}" + _without(self.n_images - sum(self.labels.values()), "image")
        else:
            yield "no labels: a column `label`, or a folder for each class, would tell what latents answer to"
        if self.n_patients:
            yield counted(self.n_patients, "patient") + _without(
                self.n_images - self.n_with_patient, "image", "of nobody"
            )
        else:
            yield "no patients: a column `patient` would give patient barcodes"
        if self.diseases:
            yield f"diseases: {counts_text(self.diseases, 'patients')}" + _without(self.n_without_disease, "patient")
        elif self.n_patients:
            yield "no diseases: a column `disease` would give comparisons"


def read_cohort(images: pa.Table) -> CohortFacts:
    """The facts of a table of images.

    Raises
    ------
    BadInput
        If a patient has two diseases.
    """
    n_images = images.num_rows
    outcome: list[str | None] = [None] * n_images
    groups = group_images(with_outcome(images, outcome, outcome))  # as if all could be read
    labels = column(images, "label")
    owners = [
        (f"of {patient}", dataset) if patient is not None else (f"image {number}", dataset)
        for number, (patient, dataset) in enumerate(
            zip(column(images, "patient"), column(images, "dataset"), strict=True)
        )
    ]
    pairs = {(label, owner) for label, owner in zip(labels, owners, strict=True) if label is not None}
    of_disease = Counter(groups.diseases[number] for number in groups.disease_of_patient.tolist() if number >= 0)
    return CohortFacts(
        n_images=n_images,
        datasets=_sorted(column(images, "dataset")),
        labels=_sorted(labels),
        label_groups=dict(sorted(Counter(str(label) for label, _ in pairs).items())),
        n_patients=len(groups.names),
        n_with_patient=int((groups.patient_of_image >= 0).sum()),
        diseases=dict(sorted(of_disease.items())),
        n_without_disease=int((groups.disease_of_patient < 0).sum()),
        other_columns=tuple(name for name in images.column_names if name not in (*MANIFEST_COLUMNS, *OUTCOME_COLUMNS)),
    )


def possible_comparisons(facts: CohortFacts) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Sections of the recipe for all comparisons that can show something, and why others are left out.

    Two diseases are compared with each other; of three and more, each also with the rest. A comparison in which no
    p-value could be 0.05 is left out, and pairs where there would be more than 12 comparisons.
    """
    names, n = list(facts.diseases), facts.diseases
    if len(names) < 2:
        why = "no patient has a disease" if not names else f"all patients with a disease have {names[0]}"
        return [], {"comparisons": why if facts.n_patients else "no patients are known"}
    if len(names) > MOST_DISEASES:
        return [], {"comparisons": f"{len(names):,} diseases are more than {MOST_DISEASES}; name pairs as [[compare]]"}
    left_out: dict[str, str] = {}
    found: list[tuple[str, str]] = []
    total = sum(n.values())
    of_rest = [(a, REST) for a in names] if len(names) > 2 and REST not in names else []
    for a, b in [*of_rest, *combinations(names, 2)]:
        n_a, n_b = n[a], total - n[a] if b == REST else n[b]
        if min(n_a, n_b) < 2 or math.comb(n_a + n_b, n_a) < _LEAST_WAYS:
            left_out[f"{a} against {b}"] = (
                f"{n_a} against {n_b} patients: too few, no p-value could be 0.05 (the patient is the unit)"
            )
        else:
            found.append((a, b))
    if len(found) > MOST_COMPARISONS:
        pairs = [(a, b) for a, b in found if b != REST]
        left_out["single pairs of diseases"] = (
            f"{len(pairs)} pairs and {len(found) - len(pairs)} against the rest would be more than {MOST_COMPARISONS} "
            f"comparisons; add a pair as [[compare]]"
        )
        found = [(a, b) for a, b in found if b == REST]
    taken: set[str] = set()
    return [{"name": folder_name(f"{a}-against-{b}", taken), "a": a, "b": b} for a, b in found], left_out


def possible_probes(facts: CohortFacts) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Sections of the recipe for the probes that can be made: diseases of patients, labels of images."""
    found, left_out = [], {}
    for name, level, target, n_groups, unit in (
        ("disease", "patient", "disease", facts.diseases, "patients"),
        ("label", "image", "label", facts.label_groups, "patients (or images of nobody)"),
    ):
        folds, kept, why = _folds(n_groups, unit)
        for each, reason in why.items():
            left_out[f"probe of {target}: {each}" if each else f"probe of {target}"] = reason
        if not folds:
            continue
        section = {"name": name, "level": level, "target": target, "folds": folds}
        if len(kept) < len(n_groups):
            section["classes"] = tuple(kept)
        if folds < _FOLDS:
            section["inner_folds"] = folds - 1
        found.append(section)
    return found, left_out


def _folds(n_groups: Mapping[str, int], unit: str) -> tuple[int, list[str], dict[str, str]]:
    """(folds, or 0 if no probe can be made; classes that take part; what is left out, "" for all, and why)."""
    if len(n_groups) < 2:
        return 0, [], {"": "there is nothing to tell apart: fewer than two classes"}
    if len(n_groups) > _MOST_CLASSES:
        return 0, [], {"": f"{len(n_groups):,} classes are more than {_MOST_CLASSES}; write a [[probe]] with `classes`"}
    for folds in (_FOLDS, _LEAST_FOLDS):
        kept = [name for name, n in n_groups.items() if n >= folds]
        if len(kept) >= 2:
            few = {name: n for name, n in n_groups.items() if n < folds}
            why = {name: f"{n} {unit}: fewer than the {folds} folds" for name, n in few.items()}
            return folds, kept, why
    fewest = listed([f"{name} {n}" for name, n in n_groups.items()])
    return 0, [], {"": f"too few {unit} for {_LEAST_FOLDS} folds without one on both sides: {fewest}"}


def folder_name(text: str, taken: set[str]) -> str:
    """A name for a folder out of names from the data: plain letters, and not one of `taken`, which it joins."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60] or "unnamed"
    name, number = plain, 1
    while name.casefold() in taken:
        number += 1
        name = f"{plain}-{number}"
    taken.add(name.casefold())
    return name


def counts_text(counts: Mapping[str, int], unit: str = "") -> str:
    """`AML 12, control 30, and 4 more`."""
    shown = [f"{name} {n:,}{f' {unit}' if unit and not i else ''}" for i, (name, n) in enumerate(counts.items())]
    return ", ".join(shown[:8]) + (f", and {len(shown) - 8:,} more" if len(shown) > 8 else "")


def _without(number: int, what: str, how: str = "without one") -> str:
    return f" ({counted(number, what)} {how})" if number else ""


def _sorted(values: Iterable[str | None]) -> dict[str, int]:
    """How often each value occurs, the commonest first; without None."""
    found = Counter(value for value in values if value is not None)
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))
