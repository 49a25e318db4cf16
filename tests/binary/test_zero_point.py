"""Bi-ViT's quantisers against slow formulations that automatic differentiation sees through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bvit_jax.binary import products
from bvit_jax.binary import zero_point as quantize
from bvit_jax.binary.weights import CONV
from tests import slow

pytestmark = pytest.mark.usefixtures("x64")


def slow_quantizer(x, scale, zero_point):
    """Returns values, not codes, as the spelling of the released code: u, clamp, sign, shift, scale."""
    factor = 1 / np.sqrt(x.size)
    scale = lax.stop_gradient(scale * (1 - factor)) + scale * factor
    zero_point = lax.stop_gradient(zero_point * (1 - factor)) + zero_point * factor
    rounded = slow.with_gradient_of(zero_point, jnp.round(zero_point))
    u = x / scale + rounded
    clamped = slow.clipped(u)
    return (slow.with_gradient_of(clamped, jnp.sign(clamped)) - rounded) * scale


def quantizer(x, scale, zero_point):
    scale = quantize.learned_step(scale, x.size)
    zero_point = quantize.learned_step(zero_point, x.size)
    return quantize.zero_point_codes(x, scale, zero_point) * scale


def draw(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).standard_normal(shape))


SHAPES = [(2, 5, 3, 4), (3, 1)], [(2, 3, 5, 5), (3, 1, 1)], [(7, 6), (6,)], [(4, 4), ()]


def cases(shape, broadcast):
    scale = 0.5 + jnp.abs(draw(*broadcast, seed=1))
    return 2 * draw(*shape), scale, 3 * draw(*broadcast, seed=2), draw(*shape, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "broadcast"), SHAPES)
def test_quantizer_against_the_slow_one(shape, broadcast):
    *arguments, gradient = cases(shape, broadcast)
    assert jnp.any(jnp.round(arguments[2]) != 0)
    actual, actual_pullback = jax.vjp(quantizer, *arguments)
    expected, expected_pullback = jax.vjp(slow_quantizer, *arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-14)
    for a, b in zip(actual_pullback(gradient), expected_pullback(gradient), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.slow
def test_edges_of_the_codes():
    x = jnp.array([-1.0, 0.0, 1.0, 1 + 1e-9, -1 - 1e-9, jnp.inf, -jnp.inf])
    one, zero = jnp.ones(()), jnp.zeros(())
    codes, pullback = jax.vjp(quantize.zero_point_codes, x, one, zero)
    np.testing.assert_array_equal(codes, [-1, 0, 1, 1, -1, 1, -1])
    to_x, to_scale, to_zero_point = pullback(jnp.ones_like(x))
    np.testing.assert_array_equal(to_x, [1, 1, 1, 0, 0, 0, 0])
    assert to_scale == 0  # 1 - 1: what lies outside gives none
    assert to_zero_point == -4
    # Half to even; the sign is 0 at the learned zero.
    np.testing.assert_array_equal(quantize.zero_point_codes(x[:3], one, jnp.array(0.5)), [-1, 0, 1])
    np.testing.assert_array_equal(quantize.zero_point_codes(x[:3], one, jnp.array(-1.4)), [0, 0, 1])
    assert jnp.isnan(quantize.zero_point_codes(jnp.array(jnp.nan), one, zero))


@pytest.mark.slow
def test_probabilities_all_become_the_scale_until_a_zero_point_is_below_a_half():
    probs = jax.nn.softmax(draw(1, 2, 5, 5))
    first = quantize.first_values(probs)
    assert first.signed == 0
    codes = quantize.zero_point_codes(probs, first.scale, first.zero_point)
    np.testing.assert_array_equal(codes, jnp.ones_like(probs))
    codes = quantize.zero_point_codes(probs, first.scale, jnp.array(-0.6))
    assert set(np.unique(codes)) == {0, 2}


def test_first_values():
    first = quantize.first_values(jnp.array([[-1.0, 2.0], [0.0, 3.0]]))
    np.testing.assert_allclose(first, [3.0, 0.2, 1.0], rtol=1e-15)
    assert quantize.first_values(jnp.array([-1e-5, 1.0])).signed == 0
    assert quantize.first_values(jnp.array([-1.1e-5, 1.0])).signed == 1
    gradient = jax.grad(lambda x: sum(quantize.first_values(x)))(jnp.array([-1.0, 2.0]))
    np.testing.assert_array_equal(gradient, [0, 0])


def test_clip_of_the_output():
    x = jnp.array([-11.0, -10.0, 3.0, 10.0, 10.5, jnp.inf])
    y, pullback = jax.vjp(quantize.clip_output, x)
    np.testing.assert_array_equal(y, [-10, -10, 3, 10, 10, 10])
    np.testing.assert_array_equal(pullback(jnp.ones_like(x))[0], [0, 1, 1, 1, 0, 0])
    assert jnp.isnan(quantize.clip_output(jnp.array(jnp.nan)))


@pytest.mark.slow
def test_weights_and_inputs_of_the_linear_layers():
    """The product of the binary layers is that of the spelled-out weights and signs."""

    def plain(x, kernel):
        return slow.sign(x) @ slow.one_bit(kernel, centre=False)

    def fast(x, kernel):
        config = products.ProductConfig(jnp.float64)
        return products.binary_product(x, jnp.zeros(x.shape[-1]), kernel, CONV, config)

    x, kernel, gradient = draw(3, 5, 7), 0.8 * draw(7, 4, seed=1), draw(3, 5, 4, seed=2)
    assert jnp.any(jnp.abs(kernel) > 1)
    actual, actual_pullback = jax.vjp(fast, x, kernel)
    expected, expected_pullback = jax.vjp(plain, x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-13)
    for a, b in zip(actual_pullback(gradient), expected_pullback(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-13), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"])
def test_products_of_codes(equation, dtype, tolerance):
    sizes = {"b": 2, "h": 3, "q": 4, "k": 4, "d": 5}
    left, right = (
        jnp.round(3 * draw(*(sizes[i] for i in term), seed=s))
        for s, term in enumerate(equation.partition("->")[0].split(","))
    )
    actual, pullback = jax.vjp(lambda a, b: products.code_product(a, b, equation, dtype), left, right)
    expected, slow_pullback = jax.vjp(lambda a, b: jnp.einsum(equation, a, b), left, right)
    np.testing.assert_array_equal(actual, expected)
    gradient = draw(*actual.shape, seed=4)
    slow = slow_pullback(gradient)
    for a, b in zip(pullback(gradient.astype(actual.dtype)), slow, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * jnp.abs(b).max())
