"""From images to tokens: patches, class and distillation tokens, position embeddings; from stage to stage."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.binary.weights import CONV, WeightRule
from bvit_jax.layers.activation import RPReLU
from bvit_jax.layers.dense import BinaryPatchConv, real_patch_conv
from bvit_jax.layers.grid import average_pool, to_grid, to_tokens
from bvit_jax.layers.init import WeightInit, normal_init
from bvit_jax.layers.norm import NormName, make_norm
from bvit_jax.models.blocks import UnitConfig
from bvit_jax.models.transformer import gelu

STRIDE = 2  # between stages


class ImageEmbedding(nn.Module):
    """Real patch embedding, then as asked for: norm, extra tokens, position embeddings.

    Takes images (batch, size, size, 3) and returns tokens (batch, tokens, width) in the compute dtype,
    the extra ``tokens`` first, in their order; a name such as "class_token" is that of its parameter.
    ``gelu`` comes after the norm; ``grid_positions`` says that the parameter of the positions is a grid.
    """

    width: int
    patch_size: int
    tokens: tuple[str, ...]
    norm: NormName | None = None
    norm_epsilon: float = 1e-5
    batch_norm_group: int = 0
    one_pass_norms: bool = False
    gelu: bool = False
    positions: bool = True
    grid_positions: bool = False
    dropout: float = 0.0
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        size, width = self.patch_size, self.width
        fan_in = size * size * images.shape[-1]
        conv = real_patch_conv(width, size, fan_in, self.weight_init, self.dtype, "patches", use_bias=True)
        x = to_tokens(conv(images))
        if self.norm is not None:
            norm = make_norm(self.norm, self.norm_epsilon, "norm", self.batch_norm_group, self.one_pass_norms)
            x = norm(x, train=train)
        if self.gelu:
            x = gelu(x)
        if self.tokens:
            tokens = [self.param(name, nn.initializers.normal(1e-6), (1, 1, width)) for name in self.tokens]
            first = jnp.concatenate(tokens, axis=1).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], *first.shape[1:])), x], axis=1)
        if self.positions:
            side = images.shape[1] // size
            shape = (1, side, side, width) if self.grid_positions else (1, x.shape[1], width)
            x = x + self.param("positions", normal_init, shape).reshape(1, -1, width)
        return nn.Dropout(self.dropout)(x, deterministic=not train).astype(self.dtype)


class Downsample(nn.Module):
    """The patch embedding between two stages: a 2×2 product, binary or real, and new positions.

    The binary one keeps a shortcut, the 2×2 average with its channels repeated. Returns
    (batch, tokens / 4, features) in the compute dtype. ``weight_rule`` is that of its binary weights.
    """

    features: int
    real: bool
    config: UnitConfig
    weight_rule: WeightRule = CONV

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        c = self.config
        width = x.shape[-1]
        x = c.make_norm("input_norm")(x, train=train).astype(c.dtype)
        norm = c.make_norm("norm")
        if self.real:
            fan_in = STRIDE * STRIDE * width
            conv = real_patch_conv(
                self.features, STRIDE, fan_in, c.weight_init, c.dtype, "conv", use_bias=False
            )
            y = norm(to_tokens(conv(to_grid(x))), train=train)
        else:
            product = BinaryPatchConv(
                self.features, STRIDE, name="conv", rule=self.weight_rule, **c.quantizer()
            )
            y = product(to_grid(x))
            shortcut = jnp.tile(average_pool(x, STRIDE), (1, 1, self.features // width))
            y = RPReLU(name="rprelu")(norm(y, train=train) + shortcut)
        positions = self.param("positions", normal_init, (1, y.shape[1], self.features))
        return (y + positions).astype(c.dtype)
