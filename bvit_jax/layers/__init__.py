"""Flax modules with parameters of their own, and the functions of arrays that models put between them.

They serve your own Flax models as well as those of this package: binary linear layers and convolutions,
norms, activations, token grids. This room imports `bvit_jax.binary` and nothing else of the package.

Tokens are (batch, tokens, channels). Modules take activations in the compute dtype and return the
accumulator, float32 at least: ``BinaryDense(64)`` maps (..., channels) to (..., 64) and
``BinaryPatchConv(64, 2)`` maps (batch, height, width, channels) to (batch, height · width / 4, 64), while
``BatchNorm()``, ``RPReLU()`` and ``LayerScale(0.1)`` keep the shape. `noted_kernels` collects the kernels of
one bit of any model.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.layers.activation import DropPath, LayerScale, RPReLU, drop_path_rates, softmax
    from bvit_jax.layers.dense import BinaryConv, BinaryDense, BinaryPatchConv, BitDense, UncentredDense
    from bvit_jax.layers.grid import (
        average_channels,
        average_line,
        average_pool,
        extract_patches,
        tile_channels,
        to_grid,
        to_tokens,
        upsample,
    )
    from bvit_jax.layers.kernels import active_weights, flipped, noted_kernels, pack_signs
    from bvit_jax.layers.norm import BatchNorm, LayerNorm

__all__ = [
    "BatchNorm",
    "BinaryConv",
    "BinaryDense",
    "BinaryPatchConv",
    "BitDense",
    "DropPath",
    "LayerNorm",
    "LayerScale",
    "RPReLU",
    "UncentredDense",
    "active_weights",
    "average_channels",
    "average_line",
    "average_pool",
    "drop_path_rates",
    "extract_patches",
    "flipped",
    "noted_kernels",
    "pack_signs",
    "softmax",
    "tile_channels",
    "to_grid",
    "to_tokens",
    "upsample",
]

__getattr__ = lazily(__name__)
