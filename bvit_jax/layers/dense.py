"""Linear layers and patch convolutions, binary and real.

Activations are channels-last, (batch, tokens, channels). Modules take the activations in the compute
dtype, do their sums in float32 (float64 if the input is) and return that accumulator; whoever keeps
activations in memory casts them back.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from bvit_jax.binary import products, quantize
from bvit_jax.binary.products import accumulator_dtype
from bvit_jax.layers import sown
from bvit_jax.layers.grid import extract_patches
from bvit_jax.layers.init import WeightInit, bias_init, kernel_init


class BinaryDense(nn.Module):
    """A linear layer without bias whose shifted input and weights are quantised.

    ``W · sign(x + move)``. With one activation bit the input goes through the sign; the reference
    quantises activations for exactly one bit, so any other number leaves them real. Weights of 2 to
    8 bits are quantised per tensor after clipping to ±``clip_val``. ``integer_products`` is that of
    `bvit_jax.binary.products.ProductConfig`. Returns the accumulator.
    """

    rule: ClassVar[products.WeightRule] = products.DENSE

    features: int
    weight_bits: int = 1
    act_bits: int = 1
    clip_val: float = 2.5
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    integer_products: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        move = self.param("move", nn.initializers.zeros, (fan_in,))
        kernel = self.param("kernel", kernel_init(self.weight_init, fan_in), (fan_in, self.features))
        return _quantized_product(self, x, move, kernel)


class UncentredDense(nn.Module):
    """A linear layer without bias and shift whose input and weights are binarised, as in Bi-ViT.

    ``mean|W| · sign(W) · sign(x)``, the mean that of each output channel; the sign of x is left out unless
    ``act_bits`` is 1. Returns the accumulator.
    """

    rule: ClassVar[products.WeightRule] = products.CONV
    sign: ClassVar["staticmethod[[Array], Array]"] = staticmethod(quantize.sign)
    weight_bits: ClassVar[int] = 1

    features: int
    act_bits: int = 1
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", kernel_init(self.weight_init, fan_in), (fan_in, self.features))
        if self.act_bits == 1:
            sown.watch_sign(self, x, "", self.sign)
        config = products.ProductConfig(self.rule, self.act_bits == 1, self.dtype, self.sign)
        no_move = jnp.zeros(fan_in, accumulator_dtype(self.dtype))
        return products.binary_product(x, no_move, kernel, config)


class BitDense(UncentredDense):
    """`UncentredDense` whose every sign is a bit: that of zero is 1."""

    rule: ClassVar[products.WeightRule] = products.BITS
    sign: ClassVar["staticmethod[[Array], Array]"] = staticmethod(quantize.sign_bit)


class BinaryPatchConv(nn.Module):
    """A convolution whose stride is its kernel size, shifted input and weights quantised, no bias.

    Takes (batch, height, width, channels) and returns (batch, tokens, features); otherwise like
    `BinaryDense`.
    """

    rule: ClassVar[products.WeightRule] = products.CONV

    features: int
    patch_size: int
    weight_bits: int = 1
    act_bits: int = 1
    clip_val: float = 2.5
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    integer_products: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, channels = self.patch_size, x.shape[-1]
        fan_in = size * size * channels
        shape = (size, size, channels, self.features)
        # Four dimensions as in PyTorch, where this shift, unlike all others, decays.
        move = self.param("move", nn.initializers.zeros, (1, 1, 1, channels))
        kernel = self.param("kernel", kernel_init(self.weight_init, fan_in), shape)
        move = jnp.tile(move.reshape(channels), size * size)
        return _quantized_product(self, extract_patches(x, size), move, kernel)


def _quantized_product(layer: BinaryDense | BinaryPatchConv, x: Array, move: Array, kernel: Array) -> Array:
    if layer.act_bits == 1 and sown.watched(layer):
        sown.watch_sign(layer, x.astype(accumulator_dtype(layer.dtype)) + move)
    if layer.weight_bits == 1:
        config = products.ProductConfig(
            layer.rule, layer.act_bits == 1, layer.dtype, integer_products=layer.integer_products
        )
        return products.binary_product(x, move, kernel, config)
    x = x.astype(accumulator_dtype(layer.dtype)) + move
    x = (quantize.sign(x) if layer.act_bits == 1 else x).astype(layer.dtype)
    kernel = quantize.quantize_weight(kernel, layer.weight_bits, layer.clip_val)
    y = products.real_product(x, kernel.reshape(x.shape[-1], layer.features))
    return checkpoint_name(y, products.PRODUCT) if layer.integer_products else y


def real_dense(features: int, fan_in: int, weight_init: WeightInit, dtype: DTypeLike, name: str) -> nn.Dense:
    """Returns a real linear layer with bias."""
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
