"""The value type of quantised tensors."""

from typing import NamedTuple

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
