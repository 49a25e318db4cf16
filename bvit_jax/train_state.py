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
from bvit_jax.signs import noted_kernels, pack_signs


@struct.dataclass
class TrainState:
    """The state of a run; a pytree that is donated to the step and saved whole.

    Attributes:
      step: number of steps taken, int32 ().
      params: latent weights and all other parameters, float32.
      batch_stats: running statistics of the batch norms, float32.
      opt_state: state of the optax chain.
      signs: signs of the binary weights at the last log, as `bvit_jax.signs.pack_signs` returns them;
        {} where the health of the network is not measured. The step passes it through.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    signs: Any = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    key: Array,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    *,
    health: bool = False,
) -> TrainState:
    """Returns the initial state; traceable, so that it can be created where it will live.

    With ``health`` it carries the signs of the binary weights, an eighth of a byte for each.
    """
    with noted_kernels() as kernels:
        variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        signs=pack_signs(params, kernels) if health else {},
    )


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    mesh: Mesh,
    *,
    health: bool = False,
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, without computing anything."""
    shapes = jax.eval_shape(
        lambda key: create_state(key, model, optimizer, image_size, health=health), jax.random.key(0)
    )
    return with_sharding(shapes, state_sharding(shapes, mesh))
