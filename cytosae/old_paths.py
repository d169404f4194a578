"""Old import paths: `from cytosae.train import train` still works, with a DeprecationWarning that names the new path.

For one release (CHANGELOG). Packages with the name of an old module (barcodes, concepts, compare, ...) need no entry,
since they export the names that the module had.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "active_latents": "training.latent_matrix",
    "assignment": "relations.assignment",
    "atlas.agreement": "review.reviewer_agreement",
    "atlas.opinions": "review.opinions",
    "atlas.questions": "review.questions",
    "atlas.review_items": "review.items",
    "atlas.review_report": "review.report",
    "atlas.reviewer_agreement": "review.reviewer_agreement",
    "atlas.reviews": "review.verdicts",
    "barcode_checks": "barcodes.compatibility",
    "barcode_tasks": "barcodes.tasks",
    "blocks": "barcodes.partitions",
    "checkpoint": "sae.checkpoint",
    "coactivation": "relations.coactivation",
    "compact": "latents.sparsify",
    "compare_figures": "compare.figures",
    "concept_figures": "concepts.figures",
    "concept_labels": "concepts.label_entropy",
    "concept_tasks": "concepts.tasks",
    "concept_thresholds": "concepts.thresholds",
    "config": "sae.config",
    "counting": "barcodes.count_kernels",
    "covariates": "compare.covariates",
    "cross_validation": "probe.cross_validation",
    "dead_latents": "training.dead_latents",
    "decoder": "sae.decoder",
    "device_batches": "training.device_prefetch",
    "drawing": "plotting",
    "encode": "latents.encode",
    "evaluate": "training.evaluate",
    "figures": "barcodes.figures",
    "folds": "probe.folds",
    "freedman_lane": "compare.freedman_lane",
    "gpu_kernels": "training.kernels_gpu",
    "groups": "barcodes.patients",
    "interop": "sae.interop",
    "intervals": "compare.intervals",
    "loggers": "training.metric_loggers",
    "logistic": "probe.logistic",
    "logistic_columns": "probe.logistic_columns",
    "losses": "training.losses",
    "map_figures": "maps.figures",
    "masks": "maps.mask_agreement",
    "mil": "probe.attention_mil",
    "model": "sae.model",
    "nearest": "relations.nearest_cosine",
    "neighbours": "relations.neighbours",
    "patch_maps": "maps.patch_maps",
    "patient_concepts": "relations.patient_concepts",
    "patient_values": "compare.patient_values",
    "permutation": "compare.permutation",
    "plain_pickle": "sae.safe_unpickle",
    "plot_patient_barcodes": "barcodes.figures",
    "plot_sweep": "sweep.figures",
    "private_cluster": "cluster.private",
    "probe_baselines": "probe.baselines",
    "probe_figures": "probe.figures",
    "probe_intervals": "probe.intervals",
    "probe_report": "probe.report",
    "probe_units": "probe.units",
    "ranks": "training.distributed",
    "reconstruction": "training.residuals",
    "reference_images": "maps.reference_images",
    "relation_figures": "relations.figures",
    "sae_file": "sae.weights_file",
    "saelens": "sae.saelens",
    "scores": "probe.scores",
    "selection": "concepts.selection",
    "sheets": "maps.reference_sheets",
    "sparse_kernels": "training.kernels_cpu",
    "stability": "relations.stability",
    "sweep_grid": "sweep.grid",
    "sweep_record": "sweep.record",
    "threshold_columns": "probe.threshold_columns",
    "threshold_grams": "probe.threshold_grams",
    "train": "training.train",
    "train_state": "training.state",
    "training_data": "training.data",
    "workers": "cluster.workers",
}


class _Moved(ModuleType):
    """Forwards attributes to the module at its new path; a call goes to the function with its own name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):  # set by the import system
            super().__setattr__(name, value)
        else:
            setattr(self.__dict__["_target"], name, value)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **settings)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == "cytosae" and module in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        place = f"cytosae.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} has moved to {place}", DeprecationWarning, stacklevel=2)
        module = _Moved(spec.name)
        module.__dict__["_target"] = importlib.import_module(place)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to do: the module at the new path has been executed."""


def install() -> None:
    """Register the finder for old paths, after all other finders."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
