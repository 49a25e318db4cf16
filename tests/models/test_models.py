"""Models: sizes, switches, what they return, and a slow second implementation in numpy."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.binary import products
from bvit_jax.errors import UserError
from bvit_jax.weights.state_dicts import abstract_variables, to_state_dict
from tests.tiny_models import SMALLEST, images_for, smallest, spread_variables

NAMES = ("deit", "react_deit", "binaryvit")


# --- sizes -------------------------------------------------------------------------------------


def count(name, **settings):
    config = models.model_config(name, **settings)
    model = models.create_model(config)
    return models.num_params(abstract_variables(model, config.image_size)["params"])


def unit_size(inputs, outputs):
    return inputs + inputs * outputs + 2 * outputs + 3 * outputs  # shift, weights, norm, RPReLU


def block_size(width, mlp_dim, reduction, layer_scale, branches):
    attention = (4 if reduction > 1 else 3) * unit_size(width, width) + 3 * width + 1
    attention += 2 * width + 3 * width + unit_size(width, width)
    mlp = unit_size(width, mlp_dim) + unit_size(mlp_dim, width)
    return attention + mlp + 4 * width + 4 * width * layer_scale + 2 * branches * 2 * width


@pytest.mark.slow
def test_size_of_binaryvit():
    stages = list(
        zip((64, 128, 256, 512), (3, 4, 8, 4), (512, 1024, 1024, 2048), (8, 4, 1, 1), (56, 28, 14, 7))
    )
    total = 4 * 4 * 3 * 64 + 64 + 2 * 64 + 56 * 56 * 64  # patches, norm, positions
    for width, depth, mlp_dim, reduction, _ in stages:
        total += depth * block_size(width, mlp_dim, reduction, True, 2)
    total += 2 * 512 + 512 * 1000 + 1000
    products = 0
    for (narrow, *_), (wide, *_, side) in itertools.pairwise(stages):
        products += narrow + 3 * wide  # the shift and the RPReLU that real embeddings lack
        total += 2 * narrow + 4 * narrow * wide + 2 * wide + side * side * wide
    assert count("binaryvit") == total + products == 22_491_771
    assert count("binaryvit", some_fp=True) == total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switches", "layer_scale", "branches"),
    [
        ({"class_token": True, "layer_scale": False, "pool_branches": ()}, False, 0),
        ({"layer_scale": False, "pool_branches": ()}, False, 0),
        ({"layer_scale": False}, False, 2),
        ({}, True, 2),
    ],
)
def test_size_of_the_ablations(switches, layer_scale, branches):
    tokens = 196 + switches.get("class_token", False)
    total = 16 * 16 * 3 * 384 + 384 + tokens * 384 + 384 * switches.get("class_token", False)
    total += 12 * block_size(384, 1536, 1, layer_scale, branches)
    total += 2 * 384 + 384 * 1000 + 1000
    assert count("react_deit", **switches) == total


@pytest.mark.parametrize(
    ("width", "heads", "size"), [(192, 3, 5_717_416), (384, 6, 22_050_664), (768, 12, 86_567_656)]
)
def test_size_of_deit(width, heads, size):
    assert count("deit", width=width, num_heads=heads, mlp_dim=4 * width) == size


@pytest.mark.slow
def test_switches_change_the_parameters_they_name():
    full = count("react_deit", **SMALLEST["react_deit"])
    assert full - count("react_deit", **SMALLEST["react_deit"], layer_scale=False) == 4 * 8
    fewer = count("react_deit", **SMALLEST["react_deit"], pool_branches=(3,))
    assert full - fewer == 2 * 2 * 8
    real = count("react_deit", **SMALLEST["react_deit"], act_bits=32)
    assert full - real == 1  # the scale of the attention probabilities


# --- every switch runs -------------------------------------------------------------------------


def value_and_gradients(model, variables, images):
    """Returns the logits of a training step, the new statistics and the gradients."""

    def loss(params):
        output, updates = model.apply(
            variables | {"params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.mean(jnp.square(output.logits)), (output.logits, updates)

    @jax.jit
    def run():
        (_, (logits, updates)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return logits, updates, gradients

    return run()


def check_switches(name, dtype=jnp.float32, **settings):
    model, config = smallest(name, dtype, **settings)
    variables = spread_variables(model, config)
    images = images_for(config)
    logits, updates, gradients = value_and_gradients(model, variables, images)
    assert np.isfinite(logits).all()
    for output in (logits, jax.eval_shape(model.apply, variables, images).logits):
        assert output.shape == (4, 3)
        assert output.dtype == jnp.float32
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert gradient.dtype == jnp.float32, path
        if path[-1].key in ("kernel", "alpha", "slope", "prob_scale"):
            assert np.any(gradient), path
    assert jax.tree.structure(gradients) == jax.tree.structure(variables["params"])
    assert jax.tree.structure(updates.get("batch_stats", {})) == jax.tree.structure(
        variables.get("batch_stats", {})
    )
    for path, before in jax.tree_util.tree_leaves_with_path(variables.get("batch_stats", {})):
        after = updates["batch_stats"]
        for key in path:
            after = after[key.key]
        assert np.any(after != before), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        *[
            ("react_deit", jnp.float32, {"weight_bits": weight_bits, "act_bits": act_bits})
            for weight_bits, act_bits in [(1, 1), (2, 1), (8, 1), (32, 1), (1, 32), (4, 32), (32, 32)]
        ],
        ("deit", jnp.float32, {"drop_path": 0.1, "dropout": 0.1, "attention_dropout": 0.1}),
        ("react_deit", jnp.float32, {"class_token": True, "pool_branches": (), "layer_scale": False}),
        ("react_deit", jnp.float32, {"norm": "layer_norm", "pool_branches": (5,), "attention_dropout": 0.1}),
        ("binaryvit", jnp.float32, {"drop_path": 0.1, "dropout": 0.1}),
        ("binaryvit", jnp.float32, {"some_fp": True, "act_bits": 32, "attention_dropout": 0.1}),
        ("binaryvit", jnp.float32, {"norm": "layer_norm", "pool_branches": (3,), "weight_bits": 4}),
        ("deit", jnp.bfloat16, {}),
        ("react_deit", jnp.bfloat16, {"weight_bits": 4, "act_bits": 32}),
        ("binaryvit", jnp.bfloat16, {}),
    ],
)
def test_switches(name, dtype, settings):
    check_switches(name, dtype, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_float32_whatever_the_compute_dtype(name):
    model, config = smallest(name, jnp.bfloat16)
    variables = abstract_variables(model, config.image_size)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        assert leaf.dtype == jnp.float32, path


@pytest.mark.slow
def test_initial_parameters():
    model, config = smallest("react_deit")
    variables = jax.jit(model.init)(jax.random.key(0), images_for(config))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    block = variables["params"]["block0"]
    assert block["attention"]["prob_scale"] == np.float32(0.005)
    np.testing.assert_array_equal(block["mlp_scale"]["alpha"], np.full(8, np.float32(0.1)))
    np.testing.assert_array_equal(block["pool_h3"]["alpha"], np.zeros(8))
    assert np.abs(block["mlp"]["contract"]["dense"]["kernel"]).max() <= 1 / math.sqrt(16)
    assert np.any(variables["params"]["head"]["bias"])


# --- dropout and drop-path ---------------------------------------------------------------------

RATES = {
    "deit": ("drop_path", "dropout", "attention_dropout"),
    "react_deit": ("dropout", "attention_dropout"),
    "binaryvit": ("drop_path",),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [(name, r) for name, rates in RATES.items() for r in rates])
def test_rates_change_training_and_not_evaluation(name, rate):
    model, config = smallest(name, **{rate: 0.5})
    plain, _ = smallest(name)
    variables, images = spread_variables(model, config), images_for(config)

    def train(model, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    @jax.jit
    def run(seed):
        return train(model, seed).logits, model.apply(variables, images).logits

    (first, evaluated), (again, _), (other, _) = run(0), run(0), run(1)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    without = jax.jit(plain.apply)(variables, images).logits
    np.testing.assert_allclose(evaluated, without, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dropped_attention_stays_binary(monkeypatch):
    model, config = smallest("react_deit", attention_dropout=0.5)
    variables, images = spread_variables(model, config), images_for(config)
    multiplied, product = [], products.binary_context

    def context(codes, *rest):
        multiplied.append(codes)
        return product(codes, *rest)

    monkeypatch.setattr(products, "binary_context", context)
    output, _ = model.apply(
        variables,
        images,
        train=True,
        capture=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
    )
    scale = np.asarray(variables["params"]["block0"]["attention"]["prob_scale"])
    before = np.asarray(output.attentions[0]) / scale  # what is returned is not dropped
    codes = np.asarray(multiplied[0])
    assert set(np.unique(before)) <= {0, 1}
    assert set(np.unique(codes)) == {0, 1}
    assert (codes <= before).all()
    assert 0.3 < codes.sum() / before.sum() < 0.7


def test_the_caller_s_arrays_are_not_written_to(monkeypatch):
    """Outside of jit numpy arrays reach the layers as they are, and += writes into them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # signatures promise no more than jax's
    model, config = smallest("react_deit", attention_dropout=0.5)
    variables = jax.device_get(spread_variables(model, config))
    before = jax.tree.map(np.copy, variables)
    rngs = {"dropout": jax.random.key(0)}
    model.apply(variables, images_for(config), train=True, mutable=["batch_stats"], rngs=rngs)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))


