"""Position embeddings for another image size."""

import numpy as np


def resize_positions(positions: np.ndarray, extra_tokens: int, side: int) -> np.ndarray:
    """Resizes the grid of position embeddings bicubically, as DeiT does for fine-tuning.

    The filter is that of PyTorch's ``interpolate(mode="bicubic", align_corners=False)``: no
    antialiasing, the border repeated.

    Args:
      positions: (1, extra_tokens + n², channels).
      extra_tokens: embeddings at the front that belong to no patch and are kept.
      side: tokens along a side of the new grid.

    Returns:
      (1, extra_tokens + side², channels) in the dtype of ``positions``.
    """
    first, patches = positions[:, :extra_tokens], positions[:, extra_tokens:]
    channels = positions.shape[-1]
    old_side = round(patches.shape[1] ** 0.5)
    grid = patches.reshape(old_side, old_side, channels).astype(np.float64)
    weights = _bicubic_weights(old_side, side)
    grid = np.einsum("io,jp,opc->ijc", weights, weights, grid, optimize=True)
    grid = grid.reshape(1, side * side, channels).astype(positions.dtype)
    return np.concatenate([first, grid], axis=1)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the matrix (new, old) that resizes a line."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    base = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        at = base + offset
        np.add.at(weights, (np.arange(new), np.clip(at, 0, old - 1)), _cubic(np.abs(centre - at)))
    return weights


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel at distances from 0 to 2."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
