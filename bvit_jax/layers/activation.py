"""RPReLU, LayerScale, stochastic depth, softmax and the sum it weights."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from bvit_jax.layers import closed_form
from bvit_jax.layers.closed_form import Channels

# Scopes by which `bvit_jax.cost` attributes operations to layers.
ACTIVATION_SCOPE = "activation"
SOFTMAX_SCOPE = "softmax"


class RPReLU(nn.Module):
    """``prelu(x - move1) + move2`` with a slope per channel; slopes start at 0.25, moves at 0."""

    @nn.compact
    def __call__(self, x: Channels) -> Channels:
        channels = (x.shape[-1],)
        move1 = self.param("move1", nn.initializers.zeros, channels)
        slope = self.param("slope", nn.initializers.constant(0.25), channels)
        move2 = self.param("move2", nn.initializers.zeros, channels)
        return closed_form.rprelu(x, move1, slope, move2)


class LayerScale(nn.Module):
    """The affine map before a residual addition, ``x * alpha + move`` per channel."""

    alpha_init: float

    @nn.compact
    def __call__(self, x: Channels) -> Channels:
        channels = (x.shape[-1],)
        alpha = self.param("alpha", nn.initializers.constant(self.alpha_init), channels)
        return x * alpha + self.param("move", nn.initializers.zeros, channels)


class DropPath(nn.Module):
    """Drops a residual branch per sample with probability ``rate`` (stochastic depth).

    A rate that is an array, as in a scan over blocks, may be traced; it must be below 1.
    """

    rate: float | Float[Array, ""]

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *, train: bool) -> Float[Array, "*shape"]:
        if not isinstance(self.rate, Array):
            drop = nn.Dropout(self.rate, broadcast_dims=tuple(range(1, x.ndim)))
            return drop(x, deterministic=not train)
        if not train:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate).astype(x.dtype), 0)


def drop_path_rates(last: float, depth: int) -> tuple[float, ...]:
    """Returns the drop-path rate of each of ``depth`` blocks, rising linearly from 0 to ``last``."""
    return tuple(last * i / max(depth - 1, 1) for i in range(depth))


@jax.named_scope(SOFTMAX_SCOPE)
def softmax(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the softmax along the last axis."""
    return nn.softmax(scores)


def weighted_sum(
    weights: Float[Array, "batch heads queries keys"],
    values: Float[Array, "batch keys heads size"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "batch queries heads size"]:
    """Sums the values by the weights of each query, head by head.

    ``dtype`` is that of the sums, by default the operands'. XLA for CPUs (jaxlib 0.10) computes softmax and
    this product three times as fast if the heads come before the keys in memory, hence the transposition.
    """
    by_head = jnp.swapaxes(values, 1, 2)
    return jnp.einsum("bhqk,bhkd->bqhd", weights, by_head, preferred_element_type=dtype)
