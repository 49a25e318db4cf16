"""Estimators: at the edges of their rules, against PyTorch, and what one changed slope changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.binary import products
from bvit_jax.binary.estimators import CLIP, ESTIMATORS, PARABOLA, TANH, straight_through
from bvit_jax.binary.weights import DENSE
from bvit_jax.errors import UserError
from bvit_jax.layers import dense
from bvit_jax.layers.dense import BinaryDense, BinaryPatchConv, UncentredDense
from bvit_jax.models.blocks import BinaryBlock, BlockConfig
from bvit_jax.models.execution.stages import Execution
from tests import slow

pytestmark = pytest.mark.usefixtures("x64")

INF, NAN = np.inf, np.nan


def draw(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).standard_normal(shape))


def forward_and_gradient(function, x, gradient=None):
    y, pullback = jax.vjp(function, x)
    return y, pullback(jnp.ones_like(y) if gradient is None else jnp.array(gradient))[0]


def close(actual, expected, tolerance=1e-11):
    """Compares trees, each array to a share of its largest value."""

    def compare(a, b):
        largest = max(np.abs(b).max(), 1e-2)  # some gradients are zero but for rounding
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)

    jax.tree.map(compare, actual, expected)


# --- the table of edge rules -------------------------------------------------------------------

EDGES = [0.0, -0.0, -1.0, 1.0, -INF, INF, 1e-30, -1e-30, 3.0, np.nextafter(1, 2), -0.5]
SLOPES = {
    "parabola": [2, 2, 0, 0, 0, 0, 2, 2, 0, 0, 1],
    "clip": [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1],
    "tanh": [2 / np.cosh(2 * x) ** 2 if abs(x) < 9 else 0 for x in EDGES],
}


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_edges(name, bits):
    estimator = ESTIMATORS[name].bit if bits else ESTIMATORS[name]
    y, gradient = forward_and_gradient(straight_through(estimator), jnp.array(EDGES))
    zero = 1 if bits else 0
    np.testing.assert_array_equal(y, [zero, zero, -1, 1, -1, 1, 1, -1, 1, 1, -1])
    np.testing.assert_allclose(gradient, SLOPES[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_dtypes(name, dtype):
    with jax.numpy_dtype_promotion("strict"):
        for estimator in (ESTIMATORS[name], ESTIMATORS[name].bit):
            y, gradient = forward_and_gradient(straight_through(estimator), jnp.array([-0.5, 0, 1], dtype))
            assert y.dtype == gradient.dtype == dtype
            np.testing.assert_allclose(
                gradient.astype(float), [SLOPES[name][i] for i in (10, 0, 3)], rtol=1e-2
            )


@pytest.mark.parametrize("estimator", [PARABOLA, PARABOLA.bit, TANH])
def test_nan_is_not_hidden(estimator):
    y, gradient = forward_and_gradient(straight_through(estimator), jnp.array([NAN, 0.5]))
    assert np.isnan(y[0])
    assert np.isnan(gradient[0])
    assert np.isfinite([y[1], gradient[1]]).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_slopes_integrate_to_the_step_of_the_sign(name):
    x = jnp.linspace(-20, 20, 400_001)
    assert abs(np.trapezoid(ESTIMATORS[name].slope(x), x) - 2) < 1e-3


@pytest.mark.parametrize("name", slow.SMOOTH)
def test_slopes_are_derivatives(name):
    estimator, smooth = slow.SMOOTH[name]
    x = draw(100)
    np.testing.assert_allclose(estimator.slope(x), jax.vmap(jax.grad(smooth))(x), rtol=1e-12, atol=1e-14)


def test_parabola_equals_torch(units):
    x, to_y = jnp.array(units["sign/x"]), units["sign/gy"]
    y, gradient = forward_and_gradient(straight_through(PARABOLA), x, to_y)
    np.testing.assert_array_equal(y, units["sign/y"])
    close(gradient, units["sign/gx"], 1e-10)


def test_one_function_per_estimator():
    assert straight_through(PARABOLA.bit) is straight_through(PARABOLA.bit)
    assert straight_through(PARABOLA) is not straight_through(CLIP)


# --- what the choice changes -------------------------------------------------------------------


def slow_products(smooth):
    """Returns the products of `bvit_jax.binary.products` by name, differentiated through ``smooth``."""

    def binary_product(x, move, kernel, rule, config):
        shifted = x + move
        operand = slow.sign(shifted, smooth) if config.binary_input else shifted
        return operand @ slow.one_bit(kernel, rule is DENSE).reshape(x.shape[-1], -1)

    def binary_scores(q, k, config):
        return jnp.einsum("bqhd,bkhd->bhqk", slow.sign(q, smooth), slow.sign(k, smooth))

    def binary_context(codes, v, config):
        return jnp.einsum("bhqk,bkhd->bqhd", codes, slow.sign(v, smooth))

    return {f.__name__: f for f in (binary_product, binary_scores, binary_context)}


LAYERS = {
    "dense": (BinaryDense, (5,), (3, 4, 6)),
    "dense of 4 bits": (BinaryDense, (5, 4), (3, 4, 6)),
    "uncentred": (UncentredDense, (5,), (3, 4, 6)),
    "convolution": (BinaryPatchConv, (5, 2), (3, 4, 4, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_layer_follow_the_slope(name, monkeypatch):
    layer, arguments, shape = LAYERS[name]
    x = draw(*shape)
    make = lambda **settings: layer(*arguments, dtype=jnp.float64, **settings)  # noqa: E731
    params = jax.tree.map(lambda a: a + 0.1 * draw(*a.shape, seed=1), make().init(jax.random.key(0), x))

    def gradients(module):
        return jax.grad(lambda params, x: jnp.sum(jnp.sin(module.apply(params, x))), (0, 1))(params, x)

    default, changed = gradients(make()), gradients(make(estimator=slow.CAUCHY))
    assert not np.allclose(default[1], changed[1])
    for function, value in slow_products(jnp.arctan).items():
        monkeypatch.setattr(products, function, value)
    if name == "dense of 4 bits":
        monkeypatch.setattr(dense, "straight_through", lambda _: lambda x: slow.sign(x, jnp.arctan))
    close(changed, gradients(make()))


@pytest.mark.slow
def test_gradients_of_a_block_follow_the_slope(monkeypatch):
    """Attention and both feed-forward branches, plain and packed."""
    monkeypatch.setitem(ESTIMATORS, "cauchy", slow.CAUCHY)
    x, weights = draw(2, 16, 8), draw(2, 16, 8, seed=1)

    def block(**settings):
        config = BlockConfig(dtype=jnp.float64, pool_branches=(), **settings)
        return BinaryBlock(2, 16, 2, 0.0, config)

    variables = jax.jit(lambda: block().init(jax.random.key(0), x, train=True))()
    leaves, tree = jax.tree.flatten(variables)
    moved = [leaf + 0.1 * draw(*leaf.shape, seed=i) ** 2 for i, leaf in enumerate(leaves)]
    variables = jax.tree.unflatten(tree, moved)

    def gradients(module):
        def loss(params, x):
            given = {**variables, "params": params}
            (y, _), _ = module.apply(given, x, train=True, mutable=["batch_stats"])
            return jnp.sum(y * weights)

        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(variables["params"], x)
        return lowered.compile()(variables["params"], x), lowered.as_text()

    plain, _ = gradients(block(estimator="cauchy"))
    packed, text = gradients(block(estimator="cauchy", execution=Execution(packed=True)))
    assert "popcnt" in text
    for function, value in slow_products(jnp.arctan).items():
        monkeypatch.setattr(products, function, value)
    expected, _ = gradients(block())
    close(plain, expected)
    close(packed, expected)
    for name in ("query_move", "key_move", "value_move"):
        assert np.abs(expected[0]["attention"][name]).max() > 0, name


def test_a_sign_of_bits_is_not_packed(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "bits", PARABOLA.bit)
    config = BlockConfig(estimator="bits", dtype=jnp.float64, execution=Execution(packed=True))
    block, x = BinaryBlock(1, 16, 1, 0.0, config), jnp.zeros((2, 16, 8))
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), x, train=True))
    assert "popcnt" not in jax.jit(lambda v, x: block.apply(v, x, train=False)).lower(variables, x).as_text()


# --- the setting -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["binaryvit", "react_deit", "bivit_deit", "bivit_swin"])
def test_the_setting_of_a_model(name):
    config = models.model_config(name)
    assert config.estimator == "parabola"
    del config["estimator"]  # as in the files of an older version
    assert models.create_model(config).block.sign.slope is PARABOLA.slope
    assert models.create_model({"name": name, "estimator": "clip"}).block.sign.slope is CLIP.slope
    message = "config.model.estimator is 'parabla'; did you mean 'parabola'"
    with pytest.raises(UserError, match=message):
        models.create_model({"name": name, "estimator": "parabla"})
