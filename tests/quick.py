"""What makes XLA compile in half the time: tests compile far more than they compute."""

from importlib.metadata import version

_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones have no such flag
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def xla_flags(devices: int) -> str:
    """Returns XLA's flags for some simulated CPU devices and quick compilation."""
    return " ".join([*_FLAGS, f"--xla_force_host_platform_device_count={devices}"])
