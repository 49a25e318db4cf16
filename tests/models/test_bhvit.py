"""BHViT's parts against its PyTorch code, and the model around them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bvit_jax import models
from bvit_jax.binary import convolutions, gsb, products
from bvit_jax.binary.weights import DENSE, RECU
from bvit_jax.errors import UserError
from bvit_jax.layers import grid as grids
from bvit_jax.layers.activation import RPReLU
from bvit_jax.layers.first_values import first_batch
from bvit_jax.losses import classification
from bvit_jax.losses.regularization import distance_to_one
from bvit_jax.models.bhvit import BHViTConfig, LevelQuantizer, TokenMixer, WindowAttention, WindowTokens
from bvit_jax.models.embedding import Downsample
from bvit_jax.models.windows import Window
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated
from bvit_jax.weights.naming import bhvit_naming, from_torch_layout, path_name, to_torch_layout
from tests.tiny_models import images_for, smallest, spread_variables

pytestmark = pytest.mark.usefixtures("x64")

CONFIG = BHViTConfig(dtype=jnp.float64)
PRODUCT = products.ProductConfig(jnp.float64)
NAMING = bhvit_naming(1)


@pytest.fixture(scope="session")
def units(golden_file):
    """Returns the arrays of a group, grids with channels last."""
    with np.load(golden_file("bhvit_units")) as archive:
        arrays = dict(archive)

    def group(name):
        found = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{name}/")}
        images = name.startswith(("conv", "shift", "mixer", "down", "tokens", "split", "attention"))
        last = {k for k in ("x", "y", "gy", "g_x") if images and k in found and found[k].ndim == 4}
        return {k: np.moveaxis(v, 1, -1) if k in last else v for k, v in found.items()}

    return group


def assert_close(actual, expected, scale=0.0):
    expected = np.asarray(expected)
    atol = 1e-10 * max(np.max(np.abs(expected), initial=0), scale)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol or 1e-10)


def check_function(function, unit, *arguments):
    """Compares a function's value, and its gradients of the arguments with the arrays that are expected."""
    values, gradients = zip(*arguments, strict=True)
    y, back = jax.vjp(function, *map(jnp.asarray, values))
    assert_close(y, unit["y"])
    for found, expected in zip(back(jnp.asarray(unit["gy"])), gradients, strict=True):
        if expected is not None:
            assert_close(found, expected)


def check_module(module, unit, inside, outside, x, y, gy, g_x, **options):
    """Compares a module in training: output, gradients, statistics.

    Args:
      module: to be applied to ``x``.
      unit: the group of arrays.
      inside: the path of the module in a model.
      outside: what the names of its arrays begin with in a state dict.
      x, y, gy, g_x: input, output and their gradients, as the module has them.
      options: of the call.
    """
    abstract = jax.eval_shape(functools.partial(module.init, **options), jax.random.key(0), x)

    def own(path):
        path = f"{inside}/{path_name(path)}"
        return path, NAMING.name(path).removeprefix(outside)

    def value(path, leaf):
        path, name = own(path)
        given = unit.get(f"p/{name}")
        if given is None:  # statistics and flags: a mean of 0, else 1
            return jnp.full(leaf.shape, 0.0 if name.endswith("mean") else 1.0)
        return jnp.asarray(from_torch_layout(path, given)).reshape(leaf.shape)

    variables = {k: jax.tree_util.tree_map_with_path(value, v) for k, v in abstract.items()}

    def run(params, x):
        return module.apply({**variables, "params": params}, x, mutable=["batch_stats"], **options)

    found, back, updated = jax.vjp(run, variables["params"], jnp.asarray(x), has_aux=True)
    assert_close(found, y)
    gradients, to_x = back(jnp.asarray(gy))
    largest = max(np.max(np.abs(v)) for k, v in unit.items() if k.startswith(("g/", "g_x")))
    assert_close(to_x, g_x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        path, name = own(path)
        assert_close(to_torch_layout(path, np.asarray(leaf)), unit[f"g/{name}"], 1e-3 * largest)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updated.get("batch_stats", {})):
        _, name = own(path)
        if f"after/{name}" in unit:
            assert_close(leaf, unit[f"after/{name}"], 1.0)


