"""From images to a model's input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.augment.normalization import Normalization

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_value_equals_torchvisions_bit_for_bit(dtype: type) -> None:
    values = np.arange(256, dtype=np.uint8)[None, :, None, None].repeat(3, -1)
    mean, std = np.float32(MEAN), np.float32(STD)
    expected = (values.astype(np.float32) / np.float32(255) - mean) / std
    actual = jax.jit(Normalization(MEAN, STD))(values.astype(dtype))
    np.testing.assert_array_equal(actual, expected)


def test_inverse_takes_values_beyond_an_image() -> None:
    normalize = Normalization(MEAN, STD)
    values = jnp.array([[[[-40.0, 0.0, 300.0]]]])
    np.testing.assert_allclose(normalize.inverse(normalize(values)), values, atol=1e-4)
