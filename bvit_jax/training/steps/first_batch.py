"""The start of a run: quantisers that take their values from the first batch see it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from bvit_jax.layers.first_values import SEEN, first_batch
from bvit_jax.training.steps.batch import Batch, Inputs
from bvit_jax.training.steps.state import TrainState


def starts_from_a_batch(state: TrainState) -> bool:
    """Returns whether a model has quantisers that are initialised from the first batch."""
    paths = jax.tree_util.tree_leaves_with_path(state.batch_stats)
    return any(path[-1].key == SEEN for path, _ in paths)


def start(
    model: nn.Module,
    inputs: Inputs,
    accumulate_steps: int,
    mesh: Mesh | None,
    state: TrainState,
    batch: Batch,
    key: Array,
) -> TrainState:
    """Returns the state after the quantisers have seen the first batch.

    Images and dropout are those of the first step, or of its first microbatch. Only the values of quantisers
    that have seen no batch change, in the moving average too.
    """
    images, dropout_key = inputs.first_images(batch, key, state.step, accumulate_steps, mesh)
    _, variables = first_batch(model, state.variables, images, {"dropout": dropout_key})
    params, statistics = variables["params"], variables["batch_stats"]
    ema: Any = state.ema
    if ema is not None:
        new = {"params": params, "batch_stats": statistics}
        ema = jax.tree.map(
            lambda old, new, ema: jnp.where(new != old, new, ema), dict(state.variables), new, ema
        )
    return dataclasses.replace(state, params=params, batch_stats=statistics, ema=ema)
