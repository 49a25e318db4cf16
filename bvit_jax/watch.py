"""What layers tell of themselves while the health of a network is measured, and at no other time.

Figures are sown into the linen collection ``health``, which only `bvit_jax.health` makes mutable. Where
it is not, nothing is traced, so that a training step is the same program with and without these calls.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax import quantize

COLLECTION = "health"


def watched(module: nn.Module) -> bool:
    """Returns whether the health of the network is being measured."""
    # In init, linen makes every collection mutable; the variables of a model have no figures.
    return module.is_mutable_collection(COLLECTION) and not module.is_initializing()


def watch_sign(module: nn.Module, x: Array, part: str = "") -> None:
    """Sows the shares of the input of a sign that get a gradient and that are exactly zero.

    The sign of a zero is 0 in BinaryViT and in Bi-ViT as released, and 1 where every sign is a bit.

    Args:
      module: where the sign is.
      x: what enters it, (batch, ...).
      part: distinguishes several signs in one module.
    """
    if watched(module):
        _sow(module, "active_inputs", part, share(quantize.sign_slope(x) > 0))
        _sow(module, "zeros", part, share(x == 0))


def watch_heads(module: nn.Module, codes: Array) -> None:
    """Sows the number of heads that attend to nothing.

    Args:
      module: the attention.
      codes: attention codes in {0, 1} before dropout, (batch, heads, queries, keys).
    """
    if watched(module):
        dead = ~jnp.any(codes != 0, axis=(0, 2, 3))
        _sow(module, "dead_heads", "", jnp.sum(dead, dtype=jnp.float32))


def share(mask: Array) -> Array:
    """Returns the share of True in (batch, ...), float32 ()."""
    # Samples are counted in whole numbers: float32 does not count a layer of a batch beyond 2^24.
    counts = jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)
    return jnp.mean(counts.astype(jnp.float32)) / (mask.size // mask.shape[0])


def _sow(module: nn.Module, kind: str, part: str, value: Array) -> None:
    module.sow(COLLECTION, kind, {part: value}, init_fn=dict, reduce_fn=_merge)


def _merge(earlier: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    return earlier | value
