"""From tokens to what a model returns."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from bvit_jax.layers.dense import real_dense
from bvit_jax.layers.grid import POOLING_SCOPE
from bvit_jax.layers.init import WeightInit


class Attention(NamedTuple):
    """The attention probabilities of a block, (batch, heads, tokens, keys) each.

    Attributes:
      probs: what the softmax returns.
      used: what the product with the values sees, before dropout: binarised where the model does that,
        otherwise the same array.
    """

    probs: Array
    used: Array


@struct.dataclass
class ModelOutput:
    """What every model returns.

    Attributes:
      logits: (batch, classes), float32 or float64: the mean over the heads.
      head_logits: the logits of each head; the first is the class head, the last the one that is
        distilled. Most models have one head, which is both.
      hidden_states: if asked for, the input of every block and the encoder's output, each
        (batch, tokens, channels) in the compute dtype; else empty.
      attentions: if asked for, the attention probabilities of every block, as the product with the
        values sees them (binarised where the model does that), each (batch, heads, tokens, keys), in
        windows (batch * windows, heads, tokens, tokens); else empty.
      probabilities: if asked for, the same before any binarisation: what the softmax of every block
        returns; else empty.
    """

    logits: Array
    head_logits: tuple[Array, ...]
    hidden_states: tuple[Array, ...] = ()
    attentions: tuple[Array, ...] = ()
    probabilities: tuple[Array, ...] = ()


@jax.named_scope(POOLING_SCOPE)
def average_tokens(x: Array) -> Array:
    """Returns the mean over the tokens of (batch, tokens, channels)."""
    return jnp.mean(x, axis=1)


def classify(pooled: Array, num_classes: int, weight_init: WeightInit, name: str) -> Array:
    """Returns the logits (batch, classes) of pooled features (batch, channels).

    The module is called ``name`` and belongs to the calling module; it computes in the dtype of the
    features.
    """
    head: nn.Dense = real_dense(num_classes, pooled.shape[-1], weight_init, pooled.dtype, name)
    return head(pooled)


def model_output(
    head_logits: tuple[Array, ...], hidden: Sequence[Array], attentions: Sequence[Attention], capture: bool
) -> ModelOutput:
    """Returns the output of a model with the given heads, with what it computed on the way if ``capture``."""
    logits = sum(head_logits[1:], head_logits[0]) / len(head_logits) if head_logits[1:] else head_logits[0]
    if not capture:
        return ModelOutput(logits, head_logits)
    return ModelOutput(
        logits,
        head_logits,
        tuple(hidden),
        attentions=tuple(attention.used for attention in attentions),
        probabilities=tuple(attention.probs for attention in attentions),
    )
