"""The feed-forward branch of a block with its hidden layer in the caches of a CPU, never in main memory.

The hidden layer, two to eight times as wide as the tokens, is most of what a training step reads and writes.
Here it exists for some hundred tokens at a time, once in the forward and once in the backward pass; the
arrays saved between the passes and passed between the parts of the computation have the width of the tokens.
Three facts make that possible:

- The statistics of a batch norm after a product ``y = C.T s`` of signs need no ``y``: its mean is ``C.T m``
  and its variance the diagonal of ``C.T S C``, with m the mean of the signs and S their covariance.
- The gradient of that batch norm is linear in ``y``: its contribution to the gradients of C and s follows
  from S and from sums over the batch, after the loop over tokens.
- The product is computed again in the backward pass: counting bits costs less than storing it.

The slope of the estimator is applied where the input of a sign is at hand, so that any slope is right; the
products are those of signs with zeros, so that the estimator's forward function must be `jnp.sign`.

Within a loop channels come first and tokens last; see `bvit_jax.binary.bits`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary import bits
from bvit_jax.binary.estimators import Estimator
from bvit_jax.binary.weights import DENSE, weight_scale

# Tokens per part, and values of the hidden layer per part; measured.
NARROW_ROWS, WIDE_VALUES = 1568, 800 * 1024


class Unit(NamedTuple):
    """The parameters of a binary unit, ``RPReLU(batch_norm(W · sign(x + move)) + shortcut)``.

    ``kernel`` is (in, out), ``move`` (in,), the others (out,).
    """

    move: Array
    kernel: Array
    scale: Array
    bias: Array
    move1: Array
    slope: Array
    move2: Array


class Moments(NamedTuple):
    """Mean and biased variance of each channel of a unit's product, (out,)."""

    mean: Array
    var: Array


class _Norm(NamedTuple):
    """A batch norm, with the scale of the weights before it, as one affine map of the signs' product."""

    factor: Array
    shift: Array
    inverse: Array  # 1 / the standard deviation after the scale


class _Signs(NamedTuple):
    """Of the signs that enter a unit: their mean (in,), and covariance times number of tokens (in, in)."""

    mean: Array
    scatter: Array


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def feed_forward(
    x: Array, expand: Unit, contract: Unit, estimator: Estimator, epsilon: float
) -> tuple[Array, Moments, Moments]:
    """Returns the feed-forward branch in training, and the statistics of its two batch norms.

    The first unit's shortcut repeats the tokens to the width of the hidden layer; that of the second averages
    neighbouring channels of the hidden layer.

    Args:
      x: (tokens, channels), float32 or float64.
      expand: the unit from channels to the hidden layer.
      contract: the unit back.
      estimator: whose slope the gradients of the signs have.
      epsilon: of the batch norms.

    Returns:
      (tokens, channels), and moments through which no gradient passes.
    """
    return _forward(x, expand, contract, estimator, epsilon)[0]


def inference(x: Array, units: Sequence[Unit], running: Sequence[Moments], epsilon: float) -> Array:
    """Returns the feed-forward branch in evaluation: as `feed_forward`, with running statistics.

    Args:
      x: (tokens, channels), float32 or float64.
      units: ``expand`` and ``contract``.
      running: the running statistics of their batch norms, those of the products times the weights' scale.
      epsilon: of the batch norms.

    Returns:
      (tokens, channels).
    """
    expand, contract = units
    norm1, norm2 = (_fold_running(u, m, epsilon) for u, m in zip(units, running, strict=True))
    weights = _pack_weights(expand), _pack_weights(contract)

    def part(_: None, x: Array) -> tuple[None, Array]:
        x = x.T
        shifted = _hidden(x, weights[0], expand, norm1)
        y, pooled = _contract(shifted, weights[1], expand, contract)
        return None, _rprelu(_normalise(y, norm2, contract) + pooled, contract).T

    return _in_parts(part, None, (x,), _wide_rows(x, expand))[1]


