"""Linen modules that own parameters: binary products, shifts, RPReLU, LayerScale, norms, patches.

Activations are channels-last, (batch, tokens, channels). Modules take the activations in the compute
dtype, do their sums in float32 (float64 if the input is) and return that accumulator; whoever keeps
activations in memory casts them back.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from bvit_jax.binary import products, quantize
from bvit_jax.binary.products import accumulator_dtype
from bvit_jax.errors import UserError
from bvit_jax.layers import closed_form, sown

NormName = Literal["batch_norm", "layer_norm"]
WeightInit = Literal["torch", "trunc_normal"]

MOMENTUM = 0.1  # share of a new batch in the running statistics of a batch norm

# Scopes by which `bvit_jax.cost` tells what the operations of a layer are.
ACTIVATION_SCOPE = "activation"
POOLING_SCOPE = "pooling"
SOFTMAX_SCOPE = "softmax"


def torch_uniform(fan_in: int) -> Initializer:
    """Returns PyTorch's default initialiser of a linear or convolution layer with ``fan_in`` inputs.

    It is uniform on ±1/sqrt(fan_in), for the weights and for the bias.
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> Array:
        dtype = jnp.zeros((), dtype).dtype  # None: the default dtype
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


# PyTorch's trunc_normal_ cuts at two units, a hundred of these standard deviations: the cut never bites.
normal_init = nn.initializers.normal(0.02)


def kernel_init(weight_init: WeightInit, fan_in: int) -> Initializer:
    """Returns the initialiser of a weight matrix."""
    return torch_uniform(fan_in) if weight_init == "torch" else normal_init


def bias_init(weight_init: WeightInit, fan_in: int) -> Initializer:
    """Returns the initialiser of the bias that goes with `kernel_init`."""
    return torch_uniform(fan_in) if weight_init == "torch" else nn.initializers.zeros


class RPReLU(nn.Module):
    """``prelu(x - move1) + move2`` with a slope per channel; slope 0.25 and moves 0 at first."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = (x.shape[-1],)
        move1 = self.param("move1", nn.initializers.zeros, channels)
        slope = self.param("slope", nn.initializers.constant(0.25), channels)
        move2 = self.param("move2", nn.initializers.zeros, channels)
        return closed_form.rprelu(x, move1, slope, move2)


class LayerScale(nn.Module):
    """The affine before a residual addition: ``x * alpha + move``, per channel."""

    alpha_init: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = (x.shape[-1],)
        alpha = self.param("alpha", nn.initializers.constant(self.alpha_init), channels)
        return x * alpha + self.param("move", nn.initializers.zeros, channels)


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last, with PyTorch's running statistics.

    The batch is normalised by its biased variance; the running variance is kept unbiased,
    n / (n - 1), which linen's own BatchNorm does not do. Under jit over a sharded batch the
    statistics are those of the global batch. Sums are in float32, or float64 if the input is.

    With a ``group`` above 0, each so many consecutive images of the batch are normalised by themselves,
    and the running statistics take the mean over the groups of their means and unbiased variances. Where
    the images of a group are on one device, normalising needs no communication.

    With ``one_pass`` mean and variance come from one pass, relative to the running mean: see
    `bvit_jax.layers.closed_form.moments`.
    """

    epsilon: float = 1e-5
    group: int = 0  # images; 0: the whole batch
    one_pass: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        x = x.astype(accumulator_dtype(x.dtype))
        if not train:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            return x * factor + (bias - running_mean.value * factor)
        groups = self._groups(x.shape[0])
        shift = running_mean.value if self.one_pass else None
        if groups:
            y, mean, var = closed_form.grouped_batch_norm(x, scale, bias, self.epsilon, groups, shift)
            mean, var = jnp.mean(mean, axis=0), jnp.mean(var, axis=0)
        else:
            y, mean, var = closed_form.batch_norm(x, scale, bias, self.epsilon, shift)
        if not self.is_initializing():
            running = {"mean": running_mean.value, "var": running_var.value}
            count = x.size // x.shape[-1] // (groups or 1)
            running = advance_statistics(running, mean, var, count)
            running_mean.value, running_var.value = running["mean"], running["var"]
        return y

    def _groups(self, images: int) -> int:
        """Returns the number of groups of a batch, 0 where it is not divided."""
        if self.group and images % self.group:
            raise UserError(
                f"config.model.batch_norm_group is {self.group}; expected a divisor of the {images} images"
                " that pass through the model at once, config.batch_size / config.accumulate_steps"
            )
        return images // self.group if self.group else 0


