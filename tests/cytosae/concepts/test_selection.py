"""The experts' sample: who takes part, how clusters are cut, and that it cannot change without a word."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from concept_folders import make_concepts

from cli import cli
from cytosae.concepts import FILE, SelectionConfig, read_selection, select_latents
from stores import CONCEPTS, ConceptStore, ResultStore
from stores.errors import BadInput, DamagedStore, SpecMismatch, StoreNotFound


def blobs(root: Path, *, n_each: int = 20) -> tuple[ConceptStore, np.ndarray]:
    """Latents in three groups far apart in log10, and some below the threshold; (n_latents,) the group, -1: none."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([-1, 0, 1, 2], n_each))
    mean = np.choose(group + 1, [1e-5, 0.5, 0.05, 0.003]) * rng.uniform(0.9, 1.1, len(group))
    frequency = np.choose(group + 1, [0.5, 0.01, 0.9, 0.001]) * rng.uniform(0.9, 1.1, len(group))
    silent = {"frequency": [0.0] * len(group), "mean_activation": [0.0] * len(group)}
    found = {"frequency": frequency.tolist(), "mean_activation": mean.tolist()}
    return make_concepts(root, {"blood": found, "marrow": silent}), group


def test_every_cluster_gives_its_share(tmp_path: Path) -> None:
    """The planted groups are the clusters, the largest mean activation first; what is below the threshold stays out."""
    concepts, group = blobs(tmp_path / "c")
    config = SelectionConfig(dataset="blood", clusters=3, per_cluster=4)
    found = select_latents(concepts, config)
    clusters = found.table["cluster"].to_pylist()
    assert clusters == [0] * 4 + [1] * 4 + [2] * 4
    assert [group[latent] for latent in found.latents] == clusters
    assert len(set(found.latents)) == 12
    assert (found.n_candidates, found.cluster_sizes) == (60, (20, 20, 20))
    table = concepts.latents("blood")
    for name in ("mean_activation", "frequency"):
        expected = [table[name][latent].as_py() for latent in found.latents]
        assert found.table[name].to_pylist() == expected
    assert set(found.table["dataset"].to_pylist()) == {"blood"}
    other = select_latents(
        concepts, SelectionConfig(dataset="blood", clusters=3, per_cluster=4, seed=1), overwrite=True
    )
    assert other.latents != found.latents
    assert read_selection(concepts).latents == other.latents


def test_the_threshold_itself_takes_part(tmp_path: Path) -> None:
    values = {"frequency": [0.5, 0.6, 0.7], "mean_activation": [1e-3, np.nextafter(1e-3, 0), 2e-3]}
    found = select_latents(make_concepts(tmp_path / "c", {"d": values}), SelectionConfig(dataset="d"))
    assert sorted(found.latents) == [0, 2]


def test_clusters_are_cut_in_log10_unless_as_released(tmp_path: Path) -> None:
    """Mean activations decades apart at similar frequencies: log10 tells them apart, the plain values do not."""
    mean, frequency = np.repeat([1e-3, 1e-1], 10), np.tile([0.5, 0.9], 10)
    concepts = make_concepts(tmp_path / "c", {"d": {"frequency": frequency.tolist(), "mean_activation": mean.tolist()}})
    for as_released, feature in ((False, mean), (True, frequency)):
        config = SelectionConfig(dataset="d", clusters=2, per_cluster=10, as_released=as_released)
        found = select_latents(concepts, config, overwrite=True)
        for cluster in (0, 1):
            latents = [
                n for n, c in zip(found.latents, found.table["cluster"].to_pylist(), strict=True) if c == cluster
            ]
            assert len(latents) == 10
            assert len(set(feature[latents])) == 1


def test_few_latents_give_all_they_have_and_say_so(tmp_path: Path) -> None:
    """Three latents, two of them equal in both features: two clusters, no warning of a library."""
    values = {"frequency": [0.5, 0.5, 0.001], "mean_activation": [0.1, 0.1, 0.01]}
    make_concepts(tmp_path / "c", {"d": values})
    done = CliRunner().invoke(cli, ["concept", "select", str(tmp_path / "c")])
    assert done.exit_code == 0, done.output
    assert "3 of 3 latents of d" in done.stdout
    assert "fewer clusters than 10" in done.stdout
    assert "all latents taken of 2 clusters with fewer than 5 (2, 1)" in done.stdout
    assert "cluster 0 (2 latents): 0, 1" in done.stdout


