"""The backbones: what is cached is the output of the very block that was asked for, and no file is trusted.

The reference is always timm's own, unmodified model, with a forward hook on the block.
"""

import functools
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import State, _lively_state, _published, _timm
from PIL import Image
from torch import nn

from cytocache.backbones import ARCHITECTURES, Architecture, load_backbone
from cytocache.datasets import open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.preprocess import Preprocess
from cytocache.torchvision_guard import declare_missing_operators
from stores import ActivationStore
from stores.errors import BadInput

WIDTHS = {"dinobloom-s": 384, "dinobloom-b": 768, "dinobloom-l": 1024, "dinobloom-g": 1536, "random-vit-tiny": 192}
DEPTHS = {"dinobloom-s": 12, "dinobloom-b": 12, "dinobloom-l": 24, "dinobloom-g": 40, "random-vit-tiny": 4}


def _hooked(model: Any, state: State, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each block while the unmodified model runs from end to end."""
    model.to_empty(device="cpu")
    keys = model.load_state_dict(state, strict=False, assign=True)
    assert not keys.unexpected_keys
    assert {*keys.missing_keys} <= {"norm.weight", "norm.bias"}  # they act behind every block
    for key in keys.missing_keys:
        nn.init.ones_(model.get_parameter(key))
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        model(pixels)
    assert len(seen) == len(model.blocks)
    return seen


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for n, size in enumerate([(144, 144), (363, 360)]):
        noise = np.random.default_rng(n).integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(noise).save(root / f"{n}.png")
    return root


@pytest.fixture(scope="module")
def dinobloom_s(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """(a file as published, the backbone's weights in it)"""
    state = _lively_state(_timm("dinobloom-s"))
    path = tmp_path_factory.mktemp("weights") / "DinoBloom-S.pth"
    torch.save(_published(state), path)
    return path, state


@pytest.fixture(scope="module")
def outputs(dinobloom_s: tuple[Path, State], pictures: Path) -> list[torch.Tensor]:
    """What leaves each block of the unmodified model with the weights of `dinobloom_s`."""
    return _hooked(_timm("dinobloom-s"), dinobloom_s[1], _pixels(pictures))


def _pixels(root: Path) -> torch.Tensor:
    """(2, 3, 224, 224) by torchvision, as the released code does it."""
    declare_missing_operators()
    from torchvision import transforms

    steps = [
        transforms.Resize((224, 224), transforms.InterpolationMode.BILINEAR, antialias=True),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return torch.stack([transforms.Compose(steps)(Image.open(path)) for path in sorted(root.glob("*.png"))])


def _cached(root: Path, store: Path, name: str, weights: str | None, block: int) -> npt.NDArray[np.float16]:
    extract(open_images(root), store, ExtractConfig(backbone=name, weights=weights, blocks=(block,)))
    return ActivationStore(store).read_images([0, 1])


def _assert_float16_of(cached: npt.NDArray[np.float16], expected: torch.Tensor) -> None:
    """Equal up to one unit in the last place of float16: the forward passes may differ in float32's last bits."""
    full = expected.numpy()
    assert cached.shape == full.shape
    assert np.all(np.abs(cached.astype(np.float32) - full) <= np.abs(full) * 2.0**-10 + 2.0**-20)


class TestTap:
    @pytest.mark.parametrize("block", [-1, -2, 0])
    def test_dinobloom_tokens_are_what_leaves_the_block_of_the_unmodified_model(
        self, dinobloom_s: tuple[Path, State], outputs: list[torch.Tensor], pictures: Path, tmp_path: Path, block: int
    ) -> None:
        cached = _cached(pictures, tmp_path / "a.zarr", "dinobloom-s", str(dinobloom_s[0]), block)
        _assert_float16_of(cached, outputs[block])
        spec = ActivationStore(tmp_path / "a.zarr").spec
        assert (spec.block, spec.n_blocks, spec.width, spec.trained) == (block % 12, 12, 384, True)

    def test_the_taps_of_this_test_differ_from_each_other(self, outputs: list[torch.Tensor]) -> None:
        """Else the test above would pass with any block."""
        for block, following in itertools.pairwise(outputs):
            assert (block - following).abs().max() > 0.1

    @pytest.mark.stress
    @pytest.mark.parametrize(
        ("name", "blocks"), [("random-vit-tiny", (-1, -2, 0)), ("dinobloom-s", (-2,)), ("dinobloom-b", (-2,))]
    )
    def test_random_weights_give_what_leaves_the_block_of_the_unmodified_model(
        self, pictures: Path, tmp_path: Path, name: str, blocks: tuple[int, ...]
    ) -> None:
        """Compared in float32 too: at initialisation, neighbouring blocks differ by less than float16 shows."""
        state = load_backbone(name, weights="random", blocks=(-1,)).model.state_dict()
        outputs = _hooked(_timm(name), state, _pixels(pictures))
        resized = np.stack([Preprocess().resize(Image.open(path)) for path in sorted(pictures.glob("*.png"))])
        for block in blocks:
            backbone = load_backbone(name, weights="random", blocks=(block,))
            with torch.inference_mode():
                (tokens,) = backbone.tokens(torch.from_numpy(resized))
            assert (tokens - outputs[block]).abs().max() <= 1e-6
            assert (tokens - outputs[block - 1]).abs().max() > 3e-6
            _assert_float16_of(_cached(pictures, tmp_path / f"{block}.zarr", name, "random", block), outputs[block])

    def test_several_blocks_in_one_pass_give_what_each_gives_alone(self) -> None:
        """In ascending order, however they were asked for; nothing of a hook stays behind."""
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8))
        together = load_backbone("random-vit-tiny", blocks=(2, -4, -3))
        assert together.blocks == (0, 1, 2)
        with torch.inference_mode():
            for _ in range(2):
                tokens = together.tokens(pixels)
                assert len(tokens) == 3
                for block, ours in zip(together.blocks, tokens, strict=True):
                    (alone,) = load_backbone("random-vit-tiny", blocks=(block,)).tokens(pixels)
                    assert torch.equal(ours, alone)

    def test_a_block_given_twice_is_refused(self) -> None:
        with pytest.raises(BadInput, match="the same --block is given twice; found 2, -2 of 4 blocks"):
            load_backbone("random-vit-tiny", blocks=(2, -2))

    @pytest.mark.parametrize(("block", "n_kept"), [(-1, 4), (-2, 3), (3, 4), (0, 1), (-4, 1)])
    def test_blocks_behind_the_tap_are_not_kept(self, block: int, n_kept: int) -> None:
        backbone = load_backbone("random-vit-tiny", blocks=(block,))
        blocks = {key.split(".")[1] for key in backbone.model.state_dict() if key.startswith("blocks.")}
        assert blocks == {str(index) for index in range(n_kept)}
        assert (backbone.blocks, backbone.n_blocks) == ((n_kept - 1,), 4)

    def test_cls_comes_first_then_the_patches_row_by_row(self) -> None:
        """Painting the patch at row 2, column 5 changes, at the first block's input, token 1 + 2 * 16 + 5 alone."""
        model = load_backbone("random-vit-tiny", blocks=(0,)).model
        model.blocks = nn.Sequential()  # no mixing: what remains is the embedding
        pixels = torch.zeros(2, 3, 224, 224)
        pixels[1, :, 2 * 14 : 3 * 14, 5 * 14 : 6 * 14] = 1
        with torch.inference_mode():
            dark, painted = model(pixels)
        assert (dark != painted).any(1).nonzero().flatten().tolist() == [1 + 2 * 16 + 5]

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_the_architectures_have_the_published_widths_and_depths(self, name: str) -> None:
        model = _timm(name)
        assert (model.embed_dim, len(model.blocks)) == (WIDTHS[name], DEPTHS[name])
        assert model.pos_embed.shape == (1, 257, WIDTHS[name])
        assert (model.num_prefix_tokens, model.num_reg_tokens) == (1, 0)


class TestRandomWeights:
    @pytest.mark.stress
    def test_two_processes_draw_the_same_and_the_block_does_not_matter(self) -> None:
        code = "from cytocache.backbones import load_backbone; print(load_backbone('random-vit-tiny').weights_sha256)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        torch.manual_seed(123)  # nor does the state of the global generator
        before = torch.random.get_rng_state()
        backbones = [load_backbone("random-vit-tiny", blocks=(block,)) for block in (-2, 0)]
        assert torch.equal(torch.random.get_rng_state(), before)
        assert [backbone.weights_sha256 for backbone in backbones] == [other, other]

    @pytest.mark.stress
    def test_they_are_marked_as_untrained_and_a_file_is_not(self, dinobloom_s: tuple[Path, State]) -> None:
        assert not load_backbone("random-vit-tiny").trained
        assert not load_backbone("random-vit-tiny", weights="random").trained
        untrained = load_backbone("dinobloom-s", weights="random")
        trained = load_backbone("dinobloom-s", weights=str(dinobloom_s[0]))
        assert (untrained.trained, trained.trained) == (False, True)
        assert untrained.weights_sha256 != trained.weights_sha256

    def test_every_weight_is_set(self) -> None:
        """They start as uninitialised memory."""
        state = load_backbone("random-vit-tiny", blocks=(-1,)).model.state_dict()
        assert all(torch.isfinite(value).all() and value.abs().max() <= 1 for value in state.values())
        constant = ("bias", "gamma", "norm1.weight", "norm2.weight")
        drawn = [key for key in state if not key.endswith(constant) or key == "patch_embed.proj.bias"]
        assert all(state[key].std() > 0 for key in drawn)


@functools.cache
def _hollow(name: str) -> State:
    """Weights of the right shapes in a file of a few kilobytes: each tensor is one stored zero."""
    return {key: torch.zeros(()).expand(value.shape) for key, value in _timm(name).state_dict().items()}


class _Evil:
    """Unpickled without care, it makes a file."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (os.fspath(self.touched), "w")


class TestLoading:
    def test_a_half_precision_file_runs_in_float32(self, dinobloom_s: tuple[Path, State], tmp_path: Path) -> None:
        path = tmp_path / "half.pth"
        torch.save(_published({key: value.half() for key, value in dinobloom_s[1].items()}), path)
        backbone = load_backbone("dinobloom-s", weights=str(path), blocks=(0,))
        assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}

    def test_the_giants_gated_mlp_is_renamed_in_the_right_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DINOv2 writes w3(silu(first half of w12(x)) * second half); a small model of the giant's kind shows it."""
        options = {"embed_dim": 32, "num_heads": 2, "depth": 2}
        tiny = Architecture(timm_name=ARCHITECTURES["dinobloom-g"].timm_name, options=options, weights_file="T.pth")
        monkeypatch.setitem(ARCHITECTURES, "tiny-giant", tiny)
        state = _lively_state(_timm("tiny-giant"))
        assert "blocks.0.mlp.fc1.weight" in state
        renamed = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): state[key] for key in state}
        torch.save(_published(renamed), tmp_path / "T.pth")
        backbone = load_backbone("tiny-giant", weights=str(tmp_path / "T.pth"), blocks=(-1,))

        x = torch.randn(1, 257, 32, generator=torch.Generator().manual_seed(0))
        first, second = nn.functional.linear(
            x, renamed["blocks.1.mlp.w12.weight"], renamed["blocks.1.mlp.w12.bias"]
        ).chunk(2, dim=-1)
        by_hand = nn.functional.linear(
            nn.functional.silu(first) * second, renamed["blocks.1.mlp.w3.weight"], renamed["blocks.1.mlp.w3.bias"]
        )
        with torch.inference_mode():
            assert (backbone.model.get_submodule("blocks.1.mlp")(x) - by_hand).abs().max() < 1e-5
        noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            assert torch.equal(backbone.model(noise), _hooked(_timm("tiny-giant"), state, noise)[-1])

    @pytest.mark.parametrize("way", ["torch.save", "torch.save, old format", "pickle", "inside the teacher"])
    def test_a_file_that_would_execute_code_is_refused_unexecuted(self, tmp_path: Path, way: str) -> None:
        path, evil = tmp_path / "DinoBloom-S.pth", _Evil(tmp_path / "touched")
        if way == "pickle":
            path.write_bytes(pickle.dumps(evil))
        elif way == "inside the teacher":
            torch.save({"teacher": {"backbone.cls_token": torch.zeros(1, 1, 384), "backbone.x": evil}}, path)
        else:
            torch.save(evil, path, _use_new_zipfile_serialization=way == "torch.save")
        with pytest.raises(BadInput, match=r"DinoBloom-S.pth is .*; expected a DinoBloom checkpoint") as raised:
            load_backbone("dinobloom-s", weights=str(path))
        assert str(raised.value).isprintable()
        assert "weights_only" not in str(raised.value)  # torch's own words advise to load it all the same
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is cut off, or was not written by torch.save"),
            (b"this is no checkpoint", "is cut off, or was not written by torch.save"),
            ([1, 2], "the one key 'teacher', .*; found list"),
            ({}, "the one key 'teacher', .*; found an empty dict"),
            ({"model": {}}, "the one key 'teacher', .*; found 'model'"),
            ({"teacher": torch.zeros(3)}, "the one key 'teacher', .*; found 'teacher'"),
            (
                {"teacher": {"cls_token": torch.zeros(1)}},
                r"with backbone.pos_embed of shape \(1, 257, width\); found noth",
            ),
        ],
    )
    def test_what_is_no_checkpoint_is_told_what_was_expected(self, tmp_path: Path, content: Any, words: str) -> None:
        path = tmp_path / "x.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(BadInput, match=words):
            load_backbone("dinobloom-s", weights=str(path))

    def test_a_truncated_download_is_refused(self, dinobloom_s: tuple[Path, State], tmp_path: Path) -> None:
        path = tmp_path / "part.pth"
        path.write_bytes(dinobloom_s[0].read_bytes()[:1_000_000])
        with pytest.raises(BadInput, match="is cut off"):
            load_backbone("dinobloom-s", weights=str(path))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"norm.bias": None, "blocks.3.ls1.gamma": None}, r"2 weights missing \(blocks.3.ls1.gamma, norm.bias\)"),
            ({"register_tokens": torch.zeros(1, 4, 384)}, r"1 weights unexpected \(register_tokens\)"),
            ({"blocks.12.ls1.gamma": torch.zeros(384)}, r"1 weights unexpected \(blocks.12.ls1.gamma\)"),
            ({"blocks.0.mlp.fc1.bias": torch.zeros(1535)}, r"1 weights of another shape \(blocks.0.mlp.fc1.bias\)"),
            ({"pos_embed": torch.zeros(1, 1370, 384)}, r"\(1, 257, width\); found \(1, 1370, 384\)"),
            ({"pos_embed": torch.zeros(257, 384)}, r"\(1, 257, width\); found \(257, 384\)"),
            ({"norm.bias": torch.full((384,), float("nan"))}, r"1 weights not finite \(norm.bias\)"),
            ({"norm.bias": torch.full((384,), float("-inf"))}, r"1 weights not finite \(norm.bias\)"),
            ({"norm.bias": torch.full((384,), 1e300, dtype=torch.float64)}, r"1 weights not finite \(norm.bias\)"),
            ({"norm.bias": torch.zeros(384).int()}, r"no plain floating-point tensors \(norm.bias\)"),
            (
                {"norm.bias": torch.zeros(384).to_sparse()},
                r"asks for 'torch._utils._rebuild_sparse_tensor', which is no",
            ),
            (
                {"norm.bias": torch.zeros(384, dtype=torch.complex64)},
                r"asks for 'torch.ComplexFloatStorage', which is no",
            ),
            (
                {"norm.bias": torch.zeros(384, device="meta")},
                r"asks for 'torch._utils._rebuild_meta_tensor_no_storage'",
            ),
            ({"norm.bias": "a string"}, r"1 weights missing \(norm.bias\)"),
        ],
    )
    def test_a_file_that_does_not_fit_exactly_names_the_weights(
        self, tmp_path: Path, changes: State, words: str
    ) -> None:
        state = {**_hollow("dinobloom-s"), **changes}
        torch.save(_published({key: value for key, value in state.items() if value is not None}), tmp_path / "x.pth")
        with pytest.raises(BadInput, match=words):
            load_backbone("dinobloom-s", weights=str(tmp_path / "x.pth"))

    def test_weights_of_another_variant_name_both_widths(self, tmp_path: Path) -> None:
        torch.save(_published(_hollow("dinobloom-s")), tmp_path / "x.pth")
        words = "holds a model of width 384, dinobloom-b has width 768; give the matching --backbone"
        with pytest.raises(BadInput, match=words):
            load_backbone("dinobloom-b", weights=str(tmp_path / "x.pth"))

    @pytest.mark.parametrize(("letter", "file"), [(x, f"DinoBloom-{x.upper()}.pth") for x in "sblg"])
    def test_without_weights_the_message_names_the_file_and_where_it_is(self, letter: str, file: str) -> None:
        with pytest.raises(BadInput, match=rf"get {file} from Zenodo record 10908163 .*--weights {file}"):
            load_backbone(f"dinobloom-{letter}")

    def test_a_missing_weights_file_names_where_it_is_published(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"no weights at .*nowhere.pth.* Zenodo record 10908163"):
            load_backbone("dinobloom-b", weights=str(tmp_path / "nowhere.pth"))

    def test_weights_for_the_embedded_backbone_are_refused(self, dinobloom_s: tuple[Path, State]) -> None:
        with pytest.raises(BadInput, match="random-vit-tiny is untrained and takes no --weights"):
            load_backbone("random-vit-tiny", weights=str(dinobloom_s[0]))

    def test_an_unknown_backbone_lists_the_known(self) -> None:
        with pytest.raises(BadInput, match=r"no backbone 'dinobloom'; there are dinobloom-s, .*, random-vit-tiny"):
            load_backbone("dinobloom")

    @pytest.mark.parametrize("block", [4, -5, 99])
    def test_a_block_out_of_range_states_the_range(self, block: int) -> None:
        with pytest.raises(BadInput, match=f"has 4 blocks: --block must be -4 to 3; found {block}"):
            load_backbone("random-vit-tiny", blocks=(block,))
