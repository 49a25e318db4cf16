"""Attention of quantised tensors, which both forms of Bi-ViT share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from bvit_jax.binary import products, zero_point
from bvit_jax.binary.codes import Codes
from bvit_jax.layers import sown
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models.deit import DeiT
from bvit_jax.models.head import Attention
from bvit_jax.models.settings import Family
from bvit_jax.models.swin import Swin
from bvit_jax.models.transformer import (
    Attend,
    Dense,
    Layers,
    Reduce,
    TransformerBlock,
    TransformerConfig,
    gelu,
)

HEAD_NORM_EPSILON = 1e-5


Quantize = Callable[[Any, Array, str, bool], Codes]


@dataclass(frozen=True)
class QuantizedAttention:
    """Attention whose products are those of codes; see `bvit_jax.models.transformer.Attend`.

    Each quantiser takes the configuration, a tensor, the name of the module that it makes and whether this is
    the first batch.

    Attributes:
      heads: quantises queries, keys and values, (batch, tokens, heads, size).
      probs: quantises attention probabilities, (batch, heads, tokens, keys).
    """

    heads: Quantize
    probs: Quantize

    def __call__(
        self, block: TransformerBlock, q: Array, k: Array, v: Array, *, train: bool, first_batch: bool
    ) -> tuple[Array, Attention]:
        c = block.config
        queries = self.heads(c, q, "query_act", first_batch)
        keys = self.heads(c, k, "key_act", first_batch)
        values = self.heads(c, v, "value_act", first_batch)
        scores = _product(c, queries, keys, "bqhd,bkhd->bhqk") / math.sqrt(q.shape[-1])
        probs = block.probabilities(scores)
        used = self.probs(c, probs, "prob_act", first_batch)
        sown.watch_heads(block, used.values)
        kept = used
        if train and c.attention_dropout > 0:
            kept = used.dropped(c.attention_dropout, block.make_rng("dropout"))
        context = _product(c, kept, values, "bhqk,bkhd->bqhd")
        return context, Attention(probs, used.dequantize())


def _product(config: TransformerConfig, a: Codes, b: Codes, equation: str) -> Array:
    """Returns the product of two tensors with a scale per head, in any of the axes of ``equation``."""
    y = products.code_product(a.values, b.values, equation, config.dtype)
    scale = a.scale.reshape(-1) * b.scale.reshape(-1)
    heads = equation.partition("->")[2].index("h")
    return y * jnp.expand_dims(scale, tuple(i for i in range(4) if i != heads))


def with_head_norms(attend: Attend) -> Attend:
    """Returns attention that first normalises the queries and keys of each head, as Bi-ViT's DeiT does."""

    def normalized(
        block: TransformerBlock, q: Array, k: Array, v: Array, *, train: bool, first_batch: bool
    ) -> tuple[Array, Attention]:
        q = LayerNorm(HEAD_NORM_EPSILON, name="query_norm")(q)
        k = LayerNorm(HEAD_NORM_EPSILON, name="key_norm")(k)
        return attend(block, q, k, v, train=train, first_batch=first_batch)

    return normalized


def families(
    dense: Dense, attend: Attend, reduce: Reduce, deit: TransformerConfig, swin: TransformerConfig
) -> tuple[Family, Family]:
    """Returns the families of a binary DeiT and Swin, whose layers and blocks are given."""
    of_deit = Layers(dense, with_head_norms(attend), clipped_gelu, reduce)
    of_swin = Layers(dense, attend, clipped_gelu, reduce)
    distilled = {"distillation_token": True, "distillation_head": True}
    return (
        Family(DeiT, deit, {"layers": of_deit, **distilled}, backbone="deit"),
        Family(Swin, swin, {"layers": of_swin}, backbone="swin"),
    )


def clipped_gelu(x: Array) -> Array:
    """Returns the exact GELU clipped to ±10; the gradient passes on the closed interval."""
    return zero_point.clip_output(gelu(x))
