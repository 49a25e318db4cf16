"""Mixup and cutmix against timm: given the same draws to rounding, and the draws in distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.augment.boxes import box_area, inside_box
from bvit_jax.augment.mixing import Mix, Mixing, cutmix_box, dominant_labels, mix_images, mix_targets
from tests.conftest import GOLDEN

MODES = ("batch", "pair", "elem")
RECIPES = {  # those of tests/golden/make_augmentation.py
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"cutmix_alpha": 1.0},
    "uncorrected": {"cutmix_alpha": 1.0, "correct_lam": False},
    "minmax": {"cutmix_minmax": (0.2, 0.8), "mixup_alpha": 0.8},
    "both": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.8},
}


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def timm() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "augmentation.npz") as archive:
        return dict(archive)


def test_boxes_of_cutmix_equal_timm(timm):
    boxes = jax.vmap(lambda lam, centre: cutmix_box(lam, centre, 33, 57))
    actual = boxes(jnp.array(timm["box/lam"]), jnp.array(timm["box/centre"], jnp.int32))
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, timm["box/box"])


def test_pixels_of_boxes():
    boxes = np.array([[0, 0, 0, 0], [1, 3, 2, 6], [0, 5, 0, 7], [4, 5, 6, 7], [2, 2, 0, 7]], np.int32)
    for box in boxes:
        expected = np.zeros((5, 7, 1), bool)
        expected[box[0] : box[1], box[2] : box[3]] = True
        actual = inside_box(jnp.array(box), 5, 7)
        np.testing.assert_array_equal(actual, expected)
        assert box_area(jnp.array(box)) == expected.sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_batch_equals_timm(recipe, mode, timm):
    case = {
        key: timm[f"mix/{recipe}/{mode}/{key}"] for key in ("lam", "use_cutmix", "box", "mixed", "targets")
    }
    images = jnp.array(timm["mix/images"].transpose(0, 2, 3, 1), jnp.float32)
    labels = jnp.array(timm["mix/labels"], jnp.int32)
    mix = Mix(*(jnp.array(case[key]) for key in Mix._fields))
    if mode == "pair":  # timm draws for the first half
        mix = Mix(*(jnp.concatenate([drawn, drawn[::-1]]) for drawn in mix))
    mixed = mix_images(images, images[::-1], mix)
    targets = mix_targets(labels, mix.lam, 5, 0.1)
    assert mixed.dtype == targets.dtype == jnp.float32
    np.testing.assert_allclose(mixed.transpose(0, 3, 1, 2), case["mixed"], rtol=0, atol=255 * 2e-7)
    np.testing.assert_allclose(targets, case["targets"], rtol=0, atol=2e-7)


@functools.cache
def many_draws(recipe):
    mixing = Mixing(mode="elem", **RECIPES[recipe])
    return jax.jit(lambda key: mixing.draw(key, 20_000, 64, 48))(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_shares_are_distributed_as_timm_s(recipe, timm):
    lam = np.sort(many_draws(recipe).lam)
    share, quantiles = timm["share"], timm[f"mix/{recipe}/lam"]
    # Kolmogorov-Smirnov: two such samples differ by more once in a thousand times.
    assert (np.searchsorted(lam, quantiles - 1e-6, side="left") / len(lam) - share).max() < 0.0195
    assert (share - np.searchsorted(lam, quantiles + 1e-6, side="right") / len(lam)).max() < 0.0195


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_share_belongs_to_its_box(recipe):
    mix = many_draws(recipe)
    assert [values.dtype for values in mix] == [jnp.bool_, jnp.int32, jnp.float32]
    cutmix, box, lam = (np.asarray(values) for values in mix)
    top, bottom, left, right = box[cutmix].T
    assert ((top >= 0) & (bottom <= 64) & (left >= 0) & (right <= 48)).all()
    if recipe == "mixup":
        assert not cutmix.any()
        return
    if recipe != "uncorrected":
        np.testing.assert_allclose(lam[cutmix], 1 - (bottom - top) * (right - left) / (64 * 48), atol=1e-6)
    if recipe == "minmax":
        for size, side in ((bottom - top, 64), (right - left, 48)):
            assert (size.min(), size.max()) == (int(0.2 * side), int(0.8 * side) - 1)
        assert (top.min(), left.min(), bottom.max(), right.max()) == (0, 0, 63, 47)
    probabilities = {"cutmix": 1.0, "uncorrected": 1.0, "minmax": 0.5, "both": 0.4}
    assert abs(cutmix.mean() - probabilities[recipe]) < 0.03
    if recipe == "both":
        assert abs((lam == 1).mean() - 0.2) < 0.02  # not mixed: 1 - prob


@pytest.mark.slow
def test_modes_differ_in_how_often_they_draw():
    draws = {}
    for mode in MODES:
        mixing = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode)
        draws[mode] = jax.jit(mixing.draw, static_argnums=(1, 2, 3))(jax.random.key(2), 10, 64, 48)
    assert [len(draws[mode].lam) for mode in MODES] == [1, 10, 10]
    assert len(set(draws["elem"].lam.tolist())) == 10
    for values in draws["pair"]:
        np.testing.assert_array_equal(values, values[::-1])
    assert len(set(draws["pair"].lam.tolist())) == 5


def test_probability_zero_and_the_default_are_off():
    assert not Mixing().active
    assert not Mixing(mixup_alpha=0.8, prob=0.0).active
    assert Mixing(cutmix_minmax=(0.2, 0.8)).active


def test_dominant_labels():
    labels = jnp.array([3, 1, 4, 2])
    lam = jnp.array([0.9, 0.2, 0.5, 0.49], jnp.float32)
    assert dominant_labels(labels, lam).tolist() == [3, 4, 4, 3]
    assert dominant_labels(labels, lam[1:2]).tolist() == [2, 4, 1, 3]


def test_mixing_two_normalised_batches_is_normalising_the_mixed_one():
    rng = np.random.default_rng(0)
    images = jnp.array(rng.random((4, 8, 8, 3)), jnp.float32)
    mean, std = (jnp.array(rng.random((1, 1, 1, 3)), jnp.float32) for _ in range(2))
    box, lam = jnp.array([[1, 5, 2, 8]], jnp.int32), jnp.array([0.3], jnp.float32)
    for use_cutmix in (False, True):
        mix = Mix(jnp.array([use_cutmix]), box, lam)
        first = (mix_images(images, images[::-1], mix) - mean) / std
        normalised = (images - mean) / std
        np.testing.assert_allclose(first, mix_images(normalised, normalised[::-1], mix), atol=2e-5)
