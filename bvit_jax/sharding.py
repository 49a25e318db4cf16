"""The mesh, and where every array lives: images over ``data``, everything else on all devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bvit_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a one-dimensional mesh of the devices, by default all of all processes."""
    devices = jax.devices() if devices is None else devices
    auto = (AxisType.Auto,)
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=auto, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises `UserError` if a global batch does not divide over the devices."""
    if batch_size % mesh.size:
        raise UserError(f"config.{key} is {batch_size}; expected a multiple of the {mesh.size} devices")


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global arrays of a batch of which this process holds its part."""
    sharding = batch_sharded(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def with_sharding(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Returns the shapes and dtypes of a tree of arrays, all with one sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
