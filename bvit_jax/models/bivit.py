"""Bi-ViT as its released code computes it: binary DeiT and Swin with learned zero points in attention.

The models are the real-valued ones with other products: every linear layer of a block is binary, and
queries, keys, values and attention probabilities are quantised with a scale and a zero point a head.
Both are learned, and start from the first batch of training: see `first_batch`.

Softmax probabilities are at least 0 and a zero point starts near 0, so that at first every probability
becomes the scale, and attention is an average; only a zero point below -0.5 makes it choose. Where a sum of
codes is exactly zero, its sign is 0: codes are added exactly and scaled afterwards, so that the result does
not depend on rounding, as it does in the released code.

Source: Li et al., "Bi-ViT" (AAAI 2024), in the behaviour of github.com/YanjingLi0202/Bi-ViT.
"""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax import bivit_quantize as quantize
from bvit_jax import products, watch
from bvit_jax.layers import LayerNorm, UncentredDense, kernel_init
from bvit_jax.models.deit import DeiT
from bvit_jax.models.head import Attention
from bvit_jax.models.real_block import RealBlock, RealConfig
from bvit_jax.models.stages import Execution
from bvit_jax.models.swin import PatchMerging, Swin

HEAD_NORM_EPSILON = 1e-5
SEEN = "init_state"  # the flag of a quantiser that has taken its values from a batch


class Quantized(NamedTuple):
    """A tensor as ``codes * scale``; the codes are whole numbers, the scale broadcasts against them."""

    codes: Array
    scale: Array


def _from_first_batch(module: nn.Module) -> bool:
    """Returns whether this is the pass that takes learned values from the batch: see `first_batch`."""
    return module.is_mutable_collection("params") and not module.is_initializing()


def _first(flag: Array, value: Array, parameter: Array) -> Array:
    """Returns the value of the first batch until the flag, shape (1,), is set; then the parameter."""
    value = jnp.broadcast_to(value, parameter.shape).astype(parameter.dtype)
    return jnp.where(flag[0] == 0, value, parameter)


class ZeroPointQuantizer(nn.Module):
    """Quantises a tensor with a learned scale and zero point along one of its axes.

    The flags ``init_state`` (the first batch has been seen) and ``signed`` (it had negative values) are
    kept among the statistics, float (1,), as the released checkpoints hold them.
    """

    axis: int

    @nn.compact
    def __call__(self, x: Array) -> Quantized:
        size = x.shape[self.axis]
        scale = self.param("alpha", nn.initializers.ones, (size,))
        zero_point = self.param("zero_point", nn.initializers.zeros, (size,))
        seen = self.variable("batch_stats", SEEN, jnp.zeros, (1,))
        signed = self.variable("batch_stats", "signed", jnp.zeros, (1,))
        if _from_first_batch(self):
            first = quantize.first_values(x)
            scale = _first(seen.value, first.scale, scale)
            zero_point = _first(seen.value, first.zero_point, zero_point)
            signed.value = _first(seen.value, first.signed, signed.value)
            seen.value = jnp.ones_like(seen.value)
            self.put_variable("params", "alpha", scale)
            self.put_variable("params", "zero_point", zero_point)
        shape = [1] * x.ndim
        shape[self.axis] = size
        scale = quantize.learned_step(scale, x.size).reshape(shape)
        zero_point = quantize.learned_step(zero_point, x.size).reshape(shape)
        return Quantized(quantize.zero_point_codes(x, scale, zero_point), scale)


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
        scale = self.param("alpha", nn.initializers.ones, (self.features,))
        seen = self.variable("batch_stats", SEEN, jnp.zeros, (1,))
        if _from_first_batch(self):
            scale = _first(seen.value, quantize.first_scale(kernel), scale)
            seen.value = jnp.ones_like(seen.value)
            self.put_variable("params", "alpha", scale)
        scale = quantize.learned_step(scale, kernel.size)
        codes = quantize.zero_point_codes(kernel, scale, jnp.zeros_like(scale))
        inputs = ZeroPointQuantizer(axis=-1, name="act")(x)
        return products.real_product((inputs.codes * inputs.scale).astype(c.dtype), codes) * scale


