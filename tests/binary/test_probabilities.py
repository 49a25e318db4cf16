"""Attention probabilities of one bit against PyTorch, a slow formulation, and at the edges of their rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.binary.gsb import gsb_probabilities
from bvit_jax.binary.probabilities import above, prob_codes, quantize_probs
from tests import slow

pytestmark = pytest.mark.usefixtures("x64", "strict")

INF, NAN = np.inf, np.nan


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def forward_and_gradients(function, gradient, *arguments):
    """Returns the value of ``function`` and the gradient of each argument, given that of the output."""
    y, pullback = jax.vjp(function, *arguments)
    return y, *pullback(jnp.asarray(gradient, y.dtype))


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def binarize(probs, scale):
    return quantize_probs(probs, scale).dequantize()


def test_equal_torch(units):
    arguments = (jnp.array(units[f"prob/{name}"]) for name in ("x", "clip"))
    actual = forward_and_gradients(binarize, units["prob/gy"], *arguments)
    for ours, name in zip(actual, ("y", "gx", "gclip"), strict=True):
        theirs = units[f"prob/{name}"]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * np.abs(theirs).max())


@pytest.mark.parametrize("scale", [0.005, 0.3, 2.0])
def test_equal_slow_formulation(scale):
    # The product with the scale may come after any linear map, which is how the models use it.
    probs, values = jnp.array(np.abs(numbers(4, 50)) * scale), jnp.array(numbers(50, 3, seed=1))

    def fast(probs, scale):
        codes = quantize_probs(probs, scale)
        return codes.dequantize(), (codes.values @ values) * codes.scale

    def plain(probs, scale):
        return slow.probs(probs, scale), slow.probs(probs, scale) @ values

    (y, pullback), (expected, slow_pullback) = (jax.vjp(f, probs, jnp.array(scale)) for f in (fast, plain))
    gradient = jnp.array(numbers(4, 50, seed=9)), jnp.array(numbers(4, 3, seed=8))
    for a, b in zip((*y, *pullback(gradient)), (*expected, *slow_pullback(gradient)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_edges():
    scale = jnp.array(0.25)
    ratio = np.array([0, 0.5, 1, 1.5, 2.5, -0.25, np.nextafter(0.5, 1), np.nextafter(1, 2), INF])
    probs = jnp.array(ratio * 0.25)
    y, to_probs, to_scale = forward_and_gradients(prob_codes, np.ones(9), probs, scale)
    np.testing.assert_array_equal(y, [0, 0, 1, 1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(to_probs, np.array([1, 1, 1, 0, 0, 0, 1, 0, 0]) / 0.25)
    assert np.isfinite(to_scale)
    _, pullback = jax.vjp(binarize, probs, scale)
    to_scale = jax.vmap(pullback)(jnp.eye(9))[1]
    expected = [0, -0.5, 0, 1, 1, 0, 0.5, 1, 1]  # round(q) - q inside, 1 above, 0 below
    np.testing.assert_allclose(to_scale, expected, atol=1e-15)


def test_rounds_half_to_even():
    # 0.5 -> 0 is the only tie inside [0, 1]; 1.5 and 2.5 both end at the last code.
    np.testing.assert_array_equal(binarize(jnp.array([0.5, 1.5, 2.5]), jnp.array(1.0)), [0, 1, 1])


@pytest.mark.slow
def test_zeros_and_nan():
    scale = jnp.array(0.5)
    y, *gradients = forward_and_gradients(binarize, np.ones((4, 3)), jnp.zeros((4, 3)), scale)
    np.testing.assert_array_equal(y, np.zeros((4, 3)))
    assert all(np.isfinite(g).all() for g in gradients)
    y = binarize(jnp.array([[1.0, 0.2], [NAN, 0.3]]), scale)
    np.testing.assert_array_equal(np.isnan(y), [[False, False], [True, False]])


@pytest.mark.slow
def test_a_scale_for_each_head_is_that_of_each_head():
    rng = np.random.default_rng(0)
    probs, gradient = jnp.array(rng.uniform(0, 1, (2, 3, 4, 5))), jnp.array(rng.normal(size=(2, 3, 4, 5)))
    scales = jnp.array([0.2, 0.5, 0.9])
    actual = forward_and_gradients(prob_codes, gradient, probs, scales[:, None, None])
    assert actual[2].shape == (3, 1, 1)
    for head in range(3):
        y, to_probs, to_scale = forward_and_gradients(
            prob_codes, gradient[:, head], probs[:, head], scales[head]
        )
        np.testing.assert_array_equal(actual[0][:, head], y)
        np.testing.assert_allclose(actual[1][:, head], to_probs, rtol=1e-12)
        np.testing.assert_allclose(actual[2][head, 0, 0], to_scale, rtol=1e-12)


def test_a_floor_passes_only_what_raises_a_value_below_it():
    x = jnp.array([-1.0, 0.1, 0.2, 3.0])
    y, up, floor = forward_and_gradients(above, np.full(4, -1.0), x, jnp.array(0.1))
    np.testing.assert_array_equal(y, [0.1, 0.1, 0.2, 3.0])
    np.testing.assert_array_equal(up, [-1, -1, -1, -1])  # a descent raises them
    assert floor == 0
    _, down, _ = forward_and_gradients(above, np.ones(4), x, jnp.array(0.1))
    np.testing.assert_array_equal(down, [0, 0, 1, 1])


def test_masks_around_the_largest_at_their_edges():
    """Half rounds to even, and at exactly 1 the scale still gets the gradient of the closed interval."""
    probs = jnp.array([0.5, 1, 1.5, 4]).reshape(1, 1, 1, 4)
    one, third = jnp.array(1.0), jnp.array(2.0)
    y, back = jax.vjp(gsb_probabilities, probs, one, one, third)
    np.testing.assert_array_equal(y[0, 0, 0], [0, 1, 1, 2])
    to_probs, *to_scales = back(jnp.ones_like(y))
    np.testing.assert_array_equal(to_probs, y)  # times the gradient, which is 1
    np.testing.assert_array_equal(to_scales, [0.5 * 0 + 0 * 1 + 1 + 2, 0, 1])
