"""Binary convolutions against the plain path: quantise, then add shifted grids in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.binary import products
from bvit_jax.binary.convolutions import Geometry, binary_convolution
from bvit_jax.binary.products import ProductConfig
from bvit_jax.binary.weights import DENSE
from tests import slow

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
CHANNELS, FEATURES, GROUPS = 8, 12, 4

pytestmark = pytest.mark.usefixtures("x64")


def numbers(*shape, seed=0):
    """Returns multiples of 1/64, which every dtype holds."""
    return np.round(np.random.default_rng(seed).standard_normal(shape) * 64) / 64


def inputs():
    x, move = numbers(2, 5, 7, CHANNELS), numbers(CHANNELS, seed=1)
    x[0, 0, :4] = -move  # zeros before the sign
    return x, move, numbers(3, 3, CHANNELS // GROUPS, FEATURES, seed=2), numbers(2, 5, 7, FEATURES, seed=3)


def plain_convolution(dilation, smooth):
    """Returns the sum over groups and positions of the kernel of products of shifted grids."""

    def convolve(x, move, kernel):
        x = x + move if smooth is None else slow.sign(x + move, smooth)
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (dilation, dilation), (dilation, dilation), (0, 0)))
        parts = zip(
            jnp.split(padded, GROUPS, axis=-1),
            jnp.split(slow.one_bit(kernel, centre=True), GROUPS, axis=-1),
            strict=True,
        )
        groups = [
            sum(
                part[:, i * dilation :, j * dilation :][:, :height, :width] @ own[i, j]
                for i in range(3)
                for j in range(3)
            )
            for part, own in parts
        ]
        return jnp.concatenate(groups, axis=-1)

    return convolve


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("parabola", "float64"), ("clip", "float64"), ("real", "float64")]
    + [(name, dtype) for name in ("parabola", "real") for dtype in ("float32", "bfloat16")],
)
@pytest.mark.parametrize("dilation", [1, 5])
def test_binary_convolution_equals_the_plain_path(dilation, name, dtype):
    """Values, gradients and their dtypes; a dilation of 5 reaches over the whole grid."""
    estimator, smooth = slow.SMOOTH.get(name, (products.PARABOLA, None))
    *arguments, gradient = inputs()
    accumulator = products.accumulator_dtype(dtype)
    config = ProductConfig(jnp.dtype(dtype), estimator, binary_input=smooth is not None)

    def convolve(*arguments):
        return binary_convolution(*arguments, DENSE, Geometry(dilation, GROUPS), config)

    dtypes = [jnp.dtype(dtype), accumulator, accumulator]
    y, back = jax.vjp(convolve, *(jnp.array(a, d) for a, d in zip(arguments, dtypes, strict=True)))
    gradients = back(jnp.array(gradient, accumulator))
    assert [y.dtype, *(g.dtype for g in gradients)] == [accumulator, *dtypes]

    expected, back = jax.vjp(plain_convolution(dilation, smooth), *map(jnp.array, arguments))
    # A real operand is rounded to the compute dtype; signs are exact in all of them.
    assert_close(y, expected, TOLERANCE["float32" if smooth and dtype == "bfloat16" else dtype])
    for found, wanted in zip(gradients, back(jnp.array(gradient)), strict=True):
        assert_close(found, wanted, TOLERANCE[dtype])


def test_sums_that_are_saved_as_integers_are_exact():
    x, move, kernel, _ = (jnp.array(a, jnp.float32) for a in inputs())
    plain, integer = (
        binary_convolution(
            x, move, kernel, DENSE, Geometry(3, GROUPS), ProductConfig(jnp.float32, integer_products=saved)
        )
        for saved in (False, True)
    )
    np.testing.assert_array_equal(plain, integer)
