"""Attention probabilities in four levels, 0 to 3 times a learned step around a learned zero point.

The levels are the sum of three binary masks, ``code >= 1``, ``>= 2`` and ``>= 3``: a product with them is
three binary products.

Source: Gao et al., "BHViT" (CVPR 2025), in the behaviour of github.com/IMRL/BHViT.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary.codes import Codes
from bvit_jax.binary.probabilities import sum_to
from bvit_jax.imports.shapes import Float

LARGEST = 3  # code; also what probabilities are multiplied with before
MOMENTUM = 0.1  # weight of the first batch's minimum in the zero point


def quantize_levels(
    x: Float[Array, "*shape"], step: Float[Array, "*#shape"], zero_point: Float[Array, "*#shape"]
) -> Codes:
    """Returns ``x`` as codes in {0, 1, 2, 3} and their step.

    With u = x / step + zero_point, the gradient of the codes times the step reaches ``x`` where u is rounded
    to a code; ``step`` and ``zero_point`` receive the straight-through gradients of ``step * code``. The step
    that is returned is a constant for the gradient, because that of the codes already contains its part, as
    in `bvit_jax.binary.probabilities.quantize_probs`. The step must not be zero.
    """
    return Codes(level_codes(x, step, zero_point), lax.stop_gradient(step))


@jax.custom_vjp
def level_codes(
    x: Float[Array, "*shape"], step: Float[Array, "*#shape"], zero_point: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Returns ``clip(round(x / step + zero_point), 0, 3)``; for the gradient see `quantize_levels`."""
    return jnp.clip(jnp.round(x / step + zero_point), 0, LARGEST)


def _levels_forward(x: Array, step: Array, zero_point: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return level_codes(x, step, zero_point), (x, step, zero_point)


def _levels_backward(residuals: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, step, zero_point = residuals
    rounded = jnp.round(x / step + zero_point)
    inside = (rounded >= 0) & (rounded <= LARGEST)
    to_value = gradient / step
    to_x = jnp.where(inside, to_value, 0)
    to_step = to_value * jnp.clip(rounded, 0, LARGEST) - to_x * (x / step)
    to_zero_point = jnp.where(inside, gradient, 0)
    return to_x, sum_to(to_step, step.shape), sum_to(to_zero_point, zero_point.shape)


level_codes.defvjp(_levels_forward, _levels_backward)


def first_levels(
    x: Float[Array, "batch heads queries keys"], zero_point: Float[Array, " heads"]
) -> tuple[Float[Array, " heads"], Float[Array, " heads"]]:
    """Returns step and zero point of each head after the first batch; no gradient passes."""
    x, others = lax.stop_gradient(x), (0, 2, 3)
    step = 2 * jnp.mean(jnp.abs(x), axis=others) / math.sqrt(LARGEST)
    return step, (1 - MOMENTUM) * zero_point + MOMENTUM * jnp.min(x, axis=others)
