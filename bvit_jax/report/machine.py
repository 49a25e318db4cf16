"""What figures and bugs depend on: the machine, and the versions of the packages."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from bvit_jax.data.cores import usable_cores

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax"),
    *("orbax-checkpoint", "tensorflow-datasets", "grain", "numpy", "pillow", "bvit_kernels", "torch"),
)
UNITS = {"avx512bw": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}  # flags in /proc/cpuinfo, the best first


def describe(version: str) -> str:
    """Returns what a report of a bug should say: versions, ours first, processor, and what is set for JAX."""
    variables = sorted(name for name in os.environ if name.startswith(("JAX_", "XLA_")))
    lines = [
        f"bvit_jax {version}",
        f"Python {sys.version.split()[0]}, {platform.platform()}",
        f"{cpu_model()}, {usable_cores()} cores, {vector_unit() or 'vector unit not known'}",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        *(f"{name}={os.environ[name]}" for name in variables),
    ]
    return "\n".join(lines)


def cpu_model() -> str:
    """Returns the name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def vector_unit() -> str:
    """Returns the widest vector unit of the processor that matters here; "" if that is not known."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return next((name for flag, name in UNITS.items() if flag in flags), "")


def versions() -> dict[str, str]:
    """Returns the versions of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo(key: str) -> str:
    """Returns the value of the first core's line; "" without one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
