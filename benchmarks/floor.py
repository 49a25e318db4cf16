"""The least time that a step can take on a machine, from what its model computes; plain arithmetic.

For a model and one image, `workload.Work` holds the multiply-accumulates (MACs) of its products, as
`bvit_jax.cost` counts them, and the elements that its products read and write. Then, for B images:

    FLOPs     forward, evaluation   2 · MACs · B
              training              3 times that: of the backward pass two products for each of the forward
    bytes     forward, evaluation   variables, read once                       + B · elements · itemsize
              training              training state, read once and written once + 3 · B · elements · itemsize
    floor     max(FLOPs / ceiling, bytes / bandwidth)

``itemsize`` is that of the compute dtype. The elements are those of the arrays that products read, each once
however many products read it, and of those that they write. The backward pass touches each twice: what was
read is read again for the gradient of the weight and its own gradient is written; of what was written the
gradient is read, for two products. Everything between two products is taken as fused with them; weights take
no bytes but as variables, and the gradients of variables none.

The ceiling of operations is that of the kind of product, all measured on the same machine: for the forward
products of two binary operands the fastest of all, since binary, int8 and bfloat16 products of signs are
equally exact; for real forward products and all of the backward pass, whose gradients are real, that of the
compute dtype. The times of the two parts are added up.

The floor is one of this way of computing, not a law: packed bits, or operands that stay in caches from one
product to the next, touch fewer bytes. Then a share of it may be above 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import Kind, Work

MATRIX_DTYPES = ("float32", "bfloat16", "int8")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
Ceilings = Mapping[str, Any]  # as `ceilings.measure` returns them


@dataclass(frozen=True)
class Floor:
    """The least that a step needs.

    Attributes:
      flops: two for each multiply-accumulate.
      bytes: touched in memory.
      flops_seconds: that the first takes at the measured ceilings.
      bytes_seconds: that the second takes.
    """

    flops: int
    bytes: int
    flops_seconds: float
    bytes_seconds: float

    @property
    def seconds(self) -> float:
        """The larger of the two times."""
        return max(self.flops_seconds, self.bytes_seconds)


def flops(work: Work, kind: Kind, batch: int) -> int:
    """Returns the floating-point operations of a step's products, binary ones included."""
    return 2 * batch * (work.binary_macs + work.real_macs) * _passes(kind)


def least_bytes(work: Work, kind: Kind, batch: int, dtype: str) -> int:
    """Returns the bytes that a step touches at least; see the docstring of this file."""
    fixed = 2 * work.state_bytes if kind == "training" else work.variable_bytes
    return fixed + _passes(kind) * batch * work.elements * ITEMSIZE[dtype]


def floor(work: Work, kind: Kind, batch: int, dtype: str, ceilings: Ceilings) -> Floor:
    """Returns the least that a step of ``batch`` images needs on a machine.

    Args:
      work: of the model.
      kind: of the step.
      batch: number of images.
      dtype: of the activations, a key of `ITEMSIZE`.
      ceilings: of the machine.
    """
    binary, real = (2 * batch * macs for macs in (work.binary_macs, work.real_macs))
    backward = (_passes(kind) - 1) * (binary + real)
    seconds = binary / peak(ceilings, "binary") + (real + backward) / peak(ceilings, dtype)
    size = least_bytes(work, kind, batch, dtype)
    return Floor(flops(work, kind, batch), size, seconds, size / bandwidth(ceilings))


def bandwidth(ceilings: Ceilings) -> float:
    """Returns the best measured bytes per second."""
    return max(map(best_rate, ceilings["bytes_per_second"].values()))


def peak(ceilings: Ceilings, dtype: str) -> float:
    """Returns the best measured operations per second for products of a dtype, or of "binary" operands.

    For binary operands, and for 16 bits, it is the best of all products that are as exact.
    """
    rates = {name: best_rate(rounds) for name, rounds in ceilings["operations_per_second"].items()}
    if dtype == "binary":
        return max(rates.values())
    if dtype in ("bfloat16", "float16"):
        return max(rates["bfloat16"], rates["float32"])
    return rates[dtype]


def best_rate(rounds: Sequence[float]) -> float:
    """Returns the rate of the best round: other programs only slow a machine down."""
    return max(rounds)


def format_rate(rate: float) -> str:
    """Returns a number with the prefix of its unit, such as "1.35 T"."""
    scale, prefix = next(((s, p) for s, p in PREFIXES if rate >= s), (1.0, ""))
    return f"{rate / scale:.3g} {prefix}"


def _passes(kind: Kind) -> int:
    """Returns how many times the forward pass's products and activations a step needs."""
    return 3 if kind == "training" else 1
