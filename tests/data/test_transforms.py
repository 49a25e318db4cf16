import hashlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from bvit_jax.data import images, transforms

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def _photo(golden: dict[str, np.ndarray], index: int) -> Image.Image:
    return images.decode(golden[f"{index}/jpeg"].tobytes())


def _check(golden: dict[str, np.ndarray], key: str, actual: np.ndarray) -> None:
    assert actual.dtype == np.uint8
    if key in golden:
        np.testing.assert_array_equal(actual, golden[key])
    assert hashlib.sha256(actual.tobytes()).hexdigest() == golden[f"{key}_sha256"]


@pytest.mark.parametrize("index", range(6))
def test_eval_equals_torchvision(golden: dict[str, np.ndarray], index: int) -> None:
    image = _photo(golden, index)
    actual = transforms.eval_transform(image, size=224, resize=256, interpolation="bicubic")
    _check(golden, f"{index}/eval", actual)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("index", range(6))
def test_resized_crop_equals_torchvision(
    golden: dict[str, np.ndarray], index: int, interpolation: str
) -> None:
    top, left, height, width = golden[f"{index}/box_tlhw"].tolist()
    crop = transforms.resized_crop(_photo(golden, index), (top, left, height, width), 224, interpolation)
    _check(golden, f"{index}/crop_{interpolation}", np.asarray(crop))


def test_random_boxes_are_distributed_as_torchvisions(golden: dict[str, np.ndarray]) -> None:
    width, height = golden["rrc/size_wh"].tolist()
    rng = np.random.default_rng(0)
    boxes = np.array(
        [transforms.random_resized_crop_box(rng, width, height, SCALE, RATIO) for _ in range(20_000)]
    )
    top, left, crop_height, crop_width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + crop_height <= height).all()
    assert (left + crop_width <= width).all()
    share = np.linspace(0.02, 0.98, 49)
    for name, values in [
        ("area", crop_height * crop_width / (height * width)),
        ("logratio", np.log(crop_width / crop_height)),
    ]:
        below = np.searchsorted(np.sort(values), golden[f"rrc/{name}_quantiles"]) / len(values)
        # Kolmogorov-Smirnov: two such samples differ by more once in a thousand times.
        assert np.abs(below - share).max() < 0.0195
    # Given its size, a box may be anywhere with the same probability.
    movable = crop_height < height
    assert abs((top[movable] / (height - crop_height[movable])).mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("width", "height", "scale", "box"),
    [
        (40, 200, (0.9, 1.0), (73, 0, 53, 40)),  # too tall: width / (3/4), centred
        (200, 41, (0.9, 1.0), (0, 72, 41, 55)),  # too wide: height * 4/3, centred
        (50, 50, (2.0, 3.0), (0, 0, 50, 50)),  # the ratio is fine: the whole image
    ],
)
def test_fallback_box(width: int, height: int, scale: tuple[float, float], box: object) -> None:
    rng = np.random.default_rng(0)
    assert transforms.random_resized_crop_box(rng, width, height, scale, RATIO) == box


@pytest.mark.parametrize(
    ("size", "expected"),
    [((500, 375), (341, 256)), ((375, 500), (256, 341)), ((90, 90), (256, 256)),
     ((256, 999), (256, 999)), ((7, 3), (597, 256))]
)  # fmt: skip
def test_resize_short_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    resized = transforms.resize_short_side(Image.new("RGB", size), 256, "bilinear")
    assert resized.size == expected


@pytest.mark.parametrize(
    ("width", "height", "left", "top"),
    [
        (9, 8, 2, 2),  # 5 / 2 = 2.5 rounds to the even 2
        (11, 5, 4, 0),  # 7 / 2 = 3.5 rounds to the even 4; 1 / 2 to 0
        (3, 4, 0, 0),  # one column of border: on the right
        (1, 9, -1, 2),  # three columns: one left, two right
        (2, 1, -1, -1),
    ],
)
def test_centre_crop(width: int, height: int, left: int, top: int) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (height, width, 3)).astype(np.uint8)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    expected = padded[4 + top : 8 + top, 4 + left : 8 + left]
    actual = np.asarray(transforms.centre_crop(Image.fromarray(pixels), 4))
    np.testing.assert_array_equal(actual, expected)


def test_train_transform_flips_half(golden: dict[str, np.ndarray]) -> None:
    image = _photo(golden, 4)
    transform = partial(
        transforms.train_transform, size=16, scale=SCALE, ratio=RATIO, interpolation="bilinear"
    )
    flipped = 0
    for seed in range(200):
        plain, maybe = (transform(image, np.random.default_rng(seed), flip=flip) for flip in (False, True))
        assert plain.shape == (16, 16, 3)
        mirrored = np.array_equal(plain[:, ::-1], maybe)
        assert mirrored or np.array_equal(plain, maybe)
        flipped += mirrored
    assert 70 < flipped < 130
