"""Published figures of chips: memory, bandwidth and arithmetic peaks.

Sources:

- TPU: the tables of key chip specifications at ``https://cloud.google.com/tpu/docs/`` ``v4``, ``v5e``,
  ``v5p`` and ``v6e``. Some versions of the pages of v5e and v6e round the bandwidth to 800 and 1600 GB/s,
  others give 819 and 1640, which are used. v4 has no faster int8 than bfloat16. The figures of v4 and v5p
  are from summaries that cite these pages.
- NVIDIA: the data sheets of the A100, H100 and H200, from summaries that cite them; arithmetic on tensor
  cores without sparsity, which is half of what the Hopper sheets print.
- ``compiler_bytes``: what the TPU compiler itself names when a program does not fit ("exceeds available
  HBM (15.75G)"), with libtpu 0.0.42.1. The rest is the system's.
"""

from dataclasses import dataclass

GIB = 2**30
GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Chip:
    """One device as JAX sees it; a TPU v4 or v5p chip with its two cores as one (megacore).

    Attributes:
      name: short name; for a TPU the one that topologies use, such as "v5e".
      device_kinds: possible values of ``jax.Device.device_kind``.
      hbm_bytes: size of its memory.
      bandwidth: of that memory, bytes per second.
      bfloat16_flops: peak of matrix products, floating-point operations per second.
      int8_ops: peak of int8 products, operations per second.
      compiler_bytes: how much of the memory a program may use; 0 if unknown.
    """

    name: str
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    bandwidth: float
    bfloat16_flops: float
    int8_ops: float
    compiler_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        """How much of the memory a program may use, as far as known."""
        return self.compiler_bytes or self.hbm_bytes


def _tpu(
    name: str, kinds: tuple[str, ...], hbm: int, compiler: float, bandwidth: int, bfloat16: int, int8: int
) -> Chip:
    """Takes GiB, GiB, GB/s, TFLOP/s and TOP/s."""
    usable = int(compiler * GIB)
    return Chip(name, kinds, hbm * GIB, bandwidth * GB, bfloat16 * TERA, int8 * TERA, usable)


def _gpu(name: str, kinds: tuple[str, ...], memory: int, bandwidth: int, bfloat16: int, int8: int) -> Chip:
    """Takes GB, GB/s, TFLOP/s and TOP/s."""
    return Chip(name, kinds, memory * GB, bandwidth * GB, bfloat16 * TERA, int8 * TERA)


CHIPS = (
    _tpu("v4", ("TPU v4",), 32, 30.75, 1200, 275, 275),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 16, 15.75, 819, 197, 393),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 96, 95.74, 2765, 459, 918),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 32, 31.25, 1640, 918, 1836),
    _gpu("A100-40GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40, 1555, 312, 624),
    _gpu("A100-80GB", ("NVIDIA A100-SXM4-80GB",), 80, 2039, 312, 624),
    _gpu("A100-80GB-PCIe", ("NVIDIA A100 80GB PCIe",), 80, 1935, 312, 624),
    _gpu("H100", ("NVIDIA H100 80GB HBM3",), 80, 3350, 989, 1979),
    _gpu("H100-PCIe", ("NVIDIA H100 PCIe",), 80, 2000, 756, 1513),
    _gpu("H200", ("NVIDIA H200",), 141, 4800, 989, 1979),
)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip that JAX calls ``device_kind``, or None if it is not in the table (a CPU, say)."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def chip_named(name: str) -> Chip | None:
    """Returns the chip with a name such as "v5e", or None if it is not in the table."""
    return next((chip for chip in CHIPS if chip.name == name), None)