def advance_statistics(running: Mapping[str, Array], mean: Array, var: Array, count: int) -> dict[str, Array]:
    """Returns the running statistics of a batch norm after another batch.

    Args:
      running: ``mean`` and ``var``, the latter unbiased, each (channels,).
      mean, var: of the batch, the latter biased.
      count: values of a channel in the batch.
    """
    unbiased = var * (count / max(count - 1, 1))
    new = {"mean": mean, "var": unbiased}
    return {name: old + MOMENTUM * (new[name] - old) for name, old in running.items()}


class LayerNorm(nn.LayerNorm):
    """linen's LayerNorm with exact variance, called like `BatchNorm`; sums in float32 at least."""

    epsilon: float = 1e-5
    use_fast_variance: bool = False

    def __call__(self, x: Array, *, train: bool = False) -> Array:  # type: ignore[override]
        return super().__call__(x.astype(accumulator_dtype(x.dtype)))


def make_norm(
    norm: NormName, epsilon: float, name: str, group: int = 0, one_pass: bool = False
) -> BatchNorm | LayerNorm:
    """Returns the module called ``name`` that normalises in the binary models.

    ``group`` and ``one_pass`` are those of `BatchNorm`; a `LayerNorm` has none.
    """
    if norm == "batch_norm":
        return BatchNorm(epsilon=epsilon, group=group, one_pass=one_pass, name=name)
    return LayerNorm(epsilon=epsilon, name=name)


class BinaryDense(nn.Module):
    """A linear layer without bias whose shifted input and weights are quantised.

    ``W · sign(x + move)``. With one activation bit the input goes through the sign; the reference
    quantises activations for exactly one bit, so any other number leaves them real. Weights of 2 to
    8 bits are quantised per tensor after clipping to ±``clip_val``. ``whole`` is that of
    `bvit_jax.binary.products.ProductConfig`. Returns the accumulator.
    """

    rule: ClassVar[products.WeightRule] = products.DENSE

    features: int
    weight_bits: int = 1
    act_bits: int = 1
    clip_val: float = 2.5
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    whole: bool = False

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
    whole: bool = False

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
        config = products.ProductConfig(layer.rule, layer.act_bits == 1, layer.dtype, whole=layer.whole)
        return products.binary_product(x, move, kernel, config)
    x = x.astype(accumulator_dtype(layer.dtype)) + move
    x = (quantize.sign(x) if layer.act_bits == 1 else x).astype(layer.dtype)
    kernel = quantize.quantize_weight(kernel, layer.weight_bits, layer.clip_val)
    y = products.real_product(x, kernel.reshape(x.shape[-1], layer.features))
    return checkpoint_name(y, products.PRODUCT) if layer.whole else y


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


class DropPath(nn.Module):
    """Drops a whole sample of a residual branch with probability ``rate`` (stochastic depth).

    A rate that is an array, as in a scan over blocks, may be traced; it must be below 1.
    """

    rate: float | Array

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if not isinstance(self.rate, Array):
            drop = nn.Dropout(self.rate, broadcast_dims=tuple(range(1, x.ndim)))
            return drop(x, deterministic=not train)
        if not train:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate).astype(x.dtype), 0)


def drop_path_rates(last: float, depth: int) -> tuple[float, ...]:
    """Returns the drop-path rate of each of ``depth`` blocks, rising linearly from 0 to ``last``."""
    return tuple(last * i / max(depth - 1, 1) for i in range(depth))