class BiViTBlock(RealBlock):
    """The block of `RealBlock` with binary linear layers and quantised attention."""

    head_norms: ClassVar[bool] = True  # whether queries and keys of each head are normalised

    def _dense(self, features: int, x: Array, name: str) -> Array:
        c = self.config
        return UncentredDense(features, c.weight_init, c.dtype, name=name)(x)

    def _activate(self, x: Array) -> Array:
        return quantize.clip_output(super()._activate(x))

    def _attend(self, q: Array, k: Array, v: Array, *, train: bool) -> tuple[Array, Attention]:
        c = self.config
        if self.head_norms:
            q = LayerNorm(HEAD_NORM_EPSILON, name="query_norm")(q)
            k = LayerNorm(HEAD_NORM_EPSILON, name="key_norm")(k)
        queries = ZeroPointQuantizer(axis=2, name="query_act")(q)
        keys = ZeroPointQuantizer(axis=2, name="key_act")(k)
        values = ZeroPointQuantizer(axis=2, name="value_act")(v)
        scores = self._product(queries, keys, "bqhd,bkhd->bhqk") / math.sqrt(q.shape[-1])
        probs = self._probabilities(scores)
        used = ZeroPointQuantizer(axis=1, name="prob_act")(probs)
        watch.watch_heads(self, used.codes)
        kept = used
        if train and c.attention_dropout > 0:
            rate = 1 - c.attention_dropout
            mask = jax.random.bernoulli(self.make_rng("dropout"), rate, used.codes.shape)
            kept = Quantized(used.codes * mask, used.scale / rate)
        return self._product(kept, values, "bhqk,bkhd->bqhd"), Attention(probs, used.codes * used.scale)

    def _product(self, a: Quantized, b: Quantized, equation: str) -> Array:
        """Returns the product of two tensors with a scale a head, in any of the axes of ``equation``."""
        y = products.code_product(a.codes, b.codes, equation, self.config.dtype)
        scale = a.scale.reshape(-1) * b.scale.reshape(-1)
        heads = equation.partition("->")[2].index("h")
        return y * jnp.expand_dims(scale, tuple(i for i in range(4) if i != heads))


class BiViTSwinBlock(BiViTBlock):
    """The block of Bi-ViT's Swin: queries and keys are not normalised."""

    head_norms: ClassVar[bool] = False


class BinaryMerging(PatchMerging):
    """`PatchMerging` whose linear layer is binary."""

    def _reduce(self, x: Array) -> Array:
        return BinaryReduction(self.features, self.config, name="reduction")(x).astype(self.config.dtype)


class BiViTReleaseDeiT(DeiT):
    """Bi-ViT's DeiT as released; the defaults are those of `DeiT`, with both tokens and heads."""

    block_type: ClassVar[type[RealBlock]] = BiViTBlock

    distillation_token: bool = True
    distillation_head: bool = True


class BiViTReleaseSwin(Swin):
    """Bi-ViT's Swin as released; the defaults are those of Swin-T."""

    block_type: ClassVar[type[RealBlock]] = BiViTSwinBlock
    merging_type: ClassVar[type[PatchMerging]] = BinaryMerging


def first_batch(
    model: nn.Module, variables: Any, images: Array, rngs: dict[str, Array] | None = None
) -> tuple[Any, Any]:
    """Runs the first training batch, from which the quantisers that saw none take their values.

    A training step on the same images and with the same random streams then computes what the released
    code computes in its first step, gradients included.

    Args:
      model: a model of this module, or a `BinaryMerging`.
      variables: its ``params`` and ``batch_stats``.
      images: what the model takes, images (batch, image_size, image_size, 3), normalised.
      rngs: of dropout and drop-path, if the model has any.

    Returns:
      The output of the model, and the variables with scales, zero points and flags set.
    """
    collections = ["params", "batch_stats"]
    if isinstance(model, PatchMerging):
        return model.apply(variables, images, mutable=collections)
    # In a scan over blocks no parameter can be written.
    model = model.clone(execution=Execution())
    return model.apply(variables, images, train=True, rngs=rngs, mutable=collections)
