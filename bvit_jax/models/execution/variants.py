"""Execution variants: two ways to compute the steps between the products of a block.

Both compute the same values. One is plain, the other arranged for a TPU that trains with integer products,
``remat="products"``; see `bvit_jax.models.execution.stages.Execution`.
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
class Variants:
    """One variant of each step; tokens are (batch, tokens, channels) of a square grid.

    Attributes:
      pool: averages squares of tokens; takes the side of a square.
      repeat: repeats each token over a square; takes its side.
      average_line: averages neighbours in a line of the grid; takes their number and the grid axis, 1 or 2.
      tile: repeats the channels; takes the number of copies.
      mean_channels: averages groups of neighbouring channels; takes the size of a group.
      materialize: writes an array that several steps read to memory once, in the compute dtype.
    """

    pool: Callable[[Array, int], Array]
    repeat: Callable[[Array, int], Array]
    average_line: Callable[[Array, int, int], Array]
    tile: Callable[[Array, int], Array]
    mean_channels: Callable[[Array, int], Array]
    materialize: Callable[[Array], Array]


def plain_variants(*, train: bool) -> Variants:
    """Returns the steps as `bvit_jax.layers.grid` computes them."""
    return Variants(
        pool=grid.average_pool,
        repeat=grid.upsample,
        average_line=_average_line,
        tile=grid.tile_channels,
        # Without a backward pass, XLA's CPU backend is faster with a sum of slices than with a reduction.
        mean_channels=_of_accumulated(grid.average_channels if train else grid.average_channel_slices),
        materialize=lambda x: x,
    )


def integer_variants(dtype: DTypeLike) -> Variants:
    """Returns the steps for training with integer products; most multiply by a constant matrix."""
    return Variants(
        pool=lambda x, size: grid_products.mean_tokens(x, size).astype(x.dtype),
        repeat=lambda x, factor: grid_products.repeat_tokens(x.astype(dtype), factor),
        average_line=lambda x, size, axis: grid.average_row(_accumulated(x), size, axis),
        tile=grid_products.tile_channels,
        mean_channels=grid_products.mean_channels,
        materialize=partial(_materialize, dtype=dtype),
    )


def _accumulated(x: Array) -> Array:
    return x.astype(accumulator_dtype(x.dtype))


def _average_line(x: Array, size: int, axis: int) -> Array:
    return grid.to_tokens(grid.average_line(grid.to_grid(x), size, axis))


def _of_accumulated(average: Callable[[Array, int], Array]) -> Callable[[Array, int], Array]:
    return lambda x, size: average(_accumulated(x), size)


def _materialize(x: Array, dtype: DTypeLike) -> Array:
    # Without the barrier, the TPU compiler stores several functions of the array instead, mostly in float32.
    return lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)
