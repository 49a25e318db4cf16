"""What can be seen of a trained network: its filters, latent weights, signs, attention and positions.

Pure functions from a model's configuration, variables and output to numpy arrays, which
`bvit_jax.report.network_pictures` draws.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.augment.normalization import Normalization
from bvit_jax.layers import sown
from bvit_jax.layers.kernels import noted_kernels
from bvit_jax.models.bhvit import MIXED_STAGES
from bvit_jax.models.binaryvit import STRIDE
from bvit_jax.models.head import ModelOutput
from bvit_jax.models.swin import MERGE, stage_window
from bvit_jax.models.windows import Window
from bvit_jax.weights.pretrained import Pretrained

Params = Mapping[str, Any]


# --- the parts of a model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of a model.

    Attributes:
      name: that of its parameters.
      index: position among the attentions of the model, -1 for a block that has none.
      stage: from 0.
      side: tokens along a side of its grid.
      extra_tokens: class and distillation tokens before the grid.
      window: the window in which it attends, or None.
    """

    name: str
    index: int
    stage: int
    side: int
    extra_tokens: int = 0
    window: Window | None = None


def blocks_of(config: ConfigDict) -> list[Block]:
    """Returns the blocks of a model, in the order of its attentions."""
    side = config.image_size // config.patch_size
    windows = models.same_layers(config.name, "swin")
    if models.same_layers(config.name, "deit"):
        extra = 1 + bool(config.distillation_token)
        return [Block(f"block{i}", i, 0, side, extra) for i in range(config.depth)]
    if config.name == "react_deit":
        return [Block(f"block{i}", i, 0, side, int(config.class_token)) for i in range(config.depth)]
    if config.name == "bhvit":
        return _bhvit_blocks(config, side)
    blocks: list[Block] = []
    for stage, depth in enumerate(config.depth):
        for i in range(depth):
            index = len(blocks)
            if windows:
                window = stage_window(side, config.window_size, shifted=i % 2 == 1)
                blocks.append(Block(f"stage{stage}_block{i}", index, stage, side, 0, window))
            else:
                blocks.append(Block(f"block{index}", index, stage, side))
        side //= MERGE if windows else STRIDE
    return blocks


def _bhvit_blocks(config: ConfigDict, side: int) -> list[Block]:
    stages = [stage for stage, depth in enumerate(config.depth) for _ in range(depth)]
    first = stages.index(MIXED_STAGES)
    blocks = []
    for i, stage in enumerate(stages):
        own = side // STRIDE**stage
        window = Window(own, config.window_size, 0) if i >= first else None
        blocks.append(Block(f"block{i}", i - first if window else -1, stage, own, 0, window))
    return blocks


def attending(blocks: Sequence[Block]) -> list[Block]:
    """Returns the blocks that have attention."""
    return [block for block in blocks if block.index >= 0]


def ends_of_stages(blocks: Sequence[Block]) -> list[Block]:
    """Returns the first and the last block of every stage, once if they are the same."""
    stages = {block.stage for block in blocks}
    ends = []
    for stage in sorted(stages):
        of_stage = [block for block in blocks if block.stage == stage]
        ends += [of_stage[0]] if len(of_stage) == 1 else [of_stage[0], of_stage[-1]]
    return ends


# --- filters and weights -----------------------------------------------------------------------


def filter_order(kernel: np.ndarray) -> np.ndarray:
    """Returns the indices of the filters of a kernel, (size, size, 3, filters), from smooth to fine."""
    return np.argsort(mean_frequency(kernel), kind="stable")


def mean_frequency(kernel: np.ndarray) -> np.ndarray:
    """Returns the mean spatial frequency of each filter, in cycles per pixel, weighted by its energy.

    Args:
      kernel: (size, size, 3, filters); the constant part of a filter counts as frequency 0.

    Returns:
      (filters,), 0 for a filter of zeros.
    """
    energy = np.sum(np.abs(np.fft.fft2(kernel, axes=(0, 1))) ** 2, axis=2)
    y, x = (np.fft.fftfreq(size) for size in kernel.shape[:2])
    radius = np.hypot(y[:, None], x)[..., None]
    total = energy.sum(axis=(0, 1))
    return np.sum(energy * radius, axis=(0, 1)) / np.where(total > 0, total, 1)


