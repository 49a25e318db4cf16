"""Learned values that start from the first batch of training, not from the key.

A module asks for them with `learned_values`, and sets them in the one pass that calls the model with
``first_batch=True``: see `first_batch`. The flag that it happened is among the statistics, so that a
checkpoint holds it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

SEEN = "init_state"  # float (1,), the released checkpoints' name of the flag
COLLECTIONS = ("params", "batch_stats")  # what the pass changes


def learned_values(
    module: nn.Module,
    starts: Mapping[str, float],
    size: int,
    first: Callable[[], Mapping[str, Array]],
    first_batch: bool,
) -> dict[str, Array]:
    """Returns parameters of ``module``, each (size,), which the first batch sets.

    Args:
      module: inside its compact method; has no other such values.
      starts: the value of each parameter before any batch, by name.
      size: of each parameter.
      first: computes their values from the batch, in shapes that broadcast; called in the pass over the
        first batch.
      first_batch: whether this is that pass.
    """
    values = {
        name: module.param(name, nn.initializers.constant(value), (size,)) for name, value in starts.items()
    }
    seen = module.variable("batch_stats", SEEN, jnp.zeros, (1,))
    if first_batch:
        for name, value in first().items():
            values[name] = unless(seen.value, values[name], value)
            module.put_variable("params", name, values[name])
        seen.value = jnp.ones_like(seen.value)
    return values


def unless(seen: Array, value: Array, first: Array) -> Array:
    """Returns ``value`` where the flag, shape (1,), is set, else ``first`` in its shape and dtype."""
    return jnp.where(seen[0] == 0, jnp.broadcast_to(first, value.shape).astype(value.dtype), value)


def first_batch(
    model: nn.Module, variables: Any, images: Array, rngs: dict[str, Array] | None = None
) -> tuple[Any, Any]:
    """Runs the first training batch, from which the modules that saw none take their values.

    A training step on the same images and with the same random streams then computes what the PyTorch code
    computes in its first step, gradients included; that step, not this pass, advances running statistics.

    Args:
      model: one whose ``__call__`` takes ``first_batch``.
      variables: its ``params`` and ``batch_stats``.
      images: (batch, image_size, image_size, 3), normalised.
      rngs: of dropout and drop-path, if the model has any.

    Returns:
      The output of the model, and the variables with values and flags set.
    """
    output, updated = model.apply(
        variables, images, train=True, first_batch=True, rngs=rngs, mutable=list(COLLECTIONS)
    )
    statistics = _with_flags(variables["batch_stats"], updated["batch_stats"])
    return output, {"params": updated["params"], "batch_stats": statistics}


def _with_flags(before: Mapping[str, Any], after: Mapping[str, Any]) -> Any:
    """Returns the statistics ``before``, but those of modules with a flag as they are ``after``."""
    if SEEN in before:
        return after
    return {
        name: _with_flags(value, after[name]) if isinstance(value, Mapping) else value
        for name, value in before.items()
    }
