"""From tokens to what a model returns."""

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from bvit_jax.layers import WeightInit, real_dense


@struct.dataclass
class ModelOutput:
    """What every model returns.

    Attributes:
      logits: (batch, classes), float32 or float64.
      hidden_states: if asked for, the input of every block and the encoder's output, each
        (batch, tokens, channels) in the compute dtype; else empty.
      attentions: if asked for, the attention probabilities of every block, as the product with the
        values sees them (binarised where the model does that), each (batch, heads, tokens, keys);
        else empty.
    """

    logits: Array
    hidden_states: tuple[Array, ...] = ()
    attentions: tuple[Array, ...] = ()


def classify(tokens: Array, num_classes: int, *, class_token: bool, weight_init: WeightInit) -> Array:
    """Pools normalised tokens (batch, tokens, channels) and returns logits (batch, classes).

    The module is called ``head`` and belongs to the calling module; it computes in the dtype of the
    tokens.
    """
    pooled = tokens[:, 0] if class_token else jnp.mean(tokens, axis=1)
    head: nn.Dense = real_dense(num_classes, tokens.shape[-1], weight_init, tokens.dtype, "head")
    return head(pooled)
