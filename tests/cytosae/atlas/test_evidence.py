"""What other commands found, by latent: each folder's rows, whose SAE they are of, and what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cytosae.atlas.evidence import Evidence, EvidenceStores, open_evidence
from stores import begin_results
from stores.errors import DamagedStore, SpecMismatch
from stores.spec import ABLATION, MASKS, REPLICATION, SCORECARD, STABILITY, Format

OURS, OTHER = "1" * 64, "2" * 64
N = 4
NONE: dict[str, Any] = {"causes": [], "masks": [], "replications": [], "stability": None, "score": None, "names": ()}


def folder(root: Path, kind: Format, spec: dict[str, Any], **tables: list[dict[str, Any]]) -> Path:
    writer = begin_results(root, kind, spec)
    for name, rows in tables.items():
        writer.write_table(name, pa.Table.from_pylist(rows))
    writer.finish({})
    return root


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our SAE is the second of the stability; latent 3 was not compared there and is in no other table."""
    root = tmp_path_factory.mktemp("evidence")
    pairs = [(0, 1, 0.5), (0, 2, 0.5), (1, 2, 0.3)]
    matches = [(0, 1, 7, 0, 0.9), (0, 1, 8, 1, 0.4), (0, 2, 0, 0, 0.9), (1, 2, 0, 5, 0.31), (1, 2, 2, 6, 0.3)]
    return {
        "causes": folder(
            root / "causes",
            ABLATION,
            {"sae_sha256": OURS},
            effects=[
                {"latent": 1, "quantity": name, "effect": 0.5, "p": 0.01}
                for name in ("cls_change", "cls_norm", "probability:blast: B", "logit:blast")
            ],
        ),
        "stability": folder(
            root / "stability",
            STABILITY,
            {"saes": [{"sae_sha256": OTHER}, {"sae_sha256": OURS}, {"sae_sha256": "3" * 64}]},
            pairs=[{"sae_a": a, "sae_b": b, "null_p99": null} for a, b, null in pairs],
            matches=[
                dict(zip(("sae_a", "sae_b", "latent_a", "latent_b", "cosine"), row, strict=True)) for row in matches
            ],
            stability=[
                {"sae": sae, "latent": n, "n_matched": 2, "mean_matched": None if n == 3 else 0.1 * n}
                for sae in (0, 1)
                for n in range(9 if sae == 0 else N)
            ],
        ),
        "score": folder(
            root / "score",
            SCORECARD,
            {"sae_sha256": OURS},
            scorecard=[
                {"measure": "morans_i", "label": None, "value": 0.4, "null": 0.0, "null_high": 0.1},
                {"measure": "best_average_precision", "label": "a", "value": 0.9, "null": 0.2, "null_high": 0.3},
            ],
            latents=[
                {"latent": 2, "n_images": 5, "n_maps": 5, "monosemanticity": float("nan"), "morans_i": 0.6},
                {"latent": 0, "n_images": 5, "n_maps": 5, "monosemanticity": 0.25, "morans_i": None},
            ],
            labels=[
                {"latent": latent, "label": label, "average_precision": value, "one_latent_probe": 0.1}
                for latent, label, value in ((0, "a", 0.5), (2, "a", 0.2), (0, "b", 0.7), (2, "b", float("nan")))
            ],
        ),
        "masks": folder(
            root / "masks",
            MASKS,
            {"latents": "mine"},
            agreement=[
                {"class": name, "latent": latent, "auroc": auroc, "auroc_p_any": 0.01}
                for name in ("nucleus", "cell")
                for latent, auroc in ((0, 0.9), (1, None))
            ],
        ),
        "replications": [
            folder(
                root / "replication",
                REPLICATION,
                {"discovery": "compared"},
                replication=[{"latent": 2, "p_holm": 0.01, "same_sign": True, "is_replicated": True}],
            )
        ],
    }


def opened(**given: Any) -> EvidenceStores:
    return open_evidence(sae_sha256=OURS, latents=["other", "mine"], comparisons=["compared"], **given)


def test_rows_of_each_latent(paths: dict[str, Any]) -> None:
    stores = opened(**paths)
    found = Evidence(stores, sae_sha256=OURS, n_latents=N, pairs={"compared": {"a": "AML", "b": "CML"}})
    of = [found.of(latent) for latent in range(N)]
    assert of[3] == NONE
    assert [row["name"] for row in of[1]["causes"]] == [
        "final CLS, share of its norm",
        "probability, by the probe of barcodes, of blast: B",
    ]
    # 0: above chance in both pairs of ours, whichever side we are on; 1: below; 2: not above
    assert [of[n]["stability"]["n_found"] for n in range(3)] == [2, 0, 0]
    assert of[0]["stability"] == {"n_found": 2, "n_others": 2, "mean_matched": 0.0}
    assert of[0]["score"]["label"]["label"] == "b"
    assert (of[0]["score"]["monosemanticity"], of[0]["score"]["morans_i"]) == (0.25, None)
    assert (of[2]["score"]["monosemanticity"], of[2]["score"]["morans_i"]) == (None, 0.6)
    assert of[2]["score"]["label"]["label"] == "a"
    assert (of[2]["score"]["morans_i_null_high"], of[2]["score"]["monosemanticity_null"]) == (0.1, None)
    assert [row["class"] for row in of[0]["masks"]] == ["nucleus", "cell"]
    assert of[1]["masks"] == []
    assert of[2]["replications"][0]["pair"] == {"a": "AML", "b": "CML"}


def test_without_folders_there_is_none() -> None:
    found = Evidence(opened(), sae_sha256=OURS, n_latents=N, pairs={})
    assert found.of(0) == NONE
    assert found.stores.spec == {}
    assert found.stores.headers == []


def test_settings_and_provenance_name_what_was_given(paths: dict[str, Any]) -> None:
    stores = opened(score=paths["score"], replications=paths["replications"])
    assert [what for what, _, _ in stores.headers] == ["scorecard", "replication"]
    assert set(stores.spec) == {"score", "replications"}
    assert stores.spec["replications"] == [stores.replications[0].header.identity]


@pytest.mark.parametrize(
    ("kind", "format", "spec", "words"),
    [
        ("causes", ABLATION, {"sae_sha256": OTHER}, "is of another SAE .222222222222…. than the latents .1{12}"),
        ("score", SCORECARD, {"sae_sha256": OTHER}, "give a scorecard of the SAE that the latents were made with"),
        ("stability", STABILITY, {"saes": [{"sae_sha256": OTHER}]}, "compares other SAEs .2{12}…. than that"),
        ("masks", MASKS, {"latents": "strange"}, "was made from other latents; give a folder of cyto concept masks"),
        (
            "replications",
            REPLICATION,
            {"discovery": "strange"},
            "that the atlas does not have; give that with --compare",
        ),
    ],
)
def test_folders_of_something_else_are_refused(
    tmp_path: Path, kind: str, format: Format, spec: dict[str, Any], words: str
) -> None:
    made = folder(tmp_path / "other", format, spec)
    with pytest.raises(SpecMismatch, match=words):
        opened(**{kind: [made] if kind == "replications" else made})


def test_latents_that_the_sae_does_not_have_are_damage(paths: dict[str, Any]) -> None:
    with pytest.raises(DamagedStore, match="names latents that the SAE does not have"):
        Evidence(opened(score=paths["score"]), sae_sha256=OURS, n_latents=2, pairs={})
    with pytest.raises(DamagedStore, match="does not have one row for each latent of the SAE"):
        Evidence(opened(stability=paths["stability"]), sae_sha256=OURS, n_latents=5, pairs={})
