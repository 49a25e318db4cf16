"""The mesh, and where every array lives.

The mesh has two axes. Images are spread over both. Parameters and the optimiser's state are replicated on
every device, or spread over ``fsdp`` if it has more than one device; everything else is always replicated.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bvit_jax.errors import UserError

DATA_AXIS, FSDP_AXIS = "data", "fsdp"
BATCH = PartitionSpec((DATA_AXIS, FSDP_AXIS))

LARGEST, WHOLE = "largest", "whole"
# Path of an array in the state, and which of its axes is split over fsdp; the first match counts.
RULES = (
    (r"^(batch_stats|step|signs)\b", WHOLE),
    (r"^ema/batch_stats\b", WHOLE),
    (r"", LARGEST),
)


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """Returns the mesh of the devices, by default all of all processes.

    Args:
      devices: their number must be a multiple of ``fsdp``.
      fsdp: devices that share one copy of the parameters; neighbours, so they are on one host if it
        has that many.

    Raises:
      UserError: the devices do not divide.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise UserError(f"config.mesh.fsdp is {fsdp}; expected a divisor of the {len(devices)} devices")
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp), (DATA_AXIS, FSDP_AXIS), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, BATCH)


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a training state, by the table `RULES`.

    Args:
      tree: arrays or their shapes, of the whole state.
      mesh: with an fsdp axis of 1, every array is replicated.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = next(kind for pattern, kind in RULES if re.search(pattern, name))
        spec = PartitionSpec() if kind == WHOLE else _over_fsdp(leaf.shape, mesh.shape[FSDP_AXIS])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _over_fsdp(shape: tuple[int, ...], count: int) -> PartitionSpec:
    """Returns the spec that splits the largest axis which ``count`` divides, if there is one."""
    sizes = [size if size % count == 0 else 0 for size in shape]
    if count == 1 or not any(sizes):
        return PartitionSpec()
    axis = int(np.argmax(sizes))
    return PartitionSpec(*(None,) * axis, FSDP_AXIS)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns host arrays, the same in all processes, as arrays replicated on every device."""

    def put(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, replicated(mesh), lambda index: array[index])

    return jax.tree.map(put, tree)


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises `UserError` if a global batch does not divide over the devices."""
    if batch_size % mesh.size:
        raise UserError(f"config.{key} is {batch_size}; expected a multiple of the {mesh.size} devices")


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns which rows of a global batch the devices of this process hold, ascending, int64 [b]."""
    indices = batch_sharded(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.concatenate(
        sorted((np.arange(batch_size)[index] for index in indices), key=lambda rows: rows[0])
    )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global arrays of a batch of which this process holds its `local_rows`."""
    sharding = batch_sharded(mesh)
    put = partial(jax.make_array_from_process_local_data, sharding)
    with jax.transfer_guard("allow"):  # with several processes jax takes this for an implicit transfer
        return {name: put(array) for name, array in batch.items()}


def with_sharding(tree: Any, shardings: Any) -> Any:
    """Returns the shapes and dtypes of a tree of arrays with their shardings, one for all or a tree."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)

    def struct(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(struct, tree, shardings)
