"""Weights of two to eight bits, quantised per tensor.

Source: the behaviour of ``transformer/utils_quant.py`` in github.com/Phuoc-Hoan-Le/BinaryViT.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from bvit_jax.imports.shapes import Float


def quantize_weight(w: Float[Array, "*shape"], bits: int, clip: float) -> Float[Array, "*shape"]:
    """Returns weights clipped to ±``clip`` and quantised, with one scale for the whole tensor.

    Two bits give {-s, 0, s} (`_ternary`), more of them 2^bits - 1 evenly spaced levels (`_symmetric`), and 32
    the weights as they are. The gradient passes on the open interval (-clip, clip).

    Raises:
      ValueError: ``bits`` is neither 2 to 8 nor 32.
    """
    if bits == 32:
        return w
    if not 2 <= bits <= 8:
        raise ValueError(f"weight bits are {bits}; expected 2 to 8 or 32 (1 has its own product)")
    return _quantize(w, bits, clip)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _quantize(w: Array, bits: int, clip: float) -> Array:
    clipped = jnp.clip(w, -clip, clip)
    return _ternary(clipped) if bits == 2 else _symmetric(clipped, bits)


def _quantize_backward(bits: int, clip: float, w: Array, gradient: Array) -> tuple[Array]:
    del bits
    return (jnp.where(jnp.abs(w) < clip, gradient, 0),)


_quantize.defvjp(lambda w, bits, clip: (_quantize(w, bits, clip), w), _quantize_backward)


def _ternary(w: Array) -> Array:
    """Sets weights above 0.7 times the mean magnitude to their own mean magnitude (arXiv:1605.04711)."""
    magnitude = jnp.abs(w)
    # Negated, so that a NaN, for which every comparison is false, is kept and not hidden.
    mask = ~(magnitude <= 0.7 * jnp.mean(magnitude))
    total = jnp.sum(jnp.where(mask, magnitude, 0))
    count = jnp.sum(mask).astype(w.dtype)
    # All-zero weights have an empty mask: BinaryViT (PyTorch) divides 0 by 0 there.
    return jnp.where(mask, jnp.sign(w) * total / jnp.maximum(count, 1), 0)


def _symmetric(w: Array, bits: int) -> Array:
    """Rounds to levels symmetric around 0, the last of which is the largest magnitude."""
    largest = jnp.max(jnp.abs(w))
    # The reciprocal first, as PyTorch divides a number by a tensor: weights often lie exactly halfway between
    # two levels, where the last bit of the factor decides.
    levels = jnp.reciprocal(jnp.where(largest > 0, largest, 1)) * (2 ** (bits - 1) - 1)
    return jnp.round(w * levels) / levels
