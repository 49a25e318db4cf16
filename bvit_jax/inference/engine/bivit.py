"""Both forms of Bi-ViT, `bvit_jax.models.bivit`, as DeiT and Swin: products counted, layer norms computed.

The paper's form has signs of one bit, that of zero is 1; the released code's has a zero, and zero points z:
the product of codes s - z is that of the signs, less sums of signs times the zero points.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bvit_jax.binary import bits
from bvit_jax.binary.zero_point import OUTPUT_LIMIT
from bvit_jax.inference.engine import operations as xla
from bvit_jax.inference.engine import repeated
from bvit_jax.inference.engine.binaryvit import tokens_of
from bvit_jax.inference.engine.levels import Operations
from bvit_jax.inference.engine.operations import Product
from bvit_jax.inference.engine.parameters import Parameters
from bvit_jax.inference.engine.styles import Normalised
from bvit_jax.layers.grid import to_grid, to_tokens
from bvit_jax.models.windows import Window

HEAD_EPSILON = 1e-5
MERGE = 2  # tokens along each side of the square that patch merging makes one token of


def apply(settings: Mapping[str, Any], p: Parameters, images: Array, operations: Operations) -> Array:
    """Returns the logits (images, classes); see `bvit_jax.inference.engine.families.apply`."""
    norm = Normalised(settings["norm_epsilon"], operations)
    x = tokens_of(
        replace(operations, normalise=norm.normalise), p.at("embedding"), images, settings["patch_size"]
    )
    bit = is_bit(settings)
    if "window_size" in settings:
        x = jnp.mean(_normed(norm, p, "norm", _stages(settings, norm, p, x, bit)), axis=1)
        return x @ p["head/kernel"] + p["head/bias"]
    heads = settings["num_heads"]
    names = runs(settings)[0]
    x = repeated.run(p, names, lambda q, x: _block(norm, q, x, heads, bit), x)
    x = _normed(norm, p, "norm", x)
    ends = ("head", "distillation_head")[: 1 + settings["distillation_head"]]
    logits = [x[:, i] @ p[f"{name}/kernel"] + p[f"{name}/bias"] for i, name in enumerate(ends)]
    return sum(logits[1:], logits[0]) / len(logits)


def runs(settings: Mapping[str, Any]) -> list[list[str]]:
    """Returns the names of blocks that may be alike: those of a DeiT; Swin's have shifts in turns."""
    if "window_size" in settings:
        return []
    return [[f"block{index}" for index in range(settings["depth"])]]


def is_bit(settings: Mapping[str, Any]) -> bool:
    """Returns whether the sign of zero is 1: in the paper's form."""
    return not settings["name"].startswith("bivit_release")


