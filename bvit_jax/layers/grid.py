"""Tokens as a square grid: patches, pooling and its gradients, repetition."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

POOLING_SCOPE = "pooling"


def extract_patches(x: Array, size: int) -> Array:
    """Splits (batch, height, width, channels) into (batch, tokens, size * size * channels)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def to_grid(x: Array) -> Array:
    """Lays (batch, tokens, channels) out as the square (batch, side, side, channels)."""
    side = math.isqrt(x.shape[1])
    return x.reshape(x.shape[0], side, side, x.shape[2])


def to_tokens(x: Array) -> Array:
    """Flattens (batch, height, width, channels) to (batch, tokens, channels)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


@jax.named_scope(POOLING_SCOPE)
def average_pool(x: Array, size: int) -> Array:
    """Averages each ``size``×``size`` square of a square token grid, stride ``size``."""
    batch, tokens, channels = x.shape
    side = math.isqrt(tokens) // size
    return jnp.mean(x.reshape(batch, side, size, side, size, channels), axis=(2, 4)).reshape(
        batch, side * side, channels
    )


def upsample(x: Array, factor: int) -> Array:
    """Repeats each token of a square grid ``factor``×``factor`` times (nearest neighbour)."""
    return to_tokens(jnp.repeat(jnp.repeat(to_grid(x), factor, axis=1), factor, axis=2))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@jax.named_scope(POOLING_SCOPE)
def average_line(x: Array, size: int, axis: int) -> Array:
    """Averages ``size`` neighbours along one axis with stride 1; zeros beyond the ends count in the mean.

    Args:
      x: (batch, height, width, channels).
      size: odd.
      axis: 1 or 2.
    """
    reach = size // 2
    padding = [(0, 0)] * x.ndim
    padding[axis] = (reach, reach)
    # The barrier keeps XLA from computing the producer of x once for every window.
    padded = jnp.pad(lax.optimization_barrier(x), padding)
    length = x.shape[axis]
    windows = [lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size)]
    return sum(windows[1:], windows[0]) / size


# A symmetric window with zeros around it is its own transpose.
average_line.defvjp(
    lambda x, size, axis: (average_line(x, size, axis), None),
    lambda size, axis, _, gradient: (average_line(gradient, size, axis),),
)


def tile_channels(x: Array, times: int) -> Array:
    """Repeats the channels ``times`` times: (..., channels) to (..., times * channels)."""
    return jnp.tile(x, (1,) * (x.ndim - 1) + (times,))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@jax.named_scope(POOLING_SCOPE)
def average_row(x: Array, size: int, axis: int) -> Array:
    """Computes `average_line` of a square grid whose tokens are in a row, (batch, tokens, channels).

    Neighbours along axis 1 of the grid are one side of the grid apart in the row; those along axis 2 are
    adjacent, except at the ends of a line. On a TPU this saves the copies between row and grid, and several
    lines read x once.
    """
    side, reach = math.isqrt(x.shape[1]), size // 2
    stride = side if axis == 1 else 1
    column = np.arange(x.shape[1]) % side
    padded = jnp.pad(x, ((0, 0), (reach * stride, reach * stride), (0, 0)))

    def window(offset: int) -> Array:
        start = (reach + offset) * stride
        values = lax.slice_in_dim(padded, start, start + x.shape[1], axis=1)
        inside = (column + offset >= 0) & (column + offset < side)
        return values if axis == 1 or inside.all() else jnp.where(inside[:, None], values, 0)

    windows = [window(offset) for offset in range(-reach, reach + 1)]
    return sum(windows[1:], windows[0]) / size


average_row.defvjp(
    lambda x, size, axis: (average_row(x, size, axis), None),
    lambda size, axis, _, gradient: (average_row(gradient, size, axis),),
)


@jax.named_scope(POOLING_SCOPE)
def average_channels(x: Array, size: int) -> Array:
    """Averages each ``size`` neighbouring channels: (..., channels) to (..., channels / size)."""
    return jnp.mean(x.reshape(*x.shape[:-1], -1, size), axis=-1)


@jax.named_scope(POOLING_SCOPE)
def average_channel_slices(x: Array, size: int) -> Array:
    """Does what `average_channels` does by a sum of slices, in another order of the sum."""
    return sum((x[..., i::size] for i in range(1, size)), x[..., ::size]) / size