def extract_patches(x: Array, size: int) -> Array:
    """Splits (batch, height, width, channels) into (batch, tokens, size * size * channels)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


@jax.named_scope(SOFTMAX_SCOPE)
def softmax(scores: Array) -> Array:
    """Returns the softmax along the last axis."""
    return nn.softmax(scores)


def to_grid(x: Array) -> Array:
    """Lays (batch, tokens, channels) out as the square (batch, side, side, channels)."""
    side = math.isqrt(x.shape[1])
    return x.reshape(x.shape[0], side, side, x.shape[2])


def to_tokens(x: Array) -> Array:
    """Flattens (batch, height, width, channels) to (batch, tokens, channels)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


@jax.named_scope(POOLING_SCOPE)
def average_pool(x: Array, size: int) -> Array:
    """Averages each ``size``×``size`` square of a square token grid, stride ``size``."""
    batch, tokens, channels = x.shape
    side = math.isqrt(tokens) // size
    return jnp.mean(x.reshape(batch, side, size, side, size, channels), axis=(2, 4)).reshape(
        batch, side * side, channels
    )


def upsample(x: Array, factor: int) -> Array:
    """Repeats each token of a square grid ``factor``×``factor`` times (nearest neighbour)."""
    return to_tokens(jnp.repeat(jnp.repeat(to_grid(x), factor, axis=1), factor, axis=2))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@jax.named_scope(POOLING_SCOPE)
def average_line(x: Array, size: int, axis: int) -> Array:
    """Averages ``size`` neighbours along one axis, stride 1, the zero padding counted in the mean."""
    reach = size // 2
    padding = [(0, 0)] * x.ndim
    padding[axis] = (reach, reach)
    # The barrier keeps XLA from computing the producer of x once for every window.
    padded = jnp.pad(lax.optimization_barrier(x), padding)
    length = x.shape[axis]
    windows = [lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size)]
    return sum(windows[1:], windows[0]) / size


# A symmetric window with zeros around it is its own transpose.
average_line.defvjp(
    lambda x, size, axis: (average_line(x, size, axis), None),
    lambda size, axis, _, gradient: (average_line(gradient, size, axis),),
)


def tile_channels(x: Array, times: int) -> Array:
    """Repeats the channels ``times`` times: (..., channels) to (..., times * channels)."""
    return jnp.tile(x, (1,) * (x.ndim - 1) + (times,))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@jax.named_scope(POOLING_SCOPE)
def average_row(x: Array, size: int, axis: int) -> Array:
    """Does to tokens in a row, (batch, tokens, channels), what `average_line` does to their square grid.

    Neighbours along axis 1 of the grid are a side apart, those along axis 2 side by side, where they are not
    the end of one line and the start of the next. A TPU needs no copies for it, as it does to lay tokens out
    as a grid and back, and reads x once for several lines.
    """
    side, reach = math.isqrt(x.shape[1]), size // 2
    stride = side if axis == 1 else 1
    column = np.arange(x.shape[1]) % side
    padded = jnp.pad(x, ((0, 0), (reach * stride, reach * stride), (0, 0)))

    def window(offset: int) -> Array:
        start = (reach + offset) * stride
        values = lax.slice_in_dim(padded, start, start + x.shape[1], axis=1)
        inside = (column + offset >= 0) & (column + offset < side)
        return values if axis == 1 or inside.all() else jnp.where(inside[:, None], values, 0)

    windows = [window(offset) for offset in range(-reach, reach + 1)]
    return sum(windows[1:], windows[0]) / size


average_row.defvjp(
    lambda x, size, axis: (average_row(x, size, axis), None),
    lambda size, axis, _, gradient: (average_row(gradient, size, axis),),
)


@jax.named_scope(POOLING_SCOPE)
def average_channels(x: Array, size: int, *, train: bool) -> Array:
    """Averages each ``size`` neighbouring channels: (..., channels) to (..., channels / size)."""
    if train:
        return jnp.mean(x.reshape(*x.shape[:-1], -1, size), axis=-1)
    # Without a backward pass, XLA's CPU backend is faster with a sum of slices than with a reduction.
    return sum((x[..., i::size] for i in range(1, size)), x[..., ::size]) / size
