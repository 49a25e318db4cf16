"""The product of a binary convolution, exact and with a hand-written gradient, as `products` are."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from bvit_jax.binary.products import PRODUCT, ProductConfig, accumulator_dtype, integer_dtype
from bvit_jax.binary.weights import WeightRule, weight_scale
from bvit_jax.imports.shapes import Bool, Float

Grid = Float[Array, "batch height width channels"]
Features = Float[Array, "batch height width features"]
Kernel = Float[Array, "rows columns channels_of_a_group features"]


GROUPS_SCOPE = "groups_of_channels_"  # and their number: the scope of a convolution that `cost` divides by it


class Geometry(NamedTuple):
    """Which inputs a convolution of odd size and stride 1 adds; hashable.

    It is computed as one convolution of all channels, with a kernel that is zero between groups. XLA's own
    convolutions in groups are no faster on matrix units, and their gradients on a CPU a hundred times slower.

    Attributes:
      dilation: distance of neighbouring inputs; the border has zeros, as many as keep the size.
      groups: of channels that do not mix.
    """

    dilation: int
    groups: int

    def convolve(self, x: Grid, kernel: Kernel) -> Features:
        """Returns the convolution in the accumulator of the operands' dtype."""
        with jax.named_scope(f"{GROUPS_SCOPE}{self.groups}"):
            return lax.conv_general_dilated(
                x,
                self._between_all(kernel),
                window_strides=(1, 1),
                padding=self._padding(kernel.shape[0]),
                rhs_dilation=(self.dilation,) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                preferred_element_type=accumulator_dtype(x.dtype),
            )

    def input_gradient(self, gradient: Features, kernel: Kernel) -> Grid:
        """Returns the gradient of the input from that of the result, the transpose of `convolve`.

        It is the convolution with the kernel turned around, whose inputs are the outputs of each group.
        """
        rows, columns, inputs, features = kernel.shape
        turned = kernel[::-1, ::-1].reshape(rows, columns, inputs, self.groups, -1)
        turned = turned.transpose(0, 1, 4, 3, 2)
        return self.convolve(gradient, turned.reshape(rows, columns, features // self.groups, -1))

    def kernel_gradient(self, x: Grid, gradient: Features, size: int) -> Kernel:
        """Returns the gradient of a kernel of ``size`` rows, the other transpose of `convolve`.

        It is a convolution too, that sums over the batch: images take the place of channels.
        """
        between_all = lax.conv_general_dilated(
            x,
            gradient,
            window_strides=(self.dilation,) * 2,
            padding=self._padding(size),
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            preferred_element_type=accumulator_dtype(x.dtype),
        )
        channels, features = between_all.shape[2:]
        own = jnp.where(self._own(channels, features), between_all, 0)
        return own.reshape(size, size, self.groups, channels // self.groups, features).sum(axis=2)

    def _between_all(self, kernel: Kernel) -> Float[Array, "rows columns channels features"]:
        """Returns the kernel of all channels, zero between groups."""
        inputs, features = kernel.shape[2:]
        every = jnp.tile(kernel, (1, 1, self.groups, 1))
        return jnp.where(self._own(self.groups * inputs, features), every, 0)

    def _own(self, channels: int, features: int) -> Bool[np.ndarray, "channels features"]:
        """Returns which channels are in the group of each feature."""
        groups = np.arange(self.groups)
        return np.repeat(groups, channels // self.groups)[:, None] == np.repeat(
            groups, features // self.groups
        )

    def _padding(self, size: int) -> list[tuple[int, int]]:
        reach = self.dilation * (size // 2)
        return [(reach, reach)] * 2


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def binary_convolution(
    x: Grid,
    move: Float[Array, " channels"],
    kernel: Kernel,
    rule: WeightRule,
    geometry: Geometry,
    config: ProductConfig,
) -> Features:
    """Returns the convolution of ``sign(x + move)`` with the kernel as ``rule`` quantises it.

    The zeros of the border come after the sign. Arguments, gradients and dtypes are those of
    `bvit_jax.binary.products.binary_product`.
    """
    return _forward(x, move, kernel, rule, geometry, config)[0]


def _forward(
    x: Array, move: Array, kernel: Array, rule: WeightRule, geometry: Geometry, config: ProductConfig
) -> tuple[Array, tuple[Array, Array, Array]]:
    shifted = x.astype(accumulator_dtype(config.dtype)) + move
    operand = config.signs(shifted) if config.binary_input else shifted.astype(config.dtype)
    y = geometry.convolve(operand, rule.codes(kernel).astype(operand.dtype))
    if config.integer_products:
        terms = kernel.size // kernel.shape[-1]
        y = checkpoint_name(y.astype(integer_dtype(terms)) if config.binary_input else y, PRODUCT)
    return y.astype(accumulator_dtype(config.dtype)) * weight_scale(kernel), (x, move, kernel)


def _backward(
    rule: WeightRule,
    geometry: Geometry,
    config: ProductConfig,
    residuals: tuple[Array, Array, Array],
    gradient: Array,
) -> tuple[Array, Array, Array]:
    x, move, kernel = residuals
    dtype = config.dtype
    shifted = x.astype(accumulator_dtype(dtype)) + move
    operand = (config.signs(shifted) if config.binary_input else shifted).astype(dtype)
    to_kernel = geometry.kernel_gradient(operand, gradient.astype(dtype), kernel.shape[0])
    scaled = (gradient * weight_scale(kernel)).astype(dtype)
    to_shifted = geometry.input_gradient(scaled, rule.codes(kernel).astype(dtype))
    if config.binary_input:
        to_shifted *= config.estimator.slope(shifted)
    to_move = jnp.sum(to_shifted, axis=(0, 1, 2))
    to_kernel = rule.gradient(kernel, to_kernel.astype(kernel.dtype))
    return to_shifted.astype(x.dtype), to_move.astype(move.dtype), to_kernel


binary_convolution.defvjp(_forward, _backward)