@dataclass(frozen=True)
class LatentWeights:
    """The latent weights of a layer of one bit.

    Attributes:
      layer: its path.
      values: what the sign is taken of, after any centring, (weights,).
      inside: share of the values that receive a gradient.
    """

    layer: str
    values: np.ndarray
    inside: float


def latent_weights(model: Pretrained) -> list[LatentWeights]:
    """Returns the latent weights of all layers of one bit, in the order of computation.

    The gradient reaches values in [-1, 1].
    """
    module = models.create_model(model.config)
    variables = model.arrays()
    shape = (1, model.config.image_size, model.config.image_size, 3)
    with noted_kernels() as kernels:
        jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    found = []
    for path, rule in kernels.items():
        kernel = jnp.asarray(
            functools.reduce(lambda tree, name: tree[name], path, variables["params"])["kernel"]
        )
        inside = float(np.mean(np.asarray(rule.window(kernel)), dtype=np.float64))
        found.append(LatentWeights("/".join(path), np.asarray(rule.centred(kernel)).ravel(), inside))
    return found


def flip_rates(lines: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str], np.ndarray]:
    """Returns the share of signs of each layer that flipped, from the lines of a run's metrics.

    Returns:
      The steps at which it was logged, the layers, and the shares (layers, steps), NaN where a layer has no
      finite value.
    """
    logged = [
        (line["step"], line["health"]["flipped"])
        for line in lines
        if isinstance(line.get("health"), dict) and isinstance(line["health"].get("flipped"), dict)
    ]
    layers = list(dict.fromkeys(layer for _, shares in logged for layer in shares))
    values = [[shares.get(layer) for _, shares in logged] for layer in layers]
    return (
        [step for step, _ in logged],
        layers,
        np.array(values, np.float64).reshape(len(layers), len(logged)),
    )


def branch_scales(params: Params, blocks: Sequence[Block]) -> dict[str, list[np.ndarray | None]]:
    """Returns the LayerScale factors of each branch that any block has, one array (channels,) per block.

    Branches are ``attention_scale``, ``mlp_scale`` and the pooling or shift branches ``pool_h3`` and so on;
    None where a block lacks one.
    """
    scales = {
        block.name: {
            name: np.asarray(part["alpha"])
            for name, part in params[block.name].items()
            if isinstance(part, Mapping)
            and "alpha" in part
            and name.startswith((*SIDE_BRANCHES, *MAIN_SCALES))
        }
        for block in blocks
    }
    names = {name for found in scales.values() for name in found}
    order = [name for name in MAIN_SCALES if name in names] + sorted(
        names - set(MAIN_SCALES), key=lambda name: (int(name.split("_")[1].strip("chw")), name)
    )
    return {name: [scales[block.name].get(name) for block in blocks] for name in order}


MAIN_SCALES = ("attention_scale", "mlp_scale")
SIDE_BRANCHES = ("pool_", "shift_")


# --- positions ---------------------------------------------------------------------------------


def position_embeddings(params: Params, config: ConfigDict) -> list[np.ndarray]:
    """Returns the position embeddings of each stage's grid, (side, side, channels); empty without any."""
    blocks = blocks_of(config)
    found = []
    for block in {block.stage: block for block in reversed(blocks)}.values():
        parent = params.get("embedding" if block.stage == 0 else f"downsample{block.stage}", {})
        if "positions" in parent:
            grid = np.asarray(parent["positions"], np.float64)[0, block.extra_tokens :]
            found.append(grid.reshape(block.side, block.side, -1))
    return found[::-1]


