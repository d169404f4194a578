"""The fitted probe as files, without pickle: fitted once on all rows, saved beside the scores, applied to others later.

    model.json          the model card: level, classes, threshold, C, tau, normalisation, SAE, backbone, barcodes
    model.safetensors   kept latents, weights and intercept of every class; and the two baselines, class shares and a
                        regression on the number of images
    trained_on.parquet  SHA-256 of the images that it is fitted on, so that no test can use them: stores/content_hashes

These three and `probe.json`, which has their hashes, are all that is needed to apply the model. They contain no name
of a patient or an image.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stores.activation_spec import SAME_TOKENS
from stores.barcode_store import BarcodeStore, tau_text
from stores.content_hashes import content_hashes, hash_table
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.files import write_atomic
from stores.result_folder import ResultStore, ResultWriter
from stores.spec import PROBE, describe_difference, plain, stated
from stores.tables import STATUS_OK

from .baselines import CountFit
from .cross_validation import Final
from .logistic_columns import ColumnFit
from .units import LEVELS, NewUnits, UnitConfig, Units, shared_images

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
CARD, WEIGHTS, HASHES = "model", "model.safetensors", "trained_on"
VERSION = 1
_ENCODER = ("precision", "value_bits", "min_activation")  # settings that change barcodes a little


@dataclass(frozen=True, kw_only=True)
class Card:
    """`model.json`: what a saved model is, and what barcodes must be so that it can be applied to them."""

    version: int
    level: str
    target: str
    classes: list[str]
    n_of_class: list[int]  # rows that it is fitted on
    n_groups: int
    n_images: int
    n_images_without_hash: int  # a test cannot know whether it shares these
    threshold: float  # of mean activation
    regularization: str
    C: float
    c_factor: float
    converged: bool
    n_latents: int
    n_latents_kept: int
    tau: float
    token_set: str
    normalize: str
    sae_sha256: str
    tokens: dict[str, Any]  # the kind of tokens: backbone, weights, block, transform, ...
    encoder: dict[str, Any]
    trained: bool  # the backbone
    barcodes: str  # identity
    kept_out: dict[str, Any] | None  # {"column": ..., "values": ...}: rows of the same barcodes kept for a test
    group_by: str | None
    min_images: int
    weights_sha256: str


@dataclass(frozen=True)
class ProbeModel:
    """A fitted probe; at level "image" there is no regression on the number of images."""

    card: Card
    latents: Ints  # (k,) rising
    fit: ColumnFit  # weights (k, c)
    shares: Float  # (c,) of the classes
    counts: CountFit | None

    def predict(self, units: NewUnits) -> dict[str, Float]:
        """(n, c) probabilities by method, the barcode first. A row's prediction does not depend on other rows."""
        found = {"barcode": self.fit.probabilities(units.values)}
        found["majority"] = np.tile(self.shares, (len(units.names), 1))
        if self.counts is not None:
            found["n_images"] = self.counts.probabilities(units.n_images)
        return found


def make_model(final: Final, units: Units, counts: CountFit | None, **more: Any) -> ProbeModel:
    """The model of a fit; `more`: the fields of `Card` that do not follow from the units."""
    latents, n_classes = units.latents[final.kept], len(units.classes)
    n_of_class = np.bincount(units.labels, minlength=n_classes)
    shares = n_of_class / n_of_class.sum()
    card = Card(
        version=VERSION,
        classes=units.classes,
        n_of_class=n_of_class.tolist(),
        n_groups=len(np.unique(units.groups)),
        n_images=int(units.n_images.sum()),
        C=final.C,
        c_factor=final.c_factor,
        converged=final.fit.converged,
        n_latents=units.n_latents,
        n_latents_kept=len(latents),
        weights_sha256=hashlib.sha256(_tensors(latents, final.fit, shares, counts)).hexdigest(),
        **more,
    )
    return ProbeModel(card, latents, final.fit, shares, counts)


def said_of_barcodes(store: BarcodeStore) -> dict[str, Any]:
    """What must be equal so that barcodes of two folders can be compared; fields of `Card`."""
    spec = store.header.spec
    latents_spec = spec["latents_spec"]
    first = latents_spec[0] if isinstance(latents_spec, list) else latents_spec
    return {
        "sae_sha256": first["sae_sha256"],
        "tokens": {name: plain(first["cache"].get(name)) for name in SAME_TOKENS},
        "token_set": spec["token_set"],
        "normalize": spec["normalize"],
        "encoder": {
            **{name: first.get(name) for name in _ENCODER},
            "precision of the cache": first["cache"].get("precision"),
        },
    }


