"""What is computed for the pictures of a network, against slower ways of computing it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bvit_jax import models
from bvit_jax.augment.normalization import Normalization
from bvit_jax.binary.weights import BITS, CONV, DENSE
from bvit_jax.layers import kernels as signs
from bvit_jax.layers.dense import BinaryDense
from bvit_jax.models.windows import Window
from bvit_jax.report import network_figures
from bvit_jax.report.network_figures import (
    Block,
    attending,
    attention_maps,
    blocks_of,
    branch_scales,
    ends_of_stages,
    filter_order,
    flip_rates,
    latent_weights,
    look,
    mean_frequency,
    merged_share,
    position_biases,
    position_embeddings,
    position_similarity,
    whole_attention,
)
from bvit_jax.weights.pretrained import Pretrained
from tests.tiny_models import DEIT, SWIN, TINY, abstract_of, tiny_pretrained


@functools.cache
def tiny(name: str, **settings) -> Pretrained:
    return tiny_pretrained(name, **settings)


def images_of(model: Pretrained, count: int = 2) -> np.ndarray:
    size = model.config.image_size
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), np.uint8)


@functools.cache
def seen_by(name: str) -> network_figures.Seen:
    return look(tiny(name), images_of(tiny(name)))


def intermediate_inputs(model: Pretrained, images: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Returns what enters each module, by path, from a run without compilation."""
    entered: dict[str, list[np.ndarray]] = {}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__":
            entered["/".join(context.module.path)] = [np.asarray(a) for a in args[:1]]
        return call(*args, **kwargs)

    normalize = Normalization(model.preprocessing.mean, model.preprocessing.std)
    variables = jax.tree.map(jnp.asarray, model.variables)
    with nn.intercept_methods(note):
        models.create_model(model.config).apply(variables, normalize(jnp.asarray(images)))
    return entered


# --- parts, filters and weights ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_blocks_are_those_of_the_model(name):
    model = tiny(name)
    blocks = blocks_of(model.config)
    named = [path for path in model.variables["params"] if "block" in path]
    assert {block.name for block in blocks} == set(named)
    seen, attend = seen_by(name), attending(blocks)
    assert len(seen.used) == len(seen.softmax) == len(attend)
    for block, attention in zip(attend, seen.used, strict=True):
        whole = whole_attention(attention, block)
        assert whole.shape[1] == block.side**2 + block.extra_tokens


def test_the_ends_of_stages():
    blocks = [Block(str(i), i, stage, 4) for i, stage in enumerate((0, 1, 1, 1, 2, 2))]
    assert [block.index for block in ends_of_stages(blocks)] == [0, 1, 3, 4, 5]


def test_attention_to_merged_tokens_is_spread_over_their_squares():
    window = Window(4, 2, 0)
    block = Block("b", 0, 0, 4, 0, window)
    attention = np.random.default_rng(0).random((4, 3, 8, 8)).astype(np.float32)
    attention /= attention.sum(axis=-1, keepdims=True)
    whole = whole_attention(attention, block)
    np.testing.assert_allclose(whole.sum(axis=-1), 1, rtol=1e-5)
    assert merged_share(attention, block) == pytest.approx(attention[:, :, :4, 4:].sum() / (4 * 3 * 4))
    for query in range(16):
        y, x = divmod(query, 4)
        own, place = y // 2 * 2 + x // 2, y % 2 * 2 + x % 2
        for key in range(16):
            v, u = divmod(key, 4)
            other = v // 2 * 2 + u // 2
            expected = attention[own, :, place, 4 + other] / 4
            if other == own:
                expected = expected + attention[own, :, place, v % 2 * 2 + u % 2]
            np.testing.assert_allclose(whole[:, query, key], expected, rtol=1e-5)
    assert merged_share(attention[..., :4, :4], block) == 0


def test_filters_are_sorted_from_smooth_to_fine():
    x = np.arange(8) + np.zeros((8, 1))
    waves = [np.cos(2 * np.pi * k * x / 8) for k in (3, 0, 4, 1)] + [np.zeros_like(x)]
    kernel = np.stack(waves, axis=-1)[:, :, None].repeat(3, 2).astype(np.float32)
    np.testing.assert_allclose(mean_frequency(kernel), [3 / 8, 0, 1 / 2, 1 / 8, 0], atol=1e-6)
    assert filter_order(kernel).tolist() == [1, 4, 3, 0, 2]


