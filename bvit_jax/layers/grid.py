"""Tokens as a square grid: patches, pooling and its gradients, repetition."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bvit_jax.imports.shapes import Float

POOLING_SCOPE = "pooling"

Grid = Float[Array, "batch height width channels"]
Tokens = Float[Array, "batch tokens channels"]
Channels = Float[Array, "*batch channels"]
Averaged = Float[Array, "*batch channels//{size}"]


def extract_patches(x: Grid, size: int) -> Float[Array, "batch tokens {size}**2*channels"]:
    """Splits a grid into squares, each of which becomes a token."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def to_grid(x: Tokens) -> Float[Array, "batch side side channels"]:
    """Lays tokens out as a square."""
    side = math.isqrt(x.shape[1])
    return x.reshape(x.shape[0], side, side, x.shape[2])


def to_tokens(x: Grid) -> Float[Array, "batch height*width channels"]:
    """Lays the rows of a grid side by side."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


@jax.named_scope(POOLING_SCOPE)
def average_pool(x: Tokens, size: int) -> Float[Array, "batch tokens//{size}**2 channels"]:
    """Averages each ``size``×``size`` square of a square token grid, stride ``size``."""
    batch, tokens, channels = x.shape
    side = math.isqrt(tokens) // size
    return jnp.mean(x.reshape(batch, side, size, side, size, channels), axis=(2, 4)).reshape(
        batch, side * side, channels
    )


def upsample(x: Tokens, factor: int) -> Float[Array, "batch tokens*{factor}**2 channels"]:
    """Repeats each token of a square grid ``factor``×``factor`` times (nearest neighbour)."""
    return to_tokens(jnp.repeat(jnp.repeat(to_grid(x), factor, axis=1), factor, axis=2))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@jax.named_scope(POOLING_SCOPE)
def average_line(x: Grid, size: int, axis: int) -> Grid:
    """Averages ``size`` neighbours along one axis with stride 1; zeros beyond the ends count in the mean.

    The size is odd, the axis 1 or 2.
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


def tile_channels(x: Channels, times: int) -> Float[Array, "*batch {times}*channels"]:
    """Repeats the channels ``times`` times."""
    return jnp.concatenate([x] * times, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@jax.named_scope(POOLING_SCOPE)
def average_row(x: Tokens, size: int, axis: int) -> Tokens:
    """Computes `average_line` of a square grid whose tokens are in a row.

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
def average_channels(x: Channels, size: int) -> Averaged:
    """Averages each ``size`` neighbouring channels."""
    return jnp.mean(x.reshape(*x.shape[:-1], -1, size), axis=-1)


@jax.named_scope(POOLING_SCOPE)
def average_channel_slices(x: Channels, size: int) -> Averaged:
    """Does what `average_channels` does by a sum of slices, in another order of the sum."""
    return sum((x[..., i::size] for i in range(1, size)), x[..., ::size]) / size


@jax.named_scope(POOLING_SCOPE)
def merge_tokens(
    x: Tokens, size: int, share: Float[Array, "1 1 channels"]
) -> Float[Array, "batch tokens//{size}**2 channels"]:
    """Merges squares of a grid, ``share`` of their maximum and the rest of their average.

    The squares, ``size`` tokens apart, begin (size - 1) // 2 before the grid; the average counts zeros there.
    Among equal maxima the gradient goes to the first in row order. Sums, and the result, are in the dtype of
    ``share`` at least.
    """
    reach, shape = (size - 1) // 2, (1, size, size, 1)
    padding = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    grid = to_grid(x).astype(jnp.promote_types(x.dtype, share.dtype))
    largest = lax.reduce_window(grid, -jnp.inf, lax.max, shape, shape, padding)
    average = lax.reduce_window(grid, 0.0, lax.add, shape, shape, padding) / size**2
    return share * to_tokens(largest) + (1 - share) * to_tokens(average)


@jax.named_scope(POOLING_SCOPE)
def mean_shift(x: Grid, size: int, axis: int) -> Grid:
    """Averages ``size`` neighbours along one axis of a grid, around which it continues at its other end."""
    reach = size // 2
    return sum((jnp.roll(x, i, axis) for i in range(-reach, reach + 1) if i), x) / size


def channel_shift(x: Grid, distance: int) -> Grid:
    """Rolls the quarters of the channels of a grid down, up, right and left."""
    moves = zip((1, 1, 2, 2), (distance, -distance, distance, -distance), strict=True)
    quarters = jnp.split(x, 4, axis=-1)
    return jnp.concatenate([jnp.roll(q, by, axis) for q, (axis, by) in zip(quarters, moves, strict=True)], -1)