def test_repeated_is_the_same_and_other_settings_are_refused(tmp_path: Path) -> None:
    concepts, _ = blobs(tmp_path / "c")
    with pytest.raises(StoreNotFound, match=r"no selection in .* Make one with cyto concept select"):
        read_selection(concepts)
    first = select_latents(concepts, SelectionConfig(dataset="blood"))
    before = (concepts.root / FILE).read_bytes()
    again = select_latents(concepts, SelectionConfig(dataset="blood"))
    assert (first.was_complete, again.was_complete) == (False, True)
    assert again.table.equals(first.table)
    with pytest.raises(SpecMismatch, match=r"with other settings \(seed 0 against 1\); add --overwrite"):
        select_latents(concepts, SelectionConfig(dataset="blood", seed=1))
    assert (concepts.root / FILE).read_bytes() == before
    select_latents(concepts, SelectionConfig(dataset="blood"), overwrite=True)
    assert (concepts.root / FILE).read_bytes() == before
    said = json.loads(pq.read_schema(concepts.root / FILE).metadata[b"cyto"])
    assert said["settings"] == {
        **{"dataset": "blood", "threshold": 1e-3, "clusters": 10, "per_cluster": 5, "seed": 0, "as_released": False},
        "concepts": concepts.identity,
    }
    ResultStore(concepts.root, CONCEPTS).check()  # the statistics are as they were


def test_a_changed_or_foreign_selection_is_found(tmp_path: Path) -> None:
    concepts, _ = blobs(tmp_path / "c")
    select_latents(concepts, SelectionConfig(dataset="blood"))
    path = concepts.root / FILE
    other = make_concepts(tmp_path / "other", {"blood": {"frequency": [0.5], "mean_activation": [0.5]}})
    (other.root / FILE).write_bytes(path.read_bytes())
    with pytest.raises(DamagedStore, match="was drawn from other concepts"):
        read_selection(other)
    table = pq.read_table(path)
    changed = table.set_column(0, "latent", [[99] * table.num_rows]).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, path)
    with pytest.raises(DamagedStore, match="its rows are not the ones that were written"):
        read_selection(concepts)
    for content in (b"", b"PAR1" * 9):
        path.write_bytes(content)
        with pytest.raises(DamagedStore, match=r"is not a selection .* --overwrite makes it again"):
            select_latents(concepts, SelectionConfig(dataset="blood"))
    select_latents(concepts, SelectionConfig(dataset="blood"), overwrite=True)
    assert read_selection(concepts).n_candidates == 60


def test_mistakes(tmp_path: Path) -> None:
    concepts, _ = blobs(tmp_path / "c")
    with pytest.raises(BadInput, match=r"no latent of dataset marrow has a mean activation of 0.001 or more; the larg"):
        select_latents(concepts, SelectionConfig(dataset="marrow"))
    silent = make_concepts(tmp_path / "s", {"blood": {"mean_activation": [0.0, 0.0], "frequency": [0.0, 0.0]}})
    with pytest.raises(BadInput, match="no latent of dataset blood is active in any image: there is none to draw"):
        select_latents(silent, SelectionConfig(threshold=0))
    with pytest.raises(BadInput, match=r"no dataset 'skin' in .*; it holds blood, marrow"):
        select_latents(concepts, SelectionConfig(dataset="skin"))
    with pytest.raises(BadInput, match="threshold must be a mean activation of at least 0; found nan"):
        SelectionConfig(dataset="blood", threshold=float("nan"))
    with pytest.raises(BadInput, match="per_cluster must be at least 1; found 0"):
        SelectionConfig(dataset="blood", per_cluster=0)
    done = CliRunner().invoke(cli, ["concept", "select", str(concepts.root)])
    assert done.exit_code == 1
    assert "holds blood, marrow; say which with --dataset" in done.stderr
    assert not (concepts.root / FILE).exists()


def test_python_says_what_the_command_prints(tmp_path: Path) -> None:
    """A path and no settings are enough; the last value of a notebook's cell shows lines, warnings and latents."""
    values = {"frequency": [0.5, 0.5, 0.001], "mean_activation": [0.1, 0.1, 0.01]}
    root = make_concepts(tmp_path / "c", {"<d>": values}).root
    found = select_latents(root)
    assert (found.out, found.config.dataset, found.was_complete) == (root / FILE, "<d>", False)
    done = CliRunner().invoke(cli, ["concept", "select", str(root)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == list(found.lines())
    assert f"warning: {found.warnings[0]}\n" in done.stderr
    shown = found._repr_html_()
    assert "of &lt;d&gt; with a mean activation" in shown
    assert "<d>" not in shown
    assert read_selection(ConceptStore(root)).config == found.config
