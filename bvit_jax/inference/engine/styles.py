"""The operations with the norms of a model: folded batch norms, or layer norms.

A layer norm is computed from each token, so that nothing of it is known before; its units are `ScaledUnit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary import units
from bvit_jax.inference.engine import operations
from bvit_jax.inference.engine.levels import Operations
from bvit_jax.inference.engine.operations import Context, End, Outputs, Tokens
from bvit_jax.inference.engine.parameters import ScaledUnit
from bvit_jax.layers.grid import (
    average_channel_slices,
    average_pool,
    extract_patches,
    tile_channels,
    to_grid,
)


@dataclass(frozen=True)
class Normalised:
    """Layer norms of some epsilon around the counts of other operations."""

    epsilon: float
    counting: Operations

    def normalise(self, x: Tokens, factor: Array, shift: Array) -> Tokens:
        """Returns the norm of tokens."""
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return centred * lax.rsqrt(variance + self.epsilon) * factor + shift

    def unit(self, x: Tokens, u: ScaledUnit, shortcut: Tokens) -> Outputs:
        """Computes `operations.unit`."""
        y = self.normalise(self.counting.count(x, u.product) * u.scale, u.factor, u.shift)
        y += tile_channels(shortcut, y.shape[-1] // shortcut.shape[-1])
        return units.rprelu(y, u.slope, u.move2)

    def unit_end(
        self, x: Tokens, u: ScaledUnit, shortcut: Tokens, residual: Outputs, end: End
    ) -> tuple[Outputs, Outputs]:
        """Computes `operations.unit_end`."""
        r = residual + self.unit(x, u, shortcut) * end.alpha + end.move
        return r, self.normalise(r, end.factor, end.shift)

    def feed_forward(
        self, x: Tokens, expand: ScaledUnit, contract: ScaledUnit, residual: Tokens, end: End
    ) -> tuple[Tokens, Tokens]:
        """Computes `operations.feed_forward`."""
        hidden = self.unit(x, expand, x)
        shortcut = average_channel_slices(hidden, hidden.shape[-1] // x.shape[-1])
        return self.unit_end(hidden, contract, shortcut, residual, end)

    def downsample(
        self, n: Tokens, u: ScaledUnit, positions: Array, factor: Array, shift: Array
    ) -> tuple[Outputs, Outputs]:
        """Computes `operations.downsample`."""
        patches = extract_patches(to_grid(n), operations.STRIDE)
        x = self.unit(patches, u, average_pool(n, operations.STRIDE)) + positions
        return x, self.normalise(x, factor, shift)

    def attention(
        self,
        q: Tokens,
        k: Tokens,
        v: Tokens,
        moves: Array,
        norm: Context,
        scale: Array,
        num_heads: int,
        reduction: int,
    ) -> Tokens:
        """Computes `operations.attention`; the factor of ``norm`` is that of the layer norm alone."""
        counted = operations.attended(q, k, v, moves, scale, num_heads) * scale
        return self.follow(counted, norm, q + operations.repeated(k + v, reduction))

    def follow(self, counted: Tokens, norm: Context, shortcut: Tokens) -> Tokens:
        """Computes `operations.follow`."""
        shifted = self.normalise(counted, norm.factor, norm.shift) + shortcut
        return units.rprelu(shifted, norm.slope, norm.move2)


def with_norms(folded: Operations, settings: Mapping[str, Any]) -> Operations:
    """Returns operations with the norms of a model: those of layer norms in place of folded batch norms."""
    if settings["norm"] == "batch_norm":
        return folded
    own = Normalised(settings["norm_epsilon"], folded)
    return replace(
        folded,
        unit=own.unit,
        unit_end=own.unit_end,
        feed_forward=own.feed_forward,
        attention=own.attention,
        downsample=own.downsample,
        follow=own.follow,
        normalise=own.normalise,
    )