def tokens(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


# --- binary --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_levels(units):
    unit = units("attq")
    quantize = LevelQuantizer()
    statistics = {"init_state": jnp.ones((1,))}

    def levels(x, alpha, zero_point):
        params = {"alpha": alpha, "zero_point": zero_point}
        return quantize.apply({"params": params, "batch_stats": statistics}, x).dequantize()

    arguments = ((unit[f"p/{name}"], unit[f"g/{name}"]) for name in ("alpha", "zero_point"))
    check_function(levels, unit, (unit["x"], unit["g_x"]), *arguments)


def test_levels_of_the_first_batch(units):
    unit = units("attq_init")
    x, x2 = jnp.asarray(unit["x"]), jnp.asarray(unit["x2"])
    quantize = LevelQuantizer()
    params = {"alpha": jnp.ones(2), "zero_point": jnp.asarray(unit["zero_point0"])}
    variables = {"params": params, "batch_stats": {"init_state": jnp.zeros((1,))}}
    assert_close(quantize.apply(variables, x).dequantize(), unit["eval_y"])
    first, after = quantize.apply(variables, x, first_batch=True, mutable=["params", "batch_stats"])
    assert_close(first.dequantize(), unit["y"])
    for name in ("alpha", "zero_point"):
        assert_close(after["params"][name], unit[f"p/{name}"])
    assert_close(after["batch_stats"]["init_state"], unit["init_state"])
    again, same = quantize.apply(after, x2, first_batch=True, mutable=["params", "batch_stats"])
    assert_close(again.dequantize(), unit["y2"])
    jax.tree.map(np.testing.assert_array_equal, same, after)


@pytest.mark.slow
@pytest.mark.parametrize("dilation", [1, 3, 5])
def test_convolutions(units, dilation):
    unit = units(f"conv_dil{dilation}")
    geometry = convolutions.Geometry(dilation, groups=4)
    move = jnp.zeros(8)

    def convolve(x, kernel, bias):
        return convolutions.binary_convolution(x, move, kernel, DENSE, geometry, PRODUCT) + bias

    kernel, gradient = (unit[f"{kind}/weight"].transpose(2, 3, 1, 0) for kind in "pg")
    check_function(
        convolve, unit, (unit["x"], unit["g_x"]), (kernel, gradient), (unit["p/bias"], unit["g/bias"])
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), [("linear", DENSE), ("linear_recu", RECU)])
def test_linear_layers(units, name, rule):
    unit = units(name)
    move = jnp.zeros(16)

    def dense(x, kernel):
        return products.binary_product(x, move, kernel, rule, PRODUCT)

    check_function(dense, unit, (unit["x"], unit["g_x"]), (unit["p/weight"].T, unit["g/weight"].T))


@pytest.mark.slow
def test_patches(units):
    unit = units("conv_patch")
    move = jnp.zeros(32)

    def convolve(x, kernel):
        y = products.binary_product(grids.extract_patches(x, 2), move, kernel, DENSE, PRODUCT)
        return y.reshape(unit["y"].shape)

    kernel, gradient = (unit[f"{kind}/weight"].transpose(2, 3, 1, 0) for kind in "pg")
    check_function(convolve, unit, (unit["x"], unit["g_x"]), (kernel, gradient))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsb", "gsb_large", "gsb_floor"])
def test_masks_around_the_largest(units, name):
    unit = units(name)
    scales = zip(unit["scales"], (unit[f"g_s{i}"] for i in (1, 2, 3)), strict=True)
    check_function(gsb.gsb_probabilities, unit, (unit["x"], unit["g_x"]), *scales)


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["h3", "w3", "ch3", "h5", "w5", "ch5"])
def test_shifts(units, branch):
    unit, size = units(f"shift_{branch}"), int(branch[-1])
    if branch.startswith("ch"):
        shift = functools.partial(grids.channel_shift, distance=size // 2)
    else:
        shift = functools.partial(grids.mean_shift, size=size, axis=1 if branch[0] == "h" else 2)
    check_function(shift, unit, (unit["x"], unit["g_x"]))


def test_the_slope_at_the_kink_is_that_of_the_negative_side(units):
    unit = units("rprelu_kink")
    check_module(
        RPReLU(), unit, "block0/mixer/rprelu1", "vit.encoder.layerA.0.GC.act1.", unit["x"], unit["y"],
        unit["gy"], unit["g_x"],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("side", [14, 7])
def test_tokens_of_windows(units, side):
    unit = units(f"tokens{side}")
    check_module(
        WindowTokens(Window(side, 7, 0), CONFIG), unit, "block1/attention/tokens",
        "vit.encoder.layerB.0.attention.attention.token_FA.", tokens(unit["x"]), unit["y"], unit["gy"],
        tokens(unit["g_x"]),
    )  # fmt: skip


@pytest.mark.slow
def test_mixer(units):
    unit = units("mixer")
    check_module(
        TokenMixer(CONFIG), unit, "block0/mixer", "vit.encoder.layerA.0.GC.", unit["x"], tokens(unit["y"]),
        tokens(unit["gy"]), unit["g_x"], train=True,
    )  # fmt: skip


class Attention(WindowAttention):
    """Attention that returns its tokens alone."""

    def __call__(self, x, *, train):
        return super().__call__(x, train=train, first_batch=False)[0]


@pytest.mark.slow
def test_attention(units):
    unit = units("attention")
    check_module(
        Attention(2, 7, CONFIG), unit, "block1/attention", "vit.encoder.layerB.0.attention.attention.",
        *(tokens(unit[name]) for name in ("x", "y", "gy", "g_x")), train=True,
    )  # fmt: skip


class Join(WindowAttention):
    """What attention does with its tokens at the end, alone."""

    @nn.compact
    def __call__(self, x):
        return self._join(x, Window(7 * math.isqrt(x.shape[1] - 49), 7, 0))


@pytest.mark.slow
@pytest.mark.parametrize("side", [14, 7])
def test_tokens_return_to_their_places(units, side):
    unit = units(f"split{side}")
    join = Join(2, 7, CONFIG)

    def joined(x, share):
        return join.apply({"params": {"share": share}}, x)

    share, gradient = (np.moveaxis(unit[name], 1, -1) for name in ("parm", "g_parm"))
    unit |= {name: tokens(unit[name]) for name in ("y", "gy")}
    check_function(joined, unit, (unit["x"], unit["g_x"]), (share, gradient))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "real"), [("down_binary", False), ("down_fp", True)])
