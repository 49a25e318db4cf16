"""Measures what a device reaches at best: bytes per second, and operations per second by dtype.

    python -m benchmarks.ceilings
    python -m benchmarks.ceilings --json ceilings.json

Needs jax alone, and measures ``jax.devices()[0]``. No program can be much faster than its bytes and its
operations take at these rates, so `train_step` measures them in the same run and
compares its figures with them.

Bytes per second, of float32 arrays far larger than the caches (the best of the three is the ceiling):

- ``read``: the sums of the rows of an array; one read per element.
- ``update``: ``x + 1`` into the memory of x itself, which is donated; a read and a write per element.
- ``add``: ``x + y`` into the memory of a third array, which is donated; two reads and a write per element.
  What a CPU reads before it overwrites is not counted.

No result takes fresh memory: its page faults would be measured instead.

Operations per second, two for each multiply-accumulate:

- ``float32``, ``bfloat16``, ``int8``: square matrix products in JAX's default precision (TF32 for float32 on
  NVIDIA GPUs), the last two accumulated in float32 and int32.
- ``binary``: products of signs packed into uint32, by exclusive or and population count, 32
  multiply-accumulates per word.

The best of several rounds counts: other programs slow a machine down and never speed it up.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.floor import MATRIX_DTYPES, best_rate, format_rate
from bvit_jax.errors import UserError
from bvit_jax.runtime.chips import chip_of

ROUND_SECONDS = 0.3  # at least, of a round
WORD_BITS = 32
ROW = 1024  # elements of a row of which `read` takes the sum


@dataclass(frozen=True)
class Sizes:
    """How large the arrays are.

    Attributes:
      elements: float32 values of each array that bandwidth is measured with.
      side: rows and columns of the matrices.
      binary: rows, words of a row, and columns of the binary product.
    """

    elements: int
    side: int
    binary: tuple[int, int, int]


CPU = Sizes(elements=2**26, side=2048, binary=(3072, 12, 384))
ACCELERATOR = Sizes(elements=2**28, side=8192, binary=(8192, 32, 8192))


def default_sizes(platform: str, scale: float = 1.0) -> Sizes:
    """Returns sizes for a platform of JAX ("cpu", "gpu", "tpu"), each array's elements times ``scale``.

    Raises:
      UserError: the scale is not in (0, 1].
    """
    if not 0 < scale <= 1:
        raise UserError(f"the scale of the ceilings is {scale:g}; expected a number above 0 and at most 1")
    full = CPU if platform == "cpu" else ACCELERATOR
    rows, words, columns = full.binary
    return Sizes(
        elements=max(int(full.elements * scale) // ROW, 1) * ROW,
        side=max(int(full.side * scale**0.5), 1),
        binary=(max(int(rows * scale**0.5), 1), words, max(int(columns * scale**0.5), 1)),
    )


def measure(sizes: Sizes, rounds: int = 3) -> dict[str, Any]:
    """Returns the ceilings of the first device, ready for JSON.

    ``bytes_per_second`` and ``operations_per_second`` hold the rates of all rounds by name; ``published`` is
    what the maker says of the chip where `bvit_jax.runtime.chips` knows it, else None.
    """
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    published = (
        {
            "bytes_per_second": chip.bandwidth,
            "bfloat16": chip.bfloat16_flops,
            "int8": chip.int8_ops,
        }
        if chip
        else None
    )
    with jax.default_device(device):
        return {
            "device": device.device_kind,
            "sizes": {"elements": sizes.elements, "side": sizes.side, "binary": list(sizes.binary)},
            "bytes_per_second": _bytes_per_second(sizes.elements, rounds),
            "operations_per_second": {
                **{dtype: _matrix_product(sizes.side, dtype, rounds) for dtype in MATRIX_DTYPES},
                "binary": binary_product(*sizes.binary, rounds),
            },
            "published": published,
        }


def _bytes_per_second(elements: int, rounds: int) -> dict[str, list[float]]:
    x, y = (jnp.full(elements, value, jnp.float32) for value in (1, 2))
    size = x.nbytes
    read = jax.jit(lambda x: jnp.sum(x.reshape(-1, ROW), axis=1))
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    add = jax.jit(lambda out, x, y: x + y, donate_argnums=0, keep_unused=True)
    return {
        "read": rates(lambda _: read(x), size, rounds),
        "update": rates(update, 2 * size, rounds, jnp.zeros_like(x)),
        "add": rates(lambda out: add(out, x, y), 3 * size, rounds, jnp.zeros_like(x)),
    }


def _matrix_product(side: int, dtype: str, rounds: int) -> list[float]:
    accumulator = jnp.int32 if dtype == "int8" else jnp.float32
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=accumulator))
    return rates(lambda _: product(a, a), 2 * side**3, rounds)


def binary_product(rows: int, words: int, columns: int, rounds: int) -> list[float]:
    """Returns the operations per second of products of packed signs, of each round."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.bits(keys[0], (rows, words), jnp.uint32)
    w = jax.random.bits(keys[1], (words, columns), jnp.uint32)
    product = jax.jit(differing_bits)
    return rates(lambda _: product(x, w), 2 * rows * columns * words * WORD_BITS, rounds)


