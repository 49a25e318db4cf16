"""The steps between the products of a block, in the forms that they are computed in.

Each does the same in both forms: one is plain, the other arranged for a TPU that trains with products kept
as whole numbers, ``remat="products"``; see `bvit_jax.models.execution.stages.Execution`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jax import Array, lax
from jax.typing import DTypeLike

from bvit_jax.binary.products import accumulator_dtype
from bvit_jax.layers import grid
from bvit_jax.models.execution import grid_products


@dataclass(frozen=True)
class Forms:
    """One form of each step; tokens are (batch, tokens, channels) of a square grid.

    Attributes:
      pool: averages squares of tokens, given their side.
      repeat: repeats each token on a square, given its side.
      average_line: averages neighbours in a line of the grid, given their number and the grid's axis, 1 or 2.
      tile: repeats the channels, given how often.
      mean_channels: averages neighbouring channels, given their number.
      settle: returns an array that several others are computed from.
    """

    pool: Callable[[Array, int], Array]
    repeat: Callable[[Array, int], Array]
    average_line: Callable[[Array, int, int], Array]
    tile: Callable[[Array, int], Array]
    mean_channels: Callable[[Array, int], Array]
    settle: Callable[[Array], Array]


def plain_forms(*, train: bool) -> Forms:
    """Returns the forms of `bvit_jax.layers.grid`."""
    return Forms(
        pool=grid.average_pool,
        repeat=grid.upsample,
        average_line=_average_line,
        tile=grid.tile_channels,
        mean_channels=partial(_mean_channels, train=train),
        settle=lambda x: x,
    )


def whole_forms(dtype: DTypeLike) -> Forms:
    """Returns the forms for training with whole products in a compute dtype: most are products themselves."""
    return Forms(
        pool=lambda x, size: grid_products.mean_tokens(x, size).astype(x.dtype),
        repeat=lambda x, factor: grid_products.repeat_tokens(x.astype(dtype), factor),
        average_line=lambda x, size, axis: grid.average_row(_accumulated(x), size, axis),
        tile=grid_products.tile_channels,
        mean_channels=grid_products.mean_channels,
        settle=partial(_settle, dtype=dtype),
    )


def _accumulated(x: Array) -> Array:
    return x.astype(accumulator_dtype(x.dtype))


def _average_line(x: Array, size: int, axis: int) -> Array:
    return grid.to_tokens(grid.average_line(grid.to_grid(x), size, axis))


def _mean_channels(x: Array, size: int, *, train: bool) -> Array:
    return grid.average_channels(_accumulated(x), size, train=train)


def _settle(x: Array, dtype: DTypeLike) -> Array:
    # Rounded and written to memory so. Left to itself, the TPU compiler writes several functions of such an
    # array, most of them in float32.
    return lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)
