"""Which images belong to which patient and disease: image tables of latent stores, and the tables of barcodes.

A patient is a name within a dataset: a "1" in each of two datasets are two people. Patients that share a name are
called "dataset/patient". A disease is the same in every dataset.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.errors import BadInput
from stores.latent_store import LatentStore
from stores.tables import OUTCOME_COLUMNS, check_column_names, column, folded, listed, read_table_file, readable
from stores.wording import counted

if TYPE_CHECKING:
    import pandas as pd

Ints = npt.NDArray[np.int64]
_NEVER_FROM_A_TABLE = ("image_id", "path", *OUTCOME_COLUMNS)  # these belong to the images as they were read


@dataclass(frozen=True)
class Groups:
    """Which images belong to which patient, and which patients to which disease; in the order of their names."""

    names: list[str]  # of the patients, each once; those with a readable image
    patients: list[tuple[str, str]]  # (patient, dataset)
    patient_of_image: Ints  # (n_images,), -1: without a patient, or unreadable
    is_readable: npt.NDArray[np.bool_]  # (n_images,)
    diseases: list[str]
    disease_of_patient: Ints  # (n_patients,), -1: unknown
    n_images: Ints  # (n_patients,) readable images
    n_unreadable: Ints  # (n_patients,)
    left_out: dict[str, int]


def join_tables(stores: Sequence[LatentStore]) -> pa.Table:
    """The image tables, one appended to the other; a column that one does not have is null there.

    Raises
    ------
    BadInput
        If two images have the same id.
    """
    tables = [store.images for store in stores]
    first_at: dict[str, int] = {}
    for number, table in enumerate(tables):
        ids = column(table, "image_id")
        clash = [name for name in ids if name in first_at]
        if clash:
            raise BadInput(
                f"{len(clash):,} image ids of {stores[number].root} are also in {stores[first_at[str(clash[0])]].root} "
                f"({listed([str(name) for name in clash])}); give each image its own image_id, and each store once"
            )
        first_at |= dict.fromkeys([str(name) for name in ids], number)
    return pa.concat_tables(tables, promote_options="default")


def regroup(images: pa.Table, path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The image table with the columns of the user's table at `path` (image_id, and any other) in place of its own.

    Returns the table, and what did not fit, for the summary: an image without a row has nothing in these columns.

    Raises
    ------
    BadInput
        Without `image_id` or another column, with a repeated id, or if no id is known.
    """
    given = read_table_file(path)
    names = [name for name in given.column_names if name not in _NEVER_FROM_A_TABLE]
    if "image_id" not in given.column_names or not names:
        raise BadInput(
            f"{path} must have a column 'image_id' and one of patient, disease, label, ...; "
            f"found: {', '.join(given.column_names)}"
        )
    check_column_names(names, str(path))
    ids = column(given, "image_id")
    repeated = sorted(str(name) for name, times in Counter(ids).items() if times > 1 or name is None)
    if repeated:
        raise BadInput(f"{path} has {len(repeated):,} image ids that are empty or repeated ({listed(repeated)})")
    row_of = {name: row for row, name in enumerate(ids)}
    known = column(images, "image_id")
    rows = [row_of.get(name) for name in known]
    unknown = sorted(str(name) for name in set(ids) - set(known))
    missing = [str(name) for name, row in zip(known, rows, strict=True) if row is None]
    if len(missing) == len(known):
        raise BadInput(
            f"{path} knows none of the {len(known):,} images (its ids: {listed(unknown)}; the images': "
            f"{listed(missing)}); give the image_id of each image"
        )
    taken = given.select(names).take(pa.array(rows, pa.int64()))
    spelled = {folded(name): name for name in images.column_names}
    for name in names:
        if name not in images.column_names and folded(name) in spelled:
            raise BadInput(
                f"{path} has a column {name!r}, the images a column {spelled[folded(name)]!r}: equal but for case and "
                f"blanks; write it in the same way"
            )
        if name in images.column_names:
            images = images.set_column(images.column_names.index(name), name, taken[name])
        else:
            images = images.append_column(name, taken[name])
    notes = {
        "n_unknown_in_table": len(unknown),
        "unknown_in_table": listed(unknown),
        "n_missing_in_table": len(missing),
        "missing_in_table": listed(missing),
    }
    return images, notes


