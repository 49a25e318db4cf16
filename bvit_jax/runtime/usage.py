"""What a run uses of its machine: memory, and its share of the hardware's speed."""

import contextlib
import math
import resource
import sys
from pathlib import Path
from typing import Any

import jax

GB = 1e9


def device_memory() -> dict[str, float]:
    """Returns the memory in use and its peak since the start, on the fullest local device, in GB of 10^9.

    If the devices do not count it (CPUs do not), both are the resident memory of this process.

    Returns:
      ``memory_gb`` and ``memory_peak_gb``; unknown values are left out.
    """
    counts = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not counts:
        return _process_memory()
    names = {"memory_gb": "bytes_in_use", "memory_peak_gb": "peak_bytes_in_use"}
    return {
        name: max(stats[key] for stats in counts) / GB
        for name, key in names.items()
        if all(key in stats for stats in counts)
    }


def _process_memory() -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory_peak_gb": peak * (1 if sys.platform == "darwin" else 1024) / GB}
    with contextlib.suppress(OSError):  # only Linux has this file
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["memory_gb"] = pages * resource.getpagesize() / GB
        # The kernel updates the peak a little later.
        found["memory_peak_gb"] = max(found.values())
    return found


def step_flops(lowered: jax.stages.Lowered) -> float | None:
    """Returns the floating-point operations of a lowered step on all devices together.

    They are counted in the program as written, before the compiler partitions or changes it. A step whose
    model rematerializes counts twice what it computes twice, so lower one that does not; the body of a loop
    counts once, and a custom kernel not at all.

    Returns:
      The operations, or None if the backend does not count them.
    """
    cost: Any = lowered.cost_analysis()
    flops = (cost or {}).get("flops", math.nan)
    return float(flops) if flops > 0 else None


def speed(
    batch_size: int, seconds_per_step: float, devices: int, flops: float | None, peak: float | None
) -> dict[str, float]:
    """Returns how well a run uses its chips.

    Args:
      batch_size: global.
      seconds_per_step: mean over some steps.
      devices: number of chips of the run.
      flops: operations per step, see `step_flops`; None if unknown.
      peak: operations per second of one chip in the dtype of the products; None if unknown.

    Returns:
      ``images_per_second_per_chip`` and, if known, ``flops_utilization``, from 0 to 1.
    """
    found = {"images_per_second_per_chip": batch_size / seconds_per_step / devices}
    if flops is not None and peak is not None:
        found["flops_utilization"] = flops / (seconds_per_step * devices * peak)
    return found