def _forward(
    x: Array, expand: Unit, contract: Unit, estimator: Estimator, epsilon: float
) -> tuple[tuple, tuple]:
    del estimator  # its forward function is the sign
    signs = _signs(x, expand)
    moments1 = _moments_of_product(signs, expand, x.shape[0])
    norm1 = _fold(expand, weight_scale(expand.kernel), moments1, epsilon)
    weights = _pack_weights(expand), _pack_weights(contract)

    def part(_: None, x: Array) -> tuple[None, tuple[Array, Array]]:
        y, pooled = _contract(_hidden(x.T, weights[0], expand, norm1), weights[1], expand, contract)
        return None, (y.T, pooled.T)

    _, (y, pooled) = _in_parts(part, None, (x,), _wide_rows(x, expand))
    mean = jnp.mean(y, axis=0)
    moments2 = Moments(mean, jnp.mean(jnp.square(y - mean), axis=0))
    norm2 = _fold(contract, weight_scale(contract.kernel), moments2, epsilon)
    shifted = y * norm2.factor + (norm2.shift - contract.move1) + pooled
    out = jnp.maximum(shifted, 0) + contract.slope * jnp.minimum(shifted, 0) + contract.move2
    scaled = _scaled(moments1, expand), _scaled(moments2, contract)
    return (out, *scaled), (x, y - mean, shifted, signs, norm1, norm2, expand, contract)


def _backward(
    estimator: Estimator, epsilon: float, residuals: tuple, gradients: tuple
) -> tuple[Array, Unit, Unit]:
    x, centred, shifted2, signs, norm1, norm2, expand, contract = residuals
    gradient = gradients[0]
    count, channels = x.shape
    codes1, scale1 = DENSE.quantize(expand.kernel)
    scale2 = weight_scale(contract.kernel)

    # The second RPReLU and batch norm, at the width of the tokens.
    to_sum2 = jnp.where(shifted2 > 0, gradient, contract.slope * gradient)
    to_slope2 = jnp.sum(gradient * jnp.minimum(shifted2, 0), axis=0)
    to_bias2 = jnp.sum(to_sum2, axis=0)
    along2 = jnp.sum(to_sum2 * centred, axis=0)
    to_product2 = (contract.scale * norm2.inverse) * (
        to_sum2 - to_bias2 / count - centred * (jnp.square(scale2 * norm2.inverse) * along2 / count)
    )

    gain = expand.scale * norm1.inverse
    expansion = expand.kernel.shape[1] // channels
    sums, (to_signs1, to_shortcut) = _through_hidden(
        x, to_product2, to_sum2, norm1, expand, contract, estimator
    )
    to_codes2, along_signs, to_move2, to_bias1, to_slope1 = sums

    # The contribution of the first batch norm's own statistics, from the covariance of the signs.
    along_signs -= jnp.outer(signs.mean, to_bias1)
    along1 = jnp.sum(codes1 * along_signs, axis=0)
    pull = gain * jnp.square(scale1 * norm1.inverse) * along1 / count
    to_codes1 = gain * along_signs - pull * _exact(signs.scatter, codes1)
    between = (codes1 * (scale1 * pull)) @ codes1.T
    shifted1 = x + expand.move
    to_signs1 -= (jnp.sign(shifted1) - signs.mean) @ between + codes1 @ (scale1 * gain * to_bias1 / count)
    to_shifted1 = to_signs1 * estimator.slope(shifted1)

    to_move_hidden = to_move2 + jnp.repeat(jnp.sum(to_sum2, axis=0) / expansion, expansion)
    to_expand = Unit(
        move=jnp.sum(to_shifted1, axis=0),
        kernel=DENSE.gradient(expand.kernel, to_codes1),
        scale=along1 * scale1 * norm1.inverse,
        bias=to_bias1,
        move1=-to_bias1,
        slope=to_slope1,
        move2=to_move_hidden,
    )
    to_contract = Unit(
        move=to_move2,
        kernel=DENSE.gradient(contract.kernel, to_codes2),
        scale=along2 * scale2 * norm2.inverse,
        bias=to_bias2,
        move1=-to_bias2,
        slope=to_slope2,
        move2=jnp.sum(gradient, axis=0),
    )
    return to_shifted1 + to_shortcut, to_expand, to_contract