def image_hashes(store: BarcodeStore, tau: float, image_ids: list[list[str]]) -> list[str | None]:
    """The content hash of every image of these units; None for an image without one."""
    images = store.read_obs("image", tau, needed=("content_hash", "status"))
    images = images[images["status"] == STATUS_OK]
    of_image = dict(zip(map(str, images.index), map(str, images["content_hash"]), strict=True))
    return content_hashes(pa.table({"content_hash": [of_image[each] for ids in image_ids for each in ids]}))


def write_model(writer: ResultWriter, model: ProbeModel, hashes: list[str | None]) -> None:
    """Put the model into a folder of results; `hashes` of the images that it is fitted on."""
    write_atomic(writer.root / WEIGHTS, _tensors(model.latents, model.fit, model.shares, model.counts))
    writer.write_table(HASHES, hash_table(hashes))
    writer.write_json(CARD, asdict(model.card))


def read_model(root: Path) -> tuple[ResultStore, ProbeModel, frozenset[str]]:
    """The folder of a probe, its model, and the content hashes of the images that it is fitted on; all checked.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch
        If there is no finished probe of a version that this program reads.
    BadInput
        If it has no model: an older cyto saved none.
    DamagedStore
        If a file is not the one that was written, or says what no model can.
    """
    store = ResultStore(root, PROBE)
    if f"{CARD}.json" not in (store.header.summary or {}).get("files", {}):
        raise BadInput(f"{root} holds no fitted model: an older cyto saved none; run its cyto probe with --overwrite")
    said = store.json(CARD)
    if isinstance(said, dict) and isinstance(said.get("version"), int) and said["version"] > VERSION:
        raise SpecMismatch(
            f"{root}: model version {said['version']} is newer than this cyto, which reads up to {VERSION}; "
            f"upgrade cyto"
        )
    card = stated(Card, said, store.root / f"{CARD}.json")
    data = store.content(WEIGHTS)
    hashes = store.table(HASHES)["content_hash"].to_pylist()
    try:
        model = _from_tensors(card, data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedStore(
            f"{store.root / WEIGHTS} is not the model that model.json says ({reason}); run its cyto probe with "
            f"--overwrite, or put the file back"
        ) from None
    return store, model, frozenset(value.hex() for value in hashes)


def check_barcodes(model: dict[str, Any], store: BarcodeStore) -> list[str]:
    """Check that a model can be applied to these barcodes; warnings on settings that change barcodes a little.

    Parameters
    ----------
    model : fields of its card: what `said_of_barcodes` gives, `level`, `tau`, `n_latents`

    Raises
    ------
    SpecMismatch
        If they are of another SAE, tau, kind of tokens, normalisation, token set or number of latents; it says which.
    """
    said = said_of_barcodes(store)
    cannot = f"{store.root} cannot be tested by this model"
    if said["sae_sha256"] != model["sae_sha256"]:
        raise SpecMismatch(
            f"{cannot}: its latents are of another SAE (weights {said['sae_sha256'][:12]}…, the model's "
            f"{model['sae_sha256'][:12]}…); encode these images with the SAE of the model (cyto sae encode)"
        )
    if said["tokens"] != model["tokens"]:
        raise SpecMismatch(
            f"{cannot}: its tokens are of another kind (its {describe_difference(said['tokens'], model['tokens'])} of "
            f"the model); extract both caches alike (cyto cache extract)"
        )
    for name, what in (("normalize", "normalisation"), ("token_set", "token set")):
        if said[name] != model[name]:
            raise SpecMismatch(
                f"{cannot}: its {what} is {said[name]}, the model's is {model[name]}; count it again with "
                f"cyto barcode --{name.replace('_', '-')} {model[name]}"
            )
    if model["tau"] not in store.taus:
        raise SpecMismatch(
            f"{cannot}: it is counted at tau {', '.join(map(tau_text, store.taus))}, the model is of tau "
            f"{tau_text(model['tau'])}; count it again with cyto barcode --tau {tau_text(model['tau'])}"
        )
    n_latents = store.matrix(model["level"], model["tau"]).shape[1]
    if n_latents != model["n_latents"]:
        raise SpecMismatch(
            f"{cannot}: it has {n_latents:,} latents, the model's SAE has {model['n_latents']:,}; count it again from "
            f"latents of that SAE"
        )
    if said["encoder"] != model["encoder"]:
        return [
            f"equal images may differ a little between training and test: "
            f"{describe_difference(model['encoder'], said['encoder'])}"
        ]
    return []


def check_unseen(
    seen: frozenset[str], n_without: int, hashes: list[str | None], image_ids: list[list[str]], place: Path
) -> list[str]:
    """Check that the test shares no image with the training; warnings where that cannot be known.

    Parameters
    ----------
    seen, n_without : content hashes of the images that the model is fitted on, and how many of these have none
    hashes, image_ids : of the images of the test, those of each unit together

    Raises
    ------
    BadInput
        If images are shared; the message says how many, and which.
    """
    names = [image_id for ids in image_ids for image_id in ids]
    shared = [name for name, value in zip(names, hashes, strict=True) if value in seen]
    if shared:
        raise BadInput(shared_images(len(shared), len(names), shared, place))
    without = {"of the training": n_without, "of the test": sum(value is None for value in hashes)}
    said = [f"{n:,} {which}" for which, n in without.items() if n]
    if said:
        return [
            f"images without a content hash ({' and '.join(said)}): whether training and test share them is not known"
        ]
    return []


def units_config(card: Card, **changes: Any) -> UnitConfig:
    """How the units of a test are read: as those of the training, but for `changes`."""
    settings = {
        "level": card.level,
        "target": card.target,
        "tau": card.tau,
        "group_by": card.group_by,
        "min_images": card.min_images,
    }
    return UnitConfig(**{**settings, **changes})


def _tensors(latents: Ints, fit: ColumnFit, shares: Float, counts: CountFit | None) -> bytes:
    """The content of the safetensors file; the same numbers give the same bytes."""
    arrays = {"latents": latents, "weights": fit.weights, "intercept": fit.intercept, "shares": shares}
    if counts is not None:
        arrays |= {
            "log_n_images": np.array([counts.mean, counts.sd]),
            "n_images_weights": counts.fit.weights,
            "n_images_intercept": counts.fit.intercept,
        }
    return save({name: np.ascontiguousarray(values) for name, values in arrays.items()})


def _from_tensors(card: Card, data: bytes) -> ProbeModel:
    """The model of a safetensors file; ValueError if it is not what the card says."""
    if hashlib.sha256(data).hexdigest() != card.weights_sha256:
        raise ValueError("its SHA-256 is another")
    arrays = load(data)
    c = len(card.classes)
    _require(card.level in LEVELS, f"its level is {card.level!r}")
    _require(c >= 2 and len(set(card.classes)) == c == len(card.n_of_class), "classes must differ, and be two or more")
    _require(math.isfinite(card.threshold) and card.threshold >= 0, "the threshold must be a number of at least 0")
    latents = _array(arrays, "latents", (card.n_latents_kept,), np.int64)
    _require(bool((np.diff(latents) > 0).all()), "latents must rise")
    _require(not len(latents) or 0 <= latents[0] <= latents[-1] < card.n_latents, "latents must be those of the SAE")
    weights, intercept = _array(arrays, "weights", (len(latents), c)), _array(arrays, "intercept", (c,))
    counts = None
    if card.level == "patient":
        mean, sd = _array(arrays, "log_n_images", (2,)).tolist()
        _require(sd > 0, "a standard deviation must be above 0")
        of_counts = _array(arrays, "n_images_weights", (1, c)), _array(arrays, "n_images_intercept", (c,))
        counts = CountFit(mean, sd, _whole(*of_counts))
    return ProbeModel(card, latents, _whole(weights, intercept), _array(arrays, "shares", (c,)), counts)


def _whole(weights: Float, intercept: Float) -> ColumnFit:
    """A fit of all classes, as saved."""
    n_classes = len(intercept)
    return ColumnFit(np.arange(n_classes), weights, intercept, n_classes, n_steps=0, converged=True)


def _array(arrays: dict[str, Any], name: str, shape: tuple[int, ...], kind: Any = np.float64) -> npt.NDArray[Any]:
    found = arrays[name]
    _require(found.shape == shape, f"{name} has the shape {found.shape}, expected {shape}")
    _require(found.dtype == kind, f"{name} is of {found.dtype}, expected {np.dtype(kind)}")
    _require(bool(np.isfinite(found).all()), f"{name} holds what is not finite")
    return np.asarray(found)


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)
