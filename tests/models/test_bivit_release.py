"""Bi-ViT as released: the first batch, exact zeros, the trees of its models, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.layers.dense import UncentredDense
from bvit_jax.layers.first_values import first_batch
from bvit_jax.layers.kernels import noted_kernels
from bvit_jax.models.bivit.release import ZeroPointQuantizer
from bvit_jax.weights.state_dicts import abstract_variables
from tests.tiny_models import tiny_config

NAMES = ("bivit_release_deit", "bivit_release_swin")
BACKBONES = {"bivit_release_deit": "deit_heads", "bivit_release_swin": "swin"}


@functools.cache
def tiny(name):
    """Returns a model, its initial variables and a batch."""
    config = tiny_config(name, num_classes=4)
    model = models.create_model(config)
    images = jax.random.normal(jax.random.key(1), (2, config.image_size, config.image_size, 3))
    return model, jax.jit(model.init)(jax.random.key(0), images), images


@functools.cache
def started(name):
    model, variables, images = tiny(name)
    return jax.jit(functools.partial(first_batch, model))(variables, images)


def leaves_called(tree, name):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if path[-1].key == name]


# --- the first batch ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_initial_values_are_not_from_a_batch(name):
    _, variables, _ = tiny(name)
    for leaf, value in (("alpha", 1), ("zero_point", 0)):
        assert all((array == value).all() for array in leaves_called(variables["params"], leaf))
    assert all(array == 0 for array in jax.tree.leaves(variables["batch_stats"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_first_batch_sets_every_quantiser(name):
    _, before, _ = tiny(name)
    _, after = started(name)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert all(flag == 1 for flag in leaves_called(after["batch_stats"], "init_state"))
    for alpha in leaves_called(after["params"], "alpha"):
        assert (alpha == alpha[0]).all()
        assert 0 < alpha[0] < 10
        assert alpha[0] != 1
    kernels = zip(leaves_called(before["params"], "kernel"), leaves_called(after["params"], "kernel"))
    assert all(np.array_equal(a, b) for a, b in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step_after_it_sees_what_it_saw(name):
    model, _, images = tiny(name)
    output, variables = started(name)
    again, updates = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    for a, b in zip(again.head_logits, output.head_logits, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(jax.tree.map(np.array_equal, updates["batch_stats"], variables["batch_stats"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_comes_once(name):
    model, _, images = tiny(name)
    _, variables = started(name)
    _, again = jax.jit(functools.partial(first_batch, model))(variables, 3 * images + 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, variables))


@pytest.mark.slow
def test_it_comes_in_a_scan_over_blocks_too():
    _, variables, images = tiny("bivit_release_deit")
    execution = models.Execution(scan_blocks=True, remat="block")
    model = models.create_model(tiny_config("bivit_release_deit", num_classes=4), execution=execution)
    _, expected = started("bivit_release_deit")
    _, actual = first_batch(model, variables, images)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_quantiser_of_values_with_and_without_sign():
    module = ZeroPointQuantizer(axis=1)
    x = jnp.array([[1.0, 2.0, 3.0]])
    variables = module.init(jax.random.key(0), x)
    for batch, scale, zero_point, signed in ((x, 4.0, 0.5, 0), (-x, 4.0, 0.1, 1)):
        _, updated = module.apply(variables, batch, first_batch=True, mutable=["params", "batch_stats"])
        np.testing.assert_allclose(updated["params"]["alpha"], [scale] * 3)
        np.testing.assert_allclose(updated["params"]["zero_point"], [zero_point] * 3, rtol=1e-6)
        assert updated["batch_stats"]["signed"] == signed


# --- exact zeros -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_that_cancels_is_zero_in_any_dtype(dtype):
    """Half of the signs against the other half, at a scale that no dtype holds exactly."""
    kernel = 0.1 * jnp.repeat(jnp.array([1.0, -1.0]), 192)[:, None]
    x = jnp.abs(jax.random.normal(jax.random.key(0), (3, 384))) + 0.01
    y = UncentredDense(1, dtype=dtype).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_array_equal(y, 0)
    y = UncentredDense(1, dtype=dtype).apply({"params": {"kernel": kernel}}, jnp.zeros_like(x))
    np.testing.assert_array_equal(y, 0)  # sign(0) = 0


# --- the trees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_are_those_of_the_real_backbone(name):
    """So that a student can start from the weights of its teacher."""
    binary = abstract_variables(models.create_model(tiny_config(name)), 32)["params"]
    real = abstract_variables(models.create_model(tiny_config(BACKBONES[name])), 32)["params"]
    binary, real = (
        {jax.tree_util.keystr(p): a.shape for p, a in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (binary, real)
    )
    shared = binary.keys() & real.keys()
    assert {key: binary[key] for key in shared} == {key: real[key] for key in shared}
    assert all("block" in key and key.endswith("['bias']") for key in real.keys() - shared)
    added = ("['alpha']", "['zero_point']")
    assert all(key.endswith(added) or "y_norm']" in key for key in binary.keys() - shared)


@pytest.mark.parametrize(("name", "layers"), [("bivit_release_deit", 2 * 6), ("bivit_release_swin", 4 * 6)])
def test_every_linear_layer_of_a_block_is_binary(name, layers):
    model, variables, images = tiny(name)
    with noted_kernels() as kernels:
        jax.eval_shape(model.apply, variables, images)
    assert len(kernels) == layers
    assert all("block" in path[0] for path in kernels)


def test_attentions_are_quantised():
    model, _, images = tiny("bivit_release_deit")
    _, variables = started("bivit_release_deit")
    output = model.apply(variables, images, capture=True)
    for i, probs in enumerate(output.attentions):
        # At first every probability becomes the scale: see the module.
        np.testing.assert_array_equal(probs, variables["params"][f"block{i}"]["prob_act"]["alpha"][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"name": "bivit_release_deit", "width": 192, "num_heads": 3, "mlp_dim": 768}, 5_893_424),
        ({"name": "bivit_release_deit"}, 22_398_608),
        ({"name": "bivit_release_swin"}, 28_256_434),
    ],
)
def test_sizes(settings, count):
    """Those of the backbones without the biases of the blocks, with what the quantisers add."""
    shapes = abstract_variables(models.create_model(models.model_config(**settings)), 224)
    assert models.num_params(shapes["params"]) == count


@pytest.mark.slow
def test_dropout_of_the_attention():
    model = models.create_model(tiny_config("bivit_release_deit", num_classes=4, attention_dropout=0.5))
    _, variables = started("bivit_release_deit")
    _, _, images = tiny("bivit_release_deit")
    apply = functools.partial(model.apply, variables, images)
    one, two = (apply(train=True, rngs={"dropout": jax.random.key(i)}).logits for i in range(2))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(
        apply().logits, tiny("bivit_release_deit")[0].apply(variables, images).logits
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bivit_release_deit", {"distillation_token": False}, "it reads the distillation token"),
        ("bivit_release_deit", {"width": 100}, "width is 100: expected a multiple of its 6 heads"),
        ("bivit_release_swin", {"image_size": 100}, "stage 0 has a 25×25 token grid"),
    ],
)
def test_sizes_that_do_not_fit(name, settings, message):
    with pytest.raises(UserError, match=message):
        models.create_model(models.model_config(name, **settings))