def group_images(images: pa.Table) -> Groups:
    """Patients and diseases of an image table. Left out, and counted: unreadable images, those without a patient.

    Raises
    ------
    BadInput
        If a patient has two diseases.
    """
    is_readable = np.array(readable(images), bool)
    datasets = [name or "" for name in column(images, "dataset")]
    owners = [
        None if name is None else (name, dataset)
        for name, dataset in zip(column(images, "patient"), datasets, strict=True)
    ]
    diseases_of: dict[tuple[str, str], set[str]] = {}
    for owner, found in zip(owners, column(images, "disease"), strict=True):
        if owner is not None:
            diseases_of.setdefault(owner, set()).update([found] if found is not None else [])
    conflicting = sorted(owner for owner, found in diseases_of.items() if len(found) > 1)
    if conflicting:
        raise BadInput(
            f"{counted(len(conflicting), 'patient')} with images of two diseases "
            f"({listed([name for name, _ in conflicting])}: {' and '.join(sorted(diseases_of[conflicting[0]]))}); "
            "correct the image table (cyto barcode takes another one with --table)"
        )
    patients = sorted({owner for owner, ok in zip(owners, is_readable, strict=True) if ok and owner is not None})
    number = {owner: i for i, owner in enumerate(patients)}
    of_image = np.array([-1 if owner is None else number.get(owner, -1) for owner in owners], np.int64)
    unreadable_of = of_image[~is_readable]
    of_image[~is_readable] = -1
    disease_of = [next(iter(diseases_of[owner]), None) for owner in patients]
    diseases = sorted({name for name in disease_of if name is not None})
    disease_number = {name: i for i, name in enumerate(diseases)}
    return Groups(
        names=_names(patients, diseases_of),
        patients=patients,
        patient_of_image=of_image,
        is_readable=is_readable,
        diseases=diseases,
        disease_of_patient=np.array([-1 if d is None else disease_number[d] for d in disease_of], np.int64),
        n_images=np.bincount(of_image[of_image >= 0], minlength=len(patients)),
        n_unreadable=np.bincount(unreadable_of[unreadable_of >= 0], minlength=len(patients)),
        left_out={
            "n_unreadable": int((~is_readable).sum()),
            "n_without_patient": sum(owner is None for owner, ok in zip(owners, is_readable, strict=True) if ok),
            "n_patients_unreadable": len(diseases_of) - len(patients),
            "n_patients_without_disease": disease_of.count(None),
        },
    )


def image_rows(images: pa.Table) -> "pd.DataFrame":
    """`obs` of the image barcodes: the image table; null is the empty string."""
    import pandas as pd

    names = [name for name in images.column_names if name not in ("image_id", "error")]
    index = pd.Index(column(images, "image_id"), name="image_id")
    return pd.DataFrame({name: column(images, name) for name in names}, index=index).fillna("")


def patient_rows(groups: Groups) -> "pd.DataFrame":
    """`obs` of the patient barcodes."""
    import pandas as pd

    columns = {
        "patient_id": [name for name, _ in groups.patients],
        "dataset": [dataset for _, dataset in groups.patients],
        "disease": [groups.diseases[d] if d >= 0 else "" for d in groups.disease_of_patient],
        "n_images": groups.n_images,
        "n_unreadable": groups.n_unreadable,
    }
    return pd.DataFrame(columns, index=pd.Index(groups.names, name="patient"))


def disease_rows(groups: Groups) -> "pd.DataFrame":
    """`obs` of the disease barcodes."""
    import pandas as pd

    known = groups.disease_of_patient >= 0
    n_patients, n_images = (np.zeros(len(groups.diseases), np.int64) for _ in range(2))
    np.add.at(n_patients, groups.disease_of_patient[known], 1)
    np.add.at(n_images, groups.disease_of_patient[known], groups.n_images[known])
    index = pd.Index(groups.diseases, name="disease")
    return pd.DataFrame({"n_patients": n_patients, "n_images": n_images}, index=index)


def _names(patients: list[tuple[str, str]], all_patients: Any) -> list[str]:
    """The patient's name, or `dataset/name` where a patient of another dataset has the same one (readable or not)."""
    times = Counter(name for name, _ in all_patients)
    names = [name if times[name] == 1 else f"{dataset}/{name}" for name, dataset in patients]
    if len(set(names)) < len(names):  # a patient's name is another one's full name
        names = [f"{dataset}/{name}" for name, dataset in patients]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise BadInput(f"two patients would both be called {twice[0]!r} (dataset/patient); rename one of them")
    return names
