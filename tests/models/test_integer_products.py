"""What `remat="products"` and `one_pass_norms` are made of, each next to the plain path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.binary import products
from bvit_jax.binary.weights import CONV
from bvit_jax.layers import closed_form, grid
from bvit_jax.layers.norm import BatchNorm
from bvit_jax.models.execution import grid_products
from bvit_jax.plan import hlo
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated
from tests.binary.test_products import RULES, forward_and_gradients, numbers, product_inputs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("rule_name", RULES)
def test_integer_products_are_the_same_bits(rule_name, binary_input, dtype):
    x, move, kernel = (jnp.array(a, dtype) for a in product_inputs(rule_name))
    parameter = products.accumulator_dtype(dtype)
    gradient = numbers(3, 7, 12, seed=3)

    def run(whole):
        config = products.ProductConfig(jnp.dtype(dtype), binary_input=binary_input, integer_products=whole)
        arguments = x, move.astype(parameter), kernel.astype(parameter)
        return forward_and_gradients(
            lambda *a: products.binary_product(*a, RULES[rule_name][0], config), gradient, *arguments
        )

    for whole, plain in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False)), strict=True):
        assert whole.dtype == plain.dtype
        np.testing.assert_array_equal(whole, plain)


@pytest.mark.parametrize(
    ("terms", "dtype"),
    [(1, "int8"), (127, "int8"), (128, "int16"), (32767, "int16"), (32768, "int32"), (2**31 - 1, "int32")],
)
def test_whole_dtype_holds_the_largest_sum(terms, dtype):
    assert products.integer_dtype(terms) == dtype
    assert -terms >= jnp.iinfo(dtype).min


@pytest.mark.parametrize("terms", [127, 128, 300])
def test_the_largest_sums_are_exact(terms):
    config = products.ProductConfig(jnp.float32, integer_products=True)
    signs = np.where(np.arange(terms) % 2, 1.0, -1.0).astype(np.float32)
    x = jnp.array([signs, -signs])
    y = products.binary_product(x, jnp.zeros(terms), jnp.array(signs)[:, None], CONV, config)
    np.testing.assert_array_equal(y, [[terms], [-terms]])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("by_product", "plain"),
    [
        (lambda x: grid_products.tile_channels(x, 3), lambda x: grid.tile_channels(x, 3)),
        (
            lambda x: grid_products.mean_channels(x, 4),
            lambda x: grid.average_channels(x, 4),
        ),
        (lambda x: grid_products.repeat_tokens(x, 2), lambda x: grid.upsample(x, 2)),
        (lambda x: grid_products.mean_tokens(x, 2), lambda x: grid.average_pool(x, 2)),
    ],
    ids=["tile_channels", "mean_channels", "repeat_tokens", "mean_tokens"],
)
def test_repeated_and_averaged_by_a_product(by_product, plain):
    x = jnp.array(numbers(2, 36, 12))
    gradient = numbers(*plain(x).shape, seed=1)
    actual, expected = (forward_and_gradients(f, gradient, x) for f in (by_product, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-15), actual, expected)
    # Exact in bfloat16, and returned as the accumulator.
    y = by_product(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, plain(x.astype(jnp.bfloat16).astype(jnp.float32)))
    for leaf in jax.tree.leaves(jax.vjp(by_product, x.astype(jnp.bfloat16))[1](y)):
        assert leaf.dtype == jnp.bfloat16


# --- batch norms in one pass -------------------------------------------------------------------


def normalize(x, weights, one_pass, mean, var=1.0, group=0):
    """Returns the output, the running statistics and the gradients of a batch norm."""
    channels, dtype = x.shape[-1], x.dtype
    module = BatchNorm(one_pass=one_pass, group=group)
    params = {"scale": 1 + jnp.arange(channels, dtype=dtype), "bias": jnp.ones(channels, dtype)}
    stats = {"mean": jnp.full(channels, mean, dtype), "var": jnp.full(channels, var, dtype)}

    def loss(params, x):
        variables = {"params": params, "batch_stats": stats}
        y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * weights), (y, updates)

    (_, rest), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return rest, gradients


def close(actual, expected, tolerance):
    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))

    jax.tree.map(check, actual, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_one_pass_equals_two_in_float64(mean, group):
    x, weights = jnp.array(3 + 2 * numbers(6, 9, 5)), numbers(6, 9, 5, seed=1)
    one, two = (normalize(x, weights, one_pass, mean, group=group) for one_pass in (True, False))
    close(one, two, 1e-12)


@pytest.mark.slow
def test_one_pass_is_as_good_in_float32_where_the_mean_is_a_thousand_deviations():
    """The running mean is some ten deviations off, as after the tenth step of a mean that drifts."""
    x, weights = 1e3 + numbers(64, 50, 8), numbers(64, 50, 8, seed=1)
    single = jnp.array(x, jnp.float32), jnp.array(weights, jnp.float32)
    with jax.enable_x64(True):
        exact = normalize(jnp.array(single[0], jnp.float64), weights, False, 1e3 - 10)
    one, two = (normalize(*single, one_pass, 1e3 - 10) for one_pass in (True, False))
    close(one, exact, 1e-4)  # the mean itself is only known to 6e-5 of a deviation
    close(two, exact, 1e-4)


@pytest.mark.slow
def test_one_pass_stays_finite_with_a_running_mean_of_a_new_model():
    """In the first steps of a mean of a thousand deviations: some per cent of error, and no NaN."""
    x, weights = jnp.array(1e3 + numbers(64, 50, 8), jnp.float32), numbers(64, 50, 8, seed=1)
    one, two = (normalize(x, weights, one_pass, 0.0) for one_pass in (True, False))
    close(one[0], two[0], 0.1)
    constant = normalize(jnp.full((4, 5, 3), 1e3), 1.0, True, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(constant))


def test_one_pass_needs_one_all_reduce_forward():
    mesh = make_mesh()

    def reductions(one_pass):
        shapes = [jax.ShapeDtypeStruct((16, 4, 3), jnp.float32, sharding=batch_sharded(mesh))] + [
            jax.ShapeDtypeStruct((3,), jnp.float32, sharding=replicated(mesh))
        ] * 3
        norm = jax.jit(
            lambda x, scale, bias, mean: closed_form.batch_norm(
                x, scale, bias, 1e-5, mean if one_pass else None
            )
        )
        text = norm.lower(*shapes).compile().as_text()
        return hlo.by_purpose(hlo.collectives_of(text))["batch_norm_forward"].count

    assert (reductions(True), reductions(False)) == (1, 2)
