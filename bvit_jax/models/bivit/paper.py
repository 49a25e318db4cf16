"""Bi-ViT: binary DeiT and Swin whose attention has a learned scale for each head.

The models are the real-valued ones with other products. Every linear layer of a block is binary; queries,
keys and values are signs times a learned scale a head; attention probabilities A are binarised to
``α · round(clip(A / α, 0, 1))`` with a learned α a head. Every sign is a bit: that of zero is 1.

The method is that of the paper's abstract, "a learnable scaling factor to reactivate the vanished
gradients". Its equations were not available, so that these are this project's own; docs/bivit.md gives the
reasons. `bvit_jax.models.bivit.release` has what the released code computes.

Source: Li et al., "Bi-ViT" (AAAI 2024).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from bvit_jax.binary import products
from bvit_jax.binary.codes import Codes
from bvit_jax.binary.estimators import ESTIMATORS, PARABOLA, Estimator, straight_through
from bvit_jax.binary.probabilities import above, quantize_probs
from bvit_jax.binary.weights import BITS, WeightRule, binarize, weight_scale
from bvit_jax.binary.zero_point import learned_step
from bvit_jax.layers import sown
from bvit_jax.layers.dense import BitDense
from bvit_jax.layers.first_values import learned_values
from bvit_jax.layers.init import kernel_init
from bvit_jax.models import transformer
from bvit_jax.models.bivit.attention import QuantizedAttention, families
from bvit_jax.models.head import Attention
from bvit_jax.models.settings import require_choice, require_known
from bvit_jax.models.transformer import TransformerBlock, TransformerConfig

# Of the scale of attention probabilities, in units of their mean.
FIRST_SCALE = 2.0
LEAST_SCALE = 0.1


@dataclass(frozen=True)
class BiViTConfig(TransformerConfig):
    """What the blocks of one model have in common.

    Attributes:
      act_bits: 1, or 32 for real activations, attention included: then only weights are binary.
      estimator: the gradient of every sign of activations, a name in `bvit_jax.binary.ESTIMATORS`.
      learned_scale: whether attention probabilities have a learned scale; else it is 1.
    """

    act_bits: int = 1
    estimator: str = "parabola"
    learned_scale: bool = True

    def validate(self) -> None:
        """Raises `UserError` for a value out of range."""
        super().validate()
        require_choice("act_bits", self.act_bits, (1, 32))
        require_known("estimator", self.estimator, ESTIMATORS)

    @property
    def sign(self) -> Estimator:
        """The sign of activations, a bit."""
        return ESTIMATORS[self.estimator].bit


class HeadSigns(nn.Module):
    """Quantises a tensor to signs with a learned scale along one of its axes.

    The scale starts from the first batch, as the mean magnitude of each slice.
    """

    axis: int
    estimator: Estimator = PARABOLA.bit

    @nn.compact
    def __call__(self, x: Array, *, first_batch: bool = False) -> Codes:
        sown.watch_sign(self, x, self.estimator)
        others = tuple(axis for axis in range(x.ndim) if axis != self.axis)
        mean = lax.stop_gradient(jnp.mean(jnp.abs(x), axis=others))
        first = {"scale": mean}
        values = learned_values(self, {"scale": 1.0}, x.shape[self.axis], lambda: first, first_batch)
        scale = learned_step(values["scale"], x.size)
        return Codes(straight_through(self.estimator)(x), jnp.expand_dims(scale, others))


class HeadProbs(nn.Module):
    """Binarises attention probabilities with a learned scale along one of their axes, the heads.

    The parameter is the scale in units of the mean probability, 1 over the number of keys: then a step of
    the optimiser, and its start at twice the mean, are as large for any number of keys. It is kept above
    `LEAST_SCALE`: a scale of zero or less would leave a head without attention for good.
    """

    axis: int

    @nn.compact
    def __call__(self, probs: Array) -> Codes:
        heads = probs.shape[self.axis]
        scale = self.param("scale", nn.initializers.constant(FIRST_SCALE), (heads,))
        scale = above(scale, jnp.asarray(LEAST_SCALE, scale.dtype))
        scale = learned_step(scale, probs.size) / probs.shape[-1]
        scale = jnp.expand_dims(scale, tuple(axis for axis in range(probs.ndim) if axis != self.axis))
        return quantize_probs(probs, scale)


class BitReduction(nn.Module):
    """The linear layer of patch merging: ``α · sign(W) · sign(x)``, α learned for each output.

    α starts in the first batch as the mean magnitude of an output's weights. An input has no scale of its
    own, which could not be taken out of the sum. Returns the accumulator.
    """

    rule: ClassVar[WeightRule] = BITS
    weight_bits: ClassVar[int] = 1

    features: int
    config: BiViTConfig

    @nn.compact
    def __call__(self, x: Array, *, first_batch: bool = False) -> Array:
        c = self.config
        fan_in = x.shape[-1]
        kernel = self.param("kernel", kernel_init(c.weight_init, fan_in), (fan_in, self.features))
        first = {"scale": weight_scale(kernel)}
        scale = learned_values(self, {"scale": 1.0}, self.features, lambda: first, first_batch)["scale"]
        codes = binarize(kernel, self.rule)
        if c.act_bits == 1:
            sown.watch_sign(self, x, c.sign)
            y = products.code_product(straight_through(c.sign)(x), codes, "bnc,cf->bnf", c.dtype)
        else:
            y = products.real_product(x.astype(c.dtype), codes)
        return y * learned_step(scale, kernel.size)


def _dense(config: BiViTConfig, features: int, x: Array, name: str) -> Array:
    c = config
    return BitDense(features, c.act_bits, c.weight_init, c.dtype, c.sign, name=name)(x)


def _reduce(config: BiViTConfig, features: int, x: Array, *, first_batch: bool) -> Array:
    y = BitReduction(features, config, name="reduction")(x, first_batch=first_batch)
    return y.astype(config.dtype)


def _quantize_heads(config: BiViTConfig, x: Array, name: str, first_batch: bool) -> Codes:
    return HeadSigns(axis=2, estimator=config.sign, name=name)(x, first_batch=first_batch)


def _quantize_probs(config: BiViTConfig, probs: Array, name: str, first_batch: bool) -> Codes:
    if config.learned_scale:
        return HeadProbs(axis=1, name=name)(probs)
    one = jnp.ones((1,) * probs.ndim, probs.dtype)
    return quantize_probs(probs, one)


_attend_quantized = QuantizedAttention(_quantize_heads, _quantize_probs)


def _attend(
    block: TransformerBlock, q: Array, k: Array, v: Array, *, train: bool, first_batch: bool
) -> tuple[Array, Attention]:
    c: Any = block.config
    if c.act_bits == 1:
        return _attend_quantized(block, q, k, v, train=train, first_batch=first_batch)
    q, k, v = (x.astype(c.dtype) for x in (q, k, v))
    return transformer.attend(block, q, k, v, train=train)


DEIT_FAMILY, SWIN_FAMILY = families(
    _dense,
    _attend,
    _reduce,
    deit=BiViTConfig(),
    swin=BiViTConfig(norm_epsilon=1e-5, weight_init="trunc_normal"),
)
