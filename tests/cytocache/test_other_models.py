"""Any vision transformer of timm: what is cached is what leaves its block, however its weights were written.

The reference is timm's own, unmodified model on pixels of timm's own transform.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import State
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, Family

from cytocache.backbones import load_backbone
from cytocache.extract import ExtractConfig, extract
from cytocache.model_names import canonical_name, parse_model_name
from cytocache.preprocess import Preprocess
from cytocache.sample import load_backbone_of
from stores import ActivationStore
from stores.errors import BadInput, SpecMismatch

REGISTERS, PLAIN = FAMILIES["DINOv2 with registers"], FAMILIES["ViT/16, 197 tokens"]
SMALL = Family(architecture="vit_tiny_patch16_224", size=64, layout=FAMILIES["SigLIP, no CLS"].layout)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three noisy images: a square, a tall and a wide one."""
    root = tmp_path_factory.mktemp("pictures")
    for n, size in enumerate([(80, 80), (144, 100), (90, 233)]):
        noise = np.random.default_rng(n).integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(noise).save(root / f"{n}.png")
    return sorted(root.glob("*.png"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: family.write(root / str(n)) for n, (name, family) in enumerate(FAMILIES.items())}


def cached(pictures: list[Path], out: Path, backbone: object, **settings: Any) -> npt.NDArray[np.float16]:
    settings = {"device": "cpu", "workers": 1, "batch_size": 2, **settings}
    extract(pictures[0].parent, out, ExtractConfig(backbone=str(backbone), **settings))
    return ActivationStore(out).read_images(range(len(pictures)))


def assert_float16_of(found: npt.NDArray[np.float16], expected: torch.Tensor) -> None:
    full = expected.numpy()
    assert found.shape == full.shape
    assert np.all(np.abs(found.astype(np.float32) - full) <= np.abs(full) * 2.0**-10 + 2.0**-17)


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    @pytest.mark.parametrize("block", [-1, 0])
    def test_tokens_are_those_of_timm(
        self, name: str, block: int, folders: dict[str, Path], pictures: list[Path], tmp_path: Path
    ) -> None:
        """Pixels by the model's own preprocessing, tokens after the block; the layout is in the store."""
        family = FAMILIES[name]
        outputs = family.hooked(family.pixels(pictures))[:-1]
        found = cached(pictures, tmp_path / "a.zarr", folders[name], blocks=(block,))
        assert_float16_of(found, outputs[block])
        assert (outputs[0] - outputs[-1]).abs().max() > 0.1  # else any block would do
        spec = ActivationStore(tmp_path / "a.zarr").spec
        assert spec.layout == family.layout
        assert spec.token_layout == family.layout.text
        assert (spec.tokens_per_image, spec.width, spec.trained) == (found.shape[1], 32, True)
        assert spec.backbone.startswith(f"timm:{family.architecture}?depth=")
        assert str(tmp_path) not in json.dumps(spec.to_dict())

    def test_the_rest_of_the_model_gives_its_final_cls(self, name: str, folders: dict[str, Path]) -> None:
        """From the tokens of any block; a model without CLS is refused only here."""
        family = FAMILIES[name]
        noise = torch.rand(2, family.size, family.size, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte()
        mean, std = (torch.tensor(family.config["pretrained_cfg"][each]).view(3, 1, 1) for each in ("mean", "std"))
        final = family.hooked(noise.permute(0, 3, 1, 2).float().div(255).sub(mean).div(std))[-1]
        for block in range(family.options["depth"]):
            backbone = load_backbone(str(folders[name]), blocks=(block,), keep_tail=True)
            with torch.inference_mode():
                (tokens,) = backbone.tokens(noise)
                if not family.layout.n_cls:
                    with pytest.raises(BadInput, match=r"has no CLS token \(.*4x4 patches, row-major\)"):
                        backbone.final_cls(tokens)
                    continue
                assert (backbone.final_cls(tokens) - final[:, 0]).abs().max() < 1e-5

    @pytest.mark.stress
    def test_it_is_found_again_by_what_the_store_says(
        self, name: str, folders: dict[str, Path], pictures: list[Path], tmp_path: Path
    ) -> None:
        """`cyto cache repair`, `fidelity` and maps of new images load it by the store, with --weights."""
        found = cached(pictures, tmp_path / "a.zarr", folders[name])
        cache = ActivationStore(tmp_path / "a.zarr")
        for weights in (folders[name], folders[name] / "model.safetensors"):
            backbone = load_backbone_of(cache, weights=str(weights), device="cpu")
            assert backbone.preprocess == Preprocess.from_dict(cache.spec.transform)
            pixels = np.stack([backbone.preprocess.resize(Image.open(path)) for path in pictures])
            with torch.inference_mode():
                assert_float16_of(found, backbone.tokens(torch.from_numpy(pixels))[0])
        with pytest.raises(BadInput, match="needs weights"):
            load_backbone_of(cache, weights=None, device="cpu")


def test_other_weights_or_another_model_are_refused_for_a_store(
    folders: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    cached(pictures, tmp_path / "a.zarr", folders["DINOv3"])
    cache = ActivationStore(tmp_path / "a.zarr")
    state = load_file(folders["DINOv3"] / "model.safetensors")
    save_file({key: value * 2 for key, value in state.items()}, tmp_path / "other.safetensors")
    with pytest.raises(SpecMismatch, match="was made with weights of sha256"):
        load_backbone_of(cache, weights=str(tmp_path / "other.safetensors"), device="cpu")
    with pytest.raises(BadInput, match=r"does not fit timm:vit_small_patch16_dinov3\?.*it has width|missing"):
        load_backbone_of(cache, weights=str(folders["SigLIP, no CLS"]), device="cpu")


class TestImageSizes:
    def test_learned_positions_are_interpolated_as_timm_does_it(
        self, folders: dict[str, Path], pictures: list[Path], tmp_path: Path
    ) -> None:
        """A model of 224 pixels at 448, by timm's own filter of checkpoints."""
        from timm.models.vision_transformer import checkpoint_filter_fn

        larger = checkpoint_filter_fn(PLAIN.state(), PLAIN.timm(448))
        expected = PLAIN.hooked(PLAIN.pixels(pictures, 448), size=448, state=larger)
        found = cached(pictures, tmp_path / "a.zarr", folders["ViT/16, 197 tokens"], image_size=448)
        assert_float16_of(found, expected[1])
        assert ActivationStore(tmp_path / "a.zarr").spec.layout.side == 28

    def test_rope_takes_any_size(self, folders: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
        family = FAMILIES["DINOv3"]
        expected = family.hooked(family.pixels(pictures, 112), size=112)
        assert_float16_of(
            cached(pictures, tmp_path / "a.zarr", folders["DINOv3"], image_size=112, blocks=(0,)), expected[0]
        )

    def test_dinobloom_at_448_pixels_has_its_positions_interpolated(self) -> None:
        small, large = (load_backbone("random-vit-tiny", image_size=size) for size in (224, 448))
        assert (large.layout.side, large.preprocess, small.layout.side) == (32, Preprocess(size=448), 16)
        assert large.weights_sha256 == small.weights_sha256
        positions: Any = large.model.pos_embed
        assert positions.shape == (1, 1 + 32 * 32, 192)

    @pytest.mark.parametrize(
        ("backbone", "size", "words"),
        [
            ("random-vit-tiny", 225, r"225 pixels are no multiple .* which have 14; take --image-size 238"),
            ("random-vit-tiny", 5000, "the image size must be 1 to 4,096 pixels; found 5,000"),
            ("timm:test_vit", 100, r"100 pixels are no multiple .* which have 16; take --image-size 96 or 112"),
            ("timm:test_vit", 8, "take --image-size 16"),
        ],
    )
    def test_a_size_that_does_not_fit_names_one_that_does(self, backbone: str, size: int, words: str) -> None:
        with pytest.raises(BadInput, match=words):
            load_backbone(backbone, weights="random", image_size=size)

    def test_crop_none_shows_the_model_the_whole_image(
        self, folders: dict[str, Path], pictures: list[Path], tmp_path: Path
    ) -> None:
        """Else a note says what is cut off."""
        folder, out = str(folders["ViT/16, 197 tokens"]), tmp_path / "a.zarr"
        done = extract(pictures[0].parent, out, ExtractConfig(backbone=folder, device="cpu", workers=1))
        assert "cuts off 10.0% of the height and width and the ends of images that are no squares" in done.notes[-1]
        config = ExtractConfig(backbone=folder, device="cpu", workers=1, crop="none")
        assert extract(pictures[0].parent, tmp_path / "b.zarr", config).notes == ()
        transform = ActivationStore(tmp_path / "b.zarr").spec.transform
        assert "crop_mode" not in transform
        assert Preprocess.from_dict(transform) == Preprocess(
            size=224, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        )


def in_chunks(state: State) -> State:
    """As FSDP training writes blocks: two in each chunk, numbered through."""
    return {
        (
            f"blocks.{int(key.split('.')[1]) // 2}.{key.removeprefix('blocks.')}" if key.startswith("blocks.") else key
        ): value
        for key, value in state.items()
    }


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def student(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


LAYOUTS = {
    "bare": lambda s: s,
    "teacher": lambda s: {
        "student": prefixed("backbone.", student(s)),
        "teacher": {**prefixed("backbone.", s), "dino_head.mlp.0.weight": torch.ones(2, 2)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "iteration": 99,
    },
    "model": lambda s: {
        "model": {**prefixed("student.backbone.", student(s)), **prefixed("teacher.backbone.", s)},
        "iteration": 99,
    },
    "model in chunks": lambda s: {"model": prefixed("teacher.backbone.", in_chunks(s))},
    "state_dict, module": lambda s: {"state_dict": prefixed("module.", s), "epoch": 3},
    "student alone": lambda s: {"student": prefixed("module.backbone.", s)},
    "model_ema": lambda s: {"model": student(s), "model_ema": s},
    "compiled": lambda s: {"state_dict": prefixed("_orig_mod.", s)},
    "FSDP": lambda s: {"teacher": prefixed("_fsdp_wrapped_module.backbone.", s)},
    "lightning": lambda s: {"state_dict": {**prefixed("model.backbone.", s), "head.weight": torch.ones(2)}},
}


class TestCheckpoints:
    """The same weights in every layout that training leaves behind give the same tokens."""

    @pytest.mark.stress
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_backbone_is_found_in_what_training_writes(self, layout: str, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.pth"
        torch.save(LAYOUTS[layout]({**PLAIN.state(), "mask_token": torch.zeros(1, 32)}), path)
        backbone = load_backbone(f"{path}?num_heads=2", blocks=(-1,))
        assert backbone.name == "timm:vit_base_patch16_224?depth=3&embed_dim=32&num_heads=2"
        assert backbone.preprocess == Preprocess(size=224)
        for key, value in backbone.model.state_dict().items():
            assert torch.equal(value, PLAIN.state()[key]), key

    @pytest.mark.parametrize("is_timm", [False, True])
    def test_dinov2_with_registers_by_its_own_names(self, is_timm: bool, tmp_path: Path) -> None:
        """`register_tokens`, and a position of CLS that timm's model has added to CLS itself."""
        timms = REGISTERS.state()
        cls = torch.full((1, 1, 32), 0.25)
        own = {key: value for key, value in timms.items() if key not in ("reg_token", "cls_token", "pos_embed")}
        own |= {"register_tokens": timms["reg_token"], "cls_token": timms["cls_token"] - cls}
        own |= {"pos_embed": torch.cat([cls, timms["pos_embed"]], 1), "mask_token": torch.zeros(1, 32)}
        torch.save({"model": timms if is_timm else own}, tmp_path / "x.pth")
        for name, weights in (
            (f"{tmp_path / 'x.pth'}?num_heads=2", None),
            ("timm:vit_small_patch14_reg4_dinov2?depth=3&embed_dim=32&num_heads=2", str(tmp_path / "x.pth")),
        ):
            backbone = load_backbone(name, weights=weights, image_size=56, blocks=(-1,))
            assert backbone.layout == REGISTERS.layout
            assert backbone.name == "timm:vit_small_patch14_reg4_dinov2?depth=3&embed_dim=32&num_heads=2"
            for key, value in backbone.model.state_dict().items():
                assert (value - timms[key]).abs().max() < 1e-6, key

    def test_a_gated_mlp_by_its_own_names(self, tmp_path: Path) -> None:
        gated = Family(
            architecture="vit_giant_patch14_dinov2",
            size=56,
            layout=REGISTERS.layout,
            options={"embed_dim": 48, "depth": 2, "num_heads": 2},
        )
        state = gated.state()
        own = {key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): state[key] for key in state}
        assert own.keys() != state.keys()
        torch.save({"teacher": prefixed("backbone.", own)}, tmp_path / "x.pth")
        backbone = load_backbone(f"{tmp_path / 'x.pth'}?num_heads=2", blocks=(-1,))
        assert backbone.name == "timm:vit_giant_patch14_dinov2?depth=2&embed_dim=48&num_heads=2"
        assert all(torch.equal(value, state[key]) for key, value in backbone.model.state_dict().items())

    @pytest.mark.parametrize(("has_bias", "architecture"), [(False, ""), (True, "_qkvb"), (True, "")])
    def test_dinov3_by_its_own_names(self, has_bias: bool, architecture: str, tmp_path: Path) -> None:
        """Biases of queries and values that are not zero need the architecture that has them."""
        name = f"vit_small_patch16_dinov3{architecture}"
        family = Family(architecture=name, size=64, layout=FAMILIES["DINOv3"].layout)
        state, own = family.state(), State()
        for key, value in state.items():
            if key.endswith(("q_bias", "v_bias")):
                continue
            key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
            own[key.replace("gamma_2", "ls2.gamma")] = value
        for block in range(3):
            at = f"blocks.{block}.attn."
            query, values = (state.get(f"{at}{each}_bias", torch.ones(32) * has_bias) for each in "qv")
            own |= {f"{at}qkv.bias": torch.cat([query, torch.zeros(32), values]), f"{at}qkv.bias_mask": torch.ones(96)}
        torch.save(
            {"teacher": {**prefixed("backbone.", own), "backbone.rope_embed.periods": torch.ones(4)}},
            tmp_path / "x.pth",
        )
        asked = f"timm:{name}?depth=3&embed_dim=32&num_heads=2"
        if has_bias and not architecture:
            with pytest.raises(BadInput, match=r"has biases of queries and values; take the architecture .* _qkvb"):
                load_backbone(asked, weights=str(tmp_path / "x.pth"), image_size=64)
            return
        backbone = load_backbone(asked, weights=str(tmp_path / "x.pth"), image_size=64, blocks=(-1,))
        assert all(torch.equal(value, state[key]) for key, value in backbone.model.state_dict().items())

    def test_a_file_beside_no_config_says_all_but_the_heads(self, tmp_path: Path) -> None:
        save_file(PLAIN.state(), tmp_path / "a.safetensors")
        with pytest.raises(
            BadInput, match=r"32 channels, and its number of attention heads is not in the file; add it"
        ):
            load_backbone(str(tmp_path / "a.safetensors"))
        usual = Family(
            architecture="vit_small_patch14_dinov2",
            size=70,
            layout=PLAIN.layout,
            options={"embed_dim": 384, "depth": 2},
        )
        torch.save({"teacher": prefixed("backbone.", usual.state())}, tmp_path / "b.pth")
        backbone = load_backbone(str(tmp_path / "b.pth"), blocks=(0,))
        assert (backbone.name, backbone.preprocess.size) == ("timm:vit_small_patch14_dinov2?depth=2", 70)


class Evil:
    """Unpickled without care, it makes a file."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return open, (str(self.touched), "w")


def folder_of(root: Path, config: object, state: object = None) -> Path:
    root.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (root / "config.json").write_text(text)
    if state is not None:
        torch.save(state, root / "pytorch_model.bin")
    return root


class TestHostile:
    def test_code_in_weights_is_not_executed(self, tmp_path: Path) -> None:
        evil = Evil(tmp_path / "touched")
        for number, content in enumerate([evil, {"teacher": evil}, {**PLAIN.state(), "x": evil}]):
            folder = folder_of(tmp_path / str(number), PLAIN.config, content)
            for backbone in (folder, folder / "pytorch_model.bin"):
                with pytest.raises(BadInput, match=r"is refused: it .*; expected the weights of a vision transformer"):
                    load_backbone(f"{backbone}?num_heads=2")
        assert not (tmp_path / "touched").exists()

    def test_safetensors_come_first(self, tmp_path: Path) -> None:
        folder = PLAIN.write(tmp_path / "m")
        torch.save(Evil(tmp_path / "touched"), folder / "pytorch_model.bin")
        assert load_backbone(str(folder)).trained
        (folder / "model.safetensors").write_bytes(b"\xff" * 64)
        with pytest.raises(BadInput, match=r"model.safetensors is no whole safetensors file"):
            load_backbone(str(folder))
        assert not (tmp_path / "touched").exists()

    @pytest.mark.stress
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("no json", "is no JSON; expected a config.json"),
            ("[1]", "names no architecture of timm"),
            ({"model_type": "dinov2", "architectures": ["Dinov2Model"]}, r"one of transformers \('dinov2'\)"),
            ({"architecture": "no_such_vit"}, "names the architecture 'no_such_vit', which timm .* does not have"),
            ({"architecture": "resnet18"}, r"resnet18|no plain vision transformer|cannot be made"),
            ({"architecture": "cait_xxs24_224"}, "is no plain vision transformer"),
            ({"model_args": {"depth": 10**9}}, "depth must be a whole number from 1 to 200; found 1000000000"),
            ({"model_args": {"depth": True}}, "depth must be a whole number"),
            ({"model_args": {"embed_dim": 16384, "depth": 200}}, r"would have [\d,]+ parameters, more than"),
            ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model setting 'checkpoint_path', which is not known"),
            ({"model_args": {"mlp_layer": "__import__"}}, "mlp_layer must be one of"),
            ({"model_args": {"in_chans": 4}}, "images with 4 channels; expected 3"),
            ({"model_args": {"num_heads": 7}}, "cannot be made by timm"),
            ({"pretrained_cfg": {"input_size": [3, 224, 448]}}, "takes inputs of .*; expected 3 channels and a square"),
            ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, r"size must be 1 to 4,096 pixels"),
            ({"pretrained_cfg": {"interpolation": "magic"}}, "interpolation must be one of nearest"),
            ({"pretrained_cfg": {"interpolation": ["bicubic"]}}, "interpolation must be one of nearest"),
            ({"pretrained_cfg": {"crop_pct": 1e-9}}, r"crop_pct must be 0.5 to 1"),
            ({"pretrained_cfg": {"std": [0, 1, 1]}}, "std must be three numbers above 0"),
            ({"pretrained_cfg": {"mean": [None, 1, 1]}}, "mean must be three numbers"),
        ],
    )
    def test_a_config_is_read_with_suspicion(self, change: Any, words: str, tmp_path: Path) -> None:
        config: Any = change
        if isinstance(change, dict) and "model_type" not in change:
            config = json.loads(json.dumps(PLAIN.config))
            for name, value in change.items():
                config[name] = {**config[name], **value} if isinstance(value, dict) else value
            if "architecture" in change:
                config["model_args"] = {}
        with pytest.raises(BadInput, match=words) as raised:
            load_backbone(str(folder_of(tmp_path / "m", config)), weights="random")
        assert str(raised.value).isprintable()

    def test_a_name_in_a_file_of_weights_does_not_make_a_million_blocks(self, tmp_path: Path) -> None:
        state = {**PLAIN.state(), "blocks.999999.norm1.weight": torch.zeros(32)}
        save_file(state, tmp_path / "deep.safetensors")
        with pytest.raises(BadInput, match="depth must be a whole number from 1 to 200; found 1000000"):
            load_backbone(f"{tmp_path / 'deep.safetensors'}?num_heads=2")

    def test_a_huge_config_is_not_read(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="has more than 4,194,304 bytes"):
            load_backbone(str(folder_of(tmp_path / "m", "[" * (5 << 20))))
        with pytest.raises(BadInput, match="is no JSON"):
            load_backbone(str(folder_of(tmp_path / "m", "[" * 100_000)))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: {"a": s, "b": s}, "holds no vision transformer: .* found a, b"),
            (lambda s: {"model": s, "state_dict": s}, r"several vision transformers \(model, state_dict\)"),
            (lambda s: [1], "holds no vision transformer: .* found list"),
            (lambda s: {**s, "extra": torch.zeros(2)}, r"1 weights unexpected \(extra\)"),
            (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, r"1 weights missing \(norm.bias\)"),
            (lambda s: {**s, "norm.bias": torch.full((32,), torch.nan)}, r"1 weights not finite \(norm.bias\)"),
            (lambda s: {**s, "norm.bias": torch.zeros(32).int()}, "no plain floating-point"),
            (lambda s: {**s, "norm.bias": "text"}, "norm.bias is no tensor"),
            (lambda s: {**s, "pos_embed": torch.zeros(1, 198, 32)}, "198 positions, which are not 1 and a square"),
            (lambda s: {**s, "pos_embed": torch.zeros(1, 197, 64)}, "of another shape"),
            (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)}, "it has width 64"),
            (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)}, r"\?patch_size=8"),
            (lambda s: {**s, "reg_token": torch.zeros(1, 2, 32)}, "it has 2 registers: take the architecture with"),
            (lambda s: {k: torch.zeros(()).expand(v.shape) for k, v in s.items()}, "is too small for the"),
            (lambda s: {**s, "blocks.0.0.norm1.bias": torch.zeros(32)}, r"blocks.0.norm1.bias twice"),
        ],
    )
    def test_weights_that_do_not_fit_are_named(self, change: Any, words: str, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "m", PLAIN.config, change(PLAIN.state()))
        with pytest.raises(BadInput, match=words) as raised:
            load_backbone(str(folder))
        assert str(raised.value).isprintable()

    def test_what_is_missing_in_a_folder_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        with pytest.raises(BadInput, match=r"config.json cannot be read .*: a folder in timm's layout has config.json"):
            load_backbone(str(tmp_path / "m"))
        folder = folder_of(tmp_path / "m", PLAIN.config)
        with pytest.raises(BadInput, match=r"has no weights; expected model.safetensors beside config.json"):
            load_backbone(str(folder))
        for name in ("a.pth", "b.pth"):
            torch.save(PLAIN.state(), folder / name)
        with pytest.raises(BadInput, match=r"several files of weights \(a.pth, b.pth\); give one with --weights"):
            load_backbone(str(folder))
        assert load_backbone(str(folder), weights=str(folder / "a.pth")).trained
        with pytest.raises(BadInput, match=r"no file of weights at .*/nothing.pth"):
            load_backbone(str(tmp_path / "nothing.pth"))


class TestNames:
    @pytest.mark.parametrize("name", ["dinobloom", "random-vit", "vit_base_patch16_224"])
    def test_what_has_none_of_the_forms_is_told_them(self, name: str) -> None:
        with pytest.raises(
            BadInput, match=r"no backbone .*; there are dinobloom-s, .*; and timm:NAME, hf-hub:OWNER/NAME"
        ):
            load_backbone(name)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("timm:", "expected a backbone timm:NAME"),
            ("timm:../x", "expected a backbone timm:NAME"),
            ("timm:vit_smal_patch14_dinov2", "no such model; similar: vit_small_patch14_dinov2"),
            ("timm:vit_small_patch14_dinov2.none", "no such model"),
            ("hf-hub:a", "expected a backbone hf-hub:OWNER/NAME"),
            ("hf-hub:a/../b", "expected a backbone hf-hub:OWNER/NAME"),
            ("timm:test_vit?depth=", "depth must be a whole number"),
            ("timm:test_vit?depth=2&depth=3", "expected settings like"),
            ("timm:test_vit?pretrained=true", "model setting 'pretrained', which is not known"),
            ("timm:swin_tiny_patch4_window7_224", "is no plain vision transformer"),
            ("timm:samvit_base_patch16", "is no plain vision transformer"),
            ("timm:test_vit", r"needs weights: .* let --weights auto download"),
        ],
    )
    def test_a_name_that_cannot_be_used_says_why(self, name: str, words: str) -> None:
        weights = "random" if "vit?" in name or "swin" in name or "sam" in name else None
        with pytest.raises(BadInput, match=words):
            load_backbone(name, weights=weights)

    @pytest.mark.parametrize(
        "options",
        [{}, {"depth": 4}, {"class_token": False, "mlp_ratio": 2.5, "global_pool": "avg", "init_values": 1e-05}],
    )
    def test_a_canonical_name_means_the_same_settings(self, options: dict[str, Any]) -> None:
        found = parse_model_name(canonical_name("test_vit", options))
        assert found is not None
        assert (found.kind, found.name, found.options) == ("timm", "test_vit", options)

    def test_where_a_model_came_from_is_not_in_its_identity(
        self, folders: dict[str, Path], pictures: list[Path], tmp_path: Path
    ) -> None:
        """A copy of the folder, and timm's name with the file: the same cache, which is continued."""
        copy = shutil.copytree(folders["DINOv3"], tmp_path / "elsewhere")
        cached(pictures, tmp_path / "a.zarr", folders["DINOv3"])
        first = ActivationStore(tmp_path / "a.zarr")
        done = extract(
            pictures[0].parent, tmp_path / "a.zarr", ExtractConfig(backbone=str(copy), device="cpu", workers=1)
        )
        assert done.was_complete
        assert ActivationStore(tmp_path / "a.zarr").identity == first.identity

    def test_nothing_is_asked_of_the_network(
        self, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("the network was asked"))
        for name, weights in ((str(folders["DINOv3"]), None), ("timm:test_vit", "random")):
            load_backbone(name, weights=weights)
