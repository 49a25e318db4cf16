"""Random erasing against timm: the box of given candidates exactly, random boxes and fill in distribution."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.augment.erasing import Erasing, first_fitting_box, pixel_noise
from bvit_jax.augment.normalization import Normalization
from tests.conftest import GOLDEN

NORMALIZE = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def timm() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "augmentation.npz") as archive:
        return dict(archive)


def boxes_of(erasing, count, height, width):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: erasing.draw_box(key, height, width)))(keys))


@pytest.mark.slow
def test_the_box_of_given_candidates_equals_timm(timm):
    top, bottom, left, right = timm["erase/boxes"].T
    areas, aspects = (jnp.array(timm[f"erase/{name}"], jnp.float32) for name in ("areas", "aspects"))
    sizes = np.stack([bottom - top, right - left], axis=-1)
    places = (np.stack([top, left], axis=-1) + 0.5) / (np.array([33, 57]) - sizes + 1)
    places = jnp.broadcast_to(jnp.array(places, jnp.float32)[:, None, :], (len(places), 10, 2))
    boxes = jax.vmap(lambda *candidates: first_fitting_box(*candidates, 33, 57))(areas, aspects, places)
    assert boxes.dtype == jnp.int32
    np.testing.assert_array_equal(boxes, timm["erase/boxes"])
    tried = (timm["erase/areas"] != 0.5).sum(axis=1)
    assert tried.max() > 1  # candidates that did not fit came before


def test_no_candidate_fits():
    wide = jnp.full((10,), 100.0, jnp.float32)
    box = first_fitting_box(jnp.full((10,), 0.3, jnp.float32), wide, jnp.zeros((10, 2), jnp.float32), 64, 48)
    assert (box[1] - box[0], box[3] - box[2]) == (0, 0)


@pytest.mark.slow
def test_random_boxes_are_distributed_as_timm_s(timm):
    boxes = boxes_of(Erasing(prob=0.25), 80_000, 64, 48)
    top, bottom, left, right = boxes.T
    erased = bottom > top
    assert abs(erased.mean() - float(timm["erase/erased"])) < 0.008
    top, bottom, left, right = boxes[erased].T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= 64).all()
    assert (right <= 48).all()
    found = {
        "top": top,
        "bottom": bottom,
        "left": left,
        "right": right,
        "area": (bottom - top) * (right - left),
        "log_aspect": np.log((bottom - top) / (right - left)),
    }
    for name, values in found.items():
        values, quantiles = np.sort(values), timm[f"erase/{name}"]
        # Kolmogorov-Smirnov: two such samples differ by more once in a thousand times.
        below = np.searchsorted(values, quantiles - 1e-6, side="left") / len(values)
        above = np.searchsorted(values, quantiles + 1e-6, side="right") / len(values)
        assert (below - timm["share"]).max() < 0.0195, name
        assert (timm["share"] - above).max() < 0.0195, name


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_fill_is_in_normalised_units_and_the_rest_untouched(mode):
    erasing = Erasing(prob=1.0, mode=mode)
    images = jnp.array(np.random.default_rng(0).integers(0, 256, (200, 16, 12, 3)), jnp.uint8)
    keys = jax.random.split(jax.random.key(3), 200)
    erased = jax.jit(lambda keys, images: erasing(keys, images, NORMALIZE))(keys, images)
    assert (erased.shape, erased.dtype) == (images.shape, jnp.float32)
    normalised = np.asarray(NORMALIZE(erased))
    draw = jax.jit(jax.vmap(lambda key: erasing.draw_box(jax.random.split(key)[0], 16, 12)))
    fills = []
    for box, image, before, values in zip(
        np.asarray(draw(keys)), np.asarray(erased), np.asarray(images), normalised
    ):
        top, bottom, left, right = box
        outside = np.ones((16, 12), bool)
        outside[top:bottom, left:right] = False
        np.testing.assert_array_equal(image[outside], before[outside])
        fills.append(values[~outside])
    if mode == "const":
        assert max(np.abs(fill).max() for fill in fills if fill.size) < 1e-5
        return
    if mode == "rand":  # one colour each
        assert max(np.ptp(fill, axis=0).max() for fill in fills if fill.size) < 1e-5
        fills = [fill[:1] for fill in fills]
    values = np.concatenate(fills)
    sample = np.sort(values.ravel())
    every = slice(None, None, max(1, len(sample) // 500))
    share = np.arange(len(sample)) / len(sample)
    expected = np.vectorize(statistics.NormalDist().cdf)(sample[every])
    assert np.abs(expected - share[every]).max() < 1.95 / math.sqrt(len(sample)) + 1 / len(sample)
    correlation = np.corrcoef(values.T)  # of the three colours
    assert np.abs(correlation - np.eye(3)).max() < 4 / math.sqrt(len(values))


def test_noise_has_each_quantile_once():
    words = np.arange(1024, dtype=np.uint32)
    words = words | words[::-1] << 10 | np.roll(words, 7) << 20
    noise = np.asarray(pixel_noise(jnp.array(words[:, None])))[:, 0]
    for colour in range(3):
        values = np.sort(noise[:, colour])
        assert np.all(np.diff(values) > 0)
        np.testing.assert_allclose(values, -values[::-1], atol=2e-6)
    first, second, third = noise.T
    np.testing.assert_array_equal(first, second[::-1])
    np.testing.assert_array_equal(third, np.roll(first, 7))
    assert first.std() == pytest.approx(1, abs=1e-3)
    assert first[-1] == pytest.approx(3.297, abs=1e-3)


def test_off_by_default():
    assert not boxes_of(Erasing(), 100, 64, 48).any()
