"""Bi-ViT as its released code computes it: binary DeiT and Swin with learned zero points in attention.

The models are the real-valued ones with other products: every linear layer of a block is binary, and
queries, keys, values and attention probabilities are quantised with a scale and a zero point a head.
Both are learned, and start from the first batch of training: see `bvit_jax.layers.first_values`.

Softmax probabilities are at least 0 and a zero point starts near 0, so that at first every probability
becomes the scale, and attention is an average; only a zero point below -0.5 makes it choose. Where a sum of
codes is exactly zero, its sign is 0: codes are added exactly and scaled afterwards, so that the result does
not depend on rounding, as it does in the released code.

Source: Li et al., "Bi-ViT" (AAAI 2024), in the behaviour of github.com/YanjingLi0202/Bi-ViT.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.binary import products
from bvit_jax.binary import zero_point as quantize
from bvit_jax.binary.codes import Codes
from bvit_jax.layers import sown
from bvit_jax.layers.dense import UncentredDense
from bvit_jax.layers.first_values import SEEN, learned_values, unless
from bvit_jax.layers.init import kernel_init
from bvit_jax.models.bivit.attention import QuantizedAttention, families
from bvit_jax.models.transformer import TransformerConfig


class ZeroPointQuantizer(nn.Module):
    """Quantises a tensor with a learned scale and zero point along one of its axes.

    The flags ``init_state`` (the first batch has been seen) and ``signed`` (it had negative values) are
    kept among the statistics, float (1,), as the released checkpoints hold them.
    """

    axis: int

    @nn.compact
    def __call__(self, x: Array, *, first_batch: bool = False) -> Codes:
        size = x.shape[self.axis]
        first = quantize.first_values(x)
        signed = self.variable("batch_stats", "signed", jnp.zeros, (1,))
        if first_batch:
            signed.value = unless(self.get_variable("batch_stats", SEEN), signed.value, first.signed)
        values = learned_values(
            self,
            {"alpha": 1.0, "zero_point": 0.0},
            size,
            lambda: {"alpha": first.scale, "zero_point": first.zero_point},
            first_batch,
        )
        shape = [1] * x.ndim
        shape[self.axis] = size
        scale = quantize.learned_step(values["alpha"], x.size).reshape(shape)
        zero_point = quantize.learned_step(values["zero_point"], x.size).reshape(shape)
        codes = quantize.zero_point_codes(x, scale, zero_point)
        if sown.watched(self):  # codes are signs minus the rounded zero point
            sown.watch_balance(self, codes + jnp.round(zero_point), "", self.axis)
        return Codes(codes, scale)


class BinaryReduction(nn.Module):
    """The linear layer of patch merging: ``sign(W) · α``, α learned for each output, on quantised input.

    α starts, like that of the input, in the first batch, at twice the mean magnitude of the weights.
    Returns the accumulator.
    """

    features: int
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, *, first_batch: bool = False) -> Array:
        c = self.config
        fan_in = x.shape[-1]
        kernel = self.param("kernel", kernel_init(c.weight_init, fan_in), (fan_in, self.features))
        first = {"alpha": quantize.first_scale(kernel)}
        scale = learned_values(self, {"alpha": 1.0}, self.features, lambda: first, first_batch)["alpha"]
        scale = quantize.learned_step(scale, kernel.size)
        codes = quantize.zero_point_codes(kernel, scale, jnp.zeros_like(scale))
        inputs = ZeroPointQuantizer(axis=-1, name="act")(x, first_batch=first_batch)
        return products.real_product(inputs.dequantize().astype(c.dtype), codes) * scale


def _dense(config: TransformerConfig, features: int, x: Array, name: str) -> Array:
    return UncentredDense(features, weight_init=config.weight_init, dtype=config.dtype, name=name)(x)


def _reduce(config: TransformerConfig, features: int, x: Array, *, first_batch: bool) -> Array:
    y = BinaryReduction(features, config, name="reduction")(x, first_batch=first_batch)
    return y.astype(config.dtype)


def _quantize_heads(config: TransformerConfig, x: Array, name: str, first_batch: bool) -> Codes:
    return ZeroPointQuantizer(axis=2, name=name)(x, first_batch=first_batch)


def _quantize_probs(config: TransformerConfig, probs: Array, name: str, first_batch: bool) -> Codes:
    return ZeroPointQuantizer(axis=1, name=name)(probs, first_batch=first_batch)


_attend = QuantizedAttention(_quantize_heads, _quantize_probs)

DEIT_FAMILY, SWIN_FAMILY = families(
    _dense,
    _attend,
    _reduce,
    deit=TransformerConfig(),
    swin=TransformerConfig(norm_epsilon=1e-5, weight_init="trunc_normal"),
)
