"""Bi-ViT as its released code computes it: binary DeiT and Swin with learned zero points in attention.

The models are the real-valued ones with other products: every linear layer of a block is binary, and
queries, keys, values and attention probabilities are quantised with a scale and a zero point a head.
Both are learned, and start from the first batch of training: see `bvit_jax.models.bivit.first_values`.

Softmax probabilities are at least 0 and a zero point starts near 0, so that at first every probability
becomes the scale, and attention is an average; only a zero point below -0.5 makes it choose. Where a sum of
codes is exactly zero, its sign is 0: codes are added exactly and scaled afterwards, so that the result does
not depend on rounding, as it does in the released code.

Source: Li et al., "Bi-ViT" (AAAI 2024), in the behaviour of github.com/YanjingLi0202/Bi-ViT.
"""

from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.binary import products
from bvit_jax.binary import zero_point as quantize
from bvit_jax.layers import sown
from bvit_jax.layers.dense import UncentredDense
from bvit_jax.layers.init import kernel_init
from bvit_jax.models.bivit.block import BiViTBlock, Quantized
from bvit_jax.models.bivit.first_values import SEEN, is_first_batch, learned_values, unless
from bvit_jax.models.deit import DeiT
from bvit_jax.models.real_block import RealBlock, RealConfig
from bvit_jax.models.swin import PatchMerging, Swin


class ZeroPointQuantizer(nn.Module):
    """Quantises a tensor with a learned scale and zero point along one of its axes.

    The flags ``init_state`` (the first batch has been seen) and ``signed`` (it had negative values) are
    kept among the statistics, float (1,), as the released checkpoints hold them.
    """

    axis: int

    @nn.compact
    def __call__(self, x: Array) -> Quantized:
        size = x.shape[self.axis]
        first = quantize.first_values(x)
        signed = self.variable("batch_stats", "signed", jnp.zeros, (1,))
        if is_first_batch(self):
            signed.value = unless(self.get_variable("batch_stats", SEEN), signed.value, first.signed)
        values = learned_values(
            self,
            {"alpha": 1.0, "zero_point": 0.0},
            size,
            lambda: {"alpha": first.scale, "zero_point": first.zero_point},
        )
        shape = [1] * x.ndim
        shape[self.axis] = size
        scale = quantize.learned_step(values["alpha"], x.size).reshape(shape)
        zero_point = quantize.learned_step(values["zero_point"], x.size).reshape(shape)
        codes = quantize.zero_point_codes(x, scale, zero_point)
        if sown.watched(self):  # codes are signs minus the rounded zero point
            sown.watch_balance(self, codes + jnp.round(zero_point), "", self.axis)
        return Quantized(codes, scale)


class BinaryReduction(nn.Module):
    """The linear layer of patch merging: ``sign(W) · α``, α learned for each output, on quantised input.

    α starts, like that of the input, in the first batch, at twice the mean magnitude of the weights.
    Returns the accumulator.
    """

    features: int
    config: RealConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        fan_in = x.shape[-1]
        kernel = self.param("kernel", kernel_init(c.weight_init, fan_in), (fan_in, self.features))
        first = {"alpha": quantize.first_scale(kernel)}
        scale = learned_values(self, {"alpha": 1.0}, self.features, lambda: first)["alpha"]
        scale = quantize.learned_step(scale, kernel.size)
        codes = quantize.zero_point_codes(kernel, scale, jnp.zeros_like(scale))
        inputs = ZeroPointQuantizer(axis=-1, name="act")(x)
        return products.real_product((inputs.codes * inputs.scale).astype(c.dtype), codes) * scale


class ReleaseBlock(BiViTBlock):
    """`BiViTBlock` with a scale and a zero point for each head."""

    quantizer: ClassVar[Callable[..., nn.Module]] = ZeroPointQuantizer
    prob_quantizer: ClassVar[Callable[..., nn.Module]] = ZeroPointQuantizer

    def _dense(self, features: int, x: Array, name: str) -> Array:
        c = self.config
        return UncentredDense(features, weight_init=c.weight_init, dtype=c.dtype, name=name)(x)


class ReleaseSwinBlock(ReleaseBlock):
    """The block of Bi-ViT's Swin: queries and keys are not normalised."""

    head_norms: ClassVar[bool] = False


class ReleaseMerging(PatchMerging):
    """`PatchMerging` whose linear layer is binary."""

    def _reduce(self, x: Array) -> Array:
        return BinaryReduction(self.features, self.config, name="reduction")(x).astype(self.config.dtype)


class BiViTReleaseDeiT(DeiT):
    """Bi-ViT's DeiT as released; the defaults are those of `DeiT`, with both tokens and heads."""

    block_type: ClassVar[type[RealBlock]] = ReleaseBlock

    distillation_token: bool = True
    distillation_head: bool = True


class BiViTReleaseSwin(Swin):
    """Bi-ViT's Swin as released; the defaults are those of Swin-T."""

    block_type: ClassVar[type[RealBlock]] = ReleaseSwinBlock
    merging_type: ClassVar[type[PatchMerging]] = ReleaseMerging
