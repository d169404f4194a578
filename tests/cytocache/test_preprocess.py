"""The preprocessing is the released one, to the last bit: torchvision's Resize on a PIL image, ToTensor, Normalize."""

import numpy as np
import pytest
import torch
from PIL import Image

from cytocache.backbones import Backbone
from cytocache.preprocess import Preprocess
from cytocache.torchvision_guard import declare_missing_operators


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
