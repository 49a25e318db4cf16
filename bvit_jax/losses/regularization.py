"""The regularisation of latent weights towards ±1.

Source: BHViT (CVPR 2025), in the behaviour of github.com/IMRL/BHViT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Integer


@dataclass(frozen=True)
class Regularization:
    """How much the term counts.

    Attributes:
      weight: of the term in the loss.
      first_step: the step, from 0, before which it counts nothing.
    """

    weight: float
    first_step: int = 0

    def weight_at(self, step: Integer[Array, ""]) -> float | Float[Array, ""]:
        """Returns the weight at a step: a constant if it always counts."""
        return jnp.where(step < self.first_step, 0.0, self.weight) if self.first_step else self.weight


def block_kernels(params: Mapping[str, Any]) -> list[Array]:
    """Returns the latent weights of the products in all blocks, not of embeddings, downsampling and heads."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [leaf for path, leaf in leaves if "block" in path[0].key and path[-1].key == "kernel"]


def distance_to_one(kernels: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """Returns the mean over matrices of the mean of ``| |W| - 1 |``; each counts the same, whatever its size.

    The gradient is ``sign(|W| - 1) · sign(W)`` over size and number, 0 where a sign is 0: that of
    ``jnp.abs`` would be 1 there.
    """
    return jnp.mean(jnp.stack([jnp.mean(_abs(_abs(kernel) - 1)) for kernel in kernels]))


def _abs(x: Array) -> Array:
    return x * lax.stop_gradient(jnp.sign(x))
