"""The real-valued DeiT (Touvron et al., 2021): teacher and full-precision baseline."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.layers import (
    DropPath,
    LayerNorm,
    WeightInit,
    accumulator_dtype,
    drop_path_rates,
    real_dense,
)
from bvit_jax.models.embedding import ImageEmbedding
from bvit_jax.models.head import ModelOutput, classify


class DeiTBlock(nn.Module):
    """Pre-norm attention and feed-forward with exact GELU.

    Returns:
      Tokens (batch, tokens, channels) and attention probabilities (batch, heads, tokens, tokens).
    """

    num_heads: int
    mlp_dim: int
    drop_path: float
    dropout: float
    attention_dropout: float
    norm_epsilon: float
    weight_init: WeightInit
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        y = LayerNorm(self.norm_epsilon, name="attention_norm")(x)
        y, probs = self._attention(y, train=train)
        x = x + DropPath(self.drop_path)(y, train=train)

        y = LayerNorm(self.norm_epsilon, name="mlp_norm")(x)
        y = self._dense(self.mlp_dim, y, "mlp_in")
        y = self._dense(x.shape[-1], nn.gelu(y, approximate=False), "mlp_out")
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return x + DropPath(self.drop_path)(y, train=train), probs

    def _attention(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        batch, tokens, width = x.shape
        split = (batch, tokens, self.num_heads, -1)
        q, k, v = (self._dense(width, x, name).reshape(split) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=accumulator_dtype(self.dtype))
        probs = nn.softmax(scores / math.sqrt(q.shape[-1])).astype(self.dtype)
        kept = nn.Dropout(self.attention_dropout)(probs, deterministic=not train)
        context = jnp.einsum("bhqk,bkhd->bqhd", kept, v).reshape(batch, tokens, width)
        y = self._dense(width, context, "attention_output")
        return nn.Dropout(self.dropout)(y, deterministic=not train), probs

    def _dense(self, features: int, x: Array, name: str) -> Array:
        return real_dense(features, x.shape[-1], self.weight_init, self.dtype, name)(x)


class DeiT(nn.Module):
    """DeiT with a class token; widths 192, 384 and 768 are DeiT-Ti, -S and -B.

    ``norm_epsilon`` goes with the checkpoint: 1e-6 for timm's and Facebook's, 1e-12 for Hugging
    Face's, 1e-5 in the reference's own training code.
    """

    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 1000
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    norm_epsilon: float = 1e-6
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, capture: bool = False) -> ModelOutput:
        """Classifies images.

        Args:
          images: (batch, image_size, image_size, 3), normalised.
          train: whether dropout and drop-path act; they draw from the "dropout" stream.
          capture: whether to return hidden states and attentions too.
        """
        x = ImageEmbedding(
            self.width,
            self.patch_size,
            class_token=True,
            dropout=self.dropout,
            weight_init=self.weight_init,
            dtype=self.dtype,
            name="embedding",
        )(images, train=train)
        hidden, attentions = [x], []
        for i, drop_path in enumerate(drop_path_rates(self.drop_path, self.depth)):
            x, probs = DeiTBlock(
                self.num_heads,
                self.mlp_dim,
                drop_path,
                self.dropout,
                self.attention_dropout,
                self.norm_epsilon,
                self.weight_init,
                self.dtype,
                name=f"block{i}",
            )(x, train=train)
            hidden.append(x)
            attentions.append(probs)
        x = LayerNorm(self.norm_epsilon, name="norm")(x)
        logits = classify(x, self.num_classes, class_token=True, weight_init=self.weight_init)
        return ModelOutput(logits, tuple(hidden), tuple(attentions)) if capture else ModelOutput(logits)
