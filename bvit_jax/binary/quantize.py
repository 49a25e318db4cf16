"""Quantisers as pure functions, each with its forward rule and its hand-written gradient.

None of these functions is differentiable in the usual sense; the backward passes are straight-through
estimators, and what they do *at* the edges is part of the numbers. The table of edge rules (all of them
tested):

====================  ==================================  ===========================================
function              forward at the edge                 gradient at the edge
====================  ==================================  ===========================================
sign                  sign(0) = 0                         2 at 0, 0 at -1 and at 1, 0 at ±inf
sign_bit              sign(0) = sign(-0) = 1              as that of sign
prob_codes            p/a = 0.5 -> 0 (half to even)       1 on the closed interval 0 <= p/a <= 1
binarize_dense        a weight at its row mean -> 0       1 on the closed interval |W - mean| <= 1
binarize_conv         sign(0) = 0                         1 on the closed interval |W| <= 1
weight_bit            sign(0) = sign(-0) = 1              1 on the closed interval |W| <= 1
above                 the floor itself                    only what raises the value
ternarize             |w| at the threshold -> 0           1 on the open interval (-clip, clip)
quantize_symmetric    half to even                        1 on the open interval (-clip, clip)
quantize_asymmetric   half to even                        1 on the open interval (-clip, clip)
====================  ==================================  ===========================================

Weights follow the Flax layout: the output channel is the last axis, so "a row" of the papers (all weights
of one output channel) is a slice over every other axis.

Source: the behaviour of ``transformer/utils_quant.py`` in github.com/Phuoc-Hoan-Le/BinaryViT.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

# --- activations -------------------------------------------------------------------------------


@jax.custom_vjp
def sign(x: Array) -> Array:
    """Returns -1, 0 or 1 with the sign of ``x``; the gradient is that of a piecewise parabola.

    The derivative is 2 + 2x on [-1, 0], 2 - 2x on (0, 1] and 0 elsewhere (Bi-Real Net's estimator).
    Any shape; the dtype of ``x``.
    """
    return jnp.sign(x)


def _sign_forward(x: Array) -> tuple[Array, Array]:
    return jnp.sign(x), x


def sign_slope(x: Array) -> Array:
    """Returns the derivative that stands in for that of the sign."""
    # max() rather than a mask times (2 - 2|x|): finite where x is infinite.
    return jnp.maximum(2 - 2 * jnp.abs(x), 0)


def _sign_backward(x: Array, gradient: Array) -> tuple[Array]:
    return (gradient * sign_slope(x),)


sign.defvjp(_sign_forward, _sign_backward)


def _bits(x: Array) -> Array:
    return jnp.where(x == 0, 1, jnp.sign(x))  # a NaN stays one


@jax.custom_vjp
def sign_bit(x: Array) -> Array:
    """Returns -1 or 1, what one bit can hold: `sign` with the sign of zero 1. Same gradient."""
    return _bits(x)


sign_bit.defvjp(lambda x: (_bits(x), x), _sign_backward)


@jax.custom_vjp
def prob_codes(probs: Array, scale: Array) -> Array:
    """Returns the {0, 1} codes of attention probabilities: ``clip(round(probs / scale), 0, 1)``.

    The binary probabilities are ``scale * codes``. Multiplying by the scale *after* the product with
    the values keeps that product exact; so that this is also the right gradient, the backward pass
    treats its argument as the gradient of the codes, ``scale`` times that of the probabilities.

    Args:
      probs: probabilities, any shape.
      scale: learned, not zero; a scalar of the layer, or in a shape that broadcasts against ``probs``.

    Returns:
      Codes in the shape and dtype of ``probs``.
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


def binarize_probs(probs: Array, scale: Array) -> Array:
    """Returns attention probabilities binarised to {0, scale}, with a learned ``scale``.

    With q = probs/scale, the gradient reaches ``probs`` where 0 <= q <= 1, and ``scale`` receives
    round(q) - q there and 1 where q > 1. ``scale`` has shape ().
    """
    return lax.stop_gradient(scale) * prob_codes(probs, scale)


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes along which an array of ``shape`` was broadcast to that of ``x``."""
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis, size in enumerate(padded) if size == 1)
    return jnp.sum(x, axis=axes, keepdims=True).reshape(shape)


@jax.custom_vjp
def above(x: Array, floor: Array) -> Array:
    """Returns ``max(x, floor)``, whose gradient below the floor passes only what raises ``x`` in a descent.

    A plain maximum would hold a parameter that once fell below its floor there for good. ``floor`` is a
    scalar without gradient.
    """
    return jnp.maximum(x, floor)


def _above_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, floor = residuals
    return jnp.where((x > floor) | (gradient < 0), gradient, 0), jnp.zeros_like(floor)


above.defvjp(lambda x, floor: (above(x, floor), (x, floor)), _above_backward)


# --- weights of one bit ------------------------------------------------------------------------


def _row_axes(kernel: Array) -> tuple[int, ...]:
    return tuple(range(kernel.ndim - 1))


def weight_scale(kernel: Array) -> Array:
    """Returns the mean magnitude of each output channel, shape (out,); no gradient passes."""
    return lax.stop_gradient(jnp.mean(jnp.abs(kernel), axis=_row_axes(kernel)))


def centred(kernel: Array) -> Array:
    """Returns a kernel without the mean of each output channel."""
    return kernel - jnp.mean(kernel, axis=_row_axes(kernel), keepdims=True)


def dense_codes(kernel: Array) -> Array:
    """Returns the ±1 codes of a linear kernel (in, out): the sign of the row-centred weights."""
    return jnp.sign(centred(kernel))


def conv_codes(kernel: Array) -> Array:
    """Returns the ±1 codes of a convolution kernel (height, width, in, out): no centring."""
    return jnp.sign(kernel)


@jax.custom_vjp
def weight_bit(kernel: Array) -> Array:
    """Returns -1 or 1 for each weight, 1 for a zero; the gradient passes where the weight is in [-1, 1]."""
    return _bits(kernel)


weight_bit.defvjp(
    lambda kernel: (_bits(kernel), kernel),
    lambda kernel, gradient: (conv_gradient(kernel, gradient),),
)


def dense_window(kernel: Array) -> Array:
    """Returns to which weights of a linear kernel (in, out) the sign passes a gradient, bool."""
    return jnp.abs(centred(kernel)) <= 1


def conv_window(kernel: Array) -> Array:
    """Returns to which weights of (height, width, in, out) the sign passes a gradient, bool."""
    return jnp.abs(kernel) <= 1


def dense_gradient(kernel: Array, gradient: Array) -> Array:
    """Returns the gradient of a linear kernel, from that of its binarised weights."""
    return centred(jnp.where(dense_window(kernel), gradient, 0))


def conv_gradient(kernel: Array, gradient: Array) -> Array:
    """Returns the gradient of a convolution kernel, from that of its binarised weights."""
    return jnp.where(conv_window(kernel), gradient, 0)


@jax.custom_vjp
def binarize_dense(kernel: Array) -> Array:
    """Returns ``mean|W|`` times the sign of the centred weights, per output channel of (in, out).

    The scale comes from the uncentred weights and is constant for the gradient, which passes where
    the centred weight lies in [-1, 1] and then through the centring.
    """
    return dense_codes(kernel) * weight_scale(kernel)


binarize_dense.defvjp(
    lambda kernel: (binarize_dense(kernel), kernel),
    lambda kernel, gradient: (dense_gradient(kernel, gradient),),
)


@jax.custom_vjp
def binarize_conv(kernel: Array) -> Array:
    """Returns ``mean|W| * sign(W)`` per output filter of (height, width, in, out); no centring.

    The scale is constant for the gradient, which passes where the weight lies in [-1, 1].
    """
    return conv_codes(kernel) * weight_scale(kernel)


binarize_conv.defvjp(
    lambda kernel: (binarize_conv(kernel), kernel),
    lambda kernel, gradient: (conv_gradient(kernel, gradient),),
)


# --- weights of two to eight bits --------------------------------------------------------------


def _clipped_straight_through(forward: Callable[..., Array]) -> Callable[..., Array]:
    """Clips the first argument to ±clip, applies ``forward``, and passes the gradient inside.

    ``forward`` takes (clipped weights, *settings); the result takes (weights, clip, *settings).
    """

    @partial(jax.custom_vjp, nondiff_argnums=(2,))
    def apply(w: Array, clip: Array, settings: tuple) -> Array:
        return forward(jnp.clip(w, -clip, clip), *settings)

    def backward(settings: tuple, residuals: tuple[Array, Array], gradient: Array) -> tuple:
        w, clip = residuals
        return jnp.where(jnp.abs(w) < clip, gradient, 0), jnp.zeros_like(clip)

    apply.defvjp(lambda w, clip, settings: (apply(w, clip, settings), (w, clip)), backward)

    def quantize(w: Array, clip: float, *settings: object) -> Array:
        return apply(w, jnp.asarray(clip, w.dtype), settings)

    return quantize


def _axes(w: Array, by_row: bool) -> tuple[int, ...]:
    return _row_axes(w) if by_row else tuple(range(w.ndim))


def _ternary_forward(w: Array, by_row: bool) -> Array:
    axes = _axes(w, by_row)
    magnitude = jnp.abs(w)
    # Negated, so that a NaN, for which every comparison is false, is kept and not hidden.
    mask = ~(magnitude <= 0.7 * jnp.mean(magnitude, axis=axes, keepdims=True))
    total = jnp.sum(jnp.where(mask, magnitude, 0), axis=axes, keepdims=True)
    count = jnp.sum(mask, axis=axes, keepdims=True).astype(w.dtype)
    # All-zero weights have an empty mask: the reference divides 0 by 0 there.
    return jnp.where(mask, jnp.sign(w) * total / jnp.maximum(count, 1), 0)


def _symmetric_forward(w: Array, bits: int, by_row: bool) -> Array:
    largest = jnp.max(jnp.abs(w), axis=_axes(w, by_row), keepdims=True)
    # The reciprocal first, as PyTorch divides a number by a tensor: weights often lie exactly
    # halfway between two levels, where the last bit of the factor decides.
    levels = jnp.reciprocal(jnp.where(largest > 0, largest, 1)) * (2 ** (bits - 1) - 1)
    return jnp.round(w * levels) / levels


def _asymmetric_forward(w: Array, bits: int, by_row: bool) -> Array:
    axes = _axes(w, by_row)
    low = jnp.min(w, axis=axes, keepdims=True)
    span = jnp.max(w, axis=axes, keepdims=True) - low + 1e-8
    levels = 2**bits - 1
    return jnp.round((w - low) / span * levels) / levels * span + low


_ternarize = _clipped_straight_through(_ternary_forward)
_quantize_symmetric = _clipped_straight_through(_symmetric_forward)
_quantize_asymmetric = _clipped_straight_through(_asymmetric_forward)


def ternarize(w: Array, clip: float, *, by_row: bool = False) -> Array:
    """Returns weights in {-s, 0, s} (Ternary Weight Networks, arXiv:1605.04711).

    Weights above 0.7 times the mean magnitude are kept and s is their mean magnitude, over the whole
    tensor or per output channel (``by_row``), after clipping to ±``clip``.
    """
    return _ternarize(w, clip, by_row)


def quantize_symmetric(w: Array, clip: float, bits: int, *, by_row: bool = False) -> Array:
    """Returns weights on 2^bits - 1 levels, evenly spaced and symmetric around 0.

    The largest magnitude, over the whole tensor or per output channel (``by_row``), is the last
    level; clipping to ±``clip`` comes first.
    """
    return _quantize_symmetric(w, clip, bits, by_row)


def quantize_asymmetric(w: Array, clip: float, bits: int, *, by_row: bool = False) -> Array:
    """Returns weights on 2^bits levels, evenly spaced from the least to the greatest weight.

    The range is that of the whole tensor or of each output channel (``by_row``); clipping to
    ±``clip`` comes first.
    """
    return _quantize_asymmetric(w, clip, bits, by_row)


def quantize_weight(w: Array, bits: int, clip: float) -> Array:
    """Returns weights of 2 to 8 bits as the models use them: per tensor; 32 bits are unchanged.

    Raises:
      ValueError: ``bits`` is not 2 to 8 or 32.
    """
    if bits == 32:
        return w
    if bits == 2:
        return ternarize(w, clip)
    if 3 <= bits <= 8:
        return quantize_symmetric(w, clip, bits)
    raise ValueError(f"weight bits are {bits}; expected 2 to 8 or 32 (1 has its own product)")
