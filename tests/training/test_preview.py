"""Pictures of a batch: that they are what the step sees, and how they are laid out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.augment.augmentation import Augmentation
from bvit_jax.augment.erasing import Erasing
from bvit_jax.augment.mixing import Mixing
from bvit_jax.augment.normalization import Normalization
from bvit_jax.runtime.mesh import make_mesh, replicated
from bvit_jax.training.contact_sheet import draw
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.preview import Seen, preview

NORMALIZE = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KEY = jax.random.key(0)


def batch(count=16, size=12):
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return {"image": jnp.asarray(images), "label": np.arange(count, dtype=np.int32)}


@pytest.mark.slow
def test_images_come_back_as_they_were():
    seen = preview(Inputs(NORMALIZE), batch(), 0, KEY, count=5)
    np.testing.assert_array_equal(seen.images, batch()["image"][:5])
    np.testing.assert_array_equal(seen.labels, np.arange(5))
    np.testing.assert_array_equal(seen.shares, np.ones(5))


@pytest.mark.slow
def test_images_are_augmented_as_in_the_step():
    augmentation = Augmentation(Erasing(), Mixing(mixup_alpha=1.0, mode="elem"))
    look = partial(preview, Inputs(NORMALIZE, augmentation))
    seen = jax.jit(look, out_shardings=replicated(make_mesh()))(batch(), 7, KEY)
    key = jax.random.fold_in(jax.random.fold_in(KEY, 7), 1)
    pictures, shares = jax.jit(lambda key, x: augmentation(key, x, NORMALIZE))(key, batch()["image"])
    assert len(seen.images) == 16
    assert np.abs(np.asarray(seen.images, np.float32) - np.clip(pictures, 0, 255)).max() <= 0.51
    np.testing.assert_allclose(seen.shares, shares, rtol=1e-6)
    np.testing.assert_array_equal(seen.partners, np.arange(16)[::-1])


@pytest.mark.slow
def test_values_beyond_the_scale_are_cut_off():
    augmentation = Augmentation(Erasing(prob=1.0, mode="pixel"), Mixing())
    white = {"image": np.full((4, 12, 12, 3), 255, np.uint8), "label": np.zeros(4, np.int32)}
    seen = jax.jit(partial(preview, Inputs(NORMALIZE, augmentation)))(white, 0, KEY)
    noise = np.asarray(seen.images)[np.asarray(seen.images) < 255]
    assert {0, 254} <= set(noise.tolist())


def seen(count, side, shares):
    images = np.full((count, side, side, 3), np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None])
    labels = np.arange(count, dtype=np.int32)
    return Seen(images, labels, labels[::-1], np.full(count, shares, np.float32))


def test_a_grid_of_enlarged_images():
    grid = draw(seen(10, 40, 1.0))
    assert grid.dtype == np.uint8
    height, width = 120, 120  # the first multiple of 40 from 96
    assert grid.shape == (2 * (height + 14 + 4) + 4, 8 * (width + 4) + 4, 3)
    second_row = grid[4 + height + 14 + 4 :, 4:]
    assert (second_row[:height, :width] == 9).all()
    assert (second_row[:height, width + 4 : 2 * width + 4] == 10).all()
    assert (second_row[:height, 2 * width + 8 :] == 255).all()
    assert second_row[height : height + 14, :width].min() < 100  # the label


def test_mixed_labels_and_long_names():
    plain, mixed = (draw(seen(2, 100, share), ["tench", "goldfish " * 9]) for share in (1.0, 0.75))
    assert mixed.shape[0] == plain.shape[0] + 14
    assert plain.shape[1] == 2 * 104 + 4
    between = plain[104:, 204:]
    assert (between == 255).all()  # the long name ends where its image does
