"""Attention probabilities of one bit, {0, scale}, with a learned scale."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary.codes import Codes
from bvit_jax.imports.shapes import Float


def quantize_probs(probs: Float[Array, "*shape"], scale: Float[Array, "*#shape"]) -> Codes:
    """Returns attention probabilities as codes in {0, 1} and their scale.

    With q = probs / scale, the gradient of the codes times the scale reaches ``probs`` where 0 <= q <= 1;
    ``scale`` receives round(q) - q of it there and all of it where q > 1. The scale that is returned is a
    constant for the gradient, because that of the codes already contains its part: see `prob_codes`. The
    scale must not be zero.
    """
    return Codes(prob_codes(probs, scale), lax.stop_gradient(scale))


@jax.custom_vjp
def prob_codes(probs: Float[Array, "*shape"], scale: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Returns the codes of attention probabilities, ``clip(round(probs / scale), 0, 1)``.

    The scale is multiplied *after* the product with the values, which stays exact. For that to give the
    right gradient too, the backward pass takes its argument as the gradient of the codes, ``scale`` times
    that of the probabilities.
    """
    return jnp.clip(jnp.round(probs / scale), 0, 1)


def _prob_codes_forward(probs: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return prob_codes(probs, scale), (probs, scale)


def _prob_codes_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    probs, scale = residuals
    gradient = gradient / scale
    ratio = probs / scale
    inside = (ratio >= 0) & (ratio <= 1)
    residue = jnp.where(inside, jnp.round(ratio) - ratio, (ratio > 1).astype(ratio.dtype))
    return jnp.where(inside, gradient, 0), sum_to(gradient * residue, scale.shape)


prob_codes.defvjp(_prob_codes_forward, _prob_codes_backward)


def sum_to(x: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Sums over the axes along which an array of ``shape`` was broadcast to that of ``x``."""
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis, size in enumerate(padded) if size == 1)
    return jnp.sum(x, axis=axes, keepdims=True).reshape(shape)


@jax.custom_vjp
def above(x: Float[Array, "*shape"], floor: Float[Array, ""]) -> Float[Array, "*shape"]:
    """Returns ``max(x, floor)``; below the floor only a gradient whose descent raises ``x`` passes.

    A plain maximum would never let a parameter rise that once fell below its floor, which has no gradient.
    """
    return jnp.maximum(x, floor)


def _above_backward(residuals: tuple, gradient: Array) -> tuple[Array, Array]:
    x, floor = residuals
    return jnp.where((x > floor) | (gradient < 0), gradient, 0), jnp.zeros_like(floor)


above.defvjp(lambda x, floor: (above(x, floor), (x, floor)), _above_backward)
