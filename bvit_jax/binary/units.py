"""Binary units in evaluation, folded: what is added and multiplied around a product of bits.

``RPReLU(norm(W · sign(x + move)) + shortcut)`` needs six numbers a channel once the running statistics of its
norm, the scale of its weights and the first shift of its RPReLU are one affine map. A feed-forward branch of
two such units keeps its hidden layer in the caches of a CPU: it exists for some hundred tokens at a time.

Tokens are (tokens, channels) here; within, channels come first, see `bvit_jax.binary.bits`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bvit_jax.binary import bits
from bvit_jax.imports.shapes import Float, UInt32

WIDE_VALUES = 800 * 1024  # of a hidden layer per part; measured

Tokens = Float[Array, "tokens channels"]
Outputs = Float[Array, "tokens outputs"]
Vector = Float[Array, " outputs"]


class Product(NamedTuple):
    """A binary matrix with K inputs and F outputs, and the shift before the sign of its input.

    Attributes:
      move: (K,).
      negative: which codes are negative, packed as `bvit_jax.binary.bits.pack` packs codes (K, F).
      nonzero: which codes are not zero; no words, (0, F), where none is zero.
    """

    move: Float[Array, " inputs"]
    negative: UInt32[Array, "words outputs"]
    nonzero: UInt32[Array, "words_of_zeros outputs"]


class Unit(NamedTuple):
    """``RPReLU(norm(W · sign(x + move)) + shortcut)``, folded; ``factor`` and the others are (F,).

    With ``s = count * factor + shift + shortcut`` it is ``max(s, 0) + slope * min(s, 0) + move2``.
    """

    product: Product
    factor: Vector
    shift: Vector
    slope: Vector
    move2: Vector


def count(
    x: Float[Array, "channels positions"],
    product: Product,
    then: Callable[[Array], Array] = lambda y: y,
    *,
    bit: bool = False,
) -> Float[Array, "outputs positions"]:
    """Returns ``then`` of the exact integers ``W · sign(x + move)`` in the dtype of x, channels first."""
    weights = bits.Bits(product.negative, product.nonzero)
    shifted = x + product.move[:, None]
    return bits.product(weights, shifted, lambda y: then(y.astype(x.dtype)), bit=bit)


def unit(
    x: Float[Array, "channels positions"], u: Unit, shortcut: Float[Array, "shortcut positions"]
) -> Float[Array, "outputs positions"]:
    """Returns the unit, channels first; a shortcut of fewer channels is repeated along them."""
    times = u.factor.shape[0] // shortcut.shape[0]

    def shifted(y: Array) -> Array:
        return y * u.factor[:, None] + u.shift[:, None] + jnp.tile(shortcut, (times, 1))

    return rprelu(count(x, u.product, shifted), u.slope[:, None], u.move2[:, None])


def rprelu(
    shifted: Float[Array, "*shape"], slope: Float[Array, "*#shape"], move2: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Returns RPReLU of what its first shift was subtracted from."""
    return jnp.maximum(shifted, 0) + slope * jnp.minimum(shifted, 0) + move2


def feed_forward(
    x: Tokens,
    expand: Unit,
    contract: Unit,
    then: Callable[..., Any] = lambda y: y,
    others: Sequence[Array] = (),
) -> Any:
    """Returns ``then(y, *others)`` of a feed-forward branch y, all (tokens, channels).

    The first unit's shortcut repeats the tokens to the width of the hidden layer; that of the second averages
    neighbouring channels of the hidden layer.

    Args:
      x: float32 or float64.
      expand, contract: the two units.
      then: computes each token by itself.
      others: arrays (tokens, ...) that it takes.
    """
    channels, hidden_channels = x.shape[1], expand.factor.shape[0]

    def part(_: None, x: Array, *others: Array) -> tuple[None, Any]:
        hidden = unit(x.T, expand, x.T)
        averaged = jnp.mean(hidden.reshape(channels, -1, x.shape[0]), axis=1)
        return None, then(unit(hidden, contract, averaged).T, *others)

    rows = rows_at_once(x.shape[0], WIDE_VALUES // hidden_channels)
    return in_parts(part, None, (x, *others), rows)[1]


def rows_at_once(tokens: int, most: int) -> int:
    """Returns the largest divisor of a number of tokens that is at most ``most``."""
    return next(rows for rows in range(max(min(tokens, most), 1), 0, -1) if tokens % rows == 0)


def in_parts(part: Callable, carry: Any, arrays: Sequence[Array], rows: int) -> tuple[Any, Any]:
    """Runs ``part(carry, *arrays) -> carry, results`` on ``rows`` rows of the arrays at a time."""
    total = arrays[0].shape[0]
    if rows == total:
        return part(carry, *arrays)
    split = tuple(array.reshape(-1, rows, array.shape[1]) for array in arrays)
    carry, results = lax.scan(lambda carry, split: part(carry, *split), carry, split)
    return carry, jax.tree.map(lambda array: array.reshape(total, -1), results)
