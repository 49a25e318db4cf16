"""Bi-ViT: its quantisers against slow formulations, the first batch, bits, the vanished gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from bvit_jax import models
from bvit_jax.binary.estimators import PARABOLA
from bvit_jax.errors import UserError
from bvit_jax.layers.dense import BitDense
from bvit_jax.layers.first_values import first_batch
from bvit_jax.layers.kernels import noted_kernels
from bvit_jax.models.bivit import paper
from bvit_jax.weights.state_dicts import abstract_variables
from tests.tiny_models import DEIT, SWIN, assert_same_trees

SIZES = {"bivit_deit": DEIT, "bivit_swin": SWIN}
NAMES = tuple(SIZES)


def config_of(name, **settings):
    return models.model_config(name, **{**SIZES[name], "num_classes": 4, **settings})


@functools.cache
def tiny(name, **settings):
    """Returns a model, its initial variables and a batch."""
    model = models.create_model(config_of(name, **settings))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    return model, jax.jit(model.init)(jax.random.key(0), images), images


@functools.cache
def started(name, **settings):
    model, variables, images = tiny(name, **settings)
    return jax.jit(functools.partial(first_batch, model))(variables, images)[1]


def leaves_of(tree, *end):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if tuple(key.key for key in path[-len(end) :]) == end]


def straight_through(value, x):
    """Returns ``value`` with the gradient of ``x``."""
    return x + stop_gradient(value - x)


def gradient_over(parameter, size):
    """Returns a parameter whose gradient is divided by the square root of ``size``."""
    factor = 1 / np.sqrt(size)
    return stop_gradient(parameter * (1 - factor)) + parameter * factor


def assert_same_with_gradients(fast, slow, *arguments):
    actual, pullback = jax.vjp(fast, *arguments)
    expected, slow_pullback = jax.vjp(slow, *arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    gradient = jnp.array(np.random.default_rng(1).normal(size=actual.shape))
    for a, b in zip(pullback(gradient), slow_pullback(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


# --- quantisers --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_probabilities_against_a_slow_formulation():
    rng = np.random.default_rng(0)
    probs = jax.nn.softmax(jnp.array(rng.normal(size=(2, 3, 4, 5))))
    v = jnp.array(rng.normal(size=(2, 3, 5, 6)))
    parameter = jnp.array([0.6, 1.7, 3.0])

    def slow(probs, parameter):
        alpha = (gradient_over(parameter, probs.size) / 5)[:, None, None]
        q = jnp.clip(probs / alpha, 0, 1)
        return (alpha * straight_through(jnp.round(q), q)) @ v

    def fast(probs, parameter):
        quantized = paper.HeadProbs(axis=1).apply({"params": {"scale": parameter}}, probs)
        return (quantized.values @ v) * quantized.scale

    assert_same_with_gradients(fast, slow, probs, parameter)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_signs_against_a_slow_formulation():
    rng = np.random.default_rng(0)
    x, scale = jnp.array(rng.normal(size=(2, 4, 3, 5))), jnp.array([0.6, 1.7, 3.0])

    def slow(x, scale):
        scale = gradient_over(scale, x.size)[:, None]
        inside = jnp.where(jnp.abs(x) <= 1, x, stop_gradient(jnp.sign(x)))
        return scale * straight_through(jnp.sign(x), 2 * inside - inside * jnp.abs(inside))

    def fast(x, scale):
        variables = {"params": {"scale": scale}, "batch_stats": {"init_state": jnp.ones(1)}}
        quantized = paper.HeadSigns(axis=2).apply(variables, x)
        return quantized.values * quantized.scale

    assert_same_with_gradients(fast, slow, x, scale)


@pytest.mark.parametrize("value", [-3.0, 0.0, 1e-6])
def test_a_scale_below_the_floor_leaves_a_head_alive(value):
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 1, 4, 5)))
    module = paper.HeadProbs(axis=1)

    def total(parameter):
        quantized = module.apply({"params": {"scale": parameter}}, probs)
        return jnp.sum(quantized.values * quantized.scale), quantized

    gradient, quantized = jax.grad(lambda s: (-total(s)[0], total(s)[1]), has_aux=True)(jnp.array([value]))
    np.testing.assert_allclose(quantized.scale, paper.LEAST_SCALE / 5, rtol=1e-6)
    assert quantized.values.any()
    assert gradient[0] < 0  # a descent raises it


# --- the first batch ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_scale_of_probabilities_starts_at_twice_their_mean():
    """Whatever the batch: the probabilities of a row sum to 1."""
    _, _, images = tiny("bivit_swin")
    for probs in real_model_probs(images):
        np.testing.assert_allclose(jnp.mean(probs, axis=(0, 2, 3)), 1 / probs.shape[-1], rtol=1e-5)
    for scale in leaves_of(started("bivit_swin")["params"], "prob_act", "scale"):
        np.testing.assert_array_equal(scale, 2)


def real_model_probs(images):
    model = models.create_model(models.model_config("swin", **SWIN))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    return jax.jit(functools.partial(model.apply, capture=True))(variables, images).attentions


def test_signs_start_at_the_mean_magnitude_of_each_head():
    x = jnp.array([[[[1.0, -3.0], [0.0, 0.5]]], [[[2.0, 2.0], [-0.5, -1.0]]]])  # (2, 1, 2, 2)
    module = paper.HeadSigns(axis=2)
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["params"]["scale"], [1, 1])
    first = functools.partial(module.apply, first_batch=True, mutable=["params", "batch_stats"])
    y, updated = first(variables, x)
    np.testing.assert_array_equal(updated["params"]["scale"], [2, 0.5])
    np.testing.assert_array_equal(jnp.ravel(y.scale), [2, 0.5])
    assert updated["batch_stats"]["init_state"] == 1
    _, again = first(updated, 7 * x)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, updated))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_first_batch_sets_scales_and_nothing_else(name):
    _, before, _ = tiny(name)
    after = started(name)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert all(flag == 1 for flag in leaves_of(after["batch_stats"], "init_state"))
    for part in ("query_act", "key_act", "value_act"):
        scales = leaves_of(after["params"], part, "scale")
        assert scales
        assert not any((scale == 1).any() for scale in scales)
    kernels = zip(leaves_of(before["params"], "kernel"), leaves_of(after["params"], "kernel"), strict=True)
    assert all(np.array_equal(a, b) for a, b in kernels)


@pytest.mark.slow
def test_a_batch_that_is_not_the_first_writes_no_parameters():
    model, variables, images = tiny("bivit_deit")
    _, after = jax.jit(functools.partial(model.apply, train=True, mutable=True))(variables, images)
    for collection, before in variables.items():
        assert_same_trees(after[collection], before)


def test_merging_starts_at_the_mean_magnitude_of_its_weights():
    merging = started("bivit_swin")["params"]["downsample1"]["reduction"]
    expected = jnp.mean(jnp.abs(merging["kernel"]), axis=0)
    np.testing.assert_allclose(merging["scale"], expected, rtol=1e-6)


# --- bits --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sum_that_cancels_is_a_one_for_the_next_layer():
    zeros = jnp.zeros((3, 4))
    kernel = jnp.array([[0.5, 0.0], [0.5, -0.0], [-0.5, 0.0], [-0.5, 1.0]])
    y = BitDense(2).apply({"params": {"kernel": kernel}}, zeros)
    np.testing.assert_allclose(y, [[0, 1]] * 3)  # mean|W| = 0.25, all four inputs and weights 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_product_sees_bits(name, monkeypatch):
    """All codes are -1 or 1, those of attention probabilities 0 or 1; zeros among the inputs included."""
    (model, _, images), variables = tiny(name), started(name)
    seen = []
    product = paper.products.code_product

    def watched(a, b, *settings):
        seen.extend((a, b))
        return product(a, b, *settings)

    monkeypatch.setattr(paper.products, "code_product", watched)
    model.apply(variables, images * (images > 0))
    values = {tuple(np.unique(codes).tolist()) for codes in seen}
    assert values == {(-1.0, 1.0), (0.0, 1.0)}


@pytest.mark.parametrize(("name", "layers"), [("bivit_deit", 2 * 6), ("bivit_swin", 4 * 6 + 1)])
def test_which_kernels_are_binary(name, layers):
    model, variables, images = tiny(name)
    with noted_kernels() as kernels:
        jax.eval_shape(model.apply, variables, images)
    assert len(kernels) == layers


# --- the vanished gradients --------------------------------------------------------------------


def gradients(**settings):
    model, _, images = tiny("bivit_deit", **settings)
    variables = started("bivit_deit", **settings)

    def loss(params):
        output = model.apply(variables | {"params": params}, images, capture=True)
        return jnp.sum(jnp.square(output.logits)), output.attentions

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@pytest.mark.slow
def test_with_a_scale_of_one_attention_is_dead_and_the_learned_scale_revives_it():
    """No probability is above 1/2, so that no token is attended to and no value gets a gradient.

    Queries and keys get one of the same size either way: the quantiser passes it to all of [0, α].
    """
    fixed, attentions = gradients(patch_size=8, learned_scale=False)
    assert not any(probs.any() for probs in attentions)
    assert not any(kernel.any() for kernel in leaves_of(fixed, "value", "kernel"))
    learned, attentions = gradients(patch_size=8)
    for probs in attentions:
        assert 0.2 < jnp.mean(probs > 0) < 0.8
    for name in ("query", "key", "value"):
        assert all(kernel.any() for kernel in leaves_of(learned, name, "kernel"))
    for name in ("query", "key"):
        pairs = zip(leaves_of(fixed, name, "kernel"), leaves_of(learned, name, "kernel"), strict=True)
        assert all(0.1 < jnp.linalg.norm(a) / jnp.linalg.norm(b) < 10 for a, b in pairs)


# --- real activations --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_with_real_activations_only_weights_are_binary(name):
    model, variables, images = tiny(name, act_bits=32)
    binary = tiny(name)[1]["params"]
    paths = [{p for p, _ in jax.tree_util.tree_leaves_with_path(t)} for t in (variables["params"], binary)]
    assert paths[0] < paths[1]
    assert {p[-2].key for p in paths[1] - paths[0]} == {"query_act", "key_act", "value_act", "prob_act"}
    output = jax.jit(functools.partial(model.apply, capture=True))(variables, images)
    for probs in output.attentions:
        np.testing.assert_allclose(jnp.sum(probs, axis=-1), 1, rtol=1e-5)
    layer, x = BitDense(3, act_bits=32), jax.random.normal(jax.random.key(0), (5, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 3))
    expected = x @ (jnp.sign(kernel) * jnp.mean(jnp.abs(kernel), axis=0))
    np.testing.assert_allclose(layer.apply({"params": {"kernel": kernel}}, x), expected, rtol=1e-5)


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"name": "bivit_deit", "width": 192, "num_heads": 3, "mlp_dim": 768}, 12 * (4 * 3 + 4 * 64)),
        ({"name": "bivit_swin"}, 2 * 4 * (3 + 6 + 3 * 12 + 24) + 192 + 384 + 768),
    ],
)
def test_sizes(settings, added):
    """Those of the backbones without the biases of the blocks, and what the quantisers add."""
    config = models.model_config(**settings)
    params = abstract_variables(models.create_model(config), 224)["params"]
    real = dict(config) | {"name": config.name.removeprefix("bivit_")}
    backbone = {key: real[key] for key in real if key not in ("act_bits", "estimator", "learned_scale")}
    backbone = abstract_variables(models.create_model(backbone), 224)["params"]
    biases = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(backbone)
        if "block" in path[0].key and path[-1].key == "bias" and "norm" not in path[-2].key
    )
    assert models.num_params(params) == models.num_params(backbone) - biases + added


@pytest.mark.slow
def test_slope_is_that_of_the_other_binary_products():
    x = jnp.linspace(-1.5, 1.5, 7)
    module = paper.HeadSigns(axis=0)
    variables = {"params": {"scale": jnp.full(7, 3.0)}, "batch_stats": {"init_state": jnp.ones(1)}}
    gradient = jax.grad(lambda x: jnp.sum(module.apply(variables, x).values))(x)
    np.testing.assert_allclose(gradient, PARABOLA.slope(x))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bivit_deit", {"distillation_token": False}, "it reads the distillation token"),
        ("bivit_deit", {"act_bits": 2}, "act_bits is 2: expected one of 1, 32"),
        ("bivit_deit", {"learned_scale": 1}, "learned_scale is 1: expected True or False"),
        ("bivit_swin", {"image_size": 100}, "stage 0 has a 25×25 token grid"),
    ],
)
def test_settings_that_do_not_fit(name, settings, message):
    with pytest.raises(UserError, match=message):
        models.create_model(models.model_config(name, **settings))