def differing_bits(x: Array, w: Array) -> Array:
    """Returns in how many bits each row of x differs from each column of w.

    With signs as bits, the product of K signs is K less twice that number.

    Args:
      x: packed rows, uint32 [rows, words].
      w: packed columns, uint32 [words, columns].

    Returns:
      int32 [rows, columns].
    """
    count = jnp.zeros((x.shape[0], w.shape[1]), jnp.int32)
    for k in range(w.shape[0]):  # unrolled: the compiler makes one loop over the result of it
        count += jax.lax.population_count(x[:, k : k + 1] ^ w[k : k + 1]).astype(jnp.int32)
    return count


def rates(call: Callable[[Any], Any], amount: float, rounds: int, first: Any = None) -> list[float]:
    """Returns ``amount`` per second of each round; every call takes the result of the one before."""
    result = jax.block_until_ready(call(first))  # compiles
    began = time.perf_counter()
    result = jax.block_until_ready(call(result))
    calls = max(1, round(ROUND_SECONDS / (time.perf_counter() - began)))
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            result = call(result)
        jax.block_until_ready(result)
        rates.append(amount * calls / (time.perf_counter() - began))
    return rates


def table(ceilings: dict[str, Any]) -> str:
    """Returns the findings of `measure` as plain text."""
    published = ceilings["published"] or {}
    lines = [f"ceilings   {ceilings['device']}, the best of the rounds (the lowest)"]
    for name, rates in ceilings["bytes_per_second"].items():
        lines.append(_row(f"memory, {name}", rates, "B/s", None))
    if "bytes_per_second" in published:
        lines.append(f"  {'memory, published':<20} {format_rate(published['bytes_per_second'])}B/s")
    for name, rates in ceilings["operations_per_second"].items():
        lines.append(_row(f"{name} products", rates, "op/s", published.get(name)))
    return "\n".join(lines)


def _row(name: str, rates: list[float], unit: str, published: float | None) -> str:
    best, low = (f"{format_rate(rate)}{unit}" for rate in (best_rate(rates), min(rates)))
    maker = f"; published: {format_rate(published)}{unit}" if published else ""
    return f"  {name:<20} {best} ({low}){maker}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceilings",
        description="Measures the bandwidth and the arithmetic of a device.",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of each (3)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="share of the usual sizes (1), for a trial or a small memory; caches hold what is too small",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")
    arguments = parser.parse_args(argv)
    try:
        if arguments.rounds < 1:
            raise UserError(f"--rounds is {arguments.rounds}; expected a number of at least 1")
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise UserError(f"--json is {arguments.json}: its directory does not exist")
        found = measure(default_sizes(jax.default_backend(), arguments.scale), arguments.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
