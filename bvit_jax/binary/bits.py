"""Signs packed into the bits of words, and their exact products by counting bits.

A sign is -1, 0 or 1, so a packed array has two planes: which signs are negative, and which are not zero. A
product of K signs takes K / 32 exclusive ors and population counts; on a processor whose vector unit counts
bits (AVX-512 VPOPCNTDQ) it is several times as fast as the same product in bfloat16.

Channels come first here and positions last: a word holds 32 channels of one position, and the loops that XLA
makes for a CPU run along positions and hold the values of a channel in registers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32, Shaped, UInt32

WORD = 32  # bits
ALL_BITS = np.uint32(2**WORD - 1)


class Bits(NamedTuple):
    """Packed signs; their bits beyond the last channel are not set.

    Attributes:
      negative: set where a sign is negative.
      nonzero: set where a sign is not zero.
    """

    negative: UInt32[Array, "words positions"]
    nonzero: UInt32[Array, "words positions"]


def pack(x: Float[Array, "channels positions"]) -> Bits:
    """Packs the signs of real numbers, 32 channels in a word; the sign of a NaN is 1."""
    missing = -x.shape[0] % WORD
    if missing:
        x = jnp.pad(x, ((0, missing), (0, 0)))
    x = x.reshape(-1, WORD, x.shape[1])
    return Bits(_to_words(x < 0), _to_words(x != 0))


def _to_words(bits: Array) -> Array:
    places = jnp.arange(WORD, dtype=jnp.uint32)[:, None]
    return jnp.sum(bits.astype(jnp.uint32) << places, axis=1, dtype=jnp.uint32)


def product(
    a: Bits, b: Bits, then: Callable[[Int32[Array, "rows columns"]], Array] = lambda y: y
) -> Shaped[Array, "rows columns"]:
    """Returns ``then(y)`` of the exact product of the signs, ``y = sign(a).T @ sign(b)``.

    It is fastest where no sign of ``a`` is zero and its channels fill their words, which holds for weights.
    XLA fuses the product with ``then``, and nothing else with them, because they are inside a conditional:
    the product is computed once for all readers of the result.
    """
    full = jnp.all(a.nonzero == ALL_BITS)
    branches = (lambda a, b, zeros=zeros: then(_product(a, b, zeros)) for zeros in (False, True))
    return lax.cond(full, *branches, a, b)


def _product(a: Bits, b: Bits, zeros: bool) -> Array:
    """Counts the pairs that are not zero and, twice with a minus, those whose signs differ."""
    different, pairs = jnp.int32(0), jnp.int32(0)
    for word in range(a.negative.shape[0]):
        nonzero = b.nonzero[word]
        if zeros:
            nonzero = nonzero & a.nonzero[word][:, None]
        unequal = b.negative[word] ^ a.negative[word][:, None]
        different += _count(nonzero & unequal)
        pairs += _count(nonzero)
    return pairs - 2 * different


def _count(words: Array) -> Array:
    return lax.population_count(words).astype(jnp.int32)
