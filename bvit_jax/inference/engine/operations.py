"""What the engine computes with bits, as pure functions of tokens (images, tokens, channels).

Real arrays have one dtype, that of the tokens: float32, or float64. Weights and parameters are folded ahead,
see `bvit_jax.inference.engine.fold`; a width F that is a multiple of a narrower one is meant where a shortcut
has fewer channels. Each product is exact: an integer, whatever the dtype.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary import bits, units
from bvit_jax.binary.units import Product, Unit
from bvit_jax.imports.shapes import Bool, Float
from bvit_jax.layers.grid import average_pool, extract_patches, to_grid, to_tokens, upsample

STRIDE = 2  # between stages

__all__ = [
    "STRIDE",
    "Context",
    "End",
    "Product",
    "Unit",
    "attended",
    "attention",
    "average_pool",
    "branches",
    "context",
    "convolution",
    "count",
    "downsample",
    "feed_forward",
    "follow",
    "normalise",
    "repeated",
    "scores",
    "shifts",
    "unit",
    "unit_end",
]

Tokens = Float[Array, "images tokens channels"]
Outputs = Float[Array, "images tokens outputs"]
Vector = Float[Array, " channels"]


class End(NamedTuple):
    """The end of a branch, and the norm of what it is added to; each (channels,).

    The residual r of a branch y becomes ``r + y * alpha + move``, and what the next branch reads is that
    times ``factor`` plus ``shift``.
    """

    alpha: Vector
    move: Vector
    factor: Vector
    shift: Vector


class Context(NamedTuple):
    """What follows the counts of attention: a norm and an RPReLU, folded; each (channels,).

    ``factor`` includes the scale of the attention probabilities; for the others see `Unit`.
    """

    factor: Vector
    shift: Vector
    slope: Vector
    move2: Vector


def count(x: Float[Array, "*batch inputs"], product: Product, *, bit: bool = False) -> Array:
    """Returns the integers ``W · sign(x + move)``, (..., F) in the dtype of x.

    Args:
      x: (..., K).
      product: K to F.
      bit: whether the sign of zero is 1; else it is 0.
    """
    y = units.count(x.reshape(-1, x.shape[-1]).T, product, bit=bit).T
    return y.reshape(*x.shape[:-1], -1)


def unit(x: Tokens, u: Unit, shortcut: Float[Array, "images tokens shortcut"]) -> Outputs:
    """Returns a binary unit; a shortcut of F / e channels is repeated e times along the channels."""
    y = units.unit(_columns(x), u, _columns(shortcut)).T
    return y.reshape(*x.shape[:-1], -1)


def unit_end(
    x: Tokens, u: Unit, shortcut: Float[Array, "images tokens shortcut"], residual: Outputs, end: End
) -> tuple[Outputs, Outputs]:
    """Returns the residual after a branch that ends in a unit, and its norm: see `End`."""
    return _ended(unit(x, u, shortcut), residual, end)


def feed_forward(
    x: Tokens, expand: Unit, contract: Unit, residual: Tokens, end: End
) -> tuple[Tokens, Tokens]:
    """Returns the residual after the feed-forward branch of x, and its norm: see `End`.

    The shortcut of ``expand`` is x repeated along the channels; that of ``contract`` the mean of each e
    neighbouring hidden channels.
    """
    rows, residuals = (array.reshape(-1, x.shape[-1]) for array in (x, residual))
    r, n = units.feed_forward(rows, expand, contract, lambda y, r: _ended(y, r, end), (residuals,))
    return r.reshape(x.shape), n.reshape(x.shape)


def attention(
    q: Tokens,
    k: Float[Array, "images keys channels"],
    v: Float[Array, "images keys channels"],
    moves: Float[Array, "3 channels"],
    norm: Context,
    scale: Float[Array, ""],
    num_heads: int,
    reduction: int,
) -> Tokens:
    """Returns attention of one-bit probabilities with its norm, shortcuts and RPReLU.

    Args:
      q, k, v: queries, and the keys and values of a grid that was pooled by ``reduction`` on each side.
      moves: what is added to queries, keys and values before their signs.
      norm: after the counts; then q, and k + v repeated over the grid, are added.
      scale: s of the probabilities p, which count where ``round(p / s)``, half to even, is at least 1.
      num_heads: of equal width.
      reduction: 1 where nothing was pooled.
    """
    return follow(attended(q, k, v, moves, scale, num_heads), norm, q + repeated(k + v, reduction))


def attended(q: Tokens, k: Tokens, v: Tokens, moves: Array, scale: Array, num_heads: int) -> Tokens:
    """Returns the counts of `attention`, before their norm: integers."""
    products = scores(q + moves[0], k + moves[1], num_heads)
    probs = jax.nn.softmax(products / math.sqrt(q.shape[-1] // num_heads), axis=-2)
    return context(jnp.round(probs / scale) >= 1, v + moves[2])


def repeated(x: Tokens, reduction: int) -> Tokens:
    """Returns pooled tokens repeated over the grid that they come from."""
    return x if reduction == 1 else upsample(x, reduction)


def follow(counted: Tokens, norm: Context, shortcut: Tokens) -> Tokens:
    """Returns the RPReLU of a norm of counts and a shortcut: see `Context`."""
    return units.rprelu(counted * norm.factor + norm.shift + shortcut, norm.slope, norm.move2)


def scores(
    q: Tokens, k: Float[Array, "images keys channels"], num_heads: int, *, bit: bool = False
) -> Float[Array, "images heads keys tokens"]:
    """Returns the products of the signs of queries and keys, head by head: integers, the keys first.

    Args:
      q, k: their channels are those of the heads, one after the other.
      num_heads: of equal width.
      bit: whether the sign of zero is 1; else it is 0.
    """
    q, k = (x.swapaxes(1, 2).reshape(x.shape[0], num_heads, -1, x.shape[1]) for x in (q, k))
    size, dtype = q.shape[2], q.dtype
    packed = [_packed(x, bit) for x in (k, q)]
    return bits.once(
        [] if bit else [jnp.all(x != 0) for x in (k, q)],
        lambda k, q: (size - 2 * bits.differing(k.negative, q.negative)).astype(dtype),
        lambda k, q: bits.sign_product(k, q).astype(dtype),
        *packed,
    )


def context(
    mask: Bool[Array, "images heads keys tokens"],
    v: Float[Array, "images keys channels"],
    *,
    bit: bool = False,
) -> Tokens:
    """Returns the sum of the signs of those values that a mask has for a query, head by head: integers.

    Args:
      mask: keys first, as `scores` returns them.
      v: its channels are those of the heads, one after the other.
      bit: whether the sign of zero is 1; else it is 0.
    """
    images, heads, _, tokens = mask.shape
    counted = bits.to_words(mask)
    values = jax.tree.map(
        lambda words: words.reshape(images, -1, heads, v.shape[-1] // heads).swapaxes(1, 2), _packed(v, bit)
    )
    total = jnp.sum(lax.population_count(counted).astype(jnp.int32), axis=-2, keepdims=True, dtype=jnp.int32)
    y = bits.once(
        [] if bit else [jnp.all(v != 0)],
        lambda v, counted, total: total - 2 * bits.common(v.negative, counted),
        lambda v, counted, _: bits.common(v.nonzero, counted) - 2 * bits.common(v.negative, counted),
        values,
        counted,
        total,
    )
    return y.reshape(images, -1, tokens).swapaxes(1, 2).astype(v.dtype)


def downsample(
    n: Tokens, u: Unit, positions: Float[Array, "fewer outputs"], factor: Vector, shift: Vector
) -> tuple[Outputs, Outputs]:
    """Returns the tokens of the next stage and their norm, from the normalised tokens of a stage.

    Args:
      n: a square grid.
      u: of its 2×2 patches, each a vector of four times its channels; the shortcut is their average.
      positions: added to the unit.
      factor, shift: of the norm.
    """
    patches = extract_patches(to_grid(n), STRIDE)
    x = unit(patches, u, average_pool(n, STRIDE)) + positions
    return x, normalise(x, factor, shift)


def branches(n: Tokens, x: Tokens, taps: Float[Array, "taps channels"]) -> Tokens:
    """Adds to x the average-pooling branches of n, as one cross-shaped stencil of their square grid.

    Args:
      n: what the branches read.
      x: what they are added to.
      taps: 1 + 2·R of them: the centre, the two vertical neighbours at distances 1 to R, and the two
        horizontal ones. Beyond the border n is zero.
    """
    grid = to_grid(lax.optimization_barrier(n))
    side, reach = grid.shape[1], taps.shape[0] // 2
    y = x + n * taps[0]
    padded = jnp.pad(grid, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    for axis, of_axis in ((1, taps[1 : reach + 1]), (2, taps[reach + 1 :])):
        line = lax.slice_in_dim(padded, reach, reach + side, axis=3 - axis)
        for distance, tap in enumerate(of_axis, 1):
            before, after = (
                lax.slice_in_dim(line, reach + offset, reach + offset + side, axis=axis)
                for offset in (-distance, distance)
            )
            y += to_tokens(before + after) * tap
    return y


def normalise(x: Tokens, factor: Vector, shift: Vector) -> Tokens:
    """Returns a folded norm of tokens."""
    return x * factor + shift


def shifts(n: Tokens, x: Tokens, taps: Float[Array, "taps channels"]) -> Tokens:
    """Adds to x the branches of a square grid n that goes on at its other end, as one stencil.

    Args:
      n: what the branches read.
      x: what they are added to.
      taps: 1 + 4·R of them: the centre, then the neighbours at distances 1 to R above, below, left and right.
    """
    grid = to_grid(lax.optimization_barrier(n))
    y, reach = x + n * taps[0], taps.shape[0] // 4
    for side, (axis, direction) in enumerate(((1, 1), (1, -1), (2, 1), (2, -1))):
        for distance in range(1, reach + 1):
            moved = to_tokens(jnp.roll(grid, direction * distance, axis))
            y += moved * taps[side * reach + distance]
    return y


def convolution(
    x: Float[Array, "images height width channels"], product: Product, dilation: int, groups: int
) -> Float[Array, "images height width outputs"]:
    """Returns the integers of a 3×3 convolution of ``sign(x + move)`` in groups, as many as the grid has.

    The zeros of the border come after the sign.

    Args:
      x: a grid.
      product: ``move`` (channels,), and for each output the codes of its own group's channels: place by
        place of the kernel in row order, 9 · channels / groups of them.
      dilation: distance of neighbouring inputs.
      groups: of channels, and of outputs, that do not mix.
    """
    images, height, width, channels = x.shape
    padded = jnp.pad(x + product.move, ((0, 0), (dilation,) * 2, (dilation,) * 2, (0, 0)))
    starts = [(row * dilation, column * dilation) for row in range(3) for column in range(3)]
    places = [padded[:, row : row + height, column : column + width] for row, column in starts]
    inputs = jnp.stack(places).reshape(9, -1, groups, channels // groups).transpose(2, 0, 3, 1)
    inputs = inputs.reshape(groups, -1, images * height * width)
    negative, nonzero = (_by_group(plane, groups) for plane in product[1:])
    if not nonzero.shape[1]:
        nonzero = jnp.broadcast_to(bits.full_words(inputs.shape[1]), negative.shape)
    weights = bits.Bits(negative, nonzero)
    counted = bits.once([], bits.sign_product, bits.sign_product, weights, bits.pack(inputs))
    return counted.reshape(-1, inputs.shape[-1]).T.reshape(images, height, width, -1).astype(x.dtype)


def _by_group(plane: Array, groups: int) -> Array:
    """Splits the outputs of (words, outputs) into groups: (groups, words, outputs of one)."""
    return plane.reshape(plane.shape[0], groups, plane.shape[1] // groups).swapaxes(0, 1)


def _packed(x: Array, bit: bool) -> bits.Bits:
    """Packs the signs of (..., channels, positions)."""
    if not bit:
        return bits.pack(x)
    negative = bits.to_words(x < 0)
    return bits.Bits(negative, jnp.broadcast_to(bits.full_words(x.shape[-2]), negative.shape))


def _ended(y: Array, residual: Array, end: End) -> tuple[Array, Array]:
    r = residual + y * end.alpha + end.move
    return r, r * end.factor + end.shift


def _columns(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1]).T
