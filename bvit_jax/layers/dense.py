"""Linear layers and patch convolutions, binary and real.

Activations are channels-last, (batch, tokens, channels). Modules take them in the compute dtype, do their
sums in float32 (float64 if the input is) and return that accumulator; a caller that keeps activations in
memory casts them back.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from bvit_jax.binary import products
from bvit_jax.binary.convolutions import Geometry, binary_convolution
from bvit_jax.binary.estimators import PARABOLA, Estimator, straight_through
from bvit_jax.binary.multibit import quantize_weight
from bvit_jax.binary.products import ProductConfig, accumulator_dtype
from bvit_jax.binary.weights import BITS, CONV, DENSE, WeightRule
from bvit_jax.layers import sown
from bvit_jax.layers.grid import Grid, extract_patches
from bvit_jax.layers.init import WeightInit, bias_init, kernel_init


class BinaryDense(nn.Module):
    """A linear layer without bias whose shifted input and weights are quantised, ``W · sign(x + move)``.

    Returns the accumulator of ``dtype``.

    Attributes:
      features: output channels.
      weight_bits: 1, or 2 to 8 per tensor after clipping to ±``clip_val``, or 32 for real weights.
      act_bits: with 1 the input goes through the sign; with any other number it stays real, as in BinaryViT
        (PyTorch).
      clip_val: see ``weight_bits``.
      weight_init: initialiser of the kernel.
      dtype: compute dtype.
      integer_products: see `bvit_jax.binary.products.ProductConfig`.
      estimator: the sign of the input and its gradient.
      rule: how weights of one bit are quantised.
    """

    features: int
    weight_bits: int = 1
    act_bits: int = 1
    clip_val: float = 2.5
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    integer_products: bool = False
    estimator: Estimator = PARABOLA
    rule: WeightRule = DENSE

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch {self.features}"]:
        fan_in = x.shape[-1]
        move = self.param("move", nn.initializers.zeros, (fan_in,))
        kernel = self.param("kernel", kernel_init(self.weight_init, fan_in), (fan_in, self.features))
        return _quantized_product(self, x, move, kernel)


class UncentredDense(nn.Module):
    """A linear layer without bias and shift whose input and weights are binarised, as in Bi-ViT.

    ``mean|W| · sign(W) · sign(x)``, the mean that of each output channel, in the accumulator of ``dtype``.
    For the attributes see `BinaryDense`; weights have one bit.
    """

    features: int
    act_bits: int = 1
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    estimator: Estimator = PARABOLA
    rule: WeightRule = CONV

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch {self.features}"]:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", kernel_init(self.weight_init, fan_in), (fan_in, self.features))
        if self.act_bits == 1:
            sown.watch_sign(self, x, self.estimator)
        config = ProductConfig(self.dtype, self.estimator, self.act_bits == 1)
        no_move = jnp.zeros(fan_in, accumulator_dtype(self.dtype))
        return products.binary_product(x, no_move, kernel, self.rule, config)


class BitDense(UncentredDense):
    """`UncentredDense` whose every sign is a bit: that of zero is 1."""

    estimator: Estimator = PARABOLA.bit
    rule: WeightRule = BITS


class BinaryPatchConv(nn.Module):
    """A convolution whose stride is its kernel size, shifted input and weights quantised, no bias.

    Returns the accumulator of ``dtype``. For the attributes see `BinaryDense`; ``patch_size`` must divide
    height and width.
    """

    features: int
    patch_size: int
    weight_bits: int = 1
    act_bits: int = 1
    clip_val: float = 2.5
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    integer_products: bool = False
    estimator: Estimator = PARABOLA
    rule: WeightRule = CONV

    @nn.compact
    def __call__(self, x: Grid) -> Float[Array, "batch tokens {self.features}"]:
        size, channels = self.patch_size, x.shape[-1]
        fan_in = size * size * channels
        shape = (size, size, channels, self.features)
        # Four dimensions as in PyTorch, where this shift, unlike all others, decays.
        move = self.param("move", nn.initializers.zeros, (1, 1, 1, channels))
        kernel = self.param("kernel", kernel_init(self.weight_init, fan_in), shape)
        move = jnp.tile(move.reshape(channels), size * size)
        return _quantized_product(self, extract_patches(x, size), move, kernel)


class BinaryConv(nn.Module):
    """A 3×3 convolution of stride 1 in groups, ``W · sign(x + move) + bias``.

    The zeros of the border come after the sign. ``move`` belongs to the caller. Returns the accumulator of
    ``dtype``. For the other attributes see `BinaryDense` and `bvit_jax.binary.convolutions.Geometry`.
    """

    features: int
    dilation: int
    groups: int
    weight_bits: int = 1
    act_bits: int = 1
    clip_val: float = 2.5
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    integer_products: bool = False
    estimator: Estimator = PARABOLA
    rule: WeightRule = DENSE

    @nn.compact
    def __call__(
        self, x: Grid, move: Float[Array, " channels"]
    ) -> Float[Array, "batch height width {self.features}"]:
        inputs = x.shape[-1] // self.groups
        init, fan_in = self.weight_init, 9 * inputs
        kernel = self.param("kernel", kernel_init(init, fan_in), (3, 3, inputs, self.features))
        bias = self.param("bias", bias_init(init, fan_in), (self.features,))
        binary_input, geometry = self.act_bits == 1, Geometry(self.dilation, self.groups)
        if binary_input and sown.watched(self):
            sown.watch_sign(self, x.astype(accumulator_dtype(self.dtype)) + move, self.estimator)
        if self.weight_bits == 1:
            config = ProductConfig(self.dtype, self.estimator, binary_input, self.integer_products)
            return binary_convolution(x, move, kernel, self.rule, geometry, config) + bias
        x = x.astype(accumulator_dtype(self.dtype)) + move
        x = (straight_through(self.estimator)(x) if binary_input else x).astype(self.dtype)
        kernel = quantize_weight(kernel, self.weight_bits, self.clip_val)
        return geometry.convolve(x, kernel.astype(self.dtype)) + bias


def _quantized_product(layer: BinaryDense | BinaryPatchConv, x: Array, move: Array, kernel: Array) -> Array:
    """Returns the product of (..., in), shifted by (in,), with a kernel of ``in`` values per output."""
    binary_input = layer.act_bits == 1
    if binary_input and sown.watched(layer):
        sown.watch_sign(layer, x.astype(accumulator_dtype(layer.dtype)) + move, layer.estimator)
    if layer.weight_bits == 1:
        config = ProductConfig(layer.dtype, layer.estimator, binary_input, layer.integer_products)
        return products.binary_product(x, move, kernel, layer.rule, config)
    x = x.astype(accumulator_dtype(layer.dtype)) + move
    x = (straight_through(layer.estimator)(x) if binary_input else x).astype(layer.dtype)
    kernel = quantize_weight(kernel, layer.weight_bits, layer.clip_val)
    y = products.real_product(x, kernel.reshape(x.shape[-1], layer.features))
    return checkpoint_name(y, products.PRODUCT) if layer.integer_products else y


def real_dense(features: int, fan_in: int, weight_init: WeightInit, dtype: DTypeLike, name: str) -> nn.Dense:
    """Returns a real linear layer with bias, from ``fan_in`` channels to ``features``."""
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=kernel_init(weight_init, fan_in),
        bias_init=bias_init(weight_init, fan_in),
        name=name,
    )


def real_patch_conv(
    features: int,
    size: int,
    fan_in: int,
    weight_init: WeightInit,
    dtype: DTypeLike,
    name: str,
    use_bias: bool,
) -> nn.Conv:
    """Returns a real convolution of (batch, height, width, channels) whose stride is its kernel size."""
    return nn.Conv(
        features,
        kernel_size=(size, size),
        strides=(size, size),
        padding="VALID",
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init(weight_init, fan_in),
        bias_init=bias_init(weight_init, fan_in),
        name=name,
    )
