"""Everything a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import Array
from jax.sharding import Mesh

from bvit_jax.sharding import state_sharding, with_sharding


@struct.dataclass
class TrainState:
    """The state of a run; a pytree that is donated to the step and saved whole.

    Attributes:
      step: number of steps taken, int32 ().
      params: latent weights and all other parameters, float32.
      batch_stats: running statistics of the batch norms, float32.
      opt_state: state of the optax chain.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    key: Array, model: nn.Module, optimizer: optax.GradientTransformation, image_size: int
) -> TrainState:
    """Returns the initial state; traceable, so that it can be created where it will live."""
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    mesh: Mesh,
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, without computing anything."""
    shapes = jax.eval_shape(lambda key: create_state(key, model, optimizer, image_size), jax.random.key(0))
    return with_sharding(shapes, state_sharding(shapes, mesh))