# --- what a model returns ----------------------------------------------------------------------

SHAPES = {  # hidden states, attentions, of a batch of four
    "deit": ([(4, 5, 8)] * 3, [(4, 2, 5, 5)] * 2),
    "react_deit": ([(4, 9, 8)] * 2, [(4, 2, 9, 9)]),
    "binaryvit": ([(4, 64, 4), (4, 16, 8), (4, 16, 8)], [(4, 1, 64, 16), (4, 2, 16, 16)]),
}


@pytest.mark.parametrize("name", NAMES)
def test_capture(name):
    model, config = smallest(name, jnp.bfloat16)
    variables, images = spread_variables(model, config), images_for(config)
    output = jax.eval_shape(partial(model.apply, capture=True), variables, images)
    hidden, attentions = SHAPES[name]
    assert [(a.shape, a.dtype) for a in output.hidden_states] == [(shape, jnp.bfloat16) for shape in hidden]
    assert [a.shape for a in output.attentions] == attentions
    plain = jax.eval_shape(model.apply, variables, images)
    assert (plain.hidden_states, plain.attentions) == ((), ())
    assert output.logits.dtype == plain.logits.dtype == jnp.float32


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_a_scale_of_probabilities_below_zero_is_held_and_learns_only_with_a_floor(floor):
    model, config = smallest("react_deit", prob_scale_floor=floor)
    variables, images = spread_variables(model, config), images_for(config)

    @jax.jit
    @jax.value_and_grad
    def loss(scale):
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: scale if "prob_scale" in jax.tree_util.keystr(path) else x, variables["params"]
        )
        logits = model.apply({**variables, "params": params}, images).logits
        return jnp.sum(logits * jnp.arange(logits.size).reshape(logits.shape) % 3)

    below, gradient = loss(jnp.float32(-0.1))
    at_floor, _ = loss(jnp.float32(floor))
    if floor:
        assert below == at_floor
        other, opposite = jax.value_and_grad(lambda scale: -loss(scale)[0])(jnp.float32(-0.1))
        assert other == -below
        assert min(gradient, opposite) < 0  # of a loss and its opposite, one wants it higher
        assert max(gradient, opposite) == 0
    else:
        assert gradient == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_capture_changes_no_logits(x64, name):
    model, config = smallest(name, jnp.float64)
    variables = spread_variables(model, config, np.float64)
    images = images_for(config, dtype=np.float64)
    captured = jax.jit(partial(model.apply, capture=True))(variables, images)
    logits = jax.jit(model.apply)(variables, images).logits
    np.testing.assert_allclose(captured.logits, logits, rtol=1e-12, atol=1e-12)
    for probs in captured.attentions:
        if name == "deit":
            np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-12)
        else:
            assert len(set(np.unique(probs)) - {0}) == 1  # the scale


