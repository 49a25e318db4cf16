"""Signs packed into the bits of words, and their exact products by counting bits.

A sign is -1, 0 or 1, so a packed array has two planes: which signs are negative, and which are not zero. A
product of K signs takes K / 32 exclusive ors and population counts; on a processor whose vector unit counts
bits (AVX-512 VPOPCNTDQ) it is several times as fast as the same product in bfloat16.

Channels come first here and positions last: a word holds 32 channels of one position, and the loops that XLA
makes for a CPU run along positions and hold the values of a channel in registers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bvit_jax.binary.products import CODE_DTYPE
from bvit_jax.imports.shapes import Bool, Float, Int32, Shaped, UInt32

WORD, HALF = 32, 16  # bits


class Bits(NamedTuple):
    """Packed signs; their bits beyond the last channel are not set.

    Attributes:
      negative: set where a sign is negative.
      nonzero: set where a sign is not zero.
    """

    negative: UInt32[Array, "*batch words positions"]
    nonzero: UInt32[Array, "*batch words positions"]


def pack(x: Float[Array, "*batch channels positions"]) -> Bits:
    """Packs the signs of real numbers, 32 channels in a word; the sign of a NaN is 1."""
    return Bits(to_words(x < 0), to_words(x != 0))


def to_words(bits: Bool[Array, "*batch channels positions"]) -> UInt32[Array, "*batch words positions"]:
    """Packs bits, 32 channels in a word; the bits beyond the last channel are not set."""
    *batch, channels, positions = bits.shape
    if missing := -channels % WORD:
        bits = jnp.pad(bits, ((0, 0),) * len(batch) + ((0, missing), (0, 0)))
    bits = bits.reshape(*batch, -1, WORD, positions).astype(jnp.uint32)
    places = jnp.arange(WORD, dtype=jnp.uint32)[:, None]
    return jnp.sum(bits << places, axis=-2, dtype=jnp.uint32)


def unpack(bits: Bits, channels: int) -> Int32[Array, "channels positions"]:
    """Returns the signs that were packed; without words of ``nonzero`` none of them is zero."""

    def of(words: Array) -> Array:
        places = jnp.arange(WORD, dtype=jnp.uint32)[:, None]
        unpacked = words[:, None] >> places & 1
        return unpacked.reshape(-1, words.shape[1])[:channels].astype(jnp.int32)

    signs = 1 - 2 * of(bits.negative)
    return signs * of(bits.nonzero) if bits.nonzero.shape[0] else signs


def full_words(channels: int) -> UInt32[np.ndarray, "words 1"]:
    """Returns words whose bits are set for so many channels."""
    bits = np.arange(-(-channels // WORD) * WORD) < channels
    return np.packbits(bits, bitorder="little").view(np.uint32)[:, None]


def product(
    weights: Bits,
    x: Float[Array, "channels positions"],
    then: Callable[[Int32[Array, "outputs positions"]], Array] = lambda y: y,
    *,
    bit: bool = False,
) -> Shaped[Array, "outputs positions"]:
    """Returns ``then(y)`` of the exact product of signs, ``y = codes.T @ sign(x)``.

    It is fastest where no sign is zero, neither of the weights nor of x, which a program finds out when it
    runs.

    Args:
      weights: packed codes (channels, outputs); ``nonzero`` has no words where none of them is zero.
      x: real.
      then: an element-wise function.
      bit: whether the sign of zero is 1; else it is 0.
    """
    channels = x.shape[0]
    no_zeros = []
    if weights.nonzero.shape[0]:
        no_zeros.append(jnp.all(weights.nonzero == full_words(channels)))
    if bit:
        negative = to_words(x < 0)
    else:
        negative, zeros = _negative_and_zeros(x)
        no_zeros.append(~zeros)

    def multiplied() -> Array:
        """Returns the same where there are zeros: rarely, so that what counts is that it compiles soon."""
        signs = jnp.where(x < 0, -1, 1 if bit else jnp.where(x == 0, 0, 1))
        codes = (values.astype(CODE_DTYPE) for values in (unpack(weights, channels).T, signs))
        return then(jnp.matmul(*codes, preferred_element_type=jnp.float32).astype(jnp.int32))

    return once(no_zeros, lambda: then(channels - 2 * differing(weights.negative, negative)), multiplied)


def _negative_and_zeros(
    x: Float[Array, "channels positions"],
) -> tuple[UInt32[Array, "words positions"], Bool[Array, ""]]:
    """Packs which values are negative, and returns whether any is zero, in one pass over x."""
    if missing := -x.shape[0] % WORD:
        x = jnp.pad(x, ((0, missing), (0, 0)), constant_values=1)
    x = x.reshape(-1, HALF, x.shape[1])
    places = jnp.arange(HALF, dtype=jnp.uint32)[:, None]
    negative, zero = (is_so.astype(jnp.uint32) for is_so in (x < 0, x == 0))
    # Half a word counts the zeros of its channels in its upper half.
    halves = jnp.sum((negative << places) + (zero << HALF), axis=1, dtype=jnp.uint32)
    return halves[::2] | halves[1::2] << HALF, jnp.any(halves >= 2**HALF)


def once(
    conditions: Sequence[Bool[Array, ""]], fast: Callable[..., Array], exact: Callable[..., Array], *of: Any
) -> Array:
    """Returns ``fast(*of)`` where all conditions hold, otherwise ``exact(*of)``, computed once.

    XLA fuses what is inside, and nothing else with it: it would compute a product again for each reader.
    """
    if not conditions:
        return lax.optimization_barrier(fast(*of))
    return lax.cond(jnp.all(jnp.stack(list(conditions))), fast, exact, *of)


def differing(
    a: UInt32[Array, "*batch words rows"], b: UInt32[Array, "*batch words columns"]
) -> Int32[Array, "*batch rows columns"]:
    """Counts the bits in which each row differs from each column."""
    return sum(_count(row ^ column) for row, column in _pairs(a, b)) + jnp.int32(0)


def common(
    a: UInt32[Array, "*batch words rows"], b: UInt32[Array, "*batch words columns"]
) -> Int32[Array, "*batch rows columns"]:
    """Counts the bits that are set both in each row and in each column."""
    return sum(_count(row & column) for row, column in _pairs(a, b)) + jnp.int32(0)


def sign_product(a: Bits, b: Bits) -> Int32[Array, "*batch rows columns"]:
    """Returns the product of signs, zeros among them: ``sign(a).T @ sign(b)`` of what was packed."""
    y = jnp.int32(0)
    for nonzero, negative in zip(_pairs(a.nonzero, b.nonzero), _pairs(a.negative, b.negative), strict=True):
        both = nonzero[0] & nonzero[1]
        y += _count(both) - 2 * _count(both & (negative[0] ^ negative[1]))
    return y


def _pairs(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Yields each word of rows and columns, so that they broadcast."""
    for word in range(a.shape[-2]):
        yield a[..., word, :, None], b[..., word, None, :]


def _count(words: Array) -> Array:
    return lax.population_count(words).astype(jnp.int32)
