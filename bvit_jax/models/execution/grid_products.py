"""Tokens and channels repeated and averaged by products with constant matrices.

A TPU holds a tile of tokens and channels side by side, so that repeating and averaging them by reshaping
costs passes over memory. A product with a constant matrix of zeros and ones does not. Repeating by it is
exact, and so is each term of an average; the products are those of the dtype of x, and what is returned is
its accumulator, float32 at least.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.binary.products import accumulator_dtype

TOKENS, CHANNELS = -2, -1
Matrix = Callable[[], np.ndarray]  # (length of the axis before, after)


def tile_channels(x: Array, times: int) -> Array:
    """Repeats the channels as `jnp.tile` does: (..., channels) to (..., times * channels)."""
    channels = x.shape[-1]
    return _product(x, lambda: np.tile(np.eye(channels), (1, times)), CHANNELS, x.dtype)


def mean_channels(x: Array, size: int) -> Array:
    """Computes `bvit_jax.layers.grid.average_channels`: (..., channels) to (..., channels / size)."""
    groups = x.shape[-1] // size
    return _product(x, lambda: np.repeat(np.eye(groups), size, axis=0), CHANNELS, x.dtype) / size


def repeat_tokens(x: Array, factor: int) -> Array:
    """Computes `bvit_jax.layers.grid.upsample`: (..., tokens, channels) to (..., more, channels)."""
    side = factor * math.isqrt(x.shape[-2])
    return _product(x, lambda: _to_squares(side, factor).T, TOKENS, x.dtype)


def mean_tokens(x: Array, size: int) -> Array:
    """Computes `bvit_jax.layers.grid.average_pool`: (..., tokens, channels) to (..., fewer, channels)."""
    side = math.isqrt(x.shape[-2])
    return _product(x, lambda: _to_squares(side, size), TOKENS, x.dtype) / size**2


def _to_squares(side: int, size: int) -> np.ndarray:
    row, column = np.divmod(np.arange(side**2), side)
    squares = side // size
    return np.eye(squares**2)[row // size * squares + column // size]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _product(x: Array, matrix: Matrix, axis: int, dtype: DTypeLike) -> Array:
    return _matmul(x, matrix(), axis, dtype)


def _matmul(x: Array, matrix: np.ndarray, axis: int, dtype: DTypeLike) -> Array:
    x, constant = x.astype(dtype), jnp.array(matrix, dtype)
    left, right = (constant.T, x) if axis == TOKENS else (x, constant)
    # Without the precision a TPU would round float32 to bfloat16.
    return jnp.matmul(left, right, precision="highest", preferred_element_type=accumulator_dtype(dtype))


def _product_backward(
    matrix: Matrix, axis: int, dtype: DTypeLike, residuals: None, gradient: Array
) -> tuple[Array]:
    del residuals
    return (_matmul(gradient, matrix().T, axis, dtype).astype(dtype),)


_product.defvjp(lambda x, *static: (_product(x, *static), None), _product_backward)
