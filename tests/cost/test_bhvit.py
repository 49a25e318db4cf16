"""What a BHViT costs, against closed forms of every layer that know nothing of the counter."""

import functools
from collections import Counter

import jax.numpy as jnp
import pytest
from flax import linen as nn

from bvit_jax import models
from bvit_jax.cost import cost_of
from bvit_jax.models.head import ModelOutput

SMALL, TINY = (3, 4, 8, 4), (2, 2, 6, 2)
SIZES = {
    "image_size": 96,
    "window_size": 3,
    "num_classes": 7,
    "width": 8,
    "depth": (1, 2, 1, 1),
    "num_heads": (2, 2),
    "mlp_dim": (16, 16, 64, 64),
}


@functools.cache
def counted(scan_blocks=False, **settings):
    """Returns the configuration of a model and its cost in inference; scanned blocks are traced once."""
    config = models.model_config("bhvit", **settings)
    model = models.create_model(config, execution=models.Execution(scan_blocks=scan_blocks))
    return config, cost_of(model, config.image_size, training=False)


# --- closed forms ------------------------------------------------------------------------------


def layer_macs(config):
    """Returns the binary and the real multiply-accumulates of each layer, those of equal ones added."""
    binary, real = Counter(), Counter()
    side, width, window = config.image_size // 4, config.width, config.window_size
    real["stem"] = side**2 * (4 * 4 * 3) * width
    for stage, (depth, mlp_dim) in enumerate(zip(config.depth, config.mlp_dim, strict=True)):
        if stage:
            side, width = side // 2, 2 * width
            (real if config.some_fp else binary)["downsample"] += side**2 * (2 * 2 * width // 2) * width
        if stage < 2:  # three convolutions in four groups
            binary["mixer"] += depth * 3 * side**2 * (3 * 3 * width // 4) * width
        else:
            windows = (side // window) ** 2
            sequence = window**2 + windows
            binary["projections"] += depth * 3 * windows * sequence * width**2
            binary["scores"] += depth * windows * sequence**2 * width
            binary["levels"] += depth * 3 * windows * sequence**2 * width  # three masks
            binary["output"] += depth * side**2 * width**2
        binary["mlp"] += depth * 2 * side**2 * width * mlp_dim
    real["head"] = width * config.num_classes
    return binary, real


def layer_params(config):
    """Returns the binary and the real parameters of each layer, those of equal ones added."""
    binary, real = Counter(), Counter()
    norm, rprelu, scale = 2, 3, 2  # values per channel
    unit = norm + rprelu  # of the outputs; the inputs have a shift
    side, c = config.image_size // 4, config.width
    real["stem"] = 4 * 4 * 3 * c + c + norm * c + side**2 * c
    for stage, (depth, m) in enumerate(zip(config.depth, config.mlp_dim, strict=True)):
        if stage:
            side, c = side // 2, 2 * c
            (real if config.some_fp else binary)["downsample"] += 2 * 2 * c // 2 * c
            real["downsample"] += norm * c // 2 + norm * c + side**2 * c
            real["downsample"] += 0 if config.some_fp else c // 2 + rprelu * c
        real["before"] += depth * 2 * norm * c
        real["shifts"] += depth * 3 * len(config.shift_branches) * scale * c
        binary["mlp"] += depth * 2 * c * m
        real["mlp"] += depth * (c + m + unit * (c + m) + scale * c * config.layer_scale)
        if stage < 2:
            binary["mixer"] += depth * 3 * (3 * 3 * c // 4) * c
            real["mixer"] += depth * (c + 3 * (c + rprelu * c) + norm * c)
            continue
        levels = 3 if config.gsb else 2 * config.num_heads[stage - 2]
        binary["attention"] += depth * 4 * c**2
        real["tokens"] += depth * (c + norm * c)
        real["projections"] += depth * 3 * (c + unit * c + c)
        real["attention"] += depth * (levels + unit * c + c)
        real["output"] += depth * (c + unit * c + scale * c * config.layer_scale)
    real["end"] = norm * c + c * config.num_classes + config.num_classes
    return binary, real


PARTS = {  # where a layer of the closed forms is in the model
    "embedding": "stem",
    "head": "head",
    "downsample": "downsample",
    "mixer": "mixer",
    "attention": "attention",
    "query": "projections",
    "key": "projections",
    "value": "projections",
    "attention_output": "output",
    "mlp": "mlp",
}


def by_part(cost):
    """Returns the binary and the real multiply-accumulates that were counted, by part of the model."""
    binary, real = Counter(), Counter()
    for layer in cost.layers:
        names = [name.rstrip("0123456789") for name in layer.path.split("/")]
        part = next((PARTS[name] for name in reversed(names) if name in PARTS), "")
        binary[part] += layer.macs["binary"]
        real[part] += layer.real_macs
    return +binary, +real


def compare(config, cost, scanned=False):
    """Compares every figure with its closed form, and returns the closed forms of the products."""
    binary, real = layer_macs(config)
    assert cost.total.macs == {"binary": binary.total(), "real": real.total()}
    binary["attention"] = binary.pop("scores") + binary.pop("levels")
    if not scanned:  # where all is in the layer of the model
        assert by_part(cost) == (binary, real)
    assert cost.total.ops == binary.total() / 64 + real.total()
    one_bit, learned = layer_params(config)
    assert cost.total.binary_params == one_bit.total()
    assert cost.total.params == one_bit.total() + learned.total()
    assert not cost.uncounted
    return binary.total(), real.total()


# --- the shipped sizes -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "some_fp", "parameters", "one_bit", "macs", "ops"),
    [
        (SMALL, True, 22_642_920, 20_644_864, (4.036, 0.0872), 0.150),
        (SMALL, False, 22_646_056, 21_332_992, (4.113, 0.0101), 0.074),
        (TINY, True, 13_779_960, 11_941_888, (2.502, 0.0872), 0.126),
        (TINY, False, 13_783_096, 12_630_016, (2.579, 0.0101), 0.050),
    ],
)
def test_the_sizes_of_the_paper(depth, some_fp, parameters, one_bit, macs, ops):
    config, cost = counted(scan_blocks=True, depth=depth, some_fp=some_fp)
    binary, real = compare(config, cost, scanned=True)
    assert (cost.total.params, cost.total.binary_params) == (parameters, one_bit)
    assert (round(binary / 1e9, 3), round(real / 1e9, 4)) == macs
    assert round(cost.total.ops / 1e9, 3) == ops


# --- its variants ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"some_fp": True, "image_size": 192},
        {"gsb": True, "shift_branches": (3,)},
        {"norm": "layer_norm", "layer_scale": False},
        {"shift_branches": (), "recu": True, "window_size": 1},
    ],
    ids=str,
)
def test_variants_and_other_sizes(settings):
    config, cost = counted(**{**SIZES, **settings})
    compare(config, cost)


@pytest.mark.slow
def test_the_size_in_memory():
    """One bit for a binary weight, and a scale for each of its outputs."""
    config, cost = counted(**SIZES)
    scales, c = 0, config.width
    for stage, (depth, mlp_dim) in enumerate(zip(config.depth, config.mlp_dim, strict=True)):
        c = c if stage == 0 else 2 * c
        scales += (c if stage else 0) + depth * ((3 if stage < 2 else 4) * c + mlp_dim + c)
    total = cost.total
    assert total.scales == scales
    assert total.packed_bits == total.binary_params + 32 * scales + 32 * total.real_params
    # A product with levels reads three bits of each: the convolutions are not the only ones that gain.
    layers = {layer.path: layer for layer in cost.layers}
    attention = layers["block3/attention"]
    sequence, windows, width = 9 + 4, 4, 32
    assert (
        attention.moved_bytes - attention.packed_moved_bytes
        == 2 * (3 * windows * sequence * width + windows * 2 * sequence**2)
        - (3 * windows * sequence * width + 3 * windows * 2 * sequence**2) // 8
    )


@pytest.mark.slow
def test_real_activations_and_real_weights():
    config, binary = counted(**SIZES)
    _, real_input = counted(**SIZES, act_bits=32)
    scores = layer_macs(config)[0]
    attention = scores["scores"] + scores["levels"] // 3
    macs = binary.total.macs
    assert real_input.total.macs == {
        "binary_weight": macs["binary"] - scores["scores"] - scores["levels"],
        "real": macs["real"] + attention,
    }
    _, real = counted(**SIZES, act_bits=32, weight_bits=32)
    assert set(real.total.macs) == {"real"}
    assert real.total.ops == real_input.total.ops


# --- how sums of codes are counted -------------------------------------------------------------


class Sums(nn.Module):
    """Products of sums of codes with signs, whose widths tell them apart."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(1, -1)
        a, b = jnp.sign(x), jnp.sign(x - 1)
        number, scales = self.param("number", nn.initializers.ones, ()), jnp.arange(12) + 0.5
        sums = {
            1: a + number * b,  # two
            10: jnp.clip(jnp.round(x), 0, 3),  # three masks
            100: jnp.clip(jnp.round(x), 0, 4),  # too many
            1000: jnp.clip(jnp.round(x), -1, 2),  # of no masks
            10_000: number * a,  # one with a scale is none
            100_000: scales * a + b,  # the scale cannot come after the sum
        }
        y = [value @ jnp.sign(jnp.ones((12, width)) * number) for width, value in sums.items()]
        logits = jnp.concatenate(y, axis=-1)
        return ModelOutput(logits, (logits,))


def test_sums_of_codes_are_as_many_products():
    macs = cost_of(Sums(), 2, training=False).total.macs
    assert macs == {"binary": 12 * (2 * 1 + 3 * 10), "binary_weight": 12 * 111_100}
