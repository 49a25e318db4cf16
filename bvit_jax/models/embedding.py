"""From images to tokens: patches, class token, position embeddings."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.layers import WeightInit, make_norm, normal_init, real_patch_conv, to_tokens
from bvit_jax.models.blocks import NormName


class ImageEmbedding(nn.Module):
    """Real patch embedding, an optional norm, an optional class token, position embeddings.

    Takes images (batch, size, size, 3) and returns tokens (batch, tokens, width), the class token
    first, in the compute dtype.
    """

    width: int
    patch_size: int
    class_token: bool
    norm: NormName | None = None
    norm_epsilon: float = 1e-5
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
            x = make_norm(self.norm, self.norm_epsilon, "norm")(x, train=train)
        if self.class_token:
            token = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, width))
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.param("positions", normal_init, (1, x.shape[1], width))
        return nn.Dropout(self.dropout)(x, deterministic=not train).astype(self.dtype)
