"""Quantised weights against PyTorch, against slow formulations, and at the edges of their rules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.binary.multibit import quantize_weight
from bvit_jax.binary.weights import BITS, CONV, DENSE, binarize, weight_scale
from tests import slow

pytestmark = pytest.mark.usefixtures("x64", "strict")

INF, NAN = np.inf, np.nan
CLIP = 2.5


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def forward_and_gradient(function, w, gradient):
    y, pullback = jax.vjp(function, w)
    return y, pullback(jnp.asarray(gradient, y.dtype))[0]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def check_against(plain, fast, w):
    gradient = numbers(*w.shape, seed=9)
    actual = forward_and_gradient(fast, jnp.array(w), gradient)
    expected = forward_and_gradient(plain, jnp.array(w), gradient)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


# --- one bit -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "shape"), [(DENSE, (20, 6)), (CONV, (2, 2, 5, 6))])
def test_one_bit_weights_equal_slow_formulation(rule, shape):
    def fast(w):
        # The gradient of the quantised weights reaches the codes without the scale.
        return w + jax.lax.stop_gradient(rule.quantize(w).dequantize().reshape(shape) - w)

    w, gradient = numbers(*shape), numbers(*shape, seed=9)
    expected, to_w = forward_and_gradient(lambda w: slow.one_bit(w, rule is DENSE), jnp.array(w), gradient)
    np.testing.assert_allclose(fast(jnp.array(w)), expected, rtol=1e-12)
    np.testing.assert_allclose(rule.gradient(jnp.array(w), jnp.array(gradient)), to_w, atol=1e-12)
    _, to_codes = forward_and_gradient(partial(binarize, rule=rule), jnp.array(w), gradient)
    np.testing.assert_array_equal(to_codes, rule.gradient(jnp.array(w), jnp.array(gradient)))


def test_edges_of_dense():
    # Column 0: one weight at the row mean 2. Column 1: the centred weights are -1, 2, -1.
    kernel = jnp.array([[1.0, 0], [2, 3], [3, 0]])
    y, gradient = forward_and_gradient(partial(binarize, rule=DENSE), kernel, [[1.0, 1], [2, 7], [6, 3]])
    np.testing.assert_array_equal(y, [[-1, -1], [0, 1], [1, -1]])
    np.testing.assert_array_equal(weight_scale(kernel), [2, 1])
    masked = np.array([[1.0, 1], [2, 0], [6, 3]])  # ±1 is inside, 2 is not
    np.testing.assert_allclose(gradient, masked - masked.mean(axis=0), rtol=1e-15)
    np.testing.assert_array_equal(DENSE.window(kernel), [[True, True], [True, False], [True, True]])


@pytest.mark.parametrize(("rule", "zero"), [(CONV, 0), (BITS, 1)])
def test_edges_of_uncentred_weights(rule, zero):
    values = [-INF, -1.5, -np.nextafter(1, 2), -1, -0.5, -0.0, 0.0, 1e-300, 1, np.nextafter(1, 2), INF, NAN]
    y, gradient = forward_and_gradient(
        partial(binarize, rule=rule), jnp.array(values)[:, None], np.ones((12, 1))
    )
    np.testing.assert_array_equal(y[:, 0], [-1, -1, -1, -1, -1, zero, zero, 1, 1, 1, 1, NAN])
    np.testing.assert_array_equal(gradient[:, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0])


def test_scale_gives_no_gradient():
    _, gradient = forward_and_gradient(weight_scale, jnp.array(numbers(3, 2)), np.ones(2))
    np.testing.assert_array_equal(gradient, np.zeros((3, 2)))


@pytest.mark.parametrize("rule", [DENSE, CONV])
def test_zeros_and_nan(rule):
    codes, scale = rule.quantize(jnp.zeros((4, 3)))
    np.testing.assert_array_equal(codes * scale, np.zeros((4, 3)))
    codes, scale = rule.quantize(jnp.array([[1.0, 0.2], [NAN, 0.3], [0.5, -0.4]]))
    assert np.isnan((codes * scale)[1, 0])
    assert np.isfinite((codes * scale)[:, 1]).all()


# --- two to eight bits -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), [("twn2", 2), ("sym4", 4), ("sym8", 8)])
def test_weights_of_many_bits_equal_torch(units, name, bits):
    w, to_y, y, to_w = (units[f"{name}_layer/{array}"].T for array in ("w", "gy", "y", "gw"))
    ours, gradient = forward_and_gradient(lambda w: quantize_weight(w, bits, CLIP), jnp.array(w), to_y)
    tolerance = 1e-10 if y.dtype == np.float64 else 1e-6
    np.testing.assert_allclose(ours, y, rtol=0, atol=tolerance * np.abs(y).max())
    np.testing.assert_array_equal(gradient, to_w)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(20, 6), (2, 2, 3, 4)])
def test_weights_of_many_bits_equal_slow_formulation(bits, shape):
    w = 1.5 * numbers(*shape)  # some beyond the clip
    assert np.abs(w).max() > CLIP
    values = slow.ternary_values if bits == 2 else slow.symmetric_values(bits)
    check_against(slow.many_bits(values, w, CLIP), lambda w: quantize_weight(w, bits, CLIP), w)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_bits_drop_weights_at_the_threshold(dtype):
    w = jnp.array([7, -7, 13, -13], dtype)  # the mean magnitude is 10
    np.testing.assert_array_equal(quantize_weight(w, 2, 100.0), [0, 0, 13, -13])


def test_levels_round_half_to_even():
    w = jnp.array([3.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])  # 3 bits: the levels are -3 to 3
    np.testing.assert_array_equal(quantize_weight(w, 3, 100.0), [3, 0, 2, 2, 0, -2, -2])


@pytest.mark.parametrize("bits", range(2, 9))
def test_many_bits(bits):
    inside = np.nextafter(CLIP, 0)
    w = jnp.array([[CLIP, -CLIP], [inside, -inside], [3.0, -INF], [0.0, 1.0]])
    y, gradient = forward_and_gradient(lambda w: quantize_weight(w, bits, CLIP), w, np.full((4, 2), 3.0))
    np.testing.assert_array_equal(gradient, [[0, 0], [3, 3], [0, 0], [3, 3]])
    assert np.abs(y).max() <= CLIP + 1e-8
    assert len(np.unique(quantize_weight(jnp.array(numbers(40, 20)), bits, CLIP))) <= 2**bits - 1

    y, gradient = forward_and_gradient(
        lambda w: quantize_weight(w, bits, CLIP), jnp.zeros((4, 3)), np.ones((4, 3))
    )
    np.testing.assert_array_equal(y, np.zeros((4, 3)))
    np.testing.assert_array_equal(gradient, np.ones((4, 3)))
    assert np.isnan(quantize_weight(jnp.array([[1.0, 0.2], [NAN, 0.3]]), bits, CLIP)[1, 0])
    for value in (0.5, -3.0):  # constant weights stay
        y = quantize_weight(jnp.full((4, 3), value), bits, CLIP)
        np.testing.assert_allclose(y, np.full((4, 3), np.clip(value, -CLIP, CLIP)), rtol=1e-7)


def test_32_bits_are_the_weights():
    w = jnp.array(numbers(6, 4))
    assert quantize_weight(w, 32, CLIP) is w


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"weight bits are {bits}"):
        quantize_weight(jnp.ones((2, 2)), bits, CLIP)
