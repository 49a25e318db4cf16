"""Layers against PyTorch and against slow formulations in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bvit_jax.layers import activation, dense, grid, norm
from bvit_jax.layers import init as initializers

pytestmark = pytest.mark.usefixtures("x64")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# --- RPReLU and LayerScale ---------------------------------------------------------------------


def test_rprelu_equals_torch(units):
    names = {"move1": "move1", "slope": "prelu.weight", "move2": "move2"}
    params = {ours: jnp.array(units[f"rprelu/p/{theirs}"]) for ours, theirs in names.items()}

    def apply(params, x):
        return activation.RPReLU().apply({"params": params}, x)

    y, transpose = jax.vjp(apply, params, jnp.array(units["rprelu/x"]))
    to_params, to_x = transpose(jnp.array(units["rprelu/gy"]))
    close(y, units["rprelu/y"])
    close(to_x, units["rprelu/gx"])
    for ours, theirs in names.items():
        close(to_params[ours], units[f"rprelu/g/{theirs}"])


def test_rprelu_at_zero_takes_the_slope():
    params = {"move1": jnp.array([1.0]), "slope": jnp.array([0.25]), "move2": jnp.array([3.0])}
    apply = lambda x: activation.RPReLU().apply({"params": params}, x)[0]  # noqa: E731
    y, gradient = jax.value_and_grad(apply)(jnp.array([1.0]))
    assert (y, gradient[0]) == (3.0, 0.25)  # PyTorch's prelu does the same


@pytest.mark.slow
def test_initial_values():
    x = jnp.zeros((2, 3, 4))
    rprelu = activation.RPReLU().init(jax.random.key(0), x)["params"]
    scale = activation.LayerScale(0.1).init(jax.random.key(0), x)["params"]
    kernels = dense.BinaryDense(5).init(jax.random.key(0), x)["params"]
    expected = {"move1": 0, "slope": 0.25, "move2": 0}
    for name, value in expected.items():
        np.testing.assert_array_equal(rprelu[name], np.full(4, value))
    close(scale["alpha"], np.full(4, 0.1), 1e-7)
    np.testing.assert_array_equal(scale["move"], np.zeros(4))
    np.testing.assert_array_equal(kernels["move"], np.zeros(4))
    assert kernels["kernel"].shape == (4, 5)


def test_layer_scale():
    params = {"alpha": jnp.array([2.0, 0.5]), "move": jnp.array([1.0, -1.0])}
    y = activation.LayerScale(0.1).apply({"params": params}, jnp.array([[3.0, 4.0]]))
    np.testing.assert_array_equal(y, [[7, 1]])


# --- norms -------------------------------------------------------------------------------------


def test_batch_norm_equals_torch(units):
    module = norm.BatchNorm()
    variables = module.init(jax.random.key(0), jnp.array(units["bn/x"][0]), train=True)
    statistics = jax.tree.map(lambda a: a.astype(jnp.float64), variables["batch_stats"])
    np.testing.assert_array_equal(statistics["mean"], np.zeros(6))  # init takes no part
    np.testing.assert_array_equal(statistics["var"], np.ones(6))
    for x, expected in zip(units["bn/x"], units["bn/y"]):
        y, updates = module.apply(
            {"params": variables["params"], "batch_stats": statistics},
            jnp.array(x),
            train=True,
            mutable=["batch_stats"],
        )
        statistics = updates["batch_stats"]
        close(y, expected)
    close(statistics["mean"], units["bn/mean"])
    close(statistics["var"], units["bn/var"])
    trained = {"params": variables["params"], "batch_stats": statistics}
    close(module.apply(trained, jnp.array(units["bn/x"][0]), train=False), units["bn/y_eval"])


def test_running_variance_is_unbiased():
    x = jnp.array([[0.0], [2.0]])
    module = norm.BatchNorm()
    variables = module.init(jax.random.key(0), x, train=True)
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    close(updates["batch_stats"]["mean"], [0.1])
    close(updates["batch_stats"]["var"], [0.9 + 0.1 * 2])  # the variance with n - 1 is 2
    close(y, np.array([[-1], [1]]) / math.sqrt(1 + 1e-5))  # with n, 1


def test_batch_norm_of_one_value_is_finite():
    x = jnp.array([[3.0]])
    module = norm.BatchNorm()
    variables = module.init(jax.random.key(0), x, train=True)
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert np.isfinite(y).all()
    assert np.isfinite(updates["batch_stats"]["var"]).all()


def test_batch_norm_gradient_is_the_derivative():
    x, scale, bias = numbers(3, 4, 2), numbers(2, seed=1), numbers(2, seed=2)
    module = norm.BatchNorm()
    statistics = {"mean": jnp.zeros(2), "var": jnp.ones(2)}

    def apply(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
        return module.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    check_grads(jax.jit(apply), (x, scale, bias), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_norms_survive_a_large_mean(kind):
    # E[x²] - E[x]² would leave nothing in float32.
    x = 1000 + 1e-2 * numbers(64, 64)
    x = x.astype(np.float32)
    module = norm.make_norm(kind, 1e-5, "norm")
    axis = 0 if kind == "batch_norm" else 1
    variables = module.init(jax.random.key(0), jnp.array(x), train=True)
    variables = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    y = module.apply(variables, jnp.array(x), train=True, mutable=["batch_stats"])[0]
    exact = x.astype(np.float64)
    exact = exact - exact.mean(axis, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(axis, keepdims=True) + 1e-5)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, atol=0.02)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_layer_norm_in_float64(epsilon):
    x = 5 + 1e-3 * numbers(2, 3, 8)
    module = norm.LayerNorm(epsilon)
    variables = {"params": {"scale": numbers(8, seed=1), "bias": numbers(8, seed=2)}}
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
    expected = expected * variables["params"]["scale"] + variables["params"]["bias"]
    close(module.apply(variables, jnp.array(x), train=True), expected, 1e-10)


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_norms_compute_bfloat16_in_float32(kind):
    x = jnp.array(numbers(4, 5, 6), jnp.bfloat16)
    module = norm.make_norm(kind, 1e-5, "norm")
    variables = module.init(jax.random.key(0), x, train=True)
    variables = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    y = module.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    wide = module.apply(variables, x.astype(jnp.float32), train=True, mutable=["batch_stats"])[0]
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, wide)


# --- grids -------------------------------------------------------------------------------------

SIDE, CHANNELS = 6, 4


def tokens():
    return numbers(2, SIDE * SIDE, CHANNELS)


def check_linear(function, x, expected):
    """Compares a linear function with the slow result, and its gradient with finite differences."""
    close(function(jnp.array(x)), expected)
    check_grads(jax.jit(function), (x,), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_average_pool(size):
    x, side = tokens(), SIDE // size
    cells = x.reshape(2, SIDE, SIDE, CHANNELS)
    expected = np.zeros((2, side, side, CHANNELS))
    for i in range(SIDE):
        for j in range(SIDE):
            expected[:, i // size, j // size] += cells[:, i, j] / size**2
    expected = expected.reshape(2, -1, CHANNELS)
    check_linear(lambda x: grid.average_pool(x, size), x, expected)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsample(factor):
    x = tokens()
    cells = x.reshape(2, SIDE, SIDE, CHANNELS)
    wide = SIDE * factor
    expected = np.zeros((2, wide, wide, CHANNELS))
    for i in range(wide):
        for j in range(wide):
            expected[:, i, j] = cells[:, i // factor, j // factor]
    expected = expected.reshape(2, -1, CHANNELS)
    check_linear(lambda x: grid.upsample(x, factor), x, expected)
    close(grid.average_pool(grid.upsample(jnp.array(x), factor), factor), x)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5, 15])
def test_average_line(size, axis):
    x = numbers(2, 4, 7, 3)
    expected = np.zeros_like(x)
    length = x.shape[axis]
    for i in range(length):
        for neighbour in range(i - size // 2, i + size // 2 + 1):
            if 0 <= neighbour < length:  # the others count as zeros
                target, source = [slice(None)] * 4, [slice(None)] * 4
                target[axis], source[axis] = i, neighbour
                expected[tuple(target)] += x[tuple(source)] / size
    check_linear(lambda x: grid.average_line(x, size, axis), x, expected)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5, 15])
def test_average_row_is_average_line_of_the_grid(size, axis):
    x, gradient = jnp.array(numbers(2, 16, 3)), jnp.array(numbers(2, 16, 3, seed=1))

    def by_grid(x):
        return grid.to_tokens(grid.average_line(grid.to_grid(x), size, axis))

    rows, to_rows = jax.vjp(lambda x: grid.average_row(x, size, axis), x)
    lines, to_lines = jax.vjp(by_grid, x)
    np.testing.assert_array_equal(rows, lines)
    np.testing.assert_array_equal(to_rows(gradient)[0], to_lines(gradient)[0])


@pytest.mark.slow
def test_average_line_equals_torch():
    torch = pytest.importorskip("torch")
    x = numbers(2, 5, 6, 3)
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    for size in (3, 5):
        for axis, kernel in ((1, (size, 1)), (2, (1, size))):
            padding = tuple(k // 2 for k in kernel)
            theirs = torch.nn.functional.avg_pool2d(images, kernel, 1, padding)
            close(grid.average_line(jnp.array(x), size, axis), theirs.movedim(1, -1))


@pytest.mark.parametrize("average", [grid.average_channels, grid.average_channel_slices])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_average_channels(size, average):
    x = numbers(2, 3, 8)
    expected = np.zeros((2, 3, 8 // size))
    for channel in range(8):
        expected[..., channel // size] += x[..., channel] / size
    check_linear(lambda x: average(x, size), x, expected)


def test_extract_patches():
    x = numbers(2, 4, 6, 3)
    patches = grid.extract_patches(jnp.array(x), 2)
    assert patches.shape == (2, 6, 12)
    for i in range(2):
        for j in range(3):
            expected = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, 12)
            np.testing.assert_array_equal(patches[:, 3 * i + j], expected)


def test_to_grid_and_back():
    x = jnp.array(tokens())
    assert grid.to_grid(x).shape == (2, SIDE, SIDE, CHANNELS)
    np.testing.assert_array_equal(grid.to_tokens(grid.to_grid(x)), x)


# --- drop path ---------------------------------------------------------------------------------


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    rate, x = 0.25, jnp.array(1 + np.abs(numbers(4000, 3, 2)))
    drop = activation.DropPath(rate)
    y = drop.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(y / x)
    for sample in (kept.min(axis=(1, 2)), kept.max(axis=(1, 2))):
        close(sample, np.where(kept[:, 0, 0] > 0, 1 / (1 - rate), 0))
    assert abs(kept[:, 0, 0].mean() - 1) < 4 * math.sqrt(rate / (1 - rate) / 4000)
    np.testing.assert_array_equal(drop.apply({}, x, train=False), x)


def test_drop_path_depends_on_the_key():
    x, drop = jnp.ones((64, 2, 2)), activation.DropPath(0.5)
    a, b, c = (
        np.asarray(drop.apply({}, x, train=True, rngs={"dropout": jax.random.key(seed)}))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_drop_path_without_a_rate_needs_no_key():
    x = jnp.ones((2, 3, 4))
    np.testing.assert_array_equal(activation.DropPath(0.0).apply({}, x, train=True), x)


def test_drop_path_rates_rise_linearly():
    close(activation.drop_path_rates(0.3, 4), [0, 0.1, 0.2, 0.3])
    assert activation.drop_path_rates(0.3, 1) == (0,)
    assert activation.drop_path_rates(0.0, 3) == (0, 0, 0)


# --- initialisers ------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in", [27, 192])
def test_torch_uniform(fan_in):
    bound = 1 / math.sqrt(fan_in)
    for init in (
        initializers.torch_uniform(fan_in),
        initializers.kernel_init("torch", fan_in),
        initializers.bias_init("torch", fan_in),
    ):
        w = np.asarray(init(jax.random.key(0), (400, 500), jnp.float32))
        assert w.dtype == np.float32
        assert 0.999 * bound < np.abs(w).max() <= bound * (1 + 1e-6)
        assert abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.01
        assert abs(w.mean()) < 0.01 * bound


def test_torch_uniform_has_the_spread_of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for module, fan_in in ((torch.nn.Linear(48, 3000), 48), (torch.nn.Conv2d(3, 3000, 4), 48)):
        init = initializers.torch_uniform(fan_in)
        for theirs in (module.weight, module.bias):
            ours = np.asarray(init(jax.random.key(1), tuple(theirs.shape), jnp.float32))
            theirs = theirs.detach().numpy()
            close(ours.std(), theirs.std(), 0.02)
            close(np.abs(ours).max(), np.abs(theirs).max(), 0.01)


def test_trunc_normal():
    w = np.asarray(initializers.kernel_init("trunc_normal", 48)(jax.random.key(0), (400, 500)))
    assert abs(w.std() / 0.02 - 1) < 0.02
    assert not initializers.bias_init("trunc_normal", 48)(jax.random.key(0), (5,)).any()


def test_positions_have_a_standard_deviation_of_one_fiftieth():
    w = np.asarray(initializers.normal_init(jax.random.key(0), (400, 500)))
    assert abs(w.std() / 0.02 - 1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("weight_init", ["torch", "trunc_normal"])
def test_layers_initialise_with_their_own_fan_in(weight_init):
    image, x = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 2, 48))
    kernels = {
        "dense": dense.BinaryDense(64, weight_init=weight_init).init(jax.random.key(0), x),
        "conv": dense.BinaryPatchConv(64, 4, weight_init=weight_init).init(jax.random.key(0), image),
        "real dense": dense.real_dense(64, 48, weight_init, jnp.float32, "dense").init(jax.random.key(0), x),
        "real conv": dense.real_patch_conv(64, 4, 48, weight_init, jnp.float32, "conv", use_bias=True).init(
            jax.random.key(0), image
        ),
    }
    for name, variables in kernels.items():
        params = variables["params"]
        expected = 1 / math.sqrt(48 * 3) if weight_init == "torch" else 0.02
        assert abs(params["kernel"].std() / expected - 1) < 0.1, name
        if name.startswith("real"):
            assert params["bias"].any() == (weight_init == "torch"), name
