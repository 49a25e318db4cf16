"""Products of signs in each type that could hold them: how fast, and whether they are exact."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.ceilings import rates
from benchmarks.pieces.piece import one_line

ACCUMULATORS = {"bfloat16": "float32", "int8": "int32", "float8_e4m3fn": "float32"}
COMPARED_ROWS = 64


def products(shapes: Sequence[Sequence[int]], rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Yields by type and shape the operations per second of products of signs, and whether they are exact.

    Args:
      shapes: rows, inputs and outputs of each product.
      rounds: the best of which counts.
    """
    for dtype, accumulator in ACCUMULATORS.items():
        found = {}
        for shape in shapes:
            try:
                found["x".join(map(str, shape))] = _product(shape, dtype, accumulator, rounds)
            except Exception as error:  # a type that a device does not multiply
                found["x".join(map(str, shape))] = {"error": one_line(error)}
        yield {dtype: found}


def _product(shape: Sequence[int], dtype: str, accumulator: str, rounds: int) -> dict[str, Any]:
    """Measures the product alone, and with what makes its left operand: the sign of shifted activations."""
    rows, inputs, outputs = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, inputs), jnp.bfloat16)
    move = jax.random.normal(keys[1], (inputs,))
    w = jnp.sign(jax.random.normal(keys[2], (inputs, outputs)))

    def signs(x: Array) -> Array:
        return jnp.sign(x.astype(jnp.float32) + move).astype(dtype)

    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=accumulator))
    whole = jax.jit(lambda x, b: jnp.matmul(signs(x), b, preferred_element_type=accumulator))
    a, b = jax.jit(signs)(x), w.astype(dtype)
    operations = 2 * rows * inputs * outputs
    expected = np.asarray(a[:COMPARED_ROWS], np.float32).astype(np.int64) @ np.asarray(w).astype(np.int64)
    return {
        "operations_per_second": max(rates(lambda _: product(a, b), operations, rounds)),
        "with_signs": max(rates(lambda _: whole(x, b), operations, rounds)),
        "exact": bool((np.asarray(product(a, b)[:COMPARED_ROWS]) == expected).all()),
    }