feed_forward.defvjp(_forward, _backward)


def _through_hidden(
    x: Array,
    to_product2: Array,
    to_sum2: Array,
    norm1: _Norm,
    expand: Unit,
    contract: Unit,
    estimator: Estimator,
) -> tuple[tuple, tuple[Array, Array]]:
    """Computes the backward pass of the hidden layer.

    Args:
      x: (tokens, channels).
      to_product2: gradient of the second product, (tokens, channels).
      to_sum2: gradient of the second shortcut, (tokens, channels).
      norm1, expand, contract, estimator: as in `_forward`.

    Returns:
      Sums over the tokens: gradient of the second codes, signs of x times the gradient of the first sum, and
        the gradients of the second shift, of that sum and of the first slope. And the gradients of the first
        signs and shortcut, (tokens, channels), the former without the statistics of the first batch norm.
    """
    (codes1, scale1), (codes2, scale2) = (DENSE.quantize(unit.kernel) for unit in (expand, contract))
    gain = expand.scale * norm1.inverse
    weights = bits.pack(codes1)
    expansion = expand.kernel.shape[1] // x.shape[1]

    def part(sums: tuple, x: Array, to_product2: Array, to_sum2: Array) -> tuple[tuple, tuple[Array, Array]]:
        x = x.T
        shifted = _hidden(x, weights, expand, norm1)
        hidden = _rprelu(shifted, expand) + contract.move[:, None]
        to_signs2 = ((codes2 * scale2) @ to_product2.T) * estimator.slope(hidden)
        to_hidden = to_signs2 + jnp.repeat(to_sum2.T / expansion, expansion, axis=0)
        to_sum1 = jnp.where(shifted > 0, to_hidden, expand.slope[:, None] * to_hidden)
        new = (
            jnp.sign(hidden) @ to_product2,
            jnp.sign(x + expand.move[:, None]) @ to_sum1.T,
            *(_row_sums(rows) for rows in (to_signs2, to_sum1, to_hidden * jnp.minimum(shifted, 0))),
        )
        to_signs1 = (codes1 * (scale1 * gain)) @ to_sum1
        # Slices, because XLA's CPU backend is slow with a reduction over the first of three axes.
        to_shortcut = sum(jnp.split(to_sum1, expansion)[1:], to_sum1[: x.shape[0]])
        return jax.tree.map(jnp.add, sums, new), (to_signs1.T, to_shortcut.T)

    zeros = [jnp.zeros(s, x.dtype) for s in (codes2.shape, codes1.shape, *3 * (codes1.shape[1:],))]
    return _in_parts(part, tuple(zeros), (x, to_product2, to_sum2), _wide_rows(x, expand))


# --- parts of the computation, channels first ---------------------------------------------------


