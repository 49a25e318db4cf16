"""The value type of quantised tensors."""

from typing import NamedTuple

import jax
from jax import Array

from bvit_jax.imports.shapes import Float, Key


class Codes(NamedTuple):
    """A quantised tensor, ``values * scale``.

    Products are taken of the values, which are small integers and therefore exact in bfloat16, and scaled
    afterwards.
    """

    values: Float[Array, "*shape"]
    scale: Float[Array, "*#shape"]

    def dequantize(self) -> Float[Array, "*shape"]:
        """Returns the real tensor."""
        return self.values * self.scale

    def dropped(self, rate: float, key: Key[Array, ""]) -> "Codes":
        """Returns the codes after dropout: some values are 0, and the scale makes up for them."""
        kept = jax.random.bernoulli(key, 1 - rate, self.values.shape)
        return Codes(self.values * kept.astype(self.values.dtype), self.scale / (1 - rate))