# --- a second implementation -------------------------------------------------------------------
# Slow and plain, in numpy, from a PyTorch state dict and for evaluation only; it knows nothing of
# codes, scales applied afterwards or channels that are reduced in slices.


class Slow:
    def __init__(self, state, config):
        self.state, self.c = state, config

    def __call__(self, images):
        c, s = self.c, self.state
        pyramid = c.name == "binaryvit"
        stages = zip(c.depth, c.num_heads, c.reduction) if pyramid else [(c.depth, c.num_heads, 1)]
        x = self.patches(images, s["vit.embeddings.patch_embeddings.projection.weight"])
        x = x + s["vit.embeddings.patch_embeddings.projection.bias"]
        if pyramid:
            x = self.norm("vit.embeddings.norm", x)
        if not pyramid and c.class_token:
            token = np.broadcast_to(s["vit.embeddings.cls_token"], (len(x), 1, x.shape[-1]))
            x = np.concatenate([token, x], axis=1)
        x = x + s["vit.embeddings.position_embeddings"]
        block = 0
        for stage, (depth, heads, reduction) in enumerate(stages):
            if stage > 0:
                x = self.downsample(f"vit.encoder.patch_embed{stage}", x)
            for _ in range(depth):
                x = self.block(f"vit.encoder.layer.{block}", x, heads, reduction)
                block += 1
        x = self.norm("vit.layernorm", x)
        x = x[:, 0] if not pyramid and c.class_token else x.mean(axis=1)
        return x @ s["classifier.weight"].T + s["classifier.bias"]

    def patches(self, grid, weight):
        """Convolves (batch, height, width, channels) with a stride of the kernel's size."""
        size = weight.shape[-1]
        rows = [
            np.einsum("bhwc,ochw->bo", grid[:, i : i + size, j : j + size], weight)
            for i in range(0, grid.shape[1], size)
            for j in range(0, grid.shape[2], size)
        ]
        return np.stack(rows, axis=1)

    def norm(self, name, x):
        s, epsilon = self.state, self.c.norm_epsilon
        if self.c.norm == "batch_norm":
            mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        else:
            mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + epsilon) * s[f"{name}.weight"] + s[f"{name}.bias"]

    def rprelu(self, name, x):
        s = self.state
        x = x - s[f"{name}.move1"]
        return np.where(x > 0, x, x * s[f"{name}.prelu.weight"]) + s[f"{name}.move2"]

    def act(self, x):
        return np.sign(x) if self.c.act_bits == 1 else x

    def quantized(self, name):
        w, bits, clip = self.state[name], self.c.weight_bits, self.c.clip_val
        if bits == 1:
            axes = tuple(range(1, w.ndim))
            scale = np.abs(w).mean(axes, keepdims=True)
            return scale * np.sign(w - w.mean(axes, keepdims=True) if w.ndim == 2 else w)
        w = np.clip(w, -clip, clip) if bits < 32 else w
        if bits == 2:
            kept = np.abs(w) > 0.7 * np.abs(w).mean()
            return np.abs(w[kept]).mean() * np.sign(w) * kept
        if bits < 32:
            step = np.abs(w).max() / (2 ** (bits - 1) - 1)
            return np.round(w / step) * step
        return w

    def unit(self, x, shortcut, *, move, weight, norm, rprelu):
        y = self.act(x + self.state[move]) @ self.quantized(weight).T
        return self.rprelu(rprelu, self.norm(norm, y) + shortcut)

    def attention_unit(self, name, letter, weight, x):
        norm = "norm_r" if letter == "r" else f"norm{letter}"
        return self.unit(
            x,
            x,
            move=f"{name}.move{letter}",
            weight=f"{name}.{weight}.weight",
            norm=f"{name}.{norm}",
            rprelu=f"{name}.rprelu{letter}",
        )

    def dense_unit(self, name, x, shortcut):
        return self.unit(
            x,
            shortcut,
            move=f"{name}.move",
            weight=f"{name}.dense.weight",
            norm=f"{name}.norm",
            rprelu=f"{name}.rprelu",
        )

    def attention(self, name, x, heads, reduction):
        s, size = self.state, x.shape[-1] // heads
        q, z = self.attention_unit(name, "q", "query", x), x
        if reduction > 1:
            z = self.attention_unit(name, "r", "reduction", self.pooled(x, reduction))
        k = self.attention_unit(name, "k", "key", z)
        v = self.attention_unit(name, "v", "value", z)
        shifted = {l: self.act(a + s[f"{name}.move{l}2"]) for l, a in zip("qkv", (q, k, v))}  # noqa: E741
        context = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            qh, kh, vh = (shifted[letter][..., part] for letter in "qkv")
            scores = qh @ kh.swapaxes(1, 2) / math.sqrt(size)
            probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            if self.c.act_bits == 1:
                a = s[f"{name}.att_prob_clip"]
                probs = np.clip(np.round(probs / a), 0, 1) * a
            context[..., part] = probs @ vh
        repeated = (self.repeated(a, reduction) for a in (k, v))
        context = self.norm(f"{name}.norm_context", context) + q + sum(repeated)
        return self.rprelu(f"{name}.rprelu_context", context)

    def grid(self, x):
        side = math.isqrt(x.shape[1])
        return x.reshape(len(x), side, side, -1)

    def pooled(self, x, size):
        weight = np.broadcast_to(
            np.eye(x.shape[-1])[:, :, None, None] / size**2, (x.shape[-1],) * 2 + (size, size)
        )
        return self.patches(self.grid(x), weight)

    def repeated(self, x, factor):
        if factor == 1:
            return x
        grid = self.grid(x).repeat(factor, axis=1).repeat(factor, axis=2)
        return grid.reshape(len(x), -1, x.shape[-1])

    def scaled(self, name, x):
        return x * self.state[f"{name}.alpha"] + self.state[f"{name}.move"]

    def block(self, name, x, heads, reduction):
        scaled = self.scaled if self.c.layer_scale else lambda _, y: y
        y = self.norm(f"{name}.layernorm_before", x)
        y = self.attention(f"{name}.attention.attention", y, heads, reduction)
        y = self.dense_unit(f"{name}.attention.output", y, y)
        x = x + scaled(f"{name}.attention.output.layerscale", y)

        normed = self.norm(f"{name}.layernorm_after", x)
        expansion = len(self.state[f"{name}.intermediate.dense.weight"]) // x.shape[-1]
        u = self.dense_unit(f"{name}.intermediate", normed, np.concatenate([normed] * expansion, -1))
        means = u.reshape(*u.shape[:2], -1, expansion).mean(-1)
        y = self.dense_unit(f"{name}.output", u, means)
        x = x + scaled(f"{name}.output.layerscale", y)
        for size in self.c.pool_branches:
            for axis, direction in ((1, "h"), (2, "w")):
                line = self.line(self.grid(normed), size, axis).reshape(x.shape)
                x = x + self.scaled(f"{name}.layerscale_{direction}{size}", line)
        return x

    def line(self, grid, size, axis):
        windows = np.apply_along_axis(lambda a: np.convolve(a, np.ones(size)), axis, grid)
        return windows.take(np.arange(grid.shape[axis]) + size // 2, axis) / size

    def downsample(self, name, x):
        s = self.state
        x = self.norm(f"{name}.norm0", x)
        positions = s[f"{name}.position_embeddings"]
        if self.c.some_fp:
            y = self.patches(self.grid(x), s[f"{name}.proj.weight"])
            return self.norm(f"{name}.norm", y) + positions
        shifted = self.act(self.grid(x) + s[f"{name}.move"].reshape(-1))
        y = self.norm(f"{name}.norm", self.patches(shifted, self.quantized(f"{name}.proj.weight")))
        pooled = self.pooled(x, 2)
        shortcut = np.concatenate([pooled] * (y.shape[-1] // x.shape[-1]), -1)
        return self.rprelu(f"{name}.rprelu", y + shortcut) + positions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("binaryvit", {}),
        ("binaryvit", {"some_fp": True}),
        ("binaryvit", {"act_bits": 32}),
        ("binaryvit", {"weight_bits": 4}),
        ("binaryvit", {"weight_bits": 2, "act_bits": 32, "norm": "layer_norm"}),
        ("react_deit", {"class_token": True, "pool_branches": (), "layer_scale": False}),
        ("react_deit", {"pool_branches": (3, 5), "layer_scale": False}),
        ("react_deit", {"weight_bits": 8, "pool_branches": (5,)}),
        ("react_deit", {"weight_bits": 32, "act_bits": 32}),
    ],
)
def test_logits_equal_the_slow_implementation(x64, name, settings):
    model, config = smallest(name, jnp.float64, **settings)
    variables = spread_variables(model, config, np.float64)
    images = images_for(config, dtype=np.float64)
    slow = Slow(to_state_dict(variables), config)(images)
    logits = jax.jit(model.apply)(variables, images).logits
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, slow, rtol=1e-10, atol=1e-10 * np.abs(slow).max())


