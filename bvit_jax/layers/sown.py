"""Diagnostics that layers sow when a network is examined, and only then.

Metrics are sown into the linen collections ``health``, which only `bvit_jax.training.steps.health` makes
mutable, and ``balance``, which only `bvit_jax.report.network_figures` does. Where neither is mutable,
nothing is traced: a training step is the same program with and without these calls.
"""

import operator

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Float32

from bvit_jax.binary.estimators import Estimator
from bvit_jax.binary.levels import LARGEST

COLLECTION = "health"
BALANCE = "balance"
LEVELS = LARGEST + 1  # of attention codes


def watched(module: nn.Module) -> bool:
    """Returns whether the network is being examined."""
    return _wanted(module, COLLECTION) or _wanted(module, BALANCE)


def watch_sign(module: nn.Module, x: Float[Array, "batch ..."], estimator: Estimator, part: str = "") -> None:
    """Sows the shares of the input of a sign that get a gradient and that are exactly zero, and its balance.

    Args:
      module: the module that takes the sign.
      x: the input of the sign.
      estimator: the sign; an input gets a gradient where its slope is above 0.
      part: distinguishes several signs in one module.
    """
    if watched(module):
        _sow(module, COLLECTION, "active_inputs", part, share(estimator.slope(x) > 0))
        _sow(module, COLLECTION, "zeros", part, share(x == 0))
    if _wanted(module, BALANCE):
        watch_balance(module, estimator.forward(x), part)


def watch_balance(
    module: nn.Module, signs: Float[Array, "batch tokens ..."], part: str = "", axis: int | None = None
) -> None:
    """Sows the share of +1 among signs, per channel.

    Args:
      module: the module that takes the signs.
      signs: -1, 0 or 1; channels may be split into heads.
      part: distinguishes several signs in one module.
      axis: the share is per slice of this axis instead.
    """
    if _wanted(module, BALANCE):
        others = (0, 1) if axis is None else tuple(i for i in range(signs.ndim) if i != axis % signs.ndim)
        shares = jnp.mean(signs > 0, axis=others, dtype=jnp.float32)
        _sow(module, BALANCE, "positive", part, shares.reshape(-1))


def watch_heads(module: nn.Module, codes: Float[Array, "batch heads queries keys"]) -> None:
    """Sows the number of heads that attend to nothing, from their codes before dropout."""
    if watched(module):
        dead = ~jnp.any(codes != 0, axis=(0, 2, 3))
        _sow(module, COLLECTION, "dead_heads", "", jnp.sum(dead, dtype=jnp.float32))


def watch_levels(
    module: nn.Module, codes: Float[Array, "batch heads queries keys"], scale: Float[Array, "*shape"]
) -> None:
    """Sows the share of each attention code from 0 to 3, and the number of learned scales not above 0."""
    if watched(module):
        for level in range(LEVELS):
            _sow(module, COLLECTION, f"level_{level}", "", share(codes == level))
        _sow(module, COLLECTION, "nonpositive_scales", "", jnp.sum(~(scale > 0), dtype=jnp.float32))


def share(mask: Bool[Array, "batch ..."]) -> Float32[Array, ""]:
    """Returns the share of True."""
    # Counted per sample as integers: in float32 a sum of ones stops at 2^24, less than a layer of a batch
    # has.
    counts = jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)
    return jnp.mean(counts.astype(jnp.float32)) / (mask.size // mask.shape[0])


def _wanted(module: nn.Module, collection: str) -> bool:
    # In init, linen makes every collection mutable; metrics are no variables of a model.
    return module.is_mutable_collection(collection) and not module.is_initializing()


def _sow(module: nn.Module, collection: str, kind: str, part: str, value: Array) -> None:
    module.sow(collection, kind, {part: value}, init_fn=dict, reduce_fn=operator.or_)
