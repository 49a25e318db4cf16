"""Boxes of pixels on the device: int32 ``(top, bottom, left, right)``, bottom and right exclusive."""

import jax.numpy as jnp
from jax import Array


def box_at(start: Array, size: Array) -> Array:
    """Returns the box with this corner and size, rows before columns: int32 [2], [2] -> int32 [4]."""
    end = start + size
    return jnp.stack([start[0], end[0], start[1], end[1]])


def inside_box(box: Array, height: int, width: int) -> Array:
    """Returns which pixels of an image are inside a box: int32 [4] -> bool [height, width, 1]."""
    top, bottom, left, right = box
    rows, columns = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, None] & in_columns[None, :])[..., None]


def box_area(box: Array) -> Array:
    """Returns the number of pixels in a box: int32 [4] -> int32 scalar."""
    top, bottom, left, right = box
    return (bottom - top) * (right - left)
