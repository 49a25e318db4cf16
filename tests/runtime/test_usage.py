"""Memory, operations and utilisation."""

import mmap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.runtime import usage
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated


def test_memory_of_the_process_where_devices_do_not_count():
    before = usage.device_memory()
    assert 0.05 < before["memory_peak_gb"] < 1000
    # Not from the allocator, which may hold memory that other tests have freed.
    pages = np.frombuffer(mmap.mmap(-1, 40_000_000), np.uint8)
    pages[:] = 1
    after = usage.device_memory()
    assert after["memory_peak_gb"] >= after["memory_gb"]
    assert after["memory_gb"] - before["memory_gb"] == pytest.approx(0.04, abs=0.01)
    assert pages.sum() == 40_000_000


def devices(*statistics):
    return lambda: [SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in statistics]


def test_memory_of_the_fullest_device(monkeypatch):
    some = {"bytes_in_use": 2_000_000_000, "peak_bytes_in_use": 3_000_000_000}
    more = {"bytes_in_use": 1_000_000_000, "peak_bytes_in_use": 5_000_000_000, "bytes_limit": 1}
    monkeypatch.setattr(jax, "local_devices", devices(some, more))
    assert usage.device_memory() == {"memory_gb": 2, "memory_peak_gb": 5}
    monkeypatch.setattr(jax, "local_devices", devices({"bytes_in_use": 1_000_000_000}))
    assert usage.device_memory() == {"memory_gb": 1}


def test_flops_are_those_of_all_devices():
    mesh = make_mesh()
    spread = batch_sharded(mesh)
    product = jax.jit(jnp.matmul, in_shardings=(spread, replicated(mesh)), out_shardings=spread)
    lowered = product.lower(jnp.ones((64, 32)), jnp.ones((32, 16)))
    assert usage.step_flops(lowered) == pytest.approx(2 * 64 * 32 * 16, rel=1e-3)


@pytest.mark.parametrize("cost", [None, {}, {"flops": -1.0}, {"flops": float("nan")}])
def test_flops_that_are_not_known(cost):
    assert usage.step_flops(SimpleNamespace(cost_analysis=lambda: cost)) is None


def test_speed():
    known = usage.speed(512, 0.5, 4, 6e12, 1e13)
    assert known == {"images_per_second_per_chip": 256, "flops_utilization": pytest.approx(0.3)}
    for flops, peak in ((None, 1e13), (6e12, None)):
        assert usage.speed(512, 0.5, 4, flops, peak) == {"images_per_second_per_chip": 256}
