"""Signs packed into the bits of words, and their exact products by counting bits.

A bit tells -1 from 1. Signs of 0 are rare; where there is one, a product multiplies the signs themselves. A
product of K signs takes K / 32 exclusive ors and population counts; on a processor whose vector unit counts
bits (AVX-512 VPOPCNTDQ) it is several times as fast as the same product in bfloat16.

Channels come first here and positions last: a word holds 32 channels of one position, and the loops that XLA
makes for a CPU run along positions and hold the values of a channel in registers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, Shaped, UInt32

from bvit_jax.binary.products import CODE_DTYPE

WORD, HALF = 32, 16  # bits


class Bits(NamedTuple):
    """Packed signs.

    Attributes:
      negative: set where a sign is negative; not set beyond the last channel.
      zeros: whether any sign is zero.
    """

    negative: UInt32[Array, "words positions"]
    zeros: Bool[Array, ""]


def pack(x: Float[Array, "channels positions"]) -> Bits:
    """Packs the signs of real numbers, 32 channels in a word; the sign of a NaN is 1."""
    missing = -x.shape[0] % WORD
    if missing:
        x = jnp.pad(x, ((0, missing), (0, 0)), constant_values=1)
    # One pass over x: half a word counts the zeros of its channels in its upper half.
    x = x.reshape(-1, HALF, x.shape[1])
    places = jnp.arange(HALF, dtype=jnp.uint32)[:, None]
    negative, zero = (is_so.astype(jnp.uint32) for is_so in (x < 0, x == 0))
    halves = jnp.sum((negative << places) + (zero << HALF), axis=1, dtype=jnp.uint32)
    zeros = jnp.any(halves >= 2**HALF)
    return Bits(halves[::2] | halves[1::2] << HALF, zeros)


def product(
    a: Bits,
    b: Bits,
    signs: Callable[[], tuple[Float[Array, "channels rows"], Float[Array, "channels columns"]]],
    then: Callable[[Int32[Array, "rows columns"]], Array] = lambda y: y,
) -> Shaped[Array, "rows columns"]:
    """Returns ``then(y)`` of the exact product of packed signs, ``y = a.T @ b``.

    XLA fuses the product with ``then``, and nothing else with them, because they are inside a conditional:
    the product is computed once for all readers of the result.

    Args:
      a, b: packed.
      signs: returns both unpacked, from arrays that exist anyway.
      then: what follows.
    """
    channels = jax.eval_shape(signs)[0].shape[0]

    def counted() -> Array:
        return then(channels - 2 * _different(a, b))

    def multiplied() -> Array:
        x, y = (values.astype(CODE_DTYPE) for values in signs())
        return then(jnp.matmul(x.T, y, preferred_element_type=jnp.float32).astype(jnp.int32))

    return lax.cond(a.zeros | b.zeros, multiplied, counted)


def _different(a: Bits, b: Bits) -> Array:
    different = jnp.int32(0)
    for of_a, of_b in zip(a.negative, b.negative, strict=True):
        different += lax.population_count(of_a[:, None] ^ of_b).astype(jnp.int32)
    return different