@pytest.mark.parametrize("name", ["binaryvit", "react_deit", "bivit_release_deit", "binaryvit_w1a32"])
def test_latent_weights_and_the_share_inside(name):
    model = tiny(name)
    variables = jax.tree.map(lambda a: 3 * a, model.variables)  # some are outside
    model = Pretrained(model.config, variables, model.preprocessing, model.class_names)
    found = {layer.layer: layer for layer in latent_weights(model)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        keys = [key.key for key in path]
        layer = found.pop("/".join(keys[:-1]), None) if keys[-1] == "kernel" else None
        if layer is None:
            continue
        linear_of_binaryvit = keys[-2] == "dense"
        expected = leaf - leaf.mean(axis=0) if linear_of_binaryvit else leaf
        np.testing.assert_allclose(layer.values, expected.ravel(), atol=1e-6)
        assert layer.inside == pytest.approx(np.mean(np.abs(expected) <= 1), abs=1e-3)
        assert 0 < layer.inside < 1
    assert not found


def test_what_a_rule_takes_the_sign_of():
    kernel = jnp.array(np.random.default_rng(0).standard_normal((5, 7)), jnp.float32)
    for rule in (DENSE, CONV, BITS):
        np.testing.assert_array_equal(np.sign(rule.centred(kernel)), rule.codes(kernel))
        np.testing.assert_array_equal(np.abs(rule.centred(kernel)) <= 1, rule.window(kernel))


@pytest.mark.parametrize("name", ["deit", "swin", "binaryvit_w4"])
def test_models_without_weights_of_one_bit(name):
    assert latent_weights(tiny(name)) == []


def test_flip_rates_of_a_run():
    lines = [
        {"step": 2, "loss": 1.0},
        {"step": 2, "health": {"flipped": {"a": 0.5, "b": 0.0}, "zeros": {"a": 1.0}}},
        {"step": 4, "health": {"flipped": {"a": None, "c": 0.25}}},
        {"step": 6, "health": {"zeros": {"a": 0.0}}},
        {"step": 8, "health": None},
    ]
    steps, layers, rates = flip_rates(json.loads(json.dumps(lines)))
    assert steps == [2, 4]
    assert layers == ["a", "b", "c"]
    np.testing.assert_array_equal(rates, [[0.5, np.nan], [0, np.nan], [np.nan, 0.25]])
    steps, layers, rates = flip_rates(lines[:1])
    assert (steps, layers, rates.shape) == ([], [], (0, 0))


def test_branch_scales():
    model = tiny("binaryvit")
    params, blocks = model.variables["params"], blocks_of(model.config)
    scales = branch_scales(params, blocks)
    assert list(scales) == ["attention_scale", "mlp_scale", "pool_h3", "pool_w3", "pool_h5", "pool_w5"]
    for name, found in scales.items():
        for block, alpha in zip(blocks, found, strict=True):
            np.testing.assert_array_equal(alpha, params[block.name][name]["alpha"])
    assert branch_scales(tiny("deit").variables["params"], blocks_of(tiny("deit").config)) == {}


# --- positions ---------------------------------------------------------------------------------


def test_position_similarity_by_hand():
    grid = np.random.default_rng(0).standard_normal((5, 5, 3))
    lines, similarity = position_similarity(grid, 3)
    assert lines.tolist() == [0, 2, 4]
    a, b = grid[4, 2], grid[1, 3]
    expected = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert similarity[2, 1, 1, 3] == pytest.approx(expected)
    assert similarity[2, 1, 4, 2] == pytest.approx(1)
    assert position_similarity(grid, 9)[1].shape == (5, 5, 5, 5)


@pytest.mark.parametrize(("name", "sides"), [("binaryvit", [8, 4]), ("deit_heads", [2]), ("swin", [])])
def test_position_embeddings_of_each_stage(name, sides):
    model = tiny(name)
    params = model.variables["params"]
    found = position_embeddings(params, model.config)
    assert [len(grid) for grid in found] == sides
    for grid, parent, extra in zip(found, ("embedding", "downsample1"), (0 if name == "binaryvit" else 2, 0)):
        np.testing.assert_array_equal(
            grid.reshape(-1, grid.shape[-1]), params[parent]["positions"][0, extra:].astype(np.float64)
        )


def test_position_biases_lie_where_the_key_does():
    model = tiny("swin")
    block = blocks_of(model.config)[0]
    biases = position_biases(model.variables["params"], block)
    window, size = block.window, block.window.size
    table = model.variables["params"][block.name]["position_bias"]
    scores = np.asarray(
        Window(size, size, 0).add_bias(jnp.zeros((1, 1, size**2, size**2)), jnp.asarray(table))
    )
    for query, key in ((0, 1), (5, 2), (3, 12)):
        (qy, qx), (ky, kx) = divmod(query, size), divmod(key, size)
        np.testing.assert_allclose(
            biases[:, size - 1 + ky - qy, size - 1 + kx - qx], scores[0, :, query, key], rtol=1e-6
        )
    assert window.num_offsets == biases[0].size


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["binaryvit", "deit_heads", "swin", "bivit_release_swin"])
def test_attention_is_the_model_s(name):
    model = tiny(name)
    images = images_of(model)
    normalize = Normalization(model.preprocessing.mean, model.preprocessing.std)
    module = models.create_model(model.config)
    output = jax.jit(lambda v, x: module.apply(v, normalize(x), capture=True))(model.variables, images)
    seen = seen_by(name)
    np.testing.assert_allclose(seen.probabilities, nn.softmax(output.logits), rtol=1e-5)
    for ours, theirs in ((seen.softmax, output.probabilities), (seen.used, output.attentions)):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b[: len(b) // 2], rtol=1e-5, atol=1e-7)  # of the first image


@pytest.mark.parametrize("window", [Window(8, 4, 0), Window(8, 4, 2), Window(4, 4, 0)])
def test_attention_in_windows_of_the_whole_grid(window):
    """Mixing values with the whole matrix equals mixing them in windows."""
    rng = np.random.default_rng(0)
    count = (window.side // window.size) ** 2
    attention = rng.random((count, 3, window.size**2, window.size**2)).astype(np.float32)
    values = rng.random((1, window.side**2, 3)).astype(np.float32)
    inside = np.einsum("whqk,wkh->wqh", attention, np.asarray(window.split(jnp.asarray(values))))
    expected = np.asarray(window.join(jnp.asarray(inside)))[0]
    whole = whole_attention(attention, Block("b", 0, 0, window.side, 0, window))
    np.testing.assert_allclose(np.einsum("hqk,kh->qh", whole, values[0]), expected, rtol=1e-5)


def test_maps_of_attention():
    attention = np.random.default_rng(0).random((2, 18, 18))
    maps = attention_maps(attention, Block("b", 0, 0, 4, extra_tokens=2))
    assert list(maps) == ["class token", "central token", "mean of all tokens"]
    # Row 2 and column 2 of the grid is its token 10.
    assert maps["central token"][3, 1] == pytest.approx(attention[:, 2 + 10, 2 + 13].mean())
    assert maps["class token"][0, 2] == pytest.approx(attention[:, 0, 4].mean())
    assert maps["mean of all tokens"][1, 0] == pytest.approx(attention[:, :, 6].mean())
    pooled = attention_maps(attention[:, :16, :4], Block("b", 0, 0, 4))
    assert list(pooled) == ["central token", "mean of all tokens"]
    assert pooled["central token"][1, 0] == pytest.approx(attention[:, 10, 2].mean())


# --- signs -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["binaryvit", "react_deit"])
def test_sign_balance_of_binary_products(name):
    model, seen = tiny(name), seen_by(name)
    entered = intermediate_inputs(model, images_of(model))
    params = model.variables["params"]
    checked = 0
    for layer, shares in seen.balance.items():
        if not layer.endswith("/dense"):
            continue
        move = functools.reduce(lambda tree, key: tree[key], layer.split("/"), params)["move"]
        x = entered[layer][0] + move
        np.testing.assert_allclose(shares, (x > 0).mean(axis=(0, 1)), atol=0.02)  # rounding before a sign
        checked += 1
    with signs.noted_kernels() as kernels:
        module = models.create_model(model.config)
        jax.eval_shape(module.apply, model.variables, images_of(model).astype(np.float32))
    assert checked == sum(path[-1] == "dense" for path in kernels)
    heads = sum(layer.endswith("_move") for layer in seen.balance)
    assert heads == 3 * len(blocks_of(model.config))


@pytest.mark.slow
def test_sign_balance_of_quantisers_with_a_zero_point():
    model = tiny_pretrained("bivit_release_deit", depth=1)
    values = model.variables["params"]["block0"]["query_act"]
    values["zero_point"] += 1.3  # so that codes are not signs
    images = images_of(model)
    x = intermediate_inputs(model, images)["block0/query_act"][0]
    position = x / values["alpha"][:, None] + np.round(values["zero_point"])[:, None]
    expected = (position > 0).mean(axis=(0, 1, 3))
    assert ((expected > 0) & (expected < 1)).any()
    np.testing.assert_allclose(look(model, images).balance["block0/query_act"], expected, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bivit_deit", "bivit_swin"])
def test_the_sign_of_zero_counts_as_it_is_used(model):
    sizes = DEIT | {"depth": 1} if model == "bivit_deit" else SWIN | {"depth": (1, 1)}
    config = models.model_config(model, **sizes, num_classes=3)
    # Every input of a sign is zero, whose sign is 1 here.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_of(config))
    run = jax.jit(functools.partial(network_figures._applied, models.create_model(config)))
    shares = jax.tree.leaves(run(zeros, jnp.ones((1, 32, 32, 3)))[1])
    assert len(shares) >= 9
    assert all((share == 1).all() for share in shares)


@pytest.mark.parametrize("name", ["deit", "swin", "binaryvit_w1a32"])
def test_models_without_signs_of_activations(name):
    assert seen_by(name).balance == {}


def test_the_order_is_that_of_computation():
    layers = list(seen_by("binaryvit").balance)
    assert layers[:4] == [
        "block0/attention/query/dense",
        "block0/attention/reduce/dense",
        "block0/attention/key/dense",
        "block0/attention/value/dense",
    ]
    assert layers.index("downsample1/conv") < layers.index("block1/attention/query/dense")


@pytest.mark.slow
def test_nothing_is_told_unasked():
    layer = BinaryDense(3)
    x = jnp.linspace(-1, 1, 24).reshape(2, 3, 4)
    variables = layer.init(jax.random.key(0), x)
    assert list(variables) == ["params"]
    _, told = layer.apply(variables, x, mutable=["balance"])
    assert list(told) == ["balance"]
    np.testing.assert_allclose(told["balance"]["positive"][""], np.mean(x > 0, axis=(0, 1)))
    _, told = layer.apply(variables, x, mutable=["health"])
    assert list(told) == ["health"]
