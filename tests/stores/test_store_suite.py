"""One suite for every kind of artefact: create, interrupt, continue, finish, reopen, pickle, and what is refused."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as ss
import torch
from artefacts import (
    N_IMAGES,
    N_LATENTS,
    N_TOKENS,
    UNREADABLE,
    WIDTH,
    cache_spec,
    cache_tokens,
    contents,
    latent_rows,
    latent_spec,
    manifest,
    outcome,
    write_cache,
    write_latents,
)
from barcode_writer import BarcodeWriter

from cytosae.sae import SparseAutoencoder, load_sae, save_sae
from stores import activation_writer, latent_writer
from stores.activation_spec import chunks_written
from stores.activation_store import ActivationStore
from stores.activation_writer import ActivationWriter
from stores.barcode_store import BarcodeStore
from stores.errors import CytoError, DamagedStore, IncompleteStore, SpecMismatch, StoreNotFound
from stores.latent_store import LatentStore
from stores.latent_writer import LatentWriter
from stores.result_folder import ResultStore, begin_results
from stores.spec import (
    ACTIVATIONS,
    BARCODES,
    FORMATS,
    LATENTS,
    SAE,
    Format,
    Header,
    find_header,
    new_header,
    write_header,
)
from stores.verify import verify_activations, verify_latents

Numbers = dict[str, npt.NDArray[Any]]

RESULTS = np.linspace(-1, 2, N_LATENTS)
TORN_LINE = b'{"chunk": 2, "first_'

# ---------------------------------------------------------------------------------- tiny stores of every kind


def write_sae(root: Path, n_steps: int | None = None) -> None:
    """A folder as `train` leaves it; n: only the header of a run that goes on."""
    root.mkdir(exist_ok=True)
    header = new_header(SAE, {"width": WIDTH, "n_latents": N_LATENTS, "tokens": cache_spec().same_tokens})
    write_header(root, header)
    if n_steps is None:
        model = SparseAutoencoder(WIDTH, N_LATENTS)
        model.init_weights(torch.Generator().manual_seed(0))
        save_sae(root, model, header, {"steps": 3})


def write_barcodes(root: Path, n_steps: int | None = None) -> None:
    """A barcodes folder with its image level, two blocks of rows; n: so many blocks, then walk away."""
    root.mkdir(exist_ok=True)
    header = new_header(BARCODES, {"latents": "12" * 32, "tau": 0.2})
    write_header(root, header)
    writer = BarcodeWriter(root / "image.zarr", n_latents=N_LATENTS, layers=("max",))
    counts = ss.csr_matrix(latent_rows()[::N_TOKENS])
    for start in range(0, N_IMAGES, 5)[:n_steps]:
        writer.append({"X": counts[start : start + 5], "max": counts[start : start + 5]})
    if n_steps is None:
        obs = pd.DataFrame({"patient": "P1"}, index=pd.Index(manifest()["image_id"].to_pylist(), name="image_id"))
        var = pd.DataFrame({"latent": range(N_LATENTS)}, index=[str(n) for n in range(N_LATENTS)])
        writer.finish(obs=obs, var=var, uns={"cyto": {"tau": 0.2}})
        write_header(root, Header(**{**vars(header), "complete": True, "summary": {}}))


def write_results(root: Path, n_steps: int | None = None, *, format: Format, seed: int = 0, **options: Any) -> None:
    """A folder of results with a table, a value and no figure; n: so many of the two files, then walk away."""
    writer = begin_results(root, format, {"barcodes": "34" * 32, "seed": seed}, packages=("numpy",), **options)
    if writer.is_complete:
        return
    if n_steps is None or n_steps > 0:
        writer.write_table("differential", pa.table({"latent": np.arange(N_LATENTS), "value": RESULTS + seed}))
    if n_steps is None or n_steps > 1:
        writer.write_json("scores", {"total": float(RESULTS.sum()) + seed})
    if n_steps is None:
        writer.finish({"n_latents": N_LATENTS})


def read_latents(store: LatentStore) -> Numbers:
    rows = store.read_images(0, N_IMAGES)
    return {"indices": rows.indices, "values": rows.values, "indptr": rows.indptr, "images": store.image_indptr}


@dataclass(frozen=True)
class Kind:
    """What the suite must know of one kind of artefact."""

    format: Format
    write: Callable[..., None]  # (root, n_steps=None): begin or continue; n_steps: how far, then walk away
    open: Callable[[Path], Any]
    read: Callable[[Any], Numbers]
    numbers: Callable[[], Numbers]  # what `read` must give
    n_steps: int  # at most, before the end


STORE_KINDS = (
    Kind(
        format=ACTIVATIONS,
        write=write_cache,
        open=ActivationStore,
        read=lambda store: {"tokens": store.read_images(range(N_IMAGES)), "readable": store.readable()},
        numbers=lambda: {"tokens": cache_tokens(), "readable": np.arange(N_IMAGES) != UNREADABLE},
        n_steps=3,
    ),
    Kind(
        format=LATENTS,
        write=write_latents,
        open=LatentStore,
        read=read_latents,
        numbers=lambda: {
            "indices": latent_rows().indices,
            "values": latent_rows().data,
            "indptr": latent_rows().indptr,
            "images": latent_rows().indptr[::N_TOKENS],
        },
        n_steps=5,
    ),
    Kind(
        format=SAE,
        write=write_sae,
        open=load_sae,
        read=lambda run: {"n_weights": np.array(sum(value.numel() for value in run.model.parameters()))},
        numbers=lambda: {"n_weights": np.array(2 * WIDTH * N_LATENTS + N_LATENTS + WIDTH)},
        n_steps=1,
    ),
    Kind(
        format=BARCODES,
        write=write_barcodes,
        open=BarcodeStore,
        read=lambda store: {"X": store.read("image").X.toarray(), "max": store.read("image").layers["max"].toarray()},
        numbers=lambda: dict.fromkeys(["X", "max"], latent_rows()[::N_TOKENS].toarray()),
        n_steps=2,
    ),
)
RESULT_KINDS = tuple(
    Kind(
        format=format,
        write=partial(write_results, format=format),
        open=partial(ResultStore, format=format),
        read=lambda store: {
            "values": store.table("differential")["value"].to_numpy(),
            "total": np.array(store.json("scores")["total"]),
        },
        numbers=lambda: {"values": RESULTS, "total": RESULTS.sum()},
        n_steps=2,
    )
    for format in FORMATS.values()
    if format not in (ACTIVATIONS, LATENTS, SAE, BARCODES)
)
KINDS = (*STORE_KINDS, *RESULT_KINDS)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.format.kind)
every_result = pytest.mark.parametrize("kind", RESULT_KINDS, ids=lambda kind: kind.format.kind)


pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_chunks: None) -> dict[str, Path]:
    """One finished artefact of every kind; read-only."""
    root = tmp_path_factory.mktemp("finished")
    for kind in KINDS:
        kind.write(root / kind.format.kind)
    return {kind.format.kind: root / kind.format.kind for kind in KINDS}


def edit_header(root: Path, **changes: Any) -> None:
    """Change fields of the header on disk, as somebody with a text editor would."""
    names = {kind.format.header_file for kind in KINDS}
    header_file = next(path for path in root.iterdir() if path.name in names)
    whole = json.loads(header_file.read_text())
    raw = whole["attributes"]["cyto"] if header_file.name == "zarr.json" else whole
    raw |= changes
    header_file.write_text(json.dumps(whole))


# --------------------------------------------------------------------------------------- finish, reopen, pickle


@every_kind
def test_what_was_written_is_what_is_read(kind: Kind, finished: dict[str, Path]) -> None:
    """Also by a copy that travelled through pickle, and from another working folder."""
    store = kind.open(finished[kind.format.kind])
    copies = [store] if kind.format is SAE else [store, pickle.loads(pickle.dumps(store))]
    for copy in copies:
        found = kind.read(copy)
        for name, expected in kind.numbers().items():
            np.testing.assert_array_equal(found[name], expected, strict=found[name].dtype == expected.dtype)


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.format.kind)
def test_a_store_pickles_as_its_absolute_path(
    kind: Kind, finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Dask worker, which runs elsewhere, reopens it; no array travels."""
    root = finished[kind.format.kind]
    monkeypatch.chdir(root.parent)
    pickled = pickle.dumps(kind.open(Path(root.name)))
    assert len(pickled) < 500
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickled).identity == kind.open(root).identity


