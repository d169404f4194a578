"""The preprocessing is the released one, to the last bit: torchvision's Resize on a PIL image, ToTensor, Normalize."""

import numpy as np
import pytest
import torch
from PIL import Image

from cytocache.backbones import Backbone
from cytocache.pictures import to_pixels
from cytocache.preprocess import Preprocess
from cytocache.torchvision_guard import declare_missing_operators
from stores.errors import BadInput


def _pixels_only() -> Backbone:
    """A backbone whose "tokens" are the pixels that its model is given."""
    return Backbone(
        name="none",
        model=torch.nn.Identity(),
        weights_sha256="",
        trained=False,
        blocks=(0,),
        n_blocks=1,
        width=3,
        preprocess=Preprocess(),
    )


@pytest.mark.parametrize(
    ("height", "width"),
    [(144, 144), (250, 250), (288, 288), (360, 363), (363, 360), (400, 400), (224, 224), (1, 1), (37, 1_001)],
)
def test_equals_the_released_preprocessing_bit_for_bit(height: int, width: int) -> None:
    """The image sizes of all five datasets: 144 px crops grow, 400 px fields shrink, the aspect ratio is not kept."""
    declare_missing_operators()
    from torchvision import transforms

    released = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BILINEAR, antialias=True),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    picture = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8))
    resized = Preprocess().resize(picture)
    assert resized.shape == (224, 224, 3)
    ours = _pixels_only().tokens(torch.from_numpy(resized.copy())[None])[0][0]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, released(picture))


def test_the_description_in_a_cache_says_everything_that_changes_pixels() -> None:
    """It is part of a cache's identity, so it must be plain JSON and must not change by accident."""
    assert Preprocess().to_dict() == {
        "size": 224,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "color": "RGB, alpha dropped",
    }


@pytest.mark.parametrize(("height", "width"), [(144, 144), (363, 360), (100, 333), (512, 224), (1, 50)])
@pytest.mark.parametrize(
    ("mode", "pct", "interpolation"),
    [
        ("center", 1.0, "bicubic"),
        ("center", 0.9, "bilinear"),
        ("squash", 0.875, "bicubic"),
        ("center", 0.95, "bicubic"),
    ],
)
@pytest.mark.parametrize("size", [224, 448])
def test_other_models_see_what_timm_shows_them_bit_for_bit(
    height: int, width: int, mode: str, pct: float, interpolation: str, size: int
) -> None:
    declare_missing_operators()
    from timm.data.transforms_factory import transforms_imagenet_eval

    picture = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8))
    theirs = transforms_imagenet_eval(size, crop_pct=pct, crop_mode=mode, interpolation=interpolation, normalize=False)(
        picture
    )
    ours = Preprocess(size=size, crop_mode=mode, crop_pct=pct, interpolation=interpolation)
    assert np.array_equal(ours.resize(picture), theirs.permute(1, 2, 0).numpy())
    assert Preprocess.from_dict(ours.to_dict()) == ours


def test_a_long_strip_takes_no_more_memory_than_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of 20,000 pixels would be resized to 2.5 million; its middle differs by rounding only."""
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 20_000, 3)).astype(np.uint8))
    exact = Preprocess(crop_mode="center", interpolation="bicubic", size=56).resize(strip).astype(int)
    monkeypatch.setattr("cytocache.preprocess._MOST_PIXELS", 1000)
    cut = Preprocess(crop_mode="center", interpolation="bicubic", size=56).resize(strip).astype(int)
    assert cut.shape == (56, 56, 3)
    assert np.abs(cut - exact).mean() < 3
    monkeypatch.undo()
    wide = Image.new("RGB", (300_000, 2))
    assert Preprocess(crop_mode="center", size=224).resize(wide).shape == (224, 224, 3)  # 224 x 33,600,000 in full


def test_the_view_is_where_the_pixels_come_from() -> None:
    """A white square drawn at the edges of the view fills the input, and nothing beside it is seen."""
    for preprocess in (
        Preprocess(),
        Preprocess(crop_mode="center", crop_pct=0.875),
        Preprocess(crop_mode="squash", crop_pct=0.875),
    ):
        for width, height in ((160, 160), (320, 160), (160, 480)):
            left, top, right, bottom = (round(edge) for edge in preprocess.view(width, height))
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[top:bottom, left:right] = 255
            assert preprocess.resize(Image.fromarray(pixels))[8:-8, 8:-8].min() == 255
            around = 255 - pixels
            assert preprocess.resize(Image.fromarray(around))[8:-8, 8:-8].max() == 0
            seen = to_pixels(Image.fromarray(pixels), preprocess)
            assert seen.shape == (bottom - top, right - left, 3)
            assert seen.min() == 255


@pytest.mark.parametrize(
    "said",
    [{"size": 0}, {"size": True}, {"crop_pct": float("nan")}, {"mean": [1, 2]}, {"std": [1, 1, "x"]}, {"crop_mode": 3}],
)
def test_a_transform_that_is_none_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="preprocessing: "):
        Preprocess.from_dict(said)
