"""GPUs without GPUs: XLA's compiler in JAX's CUDA plugin, for cards that are described to it.

Choices that the compiler makes by timing kernels on a card, such as the tiles of a product, are left at their
defaults: programs compiled here are planned, and run elsewhere only after they are compiled again.
"""

import importlib.metadata
import re
from collections.abc import Sequence

import jax

from bvit_jax.errors import UserError
from bvit_jax.runtime.chips import Chip, chip_named

GPUS = {"h100": "H100", "h200": "H200"}  # of the same processor, with different memories
PLUGINS = ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
MAX_GPUS = 8  # of one machine
# What CUDA reports of a card with compute capability 9.0 (XLA's GpuTargetConfig, in protobuf's text format).
_HOPPER = """
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 device_memory_size: {memory} memory_bandwidth: {bandwidth}
}}
"""


def parse(name: str) -> tuple[Chip, int] | None:
    """Returns card and number of a name such as "h100" or "h100:8"; None if it is none of a GPU.

    Raises:
      UserError: there are not so many in one machine.
    """
    match = re.fullmatch(rf"({'|'.join(GPUS)})(?::(\d+))?", name.strip().lower())
    if match is None:
        return None
    chip, count = chip_named(GPUS[match[1]]), int(match[2] or 1)
    assert chip is not None  # every card is in the table
    if not 0 < count <= MAX_GPUS:
        raise UserError(f"--topology is {name!r}; expected 1 to {MAX_GPUS} GPUs, those of one machine")
    return chip, count


def open_gpus(chip: Chip, count: int) -> Sequence[jax.Device]:
    """Returns some GPUs that nothing can run on.

    In a process of ours, call `process.stay_on_cpu` before JAX is used.

    Raises:
      UserError: the plugin is missing, or cannot compile without a GPU.
    """
    if compiler_version() is None:
        raise UserError(
            f"--topology={chip.name.lower()} needs the compiler in JAX's CUDA plugin, which runs without a"
            ' GPU; install it with: pip install "jax[cuda13]"'
        )
    from jax.experimental import topologies

    target = _HOPPER.format(kind=chip.device_kinds[0], memory=chip.hbm_bytes, bandwidth=int(chip.bandwidth))
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--topology={chip.name.lower()}: the CUDA plugin of jax {jax.__version__} does not compile"
            f" without a GPU ({first}); jax 0.12 does"
        ) from error
    return found.devices


def compiler_version() -> tuple[str, str] | None:
    """Returns name and version of the package that has the compiler, None if there is none."""
    for name in PLUGINS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
