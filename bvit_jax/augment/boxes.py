"""Boxes of pixels on the device: ``(top, bottom, left, right)``, bottom and right exclusive."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

Box = Int32[Array, "4"]


def box_at(start: Int32[Array, "2"], size: Int32[Array, "2"]) -> Box:
    """Returns the box with this corner and size, rows before columns."""
    end = start + size
    return jnp.stack([start[0], end[0], start[1], end[1]])


def inside_box(box: Box, height: int, width: int) -> Bool[Array, "{height} {width} 1"]:
    """Returns which pixels of an image are inside a box."""
    top, bottom, left, right = box
    rows, columns = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, None] & in_columns[None, :])[..., None]


def box_area(box: Box) -> Int32[Array, ""]:
    """Returns the number of pixels in a box."""
    top, bottom, left, right = box
    return (bottom - top) * (right - left)
