"""What there is to measure: devices, drivers, versions."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.machine import commit
from bvit_jax.data.cores import usable_cores
from bvit_jax.report.machine import cpu_model, versions


def describe() -> Iterator[dict[str, Any]]:
    """Yields what the machine is, after one computation on its first device."""
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    assert float(jnp.ones((64, 64)).sum()) == 64 * 64
    yield {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory": statistics.get("bytes_limit"),
        "driver": _driver(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }


def _driver() -> str:
    """Returns card, driver and memory as the driver says, "" where there is none of NVIDIA's."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return (ran.stdout or ran.stderr).strip()
