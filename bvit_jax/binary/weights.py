"""Weights of one bit: their codes, their scale and the gradient of the latent weights.

Weights follow the Flax layout: the output channel is the last axis, so "a row" of the papers (all weights
of one output channel) is a slice over every other axis.

Source: the behaviour of ``transformer/utils_quant.py`` in github.com/Phuoc-Hoan-Le/BinaryViT; `BITS` is this
project's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary.codes import Codes
from bvit_jax.binary.estimators import Elementwise, bit
from bvit_jax.imports.shapes import Bool, Float

Kernel = Float[Array, "*inputs outputs"]


def weight_scale(kernel: Kernel) -> Float[Array, " outputs"]:
    """Returns the mean magnitude of each output channel; no gradient passes."""
    return lax.stop_gradient(jnp.mean(jnp.abs(kernel), axis=_row_axes(kernel)))


def _row_axes(kernel: Array) -> tuple[int, ...]:
    return tuple(range(kernel.ndim - 1))


def _without_mean(kernel: Array) -> Array:
    return kernel - jnp.mean(kernel, axis=_row_axes(kernel), keepdims=True)


@dataclass(frozen=True)
class WeightRule:
    """How latent weights become one bit, and which of them get a gradient.

    Attributes:
      centred: the kernel to what the sign is taken of; linear and symmetric, so that it is its own transpose.
      forward: the sign.
    """

    centred: Callable[[Kernel], Kernel] = lambda kernel: kernel
    forward: Elementwise = jnp.sign

    def codes(self, kernel: Kernel) -> Kernel:
        """Returns the sign of the centred weights."""
        return self.forward(self.centred(kernel))

    def quantize(self, kernel: Kernel) -> Codes:
        """Returns the kernel as a matrix of codes (in, out) with the scale of each output channel (out,)."""
        return Codes(self.codes(kernel).reshape(-1, kernel.shape[-1]), weight_scale(kernel))

    def window(self, kernel: Kernel) -> Bool[Array, "*inputs outputs"]:
        """Returns which weights get a gradient, those whose centred value is in [-1, 1]."""
        return jnp.abs(self.centred(kernel)) <= 1

    def gradient(self, kernel: Kernel, gradient: Kernel) -> Kernel:
        """Returns the gradient of the latent weights from that of the quantised ones, of fixed scale."""
        return self.centred(jnp.where(self.window(kernel), gradient, 0))


@dataclass(frozen=True)
class Rectified(WeightRule):
    """A rule whose window follows the spread of the weights, so that more of them get a gradient.

    Source: ReCU (Xu et al., ICCV 2021), in the behaviour of github.com/IMRL/BHViT: the centred weights of a
    row are divided by their standard deviation, over 2·sqrt(2), and the window is a quantile of a Laplace
    distribution with the mean magnitude of the whole matrix.
    """

    def window(self, kernel: Kernel) -> Bool[Array, "*inputs outputs"]:
        """Returns which weights get a gradient."""
        size = jnp.abs(self._normalized(kernel))
        return size <= -math.log(2 - 2 * RECU_QUANTILE) * jnp.mean(size)

    def gradient(self, kernel: Kernel, gradient: Kernel) -> Kernel:
        """Returns the gradient of the latent weights, through their normalisation."""
        _, back = jax.vjp(self._normalized, kernel)
        (to_kernel,) = back(jnp.where(self.window(kernel), gradient, 0))
        return to_kernel

    def _normalized(self, kernel: Kernel) -> Kernel:
        centred = self.centred(kernel)
        variance = jnp.var(centred, axis=_row_axes(kernel), ddof=1, keepdims=True)
        return centred * (2 * math.sqrt(2)) / jnp.sqrt(variance + 1e-5)


RECU_QUANTILE = 0.92

DENSE = WeightRule(_without_mean)  # linear layers of BinaryViT: a row less its mean
CONV = WeightRule()  # its convolutions, and all of Bi-ViT as released: no centring
RECU = Rectified(_without_mean)  # an option of BHViT's linear layers
BITS = WeightRule(forward=bit)  # where every sign is a bit


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def binarize(kernel: Kernel, rule: WeightRule) -> Kernel:
    """Returns the codes of a kernel, differentiable by the rule's gradient."""
    return rule.codes(kernel)


binarize.defvjp(
    lambda kernel, rule: (rule.codes(kernel), kernel),
    lambda rule, kernel, gradient: (rule.gradient(kernel, gradient),),
)
