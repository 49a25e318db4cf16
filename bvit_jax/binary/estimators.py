"""Straight-through estimators: a sign, and the slope that stands in for its derivative.

The derivative of a sign is zero wherever there is one. Training takes a slope in its place, and the choice of
the slope is the choice of an estimator. Each of those here has the integral 2, which is the height of the
sign's step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
from jax import Array

from bvit_jax.imports.shapes import Float

Elementwise = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


@dataclass(frozen=True)
class Estimator:
    """A sign and its gradient. Both return the dtype of their argument.

    Every binary product, the attention, the packed feed-forward branch and the health metrics take the
    estimator that they are given, so that another ``slope`` here changes all of their gradients.

    Attributes:
      slope: x to what the gradient of the sign of x is multiplied with.
      forward: x to its code, -1, 0 or 1; the model chooses what the sign of zero is.
    """

    slope: Elementwise
    forward: Elementwise = jnp.sign

    @property
    def bit(self) -> "Estimator":
        """The same slope for a sign that one bit holds: that of zero is 1."""
        return replace(self, forward=bit)


def bit(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns -1 or 1 with the sign of ``x``, 1 for 0 and NaN for NaN."""
    return jnp.where(x == 0, 1, jnp.sign(x))


@cache
def straight_through(estimator: Estimator) -> Elementwise:
    """Returns the sign of an estimator as a function that automatic differentiation sees with its slope."""

    @jax.custom_vjp
    def sign(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return estimator.forward(x)

    sign.defvjp(lambda x: (estimator.forward(x), x), lambda x, gradient: (gradient * estimator.slope(x),))
    return sign


def _parabola(x: Array) -> Array:
    # max() rather than a mask times (2 - 2|x|): finite where x is infinite.
    return jnp.maximum(2 - 2 * jnp.abs(x), 0)


def _clip(x: Array) -> Array:
    return (jnp.abs(x) <= 1).astype(x.dtype)


def _tanh(x: Array) -> Array:
    return 2 - 2 * jnp.square(jnp.tanh(2 * x))


PARABOLA = Estimator(_parabola)
"""2 - 2|x| on [-1, 1]: Bi-Real Net (Liu et al., ECCV 2018) and BinaryViT."""

CLIP = Estimator(_clip)
"""1 on the closed [-1, 1]: BinaryNet (Hubara et al., NeurIPS 2016), whose mask is |x| <= 1."""

TANH = Estimator(_tanh)
"""The derivative of tanh(2x), 2 · (1 - tanh²(2x)): IR-Net's (Qin et al., CVPR 2020) with t = 2 and k = 1."""

ESTIMATORS: dict[str, Estimator] = {"parabola": PARABOLA, "clip": CLIP, "tanh": TANH}
"""The values of ``config.model.estimator``."""
