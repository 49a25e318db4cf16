"""The quantisers of Bi-ViT's released code, with their hand-written gradients.

A tensor has a scale α and a zero point z, which broadcast against it. With ``u = x / α + round(z)`` its code
is the integer ``sign(clip(u, -1, 1)) - round(z)`` and its value the code times α. Rounding and sign are
straight-through for the gradient, the clamp is not. The edges are in the table of `bvit_jax.binary`; the
weights of the linear layers follow its rule `CONV`.

Source: Li et al., "Bi-ViT" (AAAI 2024), in the behaviour of github.com/YanjingLi0202/Bi-ViT.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary.probabilities import sum_to
from bvit_jax.imports.shapes import Float

OUTPUT_LIMIT = 10.0  # of the GELU's output
UNSIGNED = -1e-5  # a tensor whose minimum is at least this counts as unsigned
MOMENTUM = 0.1  # weight of the first batch in the zero point, which starts at 0


@jax.custom_vjp
def zero_point_codes(
    x: Float[Array, "*shape"], scale: Float[Array, "*#shape"], zero_point: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Returns the codes of a tensor: its sign around a learned zero, less that zero.

    The gradient of ``x`` is that of the codes over ``scale`` where |u| <= 1; ``scale`` receives
    ``-x / scale²`` of it there, ``zero_point`` minus the gradient outside.

    The scale must not be zero. Codes are at most |round(z)| + 1 in magnitude.
    """
    return jnp.sign(_position(x, scale, zero_point)) - jnp.round(zero_point)


def _position(x: Array, scale: Array, zero_point: Array) -> Array:
    return x / scale + jnp.round(zero_point)


def _codes_forward(x: Array, scale: Array, zero_point: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return zero_point_codes(x, scale, zero_point), (x, scale, zero_point)


def _codes_backward(residuals: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, scale, zero_point = residuals
    inside = jnp.abs(_position(x, scale, zero_point)) <= 1
    to_x = jnp.where(inside, gradient / scale, 0)
    to_scale = sum_to(jnp.where(inside, -to_x * (x / scale), 0), scale.shape)
    to_zero_point = sum_to(jnp.where(inside, 0, -gradient), zero_point.shape)
    return to_x, to_scale, to_zero_point


zero_point_codes.defvjp(_codes_forward, _codes_backward)


@jax.custom_vjp
def scale_gradient(x: Float[Array, "*shape"], factor: Float[Array, ""]) -> Float[Array, "*shape"]:
    """Returns ``x`` unchanged and multiplies its gradient by ``factor``, which has none."""
    del factor
    return x


scale_gradient.defvjp(
    lambda x, factor: (x, factor),
    lambda factor, gradient: (gradient * factor, jnp.zeros_like(factor)),
)


def learned_step(parameter: Float[Array, "*shape"], size: int) -> Float[Array, "*shape"]:
    """Returns a scale or zero point of a tensor of ``size`` elements, its gradient over sqrt(size)."""
    return scale_gradient(parameter, jnp.asarray(1 / math.sqrt(size), parameter.dtype))


class FirstValues(NamedTuple):
    """The values of a quantiser after the first batch.

    Attributes:
      scale: twice the mean magnitude of the whole tensor.
      zero_point: a tenth of the minimum plus the scale.
      signed: 1 if there are negative values, else 0; saved in checkpoints, not used.
    """

    scale: Float[Array, ""]
    zero_point: Float[Array, ""]
    signed: Float[Array, ""]


def first_scale(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns twice the mean magnitude of a tensor."""
    return 2 * jnp.mean(jnp.abs(x))


def first_values(x: Float[Array, "..."]) -> FirstValues:
    """Returns the values that a quantiser takes from the first batch; no gradient passes."""
    x = lax.stop_gradient(x)
    scale, least = first_scale(x), jnp.min(x)
    return FirstValues(scale, MOMENTUM * (least + scale), (least < UNSIGNED).astype(x.dtype))


def clip_output(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns ``x`` clipped to ±10; the gradient passes on the closed interval."""
    clipped = lax.stop_gradient(jnp.clip(x, -OUTPUT_LIMIT, OUTPUT_LIMIT))
    return jnp.where(jnp.abs(x) <= OUTPUT_LIMIT, x, clipped)