# --- configurations that are refused -----------------------------------------------------------

CHANGES = [
    *[(name, key, 0) for name in ("deit", "react_deit") for key in ("width", "depth", "num_heads")],
    ("deit", "mlp_dim", 1.5),
    ("deit", "width", -8),
    ("deit", "width", 9),  # two heads
    *[(name, "patch_size", 0) for name in NAMES],
    *[(name, "image_size", 13) for name in NAMES],
    *[(name, "image_size", 0) for name in NAMES],
    *[(n, rate, value) for n in NAMES for rate in RATES["deit"] for value in (-0.1, 1.0, math.nan)],
    *[(name, "num_classes", 0) for name in NAMES],
    *[(name, "norm_epsilon", 0.0) for name in NAMES],
    *[(name, "weight_init", "torhc") for name in NAMES],
    ("react_deit", "norm", "batchnorm"),
    ("react_deit", "weight_bits", 9),
    ("react_deit", "weight_bits", 0),
    ("react_deit", "act_bits", 2),
    ("react_deit", "clip_val", 0.0),
    ("react_deit", "pool_branches", (3, 4)),
    ("react_deit", "mlp_dim", 20),
    ("react_deit", "class_token", True),
    *[("binaryvit", key, (2,)) for key in ("depth", "num_heads", "mlp_dim", "reduction")],
    *[("binaryvit", key, (2, 0)) for key in ("width", "depth", "num_heads", "mlp_dim", "reduction")],
    ("binaryvit", "mlp_dim[1]", (8, 12)),
    ("binaryvit", "mlp_dim[0]", (9, 16)),
    ("binaryvit", "width[1]", (4, 9)),  # two heads
    ("binaryvit", "width[1]", (4, 6)),  # the shortcut repeats four channels
    ("binaryvit", "reduction[0]", (3, 1)),
    ("binaryvit", "reduction[1]", (1, 3)),
]


