"""Windows of a square token grid, as Swin attends in them: splitting, shifting, masking, biases.

Source: Liu et al., "Swin Transformer" (ICCV 2021), section 3.2, in the behaviour of
``models/swin_transformer.py`` of github.com/microsoft/Swin-Transformer.
"""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from bvit_jax.imports.shapes import Float, Float32, Int64, Shaped

MASKED = -100.0  # added to the scores of pairs that only the cyclic shift made neighbours

Tokens = Shaped[Array, "batch {self.side}**2 channels"]
Windows = Shaped[Array, "windows {self.size}**2 channels"]
Scores = Float[Array, "windows heads {self.size}**2 {self.size}**2"]


@dataclass(frozen=True)
class Window:
    """How one block divides its grid.

    Attributes:
      side: tokens along a side of the grid.
      size: tokens along a side of a window; divides ``side``.
      shift: tokens by which the grid is rolled, up and left, before it is divided; 0 for none.
    """

    side: int
    size: int
    shift: int

    @property
    def num_offsets(self) -> int:
        """The number of relative positions of two tokens in a window."""
        return (2 * self.size - 1) ** 2

    def split(self, x: Tokens) -> Windows:
        """Divides the tokens of a grid into windows, those of one image one after the other."""
        grid = x.reshape(x.shape[0], self.side, self.side, x.shape[-1])
        if self.shift:
            grid = jnp.roll(grid, (-self.shift, -self.shift), axis=(1, 2))
        return _divide(grid, self.size).reshape(-1, self.size**2, x.shape[-1])

    def join(self, x: Windows) -> Tokens:
        """Undoes `split`."""
        count, channels = self.side // self.size, x.shape[-1]
        grid = x.reshape(-1, count, count, self.size, self.size, channels).swapaxes(2, 3)
        grid = grid.reshape(-1, self.side, self.side, channels)
        if self.shift:
            grid = jnp.roll(grid, (self.shift, self.shift), axis=(1, 2))
        return grid.reshape(-1, self.side**2, channels)

    def add_bias(self, scores: Scores, table: Float[Array, "{self.num_offsets} heads"]) -> Scores:
        """Adds the bias of each relative position, and the mask of a shifted grid."""
        rows = relative_positions(self.size).astype(np.int32)  # what jax takes with and without 64-bit types
        bias = table[rows].transpose(2, 0, 1)
        scores = scores + bias
        if not self.shift:
            return scores
        mask = jnp.asarray(shift_mask(self), scores.dtype)[:, None]
        per_image = scores.reshape(-1, mask.shape[0], *scores.shape[1:])
        return (per_image + mask).reshape(scores.shape)


@functools.cache
def relative_positions(size: int) -> Int64[np.ndarray, "{size}**2 {size}**2"]:
    """Returns the row of the bias table for each (query, key) of a window."""
    y, x = np.divmod(np.arange(size**2), size)
    dy = y[:, None] - y + size - 1
    dx = x[:, None] - x + size - 1
    return dy * (2 * size - 1) + dx


@functools.cache
def shift_mask(window: Window) -> Float32[np.ndarray, "windows {window.size}**2 {window.size}**2"]:
    """Returns what is added to the scores of a shifted grid.

    Rolling brings rows and columns from the far edge into the last windows; a pair of tokens attends
    only if both come from the same side of the seam.
    """
    line = np.arange(window.side)
    region = (line >= window.side - window.size).astype(int) + (line >= window.side - window.shift)
    regions = region[:, None] * 3 + region
    windows = _divide(regions[None, :, :, None], window.size).reshape(-1, window.size**2)
    return np.where(windows[:, :, None] == windows[:, None], 0.0, MASKED).astype(np.float32)


def _divide(grid, size: int):  # type: ignore[no-untyped-def]  # numpy or jax arrays
    """Divides (batch, side, side, channels) into (batch, rows, columns, size, size, channels)."""
    batch, side, _, channels = grid.shape
    count = side // size
    return grid.reshape(batch, count, size, count, size, channels).swapaxes(2, 3)
