"""BinaryViT and ReActNet-DeiT: the blocks of `bvit_jax.models.blocks`, folded.

A block takes the tokens x and their norm n, and returns them for the block that follows: a norm belongs to
the `End` of the branch before it.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bvit_jax.inference.engine import repeated
from bvit_jax.inference.engine.levels import Operations
from bvit_jax.inference.engine.operations import STRIDE
from bvit_jax.inference.engine.parameters import Parameters
from bvit_jax.inference.engine.styles import with_norms
from bvit_jax.layers.grid import extract_patches, to_grid


class Stage(NamedTuple):
    """What the blocks of a stage share, and the number of each among all blocks."""

    blocks: tuple[int, ...]
    num_heads: int
    reduction: int


def stages(settings: Mapping[str, Any]) -> list[Stage]:
    """Returns the stages of a model, one for a ReActNet-DeiT."""
    if isinstance(settings["depth"], int):
        return [Stage(tuple(range(settings["depth"])), settings["num_heads"], 1)]
    numbers = itertools.count()
    return [
        Stage(tuple(itertools.islice(numbers, depth)), heads, reduction)
        for depth, heads, reduction in zip(
            settings["depth"], settings["num_heads"], settings["reduction"], strict=True
        )
    ]


def runs(settings: Mapping[str, Any]) -> list[list[str]]:
    """Returns the names of blocks that may be alike."""
    return [names_of(stage.blocks) for stage in stages(settings)]


def names_of(blocks: Sequence[int]) -> list[str]:
    """Returns the names of blocks with some numbers."""
    return [f"block{index}" for index in blocks]


def apply(settings: Mapping[str, Any], p: Parameters, images: Array, operations: Operations) -> Array:
    """Returns the logits (images, classes); see `bvit_jax.inference.engine.families.apply`."""
    op = with_norms(operations, settings)
    x, n = embed(op, p.at("embedding"), images, settings["patch_size"])
    for number, stage in enumerate(stages(settings)):
        if number > 0:
            x, n = downsample(op, p.at(f"downsample{number}"), n)
        step = partial(block, op, stage)
        x, n = repeated.run(p, names_of(stage.blocks), step, (x, n))
    pooled = n[:, 0] if settings.get("class_token") else jnp.mean(n, axis=1)
    return classify(p, pooled)


def embed(
    op: Operations, p: Parameters, images: Array, patch_size: int, gelu: bool = False
) -> tuple[Array, Array]:
    """Returns the tokens of images and their norm."""
    x = tokens_of(op, p, images, patch_size, gelu)
    return x, op.normalise(x, p["norm/factor"], p["norm/shift"])


def tokens_of(op: Operations, p: Parameters, images: Array, patch_size: int, gelu: bool = False) -> Array:
    """Returns the tokens of images."""
    x = extract_patches(images, patch_size) @ p["patches"]
    if "bias" in p:
        x += p["bias"]
    if "inner/factor" in p:
        x = op.normalise(x, p["inner/factor"], p["inner/shift"])
    x = jax.nn.gelu(x, approximate=False) if gelu else x
    x = x + p["positions"] if "positions" in p else x
    if "tokens" in p:
        tokens = jnp.broadcast_to(p["tokens"], (x.shape[0], *p["tokens"].shape))
        x = jnp.concatenate([tokens, x], axis=1)
    return x


def downsample(op: Operations, p: Parameters, n: Array) -> tuple[Array, Array]:
    """Returns the tokens of the next stage, and their norm, from the normalised ones of a stage."""
    if "kernel" not in p:
        return op.downsample(n, p.unit("unit"), p["positions"], p["norm/factor"], p["norm/shift"])
    x = extract_patches(to_grid(n), STRIDE) @ p["kernel"]
    if "inner/factor" in p:
        x = op.normalise(x, p["inner/factor"], p["inner/shift"])
    x += p["positions"]
    return x, op.normalise(x, p["norm/factor"], p["norm/shift"])


def block(op: Operations, stage: Stage, p: Parameters, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns the tokens after a block, and their norm, from those before it."""
    x, n = carry
    inner = p.at("attention")
    q = op.unit(n, inner.unit("query"), n)
    z = n
    if stage.reduction > 1:
        z = op.average_pool(n, stage.reduction)
        z = op.unit(z, inner.unit("reduce"), z)
    k, v = (op.unit(z, inner.unit(name), z) for name in ("key", "value"))
    y = op.attention(
        q, k, v, inner["moves"], inner.context("norm"), inner["scale"], stage.num_heads, stage.reduction
    )
    x, n = op.unit_end(y, p.unit("attention_output"), y, x, p.end("attention_end"))
    if "taps" in p:
        x = op.branches(n, x, p["taps"])
    return op.feed_forward(n, p.unit("mlp/expand"), p.unit("mlp/contract"), x, p.end("mlp_end"))


def classify(p: Parameters, pooled: Array) -> Array:
    """Returns the logits of pooled features."""
    return pooled @ p["head/kernel"] + p["head/bias"]
