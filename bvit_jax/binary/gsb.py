"""Attention probabilities as a sum of three scaled masks, around a row's largest.

Source: the option ``gsb`` of github.com/IMRL/BHViT.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bvit_jax.binary.probabilities import sum_to
from bvit_jax.imports.shapes import Float

FLOOR = float(np.float32(1e-5))  # of each scale
NEAR, FAR = 0.9, 0.7  # shares of a row's largest

Probs = Float[Array, "batch heads queries keys"]
Scalar = Float[Array, ""]


@jax.custom_vjp
def gsb_probabilities(probs: Probs, scale: Scalar, second: Scalar, third: Scalar) -> Probs:
    """Returns ``scale * (base + second * near + third * nearest)``, three masks of ``probs / scale``.

    ``nearest`` are those above 0.9 of their row's largest, ``near`` the others above 0.7 of it, ``base`` what
    rounds to at least 1 less both. The gradient of the probabilities is that of the result times the result.
    """
    return _masked(probs, scale, second, third)[0]


def _masked(probs: Array, scale: Array, second: Array, third: Array) -> tuple[Array, ...]:
    scale_, second, third = (jnp.maximum(a, jnp.asarray(FLOOR, a.dtype)) for a in (scale, second, third))
    ratio = probs / scale
    largest = jnp.max(ratio, axis=-1, keepdims=True)
    nearest = (ratio > NEAR * largest).astype(probs.dtype)
    above = (ratio > FAR * largest).astype(probs.dtype)
    near = above - nearest
    total = jnp.clip(jnp.round(ratio), 0, 1) - above + second * near + third * nearest
    return scale_ * total, total, near, nearest, scale_


def _backward(residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    probs, *scales = residuals
    y, total, near, nearest, scale = _masked(probs, *scales)
    ratio = probs / scale
    residue = jnp.where((ratio >= 0) & (ratio <= 1), 1 - ratio, 1)
    parts = (total * residue, scale * near, scale * nearest)
    return gradient * y, *(sum_to(gradient * part, ()) for part in parts)


gsb_probabilities.defvjp(lambda *arguments: (_masked(*arguments)[0], arguments), _backward)