@every_kind
def test_equal_settings_have_equal_identity_and_files(kind: Kind, finished: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of the time, the place or chance gets into an artefact: written twice, it is the same bytes."""
    kind.write(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished[kind.format.kind])
    first, second = find_header(tmp_path / "again"), find_header(finished[kind.format.kind])
    assert first == second
    assert first is not None
    assert first.complete


# ------------------------------------------------------------------------------------------- interrupt, continue


@pytest.mark.stress
@every_kind
@pytest.mark.parametrize("repeats", [1, 2])
def test_interrupted_and_continued_equals_uninterrupted(
    kind: Kind, repeats: int, finished: dict[str, Path], tmp_path: Path
) -> None:
    """After any number of steps; what a killed writer leaves (torn line, *.partial, a chunk nobody named) is swept."""
    for n_steps in range(kind.n_steps + 1):
        root = tmp_path / str(n_steps)
        for _ in range(repeats):
            kind.write(root, n_steps)
            for journal in root.glob("journal*"):
                journal.write_bytes(journal.read_bytes() + TORN_LINE)
            if kind.format not in (SAE, BARCODES):
                (root / f"{kind.format.header_file}.0123.partial").write_bytes(b"{")
            if kind.format is ACTIVATIONS:
                chunk = root / "tokens" / "c" / "2" / "0" / "0"
                chunk.parent.mkdir(parents=True, exist_ok=True)
                chunk.write_bytes(b"torn") if n_steps * repeats < 3 else None
                chunk.with_name("0.0123.partial").write_bytes(b"torn")
            with pytest.raises(IncompleteStore, match="is incomplete"):
                kind.open(root)
        kind.write(root)
        assert contents(root) == contents(finished[kind.format.kind]), f"after {n_steps} steps"


class Crash(BaseException):
    """The power goes."""


# one kind of results stands for all: they have one writer
@pytest.mark.stress
@pytest.mark.parametrize("kind", [*KINDS[:2], RESULT_KINDS[0]], ids=lambda kind: kind.format.kind)
def test_a_crash_at_any_point_costs_no_byte(
    kind: Kind, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sync in turn is the last thing that happens; the same call again gives the very same files."""
    n_left = 0

    def fsync(descriptor: int) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise Crash

    expected = contents(finished[kind.format.kind])
    for n_syncs in range(0, 1000, 7 if kind.format is LATENTS else 1):
        root, n_left = tmp_path / str(n_syncs), n_syncs
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                kind.write(root)
                break  # so many syncs were enough
            except Crash:
                pass
        if root.exists() and find_header(root) is not None and not find_header(root).complete:  # type: ignore[union-attr]
            with pytest.raises(IncompleteStore):
                kind.open(root)
        kind.write(root)
        assert contents(root) == expected, f"after {n_syncs} syncs"
        shutil.rmtree(root)
    assert n_syncs > (30 if kind in STORE_KINDS else 5)


@pytest.mark.parametrize(("kind", "module"), [(KINDS[0], activation_writer), (KINDS[1], latent_writer)])
def test_a_crash_just_before_the_mark_costs_no_work(
    kind: Kind, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncing 67 GB takes minutes: whoever stops there has nothing to compute again."""

    def write_header(root: Path, header: Header) -> None:
        raise Crash

    kind.write(tmp_path / "store", kind.n_steps)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_header", write_header)
        with pytest.raises(Crash):
            kind.write(tmp_path / "store")
    if kind.format is ACTIVATIONS:
        assert ActivationWriter(tmp_path / "store", cache_spec(), manifest()).missing_chunks() == []
    else:
        assert LatentWriter(tmp_path / "store", latent_spec(), outcome()).n_images == N_IMAGES


def test_a_chunk_damaged_before_the_end_is_written_again(finished: dict[str, Path], tmp_path: Path) -> None:
    """A journal line counts only with a file of its size and checksum."""
    chunks = [tmp_path / "store" / "tokens" / "c" / str(n) / "0" / "0" for n in range(3)]
    write_cache(tmp_path / "store", 3)
    chunks[0].unlink()
    chunks[1].write_bytes(chunks[2].read_bytes())  # right size, whole, but not the one that was written
    chunks[2].write_bytes(chunks[2].read_bytes()[:-1])
    assert ActivationWriter(tmp_path / "store", cache_spec(), manifest()).missing_chunks() == [0, 1, 2]
    write_cache(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(finished["activation cache"])


def test_a_writer_knows_how_far_it_came(tmp_path: Path) -> None:
    write_cache(tmp_path / "acts", 2)
    writer = ActivationWriter(tmp_path / "acts", cache_spec(), manifest())
    assert writer.counts() == (8, 1)
    assert writer.errors() == {5: "file ends early"}
    with next((tmp_path / "acts").glob("journal*.jsonl")).open("ab") as journal:
        strange: list[Any] = [[1], {}, "2", 3, -1, None]  # what a stranger may have written
        for chunk in strange:
            journal.write(json.dumps({"chunk": chunk, "crc32c": "00000000"}).encode() + b"\n")
    assert chunks_written(tmp_path / "acts", cache_spec()) == [0, 1]
    write_latents(tmp_path / "latents", 2)
    assert LatentWriter(tmp_path / "latents", latent_spec(), outcome()).n_images == 4


# ------------------------------------------------------------------------------------------- folders of results


@every_result
def test_complete_results_are_not_made_again(kind: Kind, finished: dict[str, Path], tmp_path: Path) -> None:
    """The same settings find them; others are refused, with the words that differ, and leave them as they are."""
    root = Path(shutil.copytree(finished[kind.format.kind], tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    kind.write(root)
    with pytest.raises(SpecMismatch, match=rf"out holds {kind.format.a_kind} with other settings \(seed 0 against 1\)"):
        kind.write(root, seed=1)
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before


@every_result
def test_overwrite_keeps_the_old_results_until_the_new_are_whole(
    kind: Kind, finished: dict[str, Path], tmp_path: Path
) -> None:
    """Also if the job dies, at any step; and the same command again goes on."""
    root = Path(shutil.copytree(finished[kind.format.kind], tmp_path / "out"))
    for n_steps in range(kind.n_steps + 1):
        kind.write(root, n_steps, seed=1, overwrite=True)
        assert contents(root) == contents(finished[kind.format.kind])
    kind.write(root, seed=1, overwrite=True)
    assert kind.read(kind.open(root))["total"] == RESULTS.sum() + 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@every_result
@pytest.mark.parametrize("name", ["differential.parquet", "scores.json"])
@pytest.mark.parametrize("damage", ["flip", "tear", "remove"])
def test_damage_in_results_is_found_and_mended(
    kind: Kind, name: str, damage: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    """By whoever reads the file, and by the command that would else say that they are complete already."""
    root = Path(shutil.copytree(finished[kind.format.kind], tmp_path / "out"))
    data = bytearray((root / name).read_bytes())
    data[len(data) // 2] ^= damage == "flip"
    (root / name).write_bytes(data[:-1] if damage == "tear" else data)
    if damage == "remove":
        (root / name).unlink()
    what = "is missing" if damage == "remove" else "is not the file that was written"
    words = f"{name} {what}; {kind.format.command} --overwrite makes it again"
    with pytest.raises(DamagedStore, match=words):
        kind.read(kind.open(root))
    with pytest.raises(DamagedStore, match=words):
        kind.write(root)
    kind.write(root, overwrite=True)
    assert contents(root) == contents(finished[kind.format.kind])


# -------------------------------------------------------------------------------------------------- refused


@every_kind
@pytest.mark.parametrize("other", KINDS, ids=lambda kind: kind.format.kind)
def test_another_kind_is_refused_by_name(kind: Kind, other: Kind, finished: dict[str, Path]) -> None:
    if other is kind:
        return
    words = f"no {kind.format.kind} at .*: it holds {other.format.a_kind}, version {other.format.version}"
    with pytest.raises(StoreNotFound, match=words):
        kind.open(finished[other.format.kind])


@every_kind
def test_nothing_and_nothing_of_ours_are_told_apart(kind: Kind, tmp_path: Path) -> None:
    """Both are also a FileNotFoundError, and both say which command makes one."""
    next_step = re.escape(f"Make one with {kind.format.command}")
    with pytest.raises(FileNotFoundError, match=f"no {kind.format.kind} at .*: nothing is there. {next_step}"):
        kind.open(tmp_path / "nowhere")
    (tmp_path / kind.format.header_file).write_text('{"attributes": {"format": "somebody else\'s"}}')
    with pytest.raises(StoreNotFound, match=f"no {kind.format.kind} at .*: it is not a store of ours. {next_step}"):
        kind.open(tmp_path)


@every_kind
def test_a_newer_version_is_refused(kind: Kind, finished: dict[str, Path], tmp_path: Path) -> None:
    """Whatever else is in its header: a newer program may have changed anything but the name and the version."""
    newer = kind.format.version + 1
    for n, changes in enumerate([{}, {"spec": {"what": "nobody knows yet"}, "complete": None, "identity": "0"}]):
        root = Path(shutil.copytree(finished[kind.format.kind], tmp_path / str(n)))
        edit_header(root, format_version=newer, **changes)
        words = (
            f"{kind.format.kind} version {newer} is newer than this cyto, which reads up to {newer - 1}; upgrade cyto"
        )
        with pytest.raises(SpecMismatch, match=words):
            kind.open(root)


@every_kind
def test_an_incomplete_artefact_is_refused_with_the_way_on(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path / "store", 1)
    words = (
        f"store is incomplete: the {kind.format.command} that writes it has not finished. "
        f"Run the same {kind.format.command} command again to continue"
    )
    with pytest.raises(IncompleteStore, match=words):
        kind.open(tmp_path / "store")
    verify = {ACTIVATIONS: verify_activations, LATENTS: verify_latents}.get(kind.format)
    if verify:
        with pytest.raises(IncompleteStore, match=words):
            next(iter(verify(tmp_path / "store")))


@every_kind
def test_a_header_edited_by_hand_is_refused(kind: Kind, finished: dict[str, Path], tmp_path: Path) -> None:
    """Any setting changed, added or taken away; a field that is gone; a number that JSON does not know."""
    header = find_header(finished[kind.format.kind])
    assert header is not None
    root = Path(shutil.copytree(finished[kind.format.kind], tmp_path / "store"))
    changed: list[dict[str, Any]] = [{**header.spec, name: "something else"} for name in header.spec]
    removed = [{other: value for other, value in header.spec.items() if other != name} for name in header.spec]
    for spec in [*changed, *removed, {**header.spec, "new": 1}, {}]:
        edit_header(root, spec=spec)
        with pytest.raises(DamagedStore, match="was changed by hand: its identity does not fit its settings"):
            kind.open(root)
    for broken in (None, "text", 7, {**header.spec, "new": float("nan")}):
        edit_header(root, spec=broken)
        with pytest.raises(DamagedStore, match=r"cannot be read.*"):
            kind.open(root)
    edit_header(root, spec=header.spec)
    kind.open(root)
    edit_header(root, identity="0" * 64)
    with pytest.raises(CytoError, match="changed by hand"):
        kind.open(root)
