"""Tokens and channels repeated and averaged by products with constant matrices.

A TPU holds a tile of tokens and channels side by side, so that repeating and averaging them by reshaping
costs passes over memory. A product with a constant matrix of zeros and ones does not. Repeating by it is
exact, and so is each term of an average; the products are those of the dtype of x, their sums float32 at
least.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

TOKENS, CHANNELS = -2, -1
Matrix = Callable[[], np.ndarray]  # (length of the axis before, after)


def tile_channels(x: Array, times: int) -> Array:
    """Repeats the channels, the last axis, ``times`` times, as `jnp.tile` does.

    Returns:
      (..., times * channels) in the accumulator of x's dtype.
    """
    return _product(x, partial(_tiling, x.shape[-1], times), CHANNELS, x.dtype)


def mean_channels(x: Array, size: int) -> Array:
    """Averages each ``size`` neighbouring channels, as `bvit_jax.layers.grid.average_channels` does.

    Returns:
      (..., channels / size) in the accumulator of x's dtype.
    """
    return _product(x, partial(_groups, x.shape[-1], size), CHANNELS, x.dtype) / size


def repeat_tokens(x: Array, factor: int) -> Array:
    """Repeats each token of a square grid ``factor``×``factor`` times, as `bvit_jax.layers.grid.upsample`
    does.

    Args:
      x: (..., tokens, channels).
      factor: of each side.

    Returns:
      (..., factor² * tokens, channels) in the accumulator of x's dtype.
    """
    side = factor * math.isqrt(x.shape[-2])
    return _product(x, partial(_of_squares, side, factor), TOKENS, x.dtype)


def mean_tokens(x: Array, size: int) -> Array:
    """Averages each ``size``×``size`` square of a square token grid, as
    `bvit_jax.layers.grid.average_pool` does.

    Args:
      x: (..., tokens, channels).
      size: a divisor of the grid's side.

    Returns:
      (..., tokens / size², channels) in the accumulator of x's dtype.
    """
    side = math.isqrt(x.shape[-2])
    return _product(x, partial(_to_squares, side, size), TOKENS, x.dtype) / size**2


def _tiling(channels: int, times: int) -> np.ndarray:
    return np.tile(np.eye(channels), (1, times))


def _groups(channels: int, size: int) -> np.ndarray:
    return np.repeat(np.eye(channels // size), size, axis=0)


def _to_squares(side: int, size: int) -> np.ndarray:
    row, column = np.divmod(np.arange(side**2), side)
    squares = side // size
    return np.eye(squares**2)[row // size * squares + column // size]


def _of_squares(side: int, size: int) -> np.ndarray:
    return _to_squares(side, size).T


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _product(x: Array, matrix: Matrix, axis: int, dtype: DTypeLike) -> Array:
    return _matmul(x, matrix(), axis, dtype)


def _matmul(x: Array, matrix: np.ndarray, axis: int, dtype: DTypeLike) -> Array:
    x, constant = x.astype(dtype), jnp.array(matrix, dtype)
    left, right = (constant.T, x) if axis == TOKENS else (x, constant)
    accumulator = jnp.promote_types(dtype, jnp.float32)
    # Without the precision a TPU would round float32 to bfloat16.
    return jnp.matmul(left, right, precision="highest", preferred_element_type=accumulator)


def _product_backward(
    matrix: Matrix, axis: int, dtype: DTypeLike, residuals: None, gradient: Array
) -> tuple[Array]:
    del residuals
    return (_matmul(gradient, matrix().T, axis, dtype).astype(dtype),)


_product.defvjp(lambda x, *static: (_product(x, *static), None), _product_backward)
