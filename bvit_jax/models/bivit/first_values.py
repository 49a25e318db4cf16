"""Learned values that start from the first batch of training, not from the key.

A module asks for them with `learned_values`; `first_batch` is the one pass that sets them. The flag that it
happened is kept among the statistics, so that a checkpoint says it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.models.execution.stages import Execution
from bvit_jax.models.swin import PatchMerging

SEEN = "init_state"  # float (1,), the released checkpoints' name of the flag


def learned_values(
    module: nn.Module, starts: Mapping[str, float], size: int, first: Callable[[], Mapping[str, Array]]
) -> dict[str, Array]:
    """Returns parameters of ``module``, each (size,), which the first batch sets.

    Args:
      module: inside its compact method; has no other such values.
      starts: the value of each parameter before any batch, by name.
      size: of each parameter.
      first: what the batch makes of them, in shapes that broadcast; called in the pass over the first batch.
    """
    values = {
        name: module.param(name, nn.initializers.constant(value), (size,)) for name, value in starts.items()
    }
    seen = module.variable("batch_stats", SEEN, jnp.zeros, (1,))
    if is_first_batch(module):
        for name, value in first().items():
            values[name] = unless(seen.value, values[name], value)
            module.put_variable("params", name, values[name])
        seen.value = jnp.ones_like(seen.value)
    return values


def is_first_batch(module: nn.Module) -> bool:
    """Returns whether this is the pass that takes learned values from the batch."""
    return module.is_mutable_collection("params") and not module.is_initializing()


def unless(seen: Array, value: Array, first: Array) -> Array:
    """Returns ``value`` where the flag, shape (1,), is set, else ``first`` in its shape and dtype."""
    return jnp.where(seen[0] == 0, jnp.broadcast_to(first, value.shape).astype(value.dtype), value)


def first_batch(
    model: nn.Module, variables: Any, images: Array, rngs: dict[str, Array] | None = None
) -> tuple[Any, Any]:
    """Runs the first training batch, from which the modules that saw none take their values.

    A training step on the same images and with the same random streams then computes what Bi-ViT's released
    code computes in its first step, gradients included.

    Args:
      model: a model, or a `PatchMerging`.
      variables: its ``params`` and ``batch_stats``.
      images: what the model takes, images (batch, image_size, image_size, 3), normalised.
      rngs: of dropout and drop-path, if the model has any.

    Returns:
      The output of the model, and the variables with values and flags set.
    """
    collections = ["params", "batch_stats"]
    if isinstance(model, PatchMerging):
        return model.apply(variables, images, mutable=collections)
    # In a scan over blocks no parameter can be written.
    model = model.clone(execution=Execution())
    return model.apply(variables, images, train=True, rngs=rngs, mutable=collections)
