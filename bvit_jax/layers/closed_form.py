"""Layer functions with closed-form gradients that save only their inputs for the backward pass.

Automatic differentiation saves an intermediate array for every operation; in a binary network, whose products
are cheap, writing and reading those is most of a training step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

STATISTICS = "batch_statistics"  # the name by which a rematerialisation policy finds means and variances
BATCH_NORM_SCOPE = "batch_norm"  # the scope by which `bvit_jax.plan.hlo` finds the collectives of batch norms

Channels = Float[Array, "*batch channels"]
Vector = Float[Array, " channels"]


def _sum_to_channels(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)))


@jax.custom_vjp
def rprelu(x: Channels, move1: Vector, slope: Vector, move2: Vector) -> Channels:
    """Returns ``prelu(x - move1) + move2``."""
    shifted = x - move1
    return jnp.where(shifted > 0, shifted, slope * shifted) + move2


def _rprelu_forward(x: Array, move1: Array, slope: Array, move2: Array) -> tuple[Array, tuple]:
    return rprelu(x, move1, slope, move2), (x, move1, slope)


def _rprelu_backward(residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, Array]:
    x, move1, slope = residuals
    shifted = x - move1
    positive = shifted > 0
    to_x = jnp.where(positive, gradient, slope * gradient)
    to_slope = _sum_to_channels(jnp.where(positive, 0, gradient * shifted))
    return to_x, -_sum_to_channels(to_x), to_slope, _sum_to_channels(gradient)


rprelu.defvjp(_rprelu_forward, _rprelu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
@jax.named_scope(BATCH_NORM_SCOPE)
def batch_norm(
    x: Channels, scale: Vector, bias: Vector, epsilon: float, shift: Vector | None = None
) -> tuple[Channels, Vector, Vector]:
    """Normalises by the mean and the biased variance over every axis but the last.

    Args:
      epsilon: added to the variance.
      shift: None, or an estimate of the mean, to compute mean and variance in one pass; see `moments`.

    Returns:
      The normalised input, the mean and the variance; no gradient passes through the latter two.
    """
    return _batch_norm(x, scale, bias, epsilon, shift)


def moments(x: Channels, axes: tuple[int, ...], shift: Vector | None = None) -> tuple[Array, Array]:
    """Returns the mean and the biased variance over ``axes``, named `STATISTICS`.

    Without a ``shift`` in two passes: the second needs the mean from the first, which on many devices costs a
    second all-reduce. With a shift s in one pass: the sums of x - s and of its square, which devices exchange
    together. The variance is then a difference, var = E[(x - s)^2] - (E[x] - s)^2, with a relative error of
    2^-24 · (1 + (E[x] - s)^2 / var) in float32: negligible where s is within some ten standard deviations of
    the mean, as the running mean is.
    """
    if shift is None:
        mean = checkpoint_name(jnp.mean(x, axis=axes), STATISTICS)
        centred = x - jnp.expand_dims(mean, axes)
        return mean, checkpoint_name(jnp.mean(jnp.square(centred), axis=axes), STATISTICS)
    shifted = x - shift
    offset = jnp.mean(shifted, axis=axes)
    var = jnp.maximum(jnp.mean(jnp.square(shifted), axis=axes) - jnp.square(offset), 0)
    return checkpoint_name(shift + offset, STATISTICS), checkpoint_name(var, STATISTICS)


def _batch_norm(
    x: Array, scale: Array, bias: Array, epsilon: float, shift: Array | None
) -> tuple[Array, Array, Array]:
    mean, var = moments(x, tuple(range(x.ndim - 1)), shift)
    return (x - mean) * (scale * lax.rsqrt(var + epsilon)) + bias, mean, var


@jax.named_scope(BATCH_NORM_SCOPE)
def _batch_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, shift: Array | None
) -> tuple[tuple, tuple]:
    # Not `batch_norm`, within which no rematerialisation policy would see the statistics.
    y, mean, var = _batch_norm(x, scale, bias, epsilon, shift)
    return (y, mean, var), (x, scale, mean, var)


@jax.named_scope(BATCH_NORM_SCOPE)
def _batch_norm_backward(epsilon: float, residuals: tuple, gradients: tuple) -> tuple[Array | None, ...]:
    x, scale, mean, var = residuals
    gradient, _, _ = gradients
    inverse = lax.rsqrt(var + epsilon)
    normalized = (x - mean) * inverse
    to_bias = _sum_to_channels(gradient)
    to_scale = _sum_to_channels(gradient * normalized)
    count = x.size // x.shape[-1]
    to_x = (scale * inverse) * (gradient - to_bias / count - normalized * (to_scale / count))
    return to_x, to_scale, to_bias, None


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def grouped_batch_norm(
    x: Channels, scale: Vector, bias: Vector, epsilon: float, groups: int, shift: Vector | None = None
) -> tuple[Channels, Float[Array, "{groups} channels"], Float[Array, "{groups} channels"]]:
    """Normalises each of ``groups`` equal parts of the first axis as `batch_norm` does the whole.

    Returns:
      The normalised input, and mean and variance of each group; no gradient passes through the latter two.
    """
    parts = x.reshape(groups, -1, x.shape[-1])
    y, mean, var = jax.vmap(lambda part: batch_norm(part, scale, bias, epsilon, shift))(parts)
    return y.reshape(x.shape), mean, var
