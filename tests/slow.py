"""Slow formulations of quantisers, whose gradients automatic differentiation makes.

Each adds a smooth function to the hidden difference between it and the value: the value is exact, and the
  gradient is that of the smooth function.
"""

import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from bvit_jax.binary.estimators import CLIP, PARABOLA, TANH, Estimator


def with_gradient_of(smooth, value):
    """Returns ``value`` with the gradient of ``smooth``."""
    return smooth + stop_gradient(value - smooth)


def clipped(x, bound=1.0, closed=True):
    """Returns ``x`` clipped to ±bound, with the gradient of the closed or open interval."""
    inside = jnp.abs(x) <= bound if closed else jnp.abs(x) < bound
    return jnp.where(inside, x, stop_gradient(jnp.clip(x, -bound, bound)))


def parabolas(x):
    """Returns Bi-Real Net's approximation of the sign."""
    pieces = jnp.where(x < 0, 2 * x + x**2, 2 * x - x**2)
    return jnp.where(jnp.abs(x) < 1, pieces, stop_gradient(jnp.sign(x)))


CAUCHY = Estimator(lambda x: 1 / (1 + x**2))  # one that nobody offers
SMOOTH = {  # what the slope of each estimator is the derivative of
    "parabola": (PARABOLA, parabolas),
    "clip": (CLIP, clipped),
    "tanh": (TANH, lambda x: jnp.tanh(2 * x)),
    "cauchy": (CAUCHY, jnp.arctan),
}


def sign(x, smooth=parabolas):
    return with_gradient_of(smooth(x), jnp.sign(x))


def one_bit(kernel, centre):
    """Returns ``mean|W| · sign(W)`` per output channel, W centred or not, with the gradient of the clip."""
    axes = tuple(range(kernel.ndim - 1))
    w = kernel - jnp.mean(kernel, axes) if centre else kernel
    return with_gradient_of(clipped(w), jnp.sign(w) * jnp.mean(jnp.abs(kernel), axes))


def probs(probs, scale):
    q = probs / scale
    rounded = with_gradient_of(q, jnp.round(q))
    return scale * jnp.where(q < 0, 0.0, jnp.where(q > 1, 1.0, rounded))


def many_bits(values, w, clip):
    """Returns a straight-through function of ``w``; ``values`` quantises a clipped row in numpy."""
    hard = values(np.clip(w, -clip, clip).ravel()).reshape(w.shape)
    return lambda w: with_gradient_of(clipped(w, clip, closed=False), hard)


def ternary_values(row):
    kept = [abs(value) for value in row if abs(value) > 0.7 * np.mean(np.abs(row))]
    level = sum(kept) / len(kept)
    return np.array([np.sign(v) * level if abs(v) in kept else 0 for v in row])


def symmetric_values(bits):
    last = 2 ** (bits - 1) - 1
    return lambda row: np.array([round(v / max(abs(row)) * last) * max(abs(row)) / last for v in row])
