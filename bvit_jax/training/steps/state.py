"""Everything a training run carries from step to step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh
from jax.tree_util import GetAttrKey, register_pytree_with_keys_class

from bvit_jax.layers.kernels import noted_kernels, pack_signs
from bvit_jax.runtime.mesh import state_sharding, with_sharding


@register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run; a pytree that is donated to the training step, and saved.

    Attributes:
      step: number of steps taken, int32 ().
      params: latent weights and all other parameters, float32.
      batch_stats: running statistics of the batch norms, float32.
      opt_state: state of the optax chain.
      ema: the moving average of ``params`` and ``batch_stats``, a dictionary of both, float32; None without
        one, and then the tree has no such branch.
      signs: signs of the binary weights at the last log, as `bvit_jax.layers.kernels.pack_signs` returns
        them; {} if the health of the network is not measured. The step passes it through.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any = None
    signs: Any = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def replace(self, **changes: Any) -> "TrainState":
        """Returns the state with some fields replaced."""
        return dataclasses.replace(self, **changes)

    # Written out, because a checkpoint would record a None, and those without the field would not fit.
    def tree_flatten_with_keys(self) -> tuple[list[tuple[GetAttrKey, Any]], tuple[str, ...]]:
        """Returns the branches with their names, as jax asks for them."""
        names = [field.name for field in dataclasses.fields(self)]
        if self.ema is None:
            names.remove("ema")
        return [(GetAttrKey(name), getattr(self, name)) for name in names], tuple(names)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], branches: Any) -> "TrainState":
        """Undoes `tree_flatten_with_keys`."""
        return cls(**dict(zip(names, branches, strict=True)))


def create_state(
    key: Array,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    given: Mapping[str, Any] | None = None,
    *,
    ema: bool = False,
    health: bool = False,
) -> TrainState:
    """Returns the initial state; traceable, so that it can be created where it will live.

    With ``ema`` it has a moving average, which begins as the initial variables; with ``health`` the signs of
    the binary weights, one bit each. The arrays of ``given``, a tree of some of the model's ``params`` and
    ``batch_stats``, replace the random ones first.
    """
    with noted_kernels() as kernels:
        variables = model.init(key, jnp.zeros((1, image_size, image_size, 3)))
    variables = _overlaid(variables, given or {})
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema={"params": params, "batch_stats": batch_stats} if ema else None,
        signs=pack_signs(params, kernels) if health else {},
    )


def _overlaid(variables: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    flat, new = flatten_dict(variables), flatten_dict(given)
    return unflatten_dict(flat | {path: jnp.asarray(a, flat[path].dtype) for path, a in new.items()})


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    mesh: Mesh,
    *,
    ema: bool = False,
    health: bool = False,
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, without computing anything."""
    shapes = jax.eval_shape(
        lambda key: create_state(key, model, optimizer, image_size, ema=ema, health=health), jax.random.key(0)
    )
    return with_sharding(shapes, state_sharding(shapes, mesh))