@pytest.mark.parametrize(("name", "key", "value"), CHANGES)
def test_values_out_of_range_are_refused_by_name(name, key, value):
    mlp_dim = {"mlp_dim": (8, 12)} if value == (4, 6) else {}
    with pytest.raises(UserError) as error:
        smallest(name, **mlp_dim, **{key.partition("[")[0]: value})
    message = str(error.value)
    assert message.startswith(f"config.model.{key} is {value[int(key[-2])] if '[' in key else value!r}")
    assert ": " in message
    assert "\n" not in message


def test_a_grid_that_does_not_halve_is_refused():
    with pytest.raises(UserError, match=r"config.model.image_size is 6: .* multiple of 4"):
        smallest("binaryvit", image_size=6, reduction=(1, 1))


def test_widths_need_not_divide_without_the_shortcut():
    smallest("binaryvit", some_fp=True, width=(4, 6), mlp_dim=(8, 12))


def test_names_of_models_and_settings_are_suggested():
    with pytest.raises(UserError, match=r"config.model.name is 'binary_vit'; did you mean 'binaryvit'"):
        models.model_config("binary_vit")
    with pytest.raises(UserError, match="'binaryvit'"):
        models.create_model({"name": "binaryvti"})
    with pytest.raises(UserError, match=r"config.model.widht is not .* deit; did you mean 'width'"):
        models.model_config("deit", widht=8)
    with pytest.raises(UserError, match=r"config\.model\.weight_bits is not a setting of deit"):
        models.create_model({"name": "deit", "weight_bits": 1})
    with pytest.raises(UserError, match="known: bhvit, binaryvit, bivit_deit, bivit_release_deit"):
        models.model_config("resnet")