def test_downsampling(units, name, real):
    unit = units(name)
    check_module(
        Downsample(8, real, CONFIG, DENSE), unit, "downsample1", "vit.encoder.patch_embed1.",
        *(tokens(unit[name]) for name in ("x", "y", "gy", "g_x")), train=True,
    )  # fmt: skip


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_are_drawn_to_one(units):
    unit = units("regularization")
    names = [
        name for name in unit if name.startswith("p/") and name.endswith(".weight") and "proj" not in name
    ]
    kernels = [jnp.asarray(unit[name]) for name in names]
    logits, teacher = jnp.asarray(unit["x"] + unit["p/bias"]), jnp.asarray(unit["teacher_logits"])
    distill = jnp.mean(classification.soft_cross_entropy(logits, teacher))
    value, gradients = jax.value_and_grad(lambda kernels: 0.1 * distance_to_one(kernels))(kernels)
    assert_close(0.9 * distill + value, unit["loss"])
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, unit[name.replace("p/", "g/", 1)])


# --- the model -----------------------------------------------------------------------------------

SIZES = {
    "image_size": 64,
    "window_size": 2,
    "patch_size": 4,
    "width": 8,
    "depth": (1, 1, 1, 1),
    "num_classes": 5,
}
SIZES |= {"num_heads": (2, 2), "mlp_dim": (16, 16, 32, 64)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_size": 96},
            "config.model.image_size is 96: the last stage's grid must",
        ),
        ({"depth": (1, 1, 1)}, "config.model.mlp_dim"),
        ({"num_heads": (2,)}, "config.model.num_heads is (2,): expected those of stages 3 and 4"),
        ({"num_heads": (3, 2)}, "config.model.width is 32: expected a multiple of its 3 heads"),
        ({"width": 6}, "config.model.width is 6: expected a multiple of 4"),
        ({"mlp_dim": (16, 16, 33, 64)}, "config.model.mlp_dim[2] is 33"),
        ({"shift_branches": (7,)}, "config.model.shift_branches is (7,)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, message):
    with pytest.raises(UserError) as error:
        models.create_model({"name": "bhvit", **SIZES, **settings})
    assert message in str(error.value)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """The first batch, and gradients and statistics of the step after it."""
    model, config = smallest("bhvit", jnp.float64, recu=True, shift_branches=())
    variables = spread_variables(model, config, np.float64)
    variables["batch_stats"] = jax.tree_util.tree_map_with_path(unless_flag, variables["batch_stats"])
    images = images_for(config, 8, np.float64)

    def run(variables, images):
        _, started = first_batch(model, variables, images)

        def loss(params):
            output, updates = model.apply(
                {**started, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.square(output.logits)), updates

        return started, jax.value_and_grad(loss, has_aux=True)(started["params"])

    found = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        shardings = (replicated(mesh), batch_sharded(mesh))
        placed = jax.device_put((variables, images), shardings)
        found.append(jax.device_get(jax.jit(run, in_shardings=shardings)(*placed)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), *found)


def unless_flag(path, leaf):
    """Returns the leaf, but 0 for the flag of the first batch."""
    return jnp.zeros_like(leaf) if path[-1].key == "init_state" else leaf
