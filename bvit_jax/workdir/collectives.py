"""What the processes of a run do together: the one module that uses JAX's experimental functions for it.

All processes call each function equally often, in the same order. A run of one process needs no others.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bvit_jax.errors import UserError


def from_first_process(number: int) -> int:
    """Returns the number that the first process passes, an int32, in all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def on_first_process(action: Callable[[], None]) -> None:
    """Does something on the first process; raises in all of them if it raises `UserError` there."""
    error: UserError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as raised:
            error = raised
    if from_first_process(int(error is not None)):
        raise error or UserError("process 0 stops the run; see its message")


def of_all_processes(array: Any) -> np.ndarray:
    """Returns the arrays of all processes, ``[processes, ...]``."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(array))).reshape(
        jax.process_count(), *np.shape(array)
    )


def wait_for_all(name: str) -> None:
    """Waits until all processes have come to the point of this name; for the thread that computes."""
    multihost_utils.sync_global_devices(name)


def wait_for_all_in_thread(name: str, timeout_seconds: int) -> None:
    """Does the same without the devices, so that any thread may call it; raises `TimeoutError`."""
    import orbax.checkpoint as ocp  # here, because it takes seconds

    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * timeout_seconds)


def preemption_reached(tick: int) -> bool:
    """Returns whether all processes are to stop at this tick, because one of them was asked to."""
    return multihost_utils.reached_preemption_sync_point(tick)