def test_the_former_name_of_a_model_is_understood():
    assert models.model_config("extra_res") == models.model_config("react_deit")
    assert models.create_model({"name": "extra_res"}) == models.create_model({"name": "react_deit"})


def test_configurations_are_complete():
    config = models.model_config("binaryvit")
    assert config.width == (64, 128, 256, 512)
    assert config.weight_bits == config.act_bits == 1
    assert models.create_model(config) == models.create_model({"name": "binaryvit"})
    assert "dtype" not in config


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("binaryvit", "width", 64),
        ("binaryvit", "width", ()),
        ("binaryvit", "depth", 3),
        ("react_deit", "pool_branches", 3),
        ("react_deit", "pool_branches", ("3",)),
        ("deit", "num_classes", "10"),
        ("deit", "drop_path", None),
        ("react_deit", "clip_val", "2.5"),
        ("react_deit", "pool_branches", (-1,)),
        ("react_deit", "pool_branches", (3, 3)),
        ("react_deit", "pool_branches", (3.0,)),
        ("deit", "num_classes", 2.5),
        ("deit", "norm_epsilon", math.inf),
    ],
)
def test_values_of_another_kind_are_refused(name, key, value):
    with pytest.raises(UserError, match=f"config.model.{key} is"):
        smallest(name, **{key: value})