def _hidden(x: Array, weights: bits.Bits, unit: Unit, norm: _Norm) -> Array:
    """Returns the input of the first RPReLU less its first shift, (hidden, tokens); x (channels, tokens)."""
    shortcut = (unit.kernel.shape[1] // x.shape[0], 1)

    def shifted() -> Array:
        return x + unit.move[:, None]

    def signs() -> tuple[Array, Array]:
        return DENSE.codes(unit.kernel), jnp.sign(shifted())

    def to_shifted(y: Array) -> Array:
        return _normalise(y.astype(x.dtype), norm, unit) + jnp.tile(x, shortcut)

    return bits.product(weights, bits.pack(shifted()), signs, to_shifted)


def _contract(shifted: Array, weights: bits.Bits, expand: Unit, contract: Unit) -> tuple[Array, Array]:
    """Returns the second product and the second shortcut, both (channels, tokens)."""

    def moved() -> Array:
        return _rprelu(shifted, expand) + contract.move[:, None]

    def signs() -> tuple[Array, Array]:
        return DENSE.codes(contract.kernel), jnp.sign(moved())

    y = bits.product(weights, bits.pack(moved()), signs).astype(shifted.dtype)
    hidden = _rprelu(shifted, expand)
    return y, jnp.mean(hidden.reshape(y.shape[0], -1, y.shape[1]), axis=1)


def _normalise(y: Array, norm: _Norm, unit: Unit) -> Array:
    """Normalises the product of signs and subtracts the first shift of the RPReLU that follows."""
    return y * norm.factor[:, None] + (norm.shift - unit.move1)[:, None]


def _rprelu(shifted: Array, unit: Unit) -> Array:
    slope, move2 = unit.slope[:, None], unit.move2[:, None]
    return jnp.maximum(shifted, 0) + slope * jnp.minimum(shifted, 0) + move2


def _row_sums(rows: Array) -> Array:
    return rows @ jnp.ones(rows.shape[1], rows.dtype)  # a product: faster on a CPU than a reduction


# --- weights and statistics ---------------------------------------------------------------------


def _pack_weights(unit: Unit) -> bits.Bits:
    return bits.pack(DENSE.codes(unit.kernel))


def _fold(unit: Unit, scale: Array, moments: Moments, epsilon: float) -> _Norm:
    """Returns the affine map of the signs' product with given moments, whose scale comes from the weights."""
    inverse = lax.rsqrt(jnp.square(scale) * moments.var + epsilon)
    factor = unit.scale * scale * inverse
    return _Norm(factor, unit.bias - factor * moments.mean, inverse)


def _fold_running(unit: Unit, moments: Moments, epsilon: float) -> _Norm:
    """Returns the affine map of the signs' product whose moments, with the scale in them, are given.

    Nothing is divided by the scale, which is zero for a channel whose weights are.
    """
    inverse = lax.rsqrt(moments.var + epsilon)
    factor = unit.scale * inverse
    return _Norm(factor * weight_scale(unit.kernel), unit.bias - factor * moments.mean, inverse)


def _scaled(moments: Moments, unit: Unit) -> Moments:
    scale = weight_scale(unit.kernel)
    return Moments(moments.mean * scale, moments.var * jnp.square(scale))


def _signs(x: Array, unit: Unit) -> _Signs:
    """Returns the statistics of ``sign(x + move)``, x (tokens, channels)."""
    channels = x.shape[1]

    def part(sums: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], None]:
        signs = jnp.sign(x + unit.move).astype(jnp.float32)  # whose sums are exact up to 2^24 tokens
        return (sums[0] + jnp.sum(signs, axis=0), sums[1] + _exact(signs.T, signs)), None

    zeros = jnp.zeros(channels, jnp.float32), jnp.zeros((channels, channels), jnp.float32)
    sums, _ = _in_parts(part, zeros, (x,), _rows(x.shape[0], NARROW_ROWS))
    total, products = (s.astype(x.dtype) for s in sums)
    mean = total / x.shape[0]
    return _Signs(mean, products - jnp.outer(mean, total))


def _moments_of_product(signs: _Signs, unit: Unit, count: int) -> Moments:
    codes = DENSE.codes(unit.kernel)
    return Moments(_exact(signs.mean, codes), jnp.sum(codes * _exact(signs.scatter, codes), axis=0) / count)


def _exact(a: Array, b: Array) -> Array:
    """Returns a product for statistics, which GPUs and TPUs would round to 10 or 8 bits by default."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


# --- loops over tokens --------------------------------------------------------------------------


def _wide_rows(x: Array, expand: Unit) -> int:
    return _rows(x.shape[0], WIDE_VALUES // expand.kernel.shape[1])


def _rows(tokens: int, most: int) -> int:
    """Returns the largest divisor of a number of tokens that is at most ``most``."""
    return next(rows for rows in range(max(min(tokens, most), 1), 0, -1) if tokens % rows == 0)


def _in_parts(part: Callable, carry: Any, arrays: Sequence[Array], rows: int) -> tuple[Any, Any]:
    """Runs ``part(carry, *arrays) -> carry, results`` on ``rows`` rows of the arrays at a time."""
    count = arrays[0].shape[0]
    if rows == count:
        return part(carry, *arrays)
    split = tuple(array.reshape(-1, rows, array.shape[1]) for array in arrays)
    carry, results = lax.scan(lambda carry, split: part(carry, *split), carry, split)
    return carry, jax.tree.map(lambda array: array.reshape(count, -1), results)
