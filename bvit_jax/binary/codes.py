"""The value type of quantised tensors."""

from typing import NamedTuple

import jax
from jax import Array


class Codes(NamedTuple):
    """A quantised tensor, ``values * scale``.

    Products are taken of the values, which are small integers and therefore exact in bfloat16, and scaled
    afterwards.

    Attributes:
      values: integers in a floating-point dtype, any shape.
      scale: real; broadcasts against ``values``.
    """

    values: Array
    scale: Array

    def dequantize(self) -> Array:
        """Returns the real tensor, in the shape of the values."""
        return self.values * self.scale

    def dropped(self, rate: float, key: Array) -> "Codes":
        """Returns the codes after dropout: some values are 0, and the scale makes up for them."""
        kept = jax.random.bernoulli(key, 1 - rate, self.values.shape)
        return Codes(self.values * kept, self.scale / (1 - rate))