def _stages(settings: Mapping[str, Any], norm: Normalised, p: Parameters, x: Array, bit: bool) -> Array:
    """Returns the tokens after the stages of a Swin."""
    for stage, (depth, num_heads) in enumerate(zip(settings["depth"], settings["num_heads"], strict=True)):
        if stage > 0:
            x = _merged(norm, p.at(f"downsample{stage}"), to_grid(x), bit)
        side, size = math.isqrt(x.shape[1]), settings["window_size"]
        for i in range(depth):
            window = Window(side, size, size // 2 if i % 2 else 0) if side > size else Window(side, side, 0)
            x = _block(norm, p.at(f"stage{stage}_block{i}"), x, num_heads, bit, window)
    return x


def _merged(norm: Normalised, p: Parameters, grid: Array, bit: bool) -> Array:
    """Returns the tokens of the next stage."""
    corners = [grid[:, i::MERGE, j::MERGE] for j in range(MERGE) for i in range(MERGE)]
    x = _normed(norm, p, "norm", to_tokens(jnp.concatenate(corners, axis=-1)))
    if bit:
        return _dense(norm, p.at("reduction"), x, bit)
    # Each input has a scale of its own, so that its signs cannot be counted.
    q = p.at("reduction")
    zero_point = jnp.round(q["zero_point"])
    codes = jnp.sign(x / q["alpha"] + zero_point) - zero_point
    matrix = bits.unpack(bits.Bits(*q.codes()), x.shape[-1]).astype(x.dtype)
    return ((codes * q["alpha"]) @ matrix) * q["scale"]


def _block(
    norm: Normalised, p: Parameters, x: Array, num_heads: int, bit: bool, window: Window | None = None
) -> Array:
    y = _normed(norm, p, "attention_norm", x)
    y = y if window is None else window.split(y)
    q, k, v = (_dense(norm, p.at(name), y, bit) for name in ("query", "key", "value"))
    if "query_norm/factor" in p:
        q, k = (_head_norm(norm, p, f"{name}_norm", a, num_heads) for name, a in (("query", q), ("key", k)))
    attend = _attended_bits if bit else _attended_codes
    y = _dense(norm, p.at("attention_output"), attend(p, q, k, v, num_heads, window), bit)
    x = x + (y if window is None else window.join(y))
    y = _dense(norm, p.at("mlp_in"), _normed(norm, p, "mlp_norm", x), bit)
    y = jnp.clip(jax.nn.gelu(y, approximate=False), -OUTPUT_LIMIT, OUTPUT_LIMIT)
    return x + _dense(norm, p.at("mlp_out"), y, bit)


def _attended_bits(
    p: Parameters, q: Array, k: Array, v: Array, num_heads: int, window: Window | None
) -> Array:
    """Returns attention to the signs of values, by probabilities of one bit."""
    products = xla.scores(q, k, num_heads, bit=True)
    products *= (p["query_act/scale"] * p["key_act/scale"])[:, None, None]
    probs = _probabilities(p, products / math.sqrt(q.shape[-1] // num_heads), window)
    scale = jnp.ones(num_heads, q.dtype)
    if "prob_act/scale" in p:
        scale = p["prob_act/scale"] / k.shape[1]
    counted = xla.context(jnp.round(probs / scale[:, None, None]) >= 1, v, bit=True)
    return counted * jnp.repeat(scale * p["value_act/scale"], v.shape[-1] // num_heads)


def _attended_codes(
    p: Parameters, q: Array, k: Array, v: Array, num_heads: int, window: Window | None
) -> Array:
    """Returns attention of codes with zero points."""
    size, keys = q.shape[-1] // num_heads, k.shape[1]
    alphas = {name: p[f"{name}_act/alpha"] for name in ("query", "key", "value", "prob")}
    zeros = {name: jnp.round(p[f"{name}_act/zero_point"]) for name in alphas}

    def shifted(x: Array, name: str) -> Array:
        return x / jnp.repeat(alphas[name], size) + jnp.repeat(zeros[name], size)

    q, k, v = shifted(q, "query"), shifted(k, "key"), shifted(v, "value")
    of_q, of_k = (_head_sums(x, num_heads) for x in (q, k))
    zq, zk, zv, zp = (zeros[name][:, None, None] for name in ("query", "key", "value", "prob"))
    products = xla.scores(q, k, num_heads) - zk * of_q[:, :, None] - zq * of_k[..., None]
    products = (products + size * zq * zk) * (alphas["query"] * alphas["key"])[:, None, None]
    probs = _probabilities(p, products / math.sqrt(size), window)

    position = probs / alphas["prob"][:, None, None] + zp
    positive, negative = position > 0, position < 0
    counted = xla.context(positive, v) - xla.context(negative, v)
    chosen = jnp.sum(jnp.sign(position), axis=2).swapaxes(1, 2)  # (images, queries, heads)
    of_v = jnp.sum(jnp.sign(v), axis=1, keepdims=True)
    zv, zp = (jnp.repeat(zeros[name], size) for name in ("value", "prob"))
    counted = counted - zv * jnp.repeat(chosen, size, axis=2) - zp * of_v + keys * zp * zv
    return counted * jnp.repeat(alphas["prob"] * alphas["value"], size)


def _probabilities(p: Parameters, products: Array, window: Window | None) -> Array:
    """Returns the softmax along the keys of (images, heads, keys, queries), with the biases of a window."""
    if window is not None:
        products = window.add_bias(products.swapaxes(2, 3), p["position_bias"]).swapaxes(2, 3)
    return jax.nn.softmax(products, axis=2)


def _dense(norm: Normalised, p: Parameters, x: Array, bit: bool) -> Array:
    no_move = jnp.zeros(x.shape[-1], x.dtype)
    return norm.counting.count(x, Product(no_move, *p.codes()), bit=bit) * p["scale"]


def _normed(norm: Normalised, p: Parameters, name: str, x: Array) -> Array:
    return norm.normalise(x, p[f"{name}/factor"], p[f"{name}/shift"])


def _head_norm(norm: Normalised, p: Parameters, name: str, x: Array, num_heads: int) -> Array:
    heads = x.reshape(*x.shape[:2], num_heads, -1)
    own = replace(norm, epsilon=HEAD_EPSILON)
    return _normed(own, p, name, heads).reshape(x.shape)


def _head_sums(x: Array, num_heads: int) -> Array:
    """Returns the sum of the signs of each head, (images, heads, tokens)."""
    return jnp.sum(jnp.sign(x).reshape(*x.shape[:2], num_heads, -1), axis=-1).swapaxes(1, 2)
