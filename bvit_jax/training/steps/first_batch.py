"""What a run does once, before its first step: models whose quantisers start from the first batch see it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from bvit_jax.augment.augmentation import NO_AUGMENTATION, Augmentation
from bvit_jax.augment.normalization import Normalization
from bvit_jax.models.bivit.first_values import SEEN, first_batch
from bvit_jax.runtime.mesh import batch_sharded, replicated
from bvit_jax.training.steps.state import TrainState
from bvit_jax.training.steps.train import MICROBATCHES_KEY, Examples, step_keys

Start = Callable[[TrainState, Mapping[str, Array], Array], TrainState]


def starts_from_a_batch(state: TrainState) -> bool:
    """Returns whether a model has quantisers that take their values from the first batch."""
    paths = jax.tree_util.tree_leaves_with_path(state.batch_stats)
    return any(path[-1].key == SEEN for path, _ in paths)


def make_start(
    model: nn.Module,
    normalize: Normalization,
    *,
    augmentation: Augmentation = NO_AUGMENTATION,
    accumulate_steps: int = 1,
    mesh: Mesh | None = None,
) -> Start:
    """Returns the pure function from a state, the first batch and the key of the run to a state.

    Images and dropout are those of the first step, or of its first microbatch; only values of quantisers
    that have seen no batch change, in the moving average too.
    """

    def start(state: TrainState, batch: Mapping[str, Array], key: Array) -> TrainState:
        step_key, augmentation_key = step_keys(key, state.step)
        pictures, _ = augmentation(augmentation_key, batch["image"], normalize)
        if accumulate_steps > 1:
            examples = Examples(pictures, batch["label"], None, None)
            pictures = examples.microbatch(jnp.int32(0), accumulate_steps, mesh).pictures
            step_key = jax.random.fold_in(jax.random.fold_in(step_key, MICROBATCHES_KEY), 0)
        _, variables = first_batch(model, state.variables, normalize(pictures), {"dropout": step_key})
        params, statistics = variables["params"], variables["batch_stats"]
        ema: Any = state.ema
        if ema is not None:
            new = {"params": params, "batch_stats": statistics}
            ema = jax.tree.map(_where_changed, dict(state.variables), new, ema)
        return dataclasses.replace(state, params=params, batch_stats=statistics, ema=ema)

    return start


def _where_changed(old: Array, new: Array, average: Array) -> Array:
    return jnp.where(new != old, new, average)


def jit_start(start: Start, mesh: Mesh, state: Any) -> Any:
    """Compiles the function of `make_start`; ``state`` are the shardings of the training state."""
    inputs = (state, batch_sharded(mesh), replicated(mesh))
    return jax.jit(start, in_shardings=inputs, out_shardings=state)
