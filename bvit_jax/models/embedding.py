"""From images to tokens: patches, class and distillation tokens, position embeddings."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.layers.dense import real_patch_conv
from bvit_jax.layers.grid import to_tokens
from bvit_jax.layers.init import WeightInit, normal_init
from bvit_jax.layers.norm import NormName, make_norm


class ImageEmbedding(nn.Module):
    """Real patch embedding, then as asked for: norm, extra tokens, position embeddings.

    Takes images (batch, size, size, 3) and returns tokens (batch, tokens, width) in the compute dtype,
    the extra ``tokens`` first, in their order; a name such as "class_token" is that of its parameter.
    """

    width: int
    patch_size: int
    tokens: tuple[str, ...]
    norm: NormName | None = None
    norm_epsilon: float = 1e-5
    batch_norm_group: int = 0
    one_pass_norms: bool = False
    positions: bool = True
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
        if self.tokens:
            tokens = [self.param(name, nn.initializers.normal(1e-6), (1, 1, width)) for name in self.tokens]
            first = jnp.concatenate(tokens, axis=1).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], *first.shape[1:])), x], axis=1)
        if self.positions:
            x = x + self.param("positions", normal_init, (1, x.shape[1], width))
        return nn.Dropout(self.dropout)(x, deterministic=not train).astype(self.dtype)
