"""Argsort of rows of probabilities: with XLA's sort, and with a sorting network that suits CPUs."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32


def order_by_sort(x: Float[Array, "rows keys"]) -> Int32[Array, "rows keys"]:
    """Returns the indices that sort each row of probabilities.

    Sorts one array of integers, each the upper bits of a probability followed by its index, because sorting
    values together with indices takes five times as long on a CPU. The bits of positive floats are ordered
    like the floats, and the two highest are zero for floats below 2. The lowest bits make room for the index,
    so probabilities whose relative difference is below keys · 6e-8 may come in either order. That is
    harmless, since the loss takes the sign of a pair from the probabilities themselves.
    """
    packed, index = _packed_keys(x)
    return (jnp.sort(packed) & index).astype(jnp.int32)


def _packed_keys(x: Array) -> tuple[Array, Array]:
    """Returns the integers that `order_by_sort` sorts, and the mask of the bits that hold the index."""
    keys = x.shape[-1]
    index = jnp.uint32((1 << (keys - 1).bit_length()) - 1)
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) << 2
    return (bits & ~index) | lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1), index


def order_by_network(x: Float[Array, "rows keys"]) -> Int32[Array, "rows keys"]:
    """Returns the same as `order_by_sort`, using vector instructions of a CPU across rows.

    It is the bitonic sorting network (Batcher, 1968), in the form whose comparisons all have one direction.
    """
    packed, index = _packed_keys(x)
    keys = packed.shape[-1]
    size = 1 << (keys - 1).bit_length()
    x = jnp.pad(packed.T, ((0, size - keys), (0, 0)), constant_values=np.uint32(0xFFFFFFFF))
    rows = x.shape[1]
    for length in (2 << i for i in range(size.bit_length() - 1)):
        # Two sorted runs: each element of one and its mirror image in the other, then halves of halves.
        runs = x.reshape(-1, 2, length // 2, rows)
        low, high = runs[:, 0], runs[:, 1, ::-1]
        x = jnp.concatenate([jnp.minimum(low, high), jnp.maximum(low, high)[:, ::-1]], axis=1)
        half = length // 4
        while half:
            low, high = jnp.unstack(x.reshape(-1, 2, half, rows), axis=1)
            x = jnp.stack([jnp.minimum(low, high), jnp.maximum(low, high)], axis=1)
            half //= 2
    return (x.reshape(size, rows)[:keys].T & index).astype(jnp.int32)
