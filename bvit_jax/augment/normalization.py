"""Normalisation: from images to the input of a model."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from bvit_jax.imports.shapes import Float32, Num


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each colour, for images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Num[Array, "batch height width 3"]) -> Float32[Array, "batch height width 3"]:
        """Normalises images, which are from 0 to 255.

        Bit-identical to torchvision's ``ToTensor`` and ``Normalize`` wherever division rounds correctly.
        """
        mean, std = self._broadcastable(images.ndim)
        values = images.astype(jnp.float32)
        # The compiler turns division by a constant into multiplication by its rounded reciprocal. This zero
        # hides both divisors from it, at no cost in a loop that is bound by memory.
        zero = jnp.minimum(jnp.abs(values), 0)
        return (values / (255 + zero) - mean) / (std + zero)

    def inverse(self, normalised: Float32[Array, "*rest channels"]) -> Float32[Array, "*rest channels"]:
        """Returns the values on the scale from 0 to 255, which they may exceed."""
        mean, std = self._broadcastable(normalised.ndim)
        return (normalised * std + mean) * 255

    def _broadcastable(self, rank: int) -> tuple[Array, Array]:
        shape = (1,) * (rank - 1) + (-1,)
        mean, std = (jnp.array(values, jnp.float32).reshape(shape) for values in (self.mean, self.std))
        return mean, std
