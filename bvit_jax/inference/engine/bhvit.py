"""BHViT: the blocks of `bvit_jax.models.bhvit`, folded.

A block takes and returns tokens and their norm, as in `bvit_jax.inference.engine.binaryvit`.
"""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bvit_jax.binary import units
from bvit_jax.binary.gsb import FAR, NEAR
from bvit_jax.binary.levels import LARGEST, level_codes
from bvit_jax.inference.engine import operations as xla
from bvit_jax.inference.engine import repeated
from bvit_jax.inference.engine.binaryvit import classify, downsample, embed, names_of
from bvit_jax.inference.engine.levels import Operations
from bvit_jax.inference.engine.parameters import Parameters
from bvit_jax.inference.engine.styles import Normalised, with_norms
from bvit_jax.layers.grid import merge_tokens, to_grid, to_tokens, upsample
from bvit_jax.models.windows import Window

DILATIONS = (1, 3, 5)
GROUPS = 4


class Stage(NamedTuple):
    """The numbers of a stage's blocks among all, and its heads, 0 where there are token mixers instead."""

    blocks: tuple[int, ...]
    num_heads: int


def stages(settings: Mapping[str, Any]) -> list[Stage]:
    """Returns the four stages of a model."""
    numbers = itertools.count()
    heads = (0, 0, *settings["num_heads"])
    return [
        Stage(tuple(itertools.islice(numbers, depth)), number)
        for depth, number in zip(settings["depth"], heads, strict=True)
    ]


def runs(settings: Mapping[str, Any]) -> list[list[str]]:
    """Returns the names of blocks that may be alike."""
    return [names_of(stage.blocks) for stage in stages(settings)]


def apply(settings: Mapping[str, Any], p: Parameters, images: Array, operations: Operations) -> Array:
    """Returns the logits (images, classes); see `bvit_jax.inference.engine.families.apply`."""
    op = with_norms(operations, settings)
    x, n = embed(op, p.at("embedding"), images, settings["patch_size"], gelu=True)
    for number, stage in enumerate(stages(settings)):
        if number > 0:
            x, n = downsample(op, p.at(f"downsample{number}"), n)
        step = partial(_block, settings, op, stage.num_heads)
        x, n = repeated.run(p, names_of(stage.blocks), step, (x, n))
    return classify(p, jnp.mean(n, axis=1))


def _block(
    settings: Mapping[str, Any],
    op: Operations,
    num_heads: int,
    p: Parameters,
    carry: tuple[Array, Array],
) -> tuple[Array, Array]:
    x, n = carry
    if num_heads:
        y = _attention(settings, op, p.at("attention"), n, num_heads)
        x, n = op.unit_end(y, p.unit("attention_output"), y, x, p.end("attention_end"))
    else:
        x = x + _mixed(op, p.at("mixer"), n)
        n = op.normalise(x, p["mlp_norm/factor"], p["mlp_norm/shift"])
    if "taps" in p:
        x = xla.shifts(n, x, p["taps"])
    return op.feed_forward(n, p.unit("mlp/expand"), p.unit("mlp/contract"), x, p.end("mlp_end"))


def _mixed(op: Operations, p: Parameters, n: Array) -> Array:
    """Returns the sum of three dilated convolutions, normalised."""
    total = jnp.zeros((), n.dtype)
    for i, dilation in enumerate(DILATIONS, 1):
        q = p.at(f"conv{i}")
        product = xla.Product(p["move"], *q.codes())
        y = to_tokens(xla.convolution(to_grid(n), product, dilation, GROUPS))
        total += units.rprelu(y * q["factor"] + q["shift"], q["slope"], q["move2"])
    return op.normalise(total, p["norm/factor"], p["norm/shift"])


def _attention(settings: Mapping[str, Any], op: Operations, p: Parameters, n: Array, num_heads: int) -> Array:
    """Returns attention in windows, with merged tokens of the whole grid, put back in its places."""
    window = Window(math.isqrt(n.shape[1]), settings["window_size"], 0)
    windows = (window.side // window.size) ** 2
    merged = jnp.repeat(merge_tokens(n, window.size, p["tokens/share"][None, None]), windows, axis=0)
    tokens = jnp.concatenate([window.split(n), merged], axis=1)
    norm = Normalised(settings["norm_epsilon"], op)
    tokens = norm.normalise(tokens, p["tokens/norm/factor"], p["tokens/norm/shift"])
    q, k, v = (op.unit(tokens, p.unit(name), tokens) for name in ("query", "key", "value"))

    moves = p["moves"]
    products = xla.scores(q + moves[0], k + moves[1], num_heads)
    probs = jax.nn.softmax(products / math.sqrt(q.shape[-1] // num_heads), axis=-2)
    quantised = _masked if settings["gsb"] else _levels
    counted, scale = quantised(p, probs, v + moves[2])
    if settings["norm"] != "batch_norm":
        counted *= scale
    context = op.follow(counted, p.context("norm"), q + k + v)

    inside, share = window.size**2, p["share"]
    own = window.join(context[:, :inside])
    merged = context[:, inside:].reshape(-1, windows, windows, context.shape[-1]).mean(axis=1)
    return share * own + (1 - share) * upsample(merged, window.size)


def _levels(p: Parameters, probs: Array, v: Array) -> tuple[Array, Array]:
    """Returns the sum of values by four levels, as three counts, and the step of each channel."""
    steps, zero_points = (p[name][:, None, None] for name in ("step", "zero_point"))
    codes = level_codes(LARGEST * probs, steps, zero_points)
    counts = [xla.context(codes >= level, v) for level in range(1, LARGEST + 1)]
    return sum(counts[1:], counts[0]), jnp.repeat(p["step"], v.shape[-1] // probs.shape[1])


def _masked(p: Parameters, probs: Array, v: Array) -> tuple[Array, Array]:
    """Returns the sum of values by the masks of `bvit_jax.binary.gsb`, as three counts, and its scale."""
    ratio = probs / p["scale"]
    largest = jnp.max(ratio, axis=-2, keepdims=True)
    base, far, near = (
        xla.context(mask, v)
        for mask in (jnp.round(ratio) >= 1, ratio > FAR * largest, ratio > NEAR * largest)
    )
    second, third = p["second"], p["third"]
    return base + (second - 1) * far + (third - second) * near, p["floored"]
