"""Weights of one bit: their codes, their scale and the gradient of the latent weights.

Weights follow the Flax layout: the output channel is the last axis, so "a row" of the papers (all weights
of one output channel) is a slice over every other axis.

Source: the behaviour of ``transformer/utils_quant.py`` in github.com/Phuoc-Hoan-Le/BinaryViT; `BITS` is this
project's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary.codes import Codes
from bvit_jax.binary.estimators import bit


def weight_scale(kernel: Array) -> Array:
    """Returns the mean magnitude of each output channel of (..., out), shape (out,); no gradient passes."""
    return lax.stop_gradient(jnp.mean(jnp.abs(kernel), axis=_row_axes(kernel)))


def _row_axes(kernel: Array) -> tuple[int, ...]:
    return tuple(range(kernel.ndim - 1))


def _without_mean(kernel: Array) -> Array:
    return kernel - jnp.mean(kernel, axis=_row_axes(kernel), keepdims=True)


@dataclass(frozen=True)
class WeightRule:
    """How latent weights (..., out) become one bit, and which of them get a gradient.

    Attributes:
      centred: the kernel to what the sign is taken of; linear and symmetric, so that it is its own transpose.
      forward: the sign.
    """

    centred: Callable[[Array], Array] = lambda kernel: kernel
    forward: Callable[[Array], Array] = jnp.sign

    def codes(self, kernel: Array) -> Array:
        """Returns the sign of the centred weights, in the shape of the kernel."""
        return self.forward(self.centred(kernel))

    def quantize(self, kernel: Array) -> Codes:
        """Returns the kernel as a matrix of codes (in, out) with the scale of each output channel (out,)."""
        return Codes(self.codes(kernel).reshape(-1, kernel.shape[-1]), weight_scale(kernel))

    def window(self, kernel: Array) -> Array:
        """Returns which weights get a gradient, those whose centred value is in [-1, 1]; bool."""
        return jnp.abs(self.centred(kernel)) <= 1

    def gradient(self, kernel: Array, gradient: Array) -> Array:
        """Returns the gradient of the latent weights from that of the quantised ones, in the kernel's shape.

        Their scale is a constant for it.
        """
        return self.centred(jnp.where(self.window(kernel), gradient, 0))


DENSE = WeightRule(_without_mean)  # linear layers of BinaryViT: a row less its mean
CONV = WeightRule()  # its convolutions, and all of Bi-ViT as released: no centring
BITS = WeightRule(forward=bit)  # where every sign is a bit


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def binarize(kernel: Array, rule: WeightRule) -> Array:
    """Returns the codes of a kernel, differentiable by the rule's gradient; the shape of the kernel."""
    return rule.codes(kernel)


binarize.defvjp(
    lambda kernel, rule: (rule.codes(kernel), kernel),
    lambda rule, kernel, gradient: (rule.gradient(kernel, gradient),),
)
