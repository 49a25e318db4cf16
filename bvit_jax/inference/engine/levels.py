"""Who computes the operations of the engine: XLA everywhere, or `compiled` code on a CPU that has it."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from jax import Array

from bvit_jax.inference.engine import operations


@dataclass(frozen=True)
class Operations:
    """The operations, functions as `bvit_jax.inference.engine.operations` has them."""

    count: Callable[..., Array]
    unit: Callable[..., Array]
    unit_end: Callable[..., tuple[Array, Array]]
    feed_forward: Callable[..., tuple[Array, Array]]
    attention: Callable[..., Array]
    average_pool: Callable[..., Array]
    downsample: Callable[..., tuple[Array, Array]]
    branches: Callable[..., Array]
    follow: Callable[..., Array]
    normalise: Callable[..., Array]


XLA = Operations(*(getattr(operations, field.name) for field in fields(Operations)))
