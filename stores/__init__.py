"""What is on disk: formats, writers, readers, checks. numpy, zarr and pyarrow; no torch, no dask, no click."""

from cyto_machine import find_place_for_caches

find_place_for_caches()  # before numba compiles

from .activation_store import ActivationSpec, ActivationStore, open_caches
from .activation_writer import ActivationWriter
from .barcode_store import BarcodeStore
from .concept_store import ConceptStore
from .csr import CsrReader, CsrRows, CsrWriter
from .errors import (
    BadInput,
    ClusterLost,
    CytoError,
    DamagedStore,
    IncompleteStore,
    SpecMismatch,
    StoreNotFound,
    StoreUnreachable,
)
from .holdout import Chosen, chosen_images, read_image_ids
from .latent_store import LatentSpec, LatentStore, LatentWriter
from .output import Output, plan_output
from .results import ResultStore, ResultWriter, begin_results
from .runlog import append_run, read_runs
from .spec import (
    ACTIVATIONS,
    ATLAS,
    BARCODES,
    COMPARISON,
    CONCEPTS,
    LATENTS,
    MAPS,
    MASKS,
    NEIGHBOURS,
    PATIENT_CONCEPTS,
    PROBE,
    PROBE_TEST,
    SAE,
    SHEETS,
    STABILITY,
    THRESHOLDS,
    Header,
    check_choice,
    find_header,
    new_header,
    read_header,
    write_header,
)
from .token_mix import TokenMix
from .token_stream import TokenStream
from .verify import Problem, verify_activations, verify_latents
from .without_asserts import mend_zarr

mend_zarr()

__all__ = [
    "ACTIVATIONS",
    "ATLAS",
    "BARCODES",
    "COMPARISON",
    "CONCEPTS",
    "LATENTS",
    "MAPS",
    "MASKS",
    "NEIGHBOURS",
    "PATIENT_CONCEPTS",
    "PROBE",
    "PROBE_TEST",
    "SAE",
    "SHEETS",
    "STABILITY",
    "THRESHOLDS",
    "ActivationSpec",
    "ActivationStore",
    "ActivationWriter",
    "BadInput",
    "BarcodeStore",
    "Chosen",
    "ClusterLost",
    "ConceptStore",
    "CsrReader",
    "CsrRows",
    "CsrWriter",
    "CytoError",
    "DamagedStore",
    "Header",
    "IncompleteStore",
    "LatentSpec",
    "LatentStore",
    "LatentWriter",
    "Output",
    "Problem",
    "ResultStore",
    "ResultWriter",
    "SpecMismatch",
    "StoreNotFound",
    "StoreUnreachable",
    "TokenMix",
    "TokenStream",
    "append_run",
    "begin_results",
    "check_choice",
    "chosen_images",
    "find_header",
    "new_header",
    "open_caches",
    "plan_output",
    "read_header",
    "read_image_ids",
    "read_runs",
    "verify_activations",
    "verify_latents",
    "write_header",
]