def position_similarity(embeddings: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosine similarity of some positions of a grid with all.

    Args:
      embeddings: (side, side, channels).
      count: number of evenly spaced rows and columns of positions; at most all.

    Returns:
      The rows (equal to the columns), (n,), and the similarities, (n, n, side, side).
    """
    side = len(embeddings)
    lines = np.unique(np.round(np.linspace(0, side - 1, min(count, side))).astype(int))
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    units = embeddings / np.where(norms > 0, norms, 1)
    return lines, np.einsum("abc,yxc->abyx", units[np.ix_(lines, lines)], units)


def position_biases(params: Params, block: Block) -> np.ndarray:
    """Returns the relative position biases of a block in windows, (heads, 2·size - 1, 2·size - 1).

    The query is in the middle; a bias is at the position of the key relative to it.
    """
    assert block.window is not None
    table = np.asarray(params[block.name]["position_bias"], np.float64)
    side = 2 * block.window.size - 1
    # A row of the table is the position of the query relative to the key.
    return np.moveaxis(table.reshape(side, side, -1), -1, 0)[:, ::-1, ::-1]


# --- what the model computes --------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a model computes on some images.

    Attributes:
      probabilities: of the classes, (images, classes).
      balance: share of +1 among the signs that each product sees, over images and tokens, by layer and
        channel (or head).
      softmax: attention of each block on the first image, (windows, heads, queries, keys), as the softmax
        returns it.
      used: the same as the product with the values uses it.
    """

    probabilities: np.ndarray
    balance: dict[str, np.ndarray]
    softmax: list[np.ndarray]
    used: list[np.ndarray]


def look(model: Pretrained, images: np.ndarray) -> Seen:
    """Returns what a model computes on images, uint8 (images, size, size, 3), in evaluation mode."""
    module = models.create_model(model.config)
    normalize = Normalization(model.preprocessing.mean, model.preprocessing.std)
    layers: list[str] = []

    @jax.jit
    def compute(variables: Any, images: jax.Array) -> Any:
        output, sown_values = _applied(module, variables, normalize(images))
        balance = flatten_dict(sown_values)
        for *layer, _, part in balance:  # in the order of computation, which jax would sort
            layers.append("/".join([*layer, part] if part else layer))
        first = [
            [a.reshape(len(images), -1, *a.shape[1:])[0] for a in attentions]
            for attentions in (output.probabilities, output.attentions)
        ]
        return nn.softmax(output.logits), list(balance.values()), first

    probabilities, shares, attentions = jax.device_get(compute(model.arrays(), images))
    return Seen(probabilities, dict(zip(layers, shares, strict=True)), *attentions)


def _applied(module: nn.Module, variables: Any, inputs: jax.Array) -> tuple[ModelOutput, Any]:
    output, sown_values = module.apply(variables, inputs, capture=True, mutable=[sown.BALANCE])
    return output, sown_values.get(sown.BALANCE, {})


def whole_attention(attention: np.ndarray, block: Block) -> np.ndarray:
    """Returns the attention of one image over all tokens of a block, (heads, queries, keys).

    Args:
      attention: (windows, heads, queries, keys), one window where the block has none.
      block: its block; outside a query's window there is no attention but that to merged tokens, which come
        after those of the window: it is spread evenly over the tokens of the window that each stands for.
    """
    if block.window is None or attention.shape[-1] == block.side**2:
        return attention[0]
    tokens = block.side**2
    places = np.asarray(block.window.split(jnp.arange(tokens).reshape(1, tokens, 1)))[..., 0]
    whole = np.zeros((attention.shape[1], tokens, tokens), attention.dtype)
    size = places.shape[1]
    for place, inside in zip(places, attention[:, :, :size], strict=True):
        whole[:, place[:, None], place] = inside[..., :size]
        for merged, share in zip(places, np.moveaxis(inside[..., size:], -1, 0)):
            whole[:, place[:, None], merged] += share[..., None] / size
    return whole


def merged_share(attention: np.ndarray, block: Block) -> float:
    """Returns the mean share of the attention, (windows, heads, queries, keys), that merged tokens get."""
    size = block.window.size**2 if block.window else attention.shape[-1]
    return float(attention[:, :, :size, size:].sum(axis=-1).mean())


def attention_maps(attention: np.ndarray, block: Block) -> dict[str, np.ndarray]:
    """Returns the attention of some queries as grids of keys, averaged over the heads.

    Args:
      attention: of one image, (heads, queries, keys), see `whole_attention`; the keys may be a pooled grid.
      block: its block.

    Returns:
      (key side, key side) for ``class token`` (if there is one), ``central token``, the one below and right
      of the middle, and ``mean of all tokens``.
    """
    extra, middle = block.extra_tokens, block.side // 2
    mean = attention.mean(axis=0)
    rows = {"class token": mean[0]} if extra else {}
    rows["central token"] = mean[extra + middle * block.side + middle]
    rows["mean of all tokens"] = mean.mean(axis=0)
    side = math.isqrt(attention.shape[-1] - extra)
    return {name: row[extra:].reshape(side, side) for name, row in rows.items()}
