"""Binary products against the plain path: quantise, then multiply in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.binary import products
from bvit_jax.binary.products import ProductConfig
from bvit_jax.binary.weights import CONV, DENSE, weight_scale
from bvit_jax.layers import dense
from tests import slow

DTYPES = ("float64", "float32", "bfloat16")
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
RULES = {  # with their centring and the shape of a kernel
    "dense": (DENSE, True, (20, 12)),
    "conv": (CONV, False, (2, 2, 5, 12)),
}

pytestmark = pytest.mark.usefixtures("x64")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def forward_and_gradients(function, gradient, *arguments):
    y, transpose = jax.vjp(function, *arguments)
    return y, transpose(jnp.asarray(gradient, y.dtype))


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


# --- products with weights ---------------------------------------------------------------------


def plain_product(rule_name, smooth):
    def product(x, move, kernel):
        x = x + move if smooth is None else slow.sign(x + move, smooth)
        return x @ slow.one_bit(kernel, RULES[rule_name][1]).reshape(x.shape[-1], -1)

    return product


def product_inputs(rule_name):
    x, move = numbers(3, 7, 20), numbers(20, seed=1)
    kernel = 0.8 * numbers(*RULES[rule_name][2], seed=2)
    # Numbers that every dtype holds, and zeros before the sign.
    x, move, kernel = (np.round(a * 64) / 64 for a in (x, move, kernel))
    x[0, 0, :4] = -move[:4]
    return x, move, kernel


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in slow.SMOOTH] + [(n, d) for n in ("parabola", "real") for d in DTYPES[1:]],
)
@pytest.mark.parametrize("rule_name", RULES)
def test_binary_product_equals_the_plain_path(rule_name, name, dtype):
    """For each estimator, and for a real input."""
    estimator, smooth = slow.SMOOTH.get(name, (products.PARABOLA, None))
    x, move, kernel = product_inputs(rule_name)
    gradient = np.round(numbers(3, 7, 12, seed=3) * 64) / 64
    config = ProductConfig(jnp.dtype(dtype), estimator, binary_input=smooth is not None)
    parameter_dtype = products.accumulator_dtype(dtype)
    y, gradients = forward_and_gradients(
        lambda *arguments: products.binary_product(*arguments, RULES[rule_name][0], config),
        gradient,
        jnp.array(x, dtype),
        jnp.array(move, parameter_dtype),
        jnp.array(kernel, parameter_dtype),
    )
    assert y.dtype == parameter_dtype
    assert [g.dtype for g in gradients] == [dtype, parameter_dtype, parameter_dtype]

    plain = plain_product(rule_name, smooth)
    expected, expected_gradients = forward_and_gradients(plain, gradient, *map(jnp.array, (x, move, kernel)))
    # A real operand is rounded to the compute dtype; binary ones are exact in all of them.
    assert_close(y, expected, TOLERANCE["float32" if smooth and dtype != "float64" else dtype])
    for actual, wanted in zip(gradients, expected_gradients):
        assert_close(actual, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule_name", RULES)
def test_binary_forward_is_bit_identical(rule_name, dtype):
    x, move, kernel = product_inputs(rule_name)
    rule = RULES[rule_name][0]
    config = ProductConfig(jnp.dtype(dtype))
    accumulator = products.accumulator_dtype(dtype)
    kernel = jnp.array(kernel, accumulator)
    y = products.binary_product(jnp.array(x, dtype), jnp.array(move, accumulator), kernel, rule, config)
    codes = np.asarray(rule.codes(kernel), np.float64).reshape(20, 12)
    integers = np.sign(x + move) @ codes
    expected = jnp.array(integers, accumulator) * weight_scale(kernel)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))


@pytest.mark.parametrize("compiled", [False, True])
def test_long_sums_are_exact_in_bfloat16(compiled):
    rng = np.random.default_rng(0)
    x = rng.choice([-1.5, -0.25, 0.0, 0.5, 2.0], (64, 2048))
    kernel = jnp.array(rng.choice([-1.0, 1.0], (2048, 16)), jnp.float32)
    kernel = kernel - jnp.mean(kernel, axis=0)
    x[0] = np.sign(kernel[:, 0])  # the largest sum there is, not a bfloat16 number
    x[0, 0] = 0
    scale = weight_scale(kernel)
    config = ProductConfig(jnp.bfloat16)
    move = jnp.zeros(2048, jnp.float32)
    product = products.binary_product  # one by one, XLA keeps no excess precision
    product = jax.jit(product, static_argnums=(3, 4)) if compiled else product
    y = product(jnp.array(x, jnp.bfloat16), move, kernel, DENSE, config)
    integers = np.sign(x) @ np.sign(np.asarray(kernel, np.float64))
    assert integers.max() == 2047
    np.testing.assert_array_equal(y, jnp.array(integers, jnp.float32) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_before_the_sign_gives_zero(dtype):
    move = jnp.array(np.round(numbers(8) * 16) / 16, products.accumulator_dtype(dtype))
    x = jnp.broadcast_to(-move, (2, 8)).astype(dtype)
    config = ProductConfig(jnp.dtype(dtype))
    kernel = jnp.array(numbers(8, 3), move.dtype)
    assert not products.binary_product(x, move, kernel, DENSE, config).any()


def test_rounding_makes_no_zeros_before_the_sign():
    # In bfloat16, -1 + 1.001 is 0.
    x, move = jnp.full((1, 4), -1, jnp.bfloat16), jnp.full(4, 1.001, jnp.float32)
    assert not (x + move.astype(jnp.bfloat16)).any()
    kernel = jnp.array([[1.0, -3], [2, 4], [-5, 6], [4, -1]], jnp.float32)
    config = ProductConfig(jnp.bfloat16)
    y = products.binary_product(x, move, kernel, DENSE, config)
    codes = np.sign(kernel - np.mean(kernel, axis=0))
    np.testing.assert_array_equal(y, codes.sum(axis=0, keepdims=True) * weight_scale(kernel))


# --- against PyTorch ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 8, 32])
def test_linear_layers_equal_torch(units, bits):
    case = {name: units[f"linear{bits}/{name}"] for name in ("x", "w", "gy", "y", "gx", "gw")}
    layer = dense.BinaryDense(12, weight_bits=bits, act_bits=1, dtype=jnp.float64)
    check_layer(layer, case, case["w"].T, lambda gw: gw.T, lambda x: x, lambda y: y)


@pytest.mark.slow
def test_convolution_equals_torch(units):
    case = {name: units[f"conv/{name}"] for name in ("x", "w", "gy", "y", "gx", "gw")}
    layer = dense.BinaryPatchConv(12, 2, dtype=jnp.float64)
    check_layer(
        layer,
        case,
        case["w"].transpose(2, 3, 1, 0),
        lambda gw: gw.transpose(3, 2, 0, 1),
        lambda x: np.moveaxis(x, 1, -1),
        lambda y: np.moveaxis(y, 1, -1).reshape(y.shape[0], -1, y.shape[1]),
    )


def check_layer(layer, case, kernel, to_torch, channels_last, tokens):
    """Compares a layer whose shift is zero with one that has none."""
    x = jnp.array(channels_last(case["x"]))
    zero = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["move"]
    move = jnp.zeros(zero.shape)

    def apply(kernel, x):
        return layer.apply({"params": {"kernel": kernel, "move": move}}, x)

    y, (to_kernel, to_x) = forward_and_gradients(apply, tokens(case["gy"]), jnp.array(kernel), x)
    assert_close(y, tokens(case["y"]), 1e-12)
    assert_close(to_torch(np.asarray(to_kernel)), case["gw"], 1e-12)
    assert_close(to_x, channels_last(case["gx"]), 1e-12)


# --- products inside attention -----------------------------------------------------------------


ATTENTION_CASES = pytest.mark.parametrize(
    ("name", "dtype", "integers"),
    [(name, "float64", False) for name in slow.SMOOTH]
    + [("parabola", "float32", True), ("parabola", "bfloat16", True), ("parabola", "bfloat16", False)],
)


@ATTENTION_CASES
def test_scores_equal_the_plain_path(name, dtype, integers):
    q, k = (np.round(numbers(2, n, 3, 8, seed=n) * 64) / 64 for n in (5, 6))
    q[0, 0], k[0, 1] = 0, -1
    gradient = np.round(numbers(2, 3, 5, 6) * 64) / 64

    def plain(smooth, q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", slow.sign(q, smooth), slow.sign(k, smooth))

    check_attention(plain, products.binary_scores, name, dtype, integers, gradient, q, k)


@ATTENTION_CASES
def test_context_equals_the_plain_path(name, dtype, integers):
    codes = np.random.default_rng(0).integers(0, 2, (2, 3, 5, 6)).astype(np.float64)
    v = np.round(numbers(2, 6, 3, 8) * 64) / 64
    v[0, 0] = 0
    gradient = np.round(numbers(2, 5, 3, 8, seed=1) * 64) / 64

    def plain(smooth, codes, v):
        return jnp.einsum("bhqk,bkhd->bqhd", codes, slow.sign(v, smooth))

    check_attention(plain, products.binary_context, name, dtype, integers, gradient, codes, v)


def check_attention(plain, product, name, dtype, integers, gradient, *arguments):
    estimator, smooth = slow.SMOOTH[name]
    config = ProductConfig(jnp.dtype(dtype), estimator, integer_products=integers)
    accumulator = products.accumulator_dtype(dtype)
    y, gradients = forward_and_gradients(
        lambda *a: product(*a, config), gradient, *(jnp.array(a, accumulator) for a in arguments)
    )
    plain = partial(plain, smooth)
    expected, expected_gradients = forward_and_gradients(plain, gradient, *map(jnp.array, arguments))
    assert y.dtype == accumulator
    np.testing.assert_array_equal(np.asarray(y, np.float64), np.asarray(expected))
    for actual, wanted in zip(gradients, expected_gradients):
        assert actual.dtype == accumulator
        assert_close(actual, wanted, TOLERANCE[dtype])


# --- real products -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "accumulator"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")]
)
def test_real_product_accumulates_in_float32_at_least(dtype, accumulator):
    assert products.accumulator_dtype(dtype) == accumulator
    x = jnp.ones((1, 2048), dtype).at[0, 0].set(3.0)
    y = products.real_product(x, jnp.ones((2048, 1), accumulator))
    assert y.dtype == accumulator
    assert y[0, 0] == 2050  # not a bfloat16 number
