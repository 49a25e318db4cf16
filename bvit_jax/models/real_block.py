"""The pre-norm block of the real-valued transformers: attention, over everything or in windows, and GELU."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.binary.products import accumulator_dtype
from bvit_jax.layers.activation import ACTIVATION_SCOPE, DropPath, softmax
from bvit_jax.layers.dense import real_dense
from bvit_jax.layers.init import WeightInit, normal_init
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models.head import Attention
from bvit_jax.models.windows import Window


@dataclass(frozen=True)
class RealConfig:
    """What the blocks of one real-valued model have in common, whatever their width.

    Attributes:
      norm_epsilon: of every LayerNorm.
      dropout, attention_dropout: rates.
      weight_init: initialiser of the weight matrices.
      dtype: compute dtype; activations are kept in it.
    """

    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32


class RealBlock(nn.Module):
    """Pre-norm attention and feed-forward with exact GELU.

    With a ``window`` the tokens are a grid, attention stays inside its windows, and a learned bias for
    each relative position is added to the scores.

    Returns:
      Tokens (batch, tokens, channels) and attention probabilities, (batch, heads, tokens, tokens) or
      (batch * windows, heads, window tokens, window tokens).
    """

    num_heads: int
    mlp_dim: int
    drop_path: float | Array
    config: RealConfig
    window: Window | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Attention]:
        c = self.config
        y = LayerNorm(c.norm_epsilon, name="attention_norm")(x)
        y = y if self.window is None else self.window.split(y)
        y, attention = self._attention(y, train=train)
        y = y if self.window is None else self.window.join(y)
        x = x + DropPath(self.drop_path)(y, train=train)

        y = LayerNorm(c.norm_epsilon, name="mlp_norm")(x)
        y = self._dense(self.mlp_dim, y, "mlp_in")
        with jax.named_scope(ACTIVATION_SCOPE):
            y = self._activate(y)
        y = self._dense(x.shape[-1], y, "mlp_out").astype(c.dtype)
        y = nn.Dropout(c.dropout)(y, deterministic=not train)
        return x + DropPath(self.drop_path)(y, train=train), attention

    def _attention(self, x: Array, *, train: bool) -> tuple[Array, Attention]:
        c = self.config
        batch, tokens, width = x.shape
        split = (batch, tokens, self.num_heads, -1)
        q, k, v = (self._dense(width, x, name).reshape(split) for name in ("query", "key", "value"))
        context, attention = self._attend(q, k, v, train=train)
        y = self._dense(width, context.reshape(batch, tokens, width), "attention_output").astype(c.dtype)
        return nn.Dropout(c.dropout)(y, deterministic=not train), attention

    def _attend(self, q: Array, k: Array, v: Array, *, train: bool) -> tuple[Array, Attention]:
        """Returns the context and the probabilities, of (batch, tokens, heads, size) each."""
        c = self.config
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=accumulator_dtype(c.dtype))
        probs = self._probabilities(scores / math.sqrt(q.shape[-1])).astype(c.dtype)
        kept = nn.Dropout(c.attention_dropout)(probs, deterministic=not train)
        return jnp.einsum("bhqk,bkhd->bqhd", kept, v), Attention(probs, probs)

    def _probabilities(self, scores: Array) -> Array:
        if self.window is not None:
            shape = (self.window.num_offsets, self.num_heads)
            table = self.param("position_bias", normal_init, shape)
            scores = self.window.add_bias(scores, table)
        return softmax(scores)

    def _activate(self, x: Array) -> Array:
        return nn.gelu(x, approximate=False)

    def _dense(self, features: int, x: Array, name: str) -> Array:
        c = self.config
        return real_dense(features, x.shape[-1], c.weight_init, c.dtype, name)(x)
