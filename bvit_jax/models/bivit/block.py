"""The block that both forms of Bi-ViT share: linear layers and attention of quantised tensors."""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.binary import products
from bvit_jax.binary import zero_point as quantize
from bvit_jax.layers import sown
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models.head import Attention
from bvit_jax.models.real_block import RealBlock

HEAD_NORM_EPSILON = 1e-5


class Quantized(NamedTuple):
    """A tensor as ``codes * scale``; the codes are whole numbers, the scale broadcasts against them."""

    codes: Array
    scale: Array


class BiViTBlock(RealBlock):
    """The block of `RealBlock` with quantised attention and a clipped GELU.

    A subclass names the modules that quantise along an ``axis``, the heads, and return `Quantized`; and it
    makes the linear layers binary.
    """

    quantizer: ClassVar[Callable[..., nn.Module]]
    prob_quantizer: ClassVar[Callable[..., nn.Module]]
    head_norms: ClassVar[bool] = True  # whether queries and keys of each head are normalised

    def _quantize(self, x: Array, name: str) -> Quantized:
        """Quantises queries, keys or values, (batch, tokens, heads, size)."""
        return self.quantizer(axis=2, name=name)(x)

    def _quantize_probs(self, probs: Array) -> Quantized:
        """Quantises attention probabilities, (batch, heads, tokens, keys)."""
        return self.prob_quantizer(axis=1, name="prob_act")(probs)

    def _activate(self, x: Array) -> Array:
        return quantize.clip_output(super()._activate(x))

    def _normalize_heads(self, q: Array, k: Array) -> tuple[Array, Array]:
        if not self.head_norms:
            return q, k
        q = LayerNorm(HEAD_NORM_EPSILON, name="query_norm")(q)
        return q, LayerNorm(HEAD_NORM_EPSILON, name="key_norm")(k)

    def _attend(self, q: Array, k: Array, v: Array, *, train: bool) -> tuple[Array, Attention]:
        c = self.config
        q, k = self._normalize_heads(q, k)
        queries, keys = self._quantize(q, "query_act"), self._quantize(k, "key_act")
        values = self._quantize(v, "value_act")
        scores = self._product(queries, keys, "bqhd,bkhd->bhqk") / math.sqrt(q.shape[-1])
        probs = self._probabilities(scores)
        used = self._quantize_probs(probs)
        sown.watch_heads(self, used.codes)
        kept = used
        if train and c.attention_dropout > 0:
            rate = 1 - c.attention_dropout
            mask = jax.random.bernoulli(self.make_rng("dropout"), rate, used.codes.shape)
            kept = Quantized(used.codes * mask, used.scale / rate)
        return self._product(kept, values, "bhqk,bkhd->bqhd"), Attention(probs, used.codes * used.scale)

    def _product(self, a: Quantized, b: Quantized, equation: str) -> Array:
        """Returns the product of two tensors with a scale a head, in any of the axes of ``equation``."""
        y = products.code_product(a.codes, b.codes, equation, self.config.dtype)
        scale = a.scale.reshape(-1) * b.scale.reshape(-1)
        heads = equation.partition("->")[2].index("h")
        return y * jnp.expand_dims(scale, tuple(i for i in range(4) if i != heads))
