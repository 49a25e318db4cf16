"""The pre-norm block of vision transformers: attention, over everything or in windows, and a feed-forward.

A block is given its `Layers`: linear layers, attention and activation. `REAL` are those of the real-valued
models; `bvit_jax.models.bivit` has binary ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.binary.products import accumulator_dtype
from bvit_jax.layers.activation import ACTIVATION_SCOPE, DropPath, softmax, weighted_sum
from bvit_jax.layers.dense import real_dense
from bvit_jax.layers.init import WeightInit, kernel_init, normal_init
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models.execution.stages import PLAIN, Execution
from bvit_jax.models.head import Attention
from bvit_jax.models.settings import require_choice, require_epsilon, require_rates
from bvit_jax.models.windows import Window


@dataclass(frozen=True)
class TransformerConfig:
    """What the blocks of one model have in common, whatever their width.

    Attributes:
      norm_epsilon: of every LayerNorm.
      dropout, attention_dropout: rates.
      weight_init: initialiser of the weight matrices.
      dtype: compute dtype; activations are stored in it.
      execution: how the blocks run, see `bvit_jax.models.execution`.
    """

    packs_signs: ClassVar[bool] = False  # see bvit_jax.models.blocks.BlockConfig

    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    execution: Execution = PLAIN

    def validate(self) -> None:
        """Raises `UserError` for a value out of range."""
        require_rates(self, "dropout", "attention_dropout")
        require_epsilon(self.norm_epsilon)
        require_choice("weight_init", self.weight_init, get_args(WeightInit))


class Attend(Protocol):
    """Attention of a block whose queries, keys and values are (batch, tokens, heads, size) each."""

    def __call__(
        self, block: "TransformerBlock", q: Array, k: Array, v: Array, *, train: bool, first_batch: bool
    ) -> tuple[Array, Attention]:
        """Returns the context, shaped like the queries, and the probabilities."""


class Reduce(Protocol):
    """The linear layer of Swin's patch merging, a module called "reduction"."""

    def __call__(self, config: Any, features: int, x: Array, *, first_batch: bool) -> Array:
        """Returns (batch, tokens, features) in the compute dtype."""


Dense = Callable[[Any, int, Array, str], Array]


@dataclass(frozen=True)
class Layers:
    """What a block is made of; each makes its modules and parameters inside the module that calls it.

    The configuration that they take is that of the block, a `TransformerConfig` or a subclass.

    Attributes:
      dense: applies a linear layer, given configuration, features, input and the name of its module.
      attend: attention.
      activate: the activation of the feed-forward branch.
      reduce: the linear layer between Swin's stages.
    """

    dense: Dense
    attend: Attend
    activate: Callable[[Array], Array]
    reduce: Reduce


def dense(config: TransformerConfig, features: int, x: Array, name: str) -> Array:
    """Applies a real linear layer with bias."""
    return real_dense(features, x.shape[-1], config.weight_init, config.dtype, name)(x)


def attend(
    block: "TransformerBlock", q: Array, k: Array, v: Array, *, train: bool, first_batch: bool = False
) -> tuple[Array, Attention]:
    """Computes real attention; see `Attend`."""
    del first_batch
    c = block.config
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=accumulator_dtype(c.dtype))
    probs = block.probabilities(scores / math.sqrt(q.shape[-1])).astype(c.dtype)
    kept = nn.Dropout(c.attention_dropout)(probs, deterministic=not train)
    return weighted_sum(kept, v), Attention(probs, probs)


def gelu(x: Array) -> Array:
    """Returns the exact GELU."""
    return nn.gelu(x, approximate=False)


def reduce(config: TransformerConfig, features: int, x: Array, *, first_batch: bool = False) -> Array:
    """Applies a real linear layer without bias; see `Reduce`."""
    del first_batch
    init = kernel_init(config.weight_init, x.shape[-1])
    layer = nn.Dense(features, use_bias=False, dtype=config.dtype, kernel_init=init, name="reduction")
    return layer(x.astype(config.dtype))


REAL = Layers(dense, attend, gelu, reduce)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward.

    With a ``window`` the tokens are a grid, attention stays inside its windows, and a learned bias for
    each relative position is added to the scores.

    Returns:
      Tokens (batch, tokens, channels) and attention probabilities, (batch, heads, tokens, tokens) or
      (batch * windows, heads, window tokens, window tokens).
    """

    num_heads: int
    mlp_dim: int
    drop_path: float | Array
    config: TransformerConfig
    window: Window | None = None
    layers: Layers = REAL

    @nn.compact
    def __call__(self, x: Array, *, train: bool, first_batch: bool = False) -> tuple[Array, Attention]:
        c, layers = self.config, self.layers
        y = LayerNorm(c.norm_epsilon, name="attention_norm")(x)
        y = y if self.window is None else self.window.split(y)
        y, attention = self._attention(y, train=train, first_batch=first_batch)
        y = y if self.window is None else self.window.join(y)
        x = x + DropPath(self.drop_path)(y, train=train)

        y = LayerNorm(c.norm_epsilon, name="mlp_norm")(x)
        y = layers.dense(c, self.mlp_dim, y, "mlp_in")
        with jax.named_scope(ACTIVATION_SCOPE):
            y = layers.activate(y)
        y = layers.dense(c, x.shape[-1], y, "mlp_out").astype(c.dtype)
        y = nn.Dropout(c.dropout)(y, deterministic=not train)
        return x + DropPath(self.drop_path)(y, train=train), attention

    def _attention(self, x: Array, *, train: bool, first_batch: bool) -> tuple[Array, Attention]:
        c, layers = self.config, self.layers
        batch, tokens, width = x.shape
        split = (batch, tokens, self.num_heads, -1)
        q, k, v = (layers.dense(c, width, x, name).reshape(split) for name in ("query", "key", "value"))
        context, attention = layers.attend(self, q, k, v, train=train, first_batch=first_batch)
        y = layers.dense(c, width, context.reshape(batch, tokens, width), "attention_output").astype(c.dtype)
        return nn.Dropout(c.dropout)(y, deterministic=not train), attention

    def probabilities(self, scores: Array) -> Array:
        """Returns the softmax of scores (batch, heads, tokens, keys), with the biases of a window."""
        if self.window is not None:
            shape = (self.window.num_offsets, self.num_heads)
            table = self.param("position_bias", normal_init, shape)
            scores = self.window.add_bias(scores, table)
        return softmax(scores)
