"""The experimental functions of JAX and Orbax that runs of several processes rely on."""

import inspect

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from bvit_jax.workdir import collectives

NEEDED = {
    "broadcast_one_to_all": ["in_tree"],
    "process_allgather": ["in_tree"],
    "sync_global_devices": ["name"],
    "reached_preemption_sync_point": ["step_id"],
}


@pytest.mark.parametrize("name", NEEDED)
def test_jax_still_has_the_functions(name: str) -> None:
    function = getattr(multihost_utils, name, None)
    assert function is not None, f"jax {jax.__version__} has no multihost_utils.{name}"
    found = list(inspect.signature(function).parameters)
    assert found[: len(NEEDED[name])] == NEEDED[name], f"jax {jax.__version__} changed multihost_utils.{name}"


def test_orbax_still_has_its_barrier() -> None:
    function = getattr(ocp.multihost, "get_barrier_sync_fn", None)
    assert function is not None, f"orbax {ocp.__version__} has no multihost.get_barrier_sync_fn"
    function()(key="a point", timeout_ms=1000)


def test_one_process_agrees_with_itself() -> None:
    assert collectives.from_first_process(7) == 7
    np.testing.assert_array_equal(collectives.of_all_processes(np.arange(3)), [[0, 1, 2]])
    np.testing.assert_array_equal(collectives.of_all_processes(np.int32(5)), [5])
    collectives.wait_for_all("a point")
    collectives.wait_for_all_in_thread("another point", 1)
